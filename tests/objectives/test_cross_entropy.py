"""The chunked cross-entropy against torch's, and what it never holds."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import torch

from fjft.objectives.chunks import Chunks
from fjft.objectives.cross_entropy import cross_entropy_sums

B, T, D, V = 2, 12, 16, 60


def _inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, D)).astype(dtype)
    projection = rng.standard_normal((V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.choice([0.0, 1.0, 0.5], (B, T)).astype(np.float32)
    return hidden, projection, targets, weights


def _by_torch(hidden, projection, targets, weights, smoothing, softcap):
    hidden, projection = (
        torch.tensor(np.asarray(x, np.float64), requires_grad=True)
        for x in (hidden, projection)
    )
    logits = hidden @ projection.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V),
        torch.tensor(targets).long().reshape(-1),
        label_smoothing=smoothing,
        reduction="none",
    )
    loss = (losses * torch.tensor(weights).reshape(-1)).sum()
    loss.backward()
    hits = logits.argmax(-1).numpy() == targets
    correct = float((hits * weights).sum())
    assert hidden.grad is not None
    assert projection.grad is not None
    return loss.item(), correct, hidden.grad.numpy(), projection.grad.numpy()


@pytest.mark.parametrize(
    ("smoothing", "softcap"), [(0.0, None), (0.1, None), (0.1, 2.5)]
)
@pytest.mark.parametrize("parts", [1, 4, 7], ids="parts-{}".format)
@pytest.mark.parametrize("tokens", [2, 8, 1000], ids="tokens-{}".format)
def test_sums_and_gradients_equal_torch(tokens, parts, smoothing, softcap):
    inputs = _inputs()

    def loss(hidden, projection):
        sums = cross_entropy_sums(
            [(hidden, projection)],
            *map(jnp.asarray, inputs[2:]),
            chunks=Chunks(tokens, parts),
            label_smoothing=smoothing,
            softcap=softcap,
        )
        return 3 * sums.loss, sums

    (_, sums), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        *inputs[:2]
    )
    expected, correct, *expected_grads = _by_torch(*inputs, smoothing, softcap)
    assert float(sums.loss) == pytest.approx(expected, rel=1e-6)
    assert float(sums.correct) == correct
    assert float(sums.weight) == inputs[3].sum()
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, 3 * theirs, rtol=1e-5, atol=1e-5)
    # The value without differentiation takes another way.
    plain = jax.jit(lambda *args: loss(*args)[1])(*inputs[:2])
    np.testing.assert_allclose(plain, sums, rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 4])
def test_several_products_add_up_to_the_logits(parts):
    """A narrow product beside the projection is what its matrix in that would be."""
    hidden, projection, targets, weights = map(jnp.asarray, _inputs())
    rng = np.random.default_rng(1)
    a_RD, b_VR = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((3, D), (V, 3))
    )

    def loss(terms):
        return cross_entropy_sums(
            terms, targets, weights, chunks=Chunks(8, parts), label_smoothing=0.1
        ).loss

    def apart(hidden, a_RD, b_VR):
        return loss([(hidden, projection), (hidden @ a_RD.T, b_VR)])

    def together(hidden, a_RD, b_VR):
        return loss([(hidden, projection + b_VR @ a_RD)])

    every = 0, 1, 2
    value, grads = jax.jit(jax.value_and_grad(apart, every))(hidden, a_RD, b_VR)
    expected, wanted = jax.jit(jax.value_and_grad(together, every))(hidden, a_RD, b_VR)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    products = jaxprs.products(
        jax.make_jaxpr(jax.grad(apart, every))(hidden, a_RD, b_VR).jaxpr
    )
    assert (V, D) not in products


def test_bfloat16_is_summed_in_float32():
    hidden, projection, targets, weights = _inputs(jnp.bfloat16)
    rounded = projection.astype(jnp.bfloat16).astype(np.float32)

    def loss(hidden, projection):
        return cross_entropy_sums(
            [(hidden, projection)],
            *map(jnp.asarray, (targets, weights)),
            chunks=Chunks(8),
        ).loss

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
        jnp.asarray(hidden), jnp.asarray(projection)
    )
    expected, _, *expected_grads = _by_torch(
        hidden, rounded, targets, weights, 0.0, None
    )
    # Products of bfloat16 numbers are exact in float32, so the loss is too.
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    for ours, theirs in zip(grads, expected_grads, strict=True):
        error = np.abs(np.asarray(ours, np.float64) - theirs).max()
        assert error < 0.01 * np.abs(theirs).max()


def test_huge_logits_stay_finite():
    hidden, projection, targets, weights = _inputs()

    def loss(hidden):
        matrix, *rest = map(jnp.asarray, (projection, targets, weights))
        return cross_entropy_sums([(hidden, matrix)], *rest, chunks=Chunks(8, 4)).loss

    value, grad = jax.value_and_grad(loss)(jnp.asarray(1e4 * hidden))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def _loss_jaxpr(argnums):
    hidden, projection, targets, weights = map(jnp.asarray, _inputs())

    def loss(hidden, projection):
        return cross_entropy_sums(
            [(hidden, projection)], targets, weights, chunks=Chunks(8)
        ).loss

    return jax.make_jaxpr(jax.grad(loss, argnums))(hidden, projection).jaxpr


def test_a_frozen_projection_costs_no_gradient():
    frozen, trained = (jaxprs.products(_loss_jaxpr(a)) for a in (0, (0, 1)))
    assert (V, D) not in frozen
    assert len(trained) == len(frozen) + 1
    # Logits, of loss and gradient alike, and dh.
    assert len(frozen) == 2


def test_no_array_holds_all_logits():
    for shape in jaxprs.shapes(_loss_jaxpr((0, 1))):
        if V in shape and D not in shape:
            assert np.prod(shape) <= 8 * V, shape
