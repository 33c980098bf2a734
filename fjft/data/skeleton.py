"""What a chat template writes around the contents of messages, and walks along it."""

import dataclasses

from fjft.data.templates import Message

# Characters [start, end) of a rendering.
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """What a template writes around the contents of a sequence of roles.

    Attributes:
      literals: Text before each content, and after the last: one more than contents.
      headers: Of each literal before an assistant's content, how many characters
        belong to the prompt; 0 for other roles.
      closers: Of each literal after an assistant's content, how many characters end
        the turn; 0 for other roles.
      extras: What the generation prompt adds that the finished chat does not have,
        such as an opened `<think>`.
    """

    literals: tuple[str, ...]
    headers: tuple[int, ...]
    closers: tuple[int, ...]
    extras: tuple[str, ...]


def common_prefix(a: str, b: str) -> str:
    """The longest text that both begin with."""
    length = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )
    return a[:length]


def _variants(content: str) -> tuple[str, ...]:
    """A content as templates write it: as it is, or stripped."""
    return content, content.strip(), content.lstrip(), content.rstrip()


def walk(
    skeleton: Skeleton, messages: list[Message], text: str
) -> dict[int, Span] | None:
    """Matches all of `text`, left to right; None if anything is not as expected."""
    literals = skeleton.literals
    if not text.startswith(literals[0]):
        return None
    position = len(literals[0])
    spans = {}
    for i, message in enumerate(messages):
        for content in _variants(message["content"]):
            end = position + len(content)
            if text.startswith(content, position) and text.startswith(
                literals[i + 1], end
            ):
                break
        else:
            return None
        if message["role"] == "assistant":
            start = position - len(literals[i]) + skeleton.headers[i]
            spans[i] = (start, end + skeleton.closers[i])
        position = end + len(literals[i + 1])
    return spans if position == len(text) else None


def walk_back(
    skeleton: Skeleton,
    messages: list[Message],
    text: str,
    index: int,
    following: int | None,
    boundary: int,
) -> int | None:
    """Where message `index` ends, given where what follows it ends."""
    last = len(messages) if following is None else following
    literal = skeleton.literals[last]
    if following is not None:
        literal = literal[: skeleton.headers[following]]
        boundary -= len(_opened(skeleton, text, following, boundary))
    position = boundary - len(literal)
    if position < 0 or not text.startswith(literal, position):
        return None
    for i in range(last - 1, index, -1):
        literal = skeleton.literals[i]
        for content in _variants(messages[i]["content"]):
            start = position - len(content) - len(literal)
            if start >= 0 and text.startswith(literal + content, start):
                break
        else:
            return None
        position = start
    return position


def _opened(skeleton: Skeleton, text: str, index: int, boundary: int) -> str:
    """The generation prompt's extra text, if the rendering has it before `boundary`."""
    extra = skeleton.extras[index]
    return extra if extra and text.endswith(extra, 0, boundary) else ""
