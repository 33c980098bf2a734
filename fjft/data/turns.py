r"""Where the assistant's turns lie in a rendered chat.

Most chat templates say nothing about which part of their output the assistant wrote,
and some render an earlier turn differently once later ones exist. So the template
itself is asked: rendered once with marks in place of every message's content, it
shows the literal text between the contents (the skeleton of these roles). A real
rendering is then walked along that skeleton, literal by literal and content by
content; only where every character is accounted for are spans returned.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
                                                           [----------------)

A turn starts where the generation prompt ends, so what is learned is what will be
generated, and it ends with the first special token after the content (or with eos,
where special tokens run up to it).
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from fjft.data.skeleton import Skeleton, Span, common_prefix, walk, walk_back
from fjft.data.templates import Chat, MalformedError, Message

# What a template may raise for a chat it does not take.
RENDER_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)

# Private-use characters: no template strips, splits or changes them.
_MARK = re.compile("\ue000(\\d+)\ue001")

# Templates that write today's date would give another data set tomorrow, and a
# resumed run other losses; this is the date such templates fall back to.
_DATE = "26 Jul 2024"


class TurnFinder:
    """Renders chats and finds their assistant turns.

    Args:
      tokenizer: A Hugging Face tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}
        self._tails: dict[tuple[tuple[str, ...], bool], str | None] = {}
        added = (str(token) for token in tokenizer.added_tokens_decoder.values())
        tokens = sorted({t for t in added if t.strip()}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        template = str(tokenizer.chat_template)
        self._variables = {"date_string": _DATE} if "date_string" in template else {}

    def render(self, chats: Sequence[Chat]) -> list[str | MalformedError]:
        """Renders each chat whole; those the template refuses become the error."""
        texts: list[str | MalformedError] = []
        for tools, group in _group_by_tools(chats):
            try:
                texts += self._apply([c.messages for c in group], tools)
            except RENDER_ERRORS:
                texts += [self._try_render(chat) for chat in group]
        return texts

    def _try_render(self, chat: Chat) -> str | MalformedError:
        try:
            return self._apply([chat.messages], chat.tools)[0]
        except RENDER_ERRORS as error:
            return MalformedError("refused by the chat template", str(error))

    def _apply(
        self, chats: list[list[Message]], tools: Any, generation: bool = False
    ) -> list[str]:
        return self._tokenizer.apply_chat_template(
            chats,
            tools=tools,
            tokenize=False,
            add_generation_prompt=generation,
            **self._variables,
        )

    def find(self, chat: Chat, text: str) -> list[Span]:
        """Finds the assistant's turns in a chat's rendering.

        Args:
          chat: The chat.
          text: What `render` made of it.

        Returns:
          For each assistant message from `first_answer` on, the characters
          [start, end) that it wrote, its end-of-turn token included.

        Raises:
          MalformedError: The rendering cannot be divided into turns with certainty.
        """
        roles = tuple(message["role"] for message in chat.messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        skeleton = self._skeletons[roles]
        spans = None
        if skeleton is not None:
            spans = walk(skeleton, chat.messages, text)
            if spans is None:
                spans = self._find_by_prefixes(skeleton, chat, text)
        if spans is None:
            raise MalformedError(
                "assistant turns not found in what the chat template renders",
                f"roles {', '.join(roles[:6])}{', ...' if len(roles) > 6 else ''}",
            )
        answers = range(chat.first_answer, len(roles))
        return [spans[i] for i in answers if roles[i] == "assistant"]

    def _make_skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        marked = self._render_marks(roles, generation=False)
        if marked is None:
            return None
        pieces = _MARK.split(marked)
        if pieces[1::2] != [str(i) for i in range(len(roles))]:
            return None
        literals = tuple(pieces[::2])
        headers, closers, extras = [], [], []
        for i, role in enumerate(roles):
            header, closer, extra = 0, 0, ""
            if role == "assistant":
                header, extra = self._measure_header(roles[:i], literals[i])
                closer = self._measure_closer(roles[: i + 1], literals[i + 1])
            headers.append(header)
            closers.append(closer)
            extras.append(extra)
        return Skeleton(literals, tuple(headers), tuple(closers), tuple(extras))

    def _measure_header(self, before: tuple[str, ...], literal: str) -> tuple[int, str]:
        """How much of the text before a content the generation prompt already says."""
        plain, prompt = self._tail(before, False), self._tail(before, True)
        if prompt is None or prompt == plain:
            return len(literal), ""  # no generation prompt: the content starts the turn
        if literal.startswith(prompt):
            return len(prompt), ""
        extra = prompt[len(literal) :] if prompt.startswith(literal) else ""
        return len(literal), extra

    def _measure_closer(self, upto: tuple[str, ...], literal: str) -> int:
        """How much of the text after a content ends the turn, not starts the next."""
        tail = self._tail(upto, False) or ""
        common = common_prefix(tail, literal)
        special = self._special.search(common)
        if special is None:
            return len(common)
        # Where several tokens close a turn, the one that stops generation is eos.
        end = special.end()
        while following := self._special.match(common, end):
            end = following.end()
            if following[0] == self._tokenizer.eos_token:
                return end
        return special.end()

    def _tail(self, roles: tuple[str, ...], generation: bool) -> str | None:
        """What the template writes after the last of these messages."""
        key = roles, generation
        if key not in self._tails:
            marked = self._render_marks(roles, generation)
            self._tails[key] = None if marked is None else _MARK.split(marked)[-1]
        return self._tails[key]

    def _render_marks(self, roles: tuple[str, ...], generation: bool) -> str | None:
        messages = [
            {"role": role, "content": f"\ue000{i}\ue001"}
            for i, role in enumerate(roles)
        ]
        try:
            return self._apply([messages], None, generation)[0]
        except RENDER_ERRORS:
            return None

    def _find_by_prefixes(
        self, skeleton: Skeleton, chat: Chat, text: str
    ) -> dict[int, Span] | None:
        """Spans where a template changes the assistant's words (thoughts, tool calls).

        A turn starts where the rendering of everything before it ends, which must be
        a prefix of the whole; from the next turn's start, or the end, the skeleton is
        walked backwards to this turn's end.
        """
        answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        starts = {}
        for i in answers:
            start = self._find_start(skeleton, chat, text, i)
            if start is None:
                return None
            starts[i] = start
        spans = {}
        for i, following in zip(answers, [*answers[1:], None], strict=True):
            boundary = len(text) if following is None else starts[following]
            end = walk_back(skeleton, chat.messages, text, i, following, boundary)
            if end is None or end < starts[i]:
                return None
            spans[i] = (starts[i], end + skeleton.closers[i])
        return spans

    def _find_start(
        self, skeleton: Skeleton, chat: Chat, text: str, index: int
    ) -> int | None:
        roles = tuple(m["role"] for m in chat.messages[:index])
        try:
            before = self._apply([chat.messages[:index]], chat.tools, True)[0]
        except RENDER_ERRORS:
            return None
        if text.startswith(before) and self._tail(roles, True) != self._tail(
            roles, False
        ):
            return len(before)
        before = before.removesuffix(skeleton.extras[index])
        tail = self._tail(roles, False) or ""
        header = skeleton.literals[index][: skeleton.headers[index]]
        if not skeleton.extras[index] and header.startswith(tail):
            before += header[len(tail) :]
        return len(before) if text.startswith(before) else None


def _group_by_tools(chats: Sequence[Chat]) -> list[tuple[Any, list[Chat]]]:
    """Runs of consecutive chats that offer the same tools."""
    groups: list[tuple[Any, list[Chat]]] = []
    for chat in chats:
        if groups and groups[-1][0] == chat.tools:
            groups[-1][1].append(chat)
        else:
            groups.append((chat.tools, [chat]))
    return groups
