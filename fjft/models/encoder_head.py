"""What lies on top of an encoder: one description, and one module, for every head."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fjft.errors import UserError
from fjft.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    Maker,
    Terms,
    dropout,
    own_key,
    sum_terms,
)
from fjft.models.weights import Row, linear_rows, norm_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a head is made of, and what Hugging Face calls its parts.

    A vector goes through `dense`, its activation and `norm`, then to the outputs: an
    own map `output`, or the token embeddings and the vector `bias`.

    Attributes:
      kind: One of `ENCODER_HEADS`.
      pooling: What of a sequence it looks at, `first` or `mean`; None is every token.
      dense: Hugging Face's name of the map before the outputs; "" where there is none.
      dense_size: Its outputs.
      dense_bias: Whether it has a bias.
      dense_std: Standard deviation of its new weights.
      activation: A key of `ACTIVATIONS`.
      norm: Hugging Face's name of the norm after it; "" where there is none.
      norm_bias: Whether that has a bias.
      norm_eps: Its epsilon.
      output: Hugging Face's name of the last map; "" where there is none.
      output_bias: Whether it has a bias.
      output_std: Standard deviation of its new weights.
      num_outputs: Labels, or tokens of the vocabulary.
      bias: Hugging Face's name of the bias beside tied embeddings; "" where the outputs
        are not tied.
      bias_alias: Another name under which a checkpoint may hold the last bias.
      spare: Hugging Face's name of a copy of the last bias that transformers stores
        beside an untied `output` and does not use.
      tied_alias: A name under which a checkpoint may hold the embeddings once more.
      cutoff: Multiple of the deviation beyond which no new weight lies; None is any.
      input_dropout: Share that training drops of the vectors that come in.
      output_dropout: Share that it drops of what the outputs are made from.
    """

    kind: str
    pooling: str | None = None
    dense: str = ""
    dense_size: int = 0
    dense_bias: bool = True
    dense_std: float = 0.0
    activation: str = ""
    norm: str = ""
    norm_bias: bool = True
    norm_eps: float = 0.0
    output: str = ""
    output_bias: bool = True
    output_std: float = 0.0
    num_outputs: int = 0
    bias: str = ""
    bias_alias: str = ""
    spare: str = ""
    tied_alias: str = ""
    cutoff: float | None = None
    input_dropout: float = 0.0
    output_dropout: float = 0.0

    def rows(self) -> tuple[Row, ...]:
        """The head's part of a name table."""
        rows = []
        if self.dense:
            rows += linear_rows(self.dense, "head.dense", bias=self.dense_bias)
        if self.norm:
            rows += norm_rows(self.norm, "head.norm", bias=self.norm_bias)
        other = (self.bias_alias,) if self.bias_alias else ()
        if self.output:
            rows.append(Row(f"{self.output}.weight", "head.output.weight"))
        if self.output and self.output_bias:
            rows.append(Row(f"{self.output}.bias", "head.output.bias", aliases=other))
        if self.bias:
            rows.append(Row(self.bias, "head.bias", aliases=other))
        if self.spare:
            last = f"{self.output}.bias"
            rows.append(Row(self.spare, "head.spare", aliases=(last,)))
        return tuple(dataclasses.replace(row, head=True) for row in rows)


def with_outputs(plan: Plan, name: str, *, tied: bool, bias: bool = True) -> Plan:
    """A masked LM's plan whose outputs are one plain map, maybe a tied one.

    Args:
      plan: What comes before.
      name: Hugging Face's name of the map.
      tied: Whether its weights are the token embeddings.
      bias: Whether it has a bias.
    """
    plan = dataclasses.replace(plan, bias_alias="", spare="")
    if not tied:
        return dataclasses.replace(
            plan, output=name, output_bias=bias, bias="", tied_alias=""
        )
    return dataclasses.replace(
        plan,
        output="",
        bias=f"{name}.bias" if bias else "",
        tied_alias=f"{name}.weight",
    )


