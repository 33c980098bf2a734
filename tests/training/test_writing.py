"""Evaluation by what a model writes, against what transformers writes."""

import types
from typing import Any

import jax
import numpy as np
import pytest
import sacrebleu
import transformers
from tiny_experiment import make_config, start

from fjft.build import build_experiment
from fjft.data.examples import Example, Spool
from fjft.data.tokenize import ask
from fjft.errors import UserError
from fjft.evaluate.spans import overlap_f1
from fjft.training.writing import judge_texts

LENGTH = 8


@pytest.fixture(scope="module")
def config(llama):
    return make_config(
        llama,
        "unused",
        data__max_length=128,
        evaluate__batch_size=8,
        evaluate__predict_with_generate=True,
        evaluate__text_metrics="chrf",
        evaluate__max_new_tokens=LENGTH,
    )


def test_a_decoder_answers_as_transformers_does(llama, config):
    started = start(config, (2, 2, 2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    experiment = build_experiment(config)
    examples = experiment.load_examples(tokenizer)[1][""].examples
    with jax.set_mesh(started.mesh):
        model = started.run.model(started.state)
        found = judge_texts(experiment, model, tokenizer, examples)

    twin: Any = transformers.AutoModelForCausalLM.from_pretrained(
        llama, dtype="float32"
    )
    said, right, f1 = [], [], 0.0
    for number in range(len(examples)):
        text = tokenizer.decode(examples[number].columns["input_ids"])
        *_, turn = text.partition("<|im_start|>assistant\n")
        assert "assistant" not in turn, "a question and an answer"
        prompt = tokenizer(text.removesuffix(turn), return_tensors="pt")
        tokens = twin.generate(**prompt, max_new_tokens=LENGTH, do_sample=False)
        tokens = tokens[0, prompt["input_ids"].shape[1] :]
        answer, *_ = turn.partition("<|im_end|>")
        said.append(
            tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        right.append(answer)
        tokens = [token for token in tokens.tolist() if token != 1]
        f1 += overlap_f1(tokens, tokenizer(answer)["input_ids"])
    assert found["num_texts"] == len(examples) == 16
    assert found["token_f1"] == pytest.approx(100 * f1 / 16)
    assert found["token_f1"] > 0
    chrf = sacrebleu.corpus_chrf(said, [right]).score
    assert found["chrf"] == pytest.approx(chrf)


def _make_example(labels):
    ids = np.arange(1, len(labels) + 1, dtype=np.int32)
    return Example({"input_ids": ids, "labels": np.array(labels, np.int32)})


def test_the_last_turn_is_asked_for():
    question, answer = ask(_make_example([-100, -100, 3, 4, -100, -100, 7, 8, -100]))
    assert question == [1, 2, 3, 4, 5, 6]
    assert answer == [7, 8]
    assert ask(_make_example([-100, -100, 3, 4])) == ([1, 2], [3, 4])
    assert ask(_make_example([-100, 2, 3, 4])) == ([], [2, 3, 4])


def test_documents_ask_nothing(llama, config):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    spool = Spool()
    spool.add([_make_example([-100, 2, 3])], [0])
    model = types.SimpleNamespace(provenance=None)
    with pytest.raises(UserError, match=r"no held-out example has a question"):
        judge_texts(build_experiment(config), model, tokenizer, spool.finish())
