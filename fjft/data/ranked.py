"""Two texts or chats of which one is preferred, read to their ends.

    {"chosen": "Which is right? The earth is round.", "rejected": "..."}

Besides these, every row of `preferences`; a reward is of the whole, so it matters
nothing where the answer begins.
"""

from typing import Any

from fjft.data import preferences
from fjft.data.preferences import find_labels, make_layout, show_example
from fjft.data.templates import Sample, read_sample

__all__ = ["Encoder", "find_labels", "make_layout", "show_example"]


class Encoder(preferences.Encoder):
    """Turns preferences into examples; arguments and errors are those of `preferences`.

    Where a text would be learned, its labels say so, but nothing is generated.
    """

    generates: bool = False

    def read(self, values: dict[str, Any]) -> tuple[str, tuple[Sample, Sample]]:
        """Reads a row's columns; without a prompt, its answers may be plain texts.

        Raises:
          MalformedError: There are no two of them.
        """
        answers = [values.get(name) for name in ("chosen", "rejected")]
        if values.get("prompt") is None and all(isinstance(a, str) for a in answers):
            chosen, rejected = (read_sample({"text": a})[1] for a in answers)
            return "preference", (chosen, rejected)
        return super().read(values)
