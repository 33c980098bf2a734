"""A loss far outside the recent ones is told of, and others are not."""

import dataclasses
import re

import numpy as np
import pytest
from tiny_experiment import make_config

from fjft.data.loader import Loader
from fjft.telemetry import read_log
from fjft.training import loop as loop_module
from fjft.training import spikes


def test_noise_is_no_spike():
    random = np.random.default_rng(0)
    for losses in (
        3 * 0.99 ** np.arange(300) + random.normal(0, 0.3, 300),
        random.gamma(4.0, 0.5, 300),
        np.full(300, 0.7),
        1e-4 * random.random(300),
    ):
        for step in range(spikes.MOST, 300):
            recent = losses[step - spikes.MOST : step].tolist()
            assert spikes.find_usual(recent, losses[step]) is None


def test_a_spike_is_one_also_beside_another():
    random = np.random.default_rng(0)
    recent = random.normal(2.0, 0.1, spikes.MOST).tolist()
    assert spikes.find_usual(recent, 4.0) == pytest.approx(2.0, abs=0.05)
    recent[7:9] = [40.0, 50.0]
    assert spikes.find_usual(recent, 4.0) == pytest.approx(2.0, abs=0.05)
    assert spikes.find_usual(recent, 0.1) is None
    assert spikes.find_usual(recent[: spikes.FEWEST - 1], 40.0) is None


def test_a_run_names_the_step_and_its_rows(llama, tmp_path, monkeypatch, capsys):
    original = loop_module.build_run

    def build_run(*args):
        run, state = original(*args)
        taken = []

        def train_step(*args):
            taken.append(None)
            state, metrics = run.train_step(*args)
            factor = 5 if len(taken) == 6 else 1
            return state, metrics._replace(loss_sum=factor * metrics.loss_sum)

        return dataclasses.replace(run, train_step=train_step), state

    monkeypatch.setattr(loop_module, "build_run", build_run)
    monkeypatch.setattr(spikes, "FEWEST", 4)
    config = make_config(llama, tmp_path, train__max_steps=8)
    loop_module.train(config)
    (spike,) = [row for row in read_log(tmp_path) if "loss_spike" in row]
    assert spike["step"] == 6
    experiment = loop_module.build_experiment(config)
    rows, *_ = experiment.load_examples(experiment.model.open().load_tokenizer())
    chosen = Loader(rows, 8, seed=0, num_epochs=None).choose_rows(5).tolist()
    assert spike["rows"] == chosen
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"warning: step 6: loss {spike['loss_spike']:.4g} is far above" in told
    assert f"({', '.join(map(str, chosen))})" in told
