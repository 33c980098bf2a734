"""What runs on the devices: reading the prompts, then one token after another."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from fjft import tree
from fjft.generation.sampling import sample
from fjft.generation.seq2seq import Special, read_source
from fjft.models.cache import Cache
from fjft.models.half import EncoderDecoderCache
from fjft.sharding import RULES, constrain

# Prompt tokens that go through the layers at a time, which bounds the memory that
# attention takes; prompts are padded to powers of two, so it divides the longer ones.
PREFILL_TOKENS = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """How tokens are picked and what ends a row; the numbers are not compiled in.

    Attributes:
      seed: Of all draws, uint32.
      temperature: See `sample`; float32, or None for greedy.
      top_k: See `sample`; int32.
      top_p: See `sample`; float32.
      stop_ids: Tokens that end a row, int32, [any number].
      special: For encoder-decoders.
    """

    seed: ArrayLike
    temperature: ArrayLike | None
    top_k: ArrayLike
    top_p: ArrayLike
    stop_ids: ArrayLike
    special: Special | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What decoding carries from token to token.

    Attributes:
      cache: Keys and values of all tokens but the last; an `EncoderDecoderCache` has
        the source's too.
      tokens: New tokens, Int32[B, M]; those after a row's end mean nothing.
      lengths: New tokens of each row, the one that ended it included.
      positions: The position of each row's last token.
      stopped: Which rows have ended.
      steps: Tokens made so far in rows that have not ended.
    """

    cache: Cache | EncoderDecoderCache
    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    positions: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    steps: Int[Array, ""]


def prefill(
    params: tree.Params,
    input_ids_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    choice: Choice,
    *,
    graphdef: nnx.GraphDef,
    num_tokens: int,
) -> State:
    """Reads the prompts and picks each row's first token.

    Args:
      params: The model's arrays.
      input_ids_BT: Prompts, padded on the left; a whole multiple of `PREFILL_TOKENS`
        when longer than that.
      segment_ids_BT: 1 for tokens, 0 for padding; a row that is all padding never runs.
      choice: How tokens are picked.
      graphdef: The model's structure.
      num_tokens: Room for new tokens.
    """
    model = tree.merge(graphdef, params)
    cache, x_B1D, positions_B = read_prompts(
        model, input_ids_BT, segment_ids_BT, choice.special, num_tokens
    )
    B = input_ids_BT.shape[0]
    state = State(
        cache=cache,
        tokens=jnp.zeros((B, num_tokens), jnp.int32),
        lengths=jnp.zeros((B,), jnp.int32),
        positions=positions_B,
        stopped=segment_ids_BT[:, -1] == 0,
        steps=jnp.zeros((), jnp.int32),
    )
    return _replicate(_pick(state, model.unembed(x_B1D)[:, 0], choice))


def read_prompts(
    model: Any,
    input_ids_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    special: Special | None,
    num_tokens: int,
) -> tuple[Any, Float[Array, "B 1 D"], Int[Array, "B"]]:
    """Runs the prompts through the model; arguments as in `prefill`.

    Returns:
      The cache with room for `num_tokens` more, the hidden states from which the first
      new token is picked, and the position of the token before that.
    """
    if special is not None:
        cache, x_B1D, positions_B = read_source(
            model, input_ids_BT, segment_ids_BT, special, num_tokens
        )
        return shard_cache(cache), x_B1D, positions_B
    B, T = input_ids_BT.shape
    positions_BT = jnp.maximum(jnp.cumsum(segment_ids_BT, axis=1) - 1, 0)
    lengths_B = jnp.sum(segment_ids_BT, axis=1)
    size = min(T, PREFILL_TOKENS)

    def read(cache, chunk):
        input_ids, positions, segment_ids = chunk
        x, cache = model.backbone(
            model.embed(input_ids),
            positions,
            segment_ids,
            cache=cache,
            lengths_B=lengths_B,
        )
        return cache, x[:, -1:]

    chunks = tuple(
        jnp.swapaxes(x.reshape(B, T // size, size), 0, 1)
        for x in (input_ids_BT, positions_BT, segment_ids_BT)
    )
    cache = shard_cache(model.init_cache(B, T + num_tokens))
    cache, last_CB1D = jax.lax.scan(read, cache, chunks)
    return cache, last_CB1D[-1], positions_BT[:, -1]


def decode(
    params: tree.Params,
    state: State,
    choice: Choice,
    until: Int[Array, ""],
    *,
    graphdef: nnx.GraphDef,
) -> State:
    """Makes tokens until there are `until` in a row, or all rows have ended."""
    model = tree.merge(graphdef, params)

    def unfinished(state):
        return (state.steps < until) & ~jnp.all(state.stopped)

    def step(state):
        last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens, state.steps - 1, 1, axis=1)
        positions_B1 = state.positions[:, None] + 1
        x_B1D, cache = model.backbone(
            model.embed(last_B1),
            positions_B1,
            jnp.ones_like(last_B1),
            cache=state.cache,
        )
        state = dataclasses.replace(
            state, cache=shard_cache(cache), positions=positions_B1[:, 0]
        )
        return _pick(state, model.unembed(x_B1D)[:, 0], choice)

    return _replicate(jax.lax.while_loop(unfinished, step, state))


# Compiled once for each structure and shape, and kept: weights come in as arguments.
prefill_jit: Any = jax.jit(prefill, static_argnames=("graphdef", "num_tokens"))
decode_jit: Any = jax.jit(decode, static_argnames="graphdef", donate_argnames="state")


def _pick(state: State, logits_BV: Float[Array, "B V"], choice: Choice) -> State:
    """Appends the next token to every row that has not ended."""
    if choice.special is not None:
        logits_BV = choice.special.force(logits_BV, state.steps)
    token_B = sample(
        logits_BV,
        jax.random.fold_in(jax.random.key(choice.seed), state.steps),
        temperature=0.0 if choice.temperature is None else choice.temperature,
        top_k=choice.top_k,
        top_p=choice.top_p,
    )
    stops_B = jnp.any(token_B[:, None] == jnp.asarray(choice.stop_ids)[None], axis=-1)
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice(
            state.tokens, token_B[:, None], (jnp.int32(0), state.steps)
        ),
        lengths=state.lengths + (~state.stopped).astype(jnp.int32),
        stopped=state.stopped | stops_B,
        steps=state.steps + 1,
    )


def shard_cache(cache: Any) -> Any:
    """Lays rows over data and fsdp, and heads over tensor if they divide evenly."""
    return jax.tree.map(_shard, cache, is_leaf=lambda part: isinstance(part, Cache))


def _shard(cache: Cache) -> Cache:
    mesh = jax.sharding.get_abstract_mesh()
    axis = RULES["kv_heads"]
    divides = not mesh.empty and cache.keys.shape[3] % mesh.shape[axis] == 0
    heads = "kv_heads" if divides else None
    return dataclasses.replace(
        cache,
        keys=constrain(cache.keys, "layers", "batch", None, heads, None),
        values=constrain(cache.values, "layers", "batch", None, heads, None),
    )


def _replicate(state: State) -> State:
    """Puts what the host reads on every device, so that every process can read it."""
    return dataclasses.replace(
        state,
        tokens=constrain(state.tokens, None, None),
        lengths=constrain(state.lengths, None),
        stopped=constrain(state.stopped, None),
    )
