"""Codes and values are those of bitsandbytes and torch, and gradients go through."""

import bitsandbytes.functional as bnb
import gguf.quants
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tiny
import torch

from fjft.checkpoint.gguf_codes import take_apart
from fjft.models import codes, quantized
from fjft.models.codes import DYNAMIC, FORMATS

QUANTIZE = {name: jax.jit(form.quantize) for name, form in FORMATS.items()}
DEQUANTIZE = {name: jax.jit(form.dequantize) for name, form in FORMATS.items()}


def turned(part):
    """Codes or scales as (out, in), which lie as (in, out)."""
    return np.asarray(part).T


def draw(dtype=torch.float32):
    """A matrix (out, in), one block of which is zero; 7 scales a row."""
    torch.manual_seed(0)
    weight = torch.randn(96, 448).to(dtype) * 0.02
    weight[3, 64:128] = 0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_bitsandbytes(dtype):
    weight = draw(dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    parts = QUANTIZE["nf4"](tiny.to_numpy(weight))
    # Two codes a byte, the first one in the upper bits.
    pairs = packed.numpy().reshape(-1)
    theirs = np.stack([pairs >> 4, pairs & 15], -1).reshape(weight.shape)
    np.testing.assert_array_equal(turned(parts["codes"]).astype(np.uint8), theirs)
    np.testing.assert_array_equal(turned(parts["scales"]).reshape(-1), state.absmax)
    ours = turned(DEQUANTIZE["nf4"](parts)).astype(tiny.to_numpy(weight).dtype)
    back = tiny.to_numpy(bnb.dequantize_4bit(packed, state))
    np.testing.assert_array_equal(ours, back)


def nested_state(weight):
    """Its packed codes, and its 8-bit scales with what they count in."""
    packed, state = bnb.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True
    )
    nested, offset = state.state2, state.offset
    assert nested is not None
    assert offset is not None
    return packed, state, nested, offset


def test_scales_at_8_bits_mean_what_they_mean_to_bitsandbytes():
    """Its own codes, scales and offset are put in."""
    weight = draw()
    packed, state, nested, offset = nested_state(weight)
    pairs = packed.numpy().reshape(-1)
    codes = np.stack([pairs >> 4, pairs & 15], -1).reshape(weight.shape)
    parts = {
        "codes": jnp.asarray(codes.T).astype(jnp.uint4),
        "scales": state.absmax.numpy().reshape(96, 7).T,
        "nested": nested.absmax.numpy(),
        "offset": np.asarray(offset),
    }
    np.testing.assert_array_equal(DYNAMIC, nested.code)
    theirs = bnb.dequantize_4bit(packed, state).numpy()
    assert tiny.relative_error(turned(DEQUANTIZE["nf4_double"](parts)), theirs) < 1e-7


def test_scales_are_rounded_to_8_bits_as_by_bitsandbytes():
    weight = draw()
    _, state, nested, offset = nested_state(weight)
    parts = QUANTIZE["nf4_double"](weight.numpy())
    assert abs(float(parts["offset"]) / float(offset) - 1) < 2e-7
    np.testing.assert_allclose(parts["nested"], nested.absmax, rtol=1e-6)
    # On a CPU bitsandbytes looks codes up in a table of 65,536 intervals, so that those
    # of numbers near the middle of two values come out as the other one.
    ours = turned(parts["scales"]).astype(np.int32).reshape(-1)
    apart = np.abs(ours - state.absmax.numpy().astype(np.int32))
    assert apart.max() <= 1
    assert np.mean(apart) < 5e-3


def test_int8_codes_equal_bitsandbytes():
    weight = draw()
    codes, largest, _ = bnb.int8_vectorwise_quant(weight.clone())
    parts = QUANTIZE["int8"](weight.numpy())
    np.testing.assert_array_equal(turned(parts["codes"]), codes)
    np.testing.assert_allclose(parts["scales"][0] * 127, largest, rtol=1e-6)


def test_float8_rounds_as_torch_does():
    weight = draw()
    parts = QUANTIZE["fp8"](weight.numpy())
    scaled = weight * (448 / weight.abs().amax(dim=1, keepdim=True))
    theirs = scaled.to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(turned(parts["codes"]).astype(np.float32), theirs)


def test_int4_is_off_by_half_a_step_at_most():
    weight = draw().numpy()
    parts = QUANTIZE["int4"](weight)
    error = np.abs(turned(DEQUANTIZE["int4"](parts)) - weight).reshape(96, 7, 64)
    assert (error <= turned(parts["scales"])[..., None] * 0.5 + 1e-7).all()


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_types_of_gguf_equal_its_package(name):
    weight, kind = draw().numpy(), gguf.GGMLQuantizationType[name.upper()]
    theirs = take_apart(name, gguf.quants.quantize(weight, kind))
    ours = QUANTIZE[name](weight)
    assert ours.keys() == theirs.keys()
    for part, value in theirs.items():
        np.testing.assert_array_equal(turned(ours[part]), value, strict=True)


@pytest.mark.parametrize("name", FORMATS)
def test_product_and_its_gradient_are_those_of_the_numbers(name):
    parts = QUANTIZE[name](draw().numpy())
    weight = turned(DEQUANTIZE[name](parts))
    x = np.random.default_rng(0).normal(size=(3, 448)).astype(np.float32)
    grad = np.random.default_rng(1).normal(size=(3, 96)).astype(np.float32)

    def through(x):
        y, pull = jax.vjp(lambda x: quantized._product(name, x, parts), x)
        return y, pull(jnp.asarray(grad))[0]

    y, grad_x = jax.jit(through)(x)
    assert tiny.relative_error(y, x @ weight.T) < 1e-6
    assert tiny.relative_error(grad_x, grad @ weight) < 1e-6


def test_the_mean_is_exact():
    x = np.abs(np.random.default_rng(0).normal(size=(512, 512))).astype(np.float32)
    mean = float(jax.jit(codes._exact_mean)(x))
    assert abs(mean / x.mean(dtype=np.float64) - 1) < 1e-7
    assert float(codes._exact_mean(jnp.zeros((4, 4)))) == 0


@pytest.mark.parametrize("name", ["nf4", "nf4_double"])
def test_no_matrix_of_one_value_is_kept_over_a_scan(name):
    """What depends on constants alone would be taken out of the loop, whole."""
    parts = jax.tree.map(lambda p: p[None], QUANTIZE[name](draw()[:64, :64].numpy()))

    def loss(x):
        def layer(x, parts):
            return quantized._product(name, x, parts), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, parts)[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 64))).jaxpr
    scans = [e for e in jaxprs.equations(jaxpr) if e.primitive.name == "scan"]
    assert len(scans) == 2
    for scan in scans:
        invariant = scan.invars[: scan.params["num_consts"]]
        assert all(value.aval.size < 64 * 64 for value in invariant)
