"""Beam search: the likeliest texts, not the likeliest next tokens.

Source: `transformers/generation/utils.py`, `_beam_search`, which it equals token for
token, for decoders and encoder-decoders.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from fjft import tree
from fjft.generation.seq2seq import Special
from fjft.generation.steps import read_prompts, shard_cache
from fjft.models.cache import Cache
from fjft.models.half import EncoderDecoderCache
from fjft.sharding import constrain

WORST = -1e9  # the score of what must not win
EARLY_STOPPING = {False: 0, True: 1, "never": 2}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamChoice:
    """How texts are ranked and what ends them; the numbers are not compiled in.

    Attributes:
      max_new_tokens: Most tokens of a text; int32.
      length_penalty: A text's log-probability is divided by its length to this power;
        float32.
      early_stopping: A value of `EARLY_STOPPING`, int32. True: a row ends when it has
        as many texts as beams. False: when no beam as it is now could do better than
        the worst of them. "never": when none could if it grew to full length.
      stop_ids: Tokens that end a text, int32, [any number].
      special: For encoder-decoders.
    """

    max_new_tokens: ArrayLike
    length_penalty: ArrayLike
    early_stopping: ArrayLike
    stop_ids: ArrayLike
    special: Special | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """What the search carries from token to token; K is the number of beams.

    Attributes:
      cache: Keys and values of every beam's tokens but the last; B * K rows.
      positions: The position of each row's last token.
      tokens: New tokens of each beam, best first, Int32[B, K, M].
      scores: Log-probability of each.
      texts: Texts that have ended, best first, Int32[B, K, M].
      text_scores: Their scores; `WORST` where there is no text yet.
      text_lengths: Their tokens, the one that ended them included.
      has_ended: Which of them there are.
      is_open: Which rows could still find a better text.
      steps: Tokens of each beam so far.
      is_done: Whether the search is over.
    """

    cache: Cache | EncoderDecoderCache
    positions: Int[Array, "B"]
    tokens: Int[Array, "B K M"]
    scores: Float[Array, "B K"]
    texts: Int[Array, "B K M"]
    text_scores: Float[Array, "B K"]
    text_lengths: Int[Array, "B K"]
    has_ended: Bool[Array, "B K"]
    is_open: Bool[Array, "B"]
    steps: Int[Array, ""]
    is_done: Bool[Array, ""]


def search(
    params: tree.Params,
    input_ids_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    choice: BeamChoice,
    *,
    graphdef: nnx.GraphDef,
    num_tokens: int,
    num_beams: int,
) -> tuple[Int[Array, "B M"], Int[Array, "B"]]:
    """Finds each row's best text.

    Args:
      params: The model's arrays.
      input_ids_BT: Prompts, padded on the left.
      segment_ids_BT: 1 for tokens, 0 for padding; a row that is all padding never runs.
      choice: How texts are ranked.
      graphdef: The model's structure.
      num_tokens: M, room for new tokens.
      num_beams: K.

    Returns:
      Its tokens, and how many they are.
    """
    model = tree.merge(graphdef, params)
    cache, x_B1D, positions_B = read_prompts(
        model, input_ids_BT, segment_ids_BT, choice.special, num_tokens
    )
    is_real = segment_ids_BT[:, -1] != 0
    beams = _start(
        _repeat(cache, num_beams), positions_B, is_real, num_beams, num_tokens
    )
    logits_BV = model.unembed(x_B1D)[:, 0]
    logits_BKV = jnp.broadcast_to(
        logits_BV[:, None], (logits_BV.shape[0], num_beams, logits_BV.shape[1])
    )
    beams = _select(beams, logits_BKV, choice)

    def step(beams: Beams) -> Beams:
        B, K, _ = beams.tokens.shape
        last_BK = jax.lax.dynamic_index_in_dim(
            beams.tokens, beams.steps - 1, axis=2, keepdims=False
        )
        positions_B = beams.positions + 1
        last = last_BK.reshape(B * K, 1)
        x_B1D, cache = model.backbone(
            model.embed(last),
            jnp.repeat(positions_B, K)[:, None],
            jnp.ones_like(last),
            cache=beams.cache,
        )
        beams = dataclasses.replace(
            beams, cache=shard_cache(cache), positions=positions_B
        )
        return _select(beams, model.unembed(x_B1D)[:, 0].reshape(B, K, -1), choice)

    beams = jax.lax.while_loop(lambda beams: ~beams.is_done, step, beams)
    return (
        constrain(beams.texts[:, 0], None, None),
        constrain(beams.text_lengths[:, 0], None),
    )


# Compiled once for each structure and shape, and kept: weights come in as arguments.
search_jit: Any = jax.jit(
    search, static_argnames=("graphdef", "num_tokens", "num_beams")
)


def _start(
    cache: Any, positions_B: jax.Array, is_real: jax.Array, K: int, M: int
) -> Beams:
    """No tokens yet; all beams but the first are out, since they are the same."""
    B = positions_B.shape[0]
    nothing = jnp.zeros((B, K, M), jnp.int32)
    worst = jnp.full((B, K), WORST, jnp.float32)
    return Beams(
        cache=shard_cache(cache),
        positions=positions_B,
        tokens=nothing,
        scores=worst.at[:, 0].set(0.0),
        texts=nothing,
        text_scores=worst,
        text_lengths=jnp.zeros((B, K), jnp.int32),
        has_ended=jnp.broadcast_to(~is_real[:, None], (B, K)),
        is_open=is_real,
        steps=jnp.zeros((), jnp.int32),
        is_done=~jnp.any(is_real),
    )


def _select(
    beams: Beams, logits_BKV: Float[Array, "B K V"], choice: BeamChoice
) -> Beams:
    """Adds a token to every beam: keeps the best, and those that end as texts."""
    B, K, V = logits_BKV.shape
    logs = jax.nn.log_softmax(logits_BKV.astype(jnp.float32), axis=-1)
    if choice.special is not None:
        logs = choice.special.force(logs.reshape(B * K, V), beams.steps)
    totals = logs.reshape(B, K, V) + beams.scores[:, :, None]
    stop_ids = jnp.asarray(choice.stop_ids)
    # So many that K of them go on even if every stop token ends K beams.
    num_kept = min(max(2, 1 + stop_ids.shape[0]) * K, K * V)
    scores_BC, index_BC = jax.lax.top_k(totals.reshape(B, K * V), num_kept)
    beam_BC, token_BC = index_BC // V, index_BC % V
    tokens_BCM = _pick(beams.tokens, beam_BC).at[:, :, beams.steps].set(token_BC)
    steps = beams.steps + 1
    stops = jnp.any(token_BC[:, :, None] == stop_ids[None, None], axis=-1)
    stops |= steps >= choice.max_new_tokens

    scores_BC_open = scores_BC + jnp.where(stops, WORST, 0.0)
    scores_BK, chosen_BK = jax.lax.top_k(scores_BC_open, K)
    ended = _end(beams, tokens_BCM, scores_BC, stops, steps, choice)
    beams = dataclasses.replace(
        ended,
        cache=_reorder(beams.cache, _pick(beam_BC, chosen_BK)),
        tokens=_pick(tokens_BCM, chosen_BK),
        scores=scores_BK,
        steps=steps,
    )
    return _close(beams, jnp.all(stops), choice)


def _end(
    beams: Beams,
    tokens_BCM: jax.Array,
    scores_BC: jax.Array,
    stops_BC: jax.Array,
    steps: jax.Array,
    choice: BeamChoice,
) -> Beams:
    """Puts the candidates that ended, of the K best, among the row's texts."""
    K = beams.scores.shape[1]
    ends = stops_BC & (jnp.arange(stops_BC.shape[1]) < K)[None]
    is_full = jnp.all(beams.has_ended, axis=1) & (_early(choice) == 1)
    is_shut = (is_full | ~beams.is_open)[:, None]
    scores = scores_BC / _length_factor(steps, choice)
    scores = scores + jnp.where(is_shut, WORST, 0.0) + jnp.where(ends, 0.0, WORST)

    def merge(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old, new], axis=1)

    best, chosen = jax.lax.top_k(merge(beams.text_scores, scores), K)
    lengths = jnp.broadcast_to(steps, ends.shape)
    return dataclasses.replace(
        beams,
        texts=_pick(merge(beams.texts, tokens_BCM), chosen),
        text_scores=best,
        text_lengths=_pick(merge(beams.text_lengths, lengths), chosen),
        has_ended=_pick(merge(beams.has_ended, ends & ~is_shut), chosen),
    )


