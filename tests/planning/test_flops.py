"""Counting FLOPs: loops turn, kernels say, and what XLA counts without loops agrees."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

from fjft.models.narrow import narrow_product
from fjft.planning.flops import count_flops

X = jnp.ones((4, 8))
W = jnp.ones((3, 8, 8))
ONE = 2 * 4 * 8 * 8


def flops(f, *args):
    return count_flops(jax.make_jaxpr(f)(*args))


def test_a_product_and_a_batch_of_them():
    assert flops(lambda x, w: x @ w, X, W[0]) == ONE
    assert flops(lambda x, w: jnp.einsum("bi,nio->nbo", x, w), X, W) == 3 * ONE


def test_products_in_8_bits_count_by_their_rate():
    def both(kind):
        jaxpr = jax.make_jaxpr(
            lambda x: jnp.matmul(narrow_product(kind, x, W[0]), W[0])
        )(X)
        return count_flops(jaxpr, {"int8": 2.0})

    assert (both("int8"), both("fp8")) == (1.5 * ONE, 2 * ONE)


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("bwd", 5)])
def test_cudnns_kernels_count_over_whole_rows(name, products):
    """Stand-ins, since the kernels are only there on machines that have cuDNN."""
    kernel = Primitive(f"dot_product_attention_{name}_wrapper")
    kernel.def_abstract_eval(lambda q, k, v: q)
    q, k = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 5, 1, 8))
    assert flops(kernel.bind, q, k, k) == products * 2 * 2 * 6 * 5 * 4 * 8


def chain(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]


def test_a_scan_counts_every_turn():
    assert flops(chain, X, W) == 3 * ONE
    nested = jax.jit(lambda x, w: jax.lax.fori_loop(0, 5, lambda i, x: chain(x, w), x))
    assert flops(nested, X, W) == 15 * ONE


def test_what_gives_nothing_does_not_count():
    """As a kernel that a remat policy saved, which has effects of its own."""
    jaxpr = jax.make_jaxpr(jax.jit(lambda x, w: jax.debug.print("{}", (x @ w)[0])))
    assert count_flops(jaxpr(X, W[0])) == 0


def test_recomputation_is_seen():
    def loss(remat):
        def body(x, w):
            return jnp.tanh(x @ w), None

        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        return jax.grad(lambda w: jax.lax.scan(body, X, w)[0].sum())

    assert flops(loss(False), W) == 3 * 3 * ONE
    assert flops(loss(True), W) == 4 * 3 * ONE


def test_a_conditional_counts_its_dearest_branch():
    def f(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) @ w)

    assert flops(f, X, W[0]) == 2 * ONE


def test_what_xla_counts_without_loops_agrees():
    def f(x, w):
        for one in w:
            x = x @ one
        return x

    counted = jax.jit(f).lower(X, W).compile().cost_analysis()
    assert counted is not None
    assert flops(f, X, W) == pytest.approx(counted["flops"], rel=0.02)


def test_a_convolution():
    image, kernel = jnp.ones((2, 9, 3)), jnp.ones((4, 3, 5))
    f = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    assert flops(f, image, kernel) == 2 * (2 * 6 * 5) * (4 * 3)
