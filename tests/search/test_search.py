"""Searches over a made-up run, and one over real ones by the command."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

import fjft
from fjft.cli.main import main
from fjft.cli.search import parse_space
from fjft.errors import StoppedError, UserError
from fjft.search import study as searching
from fjft.search.picture import draw

sys.path.append(str(Path(__file__).parents[1] / "training"))
tiny_experiment: Any = importlib.import_module("tiny_experiment")

SPACE = {
    "optimizer.learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
    "peft.r": CategoricalDistribution([4, 8]),
}


@dataclasses.dataclass
class Runs:
    """Stands for `train`: its loss is known, and it may be told to end otherwise."""

    configs: list = dataclasses.field(default_factory=list)
    error: Exception | None = None

    def __call__(self, config, watch):
        self.configs.append(config)
        rate, directory = config.optimizer.learning_rate, config.checkpoint.directory
        weights = Path(directory, "adapter")
        weights.mkdir(parents=True)
        Path(directory, "log.jsonl").touch()
        if self.error is not None:
            raise self.error
        for step in (1, 2):
            watch(step, abs(rate - 1e-2) + 1 / step)


@pytest.fixture
def runs(monkeypatch):
    runs = Runs()
    monkeypatch.setattr(searching, "train", runs)
    return runs


@pytest.fixture
def search(tmp_path, runs):
    del runs
    config = tiny_experiment.make_config("SOURCE", tmp_path / "search")

    def search(num_trials, space=SPACE):
        return searching.search(config, space, num_trials, said.append)

    said = search.said = []
    return search


def test_the_least_loss_is_best_and_keeps_its_weights(search, runs, tmp_path):
    study = search(8)
    rates = [config.optimizer.learning_rate for config in runs.configs]
    assert len(set(rates)) == 8
    ended = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in ended:
        assert trial.value == abs(trial.params["optimizer.learning_rate"] - 1e-2) + 0.5
    assert study.best_value == min(trial.value for trial in ended)
    kept = [path.parent.name for path in (tmp_path / "search").glob("*/adapter")]
    assert kept == [f"trial_{study.best_trial.number}"]
    assert len(list((tmp_path / "search").glob("*/log.jsonl"))) == 8
    draw(study, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 1000


def test_a_search_goes_on_where_it_was(search, runs):
    search(2)
    runs.error = StoppedError("stopped at step 1")
    with pytest.raises(StoppedError):
        search(4)
    cut_short = runs.configs[-1].optimizer.learning_rate
    runs.error = None
    study = search(4)
    assert len(runs.configs) == 5
    assert runs.configs[3].optimizer.learning_rate == cut_short
    assert [t.state for t in study.trials].count(TrialState.FAIL) == 1
    search(4)
    assert len(runs.configs) == 5


def test_a_trial_that_cannot_be_trained_counts_as_failed(search, runs):
    runs.error = UserError("loss is nan")
    with pytest.raises(UserError, match=r"none of the 2 trials.*loss is nan"):
        search(2)
    assert "failed, loss is nan" in search.said[-1]
    runs.error = None
    assert search(3).best_trial.number == 2


def test_several_processes_are_refused(search, monkeypatch):
    monkeypatch.setattr(searching.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=1"):
        search(1)


def test_another_search_is_refused(search):
    search(1)
    with pytest.raises(UserError, match="another space"):
        search(1, {"peft.r": CategoricalDistribution([4, 16])})


def test_spaces_by_the_command_line(tmp_path):
    config = tiny_experiment.make_config("SOURCE", tmp_path)
    read = dict(
        parse_space(config, text)
        for text in (
            "optimizer.learning_rate=1e-5..1e-3:log",
            "peft.r=4..16",
            "optimizer.schedule=constant,cosine",
        )
    )
    assert read == {
        "optimizer.learning_rate": FloatDistribution(1e-5, 1e-3, log=True),
        "peft.r": optuna.distributions.IntDistribution(4, 16),
        "optimizer.schedule": CategoricalDistribution(["constant", "cosine"]),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("peft.rank=4,8", "did you mean"),
        ("peft.r", "has no values"),
        ("peft.r=4,x", "a whole number"),
        ("peft.r=8..4", "LOW must be below HIGH"),
        ("optimizer.learning_rate=0..1:log", "above 0"),
        ("optimizer.schedule=a..b", "is no number"),
    ],
)
def test_broken_spaces(text, said, tmp_path):
    config = tiny_experiment.make_config("SOURCE", tmp_path)
    with pytest.raises(UserError, match=said):
        parse_space(config, text)


def test_real_runs_by_the_command(tmp_path, capsys):
    source = tiny_experiment.save_tiny_model(tmp_path / "model")
    settings = tiny_experiment.make_config(
        source,
        tmp_path / "search",
        train__max_steps=2,
        train__batch_size=2,
        data__max_length=64,
        data__eval_size=4.0,
        optimizer__warmup_steps=0.0,
    )
    config = tmp_path / "config.py"
    config.write_text(
        "import json, ml_collections\n\n\ndef get_config(arg=''):\n"
        f"    return ml_collections.ConfigDict({settings.to_dict()!r})\n"
    )
    command = ["search", f"--config={config}", "--trials=2"]
    command += ["--space", "optimizer.learning_rate=1e-3,3e-2"]
    assert main([*command, f"--write={tmp_path / 'best.py'}"]) == 0
    out = capsys.readouterr().out
    losses = {}
    for number in range(2):
        place = tmp_path / "search" / f"trial_{number}"
        rows = [json.loads(line) for line in (place / "log.jsonl").open()]
        losses[number] = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    best = min(losses, key=losses.__getitem__)
    assert f"its run is trial_{best}" in out
    assert f"{losses[best]:.5g}" in out
    written = fjft.load_config(str(tmp_path / "best.py"))
    used = json.loads((tmp_path / f"search/trial_{best}/config.json").read_text())
    rate = used["optimizer"]["learning_rate"]
    assert written.to_dict()["optimizer"]["learning_rate"] == rate
