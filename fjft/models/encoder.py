"""The model that all encoders are: embeddings, layers and one head."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.errors import UserError
from fjft.models.encoder_block import Architecture, Block, Embeddings
from fjft.models.encoder_head import Head
from fjft.models.layers import Maker, Terms
from fjft.models.mask import full_mask
from fjft.models.pooling import pool
from fjft.models.prompt import (
    num_virtual_tokens,
    only_segment,
    vectors_of,
    with_virtual_places,
)
from fjft.models.stack import REMAT_POLICIES, Stack
from fjft.models.weights import Row
from fjft.sharding import constrain


class Encoder(nnx.Module):
    """A model that reads in both directions, with one head.

    Calling it gives, by the head (`model.arch.head`), in the compute dtype:

    - `base`: last hidden states, [B, T, D];
    - `masked_lm`: logits of each token, [B, T, V];
    - `token_classification`: [B, T, num_labels];
    - `question_answering`: logits of an answer's start and end there, [B, T, 2];
    - `sequence_classification`: [B, num_labels], of each row's segment 1; with
      `num_segments=S` those of its segments 1 .. S, [B, S, num_labels].

    What a padding token gets means nothing.

    Attributes:
      prompt: None, or virtual tokens' vectors, which stand before every row; see
        `Prompt`. Heads for single tokens pass them over, those for sequences do not.
      arch: The numbers it was built from.
      provenance: Where its weights came from, set by whoever loads them.
      compute_dtype: Type of the activations; weights are cast to it where used.
    """

    def __init__(
        self,
        arch: Any,
        make: Maker,
        compute_dtype: jax.typing.DTypeLike,
        cuts: tuple[int, ...] = (),
    ):
        self.embeddings = Embeddings(make, arch)
        self.layers = self.make_layers(arch, make, cuts)
        self.head = Head(make, arch.plan, arch.hidden_size)
        self.prompt: Any = nnx.data(None)
        self.arch = arch
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.provenance: Any = None

    @staticmethod
    def make_layers(arch: Any, make: Maker, cuts: tuple[int, ...]) -> Stack:
        """The family's layers."""
        kinds = (None,) * arch.num_layers
        return Stack(make, lambda make, kind: Block(make, arch), kinds, cuts)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        *,
        num_segments: int | None = None,
    ) -> Float[Array, "B *C"]:
        """The head's logits, or the bare model's hidden states; see the class.

        Args:
          input_ids: Tokens.
          positions: 0, 1, 2, ... in every segment, as they are when None.
          segment_ids: All 1 when None; 0 is padding, and segments do not see each
            other.
          token_type_ids: All 0 when None.
          num_segments: For a head that looks at whole sequences, how many of them a
            packed row holds at most; None is one, without an axis for it.

        Raises:
          UserError: The rows are longer than the model's table of positions.
        """
        hidden = self.encode(input_ids, positions, segment_ids, token_type_ids)
        return self.predict(hidden, segment_ids, num_segments=num_segments)

    @property
    def config(self) -> Any:
        """The Hugging Face config of the checkpoint it was loaded from."""
        return self.provenance.files.config

    @property
    def longest_text(self) -> int | None:
        """Tokens of a text that the table of positions is enough for; None is any."""
        if not self.arch.num_positions:
            return None
        num_virtual = num_virtual_tokens(self.prompt)
        return self.arch.num_positions - self.arch.position_offset - num_virtual

    @property
    def output_table(self) -> str | None:
        """The module of the token vectors that logits are products with, if any are."""
        is_tied = self.head.plan.kind == "masked_lm" and self.head.output is None
        return "embeddings.words" if is_tied else None

    def logit_terms(
        self, x_BTE: Float[Array, "B T E"], rng: Key[Array, ""] | None = None
    ) -> Terms:
        """Tokens' logits as a sum of products with (V, ...).

        Args:
          x_BTE: What `head.transform` gave.
          rng: Turns on what is random in training.
        """
        return self.head.terms(x_BTE, self.embeddings.words, rng)

    def encode(
        self,
        input_ids_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None,
        segment_ids_BT: Int[Array, "B T"] | None,
        token_type_ids_BT: Int[Array, "B T"] | None,
        *,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> Float[Array, "B S D"]:
        """Last hidden states for `predict`; arguments as in `__call__`, `backbone`.

        Those of virtual tokens come first, if the head is one for sequences.
        """
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(input_ids_BT)
            self._check_length(input_ids_BT.shape[1])
        if positions_BT is None:
            positions_BT = restarting_positions(segment_ids_BT)
        num_virtual = num_virtual_tokens(self.prompt)
        if num_virtual:
            positions_BT, segment_ids_BT = with_virtual_places(
                num_virtual, positions_BT + num_virtual, segment_ids_BT, segment=1
            )
            if token_type_ids_BT is not None:
                before = (0, 0), (num_virtual, 0)
                token_type_ids_BT = jnp.pad(token_type_ids_BT, before)
        x_BTD = self.embed(
            input_ids_BT, positions_BT, segment_ids_BT, token_type_ids_BT, rng
        )
        if num_virtual:
            x_BTD = only_segment(x_BTD, segment_ids_BT)
        x_BTD = self.backbone(x_BTD, positions_BT, segment_ids_BT, rng=rng, remat=remat)
        return x_BTD if self.head.plan.pooling else x_BTD[:, num_virtual:]

    def _check_length(self, length: int) -> None:
        limit = self.longest_text
        if limit is not None and length > limit:
            raise UserError(
                f"rows of {length} tokens are longer than the {limit} positions that "
                "the model knows; cut them"
            )

    def embed(
        self,
        input_ids_BT: Int[Array, "B T"],
        positions_BS: Int[Array, "B S"],
        segment_ids_BS: Int[Array, "B S"],
        token_type_ids_BS: Int[Array, "B S"] | None = None,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "B S D"]:
        """What the first layer gets, in the compute dtype, of all S tokens."""
        del segment_ids_BS
        x_BSD = self.embeddings(
            input_ids_BT,
            positions_BS,
            token_type_ids_BS,
            self.compute_dtype,
            rng,
            vectors_of(self.prompt),
        )
        return constrain(x_BSD, "batch", "sequence", None)

    def word_vectors(self, input_ids_BT: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """What virtual vectors stand in the place of."""
        return self.embeddings.words(input_ids_BT, self.compute_dtype)

    def backbone(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """All layers.

        Args:
          x_BTD: What `embed` gave.
          positions_BT: Positions; restart in every segment.
          segment_ids_BT: Segments; 0 is padding.
          rng: Turns dropout on where there is any.
          remat: What the backward pass recomputes, a key of `REMAT_POLICIES`.
        """
        mask = full_mask(segment_ids_BT)

        def body(block, x, layer):
            key = None if rng is None else jax.random.fold_in(rng, layer)
            return block(x, mask, key)

        return self.layers.scan(body, x_BTD, REMAT_POLICIES[remat])

    def predict(
        self,
        x_BTD: Float[Array, "B T D"],
        segment_ids_BT: Int[Array, "B S"] | None = None,
        *,
        num_segments: int | None = None,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "B *C"]:
        """The head's logits from last hidden states."""
        plan = self.head.plan
        if plan.kind == "base":
            return x_BTD
        words = self.embeddings.words
        if plan.pooling is None:
            return self.head(x_BTD, words, rng)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
        elif self.prompt is not None:
            before = (0, 0), (self.prompt.num_tokens, 0)
            segment_ids_BT = jnp.pad(segment_ids_BT, before, constant_values=1)
        x_BSD = pool(x_BTD, segment_ids_BT, plan.pooling, num_segments or 1)
        logits_BSC = self.head(x_BSD, words, rng)
        return logits_BSC if num_segments is not None else logits_BSC[:, 0]

    def vectors(
        self,
        x_BTD: Float[Array, "B T D"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        pooling: str,
        num_segments: int,
    ) -> Float[Array, "B S D"]:
        """One vector for each segment, from last hidden states; see `pool`."""
        return pool(x_BTD, segment_ids_BT, pooling, num_segments)


def restarting_positions(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Each token's place in its segment: `[1, 1, 2, 2]` becomes `[0, 1, 0, 1]`."""
    shape = segment_ids_BT.shape
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    before = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jnp.where(segment_ids_BT != before, index, 0)
    return index - jax.lax.cummax(start, axis=1)


def named_rows(arch: Architecture, rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows under the names that the class of this head gives them.

    transformers names the parts of a bare model without the prefix, but reads
    checkpoints of either kind for any head.

    Args:
      arch: The architecture.
      rows: All rows, with the prefix where a model with a head has it.
    """
    prefix = f"{arch.base_name}."
    found = []
    for row in rows:
        with_prefix = (row.hf, *row.aliases)
        without = tuple(name.removeprefix(prefix) for name in with_prefix)
        names = without + with_prefix if arch.head == "base" else with_prefix + without
        hf, *aliases = dict.fromkeys(names)
        found.append(dataclasses.replace(row, hf=hf, aliases=tuple(aliases)))
    return tuple(found)
