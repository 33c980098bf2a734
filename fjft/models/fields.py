"""Reading a Hugging Face config so that no field that matters is passed over."""

from collections.abc import Collection
from typing import Any

from transformers import PretrainedConfig

from fjft.errors import UserError

# Fields of transformers' configs that do not change what a forward pass computes.
HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "transformers_version",
        "use_cache",
    }
)

COMPARED_ROWS = 4096  # of two tensors at a time


class Fields:
    """The fields of one config, each read once and by name.

    Attributes:
      model_type: The family's key.
      architecture: The class of transformers that the checkpoint names, whose head it
        has; None if it names none.
      num_labels: How many labels a classifying head tells apart.
      knows_tensors: Whether it can be asked what the checkpoint stores.
    """

    def __init__(self, config: PretrainedConfig, tensors: Any = None):
        """Takes a config, and the checkpoint's `TensorSource` if there is one."""
        self._tensors = tensors
        self.knows_tensors = tensors is not None
        # A key that transformers' own class does not have is one that its model does
        # not read either, but for these two, which bring other weights or other code.
        known = {*type(config)().to_dict(), "quantization_config", "auto_map"}
        written = config.to_dict()
        self._unread = {k: v for k, v in written.items() if k in known}
        self._undeclared = {k: v for k, v in written.items() if k not in known}
        self.num_labels: int = config.num_labels or 0
        self.model_type: str = config.model_type
        self.architecture: str | None = next(iter(config.architectures or ()), None)

    def take(self, name: str) -> Any:
        """The value of a field that shapes the maths.

        Raises:
          UserError: The config lacks it.
        """
        if name not in self._unread:
            raise UserError(f"the {self.model_type} config has no field {name!r}")
        return self._unread.pop(name)

    def undeclared(self, name: str, absent: Any) -> Any:
        """The value of a field that transformers' config class does not declare.

        Args:
          name: The field, which its model reads with `getattr`, or once did.
          absent: What its model takes where the config has no such field.
        """
        return self._undeclared.get(name, absent)

    def stores(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this name."""
        return self.knows_tensors and name in self._tensors.names

    def differ(self, name: str, other: str) -> bool:
        """Whether the checkpoint has both tensors, and with different values."""
        if not (self.stores(name) and self.stores(other)):
            return False
        shape = self._tensors.shape(name)
        if shape != self._tensors.shape(other):
            return True
        rest = [slice(0, size) for size in shape[1:]]
        for start in range(0, shape[0], COMPARED_ROWS):
            rows = slice(start, min(start + COMPARED_ROWS, shape[0]))
            pair = (self._tensors.read(n, (rows, *rest)) for n in (name, other))
            if next(pair).tobytes() != next(pair).tobytes():
                return True
        return False

    def choose(self, name: str, known: Collection[str]) -> str:
        """The value of a field that is a name.

        Raises:
          UserError: It is not one of `known`.
        """
        return self._check(name, self.take(name), sorted(known))

    def ignore(self, *names: str) -> None:
        """Reads fields of parts that are not built; the caller says why."""
        for name in names:
            self.take(name)

    def expect(self, name: str, *allowed: Any) -> Any:
        """Reads a field of which only some values are implemented; returns its value.

        Raises:
          UserError: The value is another one.
        """
        return self._check(name, self.take(name), allowed)

    def expect_undeclared(self, name: str, absent: Any) -> None:
        """Reads an undeclared field of which only the value `absent` is implemented.

        Raises:
          UserError: The config has another value.
        """
        self._check(name, self.undeclared(name, absent), (absent,))

    def _check(self, name: str, value: Any, allowed: Collection[Any]) -> Any:
        if value not in allowed:
            raise UserError(
                f"{self.model_type} config: {name}={value!r} is not supported; "
                f"supported: {list(allowed)}"
            )
        return value

    def close(self) -> None:
        """Checks that all has been read that could change the maths.

        Raises:
          UserError: A field was not read, and is not known to be harmless.
        """
        unread = sorted(set(self._unread) - HARMLESS)
        if unread:
            shown = ", ".join(f"{name}={self._unread[name]!r}" for name in unread)
            raise UserError(
                f"{self.model_type} config: fields that fjft does not know: {shown}; "
                "they may change the model's maths, so it is not loaded"
            )
