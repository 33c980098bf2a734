"""Optimizers under transformers' names, equal to torch's and transformers' numbers.

A parameter here may be a stack of one parameter per layer: a projection is
[L, out, in] where torch has L matrices. `stack_axes` says how many leading axes of a
parameter are such a stack, and every rule that looks at a parameter's shape (what is
a matrix, what decays, what Adafactor factors, over what a mean is taken) looks at the
axes behind them, so each layer is treated as torch treats its own tensor.

Clipping is not part of the optimizer: the step calls `clip_by_global_norm`, because
it wants the norm for its log.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fjft.errors import UserError
from fjft.optimize import schedule as schedules
from fjft.optimize import transforms
from fjft.optimize.transforms import to_float32

Params = dict[str, Any]
T = TypeVar("T")
# One value per parameter: a dict by path, or a function of the path.
PerParameter = Mapping[str, T] | Callable[[str], T]


@dataclass(frozen=True, kw_only=True)
class Config(schedules.Config):
    """The `optimizer` section of a config; names and defaults are transformers'.

    The learning rate and its schedule are fields of `schedule.Config`.

    Attributes:
      name: One of `OPTIMIZERS`.
      weight_decay: Decoupled, times the learning rate; for `sgd` added to the
        gradient, as in torch. Not of biases and norms.
      layer_decay: What the learning rate is multiplied by from layer to layer, counted
        from the output: heads have all of it, the last layer this share, embeddings
        that of one layer more than there are. 1 is the same rate for all.
      adam_beta1: First-moment decay of adamw, lion and muon's AdamW part.
      adam_beta2: Second-moment decay of the same. transformers hands the default
        0.999 to Lion too; its paper uses 0.99.
      adam_epsilon: Added to the root of the second moment.
      max_grad_norm: The global norm that the step clips to; 0 is no clipping.
      sgd_momentum: 0 as transformers has it.
      muon_momentum: As in torch.optim.Muon.
      muon_adjust_lr: `match_rms_adamw` scales a matrix's update to the size AdamW's
        would have, so one learning rate serves both; `original` is Keller Jordan's
        scale, for learning rates near 0.02. torch's default is the latter, with
        another learning rate for what Muon leaves to AdamW.
      offload: Keeps what the optimizer remembers in the host's memory between steps.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    sgd_momentum: float = 0.0
    muon_momentum: float = 0.95
    muon_adjust_lr: str = "match_rms_adamw"
    offload: bool = False

    def __post_init__(self):
        if not 0 < self.layer_decay <= 1:
            raise UserError(
                f"optimizer.layer_decay={self.layer_decay} is not in (0, 1]; 0.9 slows "
                "each layer down by a tenth, 1 none"
            )


class Layout(NamedTuple):
    """What an optimizer knows of the parameters besides their values.

    Each field is a function from the parameters to a dict with the same paths.
    """

    stack_axes: Callable[[Params], dict[str, int]]
    decays: Callable[[Params], dict[str, bool]]
    is_muon: Callable[[Params], dict[str, bool]]


def make_schedule(config: Config, total_steps: int) -> schedules.Schedule:
    """Makes the learning-rate schedule; see `schedule.make_schedule`."""
    return schedules.make_schedule(config, total_steps)


def make_optimizer(
    config: Config,
    total_steps: int,
    decay_mask: PerParameter[bool] | None = None,
    *,
    stack_axes: PerParameter[int] | None = None,
    muon_mask: PerParameter[bool] | None = None,
    rates: PerParameter[float | np.ndarray] | None = None,
) -> optax.GradientTransformation:
    """Makes the optimizer that `config` names, schedule and weight decay included.

    Parameters, gradients and updates are dicts of arrays by dotted path. All state is
    float32, whatever the parameters are, and so are the updates; add them with
    `apply_updates`. Gradients come in clipped, see `clip_by_global_norm`.

    Args:
      config: The optimizer and its numbers.
      total_steps: Optimizer steps of the whole run.
      decay_mask: True where weight decay applies. By default where one layer's
        parameter has two axes or more: transformers leaves out biases and norms,
        which have one.
      stack_axes: How many leading axes of each parameter are stacked layers; by
        default none are.
      muon_mask: False where a matrix is AdamW's and not Muon's; by default Muon has
        all matrices. Its author leaves embeddings and the vocabulary projection to
        AdamW, so a full fine-tuning should say so here.
      rates: What each parameter's learning rate is multiplied by, a number or an array
        that stands against its axes; by default 1. As in torch's groups, weight decay
        goes with it.

    Returns:
      An optax transformation; `update` needs the parameters.

    Raises:
      UserError: An unknown optimizer or schedule, or numbers it cannot use.
    """
    if config.name not in OPTIMIZERS:
        raise UserError(
            f"unknown optimizer.name {config.name!r}; "
            f"use one of {', '.join(OPTIMIZERS)}"
        )
    layout = _make_layout(decay_mask, stack_axes, muon_mask)
    parts = [
        OPTIMIZERS[config.name](config, layout),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    ]
    if rates is not None:
        parts.append(_scale_each(rates))
    return transforms.in_float32(optax.chain(*parts))


