"""What encoder-decoders share: the model around two stacks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.errors import UserError
from fjft.labels import IGNORED
from fjft.models.cache import init_cache
from fjft.models.cross_block import Architecture
from fjft.models.encoder import restarting_positions
from fjft.models.half import EncoderDecoderCache, Half, Memory
from fjft.models.layers import (
    Embedding,
    Linear,
    Maker,
    Terms,
    TiedHead,
    sum_terms,
)
from fjft.models.prompt import (
    num_virtual_tokens,
    only_segment,
    prefix_of,
    prepend_vectors,
    vectors_of,
    with_virtual_places,
)
from fjft.sharding import constrain


class EncoderDecoder(nnx.Module):
    """A model that reads one text and writes another.

    `model(input_ids, decoder_input_ids=...)` gives logits; training and decoding call
    its parts: `encode`, `embed`, `backbone`, `unembed`. The decoder is what methods
    mean by the model's layers: cuts are cuts of its stack.

    Attributes:
      prompt: None, or virtual tokens: vectors before the encoder's, or keys and values
        before the decoder's; see `Prompt`.
      arch: The numbers it was built from.
      provenance: Where its weights came from, set by whoever loads them.
      compute_dtype: Type of the activations; weights are cast to it where used.
    """

    def __init__(
        self,
        arch: Architecture,
        make: Maker,
        compute_dtype: jax.typing.DTypeLike,
        cuts: tuple[int, ...] = (),
    ):
        size, std = arch.hidden_size, arch.stds.embedding
        padding = arch.pad_token_id if arch.pads_embedding else None
        vocab_size = arch.decoder_vocab_size
        self.embedding = Embedding(
            make, arch.vocab_size, size, std=std, padding_id=padding
        )
        self.encoder = Half(make, arch, is_decoder=False)
        self.decoder_embedding = nnx.data(
            None
            if arch.shares_embeddings
            else Embedding(make, vocab_size, size, std=std, padding_id=padding)
        )
        self.decoder = Half(make, arch, is_decoder=True, cuts=cuts)
        self.lm_head = (
            TiedHead()
            if arch.ties_head
            else Linear(
                make,
                "lm_head",
                (vocab_size, size),
                ("vocab", "embed"),
                bias=False,
                std=std,
            )
        )
        zeros = jax.nn.initializers.zeros
        self.bias = nnx.data(
            make((1, vocab_size), (None, "vocab"), zeros)
            if arch.has_logits_bias
            else None
        )
        self.prompt: Any = nnx.data(None)
        self.arch = arch
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.provenance: Any = None

    def __call__(
        self,
        input_ids: Int[Array, "B E"],
        positions: Int[Array, "B E"] | None = None,
        segment_ids: Int[Array, "B E"] | None = None,
        decoder_input_ids: Int[Array, "B T"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the decoder's next token.

        Args:
          input_ids: What the encoder reads.
          positions: 0, 1, 2, ... in every segment, as they are when None.
          segment_ids: All 1 when None; 0 is padding, and segments do not see each
            other.
          decoder_input_ids: What the decoder has written so far, or in training
            `shift_tokens_right` of the labels.
          decoder_segment_ids: The same for these; segment n reads the encoder's
            segment n.
          decoder_positions: The same for these.

        Raises:
          UserError: There are no `decoder_input_ids`.
        """
        if decoder_input_ids is None:
            raise UserError(
                "an encoder-decoder needs decoder_input_ids, those written so far; "
                "in training, shift_tokens_right of the labels"
            )
        memory = self.encode(input_ids, positions, segment_ids)
        positions, segments = _places(
            decoder_input_ids, decoder_positions, decoder_segment_ids
        )
        x_BTD = self.embed(decoder_input_ids)
        x_BTD, _ = self.backbone(x_BTD, positions, segments, memory=memory)
        return self.unembed(x_BTD)

    @property
    def config(self) -> Any:
        """The Hugging Face config of the checkpoint it was loaded from."""
        return self.provenance.files.config

    @property
    def longest_text(self) -> int | None:
        """Tokens of a text that the table of positions is enough for; None is any."""
        if not self.arch.num_positions:
            return None
        return self.arch.num_positions - num_virtual_tokens(self.prompt)

    @property
    def output_table(self) -> str | None:
        """The module of the token vectors that logits are products with, if any are."""
        if not isinstance(self.lm_head, TiedHead):
            return None
        return "embedding" if self.arch.shares_embeddings else "decoder_embedding"

    def encode(
        self,
        input_ids_BE: Int[Array, "B E"],
        positions_BE: Int[Array, "B E"] | None = None,
        segment_ids_BE: Int[Array, "B E"] | None = None,
        *,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> Memory:
        """Reads the source; arguments as in `__call__` and `backbone`."""
        positions, segments = _places(input_ids_BE, positions_BE, segment_ids_BE)
        x_BED = self.word_vectors(input_ids_BE)
        vectors = vectors_of(self.prompt)
        if vectors is not None:
            x_BED = prepend_vectors(vectors, only_segment(x_BED, segments))
            num_virtual = self.prompt.num_tokens
            positions, segments = with_virtual_places(
                num_virtual, positions + num_virtual, segments, segment=1
            )
        x_BED, _ = self.encoder(x_BED, positions, segments, None, None, rng, remat)
        return Memory(x_BED, segments)

    def decoder_inputs(
        self, labels_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"]
    ) -> Int[Array, "B T"]:
        """What the decoder reads to write `labels`; see `shift_tokens_right`."""
        return shift_tokens_right(labels_BT, self.arch, segment_ids_BT)

    def word_vectors(self, input_ids_BE: Int[Array, "B E"]) -> Float[Array, "B E D"]:
        """What virtual vectors stand in the place of."""
        return self._look_up(self.embedding, input_ids_BE)

    def embed(self, input_ids_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Vectors of the decoder's tokens, in the compute dtype."""
        return self._look_up(self._decoder_table, input_ids_BT)

    @property
    def _decoder_table(self) -> Embedding:
        own = self.decoder_embedding
        return self.embedding if own is None else own

    def _look_up(self, embedding: Embedding, ids: jax.Array) -> jax.Array:
        x = embedding(ids, self.compute_dtype)
        if self.arch.pads_embedding:
            is_padding = (ids == self.arch.pad_token_id)[..., None]
            x = jnp.where(is_padding, jax.lax.stop_gradient(x), x)
        if self.arch.embedding_scale != 1:
            x = x * jnp.asarray(self.arch.embedding_scale, x.dtype)
        return constrain(x, "batch", "sequence", None)

    def backbone(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        memory: Memory | None = None,
        cache: EncoderDecoderCache | None = None,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B T D"], EncoderDecoderCache | None]:
        """The decoder's layers, and all up to `logit_terms`.

        Args:
          x_BTD: Vectors of the decoder's tokens.
          positions_BT: Positions; restart in every segment.
          segment_ids_BT: Segments; 0 is padding.
          memory: What the encoder made; either this or `cache`.
          cache: The same as keys and values, with those of earlier tokens, which these
            tokens see and join.
          rng: Turns dropout on where there is any.
          remat: What the backward pass recomputes, a key of `REMAT_POLICIES`.

        Raises:
          UserError: There is neither memory nor cache.
        """
        prefix = prefix_of(self.prompt, self.compute_dtype)
        if prefix is not None:
            positions_BT = positions_BT + prefix.num_tokens
        x_BTD, cache = self.decoder(
            x_BTD, positions_BT, segment_ids_BT, memory, cache, rng, remat, prefix
        )
        if self.arch.logit_scale != 1:
            x_BTD = x_BTD * jnp.asarray(self.arch.logit_scale, x_BTD.dtype)
        return x_BTD, cache

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, in the compute dtype."""
        logits = sum_terms(self.logit_terms(x_BTD))
        bias = self.logits_bias
        return (
            logits if bias is None else logits + bias.astype(logits.dtype)[None, None]
        )

    def logit_terms(
        self, x_BTD: Float[Array, "B T D"], rng: Key[Array, ""] | None = None
    ) -> Terms:
        """The logits, less `logits_bias`, as a sum of products with (V, ...)."""
        if isinstance(self.lm_head, TiedHead):
            return self.lm_head.terms(self._decoder_table, x_BTD, rng)
        return self.lm_head.terms(x_BTD, rng)

    @property
    def logits_bias(self) -> Float[Array, "V"] | None:
        """What is then added to them; never trained."""
        return None if self.bias is None else jax.lax.stop_gradient(self.bias[0])

    def init_cache(self, memory: Memory, num_slots: int) -> EncoderDecoderCache:
        """A cache with the source's keys and values, and `num_slots` empty slots."""
        B, E, _ = memory.states.shape
        side = self.arch.decoder
        shape = side.num_heads, side.head_dim, self.compute_dtype
        source = init_cache(side.num_layers, B, E, *shape)
        source = source.reserve(jnp.zeros_like(memory.segment_ids), memory.segment_ids)

        def body(block, source, layer):
            return source.write(layer, *block.cross.keys_values(memory.states, None))

        source = self.decoder.layers.scan(body, source, forward_only=True).advance(E)
        prefix = prefix_of(self.prompt, self.compute_dtype)
        if prefix is None:
            tokens = init_cache(side.num_layers, B, num_slots, *shape)
        else:
            num_slots += prefix.num_tokens
            tokens = prefix.fill(init_cache(side.num_layers, B, num_slots, *shape))
        return EncoderDecoderCache(tokens, source)


def shift_tokens_right(
    labels_BT: Int[Array, "B T"],
    arch: Architecture,
    segment_ids_BT: Int[Array, "B T"] | None = None,
) -> Int[Array, "B T"]:
    """What the decoder reads to write `labels`: a start token, then all but the last.

    With labels `[7, 8, 2]` and start 5 it is `[5, 7, 8]`; a row of a model that starts
    with the row's own last token (mBART, where that names the language) is `[2, 7, 8]`.
    Labels that are not trained, -100, become padding. Each segment of a packed row is
    shifted for itself; without `segment_ids` a row is one.

    Raises:
      UserError: The config has no `pad_token_id`.
    """
    if arch.pad_token_id is None:
        raise UserError("the config has no pad_token_id, which the decoder needs")
    ids_BT = jnp.where(labels_BT == IGNORED, arch.pad_token_id, labels_BT)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(ids_BT)
    start_BT = jnp.full_like(ids_BT, arch.start_id or 0)
    if arch.start_id is None:
        is_own_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        is_own_BTS &= (ids_BT != arch.pad_token_id)[:, None, :]
        # The last of them, counted from the end.
        from_end_BT = jnp.argmax(is_own_BTS[:, :, ::-1], axis=-1)
        start_BT = jnp.take_along_axis(ids_BT[:, ::-1], from_end_BT, axis=1)
    before_BT = jnp.pad(ids_BT[:, :-1], ((0, 0), (1, 0)))
    is_first_BT = restarting_positions(segment_ids_BT) == 0
    return jnp.where(is_first_BT, start_BT, before_BT)


def _places(
    ids: jax.Array, positions: jax.Array | None, segments: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Positions and segments, worked out where they are None; padding is at 0."""
    if segments is None:
        segments = jnp.ones_like(ids)
    if positions is None:
        positions = restarting_positions(segments)
    return jnp.where(segments == 0, 0, positions), segments
