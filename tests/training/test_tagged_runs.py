"""Named entities from rows to a directory that transformers loads."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import seqeval.metrics
import torch
import transformers
from tiny_experiment import assert_cuts_change_nothing, run_config

import fjft
from fjft.build import build_experiment
from fjft.cli.main import main

NAMES = ("B-A", "B-B", "I-A", "I-B", "O")


@pytest.fixture(scope="session")
def tagged(tmp_path_factory):
    """A CoNLL file: entities of one or two words, whose numbers tell the type."""
    random = np.random.default_rng(0)
    lines = []
    for _ in range(80):
        for _ in range(random.integers(2, 5)):
            lines += [f"w{word}\tO" for word in random.integers(0, 30, 3)]
            kind, size = random.integers(0, 2), random.integers(1, 3)
            words = random.integers(30, 35, size) + 5 * kind
            lines += [
                f"w{word}\t{'I' if n else 'B'}-{'AB'[kind]}"
                for n, word in enumerate(words)
            ]
        lines.append("")
    path = tmp_path_factory.mktemp("tagged") / "tagged.txt"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def make_config(bert, tagged, tmp_path):
    defaults = {
        "model.source": bert,
        "data.train": tagged,
        "data.eval_size": 16.0,
        "data.max_length": 32,
        "train.max_steps": 30,
        "train.log_steps": 10,
        "evaluate.eval_steps": 0,
        "optimizer.learning_rate": 2e-2,
    }
    return functools.partial(run_config, "minilm_ner.py", tmp_path / "run", defaults)


def test_cuts_and_meshes_do_not_change_the_losses(make_config):
    assert_cuts_change_nothing(make_config(data__packing=True))


def test_a_run_ends_in_what_transformers_loads(make_config, tmp_path, capsys):
    config = make_config()
    result = fjft.train(config)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    assert [row["step"] for row in log if "eval_f1" in row] == [0, 30]

    model = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "run/model"
    ).eval()
    assert model.config.id2label == dict(enumerate(NAMES))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    held_out = build_experiment(config).load_examples(tokenizer)[1][""]
    true, said = [], []
    for i in range(len(held_out.examples)):
        columns = held_out.examples[i].columns
        with torch.no_grad():
            logits = model(torch.tensor(columns["input_ids"])[None].long()).logits
        is_word = columns["labels"] != -100
        true.append([NAMES[tag] for tag in columns["labels"][is_word]])
        said.append([NAMES[tag] for tag in logits[0].argmax(-1).numpy()[is_word]])
    for name in ("precision", "recall", "f1", "accuracy"):
        theirs = getattr(seqeval.metrics, f"{name}_score")(true, said)
        assert result.metrics[f"eval_{name}"] == pytest.approx(theirs)
    assert 0.1 < result.metrics["eval_f1"] < 1
    report = seqeval.metrics.classification_report(true, said, digits=4)
    assert report in capsys.readouterr().out

    told = tmp_path / "told.jsonl"
    flags = [f"--run={tmp_path / 'run'}", f"--predictions={told}"]
    assert main(["evaluate", *flags]) == 0
    assert report in capsys.readouterr().out
    lines = [json.loads(line) for line in told.open()]
    assert [line["tags"] for line in lines] == true
    assert [line["prediction"] for line in lines] == said
    sentences = Path(config.data.train).read_text("utf-8").split("\n\n")
    for line in lines:
        words = [pair.split("\t")[0] for pair in sentences[line["row"]].split("\n")]
        assert line["words"] == words
