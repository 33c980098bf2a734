"""Tiny models on disk, and compiled steps kept, for all tests of training."""

import jax
import pytest
import tiny
import tiny_encoders
from jax.experimental.compilation_cache import compilation_cache
from tiny_experiment import save_tiny_model


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory) -> str:
    """A directory that the tests, and the programs they start, share."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module", autouse=True)
def _use_compile_cache(compile_cache):
    """Most tests train the same tiny model, so most steps are compiled once."""
    jax.config.update("jax_compilation_cache_dir", compile_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    """The directory of a tiny BERT without a head, and a tokenizer with a mask."""
    twin = tiny_encoders.torch_model("bert/tanh-gelu/base")
    directory = tiny_encoders.save(twin, tmp_path_factory.mktemp("bert"))
    tokenizer = tiny.make_tokenizer()
    tokenizer.mask_token = "w59"
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """The directory of a tiny Llama with its own head, and a tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> str:
    """The directory of a tiny Qwen3 with tied embeddings, and a tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3")
