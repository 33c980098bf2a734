"""Masked LMs from rows to what transformers loads, continued and from scratch."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from tiny_experiment import assert_cuts_change_nothing, run_config, start

import fjft
from fjft.build import build_experiment
from fjft.cli.main import main
from fjft.errors import UserError


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Texts in which every word tells the next."""
    random = np.random.default_rng(0)
    lines = []
    for _ in range(64):
        first, length = random.integers(0, 50), random.integers(4, 20)
        words = " ".join(f"w{(first + 7 * i) % 50}" for i in range(length))
        lines.append(json.dumps({"text": words}))
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def make_config(bert, texts, tmp_path):
    defaults = {
        "model.source": bert,
        "model.sizes": {},
        "model.tokenizer": "",
        "data.train": texts,
        "data.eval_size": 16.0,
        "data.max_length": 32,
        "train.max_steps": 10,
        "train.log_steps": 1,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 0.0,
    }
    return functools.partial(
        run_config, "bert_masked_lm.py", tmp_path / "run", defaults
    )


def test_cuts_and_meshes_do_not_change_the_losses(make_config):
    assert_cuts_change_nothing(make_config(model__from_scratch=False))


def test_virtual_tokens_of_several_texts_in_a_row_are_refused(make_config):
    config = make_config(model__from_scratch=False, peft__method="prompt")
    with pytest.raises(UserError, match=r"use data\.packing=False"):
        start(config)


def test_new_weights_that_are_trained_are_float32(make_config):
    state = start(make_config(model__dtype="bfloat16")).state
    assert {str(x.dtype) for x in state.params.values()} == {"float32"}


def test_a_model_from_scratch_ends_in_what_transformers_loads(
    make_config, tmp_path, capsys
):
    config = make_config(model__sizes={"num_hidden_layers": 2})
    result = fjft.train(config)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    for key in ("loss", "perplexity", "masked_token_error_rate"):
        assert sum(key in row for row in log) == 10
        assert sum(f"eval_{key}" in row for row in log) == 2
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]

    model = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "run/model"
    ).eval()
    assert model.config.num_hidden_layers == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    held_out = build_experiment(config).load_examples(tokenizer)[1][""]
    total, wrong, count = 0.0, 0, 0
    for i in range(len(held_out.examples)):
        # The evaluation's own draw: the loader's seed, and the first epoch.
        columns = held_out.example(i, (0, 0)).columns
        ids, labels = (torch.tensor(columns[k])[None].long() for k in columns)
        with torch.no_grad():
            out = model(ids, labels=labels)
        learned = labels != -100
        total += out.loss.item() * int(learned.sum())
        wrong += int((out.logits.argmax(-1) != labels)[learned].sum())
        count += int(learned.sum())
    assert result.metrics["eval_num_masked_tokens"] == count
    assert result.metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert result.metrics["eval_masked_token_error_rate"] == pytest.approx(
        wrong / count
    )
    assert main(["evaluate", f"--run={tmp_path / 'run'}"]) == 0
    assert f"{result.metrics['eval_loss']:.5g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft__method": "bitfit"}, "peft.method=full"),
        ({"model__sizes": {"layers": 2}}, r"model\.sizes\.layers=2"),
        ({"model__from_scratch": False, "model__sizes": {"num_labels": 2}}, "scratch"),
    ],
)
def test_what_cannot_start_from_scratch_is_said(make_config, options, message):
    with pytest.raises(fjft.UserError, match=message):
        fjft.train(make_config(**options))
