"""How attention lies over the mesh: rows over the batch's axes, heads over `tensor`."""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P

from fjft.sharding import sequence_shards, spec


@dataclasses.dataclass(frozen=True)
class Spread:
    """What each device does of one attention.

    Rows are cut over the mesh's batch axes, queries over its `sequence` axis and heads
    over `tensor`, as activations lie anyway; keys are gathered over `sequence`. An axis
    of one device is named too: gradients are summed over axes that are not. Where
    there are fewer kv-heads than devices in `tensor`, each device gets the one that its
    query heads read; where heads do not divide at all, the devices of `tensor` do the
    same work.

    Attributes:
      stretches: Devices that a row's queries are cut over.
      repeats: How often each kv-head must be there.
      heads: Query heads of a device.
      queries: The partition of [B, T, N, H].
      keys: The partition of [B, S, K, H].
      query_tokens: The partition of [B, T].
      key_tokens: The partition of [B, S].
    """

    stretches: int
    repeats: int
    heads: int
    queries: P
    keys: P
    query_tokens: P
    key_tokens: P


def spread(num_heads: int, num_kv_heads: int, length: int) -> Spread:
    """How the current mesh shares attention of so many heads and queries."""
    sizes = jax.sharding.get_abstract_mesh().shape
    tensor, sequence = sizes.get("tensor", 1), sizes.get("sequence", 1)
    repeats = 1
    if num_heads % tensor == 0 and tensor % num_kv_heads == 0:
        repeats = tensor // num_kv_heads
    divides = num_heads % tensor == 0 and num_kv_heads * repeats % tensor == 0
    stretches = sequence_shards(length)
    [rows] = spec(("batch",))
    along = "sequence" if stretches == sequence else None
    gathered = along if sequence == 1 else None
    over = "tensor" if divides else None
    return Spread(
        stretches=stretches,
        repeats=repeats,
        heads=num_heads // tensor if divides else num_heads,
        queries=P(rows, along, over),
        keys=P(rows, gathered, over),
        query_tokens=P(rows, along),
        key_tokens=P(rows, gathered),
    )
