"""Recognises the format of a row and reads what it says.

    {"text": "Once upon a time"}                                  text
    {"prompt": "2+2=", "completion": "4"}                         prompt/completion
    {"messages": [{"role": "user", "content": "Hi"}, ...]}        messages
    {"instruction": "Add", "input": "2 2", "output": "4"}         alpaca
    {"conversations": [{"from": "human", "value": "Hi"}, ...]}    sharegpt
    {"conversations": ["Hi", "Hello!", ...]}                      turns (user first)

Prompt and completion may be strings or lists of messages. Other columns are ignored.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

FORMATS = (
    "messages",
    "prompt/completion",
    "conversations (sharegpt or turns)",
    "instruction/output (alpaca)",
    "text",
)
SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """Messages for the chat template.

    Attributes:
      messages: Each with `role` and `content`, and whatever else the template reads.
      first_answer: Only messages from this index on may be learned.
      tools: JSON schemas of the tools on offer, or None.
    """

    messages: list[Message]
    first_answer: int = 0
    tools: list[Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A plain prompt and the completion to learn."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A document, learned whole."""

    text: str


Sample = Chat | Pair | Text


class MalformedError(Exception):
    """A row that cannot be used: `reason` groups such rows, `detail` is this one's."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def recognize(values: dict[str, Any]) -> str:
    """The name of a row's format: `messages`, `prompt/completion`, `sharegpt`, ...

    Columns that are None count as missing. More specific formats win: Alpaca rows
    often carry a `text`, chat rows a `prompt`.

    Raises:
      MalformedError: No format fits.
    """
    keys = {key for key, value in values.items() if value is not None}
    if "messages" in keys:
        return "messages"
    if {"prompt", "completion"} <= keys:
        return "prompt/completion"
    if "conversations" in keys:
        turns = values["conversations"]
        is_dict = isinstance(turns, list) and any(isinstance(t, dict) for t in turns)
        return "sharegpt" if is_dict and not _is_plain(turns) else "turns"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if "text" in keys:
        return "text"
    raise MalformedError(
        f"no known format (known: {'; '.join(FORMATS)})",
        f"its columns are {', '.join(map(repr, sorted(map(str, keys)))) or 'none'}",
    )


def _is_plain(turns: Sequence[Any]) -> bool:
    """Whether the first turn is a string: a later dict is then a mistake in a turn."""
    return bool(turns) and isinstance(turns[0], str)


def read_sample(
    values: dict[str, Any], has_template: bool = True
) -> tuple[str, Sample]:
    """Reads one row.

    Args:
      values: The row's columns.
      has_template: Whether the tokenizer can render chats. Without, Alpaca rows
        become plain pairs with the headings that Alpaca models know.

    Returns:
      The format's name and the sample.

    Raises:
      MalformedError: The row fits no format, or breaks its format's rules.
    """
    name = recognize(values)
    if name == "messages":
        messages = _check_messages(values["messages"], "messages")
        return name, Chat(messages, tools=_check_tools(values))
    if name == "prompt/completion":
        return name, _read_pair(values)
    if name == "sharegpt":
        messages = _read_system(values) + _read_sharegpt(values["conversations"])
        return name, Chat(messages)
    if name == "turns":
        return name, Chat(_read_turns(values["conversations"]))
    if name == "alpaca":
        return name, _read_alpaca(values, has_template)
    return name, Text(_check_text(values["text"], "text"))


def add_system(sample: Sample, system: str) -> Sample:
    """Gives a chat this system prompt, if it has none of its own."""
    if not isinstance(sample, Chat) or sample.messages[0]["role"] in SYSTEM_ROLES:
        return sample
    messages = [{"role": "system", "content": system}, *sample.messages]
    return Chat(messages, sample.first_answer + 1, sample.tools)


def _check_text(value: Any, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise MalformedError("not a string", f"{name} is {_describe(value)}")
    if not value.strip() and not may_be_empty:
        raise MalformedError("empty", f"{name} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise MalformedError(
                "not Unicode text", f"{name} has half a pair"
            ) from None
    return value


def _describe(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _check_messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise MalformedError("not a list of messages", f"{name} is {_describe(value)}")
    if not value:
        raise MalformedError("empty", f"{name} is an empty list")
    messages = []
    for i, message in enumerate(value):
        place = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise MalformedError("not a message", f"{place} is {_describe(message)}")
        # Columns of a Hugging Face dataset fill absent keys with None.
        message = {k: v for k, v in message.items() if v is not None}
        role = message.get("role")
        if role not in ROLES:
            raise MalformedError(
                "unknown role", f"{place} has role {role!r}; known: {', '.join(ROLES)}"
            )
        # A call of a tool, a tool's answer and a system prompt may say nothing.
        may_be_empty = role in ("system", "tool") or bool(message.get("tool_calls"))
        content = message.get("content", "" if may_be_empty else None)
        message["content"] = _check_text(content, f"{place}.content", may_be_empty)
        messages.append(message)
    return messages


def _check_tools(values: dict[str, Any]) -> list[Any] | None:
    tools = values.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise MalformedError("not a list of tools", f"tools is {_describe(tools)}")
    return tools or None


def _read_pair(values: dict[str, Any]) -> Sample:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        messages = _check_messages(prompt, "prompt")
        answers = _check_messages(completion, "completion")
        return Chat(messages + answers, len(messages), _check_tools(values))
    prompt = _check_text(prompt, "prompt", may_be_empty=True)
    return Pair(prompt, _check_text(completion, "completion"))


def _read_system(values: dict[str, Any]) -> list[Message]:
    """The `system` column that Alpaca and ShareGPT files may have."""
    system = values.get("system")
    if system is None or not _check_text(system, "system", may_be_empty=True).strip():
        return []
    return [{"role": "system", "content": system}]


def _read_sharegpt(turns: Any) -> list[Message]:
    messages = []
    for i, turn in enumerate(turns):
        place = f"conversations[{i}]"
        if not isinstance(turn, dict):
            raise MalformedError("not a message", f"{place} is {_describe(turn)}")
        speaker = turn.get("from")
        role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise MalformedError(
                "unknown role", f"{place} is from {speaker!r}; known: {known}"
            )
        content = _check_text(turn.get("value"), f"{place}.value", role == "system")
        messages.append({"role": role, "content": content})
    return messages


def _read_turns(turns: Any) -> list[Message]:
    if not isinstance(turns, list):
        raise MalformedError(
            "not a list of turns", f"conversations is {_describe(turns)}"
        )
    if not turns:
        raise MalformedError("empty", "conversations is an empty list")
    return [
        {
            "role": "assistant" if i % 2 else "user",
            "content": _check_text(turn, f"conversations[{i}]"),
        }
        for i, turn in enumerate(turns)
    ]


def _read_alpaca(values: dict[str, Any], has_template: bool) -> Sample:
    instruction = _check_text(values["instruction"], "instruction")
    context = _check_text(values.get("input") or "", "input", may_be_empty=True).strip()
    answer = _check_text(values["output"], "output")
    if has_template:
        question = f"{instruction}\n\n{context}" if context else instruction
        chat = _read_system(values)
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": answer})
        return Chat(chat)
    middle = f"### Input:\n{context}\n\n" if context else ""
    prompt = f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"
    return Pair(prompt, answer)
