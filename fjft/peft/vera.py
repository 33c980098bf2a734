"""VeRA: one frozen random pair A and B for all maps, scaled by trained vectors.

Kopiczko et al. 2024, equation 2.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from fjft import tree
from fjft.errors import UserError
from fjft.models.layers import Linear, Maker, Rngs, Shared, broadcast, dropout
from fjft.models.weights import Site, module_at
from fjft.peft import existing, options, saved, targets
from fjft.peft.lora_adapter import ADAPTER, Fixed
from fjft.peft.low_rank import add_to_weight
from fjft.peft.targets import PeftTensor

PEFT_TYPE = "VERA"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      r: Rank; far higher than LoRA's, since a map trains `r + out` numbers.
      target_modules: `all-linear`, or a regex on Hugging Face module names.
      projection_prng_key: Seed from which A and B are drawn, as PEFT draws them.
      save_projection: Whether an adapter's file holds A and B, or the seed alone.
      vera_dropout: Share of the adapter's input that is dropped in training.
      d_initial: What the vector behind A starts with; the one behind B starts at 0.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
    """

    r: int = 256
    target_modules: str = targets.ALL_LINEAR
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    modules_to_save: str = ""

    def __post_init__(self):
        if self.r < 1:
            raise UserError(f"peft.r={self.r} is not positive")
        if not 0 <= self.vera_dropout < 1:
            raise UserError(f"peft.vera_dropout={self.vera_dropout} is not in [0, 1)")


class Adapter(nnx.Module):
    """Adds `b * (d * (x @ A.T)) @ B.T`, of A and B as much as the map is large.

    Attributes:
      shared_a: Float32[r, the widest input], the same in all maps.
      shared_b: Float32[the widest output, r], the same in all maps.
      lambda_d: Float32[..., r].
      lambda_b: Float32[..., out].
      used: Float32[...], 1 in layers that are adapted and 0 in others of the stack.
      layers: Whether each stacked layer is adapted.
      dropout: Share of the input that is dropped in training.
    """

    def __init__(
        self,
        rngs: Rngs,
        linear: Linear,
        layers: tuple[bool, ...],
        shared: tuple[Shared, Shared],
        config: Config,
    ):
        out_axis = linear.weight.get_metadata()["axes"][-2]
        *stack, size_out, _ = linear.weight.shape
        make = Maker(rngs, jnp.float32, tuple(stack))
        start = jax.nn.initializers.constant(config.d_initial)
        self.shared_a, self.shared_b = shared
        self.lambda_d = make((config.r,), ("rank",), start)
        self.lambda_b = make((size_out,), (out_axis,), jax.nn.initializers.zeros)
        used = jnp.array(layers, jnp.float32).reshape(stack)
        self.used = Fixed(used, axes=("layers",) * len(stack))
        self.layers = layers
        self.dropout = config.vera_dropout

    def __call__(
        self, linear: Linear, x: Float[Array, "*B in"], rng: Key[Array, ""] | None
    ) -> Float[Array, "*B out"]:
        a, b = self._parts(linear)
        dropped = dropout(x, self.dropout, rng)
        low = jnp.einsum("...i,Ri->...R", dropped, a.astype(x.dtype))
        low = _scaled(low, self.lambda_d[...])
        added = jnp.einsum("...R,oR->...o", low, b.astype(x.dtype))
        return linear.base(x) + _scaled(added, self.used[...] * self.lambda_b[...])

    def _parts(self, linear: Linear) -> tuple[jax.Array, jax.Array]:
        size_out, size_in = linear.weight.shape[-2:]
        return self.shared_a[...][:, :size_in], self.shared_b[...][:size_out]

    def merge(self, linear: Linear) -> None:
        """Changes the map so that it alone gives what map and adapter give."""
        a, b = self._parts(linear)
        delta = jnp.einsum(
            "...o,oR,...R,Ri->...oi",
            self.used[...][..., None] * self.lambda_b[...],
            b,
            self.lambda_d[...],
            a,
            precision="highest",
        )
        add_to_weight(linear, delta)


def _scaled(x: jax.Array, vector: jax.Array) -> jax.Array:
    """Products are float32, so that the vector's gradient is summed so."""
    return (x.astype(jnp.float32) * broadcast(vector, x)).astype(x.dtype)


cuts = existing.cuts