def _scale_each(
    rates: PerParameter[float | np.ndarray],
) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Params:
        del params
        each = _spread(rates, updates)
        return {path: update * each[path] for path, update in updates.items()}

    return optax.stateless(scale)


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, jax.Array]:
    """Scales gradients down to a global norm, as torch.nn.utils.clip_grad_norm_ does.

    Args:
      grads: Arrays by path, or any tree of arrays.
      max_norm: The largest norm to leave; 0 or less leaves the gradients alone.

    Returns:
      The gradients in their own dtypes, and their norm before clipping (float32
      scalar). A norm that is not finite makes every gradient NaN: look at it first.
    """
    squares = [jnp.sum(jnp.square(to_float32(g))) for g in jax.tree.leaves(grads)]
    norm = jnp.sqrt(sum(squares, start=jnp.float32(0)))
    if max_norm <= 0:
        return grads, norm
    # torch adds 1e-6 to the norm, so a clipped norm ends a little below max_norm.
    scale = jnp.minimum(max_norm / (norm + 1e-6), 1.0)
    return jax.tree.map(lambda g: (to_float32(g) * scale).astype(g.dtype), grads), norm


def apply_updates(params: Params, updates: Any) -> Params:
    """Adds float32 updates to parameters, which keep their dtypes."""
    return jax.tree.map(
        lambda p, u: (to_float32(p) + u).astype(p.dtype), params, updates
    )


# Each function below makes what comes before the learning rate: gradients in,
# directions out, weight decay included.


def _adamw(config: Config, layout: Layout) -> optax.GradientTransformation:
    """https://arxiv.org/abs/1711.05101."""
    return optax.chain(
        transforms.scale_by_adam(
            config.adam_beta1, config.adam_beta2, config.adam_epsilon
        ),
        transforms.add_weight_decay(config.weight_decay, layout.decays),
    )


def _lion(config: Config, layout: Layout) -> optax.GradientTransformation:
    """https://arxiv.org/abs/2302.06675, algorithm 2."""
    return optax.chain(
        optax.scale_by_lion(config.adam_beta1, config.adam_beta2),
        transforms.add_weight_decay(config.weight_decay, layout.decays),
    )


def _sgd(config: Config, layout: Layout) -> optax.GradientTransformation:
    """As torch.optim.SGD: the decay goes through the momentum."""
    momentum = config.sgd_momentum
    return optax.chain(
        transforms.add_weight_decay(config.weight_decay, layout.decays),
        optax.trace(momentum) if momentum else optax.identity(),
    )


def _adafactor(config: Config, layout: Layout) -> optax.GradientTransformation:
    """As transformers' trainer sets it up: no relative step, no parameter scale."""
    return optax.chain(
        transforms.scale_by_adafactor(layout.stack_axes),
        transforms.add_weight_decay(config.weight_decay, layout.decays),
    )


def _muon(config: Config, layout: Layout) -> optax.GradientTransformation:
    """Muon for hidden matrices and AdamW, at the same learning rate, for the rest."""
    if config.muon_adjust_lr not in transforms.MUON_SCALES:
        raise UserError(
            f"unknown optimizer.muon_adjust_lr {config.muon_adjust_lr!r}; "
            f"use one of {', '.join(transforms.MUON_SCALES)}"
        )
    scale = transforms.MUON_SCALES[config.muon_adjust_lr]
    adam = transforms.scale_by_adam(
        config.adam_beta1, config.adam_beta2, config.adam_epsilon
    )

    def label(params: Params) -> dict[str, str]:
        masks = layout.is_muon(params).items()
        return {path: "muon" if is_muon else "adamw" for path, is_muon in masks}

    return optax.chain(
        optax.partition(
            {
                "muon": transforms.scale_by_muon(config.muon_momentum, scale),
                "adamw": adam,
            },
            label,
        ),
        transforms.add_weight_decay(config.weight_decay, layout.decays),
    )


OPTIMIZERS = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


def _make_layout(
    decay_mask: PerParameter[bool] | None,
    stack_axes: PerParameter[int] | None,
    muon_mask: PerParameter[bool] | None,
) -> Layout:
    """Fills in the defaults, which look at a parameter's axes behind its stack."""

    def stacks(params: Params) -> dict[str, int]:
        return _spread(stack_axes, params) if stack_axes else dict.fromkeys(params, 0)

    def ranks(params: Params) -> dict[str, int]:
        return {path: params[path].ndim - n for path, n in stacks(params).items()}

    def decays(params: Params) -> dict[str, bool]:
        if decay_mask is not None:
            return _spread(decay_mask, params)
        return {path: rank >= 2 for path, rank in ranks(params).items()}

    def is_muon(params: Params) -> dict[str, bool]:
        allowed = _spread(muon_mask, params) if muon_mask is not None else {}
        return {
            path: rank == 2 and allowed.get(path, True)
            for path, rank in ranks(params).items()
        }

    return Layout(stacks, decays, is_muon)


def _spread(values: PerParameter[T], params: Params) -> dict[str, T]:
    """Looks up, or computes, the value of every parameter."""
    look_up = values if callable(values) else values.__getitem__
    return {path: look_up(path) for path in params}
