"""What compilers are told; what was compiled is found again by the next process."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fjft import programs, sharding
from fjft.planning.targets import find_target

RUN = """
import sys, jax, jax.numpy as jnp
from fjft import programs
from fjft.telemetry_speed import CompileWatcher
jnp.ones(3).sum().block_until_ready()  # a notebook has compiled something before
programs.MIN_SECONDS = 0.0
programs.keep_programs(sys.argv[1])
watcher = CompileWatcher()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).block_until_ready()
print(watcher.count, watcher.cache_hits)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that compiles; gives its compilations and its cache hits."""

    def run(directory, **env):
        env = {"PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path), **env}
        env["PYTHONPATH"] = ":".join(sys.path)
        command = [sys.executable, "-c", RUN, directory]
        result = subprocess.run(
            command, env=env, capture_output=True, text=True, check=True
        )
        return tuple(map(int, result.stdout.split()))

    return run


def test_a_second_start_finds_what_the_first_compiled(start, tmp_path):
    count, hits = start("~/kept")
    assert count > 0
    assert hits == 0
    assert any((tmp_path / "kept").iterdir())
    count, hits = start("~/kept")
    assert hits == count


def test_a_cache_that_jax_was_given_stays(start, tmp_path):
    start("~/kept", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "given"))
    assert not (tmp_path / "kept").exists()


@pytest.fixture
def chips():
    """A mesh of chips that are not there; what is known of their compiler is not."""
    pytest.importorskip("libtpu")
    programs.compiler_options.cache_clear()
    yield sharding.make_mesh(sharding.Config(), list(find_target("v5e-8").devices))
    programs.compiler_options.cache_clear()


def multiply(mesh, options):
    """The program of a product with a weight whose inputs are shared out."""

    def lie(axis, *shape):
        rows = NamedSharding(mesh, PartitionSpec(axis))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)

    jitted = jax.jit(
        jnp.matmul,
        out_shardings=NamedSharding(mesh, PartitionSpec("fsdp")),
        compiler_options=options,
    )
    arrays = lie("fsdp", 8, 2048, 4096), lie("fsdp", 4096, 14336)
    return str(jitted.lower(*arrays).compile().as_text())


def test_a_sharded_weight_is_gathered_at_once(chips):
    assert "collective-permute" in multiply(chips, None)
    told = multiply(chips, programs.compiler_options(chips))
    assert "collective-permute" not in told
    assert "all-gather" in told


def test_a_compiler_is_told_only_what_it_knows(chips, monkeypatch):
    assert programs.compiler_options(chips)
    programs.compiler_options.cache_clear()
    monkeypatch.setattr(programs, "_TPU_OPTIONS", {"xla_of_another_age": 1})
    assert programs.compiler_options(chips) is None


def test_the_users_own_options_stay(chips, monkeypatch):
    [name] = programs._TPU_OPTIONS
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{name}=8")
    assert programs.compiler_options(chips) is None


def test_only_tpus_are_told_anything():
    assert programs.compiler_options(sharding.single_device_mesh()) is None
