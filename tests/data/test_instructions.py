"""Instructions from templates, system prompts, and what is shown before questions."""

import dataclasses
from collections import Counter

import pytest

from fjft.data import seq2seq
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.data.tokenize import ask
from fjft.errors import UserError

TEMPLATES = {
    "plain": "Translate from {from} to {to}: {text.in} ||| {text.out}",
    "asked": "What is {text.in} in {to}? ||| It is {text.out}.",
}


def row(i):
    return {"from": "old", "to": "new", "text": {"in": f"o{i}", "out": f"n{i}"}}


def make_config(path, **options):
    return Config(train=path, max_length=256, **options)


def texts(rows, tokenizer):
    """The number of each example's row -> its question and its answer."""
    examples = rows.examples
    return {
        int(examples.row_numbers[i]): tuple(map(tokenizer.decode, ask(examples[i])))
        for i in range(len(examples))
    }


def test_templates_are_filled_and_drawn_by_seed_and_row(chatml, write):
    path = write(*map(row, range(200)))
    config = make_config(path, instructions=TEMPLATES)
    train, _, report = load_examples(config, chatml)
    found = texts(train, chatml)
    plain = "<|im_start|>user\nTranslate from old to new: o{0}<|im_end|>\n", "n{0}"
    asked = "<|im_start|>user\nWhat is o{0} in new?<|im_end|>\n", "It is n{0}."
    drawn = Counter()
    for number, (question, answer) in found.items():
        for kind in (plain, asked):
            expected = kind[0].format(number) + "<|im_start|>assistant\n"
            if question == expected:
                assert answer == kind[1].format(number) + "<|im_end|>"
                drawn[kind] += 1
    assert drawn.total() == 200
    assert 70 < drawn[plain] < 130
    assert report.formats == {"plain": drawn[plain], "asked": drawn[asked]}

    # Another seed draws anew, fewer rows the same.
    assert texts(load_examples(config, chatml, 1)[0], chatml) != found
    path = write(*map(row, range(50)), name="few.jsonl")
    few = make_config(path, instructions=TEMPLATES)
    again = texts(load_examples(few, chatml)[0], chatml)
    assert again == {number: found[number] for number in range(50)}


def test_each_source_has_its_own_templates(chatml, write):
    chat = {"conversations": ["Hi", "Hello"]}
    sources = {
        "words": write(*map(row, range(8))),
        "chat": write(chat, name="chat.jsonl"),
    }
    instructions = {f"words/{name}": text for name, text in TEMPLATES.items()}
    config = Config(train=sources, eval=sources, instructions=instructions)
    train, sets, report = load_examples(config, chatml)
    assert report.formats["turns"] == 1
    assert report.formats["words/plain"] + report.formats["words/asked"] == 8
    assert texts(sets["words"], chatml).keys() == set(range(8))
    assert texts(train, chatml)[8][1] == "Hello<|im_end|>"

    def load(**options):
        load_examples(Config(train=sources, **options), chatml)

    with pytest.raises(UserError, match=r"data\.instructions\.word is for no source"):
        load(instructions={"word": TEMPLATES["plain"]})
    with pytest.raises(UserError, match=r"data\.eval has no name"):
        load(eval=sources["words"], instructions=instructions)


def test_encoder_decoders_read_the_question_and_write_the_answer(chatml, write):
    config = make_config(
        write(row(3)),
        instructions={"plain": TEMPLATES["plain"]},
        text_columns="instruction,output",
    )
    train, _, _ = load_examples(config, chatml, 0, seq2seq.Encoder)
    source, target = map(chatml.decode, seq2seq.ask(train.examples[0]))
    assert source == "Translate from old to new: o3"
    assert target == "n3<eos>"


