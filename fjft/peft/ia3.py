"""IA3: trained vectors that scale keys, values and hidden units (Liu et al. 2022)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fjft.errors import UserError
from fjft.models.layers import Linear, Maker, Rngs, broadcast
from fjft.models.weights import Site, module_at
from fjft.peft import existing, options, saved, targets
from fjft.peft.lora_adapter import ADAPTER, Fixed
from fjft.peft.targets import PeftTensor

PEFT_TYPE = "IA3"

# What the paper scales, by the names that families have for it; PEFT's defaults.
_KEYS_AND_VALUES = "k|v|k_proj|v_proj|key|value|c_attn|qkv_proj|query_key_value"
_HIDDEN_UNITS = r"wo|fc2|down_proj|output\.dense|mlp\.c_proj|dense_4h_to_h"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      target_modules: `all-linear`, or a regex on Hugging Face module names; by default
        keys, values and the last map of the MLP.
      feedforward_modules: A regex on those of them whose input is scaled instead of
        their output; "" is none.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
    """

    target_modules: str = f"{_KEYS_AND_VALUES}|{_HIDDEN_UNITS}"
    feedforward_modules: str = _HIDDEN_UNITS
    modules_to_save: str = ""

    def scales_input(self, module: str) -> bool:
        """Whether the module's input is scaled, not its output."""
        pattern = self.feedforward_modules
        return bool(pattern) and targets.matches(pattern, module)


class Adapter(nnx.Module):
    """Gives `scale * (W x + b)`, or `W (scale * x) + b`.

    Attributes:
      scale: Float32[..., out, 1] or Float32[..., 1, in], as PEFT has it.
      adapted: Float32[...]; a layer that is not adapted has a scale that is not used.
      layers: For each stacked layer whether it is; one entry where nothing is stacked.
      scales_input: Whether it is the input that is scaled.
    """

    def __init__(
        self,
        rngs: Rngs,
        linear: Linear,
        layers: tuple[bool, ...],
        scales_input: bool,
    ):
        out_axis, in_axis = linear.weight.get_metadata()["axes"][-2:]
        *stack, size_out, size_in = linear.weight.shape
        shape, axes = (size_out, 1), (out_axis, None)
        if scales_input:
            shape, axes = (1, size_in), (None, in_axis)
        make = Maker(rngs, jnp.float32, tuple(stack))
        self.scale = make(shape, axes, jax.nn.initializers.ones)
        self.adapted = Fixed(
            jnp.array(layers, jnp.float32).reshape(stack), axes=("layers",) * len(stack)
        )
        self.layers = layers
        self.scales_input = scales_input

    def __call__(
        self, linear: Linear, x: Float[Array, "*B in"], rng: Key[Array, ""] | None
    ) -> Float[Array, "*B out"]:
        del rng
        if self.scales_input:
            return linear.base(self._scaled(x))
        return self._scaled(linear.base(x))

    def _scaled(self, x: jax.Array) -> jax.Array:
        """The product in float32, so that the scale's gradient is summed in it."""
        scale = jnp.where(self.adapted[...] != 0, self.scale[...].ravel(), 1)
        return (x.astype(jnp.float32) * broadcast(scale, x)).astype(x.dtype)

    def merge(self, linear: Linear) -> None:
        """Changes the map so that it alone gives what map and adapter give."""
        adapted = self.adapted[...].reshape(*self.adapted.shape, 1, 1)
        scale = jnp.where(adapted != 0, self.scale[...], 1)
        _scale_in_place(linear.weight, scale)
        if linear.bias is not None and not self.scales_input:
            _scale_in_place(linear.bias, scale[..., 0])


def _scale_in_place(param: nnx.Param, scale: jax.Array) -> None:
    value = param[...]
    scale = jnp.broadcast_to(scale, value.shape)
    param[...] = (value.astype(jnp.float32) * scale).astype(value.dtype)


cuts = existing.cuts


def attach(
    model: nnx.Module, sites: Sequence[Site], config: Config, rngs: Rngs
) -> None:
    """Puts a vector beside each targeted linear map.

    Raises:
      UserError: A pattern matches nothing, or means some layers of a stack only.
    """
    linears = targets.linear_sites(model, sites)
    chosen = targets.select_linears(config.target_modules, linears)
    if config.feedforward_modules not in ("", Config.feedforward_modules):
        option = "peft.feedforward_modules"
        targets.select(config.feedforward_modules, sorted(chosen), option)
    saved.paths(config.modules_to_save, sites)
    for site in linears:
        layers = tuple(m in chosen for m in site.hf_modules)
        if not any(layers):
            continue
        names = [m for m in site.hf_modules if m in chosen]
        scales_input = {config.scales_input(m) for m in names}
        if len(scales_input) > 1:
            raise UserError(
                f"peft.feedforward_modules={config.feedforward_modules!r} means some "
                f"layers of {site.path} and not others; name all of them or none"
            )
        linear = module_at(model, site.module)
        linear.adapter = nnx.data(Adapter(rngs, linear, layers, scales_input.pop()))


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """The vectors, and what `modules_to_save` means."""
    whole = saved.paths(config.modules_to_save, sites)
    return lambda path: path.endswith(f"{ADAPTER}scale") or path in whole


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars, without those of layers that are not adapted."""
    vectors = sum(
        sum(adapter.layers) * math.prod(adapter.scale.shape[-2:])
        for _, adapter in targets.adapters(model, sites)
    )
    whole = saved.paths(config.modules_to_save, sites)
    return vectors + existing.count(model, whole)


def peft_config(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of the method."""
    inputs, outputs = [], []
    for site, adapter in targets.adapters(model, sites):
        names = inputs if adapter.scales_input else outputs
        pairs = zip(site.hf_modules, adapter.layers, strict=True)
        names += [module for module, is_adapted in pairs if is_adapted]
    modules = targets.peft_names(inputs + outputs, model, sites)
    feedforward = [m for m in modules if any(targets.matches(m, n) for n in inputs)]
    # PEFT asks whether a module's whole name ends so, wherever its parts begin.
    if any(name.endswith(m) for name in outputs for m in feedforward):
        modules, feedforward = sorted(inputs + outputs), sorted(inputs)
    whole = saved.modules(config.modules_to_save, sites).values()
    return {
        "target_modules": modules,
        "feedforward_modules": feedforward,
        "modules_to_save": sorted(set(whole)) or None,
        # PEFT's word for maps that lie the other way round in the base model.
        "fan_in_fan_out": any(s.transpose for s, _ in targets.adapters(model, sites)),
        "init_ia3_weights": True,
    }


def peft_tensors(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> list[PeftTensor]:
    """PEFT's tensors, and the part of a parameter that each of them is."""
    table = [
        PeftTensor(
            f"{targets.PEFT_PREFIX}{module}.ia3_l",
            f"{site.module}{ADAPTER}scale",
            (i,) if site.lead else (),
        )
        for site, adapter in targets.adapters(model, sites)
        for i, module in enumerate(site.hf_modules)
        if adapter.layers[i]
    ]
    return table + saved.tensors(config.modules_to_save, sites)


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's IA3 that is not implemented.
    """
    return options.read(
        Config,
        adapter_config,
        patterns=("target_modules", "feedforward_modules", "modules_to_save"),
        harmless=("init_ia3_weights",),
    )
