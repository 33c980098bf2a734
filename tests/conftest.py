"""Eight CPU devices and no silent promotion, for every test; tiny models to share."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["HF_HUB_OFFLINE"] = "1"
# What one worker has compiled, no other and no program that it starts compiles again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fjft-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)
# The cores belong to the workers, and tiny models run for less time than they compile.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"  # they take half as long again to compile
)

import jaxtyping

jaxtyping.install_import_hook(
    ["fjft.models", "fjft.peft", "fjft.objectives"], "typecheck.check_types"
)

import jax  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402

from fjft.data import kept  # noqa: E402

kept.MIN_SECONDS = float("inf")  # tests leave nothing behind
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of thousands of tests would fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def get_twins(tmp_path_factory):
    """Gives the tiny model of a case, made once."""
    made = {}

    def get(case: str) -> tiny.Twins:
        if case not in made:
            made[case] = tiny.make_twins(case, tmp_path_factory.mktemp("hf"))
        return made[case]

    return get


@pytest.fixture(scope="session", params=tiny.CASES)
def twins(request, get_twins):
    """Every tiny model in turn."""
    return get_twins(request.param)
