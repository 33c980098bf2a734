"""The data section of a config."""

import dataclasses
from collections.abc import Mapping

from fjft.data.files import TEXTS
from fjft.errors import UserError

TRAIN_ON = ("assistant", "last", "all")
TRUNCATION = ("drop", "truncate", "split")
PROBLEM_TYPES = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is read, and what is learned from it.

    Attributes:
      train: Training data: one source or several (a tuple, or separated by commas).
        A source is a local file, directory or glob; `package:NAME/path-or-glob`; or a
        Hugging Face dataset as `id`, `id:split` or `id:config:split`, where
        `split[:1000]` takes the first 1000 rows. Or a mixture: a mapping of names to
        such sources.
      eval: Held-out data, written like `train`; or several sets of it, a mapping of
        names to such sources, which are judged one by one. A Hugging Face dataset
        without a split means `test` here and `train` there.
      eval_size: When `eval` is empty, how much of `train` is held out: a fraction if
        below 1, otherwise a number of examples. Which rows are held out depends on
        the seed and the row's number only. Of a mixture so much of each source, which
        becomes a set by its name.
      eval_shots: Before each held-out question so many answered ones are shown, which
        the seed draws from the training data that is not held out, and from the
        question's own source where sources have names.
      mixture_weights: Shares of the sources in `train`, by name; they need not add up
        to 1. Empty takes their numbers of examples.
      mixture_temperature: Brings shares nearer to each other if above 1; see
        `mixture`.
      instructions: Templates that make an instruction of a row, by name, with columns
        in braces: `Translate from {source} to {target}: {text} ||| {translation}`. One
        is drawn for each row. Where `train` is a mapping, each is for the source that
        its name begins with, up to a slash: `books/short`. Encoder-decoders read the
        columns `instruction,output` then.
      system: A system prompt for chats that have none of their own.
      max_length: Tokens in the longest example, and in every packed row.
      packing: Fill rows of `max_length` with several examples each. Otherwise one
        example a row, padded to the smallest bucket that fits the whole batch.
      buckets: Lengths in tokens to pad to without packing, increasing. Empty chooses
        up to four: an eighth, a quarter, a half and all of `max_length`.
      train_on: Of a chat, learn `assistant` (every assistant turn), `last` (only the
        last one) or `all` (every token). Of a prompt/completion pair the first two
        learn the completion. Of plain text everything is learned.
      truncation: What happens to examples longer than `max_length`: `drop`, or
        `truncate` to their first `max_length` tokens; both are counted. `split` makes
        several examples of a plain text, so that all of it is learned, and drops
        others. (Where tokens are hidden or spans taken out, texts are always split.)
      sample_by: What a row of a `.txt` file is: a `paragraph` (blank lines end it), a
        `line`, or the whole file as a `document`.
      chat_template: A Jinja file used instead of the tokenizer's chat template.
      problem_type: What whole examples are labelled with, where that is learned:
        `single_label_classification`, `multi_label_classification` or `regression`.
      text_columns: The column that is read where labels are learned, or hidden tokens;
        two, with a comma, are a pair, or a question and the text that answers it;
        of three texts two belong together and the last does not, and none are the
        first two messages of a chat. Where one text becomes another, they are these.
        Where each word has a tag, it holds a list.
      label_column: The column of the label: a name or a number; several of them, as a
        list or with commas, where an example may have several; a list of tags; a
        question's answers, as SQuAD has them; or whether an answer is desirable.
      label_names: All labels, in the order of their ids. Empty takes those that occur
        in `train`, sorted.
      doc_stride: Tokens that two windows on a long text share, where questions are
        answered from texts.
      mlm_probability: Share of a text's tokens that a masked LM learns to predict.
      whole_word_mask: Choose these by whole words.
      noise_density: Share of a text's tokens that are taken out, where spans are.
      mean_noise_span_length: Tokens in such a span, on average.
      shuffle: New order in every epoch, chosen by the seed; otherwise as read.
      strict: The first row that cannot be used is an error.
      cache: Where tokenized data are kept for the next start, until none has used them
        for 30 days; "" keeps none.
    """

    train: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]] = ()
    eval: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]] = ()
    eval_size: float = 0.0
    eval_shots: int = 0
    mixture_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mixture_temperature: float = 1.0
    instructions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    system: str = ""
    max_length: int = 1024
    packing: bool = True
    buckets: tuple[int, ...] = ()
    train_on: str = "assistant"
    truncation: str = "drop"
    sample_by: str = "paragraph"
    chat_template: str = ""
    problem_type: str = "single_label_classification"
    text_columns: str = "text"
    label_column: str = "label"
    label_names: str | tuple[str, ...] = ()
    doc_stride: int = 128
    mlm_probability: float = 0.15
    whole_word_mask: bool = False
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    shuffle: bool = True
    strict: bool = False
    cache: str = "~/.cache/fjft/data"

    def __post_init__(self) -> None:
        if self.train_on not in TRAIN_ON:
            raise UserError(
                f"data.train_on is {self.train_on!r}; use one of {', '.join(TRAIN_ON)}"
            )
        if self.truncation not in TRUNCATION:
            raise UserError(
                f"data.truncation is {self.truncation!r}; "
                f"use one of {', '.join(TRUNCATION)}"
            )
        if self.sample_by not in TEXTS:
            raise UserError(
                f"data.sample_by is {self.sample_by!r}; use one of {', '.join(TEXTS)}"
            )
        if self.problem_type not in PROBLEM_TYPES:
            raise UserError(
                f"data.problem_type is {self.problem_type!r}; "
                f"use one of {', '.join(PROBLEM_TYPES)}"
            )
        if self.max_length < 2:
            raise UserError(
                f"data.max_length is {self.max_length}; it takes at least 2 tokens "
                "to predict one"
            )
        if not 0 < self.mlm_probability <= 1:
            raise UserError(
                f"data.mlm_probability is {self.mlm_probability}; use a share above 0, "
                "such as 0.15"
            )
        if not 0 < self.noise_density < 1 or self.mean_noise_span_length < 1:
            raise UserError(
                f"data.noise_density is {self.noise_density} and "
                f"data.mean_noise_span_length {self.mean_noise_span_length}; use a "
                "share between 0 and 1, such as 0.15, and at least 1"
            )
        if self.eval_size < 0 or (self.eval_size > 1 and self.eval_size % 1):
            raise UserError(
                f"data.eval_size is {self.eval_size}; use a fraction below 1 or a "
                "whole number of examples"
            )
        object.__setattr__(self, "buckets", tuple(self.buckets))
        if any(a >= b for a, b in zip((0, *self.buckets), self.buckets, strict=False)):
            raise UserError(
                f"data.buckets is {self.buckets}; use increasing lengths in tokens"
            )

        if self.eval_shots < 0:
            raise UserError(f"data.eval_shots is {self.eval_shots}; use 0 or more")
        self._check_mixture()

    def _check_mixture(self) -> None:
        if self.mixture_temperature <= 0:
            raise UserError(
                f"data.mixture_temperature is {self.mixture_temperature}; use 1 for "
                "shares as they are, or more to bring them nearer to each other"
            )
        weights, names = self.mixture_weights, self.train_sources
        is_plain = not weights and self.mixture_temperature == 1
        if not is_plain and not isinstance(self.train, Mapping):
            raise UserError(
                "data.mixture_weights and data.mixture_temperature are of sources with "
                "names; make data.train a mapping of names to sources"
            )
        if weights and (weights.keys() != names.keys() or min(weights.values()) <= 0):
            raise UserError(
                f"data.mixture_weights is {dict(weights)}; give each source of "
                f"data.train a weight above 0: {', '.join(names)}"
            )

    @property
    def train_sources(self) -> Mapping[str, str | tuple[str, ...]]:
        """Sources of training data by name; a single one has the name ""."""
        return self.train if isinstance(self.train, Mapping) else {"": self.train}

    @property
    def eval_sources(self) -> Mapping[str, str | tuple[str, ...]]:
        """The same of held-out data; empty if there is none."""
        if isinstance(self.eval, Mapping):
            return self.eval
        return {"": self.eval} if self.eval else {}
