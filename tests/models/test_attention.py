"""Every way to attention gives what torch gives, forward and backward."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tiny
import tiny_encoders
import tiny_seq2seq
import torch
from jax.extend.core import Primitive
from jax.sharding import AbstractDevice, AbstractMesh

from fjft import sharding
from fjft.models import cudnn, splash, stack
from fjft.models.attention import Way, attention
from fjft.models.mask import Mask, Places


class Case(NamedTuple):
    """Sizes, and what bends the scores."""

    B: int
    T: int
    N: int
    K: int
    H: int
    causal: bool
    window: int | None = None
    softcap: float | None = None
    scale: float = 0.3
    mesh: sharding.Config | None = None


CASES = {
    "grouped": Case(B=2, T=200, N=4, K=2, H=16, causal=True),
    "window-softcap": Case(
        B=1, T=300, N=2, K=1, H=8, causal=True, window=70, softcap=2.0
    ),
    "stretches": Case(B=2, T=512, N=4, K=2, H=8, causal=True),
    "stretches-window": Case(
        B=1, T=512, N=2, K=1, H=8, causal=True, window=130, softcap=2.0
    ),
    "softcap": Case(B=1, T=128, N=2, K=1, H=8, causal=True, softcap=2.0),
    "both-ways-window": Case(B=1, T=256, N=2, K=2, H=8, causal=False, window=33),
    "fewer-kv-heads-than-devices": Case(
        B=2, T=128, N=4, K=2, H=8, causal=True, mesh=sharding.Config(fsdp=2, tensor=4)
    ),
    "rows-in-stretches": Case(
        B=2, T=256, N=4, K=2, H=8, causal=True, mesh=sharding.Config(2, 1, 2, 2)
    ),
    "stretches-of-odd-length": Case(
        B=1,
        T=300,
        N=2,
        K=1,
        H=8,
        causal=True,
        window=70,
        mesh=sharding.Config(fsdp=1, sequence=4),
    ),
    "heads-that-do-not-divide": Case(
        B=2, T=128, N=3, K=3, H=8, causal=False, mesh=sharding.Config(fsdp=2, tensor=2)
    ),
}


def _rows(B, T):
    """Two segments and padding in each row, cut at odd places."""
    cuts = np.sort(np.random.default_rng(B).integers(T // 4, T, (B, 2)), axis=1)
    index = np.arange(T)[None]
    second = index >= cuts[:, :1]
    segments = np.where(index < cuts[:, 1:], 1 + second, 0).astype(np.int32)
    return (index - second * cuts[:, :1]).astype(np.int32), segments


def _inputs(case):
    rng = np.random.default_rng(0)
    shapes = [(case.B, case.T, n, case.H) for n in (case.N, case.K, case.K, case.N)]
    q, k, v, weights = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    positions, segments = _rows(case.B, case.T)
    # What padding gets is nobody's business.
    return (q, k, v), weights * (segments != 0)[..., None, None], (positions, segments)


def _by_torch(case, *bias):
    """Loss and gradients from scores that are written out, in float64."""
    arrays, weights, (positions, segments) = _inputs(case)
    q, k, v, *bias = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for x in (*arrays, *bias)
    )
    keys, values = (x.repeat_interleave(case.N // case.K, dim=2) for x in (k, v))
    scores = torch.einsum("btnh,bsnh->bnts", q, keys) * case.scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = sum(bias, start=scores)
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None]
    if case.causal:
        seen &= distance >= 0
    if case.window is not None:
        seen &= np.abs(distance) < case.window
    scores = scores.masked_fill(~torch.tensor(seen)[:, None], torch.finfo().min)
    out = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), values)
    loss = (out * torch.tensor(weights)).sum()
    grads = torch.autograd.grad(loss, (q, k, v, *bias))
    return [x.detach().numpy() for x in (loss, *grads)]


def _by_jax(case, attend, *bias):
    value, grads = _gradients(case, attend, *bias)
    return [np.asarray(x) for x in (value, *grads)]


def _gradients(case, attend, *bias):
    arrays, weights, places = _inputs(case)
    mask = Mask(
        Places(*map(jnp.asarray, places)), window=case.window, causal=case.causal
    )

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=tuple(range(3 + len(bias))))
    def loss(q, k, v, *bias):
        options = dict(zip(("bias_BNTS",), bias, strict=False))
        out = attend(q, k, v, mask, scale=case.scale, softcap=case.softcap, **options)
        return jnp.sum(out * weights)

    return loss(*map(jnp.asarray, (*arrays, *bias)))


WAYS = {
    "xla": attention,
    "splash": functools.partial(splash.splash_attention, interpret=True),
    # The same function of the same arguments as by cuDNN, on any backend.
    "cudnn": lambda *arguments, softcap, **options: cudnn.cudnn_attention(
        *arguments, **options, implementation="xla"
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_way_equals_torch(case, way):
    if way == "cudnn" and case.softcap is not None:
        pytest.skip("cuDNN has no soft caps")
    _check(case, WAYS[way])


@pytest.mark.parametrize("way", ["splash", "cudnn"])
@pytest.mark.parametrize(("sequence", "sums"), [(1, False), (4, True)])
def test_gradients_are_summed_over_no_axis_of_one_device(way, sequence, sums):
    """Those of keys are over `sequence`, whose devices have queries of their own."""
    config = sharding.Config(fsdp=2, sequence=sequence)
    case = Case(B=2, T=512, N=2, K=2, H=8, causal=True)
    with jax.set_mesh(sharding.make_mesh(config, jax.devices()[: 2 * sequence])):
        traced = jax.make_jaxpr(lambda: _gradients(case, WAYS[way]))()
    names = {e.primitive.name for e in jaxprs.equations(traced.jaxpr)}
    assert "shard_map" in names
    assert any(name.startswith("psum") for name in names) == sums


def test_blocks_of_a_chosen_size_need_not_divide_the_row():
    _check(CASES["window-softcap"], functools.partial(WAYS["splash"], block=256))


@pytest.mark.parametrize(
    ("queries", "keys", "width", "window", "block"),
    [
        (512, 512, 64, None, 512),
        (1536, 1536, 64, None, 1536),
        (2048, 2048, 256, None, 1024),
        (2048, 4096, 128, None, 2048),  # the half of a row
        (4096, 4096, 128, 2048, 2048),
        (4096, 4096, 128, 1024, None),
        (4096, 4096, 256, None, None),
        (8192, 8192, 64, None, None),
    ],
)
def test_where_one_kernel_gives_all_gradients(queries, keys, width, window, block):
    sizes = splash.choose_blocks(queries, keys, width, window)
    assert sizes.use_fused_bwd_kernel == (block is not None)
    assert sizes.block_kv_dkv == (block or 512)


@pytest.mark.parametrize("case", ["grouped", "stretches"])
def test_a_bias_gets_its_gradient(case):
    case = CASES[case]
    shape = (1, case.N, case.T, case.T)
    _check(case, attention, np.random.default_rng(1).standard_normal(shape, np.float32))


def _check(case, attend, *bias):
    if case.mesh is None:
        ours = _by_jax(case, attend, *bias)
    else:
        devices = jax.devices()[: math.prod(dataclasses.astuple(case.mesh))]
        with jax.set_mesh(sharding.make_mesh(case.mesh, devices)):
            ours = _by_jax(case, attend)
    for got, expected in zip(ours, _by_torch(case, *bias), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def _shapes_on(platform, **options):
    """What attention works out when traced for devices that are not here."""
    case = CASES["grouped"]
    arrays, _, places = _inputs(case)
    mask = Mask(Places(*map(jnp.asarray, places)), causal=True)
    device = AbstractDevice(device_kind="any", num_cores=1, platform=platform)
    mesh = AbstractMesh((1,) * 5, sharding.AXES, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(
            lambda q, k, v: attention(q, k, v, mask, scale=1.0, **options)
        )(*map(jnp.asarray, arrays))
    return {tuple(s) for s in jaxprs.shapes(jaxpr.jaxpr)}, case


def test_a_mesh_of_tpus_never_holds_scores_or_a_mask():
    shapes, case = _shapes_on("tpu")
    assert not any(np.prod(s) >= case.T**2 and case.T in s[-1:] for s in shapes)
    shapes, _ = _shapes_on("cpu")
    assert any(s[-2:] == (case.T, case.T) for s in shapes)


@pytest.mark.parametrize(
    ("make_twin", "inputs"),
    [
        (lambda: tiny.torch_model("llama/llama3-rope-biases"), {}),
        (lambda: tiny_encoders.torch_model("bert/tanh-gelu/masked_lm"), {}),
        (lambda: tiny_encoders.torch_model("modernbert/biases-mean/masked_lm"), {}),
        (
            lambda: tiny_seq2seq.torch_model("bart/post-norm"),
            {"decoder_input_ids": jnp.asarray(tiny.random_ids(2, 8))},
        ),
    ],
    ids=["llama", "bert", "modernbert", "bart"],
)
def test_a_model_may_be_told_to_take_no_kernel(monkeypatch, make_twin, inputs):
    monkeypatch.setattr("fjft.models.attention.current_device", lambda: ("tpu", ""))
    files = tiny.memory_files(make_twin())
    taken = {}
    for kernels in ("auto", "xla"):
        model = tiny.build_model(files, attention=Way(kernels))
        jaxpr = jax.make_jaxpr(functools.partial(model, **inputs))(
            tiny.random_ids(2, 8)
        )
        names = {e.primitive.name for e in jaxprs.equations(jaxpr.jaxpr)}
        taken[kernels] = "pallas_call" in names
    assert taken == {"auto": True, "xla": False}


@pytest.mark.parametrize("option", ["bias", "dropout"])
def test_what_the_kernel_does_not_know_is_left_to_the_compiler(option):
    T = CASES["grouped"].T
    options = {"bias_BNTS": jnp.zeros((1, 4, T, T))}
    if option == "dropout":
        options = {"dropout": 0.5, "rng": jax.random.key(0)}
    assert any(s[-2:] == (T, T) for s in _shapes_on("tpu", **options)[0])


def _queries(T=200, H=16, dtype=jnp.bfloat16):
    return jnp.zeros((2, T, 4, H), dtype)


@pytest.mark.parametrize(
    ("kind", "has"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA A100-SXM4-40GB", True),
        ("NVIDIA L4", True),
        ("NVIDIA GeForce RTX 3090", True),
        # Before Ampere.
        ("Tesla T4", False),
        ("Tesla V100-SXM2-16GB", False),
        ("NVIDIA TITAN RTX", False),
        ("NVIDIA GeForce RTX 2080 Ti", False),
        ("NVIDIA GeForce GTX 1080", False),
        ("AMD Instinct MI300X", False),
        ("TPU v5 lite", False),
        ("cpu", False),
        ("", False),
    ],
)
def test_cards_that_cudnn_has_a_kernel_for(kind, has):
    assert cudnn.has_kernel(kind, _queries()) is has


@pytest.mark.parametrize(
    ("shape", "has"),
    [
        ({"dtype": jnp.float16}, True),
        ({"dtype": jnp.float32}, False),
        ({"T": 201}, False),
        ({"H": 128}, True),
        ({"H": 256}, False),
        ({"H": 60}, False),
    ],
)
def test_queries_that_cudnn_has_a_kernel_for(shape, has):
    assert cudnn.has_kernel("NVIDIA L4", _queries(**shape)) is has


@pytest.mark.parametrize(
    ("options", "takes"),
    [
        ({}, True),
        ({"softcap": 2.0}, False),
        ({"bias_BNTS": jnp.zeros((1, 4, 200, 200))}, False),
        ({"dropout": 0.5, "rng": jax.random.key(0)}, False),
        ({"keys": True}, False),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_a_mesh_of_gpus_takes_cudnns_kernel_where_it_may(monkeypatch, options, takes):
    taken = []

    def note(q, *arguments, **options):
        taken.append(options)
        return q

    monkeypatch.setattr("fjft.models.attention.cudnn_attention", note)
    places = Places(*map(jnp.asarray, _rows(2, 200)))
    keys = places if options.pop("keys", False) else None
    device = AbstractDevice(device_kind="NVIDIA L4", num_cores=1, platform="gpu")
    mesh = AbstractMesh((1,) * 5, sharding.AXES, abstract_device=device)
    q = _queries()
    with jax.sharding.use_abstract_mesh(mesh):
        mask = Mask(places, keys, causal=True)
        jax.eval_shape(lambda q: attention(q, q, q, mask, scale=0.5, **options), q)
    assert taken == [{"scale": 0.5}] * takes


def test_remat_that_keeps_attention_keeps_what_the_kernel_gives():
    """A stand-in of its name, since cuDNN is only there on machines with GPUs."""
    kernel = Primitive("dot_product_attention_fwd_wrapper")
    kernel.def_abstract_eval(lambda x: x)
    kept = {name: stack.REMAT_POLICIES[name] for name in ("full", "attention", "dots")}

    def count(remat):
        @jax.custom_vjp
        def attend(x):
            return kernel.bind(x)

        attend.defvjp(lambda x: (kernel.bind(x),) * 2, lambda out, grad: (out * grad,))
        step = jax.grad(lambda x: jnp.sum(remat(attend)(jnp.sin(x))))
        return str(jax.make_jaxpr(step)(jnp.ones(3))).count(kernel.name)

    assert {name: count(remat) for name, remat in kept.items()} == {
        "full": 2,
        "attention": 1,
        "dots": 1,
    }
