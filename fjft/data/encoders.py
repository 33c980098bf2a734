"""The table of contents of what examples are made of.

Each module has an `Encoder` (see `reading.Encoder`), `find_labels(config)`, what its
examples are labelled with, `show_example(tokenizer, example, labels)`, and where its
batches hold other than labelled tokens, `make_layout`; see `find_layout`. Where a model
can write what is learned, `ask(example)` is what it reads before and what it should
write, as token ids; it reads nothing where nothing is asked.
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
from fjft.data.config import Config
from fjft.data.examples import Layout

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


def find_layout(kind: str, config: Config, has_types: bool, num_labels: int) -> Layout:
    """What batches of a kind of examples hold, known without the data.

    Args:
      kind: A key of `ENCODERS`.
      config: The data section.
      has_types: Whether the tokenizer tells texts apart by types of tokens.
      num_labels: Outputs of the head, where labels are of whole examples.
    """
    make = getattr(ENCODERS[kind], "make_layout", None)
    return make(config, has_types, num_labels) if make else Layout()
