"""Products in 8 bits: bitsandbytes's int8 and torch's float8 are the oracles."""

import functools

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from fjft import sharding
from fjft.errors import UserError
from fjft.experiment import ModelConfig
from fjft.models.narrow import KINDS, narrow_product
from fjft.models.weights import module_at
from fjft.tree import split

TYPES = {"fp8": (torch.float8_e4m3fn, torch.float8_e5m2)}


def rounded(kind, x, of=0):
    """The numbers that the codes of a matrix's rows stand for."""
    if kind == "int8":
        codes, largest, _ = bnb.int8_vectorwise_quant(x.clone())
        return codes.float() * (largest / 127)[:, None]
    dtype = TYPES[kind][of]
    scales = x.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
    return (x / scales).to(dtype).float() * scales


@pytest.fixture
def factors():
    torch.manual_seed(0)
    return torch.randn(10, 64), torch.randn(48, 64) * 0.02, torch.randn(10, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_and_its_gradients(kind, factors):
    x, weight, grad = factors
    arrays = [jnp.asarray(factor.numpy()) for factor in factors]
    y, pull = jax.vjp(functools.partial(narrow_product, kind), *arrays[:2])
    grad_x, grad_weight = pull(arrays[2])
    theirs = rounded(kind, x) @ rounded(kind, weight).T
    assert tiny.relative_error(y, theirs.numpy()) < 1e-5
    # The scales of the weight's rows are those of the gradient's columns.
    codes = rounded(kind, weight)
    scales = weight.abs().amax(1) / (127 if kind == "int8" else 448)
    theirs = rounded(kind, grad * scales, of=1) @ (codes / scales[:, None])
    assert tiny.relative_error(grad_x, theirs.numpy()) < 1e-5
    assert tiny.relative_error(grad_weight, (grad.T @ x).numpy()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_zeros_stays_nothing(kind):
    y = narrow_product(kind, jnp.zeros((2, 8)), jnp.zeros((4, 8)))
    np.testing.assert_array_equal(y, 0)


def test_a_mesh_rounds_as_one_device_does():
    files = tiny.memory_files(tiny.torch_model("llama/llama3-rope-biases"))
    mesh, ids = sharding.make_mesh(sharding.Config(2, 2, 2)), tiny.random_ids(4, 8)
    spread = tiny.build_model(files, matmuls="int8", mesh=mesh)
    with jax.set_mesh(mesh):
        ours = tiny.jit_apply(spread)(ids)
    single = tiny.build_model(files, matmuls="int8")
    assert tiny.max_error(ours, tiny.jit_apply(single)(ids)) < 1e-4


def test_codes_cannot_be_multiplied_so():
    with pytest.raises(UserError, match=r"quantization='nf4'.*matmuls='int8'"):
        ModelConfig(source="x", quantization="nf4", matmuls="int8")


def test_every_linear_map_but_the_head_multiplies_so():
    files = tiny.memory_files(tiny.torch_model("llama/llama3-rope-biases"))
    model = tiny.build_model(files, matmuls="int8")
    names = [s.module for s in model.provenance.sites if s.path.endswith(".weight")]
    narrow = {n for n in names if getattr(module_at(model, n), "matmuls", "")}
    leaves = {name.rpartition(".")[2] for name in narrow}
    assert leaves == {"q", "k", "v", "o", "gate", "up", "down"}
    ids = tiny.random_ids(2, 8)
    ours, exact = (tiny.jit_apply(m)(ids) for m in (model, tiny.build_model(files)))
    assert 1e-4 < tiny.relative_error(ours, exact) < 0.1
    assert split(model)[1].keys() == split(tiny.build_model(files))[1].keys()
