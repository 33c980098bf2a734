"""What generation needs more for models that read one text and write another."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from fjft.errors import UserError
from fjft.generation.rows import pad_stop_ids
from fjft.models.encoder_decoder import EncoderDecoder
from fjft.models.half import EncoderDecoderCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Special:
    """Tokens with a fixed place in what an encoder-decoder writes; -1 is no token.

    Attributes:
      start_id: What the decoder reads first; it is no part of the text. int32.
      first_id: What every text begins with, such as mBART's language; int32.
      last_ids: One of these is the last token of a text of full length; int32, [any].
      last_step: The number of the last token of such a text; int32.
      never_ids: What no text has, such as Marian's padding; int32, [any].
    """

    start_id: ArrayLike
    first_id: ArrayLike
    last_ids: ArrayLike
    last_step: ArrayLike
    never_ids: ArrayLike

    def force(
        self, scores_BV: Float[Array, "B V"], step: Int[Array, ""]
    ) -> Float[Array, "B V"]:
        """Scores in which every token is impossible that may not be number `step`."""
        ids_V = jnp.arange(scores_BV.shape[-1], dtype=jnp.int32)

        def only(when: jax.Array, allowed_V: jax.Array, scores_BV: jax.Array):
            alone_1V = jnp.where(allowed_V, 0.0, -jnp.inf).astype(scores_BV.dtype)[None]
            applies = when & jnp.any(allowed_V)
            return jnp.where(applies, alone_1V, scores_BV)

        never_V = _is_any_of(ids_V, self.never_ids)
        scores_BV = jnp.where(never_V[None], -jnp.inf, scores_BV)
        scores_BV = only(step == 0, ids_V == self.first_id, scores_BV)
        is_last = step == self.last_step
        return only(is_last, _is_any_of(ids_V, self.last_ids), scores_BV)


def _is_any_of(ids_V: jax.Array, some: ArrayLike) -> jax.Array:
    return jnp.any(ids_V[:, None] == jnp.asarray(some)[None], axis=1)


def read_source(
    model: EncoderDecoder,
    input_ids_BE: Int[Array, "B E"],
    segment_ids_BE: Int[Array, "B E"],
    special: Special,
    num_tokens: int,
) -> tuple[EncoderDecoderCache, Float[Array, "B 1 D"], Int[Array, "B"]]:
    """Encodes the source and lets the decoder read its start token.

    Args:
      model: The model.
      input_ids_BE: What it reads.
      segment_ids_BE: 1 for tokens, 0 for padding.
      special: Names the start token.
      num_tokens: Room for new tokens.

    Returns:
      The cache, the start token's hidden states, and its positions.
    """
    memory = model.encode(input_ids_BE, None, segment_ids_BE)
    cache = model.init_cache(memory, num_tokens + 1)
    start_B1 = jnp.full_like(input_ids_BE[:, :1], special.start_id)
    segments_B1 = (jnp.max(segment_ids_BE, axis=1, keepdims=True) > 0).astype(jnp.int32)
    positions_B1 = jnp.zeros_like(start_B1)
    x_B1D, cache = model.backbone(
        model.embed(start_B1), positions_B1, segments_B1, cache=cache
    )
    assert cache is not None
    return cache, x_B1D, positions_B1[:, 0]


def special_tokens(
    model: Any,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    forced_bos_token_id: int | None = None,
    decoder_start_token_id: int | None = None,
) -> Special | None:
    """An encoder-decoder's special tokens, None for other models.

    They are those of the generation config, or of the config where there is none. Of
    `bad_words_ids` only words of one token are heeded.

    Args:
      model: The model.
      max_new_tokens: Most tokens of a text.
      stop_ids: What ends a text; none of these is ever forbidden.
      forced_bos_token_id: The first token, instead of the config's.
      decoder_start_token_id: What the decoder reads first, instead of the config's.

    Raises:
      UserError: Nothing says what the decoder reads first, or a token is given to a
        model that has no place for it, or is not in the vocabulary.
    """
    given = {
        "forced_bos_token_id": forced_bos_token_id,
        "decoder_start_token_id": decoder_start_token_id,
    }
    given = {name: token for name, token in given.items() if token is not None}
    if not isinstance(model, EncoderDecoder):
        if given:
            raise UserError(f"{', '.join(given)} is for encoder-decoders only")
        return None
    vocab_size = model.arch.decoder_vocab_size
    for name, token in given.items():
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}={token}: the model writes 0 to {vocab_size - 1}")
    named: dict[str, Any] = dict(_named(model)) | given
    start_id = named.get("decoder_start_token_id")
    if start_id is None:
        start_id = named.get("bos_token_id")
    if start_id is None:
        start_id = model.arch.start_id
    if start_id is None:
        raise UserError(
            "the model's config does not say what its decoder starts with; give "
            "decoder_start_token_id="
        )
    first_id = named.get("forced_bos_token_id")
    never = [ids[0] for ids in named.get("bad_words_ids") or () if len(ids) == 1]
    never = [token for token in never if token not in stop_ids]
    last = named.get("forced_eos_token_id")
    return Special(
        start_id=np.int32(start_id),
        first_id=np.int32(-1 if first_id is None else first_id),
        last_ids=pad_stop_ids(_as_tuple(last)),
        last_step=np.int32(max_new_tokens - 1),
        never_ids=pad_stop_ids((*never, *_as_tuple(named.get("suppress_tokens")))),
    )


def _named(model: EncoderDecoder) -> Mapping[str, Any]:
    if model.provenance is None:
        return {}
    files = model.provenance.files
    if files.generation_config is not None:
        return files.generation_config
    # transformers' configs drop such options; the file as written still has them.
    return {**files.config.to_dict(), **files.config_dict}


def _as_tuple(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
