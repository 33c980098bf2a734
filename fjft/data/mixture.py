"""Mixtures of sources: how often each one's examples come in an epoch.

With sizes n, weights w (n where none are given) and a temperature T a source's share of
the mixture is w^(1/T) over the sum of them, as T5 mixes its tasks (Raffel et al. 2020,
section 3.5.2): T = 1 with no weights is all data as it is, a high one equal shares.

An epoch ends when every source has been seen whole, as with `interleave_datasets` of
`datasets` and its strategy `all_exhausted`; smaller ones come again until then. But the
shares are met exactly instead of by draws, so an epoch is a list of examples that the
config and the seed decide, and is shuffled, packed and resumed as any other.
"""

from collections.abc import Mapping

import numpy as np

from fjft.data.examples import Examples
from fjft.errors import UserError


def by_source(examples: Examples, rows: Mapping[str, int]) -> dict[str, Examples]:
    """Examples by the name of their source; arguments as of `mix`."""
    sources = _find_sources(examples, rows)
    return {
        name: examples.take(np.flatnonzero(sources == number))
        for number, name in enumerate(rows)
    }


def check_sources(examples: Examples, rows: Mapping[str, int]) -> None:
    """Checks that each source has examples.

    Raises:
      UserError: One has none.
    """
    for name, own in by_source(examples, rows).items():
        if not len(own):
            raise UserError(f"data.train.{name} has no examples; leave it out")


def _find_sources(examples: Examples, rows: Mapping[str, int]) -> np.ndarray:
    """The number of each example's source."""
    ends = np.cumsum(list(rows.values()))
    return np.searchsorted(ends, examples.row_numbers, side="right")


def mix(
    examples: Examples,
    rows: Mapping[str, int],
    weights: Mapping[str, float],
    temperature: float,
    seed: int,
) -> tuple[Examples, dict[str, tuple[int, int]]]:
    """An epoch of a mixture.

    Args:
      examples: Of all sources, one after the other.
      rows: How many rows each source had, used or not, in that order.
      weights: Their weights; empty for their sizes.
      temperature: See above.
      seed: Chooses which examples come once more than others.

    Returns:
      The epoch's examples; and of each source how many it has, and how many the epoch
      has of it.
    """
    sources = _find_sources(examples, rows)
    sizes = np.bincount(sources, minlength=len(rows))
    rates = np.array([weights.get(name, 0) for name in rows]) if weights else sizes
    counts = count_epoch(sizes, rates ** (1 / temperature))
    chosen = []
    for source, count in enumerate(counts):
        own = np.flatnonzero(sources == source)
        again = np.random.default_rng((seed, source)).permutation(own)
        repeats, rest = divmod(count, len(own))
        chosen += [own] * repeats + [again[:rest]]
    order = np.sort(np.concatenate(chosen))
    told = zip(sizes.tolist(), counts.tolist(), strict=True)
    return examples.take(order), dict(zip(rows, told, strict=True))


def count_epoch(sizes: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """How many examples of each source make the shortest epoch that has all of them.

    Sizes [100, 900] at equal rates give [900, 900].
    """
    longest = np.max(sizes / rates)
    return np.maximum(np.rint(longest * rates).astype(np.int64), sizes)
