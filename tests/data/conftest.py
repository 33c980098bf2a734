"""A small byte-level tokenizer, trained on the spot, and examples without text."""

import json

import numpy as np
import pytest
import tokenizers
import transformers

from fjft.data.examples import Example, Examples, Spool
from fjft.labels import IGNORED

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<bos>",
    "<eos>",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Hello there, how are you today?\n\nI am fine.\n\nAnd  you?\nassistant\nuser\n",
    "The quick brown fox jumps over the lazy dog.\n\n\nsystem model prompt answer 42\n",
] * 20


@pytest.fixture
def tokenizer():
    """A byte-level BPE tokenizer with 500 tokens and the usual special ones."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture
def template():
    """The ChatML template."""
    return CHATML


@pytest.fixture
def chatml(tokenizer, template):
    """The tokenizer with that template."""
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def write(tmp_path):
    """Writes rows, or lines as they are, and returns the file's path."""

    def write_lines(*rows, name="data.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    return write_lines


@pytest.fixture
def make_examples():
    return _make_examples


def _make_examples(lengths, seed: int = 0) -> Examples:
    """Examples of these lengths; ids are unique, about half of them learned."""
    rng = np.random.default_rng(seed)
    spool = Spool()
    start = 1
    examples = []
    for length in lengths:
        ids = np.arange(start, start + length, dtype=np.int32)
        labels = np.where(rng.random(length) < 0.5, ids, IGNORED).astype(np.int32)
        labels[0] = IGNORED
        examples.append(Example({"input_ids": ids, "labels": labels}))
        start += length
    spool.add(examples, range(len(examples)))
    return spool.finish()
