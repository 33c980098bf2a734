"""Generates: prompts of token ids in, new tokens out."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fjft.distributed import fetch
from fjft.errors import UserError
from fjft.generation.beam import EARLY_STOPPING, BeamChoice, search_jit
from fjft.generation.rows import (
    bucket,
    mesh_of,
    pad_left,
    pad_stop_ids,
    put,
    structure,
    use_mesh,
)
from fjft.generation.seq2seq import Special, special_tokens
from fjft.generation.steps import Choice, State, decode_jit, prefill_jit
from fjft.models.encoder_decoder import EncoderDecoder

STREAM_STEPS = 4  # tokens between two looks at what has been made


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
      num_beams: Beams of a beam search, which finds likelier texts; 1 is none.
      length_penalty: Beam search divides a text's log-probability by its length to
        this power: above 0 it favours long texts.
      early_stopping: When beam search ends; see `beam.BeamChoice`.
      forced_bos_token_id: What every text of an encoder-decoder begins with, such as
        mBART's target language; None takes the model's own.
      decoder_start_token_id: What its decoder reads first; None likewise.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] | None = None
    batch_size: int = 32
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    forced_bos_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (all)"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "num_beams": (self.num_beams >= 1, "at least 1 (no beam search)"),
            "early_stopping": (
                self.early_stopping in EARLY_STOPPING,
                f"one of {list(EARLY_STOPPING)}",
            ),
        }
        for name, (fits, allowed) in checks.items():
            if not fits:
                raise UserError(f"{name}={getattr(self, name)!r}: it must be {allowed}")
        if self.num_beams > 1 and self.temperature:
            raise UserError(
                f"num_beams={self.num_beams} draws nothing, so temperature="
                f"{self.temperature} has no use; set one of them to its default"
            )


def generate_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: Config,
    num_rows: int | None = None,
) -> list[list[int]]:
    """Continues prompts of token ids.

    Args:
      model: What continues them.
      prompts: Token ids.
      config: How.
      num_rows: Rows of a group, the rest of which is padding, so that calls with fewer
        prompts compile nothing anew; None is as many as there are prompts, at most
        `config.batch_size`.

    Returns:
      For each prompt its new tokens; the last is a stop token unless `max_new_tokens`
      cut the row short.

    Raises:
      UserError: A prompt is empty, or too long for the model's positions.
    """
    check_prompts(model, prompts, config)
    tokens: list[list[int]] = []
    # Groups of one size, so that the last one compiles nothing anew.
    num_rows = num_rows or min(len(prompts), config.batch_size)
    for start in range(0, len(prompts), config.batch_size):
        group = prompts[start : start + config.batch_size]
        if config.num_beams > 1:
            made = _search(model, group, config, num_rows)
        else:
            *_, made = _run(model, group, config, [config.max_new_tokens], num_rows)
        tokens += made
    return tokens


def stream_tokens(
    model: Any, prompts: Sequence[Sequence[int]], config: Config
) -> Iterator[list[list[int]]]:
    """Continues prompts of token ids, and yields each row's tokens so far."""
    check_prompts(model, prompts, config)
    if prompts:
        ends = [*range(1, config.max_new_tokens, STREAM_STEPS), config.max_new_tokens]
        yield from _run(model, prompts, config, ends, len(prompts))


def _run(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: Config,
    ends: Sequence[int],
    num_rows: int,
) -> Iterator[list[list[int]]]:
    """Decodes up to each of `ends` in turn and yields the tokens so far."""
    graphdef, params = structure(model)
    mesh = mesh_of(params)
    input_ids, segment_ids = (put(x, mesh) for x in pad_left(prompts, num_rows, mesh))
    stop_ids = stop_ids_of(model, None, config.stop_token_ids)
    choice = Choice(
        seed=np.uint32(config.seed % 2**32),
        temperature=np.float32(config.temperature) if config.temperature else None,
        top_k=np.int32(config.top_k),
        top_p=np.float32(config.top_p),
        stop_ids=pad_stop_ids(stop_ids),
        special=_special(model, config, stop_ids),
    )
    num_tokens = bucket(config.max_new_tokens)
    # The mesh is not held across a yield: the caller's code runs there.
    with use_mesh(mesh):
        state: State = prefill_jit(
            params,
            input_ids,
            segment_ids,
            choice,
            graphdef=graphdef,
            num_tokens=num_tokens,
        )
    for end in ends:
        with use_mesh(mesh):
            state = decode_jit(params, state, choice, np.int32(end), graphdef=graphdef)
        tokens, lengths, stopped = fetch((state.tokens, state.lengths, state.stopped))
        yield [tokens[i, : lengths[i]].tolist() for i in range(len(prompts))]
        if stopped.all():
            return


