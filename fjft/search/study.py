"""Searches a config's options for the best result, trial by trial, with Optuna.

A trial is a whole run of its own, in `trial_N` of the search's directory. What has been
tried is written down after every evaluation, so that a search that was stopped or
killed goes on where it was; of the trials' weights only the best one's are kept.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from fjft import distributed
from fjft.build import build_experiment, override
from fjft.errors import StoppedError, UserError
from fjft.training.best import is_less_better
from fjft.training.loop import train

LOG_NAME = "trials.log"
# Why a trial came to nothing; one that was killed has none, and is made again.
REASON = "reason"


def search(
    config: ml_collections.ConfigDict,
    space: Mapping[str, BaseDistribution],
    num_trials: int,
    say: Callable[[str], None],
) -> optuna.Study:
    """Tries values of some options, and goes on with what was tried before.

    Values come from Optuna's tree-structured Parzen estimator. A trial that at some
    evaluation is worse than the median of those before it at the same step ends there.

    Args:
      config: The config; `evaluate.metric_for_best_model` is what counts, and
        `checkpoint.directory` is the search's.
      space: What each option may be, by dotted key.
      num_trials: How many there are to be in the end, those of before included.
      say: Takes a line on each trial.

    Returns:
      Optuna's account of all trials.

    Raises:
      UserError: There are several processes, nothing is held out to judge by, the
        directory holds another search, or no trial came to a result.
    """
    distributed.start()
    if jax.process_count() > 1:
        raise UserError(
            "fjft search chooses what to try next in one process; set "
            "JAX_NUM_PROCESSES=1 and search on one machine's devices"
        )
    experiment = build_experiment(config)
    directory = Path(experiment.checkpoint.directory)
    study = _open_study(config, directory, experiment.evaluate.metric_for_best_model)
    _check_same(study, config, space, directory)
    _make_up_for_killed(study)
    while (done := _count_done(study)) < num_trials:
        # Another seed for each trial, or a search that goes on would repeat itself.
        seed = experiment.train.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = study.ask(dict(space))
        say(f"trial {trial.number}, {done + 1} of {num_trials}: {describe(trial)}")
        _run_trial(study, trial, config, directory)
        say(_describe_end(study.trials[trial.number]))
        _keep_best_weights(study, directory)
    if not _find_best(study):
        raise UserError(
            f"none of the {num_trials} trials came to a result; the last one: "
            f"{study.trials[-1].user_attrs.get(REASON, 'it was cut short')}"
        )
    return study


def describe(trial: Any) -> str:
    """A trial's values, in words."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in trial.params.items()
    )


def _open_study(
    config: ml_collections.ConfigDict, directory: Path, metric: str
) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(directory / LOG_NAME))),
        study_name="search",
        load_if_exists=True,
        direction="minimize" if is_less_better(metric) else "maximize",
        pruner=optuna.pruners.MedianPruner(),
    )


def _check_same(
    study: optuna.Study,
    config: ml_collections.ConfigDict,
    space: Mapping[str, BaseDistribution],
    directory: Path,
) -> None:
    """Refuses to compare with trials of something else."""
    ours = {
        "metric": build_experiment(config).evaluate.metric_for_best_model,
        "config": json.loads(json.dumps(config.to_dict())),
        "space": {key: distribution_to_json(each) for key, each in space.items()},
    }
    for name, value in ours.items():
        if study.user_attrs.get(name, value) != value:
            raise UserError(
                f"{directory} holds a search with another {name}; name another "
                "checkpoint.directory, or give the same flags to go on with it"
            )
        study.set_user_attr(name, value)


def _make_up_for_killed(study: optuna.Study) -> None:
    """Puts trials that a kill left unfinished at the front of what is tried next."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)


def _count_done(study: optuna.Study) -> int:
    ends = (TrialState.COMPLETE, TrialState.PRUNED)
    return sum(t.state in ends or REASON in t.user_attrs for t in study.trials)


def _run_trial(
    study: optuna.Study,
    trial: optuna.Trial,
    config: ml_collections.ConfigDict,
    directory: Path,
) -> None:
    """Trains, and tells the study how it went.

    Raises:
      StoppedError: The process was asked to stop; the trial will be made again.
      UserError: Nothing was judged.
    """
    changed = copy.deepcopy(config)
    place = str(directory / f"trial_{trial.number}")
    override(changed, trial.params | {"checkpoint.directory": place})
    values: list[float] = []

    def watch(step: int, value: float) -> None:
        values.append(value)
        trial.report(value, step)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        train(changed, watch)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        return
    except StoppedError:
        raise
    except UserError as error:
        # A rate at which the loss explodes, or what does not fit: a result of its own.
        trial.set_user_attr(REASON, str(error))
        study.tell(trial, state=TrialState.FAIL)
        return
    if not values:
        raise UserError(
            "nothing is held out to judge the trials by; set data.eval or "
            "data.eval_size"
        )
    if build_experiment(changed).evaluate.load_best_model_at_end:
        is_less = study.direction == optuna.study.StudyDirection.MINIMIZE
        values.append(min(values) if is_less else max(values))
    study.tell(trial, values[-1])


def _describe_end(trial: FrozenTrial) -> str:
    name = f"trial {trial.number}"
    if trial.state == TrialState.COMPLETE:
        return f"{name}: {trial.value:.5g}"
    if trial.state == TrialState.PRUNED:
        return f"{name}: ended early at step {trial.last_step}, {trial.value:.5g}"
    return f"{name}: failed, {trial.user_attrs[REASON]}"


def _find_best(study: optuna.Study) -> FrozenTrial | None:
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return study.best_trial if complete else None


def _keep_best_weights(study: optuna.Study, directory: Path) -> None:
    """Removes checkpoints and weights of all other trials; logs and curves stay."""
    best = _find_best(study)
    for place in directory.glob("trial_*"):
        if best is None or place.name != f"trial_{best.number}":
            for part in filter(Path.is_dir, place.iterdir()):
                shutil.rmtree(part)
