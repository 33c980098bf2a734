"""The tokenizer that a run trains for its model: once, and then it stays."""

import shutil

from fjft import distributed
from fjft.blueprint import find_family
from fjft.checkpoint.source import ModelInfo
from fjft.data.vocabulary import read_texts, train_tokenizer
from fjft.experiment import Experiment


def ensure_tokenizer(e: Experiment) -> str:
    """Trains the run's tokenizer, unless the run goes on and has one.

    Returns:
      What there is now, in words.

    Raises:
      UserError: The data cannot be read, or the vocabulary is too small for them.
    """
    directory = e.tokenizer_directory
    is_there = e.checkpoint.resume and directory.is_dir()
    if not is_there and distributed.is_first():
        files = e.model.open()
        tokenizer = train_tokenizer(
            e.model.tokenizer,
            read_texts(e.data),
            files.config.vocab_size,
            _form(files),
        )
        # It is there as a whole or not at all.
        unfinished = directory.with_name("tokenizer.unfinished")
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    distributed.wait("tokenizer")
    size = len(e.open_model().load_tokenizer())
    done = "trained before" if is_there else "trained on data.train"
    return f"a {e.model.tokenizer} tokenizer of {size:,} tokens, {done}"


def _form(files: ModelInfo) -> str:
    heads = getattr(find_family(files), "HEADS", ("causal_lm",))
    if "seq2seq_lm" in heads:
        return "encoder-decoder"
    return "decoder" if "causal_lm" in heads else "encoder"
