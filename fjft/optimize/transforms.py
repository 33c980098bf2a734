"""Gradient transformations that optax lacks, or that differ there from torch's.

Each is an `optax.GradientTransformation` over a dict of float32 arrays, with the state
it documents. Trees beside the parameters (`stack_axes`, `decays`) are dicts with the
same keys.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Tree = Any

# Muon's Newton-Schulz iteration: a quintic whose slope at zero is as large as can be
# while five steps bring singular values near one. Keller Jordan,
# https://kellerjordan.github.io/posts/muon/; the same numbers as torch.optim.Muon.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_EPSILON = 1e-7

# Adafactor's constants, as transformers' trainer leaves them. Section 8 of
# https://arxiv.org/abs/1804.04235.
ADAFACTOR_EPSILON = 1e-30
ADAFACTOR_CLIP_THRESHOLD = 1.0
ADAFACTOR_DECAY_RATE = 0.8


# Factors on the update of an (out, in) matrix.
MUON_SCALES = {
    "match_rms_adamw": lambda out, in_: 0.2 * math.sqrt(max(out, in_)),
    "original": lambda out, in_: math.sqrt(max(1.0, out / in_)),
}


class AdamState(NamedTuple):
    """Steps taken (int32) and both moments (float32, like the parameters)."""

    count: jax.Array
    mean: Tree
    square: Tree


def scale_by_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam's direction, with bias corrections that are right from the first step.

    `1 - b2**t` in float32, as optax computes it, is off by 1e-5 when b2 is 0.999 and
    t is 1, and a LoRA factor that starts at zero keeps that error. torch computes it
    in float64; `-expm1(t * log b2)`, the logarithm taken in Python, loses nothing.
    """

    def init(params: Tree) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamState(jnp.int32(0), zeros, jax.tree.map(jnp.zeros_like, params))

    def correction(decay: float, count: jax.Array) -> jax.Array:
        if decay == 0:
            return jnp.float32(1)
        return -jnp.expm1(count.astype(jnp.float32) * math.log(decay))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, updates)
        square = jax.tree.map(
            lambda v, g: b2 * v + (1 - b2) * g * g, state.square, updates
        )
        c1, c2 = correction(b1, count), jnp.sqrt(correction(b2, count))
        directions = jax.tree.map(
            lambda m, v: (m / c1) / (jnp.sqrt(v) / c2 + epsilon), mean, square
        )
        return directions, AdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


class MuonState(NamedTuple):
    """The running mean of gradients, float32, like the parameters."""

    mean: Tree


def scale_by_muon(
    momentum: float, scale: Callable[[int, int], float]
) -> optax.GradientTransformation:
    """Muon's direction: the Nesterov mean of gradients, made orthogonal per matrix.

    The last two axes of every parameter are (out, in); those before them are stacks.
    optax's own Muon corrects the mean's bias under Nesterov, which turns the
    direction; torch does not, and this follows torch.
    """

    def init(params: Tree) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def direction(mean: jax.Array, grad: jax.Array) -> jax.Array:
        ahead = momentum * mean + (1 - momentum) * grad
        return orthogonalize(ahead) * scale(*grad.shape[-2:])

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        mean = jax.tree.map(
            lambda m, g: momentum * m + (1 - momentum) * g, state.mean, updates
        )
        return jax.tree.map(direction, mean, updates), MuonState(mean)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array) -> jax.Array:
    """Brings the singular values of each matrix near one by Newton-Schulz steps.

    Args:
      x: [..., out, in], float32; every matrix behind the leading axes by itself.

    Returns:
      The same shape. Singular values lie between about 0.7 and 1.2. torch iterates
      in bfloat16; here the arrays are float32 and the backend picks the precision of
      the products.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if is_tall else x
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = x / jnp.maximum(norm, NEWTON_SCHULZ_EPSILON)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if is_tall else x


class AdafactorState(NamedTuple):
    """Steps taken (int32) and the second moments (float32).

    A matrix [..., out, in] has a row mean [..., out] and a column mean [..., in]; a
    vector has its full second moment in `row` and one zero in `column`, because Orbax
    refuses arrays of size zero.
    """

    count: jax.Array
    row: Tree
    column: Tree


def scale_by_adafactor(
    stack_axes: Callable[[Tree], Tree],
) -> optax.GradientTransformation:
    """Adafactor's direction; every matrix is factored, however small.

    optax's own picks the two longest axes to factor, which on a stack may be the
    layers, and takes means over all layers at once.
    """

    def init(params: Tree) -> AdafactorState:
        def row(p: jax.Array, stacked: int) -> jax.Array:
            return jnp.zeros(p.shape[:-1] if p.ndim - stacked > 1 else p.shape)

        def column(p: jax.Array, stacked: int) -> jax.Array:
            is_matrix = p.ndim - stacked > 1
            return jnp.zeros((*p.shape[:-2], p.shape[-1]) if is_matrix else 1)

        stacks = stack_axes(params)
        rows = jax.tree.map(row, params, stacks)
        return AdafactorState(jnp.int32(0), rows, jax.tree.map(column, params, stacks))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        count = state.count + 1
        stacks = stack_axes(updates)
        share = count.astype(jnp.float32) ** -ADAFACTOR_DECAY_RATE

        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            return (1 - share) * old + share * new

        def row(old: jax.Array, g: jax.Array, stacked: int) -> jax.Array:
            square = g * g + ADAFACTOR_EPSILON
            return mix(old, square.mean(-1) if g.ndim - stacked > 1 else square)

        def column(old: jax.Array, g: jax.Array, stacked: int) -> jax.Array:
            if g.ndim - stacked < 2:
                return old
            return mix(old, (g * g + ADAFACTOR_EPSILON).mean(-2))

        rows = jax.tree.map(row, state.row, updates, stacks)
        columns = jax.tree.map(column, state.column, updates, stacks)
        directions = jax.tree.map(_adafactor_direction, updates, rows, columns, stacks)
        return directions, AdafactorState(count, rows, columns)

    return optax.GradientTransformation(init, update)


def _adafactor_direction(
    grad: jax.Array, row: jax.Array, column: jax.Array, stacked: int
) -> jax.Array:
    """The gradient over the root of its second moment, its RMS per layer clipped."""
    if grad.ndim - stacked > 1:
        row = row / row.mean(-1, keepdims=True)
        direction = grad * jax.lax.rsqrt(row)[..., None]
        direction = direction * jax.lax.rsqrt(column)[..., None, :]
    else:
        direction = grad * jax.lax.rsqrt(row)
    axes = tuple(range(stacked, grad.ndim))
    rms = jnp.sqrt(jnp.mean(jnp.square(direction), axis=axes, keepdims=True))
    return direction / jnp.maximum(rms / ADAFACTOR_CLIP_THRESHOLD, 1.0)


def add_weight_decay(
    rate: float, decays: Callable[[Tree], Tree]
) -> optax.GradientTransformation:
    """Adds `rate` times the parameter to its update where `decays` is true."""

    def init(params: Tree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        if rate == 0:
            return updates, state
        updates = jax.tree.map(
            lambda u, p, decayed: u + rate * p if decayed else u,
            updates,
            params,
            decays(params),
        )
        return updates, state

    return optax.GradientTransformation(init, update)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows `inner` float32 parameters and gradients, so that its state is float32."""

    def init(params: Tree):
        return inner.init(jax.tree.map(to_float32, params))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        updates, params = jax.tree.map(to_float32, (updates, params))
        return inner.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def to_float32(x: jax.Array) -> jax.Array:
    """Casts one array."""
    return x.astype(jnp.float32)
