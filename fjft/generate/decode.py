"""Generates: prompts in, new tokens or text out."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fjft import tree
from fjft.errors import UserError
from fjft.generate.detokenize import Detokenizer
from fjft.generate.steps import Choice, State, decode_jit, prefill_jit
from fjft.sharding import batch_sharding, data_shards

SMALLEST_BUCKET = 16
STREAM_STEPS = 4  # tokens between two looks at what has been made

Messages = Sequence[Mapping[str, Any]]
Prompts = str | Messages | Sequence[str | Messages]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How to generate; names as in transformers' generation config.

    Attributes:
      max_new_tokens: Most tokens after a prompt, the one that ends it included.
      temperature: Divides the logits; 0 takes the likeliest token every time.
      top_k: Draws from so many likeliest tokens; 0 is all.
      top_p: Draws from the fewest likeliest tokens that reach this probability.
      seed: Of the draws.
      stop_token_ids: Tokens that end a text; None takes the model's own.
      batch_size: Prompts at a time.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] | None = None
    batch_size: int = 32

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (all)"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
        }
        for name, (fits, allowed) in checks.items():
            if not fits:
                raise UserError(f"{name}={getattr(self, name)!r}: it must be {allowed}")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token_ids: Sequence[int] | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Continues prompts.

    Args:
      model: A causal language model.
      tokenizer: Its Hugging Face tokenizer.
      prompts: One prompt or a list. A prompt is a string, tokenized as it is, or a
        chat, `[{"role": "user", "content": "Hello"}]`, put through the tokenizer's
        chat template.
      max_new_tokens: Most tokens after a prompt.
      temperature: Divides the logits; 0 takes the likeliest token every time.
      top_k: Draws from so many likeliest tokens; 0 is all.
      top_p: Draws from the fewest likeliest tokens that reach this probability.
      seed: Of the draws.
      stop_token_ids: Tokens that end a text; None is those that the model's generation
        config and the tokenizer name.
      batch_size: Prompts at a time.

    Returns:
      For each prompt the new text, without special tokens; for one prompt a list too.

    Raises:
      UserError: An option is out of range, or a prompt is empty, or too long for the
        model's positions.
    """
    config = Config(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_token_ids=_stop_ids(model, tokenizer, stop_token_ids),
        batch_size=batch_size,
    )
    ids = encode_prompts(tokenizer, prompts)
    detokenizer = Detokenizer(tokenizer, config.stop_token_ids or ())
    return [detokenizer.text(row) for row in generate_tokens(model, ids, config)]


def stream(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token_ids: Sequence[int] | None = None,
) -> Iterator[list[str]]:
    """Continues prompts and hands out the text while it is made.

    Args are those of `generate`; all prompts run at a time.

    Yields:
      The new piece of each prompt's text, "" where there is none yet. Pieces never end
      within a character, and joined they are what `generate` returns.
    """
    config = Config(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_token_ids=_stop_ids(model, tokenizer, stop_token_ids),
    )
    ids = encode_prompts(tokenizer, prompts)
    _check(model, ids, config)
    return _stream_pieces(model, tokenizer, ids, config)


def _stream_pieces(
    model: Any, tokenizer: Any, ids: list[list[int]], config: Config
) -> Iterator[list[str]]:
    stop_ids = config.stop_token_ids or ()
    detokenizers = [Detokenizer(tokenizer, stop_ids) for _ in ids]
    tokens: list[list[int]] = [[] for _ in ids]
    for tokens in stream_tokens(model, ids, config):
        pieces = [d.push(row) for d, row in zip(detokenizers, tokens, strict=True)]
        if any(pieces):
            yield pieces
    rest = [d.finish(row) for d, row in zip(detokenizers, tokens, strict=True)]
    if any(rest):
        yield rest


def generate_tokens(
    model: Any, prompts: Sequence[Sequence[int]], config: Config
) -> list[list[int]]:
    """Continues prompts of token ids.

    Returns:
      For each prompt its new tokens; the last is a stop token unless `max_new_tokens`
      cut the row short.

    Raises:
      UserError: A prompt is empty, or too long for the model's positions.
    """
    _check(model, prompts, config)
    tokens: list[list[int]] = []
    # Groups of one size, so that the last one compiles nothing anew.
    num_rows = min(len(prompts), config.batch_size)
    for start in range(0, len(prompts), config.batch_size):
        group = prompts[start : start + config.batch_size]
        ends = [config.max_new_tokens]
        *_, made = _run(model, group, config, ends, num_rows)
        tokens += made
    return tokens


def stream_tokens(
    model: Any, prompts: Sequence[Sequence[int]], config: Config
) -> Iterator[list[list[int]]]:
    """Continues prompts of token ids, and yields each row's tokens so far."""
    _check(model, prompts, config)
    if prompts:
        ends = [*range(1, config.max_new_tokens, STREAM_STEPS), config.max_new_tokens]
        yield from _run(model, prompts, config, ends, len(prompts))


