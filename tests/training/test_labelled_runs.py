"""Classification from rows to a directory that transformers loads."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import sklearn.metrics
import tiny
import tiny_encoders
import torch
import transformers
from tiny_experiment import assert_cuts_change_nothing, run_config

import fjft
from fjft.cli.main import main

NAMES = ("bad", "good", "middling")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Texts whose first word tells the label; a tenth of them is mislabelled."""
    random = np.random.default_rng(0)
    lines = []
    for _ in range(96):
        label = random.integers(0, 3)
        words = random.integers(0, 48, random.integers(4, 20))
        words[0] = 48 + label
        if random.random() < 0.1:
            label = random.integers(0, 3)
        text = " ".join(f"w{word}" for word in words)
        lines.append(json.dumps({"words": text, "opinion": NAMES[label]}))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def make_config(bert, rows, tmp_path):
    defaults = {
        "model.source": bert,
        "data.train": rows,
        "data.eval_size": 24.0,
        "data.max_length": 32,
        "data.text_columns": "words",
        "data.label_column": "opinion",
        "train.max_steps": 10,
        "train.log_steps": 1,
        "optimizer.learning_rate": 5e-3,
    }
    return functools.partial(
        run_config, "minilm_sentiment.py", tmp_path / "run", defaults
    )


def test_cuts_and_meshes_do_not_change_the_losses(make_config):
    assert_cuts_change_nothing(make_config(data__packing=True))


def test_a_run_ends_in_what_transformers_loads(make_config, tmp_path, capsys):
    config = make_config(evaluate__eval_steps=5)
    result = fjft.train(config)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    assert [row["step"] for row in log if "eval_accuracy" in row] == [0, 5, 10]
    assert all("accuracy" in row for row in log if "loss" in row)
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run/model"
    ).eval()
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.problem_type == "single_label_classification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    held_out = fjft.build.build_experiment(config).load_examples(tokenizer)[1][""]
    logits, labels = [], []
    for i in range(len(held_out.examples)):
        example = held_out.examples[i]
        ids = example.columns["input_ids"][None]
        with torch.no_grad():
            theirs = model(torch.tensor(ids).long()).logits.numpy()
        assert tiny.max_error(result.model(jax.numpy.asarray(ids)), theirs) < 1e-4
        logits.append(theirs[0])
        labels.append(int(example.target))
    said = np.argmax(logits, -1)
    accuracy = sklearn.metrics.accuracy_score(labels, said)
    assert result.metrics["eval_accuracy"] == accuracy > 0.6
    options: dict[str, Any] = {"digits": 4, "zero_division": 0}
    report = sklearn.metrics.classification_report(
        labels, said, target_names=NAMES, **options
    )
    assert report in capsys.readouterr().out

    told = tmp_path / "told.jsonl"
    flags = [f"--run={tmp_path / 'run'}", f"--predictions={told}"]
    assert main(["evaluate", *flags]) == 0
    assert report in capsys.readouterr().out
    lines = [json.loads(line) for line in told.open()]
    assert [line["row"] for line in lines] == list(held_out.examples.row_numbers)
    assert [line["prediction"] for line in lines] == [NAMES[i] for i in said]
    source = [
        json.loads(line) for line in Path(config.data.train).read_text().split("\n")
    ]
    for line, logit in zip(lines, logits, strict=True):
        row = source[line["row"]]
        assert (line["text"], line["label"]) == (row["words"], row["opinion"])
        scores = torch.tensor(logit).softmax(-1).tolist()
        assert list(line["scores"].values()) == pytest.approx(scores, abs=1e-5)


@pytest.mark.slow
def test_lora_brings_its_head(make_config, bert, tmp_path, capsys):
    config = make_config(peft__method="lora", peft__modules_to_save="classifier")
    result = fjft.train(config)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        bert, num_labels=3
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    ids = tiny.random_ids(2, 12)
    ours = result.model(jax.numpy.asarray(ids))
    assert tiny.max_error(ours, tiny_encoders.torch_outputs(theirs, ids)) < 1e-4
    assert main(["evaluate", f"--run={tmp_path / 'run'}"]) == 0
    assert f"{result.metrics['eval_loss']:.5g}" in capsys.readouterr().out
    out = tmp_path / "merged"
    run = f"--run={tmp_path / 'run'}"
    assert main(["export", run, f"--output={out}", "--merge"]) == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert merged.config.id2label == dict(enumerate(NAMES))
    assert tiny.max_error(ours, tiny_encoders.torch_outputs(merged.eval(), ids)) < 1e-4


def test_a_new_head_must_be_trained(make_config):
    with pytest.raises(fjft.UserError, match=r"modules_to_save=.*classifier"):
        fjft.train(make_config(peft__method="lora"))
