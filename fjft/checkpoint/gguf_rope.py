"""RoPE in GGUF, both ways: Hugging Face's rope_parameters, keys and divisors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fjft.checkpoint.gguf import GgufSource
from fjft.errors import UserError

# The pieces of Llama 3.1's frequency rule; every release so far has these three, and
# the file's own factors are compared with what they give.
LLAMA3_RULE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Names of YaRN's numbers in GGUF and in rope_parameters.
YARN_NAMES = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def read_rope(
    source: GgufSource, head_dim: int, theta: float | None = None
) -> dict[str, Any]:
    """The rope_parameters that a file's keys and divisors stand for.

    Args:
      source: The file.
      head_dim: Rotary dimensions.
      theta: The base where the file has no `rope.freq_base`; None makes that an error.

    Raises:
      UserError: A number is missing, or the scaling cannot be expressed.
    """
    stored = source.optional("rope.freq_base")
    if stored is None:
        stored = source.require("rope.freq_base") if theta is None else theta
    kind = source.optional("rope.scaling.type")
    if source.rope_factors is not None and kind in (None, "none"):
        return _read_llama3(source, head_dim, stored, source.rope_factors)
    if kind in (None, "none"):
        return {"rope_type": "default", "rope_theta": stored}
    if kind not in ("linear", "yarn") or source.rope_factors is not None:
        raise UserError(
            f"{source.path} has RoPE scaling {kind!r}; from GGUF these are read: none, "
            f"linear, yarn, llama3"
        )
    rope = {
        "rope_type": kind,
        "rope_theta": stored,
        "factor": source.require("rope.scaling.factor"),
    }
    if kind == "yarn":
        source.require("rope.scaling.original_context_length")
        for key, name in YARN_NAMES.items():
            value = source.optional(f"rope.scaling.{key}")
            if value is not None:
                rope[name] = value
    return rope


def _read_llama3(
    source: GgufSource, head_dim: int, theta: float, factors: np.ndarray
) -> dict[str, Any]:
    """Recovers Llama 3.1's rule from the divisors that llama.cpp keeps instead."""
    factor = float(str(factors.max()))
    rule = {"rope_type": "llama3", "rope_theta": theta, "factor": factor} | LLAMA3_RULE
    expected = llama3_divisors(rule, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(
            f"{source.path} scales its rotary frequencies by factors that are not "
            f"Llama 3's rule with {LLAMA3_RULE}; this variant is not read"
        )
    return rule


def llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What Llama 3.1's rule divides each rotary frequency by, (head_dim / 2,) float32.

    A frequency of wavelength w keeps its value where w is short, is divided by
    `factor` where w is long, and is blended in between.
    """
    half = head_dim // 2
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(half) / half)
    turns = rope["original_max_position_embeddings"] / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / rope["factor"] + blend)).astype(np.float32)


def rope_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, below `<architecture>.`, that say rope_parameters.

    Of Llama 3.1's rule they say the base only; the rest is `llama3_divisors`.

    Raises:
      UserError: The format has no words for this type.
    """
    kind = rope["rope_type"]
    keys = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("default", "llama3"):
        return keys
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"GGUF has no words for RoPE of type {kind!r}; it has some for default, "
            f"linear, yarn and llama3"
        )
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys |= {
            f"rope.scaling.{key}": rope[name]
            for key, name in YARN_NAMES.items()
            if rope.get(name) is not None
        }
    return keys