def _close(beams: Beams, all_stop: jax.Array, choice: BeamChoice) -> Beams:
    """Closes rows that can do no better, and ends the search when none is left."""
    early = _early(choice)
    grows = (early == 2) & (jnp.asarray(choice.length_penalty) > 0)
    length = jnp.where(grows, choice.max_new_tokens, beams.steps)
    hope_B1 = beams.scores[:, :1] / _length_factor(length, choice)
    worst_B1 = jnp.min(beams.text_scores, axis=1, keepdims=True)
    bar_BK = jnp.where(beams.has_ended, worst_B1, WORST)
    is_open = beams.is_open & jnp.any(hope_B1 > bar_BK, axis=1)
    all_full = jnp.all(beams.has_ended) & (early == 1)
    return dataclasses.replace(
        beams, is_open=is_open, is_done=~jnp.any(is_open) | all_full | all_stop
    )


def _early(choice: BeamChoice) -> jax.Array:
    return jnp.asarray(choice.early_stopping)


def _length_factor(length: jax.Array, choice: BeamChoice) -> jax.Array:
    return length.astype(jnp.float32) ** jnp.asarray(choice.length_penalty, jnp.float32)


def _pick(x_BC: jax.Array, index_BK: jax.Array) -> jax.Array:
    """Of each row of `x` the entries that the row of `index` names."""
    return jax.vmap(lambda row, index: row[index])(x_BC, index_BK)


def _repeat(cache: Any, K: int) -> Any:
    """Every row K times, one after another."""

    def repeat(part: Cache) -> Cache:
        return dataclasses.replace(
            part,
            keys=jnp.repeat(part.keys, K, axis=1),
            values=jnp.repeat(part.values, K, axis=1),
            positions=jnp.repeat(part.positions, K, axis=0),
            segment_ids=jnp.repeat(part.segment_ids, K, axis=0),
        )

    return jax.tree.map(repeat, cache, is_leaf=lambda x: isinstance(x, Cache))


def _reorder(cache: Any, beam_BK: Int[Array, "B K"]) -> Any:
    """Gives each beam the keys and values of the beam that it goes on from.

    All beams of a row have the same positions, and look at the same source.
    """
    if isinstance(cache, EncoderDecoderCache):
        return dataclasses.replace(cache, tokens=_reorder(cache.tokens, beam_BK))
    B, K = beam_BK.shape

    def reorder(x: jax.Array) -> jax.Array:
        by_row = x.reshape(x.shape[0], B, K, *x.shape[2:])
        picked = jax.vmap(lambda row, beam: row[:, beam], (1, 0), 1)(by_row, beam_BK)
        return picked.reshape(x.shape)

    return dataclasses.replace(
        cache, keys=reorder(cache.keys), values=reorder(cache.values)
    )
