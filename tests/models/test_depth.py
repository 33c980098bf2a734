"""A deeper model is not a longer program, so that compile time does not grow."""

import depths
import jax
import pytest


def _count(case, depth):
    function, params = depths.loss_and_gradient(case, depth)
    return depths.count_equations(jax.make_jaxpr(function)(params).jaxpr)


@pytest.mark.parametrize(
    "case", [*depths.DECODERS, *depths.ENCODERS, *depths.ENCODER_DECODERS]
)
def test_the_program_of_a_gradient_is_as_long_at_any_depth(case):
    shallow, middle, deep = (_count(case, depth) for depth in depths.DEPTHS)
    assert middle == deep
    if case in depths.LONG_PATTERNS:
        assert shallow < middle
    else:
        # One lone layer more or less counts for nothing but its slices.
        assert abs(shallow - middle) <= 0.01 * middle


def test_equations_inside_loops_are_counted():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c * 2 + 1, None), x, length=9)[0] - 1

    assert depths.count_equations(jax.make_jaxpr(loop)(1.0).jaxpr) == 4