def masked_lm(
    within: str, *, dense: str, norm: str, tied: bool, num_outputs: int, std: float
) -> Plan:
    """A masked LM's head as BERT and its kin name it; the caller adds the numbers.

    Args:
      within: The module that holds the head.
      dense: Its map before the outputs.
      norm: The norm after that.
      tied: Whether the outputs are the token embeddings.
      num_outputs: V.
      std: Standard deviation of new weights.
    """
    plan = Plan(
        kind="masked_lm",
        dense=f"{within}.{dense}",
        dense_std=std,
        norm=f"{within}.{norm}",
        output_std=std,
        num_outputs=num_outputs,
    )
    bias, decoder = f"{within}.bias", f"{within}.decoder"
    if tied:
        return dataclasses.replace(
            plan,
            bias=bias,
            bias_alias=f"{decoder}.bias",
            tied_alias=f"{decoder}.weight",
        )
    return dataclasses.replace(plan, output=decoder, bias_alias=bias, spare=bias)


def classifier(
    kind: str, output: str, *, num_labels: int, std: float, dropout: float
) -> Plan:
    """A head that tells labels apart; the caller adds what comes before.

    Raises:
      UserError: It answers questions, for which it needs two.
    """
    if kind == "question_answering" and num_labels != 2:
        raise UserError(
            f"num_labels={num_labels}, but question answering has two outputs, an "
            "answer's start and its end; set num_labels=2"
        )
    pooling = "first" if kind == "sequence_classification" else None
    return Plan(
        kind=kind,
        pooling=pooling,
        output=output,
        output_std=std,
        num_outputs=num_labels,
        output_dropout=dropout,
    )


class Head(nnx.Module):
    """Any of the heads, by its plan; it maps vectors one by one, after any pooling."""

    def __init__(self, make: Maker, plan: Plan, hidden_size: int):
        cutoff, size = plan.cutoff, hidden_size
        dense = norm = output = None
        if plan.dense:
            size = plan.dense_size
            dense = Linear(
                make,
                "dense",
                (size, hidden_size),
                ("hidden", "embed"),
                bias=plan.dense_bias,
                std=plan.dense_std,
                cutoff=cutoff,
            )
        if plan.norm:
            norm = LayerNorm(make, size, eps=plan.norm_eps, bias=plan.norm_bias)
        axis = "vocab" if plan.kind == "masked_lm" else "labels"
        if plan.output:
            output = Linear(
                make,
                "output",
                (plan.num_outputs, size),
                (axis, "embed"),
                bias=plan.output_bias,
                std=plan.output_std,
                cutoff=cutoff,
            )
        self.dense: Linear | None = nnx.data(dense)
        self.norm: LayerNorm | None = nnx.data(norm)
        self.output: Linear | None = nnx.data(output)
        self.bias, self.spare = (
            nnx.data(
                make((plan.num_outputs,), (axis,), jax.nn.initializers.zeros)
                if name
                else None
            )
            for name in (plan.bias, plan.spare)
        )
        self.plan = plan

    def transform(
        self, x: Float[Array, "*B D"], rng: Key[Array, ""] | None = None
    ) -> Float[Array, "*B E"]:
        """All but the outputs; for the bare model, the pooler."""
        plan = self.plan
        x = dropout(x, plan.input_dropout, own_key(rng, "head input"))
        if self.dense is not None:
            x = ACTIVATIONS[plan.activation](self.dense(x, rng))
        if self.norm is not None:
            x = self.norm(x)
        return dropout(x, plan.output_dropout, own_key(rng, "head output"))

    def __call__(
        self,
        x: Float[Array, "*B D"],
        words: Embedding,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "*B C"]:
        """Logits.

        Args:
          x: Hidden states, pooled or not.
          words: The token embeddings, for a head that is tied to them.
          rng: Turns on what is random in training.
        """
        x = self.transform(x, rng)
        if self.output is not None:
            return self.output(x, rng)
        return sum_terms(self.terms(x, words, rng))

    def terms(
        self, x: Float[Array, "*B E"], words: Embedding, rng: Key[Array, ""] | None
    ) -> Terms:
        """Logits of `transform`'s vectors as a sum of products, one of them with 1."""
        if self.output is not None:
            products, bias = self.output.terms(x, rng), self.output.bias
        else:
            products, bias = words.terms(x), self.bias
        if bias is None:
            return products
        return (*products, (jnp.ones((*x.shape[:-1], 1), x.dtype), bias[...][:, None]))
