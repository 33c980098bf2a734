"""What torch's `.bin` checkpoints say of their tensors, without running it.

A pickle is a program; this reader knows the few words of that language that make
tensors, and refuses the file at any other.

Source: `torch/_utils.py`.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fjft.errors import UserError

_STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class ElementType(NamedTuple):
    """What a pickle says of a storage's elements: a key of `_STORAGES`."""

    name: str


class Storage(NamedTuple):
    """What a pickle says of a storage: its key, element type and number of them."""

    key: str
    dtype: np.dtype
    size: int


class Tensor(NamedTuple):
    """What a pickle says of a tensor; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StateDict(dict):
    """Stands for an OrderedDict; attributes that a pickle gives it are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        del state


class _Word:
    """A function that a pickle may call; nothing can be set on it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name!r}")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> Any:
    ints = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(type(n) is int for n in ints):
        raise pickle.UnpicklingError("a tensor is not described by numbers")
    if len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor has another number of strides than axes")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


class _Unpickler(pickle.Unpickler):
    """Knows tensors, their storages and dictionaries, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _StateDict
        if module == "torch._utils" and name in (
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
        ):
            return _Word(_rebuild_tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Word(_rebuild_parameter)
        if (module, name) == ("torch", "Size"):
            return _Word(tuple)
        if module == "torch" and name in _STORAGES:
            return ElementType(name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        # The stream has a sixth part: a view of another storage, or None.
        match pid:
            case ("storage", ElementType(name), str(key), str(), int(size), *rest):
                if rest in ([], [None]):
                    return Storage(key, _STORAGES[name], size)
        raise pickle.UnpicklingError("it describes a storage in an unknown way")


def unpickle(path: Path, stream: Any) -> Any:
    """One pickle of a checkpoint.

    Raises:
      UserError: It is broken, or holds more than tensors.
    """
    try:
        return _Unpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not read: {error}, but a checkpoint of weights needs nothing "
            "but tensors and dictionaries; convert it to safetensors where you trust it"
        ) from error
    except Exception as error:
        # A broken pickle raises nearly anything.
        raise UserError(f"{path} is no checkpoint of torch ({error!r})") from error
