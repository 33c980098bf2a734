"""Hugging Face weights: which tensor is which, and back bit for bit."""

import contextlib
import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fjft import tree
from fjft.checkpoint.safetensors_writer import OutTensor, write_sharded
from fjft.checkpoint.source import ModelFiles, TensorSource
from fjft.distributed import fetch_part, is_first, wait
from fjft.errors import UserError
from fjft.models.heads import class_name, of_model
from fjft.models.weights import Site, module_at

# Buffers that old checkpoints carry and that every implementation works out itself,
# and remains of old code. (A tensor that a family names is never one of them.)
_DERIVED = re.compile(
    r".*\.(rotary_emb\.inv_freq|masked_bias|(attn|attention)\.bias)"
    r"|(.*\.)?embeddings\.(position_ids|token_type_ids)"
    r"|(model\.)?(encoder|decoder)\.(embed_positions\.weight|version)"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Provenance:
    """Where a model came from and what has been put into it.

    Attributes:
      files: The pretrained model.
      sites: Where each of its tensors lies in our model.
      method: The module in `peft/` whose adapters it carries.
      peft_config: That method's options.
      new: Tensors, of the head if not all, that the checkpoint lacks; they start from
        random values.
      passed_over: Tensors of the checkpoint, of another head, that are not used.
      dtypes: The checkpoint's type of each tensor, where those were asked for.
    """

    files: ModelFiles
    sites: Sequence[Site]
    method: Any
    peft_config: Any
    new: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    dtypes: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Match:
    """How a checkpoint's tensors stand for a model's.

    Attributes:
      stored: The name in the checkpoint of each tensor that it has.
      new: Tensors, of the head if not all, that it lacks.
      passed_over: Its tensors that belong to another head.
    """

    stored: Mapping[str, str]
    new: tuple[str, ...]
    passed_over: tuple[str, ...]


def match(
    files: ModelFiles,
    sites: Sequence[Site],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    prefix: str | None = None,
    may_lack_head: bool = False,
    other_labels: bool = False,
) -> Match:
    """Compares the checkpoint's tensors with those the model is made of.

    Args:
      files: The pretrained model; if it has no weights at all, all are new.
      sites: Where its tensors lie.
      abstract: Shape and dtype of each parameter.
      prefix: The name of the bare model inside one with a head; None is a family
        that has one head, in which every superfluous tensor is an error.
      may_lack_head: Whether the head may be new.
      other_labels: Whether tensors of the head that have another shape are new too.

    Raises:
      UserError: A tensor is missing, superfluous or of another shape.
    """
    tensors = files.tensors
    if not tensors.names:
        return Match({}, tuple(n for site in sites for n in site.hf_names), ())
    stored = stored_names(tensors, sites)
    new, missing = [], []
    for site in sites:
        for name in site.hf_names:
            shape = site.hf_shape(abstract[site.path].shape)
            if name not in stored:
                (new if site.head and may_lack_head else missing).append(name)
            elif tensors.shape(stored[name]) != shape:
                if not (site.head and other_labels):
                    raise UserError(
                        f"{files.source}: {name} has shape "
                        f"{tensors.shape(stored[name])}, its config asks for {shape}"
                    )
                del stored[name]
                new.append(name)
    if missing:
        raise UserError(
            f"{files.source}: {len(missing)} tensors are missing, the first "
            f"is {missing[0]!r}; the checkpoint does not fit its config"
            + (" (to start a head anew, name it: head=)" if prefix else "")
        )
    known = {n for s in sites for names in (s.hf_names, *s.aliases) for n in names}
    extra = [n for n in tensors.names if n not in known and not _DERIVED.fullmatch(n)]
    other = [name for name in extra if prefix and not _is_base(name, prefix, sites)]
    if len(other) < len(extra):
        first = sorted(set(extra) - set(other))[0]
        raise UserError(
            f"{files.source}: {len(extra) - len(other)} tensors have no place in a "
            f"{files.config.model_type} model, the first is {first!r}"
        )
    return Match(stored, tuple(new), tuple(sorted(other)))


def _is_base(name: str, prefix: str, sites: Sequence[Site]) -> bool:
    """Whether a tensor lies in one of the modules that every head stands on."""
    inside = f"{prefix}."
    parts = {
        n.removeprefix(inside).split(".")[0]
        for site in sites
        if not site.head
        for n in site.hf_names
    }
    return name.removeprefix(inside).split(".")[0] in parts


def stored_names(tensors: TensorSource, sites: Sequence[Site]) -> dict[str, str]:
    """The checkpoint's name for each tensor that it has, by the model's."""
    found = {}
    for site in sites:
        others = site.aliases or ((),) * len(site.hf_names)
        for name, aliases in zip(site.hf_names, others, strict=True):
            for candidate in (name, *aliases):
                if candidate in tensors.names:
                    found[name] = candidate
                    break
    return found


def save_model(model: Any, directory: str | Path, dtype: Any = None) -> None:
    """Writes a Hugging Face directory: weights, configs, tokenizer, chat template.

    Of several processes all must call it; process 0 writes, a tensor at a time.
    Weights that were loaded in their own dtype and not trained come back bit for bit;
    those that lie in codes are read again from the model's source, so that none is
    written with what quantization changed.

    Args:
      model: A model without adapters; see `merge_adapter`.
      directory: Made when missing.
      dtype: Type to store the weights in; each one's own when None, which is the
        checkpoint's if the model was loaded with `dtype="auto"`.

    Raises:
      UserError: The model carries an adapter, the source of a quantized model is not
        there any more, or there is no space.
    """
    provenance: Provenance = model.provenance
    _, params = tree.split(model)
    codes = {
        site.path: module_at(model, site.path)
        for site in provenance.sites
        if site.path not in params
    }
    known = {site.path for site in provenance.sites}
    known |= {
        f"{path}.{part}" for path, code in codes.items() for part in code.part_names
    }
    if set(params) - known:
        raise UserError(
            "the model carries an adapter: write it with save_adapter, or fold it "
            "into the weights with merge_adapter first"
        )
    own = provenance.dtypes
    stored = stored_names(provenance.files.tensors, provenance.sites)
    tensors = [
        _copied_tensor(
            name,
            stored[name],
            provenance.files,
            dtype or own.get(name, codes[site.path].dtype),
        )
        if site.path in codes
        else _out_tensor(name, params[site.path], place, site, dtype or own.get(name))
        for site in provenance.sites
        for name, place in site.tensors()
    ]
    tensors.sort(key=lambda tensor: _natural(tensor.name))
    write_sharded(Path(directory), tensors)
    largest = max(params.values(), key=lambda p: p.size)
    if is_first():
        _write_companions(model, Path(directory), np.dtype(dtype or largest.dtype))
    wait("save_model")


def _out_tensor(
    name: str, param: jax.Array, place: tuple[int, ...], site: Site, dtype: Any
) -> OutTensor:
    dtype = np.dtype(dtype or param.dtype)

    def produce() -> np.ndarray:
        part = fetch_part(param, place)
        return (part.T if site.transpose else part).astype(dtype, copy=False)

    return OutTensor(name, dtype, site.hf_shape(param.shape), produce)


def _copied_tensor(name: str, stored: str, files: ModelFiles, dtype: Any) -> OutTensor:
    """A tensor whose numbers the model holds in codes only."""
    shape = files.tensors.shape(stored)
    dtype = np.dtype(dtype)

    def produce() -> np.ndarray:
        every = tuple(slice(0, size) for size in shape)
        with source_of_codes(files):
            return files.tensors.read(stored, every).astype(dtype, copy=False)

    return OutTensor(name, dtype, shape, produce)


@contextlib.contextmanager
def source_of_codes(files: ModelFiles) -> Iterator[None]:
    """Says what is missing when a quantized model's source cannot be read again.

    Raises:
      UserError: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the model's weights lie in codes of a few bits, and those in full "
            f"precision cannot be read again from {files.origin} ({error}); put the "
            "model back there"
        ) from error


def _natural(name: str) -> list:
    """Sorts `layers.2` before `layers.10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _generation_options(files: ModelFiles) -> dict[str, Any]:
    """Options of generation in an old config.json, which no config keeps any more."""
    from transformers import GenerationConfig

    known = set(GenerationConfig().to_dict()) - set(files.config.to_dict())
    return {
        name: value
        for name, value in files.config_dict.items()
        if name in known and value is not None
    }


def _write_companions(model: Any, directory: Path, dtype: np.dtype) -> None:
    """Everything in a Hugging Face directory that is not weights."""
    files: ModelFiles = model.provenance.files
    config = copy.deepcopy(files.config)
    config.dtype = dtype.name
    if not config.architectures:
        config.architectures = [class_name(config.model_type, of_model(model))]
    config.save_pretrained(directory)
    generation = files.generation_config or _generation_options(files)
    if generation:
        text = json.dumps(generation, indent=2, ensure_ascii=False)
        (directory / "generation_config.json").write_text(text + "\n", "utf-8")
    try:
        tokenizer = files.load_tokenizer()
    except UserError:
        return  # A model without a tokenizer is saved as it came.
    tokenizer.save_pretrained(directory)
