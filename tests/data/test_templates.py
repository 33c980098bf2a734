import pytest

from fjft.data.templates import Chat, MalformedError, Pair, Text, read_sample

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CHAT = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "Be kind"}


@pytest.mark.parametrize(
    ("values", "name", "sample"),
    [
        ({"text": "a"}, "text", Text("a")),
        ({"prompt": "a", "completion": "b"}, "prompt/completion", Pair("a", "b")),
        (
            {"prompt": [USER], "completion": [ASSISTANT]},
            "prompt/completion",
            Chat(CHAT, first_answer=1),
        ),
        ({"messages": CHAT}, "messages", Chat(CHAT)),
        ({"prompt": "Hi", "prompt_id": "x", "messages": CHAT}, "messages", Chat(CHAT)),
        (
            {"instruction": "Add", "input": "", "output": "4", "text": "..."},
            "alpaca",
            Chat(
                [
                    {"role": "user", "content": "Add"},
                    {"role": "assistant", "content": "4"},
                ]
            ),
        ),
        (
            {"instruction": "Add", "input": "2 2", "output": "4", "system": "Be kind"},
            "alpaca",
            Chat(
                [
                    SYSTEM,
                    {"role": "user", "content": "Add\n\n2 2"},
                    {"role": "assistant", "content": "4"},
                ]
            ),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind"},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            "sharegpt",
            Chat([SYSTEM, *CHAT]),
        ),
        ({"conversations": ["Hi", "Hello"]}, "turns", Chat(CHAT)),
        (
            {"messages": None, "text": "columns of other files are None"},
            "text",
            Text("columns of other files are None"),
        ),
    ],
)
def test_recognizes(values, name, sample):
    assert read_sample(values) == (name, sample)


def test_alpaca_without_a_chat_template():
    row = {"instruction": "Add", "input": "2 2", "output": "4"}
    assert read_sample(row, has_template=False)[1] == Pair(
        "### Instruction:\nAdd\n\n### Input:\n2 2\n\n### Response:\n", "4"
    )


def test_tool_calls_are_kept_and_absent_columns_dropped():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}
    answer = {"role": "tool", "content": "", "tool_calls": None}
    tools = [{"type": "function"}]
    _, sample = read_sample({"messages": [USER, call, answer], "tools": tools})
    assert isinstance(sample, Chat)
    assert sample.tools == tools
    assert sample.messages[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]},
        {"role": "tool", "content": ""},
    ]


@pytest.mark.parametrize(
    ("values", "reason", "detail"),
    [
        ({"question": "a", "answer": "b"}, "no known format", "'answer', 'question'"),
        ({}, "no known format", "none"),
        ({"text": 3}, "not a string", "text is a int"),
        ({"text": " \n"}, "empty", "text is empty"),
        ({"text": "\ud800"}, "not Unicode text", "text"),
        ({"prompt": "a", "completion": ""}, "empty", "completion is empty"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "not a list", "prompt is a str"),
        ({"messages": "Hi"}, "not a list of messages", "messages is a str"),
        ({"messages": []}, "empty", "messages is an empty list"),
        ({"messages": ["Hi"]}, "not a message", "messages[0] is a str"),
        ({"messages": [USER, {"role": "x"}]}, "unknown role", "messages[1]"),
        ({"messages": [{"content": "a"}]}, "unknown role", "None"),
        ({"messages": [{"role": "user"}]}, "not a string", "messages[0].content is mi"),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "empty",
            "messages[1].content",
        ),
        ({"messages": CHAT, "tools": "x"}, "not a list of tools", "str"),
        ({"conversations": "x"}, "not a list of turns", "conversations is a str"),
        ({"conversations": []}, "empty", "conversations"),
        ({"conversations": ["a", {"b": "c"}]}, "not a string", "conversations[1]"),
        ({"conversations": ["a", ""]}, "empty", "conversations[1]"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            "unknown role",
            "'alien'",
        ),
        ({"conversations": [{"from": "human"}]}, "not a string", "conversations[0]"),
        (
            {"conversations": [{"from": "human", "value": "a"}, "b"]},
            "not a message",
            "conversations[1]",
        ),
        ({"instruction": "a", "output": 3}, "not a string", "output is a int"),
        ({"instruction": "a", "input": [1], "output": "b"}, "not a string", "input"),
    ],
)
def test_malformed(values, reason, detail):
    with pytest.raises(MalformedError) as caught:
        read_sample(values)
    assert caught.value.reason.startswith(reason)
    assert detail in caught.value.detail
