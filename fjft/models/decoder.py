"""The causal language model that all decoder families share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.errors import UserError
from fjft.models import rope
from fjft.models.block import Architecture, Block, View, make_norm
from fjft.models.cache import Cache, init_cache
from fjft.models.layers import (
    Embedding,
    Linear,
    Maker,
    Terms,
    TiedHead,
    dropout,
    sum_terms,
)
from fjft.models.mask import Mask, Places
from fjft.models.moe import Load, balance_loss, no_load
from fjft.models.prompt import (
    num_virtual_tokens,
    prefix_of,
    prepend_vectors,
    vectors_of,
    virtual_places,
    with_virtual_places,
)
from fjft.models.stack import REMAT_POLICIES, Stack
from fjft.sharding import constrain

EMBEDDING_STREAM = 0x7FFFFFFF  # folded into the key; layers fold in their numbers


class Decoder(nnx.Module):
    """A causal language model.

    `model(input_ids)` gives logits; training and decoding call its three parts:
    `embed`, `backbone`, `unembed`.

    Attributes:
      prompt: None, or the virtual tokens that stand before every row; see `Prompt`.
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
        std, size = arch.initializer_range, arch.hidden_size
        self.embedding = Embedding(
            make, arch.vocab_size, size, std=std, padding_id=arch.padding_id
        )
        self.positions = nnx.data(
            None
            if arch.num_positions is None
            else Embedding(make, arch.num_positions, size, std=std, axis="positions")
        )
        self.layers = Stack(
            make, lambda make, kind: Block(make, arch, kind), arch.kinds, cuts
        )
        self.norm = make_norm(make, arch, size)
        self.lm_head: Any = (
            TiedHead()
            if arch.tie_word_embeddings or arch.num_labels is not None
            else Linear(
                make,
                "lm_head",
                (arch.vocab_size, size),
                ("vocab", "embed"),
                bias=False,
                std=std,
            )
        )
        self.prompt: Any = nnx.data(None)
        self.arch = arch
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.provenance: Any = None

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token.

        Args:
          input_ids: Tokens.
          positions: 0, 1, 2, ... in each row when None; restart in every segment.
          segment_ids: All 1 when None; 0 is padding, and segments do not see each
            other.
        """
        segments = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None], input_ids.shape
            )
        x_BTD = self.embed(input_ids)
        x_BTD, _ = self.backbone(x_BTD, positions, segments)
        return self.unembed(x_BTD)

    @property
    def config(self) -> Any:
        """The Hugging Face config of the checkpoint it was loaded from."""
        return self.provenance.files.config

    @property
    def longest_text(self) -> int | None:
        """Tokens of a text that the table of positions is enough for; None is any."""
        if self.arch.num_positions is None:
            return None
        return self.arch.num_positions - num_virtual_tokens(self.prompt)

    @property
    def output_table(self) -> str | None:
        """The module of the token vectors that logits are products with, if any are."""
        has_logits = self.arch.num_labels is None
        is_tied = has_logits and isinstance(self.lm_head, TiedHead)
        return "embedding" if is_tied else None

    @property
    def logit_softcap(self) -> float | None:
        """What logits are bent to stay below; None leaves them."""
        return self.arch.logit_softcap

    @property
    def balance_coefficient(self) -> float:
        """The share that the balance of the experts has in the training loss."""
        experts = self.arch.experts
        return 0.0 if experts is None else experts.balance_coefficient

    def balance_loss(self, load: Load) -> Float[Array, ""]:
        """What the experts' use of one batch adds to its mean loss in training."""
        return self.balance_coefficient * balance_loss(load)

    def embed(self, input_ids_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token vectors, in the compute dtype."""
        x_BTD = self.embedding(input_ids_BT, self.compute_dtype)
        if self.arch.embedding_scale is not None:
            x_BTD = x_BTD * jnp.asarray(self.arch.embedding_scale, x_BTD.dtype)
        return constrain(x_BTD, "batch", "sequence", None)

    def word_vectors(self, input_ids_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What virtual vectors stand in the place of."""
        return self.embed(input_ids_BT)

    def backbone(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        cache: Cache | None = None,
        lengths_B: Int[Array, "B"] | None = None,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """All layers and the last norm.

        Args:
          x_BTD: Token vectors.
          positions_BT: Positions; restart in every segment.
          segment_ids_BT: Segments; 0 is padding.
          cache: Keys and values of earlier tokens, which these tokens see and join.
          lengths_B: With a cache, how long each row is known to become, for a rope
            that looks at that; by default as long as it is after these tokens.
          rng: Turns dropout on where there is any.
          remat: What the backward pass recomputes, a key of `REMAT_POLICIES`.
        """
        x_BTD, cache, _ = self._run(
            x_BTD, positions_BT, segment_ids_BT, cache, lengths_B, rng, remat
        )
        return x_BTD, cache

    def backbone_and_load(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B T D"], Load]:
        """`backbone`, and how its layers used their experts, which it must have."""
        x_BTD, _, load = self._run(
            x_BTD, positions_BT, segment_ids_BT, None, None, rng, remat
        )
        assert load is not None
        return x_BTD, load

    def _run(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: Cache | None,
        lengths_B: jax.Array | None,
        rng: jax.Array | None,
        remat: str,
    ) -> tuple[jax.Array, Cache | None, Load | None]:
        """All layers and the last norm, the virtual tokens' outputs left out."""
        num_virtual = num_virtual_tokens(self.prompt)
        positions_BT = positions_BT + num_virtual
        if lengths_B is not None:
            lengths_B = lengths_B + num_virtual
        vectors = vectors_of(self.prompt)
        if vectors is None or cache is not None:
            return self._layers(
                x_BTD, positions_BT, segment_ids_BT, cache, lengths_B, rng, remat
            )
        places = with_virtual_places(num_virtual, positions_BT, segment_ids_BT)
        x_BTD = prepend_vectors(vectors, x_BTD)
        x_BTD, cache, load = self._layers(x_BTD, *places, cache, lengths_B, rng, remat)
        return x_BTD[:, num_virtual:], cache, load

    def _layers(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: Cache | None,
        lengths_B: jax.Array | None,
        rng: jax.Array | None,
        remat: str,
    ) -> tuple[jax.Array, Cache | None, Load | None]:
        """The same of virtual and other tokens alike."""
        if cache is not None:
            cache = cache.reserve(positions_BT, segment_ids_BT)
        view = self._view(positions_BT, segment_ids_BT, cache, lengths_B)
        if self.positions is not None:
            x_BTD = x_BTD + self._position_vectors(positions_BT)
        if rng is not None:
            key = jax.random.fold_in(rng, EMBEDDING_STREAM)
            x_BTD = dropout(x_BTD, self.arch.embedding_dropout, key)

        def body(block, carry, layer):
            x, cache, total = carry
            key = None if rng is None else jax.random.fold_in(rng, layer)
            x, cache, load = block(x, view, layer, cache, key)
            if load is not None:
                total = jax.tree.map(jnp.add, total, load)
            return x, cache, total

        load = None if self.arch.experts is None else no_load(self.arch.experts)
        x_BTD, cache, load = self.layers.scan(
            body,
            (x_BTD, cache, load),
            REMAT_POLICIES[remat],
            forward_only=cache is not None,
        )
        if cache is not None:
            cache = cache.advance(positions_BT.shape[1])
        return self.norm(x_BTD), cache, load

    def _view(
        self,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: Cache | None,
        lengths_B: jax.Array | None,
    ) -> View:
        """The masks and rotations of all kinds of layers."""
        queries, keys = Places(positions_BT, segment_ids_BT), None
        prefix = prefix_of(self.prompt, self.compute_dtype)
        if cache is not None:
            keys = Places(cache.positions, cache.segment_ids)
        elif prefix is not None:
            num_virtual = self.prompt.num_tokens
            keys = Places(
                *with_virtual_places(num_virtual, positions_BT, segment_ids_BT)
            )
        elif self.prompt is not None:
            keys = queries  # said in full, since some of them are shared
        kinds = self.arch.kinds
        ropes = [r for r in dict.fromkeys(k.rope for k in kinds) if r is not None]
        lengths_BT = None
        if any(r.beyond is not None for r in ropes):
            seen = queries if keys is None else keys
            lengths_BT = rope.sequence_lengths(
                segment_ids_BT, seen.positions, seen.segments
            )
            if lengths_B is not None:
                lengths_BT = jnp.maximum(lengths_BT, lengths_B[:, None])
        return View(
            masks={
                window: Mask(queries, keys, window=window, causal=True)
                for window in dict.fromkeys(kind.window for kind in kinds)
            },
            rotations={r: rope.rotation(positions_BT, r, lengths_BT) for r in ropes},
            is_real=segment_ids_BT != 0,
            prefix=prefix,
        )

    def _position_vectors(self, positions_BT: jax.Array) -> jax.Array:
        """Learned vectors; NaN beyond the last, so that it does not go unnoticed."""
        assert self.positions is not None
        table = self.positions.weight[...].astype(self.compute_dtype)
        return table.at[positions_BT].get(mode="fill", fill_value=jnp.nan)

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, in the compute dtype."""
        logits = sum_terms(self.logit_terms(x_BTD))
        softcap = self.logit_softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def logit_terms(
        self, x_BTD: Float[Array, "B T D"], rng: Key[Array, ""] | None = None
    ) -> Terms:
        """The logits, before they are bent, as a sum of products with (V, ...)."""
        if isinstance(self.lm_head, TiedHead):
            return self.lm_head.terms(self.embedding, x_BTD, rng)
        return self.lm_head.terms(x_BTD, rng)

    def init_cache(self, batch_size: int, num_slots: int) -> Cache:
        """A cache with `num_slots` empty slots, after any virtual tokens'."""
        arch = self.arch
        num_virtual = num_virtual_tokens(self.prompt)
        cache = init_cache(
            arch.num_layers,
            batch_size,
            num_virtual + num_slots,
            arch.num_kv_heads,
            arch.head_dim,
            self.compute_dtype,
        )
        prefix = prefix_of(self.prompt, self.compute_dtype)
        if prefix is not None:
            return prefix.fill(cache)
        vectors = vectors_of(self.prompt)
        if vectors is None:
            return cache
        x_BND = jnp.broadcast_to(
            vectors.astype(self.compute_dtype), (batch_size, *vectors.shape)
        )
        places = virtual_places(batch_size, num_virtual)
        _, filled, _ = self._layers(x_BND, *places, cache, None, None, "none")
        assert filled is not None
        return filled

    def check_growth(self, num_tokens: int, max_tokens: int) -> None:
        """Checks that a cache can grow from one length to another.

        A longrope model turns all keys otherwise once a sequence has passed a limit,
        so what is cached before would be wrong after it.

        Raises:
          UserError: The growth passes such a limit.
        """
        if self.prompt is not None:
            num_tokens += self.prompt.num_tokens
            max_tokens += self.prompt.num_tokens
        for kind in self.arch.kinds:
            beyond = None if kind.rope is None else kind.rope.beyond
            if not isinstance(beyond, rope.Switch):
                continue
            if num_tokens <= beyond.limit < max_tokens:
                raise UserError(
                    f"a prompt of {num_tokens} tokens and {max_tokens - num_tokens} "
                    f"new ones pass {beyond.limit} tokens, where this model's rotary "
                    "embeddings change (longrope); shorten one of them, or give a "
                    f"prompt longer than {beyond.limit}"
                )
