"""Tokenized data are kept, and used only where they would come out the same."""

import dataclasses
import os
from typing import Any

import numpy as np
import pytest

from fjft.data import kept, labelled, questions, tokenize
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.data.examples import Spool
from fjft.data.pack import Rows

TEXTS = [{"text": f"The number is {n}."} for n in range(20)]
LABELLED = [
    {"text": f"text {n}", "label": "odd" if n % 2 else "even"} for n in range(9)
]
QUESTIONS = [
    {
        "question": "Which number?",
        "context": f"The number is {n}.",
        "answers": {"text": [f"{n}"], "answer_start": [14]},
    }
    for n in range(9)
]
KINDS = {
    "text": (TEXTS, tokenize, {}),
    "labelled": (LABELLED, labelled, {"packing": False}),
    "questions": (
        QUESTIONS,
        questions,
        {
            "packing": False,
            "text_columns": "question,context",
            "label_column": "answers",
            "doc_stride": 16,
        },
    ),
}


@pytest.fixture(autouse=True)
def _keep_everything(monkeypatch):
    monkeypatch.setattr(kept, "MIN_SECONDS", 0.0)


@pytest.fixture
def count_encoded(monkeypatch):
    """How many texts became tokens, of what kind ever."""
    added = []
    add = Spool.add

    def counting(self, examples, rows):
        added.extend(rows)
        add(self, examples, rows)

    monkeypatch.setattr(Spool, "add", counting)
    return lambda: len(added)


def make_config(tmp_path, path: str, **options: Any) -> Config:
    return Config(train=path, cache=str(tmp_path / "cache"), max_length=64, **options)


def read(config: Config, tokenizer: Any, module: Any = tokenize, seed: int = 0) -> Any:
    return load_examples(config, tokenizer, seed, module.Encoder)


def as_lists(rows: Rows) -> list[Any]:
    """All that there is to know of rows."""
    examples = rows.examples
    batch = rows.assemble(np.arange(len(rows)), len(rows), 64)
    notes = examples.notes and [examples.notes[i] for i in range(len(examples))]
    numbers = examples.row_numbers.tolist(), examples.supervised.tolist()
    return [{name: x.tolist() for name, x in batch.items()}, notes, numbers]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_what_was_read(kind, tokenizer, write, tmp_path, count_encoded):
    data, module, options = KINDS[kind]
    config = make_config(tmp_path, write(*data), eval_size=3.0, **options)
    plain = dataclasses.replace(config, cache="")
    expected, expected_sets, _ = read(plain, tokenizer, module)
    first, _, said = read(config, tokenizer, module)
    before = count_encoded()
    again, sets, report = read(config, tokenizer, module)
    assert count_encoded() == before > 0
    for rows in (first, again):
        assert as_lists(rows) == as_lists(expected)
    assert as_lists(sets[""]) == as_lists(expected_sets[""])
    assert "kept for the next start" in said.kept
    assert "tokenized before" in report.describe()[-1]
    assert dataclasses.replace(report, kept="") == dataclasses.replace(said, kept="")


def test_it_serves_other_uses_of_the_same_examples(
    tokenizer, write, tmp_path, count_encoded
):
    path = write(*TEXTS)
    read(make_config(tmp_path, path), tokenizer)
    before = count_encoded()
    read(make_config(tmp_path, path, packing=False, eval_size=0.2), tokenizer)
    assert count_encoded() == before


@pytest.mark.parametrize(
    "change", ["file", "rows", "option", "seed", "tokenizer", "code"]
)
def test_what_would_differ_is_read_anew(
    change, tokenizer, template, write, tmp_path, monkeypatch, count_encoded
):
    path = write(*TEXTS)
    config, seed = make_config(tmp_path, path), 0
    read(config, tokenizer)
    before = count_encoded()
    if change == "file":
        os.utime(path, ns=(1, 1))
    elif change == "rows":
        write(*TEXTS, {"text": "one more"})
    elif change == "option":
        config = dataclasses.replace(config, max_length=32)
    elif change == "seed":
        seed = 1
    elif change == "tokenizer":
        tokenizer.add_tokens(["number"])
    else:
        (tmp_path / "code.py").write_text("")
        monkeypatch.setattr(kept, "_CODE", tmp_path)
    _, _, report = read(config, tokenizer, seed=seed)
    assert count_encoded() == before + len(TEXTS) + (change == "rows")
    assert "kept for the next start" in report.kept


@pytest.mark.parametrize("damage", ["cut", "gone", "nonsense"])
def test_what_is_broken_is_read_anew(damage, tokenizer, write, tmp_path, count_encoded):
    config = make_config(tmp_path, write(*TEXTS))
    expected = as_lists(read(config, tokenizer)[0])
    before = count_encoded()
    (place,) = (tmp_path / "cache").iterdir()
    tokens = place / "tokens.npy"
    if damage == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-8])
    elif damage == "gone":
        tokens.unlink()
    else:
        (place / "report.pickle").write_bytes(b"nonsense")
    for count in (before + len(TEXTS),) * 2:  # it is mended by that
        assert as_lists(read(config, tokenizer)[0]) == expected
        assert count_encoded() == count


def test_what_nobody_uses_is_deleted_and_nothing_else(tokenizer, write, tmp_path):
    path, cache = write(*TEXTS), tmp_path / "cache"
    read(make_config(tmp_path, path), tokenizer)
    (used,) = cache.iterdir()
    read(make_config(tmp_path, path), tokenizer, seed=1)
    (unused,) = set(cache.iterdir()) - {used}
    other = cache / "somebody's"
    other.mkdir()
    for place in (used, unused, other):
        os.utime(place, (1, 1))
    read(make_config(tmp_path, path), tokenizer)  # which uses it
    read(make_config(tmp_path, path), tokenizer, seed=2)
    assert used.exists()
    assert other.exists()
    assert not unused.exists()
    assert len(list(cache.iterdir())) == 3


def test_a_place_that_cannot_be_written_stops_nothing(tokenizer, write, tmp_path):
    (tmp_path / "cache").write_text("a file")
    rows, _, report = read(make_config(tmp_path, write(*TEXTS)), tokenizer)
    assert len(rows.examples) == len(TEXTS)
    assert "not kept for the next start" in report.describe()[-1]


def test_nothing_is_kept_of_what_is_quick(tokenizer, write, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MIN_SECONDS", 60.0)
    _, _, report = read(make_config(tmp_path, write(*TEXTS)), tokenizer)
    assert not report.kept
    assert not (tmp_path / "cache").exists()


def test_a_dataset_is_known_by_its_commit(tokenizer, tmp_path, monkeypatch):
    commits = {"some/texts": "1f2e", "lost/texts": None}
    monkeypatch.setattr(kept, "_commit_of", commits.__getitem__)

    def find(spec: str) -> Any:
        keeper = kept.Keeper(make_config(tmp_path, spec), tokenizer, None, 0)
        return keeper.find_place({"": spec}, "train")

    place = find("some/texts:train[:10]")
    assert place == find("some/texts:train[:10]")
    assert place != find("some/texts:train[:20]")
    assert find("lost/texts") is None
    commits["some/texts"] = "3d4c"
    assert place != find("some/texts:train[:10]")
