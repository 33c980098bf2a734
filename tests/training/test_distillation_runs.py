"""Distillation from rows to an adapter: the teacher comes along, and stays behind."""

import functools
import json

import numpy as np
import pytest
import safetensors.numpy
from tiny_experiment import assert_cuts_change_nothing, make_config

import fjft
from fjft import tree
from fjft.cli.main import main


@pytest.fixture
def config(llama, qwen3, tmp_path):
    """A tiny Llama that learns from a tiny Qwen3."""
    return functools.partial(
        make_config,
        llama,
        tmp_path / "run",
        objective__name="distillation",
        objective__teacher=qwen3,
        objective__temperature=2.0,
        objective__teacher_weight=0.75,
    )


def test_cuts_and_meshes_do_not_change_the_losses(config):
    assert_cuts_change_nothing(config())


def test_a_run_comes_nearer_to_its_teacher(config, llama, tmp_path, capsys):
    result = fjft.train(config(train__max_steps=15))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    first, last = (row for row in log if "eval_loss" in row)
    mixed = 0.75 * 4 * first["eval_divergence"] + 0.25 * first["eval_cross_entropy"]
    assert first["eval_loss"] == pytest.approx(mixed, rel=1e-5)
    assert first["eval_perplexity"] == pytest.approx(
        np.exp(first["eval_cross_entropy"]), rel=1e-5
    )
    assert last["eval_divergence"] < 0.9 * first["eval_divergence"]
    assert not any("teacher" in path for path in tree.split(result.model)[1])
    file = tmp_path / "run/adapter/adapter_model.safetensors"
    assert not any("teacher" in name for name in safetensors.numpy.load_file(file))
    assert main(["evaluate", f"--run={tmp_path / 'run'}"]) == 0
    assert f"{result.metrics['eval_loss']:.6g}" in capsys.readouterr().out


def test_a_teacher_must_know_the_same_tokens(config, bert):
    with pytest.raises(
        fjft.UserError, match=r"tokenizer of objective\.teacher=.*is not"
    ):
        fjft.train(config(objective__teacher=bert))


def test_a_teacher_must_be_named(config):
    values = config().to_dict()
    del values["objective"]["teacher"]
    with pytest.raises(fjft.UserError, match=r"objective.*teacher"):
        fjft.train(type(config())(values))
