"""The picture of a search: how it went, and what each option has to do with it."""

from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from fjft.telemetry_plot import EVAL_COLORS, MUTED_COLOR, TRAIN_COLOR


def draw(study: optuna.Study, path: Path) -> None:
    """Draws the results of trials in their order, and over each option.

    Args:
      study: With one complete trial at least.
      path: Of the picture, a .png.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    options = list(study.best_params)
    figure = Figure(figsize=(4 * (1 + len(options)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    first, *rest = figure.subplots(1, 1 + len(options), sharey=True, squeeze=False)[0]
    values = [trial.value for trial in trials]
    first.plot([trial.number for trial in trials], values, "o", color=TRAIN_COLOR)
    first.axhline(study.best_value, linestyle=":", color=MUTED_COLOR)
    first.set_xlabel("trial")
    first.set_ylabel(study.user_attrs["metric"])
    for axes, option in zip(rest, options, strict=True):
        kind = study.best_trial.distributions[option]
        is_number = isinstance(kind, FloatDistribution | IntDistribution)
        places = [trial.params[option] for trial in trials]
        places = places if is_number else list(map(str, places))
        axes.plot(places, values, "o", color=TRAIN_COLOR)
        best = study.best_params[option]
        color = EVAL_COLORS[0]
        axes.plot(best if is_number else str(best), study.best_value, "*", color=color)
        axes.set_xlabel(option)
        if is_number and getattr(kind, "log", False):
            axes.set_xscale("log")
    for axes in (first, *rest):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
