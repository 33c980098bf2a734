"""What a run says of itself, in words."""

import jax

from fjft import tree
from fjft.models.quantized import is_scale
from fjft.training.run import Run
from fjft.training.state import TrainState
from fjft.training.step import StepMetrics


def describe_devices(mesh: jax.sharding.Mesh) -> str:
    """Which devices, and how they are arranged."""
    kind = mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} x {kind}, mesh {axes}"


def describe_model(run: Run, state: TrainState) -> str:
    """How much is trained, what it weighs and for how long."""
    numbers, _ = tree.partition(run.own_frozen, lambda path: not is_scale(path))
    trained, held = tree.count(state.params), tree.count(numbers)
    share = run.num_trainable / (trained + held)
    gib = tree.num_bytes((run.frozen, state)) / 2**30
    return (
        f"{run.num_trainable:,} of {trained + held:,} parameters are trained "
        f"({share:.2%}); weights and optimizer {gib:.2f} GiB; {run.total_steps} steps"
    )


def explain_bad_step(
    run: Run, step: int, metrics: StepMetrics, saved: int | None
) -> str:
    """Why a run cannot go on after a step.

    Args:
      run: The run.
      step: The step.
      metrics: Its numbers, in the host's memory.
      saved: The last step that is safe, or None.
    """
    rows = run.loader.choose_rows(step - 1).tolist()
    where = f"step {step}, batch {step - 1} (rows {rows})"
    if not metrics.weight_sum:
        return f"{where} trains no token at all; look at its rows' labels"
    kept = f"checkpoint {saved} is good" if saved else "nothing was saved"
    rate = float(run.schedule(step - 1))
    return (
        f"{where}: loss {metrics.loss_sum / metrics.weight_sum:g}, gradient norm "
        f"{metrics.grad_norm:g}; the step was not applied, {kept}: lower "
        f"optimizer.learning_rate (now {rate:g}) or look at these rows"
    )
