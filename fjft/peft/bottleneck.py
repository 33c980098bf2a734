"""Bottleneck adapters: small networks beside a layer's sublayers.

Those of Houlsby et al. (2019), Pfeiffer et al. (2020) and He et al. (2022), as the
library of AdapterHub has them: its files go both ways. PEFT has no such adapters.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fjft import tree
from fjft.errors import UserError
from fjft.models.layers import ACTIVATIONS, Initializer, Maker, Rngs, broadcast, dropout
from fjft.models.layers import normal as normal_numbers
from fjft.models.weights import Site, module_at
from fjft.peft import existing, saved
from fjft.peft.bottleneck_config import FIXED, KINDS, SUBLAYERS
from fjft.peft.bottleneck_config import Config as Config
from fjft.peft.bottleneck_config import from_peft as from_peft
from fjft.peft.lora_adapter import ADAPTER
from fjft.peft.low_rank import narrow
from fjft.peft.targets import PeftTensor

PEFT_TYPE = "ADAPTERHUB"
WEIGHTS_NAMES = ("adapter.safetensors", "pytorch_adapter.bin")


class Bottleneck(nnx.Module):
    """`scaling * up(f(down(x)))`.

    Attributes:
      down: Float32[..., W, D].
      down_bias: Float32[..., W].
      up: Float32[..., D, W].
      up_bias: Float32[..., D].
    """

    def __init__(self, make: Maker, size: int, config: Config):
        width = max(int(size // config.own("reduction_factor")), 1)
        zeros: Initializer = jax.nn.initializers.zeros
        # From either AdapterHub starts: BERT's numbers, or LoRA's.
        init_down = init_up = normal_numbers(0.02)
        if KINDS[config.kind].starts_at_zero:
            bound, init_up = 1 / math.sqrt(size), zeros

            def init_down(key: jax.Array, shape: tuple, dtype: Any) -> jax.Array:
                return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.down = make((width, size), ("rank", "embed"), init_down)
        self.down_bias = make((width,), ("rank",), zeros)
        self.up = make((size, width), ("embed", "rank"), init_up)
        self.up_bias = make((size,), ("norm",), zeros)
        self.activation = config.own("non_linearity")
        self.scaling = float(config.own("scaling"))
        self.dropout = config.dropout

    def __call__(
        self, x: Float[Array, "*B D"], rng: Key[Array, ""] | None
    ) -> Float[Array, "*B D"]:
        hidden = ACTIVATIONS[self.activation](_affine(x, self.down, self.down_bias))
        out = _affine(hidden.astype(x.dtype), self.up, self.up_bias)
        return dropout((self.scaling * out).astype(x.dtype), self.dropout, rng)


def _affine(x: jax.Array, weight: nnx.Param, bias: nnx.Param) -> jax.Array:
    """A linear map in float32, its product in the type of x."""
    product = narrow(x, weight[...], jnp.float32(1)).astype(jnp.float32)
    return product + broadcast(bias[...], product)


class Bottlenecks(nnx.Module):
    """What a block's slot holds: the adapters of its sublayers.

    Attributes:
      attention: Attention's, or None.
      mlp: The MLP's, or None.
      reads: What they read, see `Kind`.
    """

    def __init__(self, make: Maker, size: int, config: Config):
        kind = KINDS[config.kind]
        for place, sublayer in SUBLAYERS.items():
            has = place in kind.places
            found = Bottleneck(make, size, config) if has else None
            setattr(self, sublayer, nnx.data(found))
        self.reads = kind.reads

    def __call__(
        self,
        sublayer: str,
        out: Float[Array, "B T D"],
        x: Float[Array, "B T D"],
        norm: Callable[[jax.Array], jax.Array] | None,
        rng: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        """A sublayer's output with its adapter's; arguments as `layers.adapted` has."""
        bottleneck = getattr(self, sublayer)
        if bottleneck is None:
            return out
        read = {"output": lambda: out, "residual": lambda: x, "sum": lambda: out + x}
        seen = read[self.reads]()
        if self.reads == "sum" and norm is not None:
            seen = norm(seen)
        return out + bottleneck(seen, rng)


cuts = existing.cuts


def attach(model: Any, sites: Sequence[Site], config: Config, rngs: Rngs) -> None:
    """Puts adapters into every layer's slot.

    Raises:
      UserError: The layers have none, or share their weights.
    """
    saved.paths(config.modules_to_save, sites)
    num_layers = 0
    for block, site in _blocks(model, sites):
        make = Maker(rngs, jnp.float32, site.lead)
        block.adapter = nnx.data(Bottlenecks(make, model.arch.hidden_size, config))
        num_layers += len(site.hf_names)
    if num_layers < model.arch.num_layers:
        raise UserError(
            "peft.method=bottleneck needs layers that are made for it, each with its "
            "own weights: a decoder's, or those of BERT and its kin; use "
            "peft.method=lora"
        )


def _blocks(model: Any, sites: Sequence[Site]) -> list[tuple[Any, Site]]:
    """Blocks with a slot, and the site of each one's last map of attention."""
    found = []
    for site in sites:
        path = re.fullmatch(r"(layers\.blocks\.\d+)\.attention\.o\.weight", site.path)
        block = None if path is None else module_at(model, path[1])
        if hasattr(block, "adapter"):
            found.append((block, site))
    return found


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """The adapters, and what `modules_to_save` means."""
    whole = saved.paths(config.modules_to_save, sites)
    return lambda path: ADAPTER in path or path in whole


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars."""
    return existing.count(
        model, filter(is_trainable(config, sites), tree.split(model)[1])
    )


def peft_config(model: Any, sites: Sequence[Site], config: Config) -> dict[str, Any]:
    """What AdapterHub's `adapter_config.json` says."""
    kind = KINDS[config.kind]
    files = model.provenance.files
    return {
        "name": config.name,
        "model_type": files.config.model_type,
        "model_name": files.source,
        "model_class": (files.config.architectures or [None])[0],
        "hidden_size": model.arch.hidden_size,
        "modules_to_save": config.modules_to_save or None,
        "config": {
            **{place: place in kind.places for place in SUBLAYERS},
            "non_linearity": config.own("non_linearity"),
            "reduction_factor": config.own("reduction_factor"),
            "scaling": float(config.own("scaling")),
            "dropout": config.dropout,
            "original_ln_before": kind.reads == "sum",
            "is_parallel": kind.reads == "residual",
            "init_weights": "mam_adapter" if kind.starts_at_zero else "bert",
            **FIXED,
        },
        "version": "adapters.1.3.0",
    }


