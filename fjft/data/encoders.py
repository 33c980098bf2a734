"""The table of contents of what examples are made of.

Each module has an `Encoder` (see `dataset.Encoder`), `find_labels(config)`, what whole
examples are labelled with, and `show_example(tokenizer, example, labels)`.
"""

import types

from fjft.data import labelled, tokenize

ENCODERS: dict[str, types.ModuleType] = {"text": tokenize, "labelled": labelled}
