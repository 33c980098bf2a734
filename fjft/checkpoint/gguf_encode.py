"""Weights as GGUF stores them: which type for which shape, and their bytes."""

from collections.abc import Sequence

import gguf.quants
import jax
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from fjft import tree
from fjft.checkpoint.gguf import PLAIN_DTYPES
from fjft.errors import UserError
from fjft.models.weights import Site

# How the weights may be stored -> GGUF's names of the type and of such a file.
KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def fitting_kind(
    kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> GGMLQuantizationType:
    """The type that a tensor of this shape is stored in when matrices are `kind`.

    Vectors are float32, as llama.cpp wants them, and a matrix whose rows do not divide
    into blocks is float16.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[kind]
    return GGMLQuantizationType.F16 if shape[-1] % block else kind


def encode(name: str, rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows of a tensor in its type; quantized ones as bytes.

    Raises:
      UserError: A value is beyond float16.
    """
    if kind.name not in PLAIN_DTYPES:
        return gguf.quants.quantize(rows.astype(np.float32), kind)
    with np.errstate(over="ignore"):
        encoded = rows.astype(PLAIN_DTYPES[kind.name], copy=False)
    if kind.name == "F16" and not np.isfinite(encoded).all():
        raise UserError(
            f"{name} has values up to {np.abs(rows).max():g}, which float16 cannot "
            f"hold; use --dtype=bfloat16 or float32"
        )
    return encoded


def round_trip(params: tree.Params, sites: Sequence[Site], dtype: str) -> tree.Params:
    """The parameters as they come back from a file, in the types that they have.

    One tensor of a stack is converted at a time.

    Args:
      params: A model's, without adapters.
      sites: Where its tensors lie.
      dtype: A key of `KINDS`.
    """
    found = dict(params)
    for site in sites:
        param = params[site.path]
        kind = fitting_kind(KINDS[dtype][0], site.hf_shape(param.shape))
        host = np.empty(param.shape, param.dtype)
        for name, place in site.tensors():
            encoded = encode(name, np.asarray(param[place]), kind)
            if kind.name not in PLAIN_DTYPES:
                encoded = gguf.quants.dequantize(encoded, kind)
            host[place] = encoded
        found[site.path] = jax.device_put(host, param.sharding)
    return found
