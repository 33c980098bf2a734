"""LoRA: low-rank adapters beside frozen linear maps (Hu et al. 2021)."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fjft.errors import UserError
from fjft.models.layers import Linear, Maker
from fjft.models.weights import Site, module_at
from fjft.peft import saved, targets
from fjft.peft.low_rank import low_rank
from fjft.peft.targets import PeftTensor

PEFT_TYPE = "LORA"
ADAPTER = ".adapter."


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      r: Rank.
      lora_alpha: The adapter's output is scaled by `lora_alpha / r`.
      lora_dropout: Share of the adapter's input that is dropped in training.
      target_modules: `all-linear`, or a regex on Hugging Face module names.
      use_rslora: Scales by `lora_alpha / sqrt(r)` instead (Kalajdzievski 2023).
      rank_pattern: Ranks of the modules that a regex means, instead of `r`.
      alpha_pattern: The same for `lora_alpha`.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str = targets.ALL_LINEAR
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: str = ""

    def __post_init__(self):
        if self.r < 1 or any(r < 1 for r in self.rank_pattern.values()):
            raise UserError(
                f"peft.r={self.r}, rank_pattern={dict(self.rank_pattern)}: "
                "ranks are at least 1"
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"peft.lora_dropout={self.lora_dropout} is not in [0, 1)")

    def rank(self, module: str) -> int:
        """The rank of the module with this Hugging Face name."""
        return targets.lookup(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What the output of the module's adapter is multiplied by."""
        rank = self.rank(module)
        alpha = targets.lookup(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class Scale(nnx.Variable):
    """A number of the adapter's that is not trained."""


class Adapter(nnx.Module):
    """Adds `scale * x @ A.T @ B.T`.

    A layer of smaller rank than its neighbours in the stack, or one that is not
    adapted at all (rank 0), has zeros in its spare rows of A and columns of B. Their
    gradients are products with each other and so stay zero.

    Attributes:
      a: Float32[..., R, in].
      b: Float32[..., out, R].
      scale: Float32[...].
      ranks: Each stacked layer's rank; one entry where nothing is stacked.
      dropout: Share of the input that is dropped in training.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        linear: Linear,
        ranks: tuple[int, ...],
        scales: tuple[float, ...],
        dropout: float,
    ):
        out_axis, in_axis = linear.weight.get_metadata()["axes"][-2:]
        *stack, size_out, size_in = linear.weight.shape
        rank = max(ranks)
        used = jnp.arange(rank)[None] < jnp.array(ranks)[:, None]
        used = used.reshape(*stack, rank, 1)

        def init_a(key: jax.Array, shape: tuple, dtype: Any) -> jax.Array:
            # torch's kaiming_uniform_ with a = sqrt(5), from which PEFT starts.
            bound = 1 / math.sqrt(size_in)
            drawn = jax.random.uniform(key, shape, dtype, -bound, bound)
            return jnp.where(used, drawn, 0)

        make = Maker(rngs, jnp.float32, tuple(stack))
        self.a = make((rank, size_in), ("rank", in_axis), init_a)
        self.b = make((size_out, rank), (out_axis, "rank"), jax.nn.initializers.zeros)
        self.scale = Scale(
            jnp.array(scales, jnp.float32).reshape(stack), axes=("layers",) * len(stack)
        )
        self.ranks = ranks
        self.dropout = dropout

    def __call__(
        self, linear: Linear, x: Float[Array, "*B in"], rng: Key[Array, ""] | None
    ) -> Float[Array, "*B out"]:
        y = linear.base(x)
        if rng is not None and self.dropout:
            kept = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return y + low_rank(x, self.a[...], self.b[...], self.scale[...])

    def merge(self, linear: Linear) -> None:
        """Changes the map so that it alone gives what map and adapter give."""
        weight = linear.weight[...]
        delta = jnp.einsum(
            "...oR,...Ri->...oi", self.b[...], self.a[...], precision="highest"
        )
        scale = self.scale[...].reshape(*self.scale.shape, 1, 1)
        merged = weight.astype(jnp.float32) + delta * scale
        linear.weight[...] = merged.astype(weight.dtype)


def cuts(config: Config, num_layers: int) -> tuple[int, ...]:
    """LoRA leaves the stack whole."""
    del config, num_layers
    return ()


def attach(
    model: nnx.Module, sites: Sequence[Site], config: Config, rngs: nnx.Rngs
) -> None:
    """Puts an adapter into each targeted linear map.

    Raises:
      UserError: A pattern matches nothing, or cannot be had with tied embeddings.
    """
    linears = targets.linear_sites(model, sites)
    chosen = targets.select_linears(config.target_modules, linears)
    saved.paths(config.modules_to_save, sites)
    for site in linears:
        modules = site.hf_modules
        ranks = tuple(config.rank(m) if m in chosen else 0 for m in modules)
        if any(ranks):
            scales = tuple(config.scale(m) if m in chosen else 0.0 for m in modules)
            linear = module_at(model, site.module)
            linear.adapter = nnx.data(
                Adapter(rngs, linear, ranks, scales, config.lora_dropout)
            )


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """Adapters' A and B, and what `modules_to_save` means."""
    whole = saved.paths(config.modules_to_save, sites)

    def trainable(path: str) -> bool:
        return path.endswith((f"{ADAPTER}a", f"{ADAPTER}b")) or path in whole

    return trainable


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars, without the padding of unequal ranks."""
    adapters = sum(
        sum(adapter.ranks) * (adapter.a.shape[-1] + adapter.b.shape[-2])
        for _, adapter in _adapters(model, sites)
    )
    whole = (
        module_at(model, p).shape for p in saved.paths(config.modules_to_save, sites)
    )
    return adapters + sum(map(math.prod, whole))


def peft_config(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> dict[str, Any]:
    """The method's part of PEFT's `adapter_config.json`."""
    adapted = [
        module
        for site, adapter in _adapters(model, sites)
        for module, rank in zip(site.hf_modules, adapter.ranks, strict=True)
        if rank
    ]
    modules = set(saved.modules(config.modules_to_save, sites).values())
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": targets.peft_names(adapted, model, sites),
        "modules_to_save": sorted(modules) or None,
        "bias": "none",
        # PEFT's word for maps that lie the other way round in the base model.
        "fan_in_fan_out": any(s.transpose for s, _ in _adapters(model, sites)),
        "init_lora_weights": True,
        "use_dora": False,
    }


def peft_tensors(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> list[PeftTensor]:
    """PEFT's tensors, and the part of a parameter that each of them is."""
    table = []
    for site, adapter in _adapters(model, sites):
        path = f"{site.module}{ADAPTER}"
        for i, rank in enumerate(adapter.ranks):
            if rank:
                layer = (i,) if site.lead else ()
                name = f"{targets.PEFT_PREFIX}{site.hf_modules[i]}"
                every, used = slice(None), slice(rank)
                table += [
                    PeftTensor(
                        f"{name}.lora_A.weight", f"{path}a", (*layer, used, every)
                    ),
                    PeftTensor(
                        f"{name}.lora_B.weight", f"{path}b", (*layer, every, used)
                    ),
                ]
    return table + saved.tensors(config.modules_to_save, sites)


def _adapters(
    model: nnx.Module, sites: Sequence[Site]
) -> Iterator[tuple[Site, Adapter]]:
    for site in targets.linear_sites(model, sites):
        adapter = module_at(model, site.module).adapter
        if adapter is not None:
            yield site, adapter


# Keys of PEFT's LoraConfig that leave what the adapter computes as it is.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)

# Ways to start that leave the base model's weights alone.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's LoRA that is not implemented.
    """
    rest = {k: v for k, v in adapter_config.items() if k not in _HARMLESS}
    start = rest.pop("init_lora_weights", True)
    if start not in _STARTS:
        raise UserError(
            f"the adapter has init_lora_weights={start!r}, which changes the base "
            "too; save it as plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    modules = rest.pop("target_modules")
    if not isinstance(modules, str):
        modules = "|".join(map(re.escape, sorted(modules)))
    modules = _in_layers(
        modules, rest.pop("layers_to_transform", None), rest.pop("layers_pattern", None)
    )
    whole = "|".join(map(re.escape, rest.pop("modules_to_save", None) or ()))
    names = {field.name for field in dataclasses.fields(Config)}
    known = {name: rest.pop(name) for name in names & set(rest)}
    unknown = {k: v for k, v in rest.items() if v and (k, v) != ("bias", "none")}
    if unknown:
        raise UserError(f"the adapter uses parts of LoRA that fjft lacks: {unknown}")
    known |= {"target_modules": modules, "modules_to_save": whole}
    return Config(**known)


def _in_layers(
    modules: str, layers: int | Sequence[int] | None, stack: str | Sequence[str] | None
) -> str:
    """A regex on modules, limited to PEFT's `layers_to_transform`, if there are any."""
    if layers is None or layers == []:
        return modules
    numbers = "|".join(map(str, [layers] if isinstance(layers, int) else layers))
    names = "|".join([stack] if isinstance(stack, str) else stack or [r"[^.]*"])
    return rf"({names})\.({numbers})\.(.*\.)?({modules})"
