"""A tokenizer trained on the data, for a model that starts from random weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fjft.data.config import Config
from fjft.data.sources import read_rows
from fjft.errors import UserError

if TYPE_CHECKING:
    import tokenizers

SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
# What stands for spans that are taken out of texts; see `corrupted`.
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))

# What stands around a text, and around two, by the kind of model.
AROUND = {
    "decoder": ("<s> $A", "<s> $A $B"),
    "encoder": ("<s> $A </s>", "<s> $A </s> $B </s>"),
    "encoder-decoder": ("$A </s>", "$A </s> $B </s>"),
}


def _make_bpe(special: list[str], size: int) -> tuple["tokenizers.Tokenizer", Any]:
    """Merges of bytes, so that no text has unknown tokens (as GPT-2's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _make_unigram(special: list[str], size: int) -> tuple["tokenizers.Tokenizer", Any]:
    """The likeliest pieces of text, spaces included (as T5's)."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=special,
        unk_token=SPECIAL["unk_token"],
        show_progress=False,
    )


def _make_wordpiece(
    special: list[str], size: int
) -> tuple["tokenizers.Tokenizer", Any]:
    """Beginnings and continuations of words; each Chinese character is one (BERT's)."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=False, strip_accents=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=special,
        # Each may begin a word or go on with it, and there is to be room for words.
        limit_alphabet=max((size - len(special)) // 3, 1),
        show_progress=False,
    )


KINDS: Mapping[str, Callable[[list[str], int], tuple["tokenizers.Tokenizer", Any]]] = {
    "bpe": _make_bpe,
    "unigram": _make_unigram,
    "wordpiece": _make_wordpiece,
}


def read_texts(config: Config) -> Iterator[str]:
    """Streams all texts that the rows of the training data hold, in any columns."""
    for row in read_rows(config.train, sample_by=config.sample_by):
        yield from _texts_of(row.values)


def _texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts_of(part)


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, form: str) -> Any:
    """Trains a tokenizer.

    Args:
      kind: One of `KINDS`.
      texts: What to train it on.
      vocab_size: Tokens that it has at most, special ones included.
      form: A key of `AROUND`: the kind of model that will read its tokens.

    Returns:
      A fast Hugging Face tokenizer.

    Raises:
      UserError: A text cannot be read, or so few tokens are not enough.
    """
    import transformers
    from tokenizers import processors

    special = [*SPECIAL.values()]
    if form == "encoder-decoder":
        special += SENTINELS
    tokenizer, trainer = KINDS[kind](special, vocab_size)
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except UserError:
        raise
    except Exception as error:  # the library has no narrower one
        raise UserError(
            f"a {kind} tokenizer of {vocab_size} tokens cannot be trained on these "
            f"texts: {error}; raise model.sizes.vocab_size"
        ) from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"a {kind} tokenizer of these texts has at least "
            f"{tokenizer.get_vocab_size()} tokens, the model only {vocab_size}; raise "
            "model.sizes.vocab_size"
        )
    single, pair = AROUND[form]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
    )
