"""What a model makes of each held-out example, written down while it is judged."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

# Ids of tokens -> their text.
Decode = Callable[[Sequence[int]], str]


class Writer:
    """Writes a line of JSON for each example of a set; keeps none.

    A metrics module that can tell what was predicted has a class
    `Predictions(examples, config, decode)` for it, made as its `Tally` is. Its
    `read(judged, examples)` takes what the objective gave for a batch whose rows hold
    one example each, and the examples that have not been read yet; it yields what to
    write, or None of one that belongs to a later one.

    Args:
      file: Where lines go.
      name: Of the set, which stands in every line; "" is left out.
      examples: What is judged, `data.examples.Examples`.
      predictions: The `Predictions` of these examples, or None.
    """

    def __init__(self, file: TextIO, name: str, examples: Any, predictions: Any = None):
        self._file = file
        self._start = {"set": name} if name else {}
        self._row_numbers = examples.row_numbers
        self._numbers = iter(range(len(examples)))
        self._examples: Iterator[Any] = (examples[i] for i in range(len(examples)))
        self._predictions = predictions

    def add(self, judged: Any) -> None:
        """Writes the lines of a batch, if it tells of any."""
        if self._predictions is None:
            return
        for told in self._predictions.read(judged, self._examples):
            number = next(self._numbers)
            if told is not None:
                self.write(number, told)

    def write(self, number: int, told: Mapping[str, Any]) -> None:
        """Writes the line of one example, which begins with its source's row.

        Raises:
          OSError: No space is left.
        """
        row = int(self._row_numbers[number])
        line = {**self._start, "row": row, **told}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
