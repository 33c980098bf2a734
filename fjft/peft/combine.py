"""One adapter out of several: sums, TIES and DARE, as in PEFT's `add_weighted_adapter`.

The methods but `cat` and `svd` mix the factors A and B apart, each with the square root
of an adapter's weight.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fjft.errors import UserError
from fjft.options import check_name

METHODS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """How adapters become one; names as in PEFT.

    Attributes:
      combination_type: `linear` adds A's and B's; `cat` puts them side by side, which
        adds what they do; `svd` takes the best matrix of `svd_rank` for that sum;
        `ties` keeps the largest numbers and, of those, the signs that win (Yadav et al.
        2023); `dare_linear` and `dare_ties` first drop numbers at random and scale the
        others up (Yu et al. 2023); `magnitude_prune` adds the largest numbers.
      density: The share of numbers that is kept.
      svd_rank: 0 is the largest of the adapters'.
      majority_sign_method: Which sign wins: `total` by sums, `frequency` by numbers.
      seed: Of what is dropped.
    """

    combination_type: str = "linear"
    density: float = 1.0
    svd_rank: int = 0
    majority_sign_method: str = "total"
    seed: int = 0

    def __post_init__(self):
        check_name("combination_type", self.combination_type, METHODS)
        signs = ("total", "frequency")
        check_name("majority_sign_method", self.majority_sign_method, signs)
        if not 0 < self.density <= 1:
            raise UserError(f"density={self.density} is not in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Part:
    """One adapter of one map.

    Attributes:
      a: [R, in].
      b: [out, R].
      weight: What its output is multiplied by, its own scale included.
    """

    a: np.ndarray
    b: np.ndarray
    weight: float


def combine(
    parts: Sequence[Part], config: Config, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one adapter, whose scale is 1.

    Raises:
      UserError: Ranks differ, and the method needs them not to.
    """
    if config.combination_type == "cat":
        a = np.concatenate([part.a * np.float32(part.weight) for part in parts])
        return a, np.concatenate([part.b for part in parts], axis=1)
    ranks = {len(part.a) for part in parts}
    if config.combination_type == "svd":
        delta = sum(part.weight * (part.b @ part.a) for part in parts)
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        rank = config.svd_rank or max(ranks)
        return vh[:rank], u[:, :rank] * s[:rank]
    if len(ranks) > 1:
        raise UserError(
            f"combination_type={config.combination_type!r} needs adapters of one rank, "
            f"these have {sorted(ranks)}; use cat or svd"
        )
    roots = [math.sqrt(abs(part.weight)) for part in parts]
    signs = [1.0 if part.weight >= 0 else -1.0 for part in parts]
    signed = [sign * root for sign, root in zip(signs, roots, strict=True)]
    return (
        _mix(np.stack([part.a for part in parts]), signed, config, rng),
        _mix(np.stack([part.b for part in parts]), roots, config, rng),
    )


def _mix(
    tensors: np.ndarray, weights: list[float], config: Config, rng: np.random.Generator
) -> np.ndarray:
    """The weighted sum of tensors [N, ...], or of what is left of them."""
    method = config.combination_type
    if method in ("ties", "magnitude_prune"):
        tensors = np.stack([_largest(tensor, config.density) for tensor in tensors])
    elif method.startswith("dare"):
        kept = rng.random(tensors.shape) < config.density
        tensors = tensors * kept / np.float32(config.density)
    weighted = tensors * np.array(weights, np.float32).reshape(-1, 1, 1)
    if not method.endswith("ties"):
        return weighted.sum(0)
    sign = np.sign(tensors)
    votes = tensors if config.majority_sign_method == "total" else sign
    wins = sign == np.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * wins).sum(0) / np.maximum(wins.sum(0), 1)


def _largest(tensor: np.ndarray, density: float) -> np.ndarray:
    """The numbers of the largest magnitudes, a share of all, and zeros."""
    count = int(density * tensor.size)
    order = np.argsort(-np.abs(tensor), axis=None, kind="stable")[:count]
    kept = np.zeros(tensor.size, bool)
    kept[order] = True
    return np.where(kept.reshape(tensor.shape), tensor, 0)
