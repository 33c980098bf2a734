"""Generates text: prompts and chats in, new text out, whole or as it is made."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fjft.errors import UserError
from fjft.generation.decode import (
    Config,
    check_prompts,
    generate_tokens,
    stop_ids_of,
    stream_tokens,
)
from fjft.generation.detokenize import Detokenizer

Messages = Sequence[Mapping[str, Any]]
Prompts = str | Messages | Sequence[str | Messages]


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
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    forced_bos_token_id: int | None = None,
    decoder_start_token_id: int | None = None,
) -> list[str]:
    """Continues prompts; an encoder-decoder answers them.

    Args:
      model: A causal language model, or an encoder-decoder.
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
      num_beams: Beams of a beam search; 1 is none.
      length_penalty: Beam search divides a text's log-probability by its length to
        this power.
      early_stopping: True: beam search ends when there are as many texts as beams;
        False: when no beam as it is now could do better; "never": when none could if
        it grew to full length.
      forced_bos_token_id: What every text of an encoder-decoder begins with, such as
        mBART's target language; None is what its generation config names.
      decoder_start_token_id: What its decoder reads first; None likewise.

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
        stop_token_ids=stop_ids_of(model, tokenizer, stop_token_ids),
        batch_size=batch_size,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        forced_bos_token_id=forced_bos_token_id,
        decoder_start_token_id=decoder_start_token_id,
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
        stop_token_ids=stop_ids_of(model, tokenizer, stop_token_ids),
    )
    ids = encode_prompts(tokenizer, prompts)
    check_prompts(model, ids, config)
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


def ask(tokenizer: Any, prompt: str, system: str = "") -> str | Messages:
    """A question as a chat, where the tokenizer can write chats; else as it is.

    Args:
      tokenizer: It has a chat template, or has not.
      prompt: The question.
      system: What stands before it in a chat; "" is nothing.
    """
    if tokenizer.chat_template is None:
        return prompt
    chat = [{"role": "system", "content": system}] if system else []
    return [*chat, {"role": "user", "content": prompt}]


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