def _search(
    model: Any, prompts: Sequence[Sequence[int]], config: Config, num_rows: int
) -> list[list[int]]:
    """The best text that beam search finds for each prompt."""
    graphdef, params = structure(model)
    mesh = mesh_of(params)
    input_ids, segment_ids = (put(x, mesh) for x in pad_left(prompts, num_rows, mesh))
    stop_ids = stop_ids_of(model, None, config.stop_token_ids)
    choice = BeamChoice(
        max_new_tokens=np.int32(config.max_new_tokens),
        length_penalty=np.float32(config.length_penalty),
        early_stopping=np.int32(EARLY_STOPPING[config.early_stopping]),
        stop_ids=np.array(stop_ids, np.int32),
        special=_special(model, config, stop_ids),
    )
    with use_mesh(mesh):
        found = search_jit(
            params,
            input_ids,
            segment_ids,
            choice,
            graphdef=graphdef,
            num_tokens=bucket(config.max_new_tokens),
            num_beams=config.num_beams,
        )
    tokens, lengths = fetch(found)
    return [tokens[i, : lengths[i]].tolist() for i in range(len(prompts))]


def _special(model: Any, config: Config, stop_ids: tuple[int, ...]) -> Special | None:
    return special_tokens(
        model,
        config.max_new_tokens,
        stop_ids,
        forced_bos_token_id=config.forced_bos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )


def stop_ids_of(
    model: Any, tokenizer: Any, given: Sequence[int] | None
) -> tuple[int, ...]:
    """The given ones, or all that model and tokenizer name."""
    if given is not None:
        return tuple(given)
    named: list[Any] = [None if tokenizer is None else tokenizer.eos_token_id]
    if model.provenance is not None:
        files = model.provenance.files
        named.append((files.generation_config or {}).get("eos_token_id"))
        named.append(getattr(files.config, "eos_token_id", None))
    ids: list[Any] = []
    for entry in named:
        ids += entry if isinstance(entry, list | tuple) else [entry]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], config: Config) -> None:
    """Checks that a model can continue these prompts.

    Raises:
      UserError: It cannot generate, or a prompt is empty, of another vocabulary or too
        long.
    """
    if not hasattr(model, "init_cache"):
        raise UserError(
            f"a {type(model).__name__} cannot generate; load a causal language model"
        )
    limit = None
    if model.provenance is not None:
        config_of_model = model.provenance.files.config
        limit = getattr(config_of_model, "max_position_embeddings", None)
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
        if isinstance(model, EncoderDecoder):
            _check_lengths(number, len(prompt), config.max_new_tokens, limit)
            continue
        total = len(prompt) + config.max_new_tokens
        if limit is not None and total > limit:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, with max_new_tokens="
                f"{config.max_new_tokens} that is {total}, but the model has "
                f"{limit} positions (max_position_embeddings); shorten one of them"
            )
        model.check_growth(len(prompt), total)


def _check_lengths(
    number: int, length: int, max_new_tokens: int, limit: int | None
) -> None:
    """An encoder-decoder counts the positions of the two texts apart."""
    longest = max(length, max_new_tokens)
    if limit is not None and longest > limit:
        raise UserError(
            f"prompt {number} has {length} tokens, max_new_tokens={max_new_tokens}, "
            f"but the model has {limit} positions (max_position_embeddings) for "
            "each of the two; shorten it"
        )
