"""Products in bfloat16 are those in float32, rounded."""

import jax
import jax.numpy as jnp
import numpy as np

from fjft import sharding
from fjft.models.product import product


def test_bfloat16_on_a_cpu_is_float32_rounded():
    drawn = np.random.default_rng(0).standard_normal
    shapes = {"x": (3, 5, 64), "weight": (48, 64), "grad": (3, 5, 48)}
    arrays = {name: jnp.asarray(drawn(s), jnp.bfloat16) for name, s in shapes.items()}
    x, weight, grad = (np.asarray(a, np.float32) for a in arrays.values())
    expected = {
        "y": x @ weight.T,
        "grad_x": grad @ weight,
        "grad_weight": np.einsum("bto,bti->oi", grad, x),
    }
    with jax.set_mesh(sharding.single_device_mesh()):
        y, pull = jax.vjp(product, arrays["x"], arrays["weight"])
        found = dict(zip(expected, (y, *pull(arrays["grad"])), strict=True))
        jaxpr = str(jax.make_jaxpr(product)(arrays["x"], arrays["weight"]))
    assert "preferred_element_type=float32" in jaxpr
    for name, values in expected.items():
        assert found[name].dtype == jnp.bfloat16
        # A bfloat16 has eight bits: sums in another order may round to the next one.
        np.testing.assert_allclose(
            np.asarray(found[name], np.float32), values, rtol=2**-8, atol=1e-5
        )
