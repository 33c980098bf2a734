"""Writes a model as one GGUF file, for llama.cpp and what is built on it.

Before the first byte of weights is written, what the metadata says is read back by
this package's own reader and compared with the model; then one tensor at a time is
fetched, and a block of its rows encoded.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
from gguf.constants import GGMLQuantizationType

from fjft import tree
from fjft.checkpoint.gguf import GgufSource, Stored
from fjft.checkpoint.gguf_config import build_config
from fjft.checkpoint.gguf_encode import KINDS, encode, fitting_kind
from fjft.checkpoint.gguf_keys import choose_architecture, config_keys
from fjft.checkpoint.gguf_names import ARCHITECTURES
from fjft.checkpoint.gguf_rope import llama3_divisors
from fjft.checkpoint.gguf_tokenizer import check_tokenizer, tokenizer_keys
from fjft.checkpoint.huggingface import Provenance
from fjft.checkpoint.quantizing import is_quantized
from fjft.checkpoint.safetensors_writer import make_directory, write_whole
from fjft.distributed import fetch_part
from fjft.errors import UserError
from fjft.models.families import FAMILIES
from fjft.models.fields import Fields

ENCODED_BLOCK = 1 << 22  # elements
# What a model's Architecture says of training only, and GGUF does not.
OF_TRAINING = {
    "attention_dropout",
    "embedding_dropout",
    "initializer_range",
    "padding_id",
    "residual_dropout",
    "residual_std",
}


class GgufTensor(NamedTuple):
    """One tensor to write: GGUF's name, type and shape, and its bytes in pieces."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    produce: Callable[[], Iterator[Any]]

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return Stored(self.kind, self.shape, 0).nbytes


def save_gguf(model: Any, path: str | Path, dtype: str) -> list[str]:
    """Writes a model with its config, tokenizer and chat template as a GGUF file.

    Vectors are stored as float32 whatever the type, as llama.cpp wants them; a matrix
    whose rows do not divide into Q8_0's blocks of 32 is stored as float16. Gemma's norm
    weights are stored with 1 added, in float32, and so come back to within 6e-8.

    Args:
      model: A model without adapters; see `merge_adapter`.
      path: The file; it appears whole or not at all.
      dtype: A key of `KINDS`.

    Returns:
      Warnings: sentences about what other programs will do differently.

    Raises:
      UserError: The model carries an adapter, its family or a detail of it has no
        words in GGUF, it has no tokenizer, or there is no space.
    """
    path, provenance = Path(path), model.provenance
    _, params = tree.split(model)
    if is_quantized(model):
        raise UserError(
            "the model's weights lie in codes of a few bits; read them in full "
            "precision first, with merge_adapter or restore_weights"
        )
    if set(params) - {site.path for site in provenance.sites}:
        raise UserError(
            "the model carries an adapter, which GGUF has no place for: fold it into "
            "the weights first, with merge_adapter or --merge"
        )
    files, origin = provenance.files, provenance.files.origin
    architecture = choose_architecture(files.config)
    tokenizer = files.load_tokenizer()
    kind, file_type = KINDS[dtype]
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": origin.stem if origin.is_file() else Path(files.source).name,
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **config_keys(files.config),
        **tokenizer_keys(tokenizer, files.config, files.generation_config),
    }
    divisors = _divisors(metadata, architecture, files.config)
    _check_config(path, architecture, metadata, provenance, params, divisors)
    warnings = _idle_window(files.config) + check_tokenizer(
        path, metadata | {"general.architecture": architecture}, tokenizer
    )
    tensors = list(_out_tensors(architecture, provenance, params, kind))
    if divisors is not None:
        tensors.append(
            GgufTensor(
                "rope_freqs.weight",
                GGMLQuantizationType.F32,
                divisors.shape,
                lambda: iter([divisors.data]),
            )
        )
    make_directory(path.parent)
    head = _head(architecture, metadata, tensors)
    needed = len(head) + sum(tensor.nbytes for tensor in tensors)
    write_whole(path, needed, _content(head, tensors))
    return warnings


def _idle_window(config: Any) -> list[str]:
    """llama.cpp gives Mistral's layers no window, though the file names it."""
    window = config.sliding_window if config.model_type == "mistral" else None
    if window is None or window >= config.max_position_embeddings:
        return []
    return [
        f"llama.cpp passes over Mistral's window of {window} tokens: of a longer text "
        f"it computes something else than the model was trained to"
    ]


