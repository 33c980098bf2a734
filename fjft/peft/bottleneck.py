"""Bottleneck adapters: small networks beside a layer's sublayers.

Those of Houlsby et al. (2019), Pfeiffer et al. (2020) and He et al. (2022), as the
library of AdapterHub has them: its files go both ways. PEFT has no such adapters.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fjft import tree
from fjft.errors import UserError
from fjft.models.layers import ACTIVATIONS, Initializer, Maker, broadcast, dropout
from fjft.models.layers import normal as normal_numbers
from fjft.models.weights import Site, module_at
from fjft.options import check_name
from fjft.peft import existing, saved
from fjft.peft.lora_adapter import ADAPTER
from fjft.peft.low_rank import narrow
from fjft.peft.targets import PeftTensor

PEFT_TYPE = "ADAPTERHUB"
WEIGHTS_NAMES = ("adapter.safetensors", "pytorch_adapter.bin")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a paper's adapters are.

    Attributes:
      places: The sublayers that have one, by the names of AdapterHub's options.
      reads: What it reads: the sublayer's `output`; the `sum` of that and the residual
        stream, normed where the layer norms that; or the `residual` stream alone.
      non_linearity: Of the bottleneck.
      reduction_factor: The layer's width over the bottleneck's.
      scaling: What its output is multiplied by.
      starts_at_zero: Whether it adds nothing at the start, or next to nothing.
    """

    places: tuple[str, ...]
    reads: str
    non_linearity: str
    reduction_factor: float
    scaling: float
    starts_at_zero: bool


KINDS = {
    "houlsby": Kind(("mh_adapter", "output_adapter"), "output", "swish", 16, 1, False),
    "pfeiffer": Kind(("output_adapter",), "sum", "relu", 16, 1, False),
    "parallel": Kind(("output_adapter",), "residual", "relu", 2, 4, True),
}
# AdapterHub's names of places -> the sublayers, as blocks name them.
_SUBLAYERS = {"mh_adapter": "attention", "output_adapter": "mlp"}
_OPTIONS = ("non_linearity", "reduction_factor", "scaling")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under AdapterHub's names.

    Attributes:
      kind: `houlsby`, `pfeiffer` or `parallel`.
      reduction_factor: The layer's width over the bottleneck's; 0 is the kind's own.
      non_linearity: Of the bottleneck; "" is the kind's own.
      scaling: What its output is multiplied by; 0 is the kind's own.
      dropout: Share of its output that is dropped in training.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
      name: AdapterHub's name of the adapter, which its tensors have in theirs.
    """

    kind: str = "pfeiffer"
    reduction_factor: float = 0
    non_linearity: str = ""
    scaling: float = 0
    dropout: float = 0.0
    modules_to_save: str = ""
    name: str = "default"

    def __post_init__(self):
        check_name("peft.kind", self.kind, KINDS)
        check_name("peft.non_linearity", self.own("non_linearity"), ACTIVATIONS)
        if self.reduction_factor < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"peft.reduction_factor={self.reduction_factor} and "
                f"peft.dropout={self.dropout}: the first is positive, the second in "
                "[0, 1)"
            )

    def own(self, option: str) -> Any:
        """An option's value, or the kind's."""
        return getattr(self, option) or getattr(KINDS[self.kind], option)


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
        for place, sublayer in _SUBLAYERS.items():
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


def attach(model: Any, sites: Sequence[Site], config: Config, rngs: nnx.Rngs) -> None:
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
            **{place: place in kind.places for place in _SUBLAYERS},
            **{option: config.own(option) for option in _OPTIONS},
            "scaling": float(config.own("scaling")),
            "dropout": config.dropout,
            "original_ln_before": kind.reads == "sum",
            "is_parallel": kind.reads == "residual",
            "init_weights": "mam_adapter" if kind.starts_at_zero else "bert",
            **_FIXED,
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
                inside = f"{path}{ADAPTER}{_SUBLAYERS[place]}"
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


# AdapterHub's options that are here as in the papers, and nowhere otherwise.
_FIXED = {
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "leave_out": [],
    "phm_layer": False,
    "stochastic_depth": 0.0,
}


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that AdapterHub's `adapter_config.json` stands for.

    Raises:
      UserError: It is no bottleneck adapter, or one that is not implemented.
    """
    described = {"dropout": 0.0, "scaling": 1.0, "is_parallel": False}
    described |= adapter_config["config"] or {}
    others = {k: v for k, v in _FIXED.items() if described.get(k, v) != v}
    reads = "residual" if described["is_parallel"] else "output"
    if described.get("original_ln_before"):
        reads = "sum"
    places = tuple(place for place in _SUBLAYERS if described.get(place))
    kind = next(
        (n for n, k in KINDS.items() if (k.places, k.reads) == (places, reads)), None
    )
    numbers = described.get("reduction_factor"), described["scaling"]
    if kind is None or others or not all(isinstance(n, int | float) for n in numbers):
        wrong = {k: described[k] for k in others} or described
        raise UserError(
            f"the adapter is none of {', '.join(KINDS)}, or uses parts of AdapterHub's "
            f"library that fjft lacks: {wrong}"
        )
    non_linearity = described["non_linearity"]
    if "version" not in adapter_config and non_linearity == "gelu":
        non_linearity = "gelu_new"  # which the oldest files mean by it
    return Config(
        kind=kind,
        reduction_factor=described["reduction_factor"],
        non_linearity=non_linearity,
        scaling=described["scaling"],
        dropout=described["dropout"],
        modules_to_save=adapter_config.get("modules_to_save") or "",
        name=adapter_config["name"],
    )