def peft_tensors(model: Any, sites: Sequence[Site], config: Config) -> list[PeftTensor]:
    """AdapterHub's tensors, and the part of a parameter that each of them is."""
    leaves = {
        "down": "adapter_down.0.weight",
        "down_bias": "adapter_down.0.bias",
        "up": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
    }
    table = []
    for _, site in _blocks(model, sites):
        path = site.path.removesuffix(".attention.o.weight")
        for i, module in enumerate(site.hf_modules):
            for place in KINDS[config.kind].places:
                holder = f"{_holder(module, place)}.adapters.{config.name}"
                inside = f"{path}{ADAPTER}{SUBLAYERS[place]}"
                table += [
                    PeftTensor(f"{holder}.{name}", f"{inside}.{leaf}", (i,))
                    for leaf, name in leaves.items()
                ]
    return table + saved.tensors(config.modules_to_save, sites, prefix="")


def _holder(module: str, place: str) -> str:
    """The module in which AdapterHub puts a layer's adapter.

    Args:
      module: The name of the layer's last map of attention.
      place: AdapterHub's name of the place.
    """
    layer, found, inside = module.rpartition(".attention.output.dense")
    if found and not inside:
        return f"{layer}.{'attention.' if place == 'mh_adapter' else ''}output"
    layer = re.sub(r"(.*\.\d+)\..*", r"\1", module)
    return f"{layer}.{'attention' if place == 'mh_adapter' else 'output'}_adapters"