def attach(
    model: nnx.Module, sites: Sequence[Site], config: Config, rngs: Rngs
) -> None:
    """Puts an adapter into each targeted linear map; A and B are zero until `start`.

    Raises:
      UserError: A pattern matches nothing.
    """
    linears = targets.linear_sites(model, sites)
    chosen = targets.select_linears(config.target_modules, linears)
    saved.paths(config.modules_to_save, sites)
    adapted = [site for site in linears if chosen & set(site.hf_modules)]
    shapes = [module_at(model, s.module).weight.shape[-2:] for s in adapted]
    most_out, most_in = map(max, zip(*shapes, strict=True))
    shared = (
        Shared(jnp.zeros((config.r, most_in), jnp.float32), axes=("rank", None)),
        Shared(jnp.zeros((most_out, config.r), jnp.float32), axes=(None, "rank")),
    )
    for site in adapted:
        linear = module_at(model, site.module)
        layers = tuple(m in chosen for m in site.hf_modules)
        linear.adapter = nnx.data(Adapter(rngs, linear, layers, shared, config))


def start(
    model: nnx.Module,
    sites: Sequence[Site],
    config: Config,
    read: Callable[[Site], jax.Array],
) -> None:
    """Draws A and B from their seed."""
    del read
    _, adapter = next(targets.adapters(model, sites))
    shapes = adapter.shared_a.shape, adapter.shared_b.shape
    drawn = draw(config.projection_prng_key, *shapes)
    for param, value in zip((adapter.shared_a, adapter.shared_b), drawn, strict=True):
        param[...] = jax.device_put(value, param[...].sharding)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Matrices of kaiming-uniform numbers, to the bit those of torch's generator.

    torch takes the lowest 24 bits of each number of a Mersenne twister, and rounds once
    where it scales and shifts them.

    Args:
      seed: Of the twister.
      shapes: Of the matrices, which are drawn one after the other.
    """
    twister = np.random.MT19937()
    twister._legacy_seeding(seed & 0xFFFFFFFF)
    drawn = []
    for shape in shapes:
        bound = np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1])))
        bits = twister.random_raw(math.prod(shape)) & 0xFFFFFF
        width = np.float64(bound - (-bound))
        values = bits * 2.0**-24 * width - np.float64(bound)
        drawn.append(values.astype(np.float32).reshape(shape))
    return drawn


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """The vectors, and what `modules_to_save` means."""
    whole = saved.paths(config.modules_to_save, sites)
    trained = f"{ADAPTER}lambda_d", f"{ADAPTER}lambda_b"
    return lambda path: path.endswith(trained) or path in whole


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars, without layers that only fill a stack."""
    total = sum(
        sum(adapter.layers) * (config.r + adapter.lambda_b.shape[-1])
        for _, adapter in targets.adapters(model, sites)
    )
    whole = saved.paths(config.modules_to_save, sites)
    return total + existing.count(model, whole)


def peft_config(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> dict[str, Any]:
    """The method's part of PEFT's `adapter_config.json`."""
    adapted = [
        module
        for site, adapter in targets.adapters(model, sites)
        for module, is_used in zip(site.hf_modules, adapter.layers, strict=True)
        if is_used
    ]
    modules = set(saved.modules(config.modules_to_save, sites).values())
    return {
        "r": config.r,
        "projection_prng_key": config.projection_prng_key,
        "save_projection": config.save_projection,
        "vera_dropout": config.vera_dropout,
        "d_initial": config.d_initial,
        "target_modules": targets.peft_names(adapted, model, sites),
        "modules_to_save": sorted(modules) or None,
        "bias": "none",
        "fan_in_fan_out": any(s.transpose for s, _ in targets.adapters(model, sites)),
        "init_weights": True,
    }


def peft_tensors(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> list[PeftTensor]:
    """PEFT's tensors, and the part of a parameter that each of them is."""
    table = []
    for site, adapter in targets.adapters(model, sites):
        for i, is_used in enumerate(adapter.layers):
            name = f"{targets.PEFT_PREFIX}{site.hf_modules[i]}.vera_"
            layer = (i,) if site.lead else ()
            table += [
                PeftTensor(f"{name}{leaf}", f"{site.module}{ADAPTER}{leaf}", layer)
                for leaf in ("lambda_b", "lambda_d")
                if is_used
            ]
    if config.save_projection:
        # A shared parameter has one path, that of the first map.
        for path in tree.split(model)[1]:
            for letter in "ab":
                if path.endswith(f"{ADAPTER}shared_{letter}"):
                    name = f"base_model.vera_{letter.upper()}"
                    table.append(PeftTensor(name, path, ()))
    return table + saved.tensors(config.modules_to_save, sites)


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's VeRA that is not implemented.
    """
    patterns = ("target_modules", "modules_to_save")
    return options.read(
        Config, adapter_config, patterns=patterns, harmless=("init_weights",)
    )
