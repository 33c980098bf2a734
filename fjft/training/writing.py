"""Evaluation by what a model writes: held-out questions, answered and compared."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fjft.data.examples import Examples
from fjft.data.sources import list_specs
from fjft.errors import UserError
from fjft.evaluate.overlap import make_metrics
from fjft.evaluate.predictions import Writer
from fjft.evaluate.sequences import Tally, Written
from fjft.experiment import Experiment
from fjft.generation.decode import Config, generate_tokens, stop_ids_of
from fjft.generation.detokenize import Detokenizer


def judge_texts(
    experiment: Experiment,
    model: Any,
    tokenizer: Any,
    examples: Examples,
    writer: Writer | None = None,
) -> dict[str, float]:
    """Lets a model answer each example's question, greedily, and compares.

    Args:
      experiment: The config.
      model: A model that writes.
      tokenizer: Its tokenizer.
      examples: What is asked; those that ask nothing are passed over.
      writer: Writes the answers down, the longest example first.

    Returns:
      The metrics of `sequences.Tally`.

    Raises:
      UserError: No example asks anything, or one is too long to be answered; or a
        metric's library is not installed.
    """
    tally = Tally(make_metrics(list_specs(experiment.evaluate.text_metrics)))
    for number, question, written in _write(experiment, model, tokenizer, examples):
        tally.add(written)
        if writer is not None:
            told = {
                "text": tokenizer.decode(question, skip_special_tokens=True),
                "target": written.right_text,
                "prediction": written.said_text,
            }
            writer.write(number, told)
    if not tally.num_texts:
        raise UserError(
            "evaluate.predict_with_generate: no held-out example has a question before "
            "what is learned of it; use chats or prompt/completion pairs, and "
            "data.train_on=assistant or last"
        )
    return tally.result()


def _write(
    experiment: Experiment, model: Any, tokenizer: Any, examples: Examples
) -> Iterator[tuple[int, list[int], Written]]:
    """Each question's number, its tokens, and what was answered."""
    ask, batch_size = experiment.encoder_module.ask, experiment.eval_batch_size
    special = set(tokenizer.added_tokens_decoder)
    named = stop_ids_of(model, tokenizer, None)
    # Those of one length together, so that few shapes are compiled and little is
    # padding; the longest first, so that what does not fit shows at once.
    order = np.argsort(-examples.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size].tolist()
        asked = [(number, *ask(examples[number])) for number in numbers]
        asked = [one for one in asked if one[1]]
        if not asked:
            continue
        numbers, questions, answers = zip(*asked, strict=True)
        # A chat template may end turns with a token that no file names.
        stops = {*named, *({answer[-1] for answer in answers} & special)}
        stop_ids = tuple(sorted(stops))
        options = Config(
            max_new_tokens=experiment.evaluate.max_new_tokens,
            stop_token_ids=stop_ids,
            batch_size=batch_size,
        )
        said = generate_tokens(model, questions, options, num_rows=batch_size)
        detokenizer = Detokenizer(tokenizer, stop_ids)
        for number, question, ids, right in zip(
            numbers, questions, said, answers, strict=True
        ):
            written = Written(
                _strip(ids, stops),
                _strip(right, stops),
                detokenizer.text(ids),
                detokenizer.text(right),
            )
            yield number, question, written


def _strip(tokens: list[int], stops: set[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in stops else tokens