def test_a_row_that_fills_no_template_is_told(chatml, write):
    rows = [row(0), {"from": "a"}, row(1) | {"to": ["new"]}, row(2) | {"to": 7}]
    config = make_config(write(*rows), instructions={"plain": TEMPLATES["plain"]})
    report = load_examples(config, chatml)[2]
    (rejected,) = report.rejected.values()
    assert rejected.count == 2
    assert "plain needs 'to', which is list" in rejected.places[1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Translate {text}", "write the question, |||"),
        ("||| {text}", "write the question, |||"),
        ("Say {text ||| yes", "write {{ and }} for braces"),
        ("Say {} ||| yes", "braces hold the name of a column"),
        ("Say {text!r} ||| yes", "braces hold the name of a column"),
    ],
)
def test_a_broken_template_is_an_error(chatml, write, template, said):
    config = make_config(write(row(0)), instructions={"bad": template})
    with pytest.raises(UserError, match=r"data\.instructions\.bad") as error:
        load_examples(config, chatml)
    assert said in str(error.value)


def test_chats_without_a_system_prompt_are_given_one(chatml, tokenizer, write):
    system = {"role": "system", "content": "Be long."}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write({"messages": turns}, {"messages": [system, *turns]}, {"text": "Yes"})
    train, _, _ = load_examples(make_config(path, system="Be short."), chatml)
    questions = [question for question, _ in texts(train, chatml).values()]
    rest = "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert questions[0] == "<|im_start|>system\nBe short." + rest
    assert questions[1] == "<|im_start|>system\nBe long." + rest
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"data\.system is for chats"):
        load_examples(make_config(path, system="Be short."), tokenizer)


@pytest.mark.parametrize("separate", [False, True])
def test_questions_are_shown_answers_of_the_training_data(chatml, write, separate):
    rows = [{"conversations": [f"Q{i}", f"A{i}"]} for i in range(60)]
    path = write(*rows)
    config = {"eval_size": 12.0}
    if separate:
        rows = [{"conversations": [f"Q{i}", f"A{i}"]} for i in range(100, 112)]
        config = {"eval": write(*rows, name="eval.jsonl")}
    config = make_config(path, system="Be short.", **config)
    train, sets, _ = load_examples(config, chatml)
    plain = texts(sets[""], chatml)
    shown = dataclasses.replace(config, eval_shots=3)
    same_train, sets, report = load_examples(shown, chatml)
    found = texts(sets[""], chatml)
    assert texts(same_train, chatml) == texts(train, chatml)
    assert len(found) == len(plain) == 12
    assert report.evals[0].examples == 12
    trained = {answer for _, answer in texts(train, chatml).values()}
    orders = set()
    for number, (question, answer) in found.items():
        system, *turns = question.split("<|im_start|>")[1:]
        assert system == "system\nBe short.<|im_end|>\n"
        said = [turn.partition("\n")[2].rstrip("\n") for turn in turns]
        assert plain[number] == (
            "".join(f"<|im_start|>{part}" for part in (system, *turns[-2:])),
            answer,
        )
        examples = list(zip(said[:-2:2], said[1:-2:2], strict=True))
        assert len(set(examples)) == 3
        for asked, answered in examples:
            assert asked[1:] == answered[1:]
            assert answered in trained
        orders.add(tuple(examples))
    assert len(orders) == 12
    # Only the question's own answer is learned.
    examples = sets[""].examples
    longest = max(len(chatml(f"A{i}<|im_end|>")["input_ids"]) for i in range(112))
    assert examples.supervised.max() <= longest
    assert texts(load_examples(shown, chatml)[1][""], chatml) == found


def test_prompts_are_shown_with_completions_before_them(tokenizer, write):
    rows = [{"prompt": f"Q{i}:", "completion": f" A{i}"} for i in range(9)]
    config = make_config(write(*rows), eval_size=1.0, eval_shots=2)
    (example,) = texts(load_examples(config, tokenizer)[1][""], tokenizer).values()
    first, second, question = example[0].removeprefix("<bos>").split("\n\n")
    assert question in {f"Q{i}:" for i in range(9)}
    for shot in (first, second):
        assert shot in {f"Q{i}: A{i}" for i in range(9)}
    with pytest.raises(
        UserError, match=r"data\.eval_shots is 9, but data\.train has 8"
    ):
        load_examples(dataclasses.replace(config, eval_shots=9), tokenizer)


def test_documents_are_no_questions(chatml, write):
    path = write(*[{"text": f"Some text {i}."} for i in range(9)])
    with pytest.raises(UserError, match=r"data\.eval_shots is for chats"):
        load_examples(make_config(path, eval_size=2.0, eval_shots=2), chatml)