def _divisors(
    metadata: Mapping[str, Any], architecture: str, config: Any
) -> np.ndarray | None:
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    return llama3_divisors(rope, metadata[f"{architecture}.rope.dimension_count"])


def _check_config(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    provenance: Provenance,
    params: tree.Params,
    divisors: np.ndarray | None,
) -> None:
    """Reads the config back from the metadata: it must mean the same model."""
    config = provenance.files.config
    kind = GGMLQuantizationType.F32  # of shapes and names alone the config is made
    tensors = {
        name: Stored(kind, site.hf_shape(params[site.path].shape), 0)
        for site in provenance.sites
        for name in site.hf_names
    }
    # As the reader sees them: float32 values as their shortest decimals.
    stored = {
        key: float(str(np.float32(value))) if isinstance(value, float) else value
        for key, value in metadata.items()
    }
    source = GgufSource(path, architecture, stored, tensors, divisors)
    wanted = _facts(config)
    try:
        found = _facts(build_config(source)[0])
    except UserError as error:
        raise UserError(f"GGUF has no words for this model: {error}") from error
    unlike = [name for name in wanted if wanted[name] != found[name]]
    if unlike:
        name = unlike[0]
        raise UserError(
            f"GGUF has no words for this {config.model_type} model's {name}: "
            f"{wanted[name]!s:.99} would be read as {found[name]!s:.99}; write a "
            f"Hugging Face directory instead"
        )


def _facts(config: Any) -> dict[str, Any]:
    """What a config says of the maths, layer by layer where layers may differ."""
    arch = FAMILIES[config.model_type].architecture(Fields(config))
    facts = {
        field.name: getattr(arch, field.name)
        for field in dataclasses.fields(arch)
        if field.name not in OF_TRAINING
    }
    kinds = facts.pop("kinds")
    return facts | {f"layer {number}": kind for number, kind in enumerate(kinds)}


def _out_tensors(
    architecture: str,
    provenance: Provenance,
    params: tree.Params,
    kind: GGMLQuantizationType,
) -> Iterator[GgufTensor]:
    known, config = ARCHITECTURES[architecture], provenance.files.config
    counts = config.num_attention_heads, config.num_key_value_heads
    for site in provenance.sites:
        param = params[site.path]
        shape = site.hf_shape(param.shape)
        used = fitting_kind(kind, shape)
        for hf_name, place in site.tensors():
            name = known.gguf_name(hf_name)
            if name is None:
                raise UserError(
                    f"GGUF's {architecture} models have no tensor for {hf_name}; write "
                    f"a Hugging Face directory instead"
                )
            assert not site.transpose, hf_name
            heads, shift = known.heads(hf_name, *counts), known.shift(hf_name)
            yield GgufTensor(
                name, used, shape, _producer(name, param, place, used, heads, shift)
            )


def _producer(
    name: str,
    param: jax.Array,
    place: tuple[int, ...],
    kind: GGMLQuantizationType,
    heads: int,
    shift: float,
) -> Callable[[], Iterator[Any]]:
    def produce() -> Iterator[Any]:
        # The one tensor that is on the host, gathered from the devices' shards.
        part = fetch_part(param, place)
        if heads:
            halves = part.reshape(heads, 2, -1, *part.shape[1:])
            part = halves.swapaxes(1, 2).reshape(part.shape)
        if shift:
            part = part.astype(np.float32) + np.float32(shift)
        rows = max(1, ENCODED_BLOCK // math.prod(part.shape[1:]))
        for start in range(0, len(part), rows):
            encoded = encode(name, part[start : start + rows], kind)
            yield np.ascontiguousarray(encoded).reshape(-1).view(np.uint8).data

    return produce


def _head(
    architecture: str, metadata: Mapping[str, Any], tensors: list[GgufTensor]
) -> bytes:
    """Everything before the data, padded to where it starts."""
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),  # not looked at beside `raw_dtype`
            tensor.nbytes,
            raw_dtype=tensor.kind,
        )
    memory = io.BytesIO()
    # Given a file that is open already, the writer does not open one.
    writer.fout = [io.BufferedWriter(memory)]  # pyright: ignore[reportArgumentType]
    writer.state = gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    head = memory.getvalue()
    return head + bytes(-len(head) % writer.data_alignment)


def _content(head: bytes, tensors: list[GgufTensor]) -> Iterator[Any]:
    yield head
    for tensor in tensors:
        yield from tensor.produce()
        yield bytes(-tensor.nbytes % gguf.GGUF_DEFAULT_ALIGNMENT)
