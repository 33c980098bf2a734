"""Reading a Hugging Face config so that no field that matters is passed over."""

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


class Fields:
    """The fields of one config, each read once and by name.

    Attributes:
      model_type: The family's key.
      architecture: The class of transformers that the checkpoint names, whose head it
        has; None if it names none.
    """

    def __init__(self, config: PretrainedConfig):
        # A key that transformers' own class does not have is one that its model does
        # not read either, but for these two, which bring other weights or other code.
        known = {*type(config)().to_dict(), "quantization_config", "auto_map"}
        self._unread = {k: v for k, v in config.to_dict().items() if k in known}
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

    def expect(self, name: str, *allowed: Any) -> None:
        """Reads a field of which only some values are implemented.

        Raises:
          UserError: The value is another one.
        """
        value = self.take(name)
        if value not in allowed:
            raise UserError(
                f"{self.model_type} config: {name}={value!r} is not supported; "
                f"supported: {list(allowed)}"
            )

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
