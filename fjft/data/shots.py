"""Answered questions that stand before a question, to show how answers look."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fjft.data.draws import draw
from fjft.data.examples import Examples
from fjft.data.mixture import by_source
from fjft.data.reading import Sampled
from fjft.data.templates import SYSTEM_ROLES, Chat, MalformedError, Pair
from fjft.errors import UserError

# Rows of each source that are kept in memory to draw from.
POOL_SIZE = 1024

# Keep these draws apart from others of the same rows and seed.
_POOL_STREAM, _STREAM = 2, 3

_BETWEEN = "\n\n"  # plain texts


def choose_pool(examples: Examples, rows: Mapping[str, int], seed: int) -> set[int]:
    """The numbers of rows that may be shown: so many of each source, by the seed.

    Args:
      examples: Those that are trained on.
      rows: How many rows each source had, used or not.
      seed: Of the draw.
    """
    chosen: set[int] = set()
    for own in by_source(examples, rows).values():
        numbers = np.unique(own.row_numbers)
        order = np.argsort(draw(numbers, seed, _POOL_STREAM), kind="stable")
        chosen.update(numbers[order[:POOL_SIZE]].tolist())
    return chosen


class Shots:
    """Puts examples before questions, drawn by the seed and the question's row.

    Args:
      pool: Rows to draw from: of a question's own source, if they are of it.
      count: Examples before each question.
      seed: Of the draws.

    Raises:
      UserError: There are too few.
    """

    def __init__(self, pool: Sequence[Sampled], count: int, seed: int):
        self._count = count
        self._seed = seed
        self._pools: dict[str, list[Any]] = {}
        for row in pool:
            self._pools.setdefault(row.source, []).append(row.sample)
        for name, samples in self._pools.items():
            if len(samples) < count:
                raise UserError(
                    f"data.eval_shots is {count}, but data.train{name and '.'}{name} "
                    f"has {len(samples)} examples to show; lower it"
                )
        self._all = [sample for samples in self._pools.values() for sample in samples]

    def show(self, row: Sampled) -> Any:
        """The row's sample with examples before it.

        Raises:
          MalformedError: It is no question, or the examples are of another kind.
        """
        pool = self._pools.get(row.source, self._all)
        random = np.random.default_rng((self._seed, _STREAM, row.number))
        chosen = random.choice(len(pool), self._count, replace=False)
        return show_first([pool[i] for i in chosen], row.sample)


def show_first(shots: Sequence[Any], sample: Any) -> Any:
    """Puts answered chats before a chat, or answered prompts before a prompt.

    Of the chats only the last one's system prompt stays, and nothing of those shown
    is learned.

    Raises:
      MalformedError: They are not all chats, or all prompts with completions.
    """
    if isinstance(sample, Chat) and all(isinstance(shot, Chat) for shot in shots):
        system, messages = _part_system(sample)
        shown = [message for shot in shots for message in _part_system(shot)[1]]
        first = max(sample.first_answer, len(system)) + len(shown)
        return Chat([*system, *shown, *messages], first, sample.tools)
    if isinstance(sample, Pair) and all(isinstance(shot, Pair) for shot in shots):
        shown = [shot.prompt + shot.completion for shot in shots]
        return Pair(_BETWEEN.join([*shown, sample.prompt]), sample.completion)
    raise MalformedError(
        "data.eval_shots is for chats, or for prompts with completions",
        f"{type(sample).__name__}",
    )


def _part_system(chat: Chat) -> tuple[list[Any], list[Any]]:
    count = int(chat.messages[0]["role"] in SYSTEM_ROLES)
    return chat.messages[:count], chat.messages[count:]
