"""Questions from rows to a directory that transformers answers with."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_experiment import assert_cuts_change_nothing, run_config

import fjft
from fjft.build import build_experiment
from fjft.cli.main import main
from fjft.evaluate.spans import exact_match, word_f1


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """The answer is what follows the question's word in the context."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(64):
        words = [f"w{w}" for w in random.permutation(50)[: random.integers(10, 40)]]
        place = int(random.integers(0, len(words) - 2))
        answer = " ".join(words[place + 1 : place + 3])
        context = " ".join(words)
        answers = {"text": [answer], "answer_start": [context.index(f" {answer}") + 1]}
        rows.append({"question": words[place], "context": context, "answers": answers})
    path = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def make_config(bert, questions, tmp_path):
    defaults = {
        "model.source": bert,
        "data.train": questions,
        "data.eval": "",
        "data.eval_size": 16.0,
        "data.max_length": 24,
        "data.doc_stride": 8,
        "train.max_steps": 10,
        "train.log_steps": 5,
        "evaluate.eval_steps": 0,
        "optimizer.learning_rate": 1e-2,
    }
    return functools.partial(run_config, "minilm_squad.py", tmp_path / "run", defaults)


def test_cuts_and_meshes_do_not_change_the_losses(make_config):
    assert_cuts_change_nothing(make_config(data__packing=True, data__max_length=32))


def test_a_run_ends_in_what_transformers_answers_with(make_config, tmp_path, capsys):
    config = make_config()
    result = fjft.train(config)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(
        tmp_path / "run/model"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    held_out = build_experiment(config).load_examples(tokenizer)[1][""]
    assert len(held_out) == 16
    assert held_out.examples.notes is not None
    best: dict[int, tuple[float, str, str]] = {}
    for i in range(len(held_out.examples)):
        ids = held_out.examples[i].columns["input_ids"]
        window = json.loads(held_out.examples.notes[i])
        with torch.no_grad():
            out = model(torch.tensor(ids)[None].long())
        first = window["first"]
        scores = out.start_logits[0, :, None] + out.end_logits[0, None, :]
        for a, (begin, _) in enumerate(window["offsets"]):
            for b, (_, stop) in enumerate(window["offsets"][a:], a):
                answer = window["context"][begin:stop]
                pair = float(scores[first + a, first + b]), answer, window["answers"][0]
                number = window["question"]
                best[number] = max(best.get(number, pair), pair)
    assert result.metrics["eval_num_questions"] == len(best) < 16
    for name, score in (("exact_match", exact_match), ("f1", word_f1)):
        theirs = np.mean([score(said, right) for _, said, right in best.values()])
        assert result.metrics[f"eval_{name}"] == pytest.approx(100 * theirs)
    told = tmp_path / "told.jsonl"
    flags = [f"--run={tmp_path / 'run'}", f"--predictions={told}"]
    assert main(["evaluate", *flags]) == 0
    assert f"{result.metrics['eval_f1']:.5g}" in capsys.readouterr().out
    source = [
        json.loads(line) for line in Path(config.data.train).read_text().split("\n")
    ]
    lines = [json.loads(line) for line in told.open()]
    for line, (_, said, right) in zip(lines, best.values(), strict=True):
        assert (line["prediction"], line["answers"]) == (said, [right])
        row = source[line["row"]]
        assert line["question"] == row["question"]
        assert line["context"] in row["context"]