def encode_prompts(tokenizer: Any, prompts: Prompts) -> list[list[int]]:
    """Token ids of one prompt or several; see `generate`.

    Raises:
      UserError: A chat, but the tokenizer has no chat template.
    """
    single = isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping))
    ids = []
    for prompt in [prompts] if single else prompts:
        if isinstance(prompt, str):
            ids.append(list(tokenizer(prompt)["input_ids"]))
            continue
        if tokenizer.chat_template is None:
            raise UserError(
                "the prompt is a chat, but the tokenizer has no chat template; give "
                "the prompt as a string, or set tokenizer.chat_template"
            )
        encoded = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        ids.append(list(encoded["input_ids"]))
    return ids


def _run(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: Config,
    ends: Sequence[int],
    num_rows: int,
) -> Iterator[list[list[int]]]:
    """Decodes up to each of `ends` in turn and yields the tokens so far."""
    graphdef, params = _structure(model)
    mesh = _mesh(params)
    input_ids, segment_ids = (_place(x, mesh) for x in _pad(prompts, num_rows, mesh))
    choice = Choice(
        seed=np.uint32(config.seed % 2**32),
        temperature=np.float32(config.temperature),
        top_k=np.int32(config.top_k),
        top_p=np.float32(config.top_p),
        stop_ids=np.array(_stop_ids(model, None, config.stop_token_ids), np.int32),
    )
    num_tokens = _bucket(config.max_new_tokens)
    # The mesh is not held across a yield: the caller's code runs there.
    with _use(mesh):
        state: State = prefill_jit(
            params,
            input_ids,
            segment_ids,
            choice,
            graphdef=graphdef,
            num_tokens=num_tokens,
        )
    for end in ends:
        with _use(mesh):
            state = decode_jit(params, state, choice, np.int32(end), graphdef=graphdef)
        tokens, lengths, stopped = jax.device_get(
            (state.tokens, state.lengths, state.stopped)
        )
        yield [tokens[i, : lengths[i]].tolist() for i in range(len(prompts))]
        if stopped.all():
            return


def _structure(model: Any) -> tuple[Any, tree.Params]:
    """Structure and arrays; equal structures compare equal, wherever they came from."""
    graphdef, params = tree.split(model)
    if model.provenance is not None:
        # What is compiled must neither hang on to files nor differ because of them.
        bare = tree.merge(graphdef, params)
        bare.provenance = None
        graphdef, params = tree.split(bare)
    return graphdef, params


def _mesh(params: tree.Params) -> Mesh | None:
    for leaf in params.values():
        if isinstance(leaf.sharding, NamedSharding):
            return leaf.sharding.mesh  # type: ignore[return-value]
    return None


def _use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _pad(
    prompts: Sequence[Sequence[int]], num_rows: int, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and segments, [B, T], padded on the left and with empty rows."""
    shards = 1 if mesh is None else data_shards(mesh)
    num_rows = -(-num_rows // shards) * shards
    length = _bucket(max(len(prompt) for prompt in prompts))
    input_ids = np.zeros((num_rows, length), np.int32)
    segment_ids = np.zeros((num_rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    return input_ids, segment_ids


def _bucket(size: int) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def _place(array: np.ndarray, mesh: Mesh | None) -> Any:
    if mesh is None:
        return array
    return jax.make_array_from_callback(
        array.shape, batch_sharding(mesh), lambda index: array[index]
    )


def _stop_ids(
    model: Any, tokenizer: Any, given: Sequence[int] | None
) -> tuple[int, ...]:
    """The given ones, or all that model and tokenizer name."""
    if given is not None:
        return tuple(given)
    named: list[Any] = [None if tokenizer is None else tokenizer.eos_token_id]
    if model.provenance is not None:
        files = model.provenance.files
        named.append((files.generation_config or {}).get("eos_token_id"))
        named.append(files.config.eos_token_id)
    ids: list[Any] = []
    for entry in named:
        ids += entry if isinstance(entry, list | tuple) else [entry]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _check(model: Any, prompts: Sequence[Sequence[int]], config: Config) -> None:
    limit = None
    if model.provenance is not None:
        limit = model.provenance.files.config.max_position_embeddings
    vocab_size = model.arch.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} has no tokens; give it at least one")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise UserError(
                f"prompt {number} has the token {wrong[0]}, but the model knows 0 to "
                f"{vocab_size - 1}; use the model's own tokenizer"
            )
        total = len(prompt) + config.max_new_tokens
        if limit is not None and total > limit:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, with max_new_tokens="
                f"{config.max_new_tokens} that is {total}, but the model has "
                f"{limit} positions (max_position_embeddings); shorten one of them"
            )
