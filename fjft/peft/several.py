"""Several LoRA adapters beside each linear map, of which any mixture speaks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fjft import tree
from fjft.errors import UserError
from fjft.models.layers import Linear
from fjft.models.weights import Site, module_at
from fjft.options import check_name
from fjft.peft import targets
from fjft.peft.lora_adapter import Adapter, Fixed
from fjft.peft.low_rank import add_to_weight, low_rank

# What speaks: one adapter, several added up, a weighted sum, or none.
Choice = str | Sequence[str] | Mapping[str, float] | None


class Several(nnx.Module):
    """Adds `sum_n share_n * scale_n * x @ A_n.T @ B_n.T`, or one of them to each row.

    What is chosen is data, so that another choice needs no other program.

    Attributes:
      names: The N adapters.
      ranks: For each adapter, its rank in each stacked layer.
      a: Float32[..., N, R, in], zero beyond an adapter's rank.
      b: Float32[..., N, out, R].
      scale: Float32[..., N].
      shares: Float32[..., N].
      rows: Int32[..., B], the adapter of each row of a batch, -1 for none; or None.
    """

    def __init__(self, linear: Linear, adapters: Mapping[str, Adapter | None]):
        *stack, size_out, size_in = linear.weight.shape
        out_axis, in_axis = linear.weight.get_metadata()["axes"][-2:]
        layers = ("layers",) * len(stack)
        num_layers = stack[0] if stack else 1
        found = [a for a in adapters.values() if a is not None]
        rank = max(adapter.a.shape[-2] for adapter in found)

        def joined(parts: list[jax.Array], axes: tuple[str | None, ...]) -> nnx.Param:
            # Behind the layers, which are scanned over.
            return nnx.Param(jnp.stack(parts, len(stack)), axes=(*layers, None, *axes))

        a, b, scales = [], [], []
        for adapter in adapters.values():
            if adapter is None:
                a.append(jnp.zeros((*stack, rank, size_in), jnp.float32))
                b.append(jnp.zeros((*stack, size_out, rank), jnp.float32))
                scales.append(jnp.zeros(stack, jnp.float32))
                continue
            spare = rank - adapter.a.shape[-2]
            none = [(0, 0)] * len(stack)
            a.append(jnp.pad(adapter.a[...], [*none, (0, spare), (0, 0)]))
            b.append(jnp.pad(adapter.b[...], [*none, (0, 0), (0, spare)]))
            scales.append(adapter.scale[...])
        self.a = joined(a, ("rank", in_axis))
        self.b = joined(b, (out_axis, "rank"))
        scale = jnp.stack(scales, len(stack))
        self.scale = Fixed(scale, axes=(*layers, None))
        self.shares = Fixed(jnp.zeros_like(scale), axes=(*layers, None))
        self.rows = nnx.data(None)
        self.names = tuple(adapters)
        self.ranks = tuple(
            (0,) * num_layers if adapter is None else adapter.ranks
            for adapter in adapters.values()
        )

    def __call__(
        self, linear: Linear, x: Float[Array, "*B in"], rng: Key[Array, ""] | None
    ) -> Float[Array, "*B out"]:
        del rng
        y, a, b = linear.base(x), self.a[...], self.b[...]
        if self.rows is not None:
            return y + self._by_row(x, self.rows[...])
        N, R, size_in = a.shape
        scale = jnp.repeat(self.scale[...] * self.shares[...], R)
        a_in = a.reshape(N * R, size_in) * scale[:, None]
        b_out = b.transpose(1, 0, 2).reshape(b.shape[1], N * R)
        return y + low_rank(x, a_in, b_out, jnp.float32(1))

    def _by_row(self, x: jax.Array, rows_B: jax.Array) -> jax.Array:
        if x.shape[0] != rows_B.shape[0]:
            raise UserError(
                f"adapters were chosen for {rows_B.shape[0]} rows, but the batch has "
                f"{x.shape[0]}; name one for each, with set_adapters(model, rows=[...])"
            )
        which_B = jnp.maximum(rows_B, 0)
        scale_B = jnp.where(rows_B < 0, 0, self.scale[...][which_B])
        a_BRi = (self.a[...][which_B] * scale_B[:, None, None]).astype(x.dtype)
        low = jnp.einsum("B...i,BRi->B...R", x, a_BRi)
        b_BoR = self.b[...][which_B].astype(x.dtype)
        return jnp.einsum("B...R,BoR->B...o", low, b_BoR)

    def merge(self, linear: Linear) -> None:
        """Changes the map so that it alone gives what map and mixture give."""
        if self.rows is not None:
            raise UserError(
                "each row has an adapter of its own, so there is no one model to merge "
                "them into; choose one with set_adapters(model, name)"
            )
        delta = jnp.einsum(
            "...noR,...nRi,...n->...oi",
            self.b[...],
            self.a[...],
            self.scale[...] * self.shares[...],
            precision="highest",
        )
        add_to_weight(linear, delta)


def join(base: Any, adapted: Mapping[str, Any], sites: Sequence[Site]) -> Any:
    """A model with the adapters of several, of which the first is chosen.

    Args:
      base: The model without adapters; left as it is.
      adapted: By name, copies of it with one LoRA adapter each.
      sites: Where each tensor of a checkpoint lies in it.
    """
    model = tree.merge(*tree.split(base))
    for site in targets.linear_sites(base, sites):
        adapters = {n: module_at(m, site.module).adapter for n, m in adapted.items()}
        if any(adapter is not None for adapter in adapters.values()):
            linear = module_at(model, site.module)
            linear.adapter = nnx.data(Several(linear, adapters))
    choose(model, next(iter(adapted)))
    return model


def several_of(model: Any) -> Iterator[Several]:
    """Every linear map's adapters.

    Raises:
      UserError: There are none.
    """
    found = [m for _, m in nnx.iter_modules(model) if isinstance(m, Several)]
    if not found:
        raise UserError(
            "the model has no several adapters; load them with "
            "load_adapters(model, {name: directory})"
        )
    yield from found


def choose(model: Any, choice: Choice) -> None:
    """Lets one adapter, a sum of them or none speak for all rows; in place.

    Raises:
      UserError: The model has no such adapter.
    """
    if choice is None:
        choice = {}
    elif isinstance(choice, str):
        choice = {choice: 1.0}
    elif not isinstance(choice, Mapping):
        choice = dict.fromkeys(choice, 1.0)
    for module in several_of(model):
        for name in choice:
            check_name("adapter", name, module.names)
        shares = jnp.array([choice.get(n, 0.0) for n in module.names], jnp.float32)
        placed = jnp.broadcast_to(shares, module.shares.shape)
        module.shares[...] = jax.device_put(placed, module.shares[...].sharding)
        module.rows = nnx.data(None)


def choose_rows(model: Any, names: Sequence[str | None]) -> None:
    """Gives each row of a batch an adapter, or none; in place.

    Raises:
      UserError: The model has no such adapter.
    """
    module: Any
    for module in several_of(model):
        for name in names:
            check_name("adapter", name, (*module.names, None))
        numbers = {name: i for i, name in enumerate(module.names)} | {None: -1}
        rows = jnp.array([numbers[name] for name in names], jnp.int32)
        lead = module.scale.shape[:-1]
        axes = ("layers",) * len(lead) + (None,)
        module.rows = nnx.data(
            Fixed(jnp.broadcast_to(rows, (*lead, len(names))), axes=axes)
        )
