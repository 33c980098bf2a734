"""What was compiled is found again by the next process."""

import subprocess
import sys

import pytest

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
