"""Early stopping and the best step, as transformers has them, also over a restart."""

import dataclasses
import json
import types
from typing import Any

import numpy as np
import pytest
import transformers
from test_resume import interrupt_at, rows_of
from tiny_experiment import make_config

import fjft
from fjft.build import build_experiment, override
from fjft.checkpoint.orbax import saved_steps
from fjft.cli import evaluate, weights
from fjft.training.best import compare
from fjft.training.loop import train
from fjft.training.progress import Progress

VALUES = {
    "data__packing": False,
    "data__buckets": (96,),
    "optimizer__learning_rate": 0.03,
    "train__max_steps": 40,
    "evaluate__eval_steps": 3,
    "evaluate__metric_for_best_model": "other_loss",
    "evaluate__early_stopping_patience": 2,
    "evaluate__load_best_model_at_end": True,
    "checkpoint__save_steps": 4,
    "checkpoint__save_total_limit": 1,
}


@pytest.mark.parametrize("name", ["loss", "accuracy"])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_evaluations_are_compared_as_transformers_compares_them(name, threshold):
    """Its callback looks before its trainer takes note of a better value."""
    metric, random = f"eval_{name}", np.random.default_rng(0)
    stopping = transformers.EarlyStoppingCallback(3, threshold)
    state = transformers.TrainerState()
    options = types.SimpleNamespace(
        metric_for_best_model=name,
        greater_is_better=name == "accuracy",
        save_strategy=transformers.trainer_utils.SaveStrategy.BEST,
    )
    trainer: Any = types.SimpleNamespace(args=options, state=state)
    progress = Progress()
    for step, value in enumerate(random.normal(size=40).cumsum() / 20, 1):
        control = transformers.TrainerControl()
        state.global_step = progress.step = step
        stopping.on_evaluate(options, state, control, {metric: value})
        transformers.Trainer._determine_best_metric(trainer, {metric: value}, None)
        compare(progress, {metric: value}, metric, threshold)
        waited = progress.evaluations_without_gain
        assert waited == stopping.early_stopping_patience_counter
        assert (waited >= 3) == control.should_training_stop
        assert progress.best_step == state.best_global_step
        assert progress.best_metrics[metric] == state.best_metric


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, str]:
    """Few texts to learn by heart, and others."""
    directory = tmp_path_factory.mktemp("sets")
    texts = {
        "seen": [f"the number {n} is {n * n} squared" for n in range(8)],
        "other": [f"what is {n} times {n + 7}, and why?" for n in range(8)],
    }
    paths = {}
    for name, lines in texts.items():
        paths[name] = str(directory / f"{name}.jsonl")
        rows = "\n".join(json.dumps({"text": line}) for line in lines)
        (directory / f"{name}.jsonl").write_text(rows, "utf-8")
    return paths


def configure(llama, directory, sets, **overrides):
    config = make_config(llama, directory, **VALUES, **overrides)
    held_out = {f"data.eval.{name}": path for name, path in sets.items()}
    override(config, {"data.train": sets["seen"]} | held_out)
    return config


def test_the_best_step_is_the_result_also_after_a_restart(
    llama, tmp_path, sets, monkeypatch, capsys
):
    whole = train(configure(llama, tmp_path / "whole", sets))
    told = capsys.readouterr().out
    judged = {
        r["step"]: r for r in rows_of(tmp_path / "whole") if "eval_seen_loss" in r
    }
    others = {step: row["eval_other_loss"] for step, row in judged.items() if step}
    best, last = min(others, key=others.__getitem__), max(others)
    assert last == best + 2 * 3 < 40
    assert f"stopped at step {last}: 2 evaluations running" in told
    assert f"step {best} was the best" in told
    # A step that is the best is saved for itself, and kept among later ones.
    assert saved_steps(tmp_path / "whole") == [best, last]
    assert whole.metrics["eval_other_loss"] == others[best]
    assert whole.metrics["eval_loss_before"] == judged[0]["eval_other_loss"]

    # What was written is that step's.
    config = configure(llama, tmp_path / "whole", sets)
    found = weights.Weights(
        source=llama,
        dtype="float32",
        adapter=tmp_path / "whole" / "adapter",
        experiment=build_experiment(config),
    )
    again = evaluate.evaluate(found).metrics
    assert again.keys() == judged[0].keys() - {"step"}
    for name, value in again.items():
        assert value == pytest.approx(judged[best][name], rel=1e-5), name

    # Stopped before the best step was judged, and once more before the last was.
    cut = tmp_path / "cut"
    for number, step in enumerate((best, last)):
        with monkeypatch.context() as patched:
            interrupt_at(patched, step)
            with pytest.raises(fjft.UserError, match=f"stopped at step {step}"):
                train(configure(llama, cut, sets, checkpoint__resume=number > 0))
    result = train(configure(llama, cut, sets, checkpoint__resume=True))
    assert rows_of(cut) == rows_of(tmp_path / "whole")
    assert result.metrics["eval_other_loss"] == others[best]
    assert best in saved_steps(cut)
    name = "adapter/adapter_model.safetensors"
    assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_metric_that_is_not_measured(llama, tmp_path):
    config = make_config(
        llama,
        tmp_path,
        evaluate__eval_steps=1,
        evaluate__metric_for_best_model="f1",
    )
    with pytest.raises(fjft.UserError, match=r"best_model='f1' .* one of loss, perple"):
        train(config)
    assert saved_steps(tmp_path) == []


def test_old_checkpoints_know_nothing_of_a_best_step():
    old = {"step": 3, "num_tokens": 5, "eval_loss_before": 1.0, "judged_step": 2}
    assert dataclasses.asdict(Progress(**old))["best_step"] is None
