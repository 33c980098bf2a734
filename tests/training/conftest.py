"""Tiny models on disk, for all tests of training."""

import pytest
import tiny
import tiny_encoders
from tiny_experiment import save_tiny_model


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
