"""Going on where a run was left: what a checkpoint holds of it, and the way back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fjft import tree
from fjft.checkpoint.orbax import Checkpoints, saved_steps
from fjft.errors import UserError
from fjft.experiment import Experiment
from fjft.peft.lora_adapter import is_start
from fjft.training.progress import Progress
from fjft.training.run import Run
from fjft.training.state import TrainState


def refuse_second_run(experiment: Experiment) -> None:
    """Checks, before anything big is loaded, that no other run is overwritten.

    Raises:
      UserError: One would be.
    """
    directory = experiment.checkpoint.directory
    steps = saved_steps(directory)
    if steps and not experiment.checkpoint.resume:
        raise UserError(
            f"{directory} holds a run up to step {steps[-1]}; go on with it by "
            "--resume, or name another checkpoint.directory"
        )


def as_saved(run: Run, state: TrainState) -> dict[str, Any]:
    """The state, and what adapters started from, as dictionaries, which Orbax knows."""
    saved = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    if not state.average:
        del saved["average"]
    starts, _ = tree.partition(run.frozen, is_start)
    return saved | ({"starts": starts} if starts else {})


def resume(
    checkpoints: Checkpoints, run: Run, base: Mapping[str, str]
) -> tuple[Run, TrainState, Progress]:
    """Goes back to the last checkpoint: arrays, data order and log.

    Raises:
      UserError: It was made from another base model, or does not fit this config.
    """
    step = checkpoints.latest
    assert step is not None
    saved = checkpoints.restore_progress(step)
    if saved["base"]["digest"] != base["digest"]:
        raise UserError(
            f"checkpoint {step} was trained on top of {saved['base']['source']} with "
            f"digest {saved['base']['digest']}, this base is {base['source']} with "
            f"digest {base['digest']}; resume with the same model "
            "and options of peft"
        )
    run.loader.restore(saved["data"])
    state, starts = restore_state(checkpoints, step, run)
    run = dataclasses.replace(run, frozen=run.frozen | starts)
    return run, state, Progress(**saved["progress"])


def restore_state(
    checkpoints: Checkpoints, step: int, run: Run
) -> tuple[TrainState, tree.Params]:
    """Reads a checkpoint's state, and what adapters started from."""
    restored = checkpoints.restore(step, as_saved(run, run.state_shapes))
    starts = restored.pop("starts", {})
    return TrainState(**restored), starts
