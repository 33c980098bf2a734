"""Optimizers against torch's and transformers', on stacked and plain parameters.

torch holds one tensor per layer where the parameters here have a leading layer axis,
so agreement also shows that a stack is treated layer by layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec

from fjft.errors import UserError
from fjft.optimize import optimizer

STEPS = 20
LAYERS = 3
SHAPES = {
    "embed.weight": (11, 6),
    "layers.up.weight": (LAYERS, 10, 6),
    "layers.down.weight": (LAYERS, 4, 10),
    "layers.down.bias": (LAYERS, 4),
    "layers.up.lora_B": (LAYERS, 10, 2),
    "norm.weight": (6,),
}


def stack_axes(path: str) -> int:
    return 1 if path.startswith("layers.") else 0


def is_vector(path: str) -> bool:
    return path.endswith("bias") or path.startswith("norm")


def make_params() -> dict[str, np.ndarray]:
    """Weights near one in size; lora_B starts at zero, where errors cannot hide."""
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    return params | {"layers.up.lora_B": np.zeros(SHAPES["layers.up.lora_B"], "f4")}


def make_grads(step: int) -> dict[str, np.ndarray]:
    """Gradients whose norm lies above and below 1 by turns."""
    rng = np.random.default_rng(step + 1)
    size = 0.02 if step % 3 == 0 else 0.3
    return {k: (size * rng.normal(size=s)).astype("f4") for k, s in SHAPES.items()}


def unstack(path: str, array: np.ndarray) -> list[torch.Tensor]:
    layers = list(array) if stack_axes(path) else [array]
    return [torch.tensor(layer) for layer in layers]


def run_ours(
    config: optimizer.Config, decay_mask=None, muon_mask=None
) -> list[dict[str, np.ndarray]]:
    """Parameters after each step, clipped and scheduled, from a compiled step."""
    transform = optimizer.make_optimizer(
        config, STEPS, decay_mask, stack_axes=stack_axes, muon_mask=muon_mask
    )
    params = jax.tree.map(jnp.asarray, make_params())
    state = transform.init(params)

    @jax.jit
    def step(params, state, grads):
        grads, _ = optimizer.clip_by_global_norm(grads, config.max_grad_norm)
        updates, state = transform.update(grads, state, params)
        return optimizer.apply_updates(params, updates), state

    history = []
    for i in range(STEPS):
        params, state = step(params, state, jax.tree.map(jnp.asarray, make_grads(i)))
        history.append(jax.tree.map(np.asarray, params))
    return history


def run_torch(make, config: optimizer.Config) -> list[dict[str, np.ndarray]]:
    """The same from torch; `make` turns {path: tensors} into a list of optimizers."""
    tensors = {
        path: [torch.nn.Parameter(t) for t in unstack(path, array)]
        for path, array in make_params().items()
    }
    everything = [t for ts in tensors.values() for t in ts]
    optimizers = make(tensors)
    warmup = optimizer.schedules.count_steps(config.warmup_steps, STEPS)
    schedulers = [
        transformers.optimization.get_scheduler(config.schedule, o, warmup, STEPS)
        for o in optimizers
    ]
    history = []
    for i in range(STEPS):
        for path, grad in make_grads(i).items():
            for tensor, g in zip(tensors[path], unstack(path, grad), strict=True):
                tensor.grad = g
        torch.nn.utils.clip_grad_norm_(everything, config.max_grad_norm)
        for stepper in (*optimizers, *schedulers):
            stepper.step()
        history.append({k: to_numpy(k, ts) for k, ts in tensors.items()})
    return history


def to_numpy(path: str, tensors: list[torch.nn.Parameter]) -> np.ndarray:
    arrays = [t.detach().numpy().copy() for t in tensors]
    return np.stack(arrays) if stack_axes(path) else arrays[0]


def groups(tensors: dict, decay: float) -> list[dict]:
    """Parameter groups as transformers' trainer makes them."""
    decayed = [t for k, ts in tensors.items() if not is_vector(k) for t in ts]
    others = [t for k, ts in tensors.items() if is_vector(k) for t in ts]
    return [
        {"params": decayed, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]


def assert_close(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    """Each parameter, after each step: norm of the difference over the norm."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for path in SHAPES:
            size = np.linalg.norm(b[path])
            error = np.linalg.norm(a[path] - b[path])
            assert error <= tolerance * size, (step, path, error / max(size, 1e-30))


def make_config(name: str, **fields) -> optimizer.Config:
    return optimizer.Config(
        name=name,
        **{
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 0.1,
            "weight_decay": 0.1,
            **fields,
        },
    )


def test_adamw_equals_torch():
    config = make_config("adamw", adam_beta1=0.85, adam_epsilon=1e-6)

    def make(tensors):
        groups_ = groups(tensors, config.weight_decay)
        return [
            torch.optim.AdamW(
                groups_, lr=config.learning_rate, betas=(0.85, 0.999), eps=1e-6
            )
        ]

    assert_close(run_ours(config), run_torch(make, config), 2e-6)


def test_adafactor_equals_transformers():
    config = make_config("adafactor")

    def make(tensors):
        return [
            transformers.optimization.Adafactor(
                groups(tensors, config.weight_decay),
                lr=config.learning_rate,
                scale_parameter=False,
                relative_step=False,
            )
        ]

    assert_close(run_ours(config), run_torch(make, config), 2e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torch(momentum):
    config = make_config("sgd", sgd_momentum=momentum, learning_rate=0.1)

    def make(tensors):
        groups_ = groups(tensors, config.weight_decay)
        return [torch.optim.SGD(groups_, lr=config.learning_rate, momentum=momentum)]

    assert_close(run_ours(config), run_torch(make, config), 2e-6)


def make_muon(config: optimizer.Config, muon_paths: set[str]):
    def make(tensors):
        matrices = [t for k, ts in tensors.items() if k in muon_paths for t in ts]
        others = {k: ts for k, ts in tensors.items() if k not in muon_paths}
        muon = torch.optim.Muon(
            matrices,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn=config.muon_adjust_lr,
        )
        adamw = torch.optim.AdamW(
            groups(others, config.weight_decay), lr=config.learning_rate
        )
        return [muon, adamw]

    return make


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_equals_torch_in_float32(monkeypatch, adjust):
    # torch iterates in bfloat16, whatever it is given; both do float32 here.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    config = make_config("muon", muon_adjust_lr=adjust)
    hidden = {"layers.up.weight", "layers.down.weight", "layers.up.lora_B"}
    ours = run_ours(config, muon_mask=lambda path: path != "embed.weight")
    assert_close(ours, run_torch(make_muon(config, hidden), config), 5e-6)


def test_muon_is_near_torch_as_it_comes_and_takes_all_matrices_by_default():
    config = make_config("muon")
    matrices = {path for path in SHAPES if not is_vector(path)}
    theirs = run_torch(make_muon(config, matrices), config)
    ours = run_ours(config)
    assert_close(ours, theirs, 3e-2)


def test_lion_equals_the_paper():
    config = make_config("lion", adam_beta2=0.99, learning_rate=1e-3)
    rate = optimizer.make_schedule(config, STEPS)
    params = {k: v.astype(np.float64) for k, v in make_params().items()}
    momentum = {k: np.zeros_like(v) for k, v in params.items()}
    theirs = []
    for i in range(STEPS):
        grads = make_grads(i)
        norm = np.sqrt(sum(np.sum(np.square(g, dtype="f8")) for g in grads.values()))
        for path, g in grads.items():
            g = g * min(1.0, 1.0 / (norm + 1e-6))
            c = np.sign(0.9 * momentum[path] + 0.1 * g)
            decay = 0.0 if is_vector(path) else config.weight_decay
            params[path] = params[path] - float(rate(i)) * (c + decay * params[path])
            momentum[path] = 0.99 * momentum[path] + 0.01 * g
        theirs.append(dict(params))
    assert_close(run_ours(config), theirs, 2e-6)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_equals_torch(max_norm):
    grads = make_grads(1)
    tensors = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads.values()]
    for tensor, g in zip(tensors, grads.values(), strict=True):
        tensor.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    clip = jax.jit(optimizer.clip_by_global_norm, static_argnums=1)
    clipped, ours = clip(jax.tree.map(jnp.asarray, grads), max_norm)
    np.testing.assert_allclose(ours, norm, rtol=3e-7)
    for path, tensor in zip(grads, tensors, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(clipped[path], tensor.grad, rtol=5e-7)


def test_clipping_sums_bfloat16_in_float32_and_zero_turns_it_off():
    # 65,536 squares of one: a bfloat16 sum would stick at 256.
    grads = {"w": jnp.ones(65536, jnp.bfloat16)}
    same, norm = optimizer.clip_by_global_norm(grads, 0.0)
    assert norm == 256.0
    assert same is grads
    clipped, _ = optimizer.clip_by_global_norm(grads, 1.0)
    assert clipped["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(clipped["w"][0].astype(jnp.float32), 1 / 256, rtol=1e-2)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_state_is_float32_over_bfloat16_parameters(name):
    transform = optimizer.make_optimizer(
        optimizer.Config(name=name, sgd_momentum=0.9), STEPS, stack_axes=stack_axes
    )
    params = {k: jnp.ones(s, jnp.bfloat16) for k, s in SHAPES.items()}
    state = transform.init(params)
    updates, new_state = jax.jit(transform.update)(params, state, params)
    types = {leaf.dtype for leaf in jax.tree.leaves((state, new_state, updates))}
    assert types <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    assert all(leaf.size for leaf in jax.tree.leaves(state))
    new_params = optimizer.apply_updates(params, updates)
    assert {p.dtype for p in new_params.values()} == {jnp.dtype("bfloat16")}


def test_moments_lie_where_their_parameters_lie():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    params = {"layers.w": jax.device_put(jnp.ones((2, 16, 4)), sharding)}
    transform = optimizer.make_optimizer(optimizer.Config(), STEPS)
    moments = [x for x in jax.tree.leaves(transform.init(params)) if x.ndim == 3]
    assert [m.sharding.spec for m in moments] == [sharding.spec] * 2


def test_masks_may_be_dicts_or_functions():
    config = make_config("adamw", weight_decay=0.5)
    none = run_ours(config, decay_mask=dict.fromkeys(SHAPES, False))[-1]
    same = run_ours(make_config("adamw", weight_decay=0.0))[-1]
    embed_only = run_ours(config, decay_mask=lambda path: path == "embed.weight")[-1]
    for path in SHAPES:
        np.testing.assert_array_equal(none[path], same[path])
        moved = not np.array_equal(embed_only[path], same[path])
        assert moved == (path == "embed.weight")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamx"}, "'adamx'.*adamw, adafactor, lion, muon, sgd"),
        ({"schedule": "x"}, "optimizer.schedule 'x'.*linear"),
        ({"name": "muon", "muon_adjust_lr": "none"}, "match_rms_adamw, original"),
    ],
)
def test_unknown_names_list_the_known_ones(fields, message):
    with pytest.raises(UserError, match=message):
        optimizer.make_optimizer(optimizer.Config(**fields), STEPS)
