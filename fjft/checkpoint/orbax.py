"""Training checkpoints: what changed, where to go on, and what it was built on.

The frozen base is not saved but named, with a digest of its values, so a LoRA
checkpoint has megabytes. Orbax writes in the background and renames when all is on
disk, so a kill leaves the earlier checkpoints whole.
"""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fjft import tree
from fjft.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Where and how often a run is saved.

    Attributes:
      directory: All that a run writes goes there; a bucket is to be mounted.
      save_steps: Optimizer steps between checkpoints; 0 saves at the end only.
      save_total_limit: Checkpoints kept, counted from the last; the best of those that
        were judged is kept besides.
      resume: Goes on from the last checkpoint in `directory`, if there is one.
    """

    directory: str
    save_steps: int = 0
    save_total_limit: int = 2
    resume: bool = False

    def __post_init__(self):
        if self.save_steps < 0 or self.save_total_limit < 1:
            raise UserError(
                f"checkpoint.save_steps={self.save_steps} must not be negative and "
                f"checkpoint.save_total_limit={self.save_total_limit} at least 1"
            )
        if "://" in self.directory:
            raise UserError(
                f"checkpoint.directory={self.directory!r} is no directory; mount the "
                "bucket, as gcsfuse and s3fs do, and name a place in it"
            )


class Checkpoints:
    """The checkpoints of one run, by optimizer step.

    Attributes:
      kept_step: One that is kept however old it becomes, or None.
    """

    def __init__(self, config: Config):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

        self._directory = (Path(config.directory) / "checkpoints").absolute()
        self.kept_step: int | None = None
        policies = [LatestN(config.save_total_limit), _KeptStep(self)]
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy(policies),
                    cleanup_tmp_directories=True,
                ),
                item_names=("state", "progress"),
            )
        except OSError as error:
            raise _write_error(self._directory, error) from error

    @property
    def latest(self) -> int | None:
        """The last step that was saved whole."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Starts to save; returns when the values are copied, not when on disk.

        Args:
          step: Optimizer steps done.
          state: A pytree of arrays.
          progress: What JSON can hold: the data's position, the base's digest.

        Raises:
          UserError: There is no space for this checkpoint or the one before.
        """
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave(dict(progress)),
        )
        try:
            is_saved = self._manager.save(step, args=args)
        except (OSError, ValueError, RuntimeError) as error:
            raise _write_error(self._directory, error) from error
        if not is_saved:
            raise RuntimeError(f"Orbax did not save step {step} in {self._directory}")

    def restore_progress(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["progress"]

    def restore(self, step: int, state: Any) -> Any:
        """The arrays of a checkpoint, laid out as `state` is, on any mesh.

        Raises:
          UserError: The checkpoint holds other parameters.
        """
        import orbax.checkpoint as ocp

        def as_abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        abstract = jax.tree.map(as_abstract, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            return self._manager.restore(step, args=args)["state"]
        except (ValueError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self._directory / str(step)} does not fit this config's model, "
                f"method and optimizer ({first}); resume with the same ones, or name "
                "another checkpoint.directory"
            ) from error

    def wait(self) -> None:
        """Waits until all is on disk.

        Raises:
          UserError: It could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise _write_error(self._directory, error) from error

    def close(self) -> None:
        """Waits, and frees the background threads; raises as `wait` does."""
        self.wait()
        try:
            self._manager.close()  # It waits too, for the files beside the arrays.
        except (OSError, ValueError, RuntimeError) as error:
            raise _write_error(self._directory, error) from error


class _KeptStep:
    """Orbax's preservation policy for the step that `checkpoints` names."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        del context
        return [one.step == self._checkpoints.kept_step for one in checkpoints]


def saved_steps(directory: str | Path) -> list[int]:
    """The steps that the run in `directory` has whole checkpoints of, in order."""
    found = (Path(directory) / "checkpoints").glob("*/_CHECKPOINT_METADATA")
    return sorted(int(p.parent.name) for p in found if p.parent.name.isdigit())


def restore_params(
    directory: str | Path,
    step: int,
    params: tree.Params,
    starts: tree.Params,
    base_digest: str,
    *,
    averaged: bool = False,
) -> tree.Params:
    """Reads the parameters that a checkpoint holds, without the optimizer's state.

    Args:
      directory: The run's.
      step: Which checkpoint.
      params: Trained parameters of the same shapes, laid out as they shall be.
      starts: The same of what adapters started from; may be empty.
      base_digest: Digest of the parameters that the run did not train.
      averaged: Whether to read their averages over the steps.

    Raises:
      UserError: There is no such checkpoint, or it is of another model.
    """
    import orbax.checkpoint as ocp

    steps = saved_steps(directory)
    if step not in steps:
        found = f"those of steps {steps}" if steps else "none"
        raise UserError(f"{directory} has no checkpoint of step {step}; it has {found}")
    path = (Path(directory) / "checkpoints" / str(step)).absolute()
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        saved = reader.restore(path / "progress")["base"]
    if saved["digest"] != base_digest:
        raise UserError(
            f"checkpoint {step} of {directory} was trained on top of "
            f"{saved['source']} with digest {saved['digest']}, this base has digest "
            f"{base_digest}; name the same model"
        )
    trained = "average" if averaged else "params"
    groups = {trained: params} | ({"starts": starts} if starts else {})
    wanted = {
        group: {
            path: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding)
            for path, p in members.items()
        }
        for group, members in groups.items()
    }
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(path / "state", args=args)
    except (ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"checkpoint {step} of {directory} does not fit this config's model and "
            f"method ({first}); name the config that it was trained with"
        ) from error
    return restored[trained] | restored.get("starts", {})


def _write_error(directory: Path, error: Exception) -> Exception:
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in text or "RESOURCE_EXHAUSTED" in text:
        return UserError(
            f"no space left to save a checkpoint in {directory}; the earlier ones are "
            "whole: free some space and go on with --resume"
        )
    if isinstance(error, OSError):
        return UserError(f"cannot write checkpoints to {directory}: {error}")
    return error


def digest(params: tree.Params) -> str:
    """A fingerprint of parameters' values, equal on every mesh.

    Each value's bits are weighted by its place and summed modulo 2**32 where they lie;
    only the sums leave the devices.
    """
    sums = {path: _bit_sum(value) for path, value in params.items()}
    lines = {
        path: [str(params[path].dtype), params[path].shape, int(total)]
        for path, total in jax.device_get(sums).items()
    }
    text = json.dumps(lines, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _bit_sum(value: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{tree.num_bits(value.dtype)}")
    bits = jax.lax.bitcast_convert_type(value, unsigned).astype(jnp.uint32)
    weights = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weights = weights * np.uint32(size) + place
    # An odd weight is invertible, so every single changed bit changes the sum.
    return jnp.sum(bits * (2 * weights + 1), dtype=jnp.uint32)
