"""Other values for the fields of a Hugging Face config."""

from collections.abc import Callable, Iterable
from typing import Any

# What these say is not about the model's maths, and other values are no valid configs.
NOT_FIELDS = {"transformers_version", "is_encoder_decoder", "return_dict"}


def other_numbers(value: Any) -> list[Any]:
    """Other values for a field with this one, to be tried until transformers takes one.

    Fields that are no numbers and no booleans have none.
    """
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value + 1, value - 1]
    return [value * 1.5 + 0.125] if isinstance(value, float) else []


def first_accepted(values: Iterable[Any], run: Callable[[Any], Any]) -> Any:
    """What `run` gives for the first value that it takes, None if it takes none."""
    for value in values:
        try:
            return run(value)
        except Exception:  # transformers has no one way to refuse
            continue
    return None
