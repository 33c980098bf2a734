"""What became of the rows: the account that upper floors print."""

import collections
import dataclasses

from fjft.errors import UserError

# How many places are kept for each reason.
KEPT_PLACES = 5


@dataclasses.dataclass
class Rejections:
    """Rows that cannot be used for one reason.

    Attributes:
      count: How many.
      places: The first few, as `file:line` or `file:line (detail)`.
    """

    count: int = 0
    places: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Report:
    """The account of one pass over the sources; fields grow while rows are read.

    Attributes:
      name: What was read, `train`, `eval` or `eval.NAME`.
      strict: Whether the first rejection is an error.
      generates: Whether what is learned is to be generated.
      rows_read: Rows, malformed ones included.
      formats: Format name -> rows that have it.
      rejected: Reason -> rows that were not used.
      examples: Examples kept (before held-out ones are taken away).
      truncated: Of them, cut to `max_length`.
      held_out: Of them, taken for evaluation by `eval_size`.
      also_held_out: Others with the same tokens as one of these, left out.
      tokens: Tokens in all examples.
      supervised_tokens: Of them, learned.
      longest: Tokens in the longest example.
      end_tokens: Token that ends a learned turn or document -> how often; generation
        stops at these.
      labels: Name of a label -> how many examples, or tokens, have it.
      sources: Name of a source -> its rows, used or not; "" if it has none.
      mixture: Name of a source -> its examples that are trained on, and how many an
        epoch has of them; empty if sources have no names.
      packed_rows: Rows of `max_length` after packing; 0 without packing.
      efficiency: Fraction of positions in rows that are not padding (0 to 1). Without
        packing, with each example in its own smallest bucket.
      kept: Whether it was, or will be, read without tokenizing again.
      evals: The accounts of separate evaluation sources.
    """

    name: str = "train"
    strict: bool = False
    generates: bool = True
    rows_read: int = 0
    formats: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    rejected: dict[str, Rejections] = dataclasses.field(default_factory=dict)
    examples: int = 0
    truncated: int = 0
    held_out: int = 0
    also_held_out: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    end_tokens: collections.Counter[int] = dataclasses.field(
        default_factory=collections.Counter
    )
    labels: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    sources: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    mixture: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    packed_rows: int = 0
    efficiency: float = 0.0
    kept: str = ""
    evals: "list[Report]" = dataclasses.field(default_factory=list)

    def reject(self, place: str, reason: str, detail: str = "") -> None:
        """Counts a row that is not used.

        Raises:
          UserError: `strict` is set.
        """
        text = f"{place} ({detail})" if detail else place
        if self.strict:
            raise UserError(
                f"data.{self.name}: {reason}: {text}; mend the row, or set "
                "data.strict=False to leave such rows out"
            )
        rejections = self.rejected.setdefault(reason, Rejections())
        rejections.count += 1
        if len(rejections.places) < KEPT_PLACES:
            rejections.places.append(text)

    @property
    def rejected_rows(self) -> int:
        """Rows not used, over all reasons."""
        return sum(r.count for r in self.rejected.values())

    def warnings(self) -> list[str]:
        """What is probably a mistake, one sentence each with its remedy."""
        found = []
        if self.generates and self.examples and not self.end_tokens:
            found.append(
                f"data.{self.name}: no end-of-turn or eos token is ever learned, so "
                "the model will not learn to stop; use a chat template that ends "
                "turns with a special token, or a tokenizer with an eos_token"
            )
        if self.rejected_rows > self.rows_read / 2:
            found.append(
                f"data.{self.name}: {self.rejected_rows:,} of {self.rows_read:,} rows "
                "were not used; see the reasons above"
            )
        return found + [line for part in self.evals for line in part.warnings()]

    def describe(self) -> list[str]:
        """The account as lines of text, warnings not included."""
        formats = ", ".join(
            f"{name} ({count:,})" if len(self.formats) > 1 else name
            for name, count in self.formats.most_common()
        )
        lines = [
            f"data.{self.name}: {self.rows_read:,} rows of format {formats or 'none'}, "
            f"{self.examples:,} used, {self.rejected_rows:,} not"
        ]
        for reason, rejections in self.rejected.items():
            more = rejections.count - len(rejections.places)
            rest = f", and {more:,} more" if more else ""
            places = ", ".join(rejections.places)
            lines.append(f"  {rejections.count:,} {reason}: {places}{rest}")
        if self.truncated:
            lines.append(f"  {self.truncated:,} cut to max_length")
        if self.held_out:
            lines.append(f"  {self.held_out:,} held out for evaluation")
        if self.also_held_out:
            lines.append(
                f"  {self.also_held_out:,} equal to these, left out of training"
            )
        if self.mixture:
            counts = ", ".join(
                f"{name} {size:,} x {count / size:.3g}"
                for name, (size, count) in self.mixture.items()
            )
            lines.append(f"  an epoch of the mixture: {counts}")
        if self.labels:
            counts = ", ".join(f"{n} {c:,}" for n, c in sorted(self.labels.items()))
            lines.append(f"  labels: {counts}")
        share = self.supervised_tokens / max(self.tokens, 1)
        learned = f", {self.supervised_tokens:,} learned ({share:.0%})"
        lines.append(
            f"  {self.tokens:,} tokens{learned if self.generates else ''}, longest "
            f"example {self.longest:,}"
        )
        kind = f"{self.packed_rows:,} packed rows" if self.packed_rows else "padded"
        lines.append(f"  {kind}, {self.efficiency:.1%} of positions hold tokens")
        if self.kept:
            lines.append(f"  {self.kept}")
        return lines + [line for part in self.evals for line in part.describe()]
