"""Opens a model where it lies: a directory, a file, a Python package or the hub."""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from fjft.checkpoint.safetensors import open_safetensors
from fjft.errors import UserError
from fjft.sources import is_package, resolve_package

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What a model needs; a repository may also hold the same weights in other formats.
HUB_PATTERNS = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "tekken.json",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
]

# What is said of it.
INFO_PATTERNS = ["config.json", "generation_config.json"]

# Only where a repository has no safetensors: older ones hold these instead.
BIN_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]

# Any of these is the heart of a tokenizer.
VOCABULARIES = [
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.*",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
]


class TensorSource(Protocol):
    """Tensors under their Hugging Face names, read slice by slice."""

    @property
    def names(self) -> Collection[str]:
        """Every tensor's name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` returns."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads `tensor[index]`: one slice per axis, each with step 1."""
        ...


@runtime_checkable
class CodedSource(TensorSource, Protocol):
    """One that may hold matrices in codes, in a format of `models.codes`."""

    def kind(self, name: str) -> str:
        """The format, or another name if the tensor lies in none."""
        ...

    def read_codes(self, name: str, rows: slice) -> Mapping[str, np.ndarray]:
        """The codes (rows, columns) and scales (rows, blocks) of some rows."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """All that is said of a pretrained model: everything but its weights.

    Attributes:
      source: The source as the user wrote it.
      origin: The directory or the GGUF file that it led to.
      config: The model's transformers config.
      config_dict: What the config was built from: config.json as written, so that a
        key the file leaves out (and transformers fills in) can be told apart.
      generation_config: generation_config.json, or what a GGUF file says of it.
      load_tokenizer: Builds the tokenizer; raises UserError when there is none.
    """

    source: str
    origin: Path
    config: "PretrainedConfig"
    config_dict: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    load_tokenizer: Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles(ModelInfo):
    """A pretrained model on disk; nothing big is read until asked for.

    Attributes:
      tensors: The weights.
    """

    tensors: TensorSource


def open_model(source: str, revision: str | None = None) -> ModelFiles:
    """Opens a pretrained model; reads its config and the headers of its weights.

    Args:
      source: A Hugging Face directory, a .safetensors, .gguf or .bin file, a
        `package:NAME/path` of these, otherwise a hub id such as `org/name`.
      revision: Branch, tag or commit; for hub ids only.

    Raises:
      UserError: Nothing there, no config, or weights that cannot be read.
    """
    return _open(source, _locate(source, lambda: _download_model(source, revision)))


def _open(source: str, path: Path) -> ModelFiles:
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(source, path)
    info = _open_info(source, path)
    return ModelFiles(**vars(info), tensors=_open_weights(path))


def open_info(source: str, revision: str | None = None) -> ModelInfo:
    """Opens a model as `open_model` does, but does without its weights.

    Of a model on the hub only its configs are fetched. What is at hand of the weights
    is opened all the same: some families look at which tensors there are.

    Raises:
      UserError: Nothing there, or no config.
    """

    def fetch() -> Path:
        return _download(source, revision, INFO_PATTERNS)

    path = _locate(source, fetch)
    has_weights = path.is_file() or any(
        any(path.glob(pattern)) for pattern in ("*.safetensors", *BIN_PATTERNS)
    )
    return _open(source, path) if has_weights else _open_info(source, path)


def _open_info(source: str, path: Path) -> ModelInfo:
    """A Hugging Face directory, or a file in it, without its weights."""
    if path.is_file() and path.suffix not in (".safetensors", ".bin"):
        raise UserError(
            f"{str(path)!r} is no model: name a directory, a .safetensors file, a "
            f".gguf file or a .bin file of torch (other formats are not read)"
        )
    directory = path if path.is_dir() else path.parent
    config_dict = _read_json(directory / "config.json")
    if config_dict is None:
        ggufs = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f"name the file {ggufs[0]}" if ggufs else "add the model's config.json"
        raise UserError(f"{directory} has no config.json; {hint}")
    return ModelInfo(
        source=source,
        origin=directory,
        config=_load_config(directory),
        config_dict=config_dict,
        generation_config=_read_json(directory / "generation_config.json"),
        load_tokenizer=lambda: load_tokenizer(directory),
    )


def _open_weights(path: Path) -> TensorSource:
    """Safetensors where there are any, otherwise torch's older format."""
    from fjft.checkpoint.torch_bin import find_bin, open_bin

    if path.is_file():
        return open_bin(path) if path.suffix == ".bin" else open_safetensors(path)
    old = None if any(path.glob("*.safetensors")) else find_bin(path)
    return open_safetensors(path) if old is None else open_bin(old)


def _open_gguf(source: str, path: Path) -> ModelFiles:
    from fjft.checkpoint.gguf import open_gguf
    from fjft.checkpoint.gguf_config import build_config
    from fjft.checkpoint.tokenizer import build_tokenizer

    tensors = open_gguf(path)
    config, generation_config = build_config(tensors)
    return ModelFiles(
        source=source,
        origin=path,
        tensors=tensors,
        config=config,
        config_dict=config.to_dict(),
        generation_config=generation_config,
        load_tokenizer=lambda: build_tokenizer(path, tensors.metadata),
    )


def _locate(source: str, download: Callable[[], Path]) -> Path:
    if is_package(source):
        found = resolve_package(source)
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(f"{source!r} matches {names}; name one of them")
        return found[0]
    path = Path(source).expanduser()
    if source and path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) or path.suffix in (
        ".gguf",
        ".safetensors",
        ".bin",
    ):
        raise UserError(
            f"no file or directory {source!r}; give an existing path, "
            f"package:NAME/path, or a hub id such as org/name"
        )
    return download()


def _download_model(source: str, revision: str | None) -> Path:
    directory = _download(source, revision, HUB_PATTERNS)
    if not any(directory.glob("*.safetensors")):
        _download(source, revision, [*HUB_PATTERNS, *BIN_PATTERNS])
    return directory


def _download(source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Each arm of an error names what the user can do about it.
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=patterns)
        )
    except GatedRepoError as error:
        reason: str = "is gated: accept its terms on its page and run `hf auth login`"
        cause: Exception = error
    except RepositoryNotFoundError as error:
        reason, cause = "is not on the hub (or private: run `hf auth login`)", error
    except RevisionNotFoundError as error:
        reason, cause = f"has no revision {revision!r} on the hub", error
    except LocalEntryNotFoundError as error:
        reason = "is not in the local cache, and the hub cannot be reached"
        cause = error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason, cause = f"could not be fetched from the hub ({error})", error
    raise UserError(
        f"model {source!r} is no local path and {reason}; check the name and the "
        f"network, or give a local directory"
    ) from cause


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; mend it")
    return content


def _load_config(directory: Path) -> "PretrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (StrictDataclassError, ValueError, KeyError, TypeError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"transformers does not understand {directory / 'config.json'}: "
            f"{first_line}"
        ) from error


def load_tokenizer(directory: Path) -> Any:
    """Loads the tokenizer of a Hugging Face directory.

    Raises:
      UserError: There is none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    # Without these files transformers builds an empty tokenizer, and says nothing.
    if not any(any(directory.glob(pattern)) for pattern in VOCABULARIES):
        raise UserError(
            f"{directory} holds no tokenizer; add the model's tokenizer.json and "
            "tokenizer_config.json, or train one: model.from_scratch=True and "
            "model.tokenizer=bpe"
        )
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"transformers cannot load the tokenizer in {directory}: {first_line}"
        ) from error
