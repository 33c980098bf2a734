"""The table of contents of what examples are made of.

Each module has an `Encoder` (see `reading.Encoder`), `find_labels(config)`, what its
examples are labelled with, `show_example(tokenizer, example, labels)`, and `COLUMNS`,
what a batch has for each token besides positions and segments; None where the data
decide. Where a model can write what is learned, `ask(example)` is what it reads before
and what it should write, as token ids; it reads nothing where nothing is asked.
"""

import types

from fjft.data import (
    corrupted,
    desirable,
    groups,
    labelled,
    masked,
    preferences,
    questions,
    ranked,
    seq2seq,
    tagged,
    tokenize,
)

ENCODERS: dict[str, types.ModuleType] = {
    "text": tokenize,
    "corrupted": corrupted,
    "desirable": desirable,
    "groups": groups,
    "labelled": labelled,
    "masked": masked,
    "preferences": preferences,
    "questions": questions,
    "ranked": ranked,
    "seq2seq": seq2seq,
    "tagged": tagged,
}
