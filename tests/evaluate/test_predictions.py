"""Lines of predictions: in order, whatever the batches, and of every kind of label."""

import io
import json
import types

import numpy as np
import pytest

from fjft.evaluate.classification import Predictions
from fjft.evaluate.predictions import Writer
from fjft.objectives.sequence_classification import Judged


class Examples(list):
    """Examples with what is known of all of them."""

    row_numbers = np.array([2, 5, 6])
    labels = types.SimpleNamespace(names=("a", "b"))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (np.array([1, 0, 1], np.int32), [["b", "b"], ["a", "a"], ["b", "a"]]),
        (
            np.array([[1, 1], [0, 0], [0, 1]], np.int32),
            [[["a", "b"], ["b"]], [[], ["a"]], [["b"], ["a", "b"]]],
        ),
        (
            np.array([[1, 2], [3, 4], [5, 6]], np.float32),
            [
                [{"a": 1, "b": 2}, {"a": -1, "b": 1}],
                [{"a": 3, "b": 4}, {"a": 3, "b": -2}],
                [{"a": 5, "b": 6}, {"a": 2, "b": 1}],
            ],
        ),
    ],
)
def test_a_line_for_each_example(labels, told):
    outputs = np.array([[-1, 1], [3, -2], [2, 1]], np.float32)
    ids = [
        types.SimpleNamespace(columns={"input_ids": np.arange(n)}) for n in (1, 2, 3)
    ]
    examples, file = Examples(ids), io.StringIO()
    predictions = Predictions(examples, None, lambda ids: f"{len(ids)} tokens")
    writer = Writer(file, "movies", examples, predictions)
    for start in (0, 2):  # two rows a batch, and one that is padding
        rows = slice(start, start + 2)
        x, y = (np.resize(a[rows], (2, *a.shape[1:])) for a in (outputs, labels))
        zero = np.float32(0)
        writer.add(Judged(zero, zero, x[:, None], y[:, None]))  # type: ignore[arg-type]
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["row"] for line in lines] == [2, 5, 6]
    assert [line["text"] for line in lines] == ["1 tokens", "2 tokens", "3 tokens"]
    assert {line["set"] for line in lines} == {"movies"}
    assert [[line["label"], line["prediction"]] for line in lines] == told
    if labels.dtype.kind == "f":
        assert "scores" not in lines[0]
    elif labels.ndim == 2:
        assert lines[0]["scores"]["b"] == pytest.approx(1 / (1 + np.exp(-1)))
    else:
        assert lines[0]["scores"]["b"] == pytest.approx(1 / (1 + np.exp(-2)))
