"""Checkpoints: whole or not there, on any mesh, never larger than what was trained."""

import contextlib
import errno
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fjft import sharding
from fjft.checkpoint.orbax import (
    Checkpoints,
    Config,
    digest,
    restore_params,
    saved_steps,
)
from fjft.errors import UserError


def place(array: np.ndarray, mesh_sizes=(1, 1, 1), spec: P | None = None) -> jax.Array:
    mesh = sharding.make_mesh(sharding.Config(*mesh_sizes))
    return jax.device_put(array, NamedSharding(mesh, spec or P()))


def make_state(size: int = 64, seed: int = 0, **where) -> dict:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, size, 16)).astype(np.float32)
    return {
        "step": place(np.array(seed, np.int32), where.get("mesh_sizes", (1, 1, 1))),
        "params": {"layers.a": place(values, **where)},
        "opt_state": ({"mean": place(values * 2, **where)}, ()),
    }


def assert_equal(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_round_trip_on_another_mesh(tmp_path):
    state = make_state(mesh_sizes=(1, 8, 1), spec=P(None, "fsdp", None))
    checkpoints = Checkpoints(Config(directory=str(tmp_path)))
    assert checkpoints.latest is None
    checkpoints.save(5, state, {"data": {"served": 5}, "x": 0.1 + 0.2})
    checkpoints.close()

    again = Checkpoints(Config(directory=str(tmp_path)))
    assert again.latest == 5
    assert saved_steps(tmp_path) == [5]
    # JSON keeps every digit.
    assert again.restore_progress(5) == {"data": {"served": 5}, "x": 0.1 + 0.2}
    spec = P(None, ("data", "fsdp"), "tensor")
    wanted = make_state(seed=1, mesh_sizes=(2, 2, 2), spec=spec)
    restored = again.restore(5, wanted)
    again.close()
    assert_equal(restored, state)
    assert restored["params"]["layers.a"].sharding.spec == spec
    assert restored["params"]["layers.a"].addressable_shards[0].data.shape == (2, 16, 8)


def test_what_is_saved_is_what_was_when_save_returned(tmp_path):
    """The next step overwrites donated buffers while the writer still writes."""
    state = make_state(size=40_000)
    expected = jax.device_get(state)
    expected = jax.tree.map(np.array, expected)

    def step(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    overwrite = jax.jit(step, donate_argnums=0)
    checkpoints = Checkpoints(Config(directory=str(tmp_path)))
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored = checkpoints.restore(1, state)
    checkpoints.close()
    assert_equal(restored, expected)


def test_last_ones_and_the_best_are_kept(tmp_path):
    config = Config(directory=str(tmp_path), save_total_limit=2)
    checkpoints = Checkpoints(config)
    state = make_state()
    for step in range(1, 7):
        checkpoints.kept_step = 1 if step == 1 else 2
        checkpoints.save(step, state, {})
    checkpoints.close()
    assert saved_steps(tmp_path) == [2, 5, 6]


def test_what_does_not_fit_is_refused(tmp_path):
    checkpoints = Checkpoints(Config(directory=str(tmp_path)))
    state = make_state()
    checkpoints.save(1, state, {})
    checkpoints.wait()
    fewer = state | {"params": {}}
    larger = make_state(size=32)
    other = state | {"opt_state": ({"mean": state["step"], "square": state["step"]},)}
    for wrong in (fewer, larger, other):
        with pytest.raises(UserError, match="does not fit this config's model"):
            checkpoints.restore(1, wrong)
    with pytest.raises(RuntimeError, match="did not save step 1"):
        checkpoints.save(1, state, {})
    checkpoints.close()


def test_params_alone_are_restored_on_their_base_only(tmp_path):
    checkpoints = Checkpoints(Config(directory=str(tmp_path)))
    state = make_state()
    base = {"source": "org/base", "digest": "0123456789abcdef"}
    checkpoints.save(3, state, {"base": base})
    checkpoints.close()
    blank = jax.tree.map(jnp.zeros_like, state["params"])
    found = restore_params(tmp_path, 3, blank, {}, "0123456789abcdef")
    assert_equal(found, state["params"])
    with pytest.raises(UserError, match=r"org/base with digest 0123.*has digest feed"):
        restore_params(tmp_path, 3, blank, {}, "feed")
    with pytest.raises(UserError, match=r"no checkpoint of step 4; it has .*\[3\]"):
        restore_params(tmp_path, 4, blank, {}, "0123456789abcdef")


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a disk of a megabyte; needs the right to mount one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode
    except FileNotFoundError:
        mounted = 1
    if mounted:
        pytest.skip("mounting a small disk is not permitted here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_full_disk_keeps_what_was_saved(small_disk):
    """280 kB of random numbers a checkpoint: the fourth has no room."""
    config = Config(directory=str(small_disk), save_total_limit=9)
    checkpoints = Checkpoints(config)
    states = {step: make_state(size=1100, seed=step) for step in range(1, 7)}

    def fill() -> None:
        for step, state in states.items():
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait()

    with pytest.raises(UserError, match=r"no space left to save .*disk.*--resume"):
        fill()
    with contextlib.suppress(UserError):
        checkpoints.close()

    again = Checkpoints(config)
    whole = saved_steps(small_disk)
    assert len(whole) >= 2
    assert again.latest == whole[-1]
    for step in whole:
        assert again.restore_progress(step) == {"step": step}
        assert_equal(again.restore(step, states[1]), states[step])
    again.close()


def test_errors_of_the_system_are_told(tmp_path, monkeypatch):
    """The same without the right to mount: what the writer raises, and its words."""
    checkpoints = Checkpoints(Config(directory=str(tmp_path)))
    for error, message in [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left to save"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left to save"),
        (ValueError("RESOURCE_EXHAUSTED: write failed"), "no space left to save"),
        (OSError(errno.EACCES, "Permission denied"), "cannot write checkpoints"),
    ]:

        def save(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(checkpoints._manager, "save", save)
        with pytest.raises(UserError, match=message):
            checkpoints.save(1, make_state(), {})
    monkeypatch.undo()
    checkpoints.close()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Checkpoints(Config(directory=str(file)))


def test_digest_sees_every_bit_and_no_mesh():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(3, 16, 8)).astype(np.float32)
    small = rng.normal(size=(16,)).astype(ml_dtypes.bfloat16)

    def of(a, b, mesh_sizes=(1, 1, 1), spec=None) -> str:
        return digest({"a": place(a, mesh_sizes, spec), "b": place(b, mesh_sizes)})

    first = of(array, small)
    assert len(first) == 16
    for mesh_sizes, spec in [
        ((8, 1, 1), P(None, "data")),
        ((1, 4, 2), P(None, "fsdp", "tensor")),
    ]:
        assert of(array, small, mesh_sizes, spec) == first
    seen = {first}
    for bit in range(32):
        changed = array.copy()
        changed.view(np.uint32)[1, 2, 3] ^= np.uint32(1) << np.uint32(bit)
        seen.add(of(changed, small))
    for bit in range(16):
        changed = small.copy()
        changed.view(np.uint16)[5] ^= np.uint16(1) << np.uint16(bit)
        seen.add(of(array, changed))
    seen.add(of(array[:, ::-1].copy(), small))  # rows in another order
    seen.add(of(array.reshape(3, 8, 16), small))
    seen.add(of(array, small.astype(np.float32)))
    seen.add(digest({"b": place(array), "a": place(small)}))
    assert len(seen) == 1 + 32 + 16 + 4


@pytest.mark.parametrize(
    "options", [{"save_steps": -1}, {"save_total_limit": 0}], ids=str
)
def test_nonsense_is_refused(options):
    with pytest.raises(UserError, match=r"checkpoint\.save_"):
        Config(directory="x", **options)
