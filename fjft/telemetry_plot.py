"""The picture of a run: its loss curve, from its log."""

import math
import os
import re
from pathlib import Path

import numpy as np

from fjft.errors import UserError
from fjft.telemetry import read_log

TRAIN_COLOR = "#2a6fbb"
# Of evaluations, set by set.
EVAL_COLORS = ("#d1495b", "#2e8b57", "#8a5a9e", "#c98a1b")
MUTED_COLOR = "#6b7280"
# The losses of evaluations, and in them the name of the set.
_EVAL_LOSS = re.compile(r"eval_(?:(.+)_)?loss")


def draw_curve(
    log_path: str | os.PathLike,
    png_path: str | os.PathLike,
    title: str = "Training loss",
) -> Path:
    """Draws the loss curve of a `log.jsonl`.

    The training loss of every row is drawn pale, smoothed strong, evaluation
    losses as points; a narrow panel below shows the learning rate.

    Args:
      log_path: The log, or the directory of the run.
      png_path: Where the picture goes; its directory is made when missing.
      title: Stands above it.

    Returns:
      `png_path`.

    Raises:
      UserError: The log is missing, or holds no loss.
    """
    # The canvas is made directly: pyplot would pick a backend and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_log(log_path)
    train = _points(rows, "loss")
    names = dict.fromkeys(n for row in rows for n in row if _EVAL_LOSS.fullmatch(n))
    evals = {name: _points(rows, name) for name in names}
    rates = _points(rows, "learning_rate")
    if not train[0] and not any(steps for steps, _ in evals.values()):
        raise UserError(f"{log_path} holds no loss to draw; has a step been logged?")

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if rates[0]:
        loss_axes, rate_axes = figure.subplots(
            2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]}
        )
        rate_axes.plot(*rates, color=MUTED_COLOR, linewidth=1.5)
        rate_axes.fill_between(*rates, color=MUTED_COLOR, alpha=0.12, linewidth=0)
        rate_axes.set_ylabel("learning rate")
        rate_axes.set_ylim(bottom=0)
        rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        all_axes = [loss_axes, rate_axes]
    else:
        loss_axes = figure.subplots()
        all_axes = [loss_axes]
    _draw_losses(loss_axes, train, evals)
    loss_axes.set_title(title, loc="left", fontweight="bold")
    loss_axes.set_ylabel("loss (nats per token)")
    all_axes[-1].set_xlabel("step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.align_ylabels(all_axes)
    png_path = Path(png_path)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path)
    return png_path


def smooth(values: list[float]) -> list[float]:
    """Smooths over about a twentieth of the values, at least nine, around each.

    In each window a straight line is fitted and read off at the value's place. Unlike
    a running mean it does not lag where the loss falls fast, and unlike a shrinking
    window it is as calm at the ends; it never leaves the window's range.
    """
    half = max(4, len(values) // 40)
    smoothed = []
    for i in range(len(values)):
        start = max(0, i - half)
        window = np.asarray(values[start : i + half + 1])
        places = np.arange(start, start + len(window)) - i
        offset = places.mean()
        spread = ((places - offset) ** 2).sum()
        slope = ((places - offset) * window).sum() / max(spread, 1.0)
        line = float(window.mean() - slope * offset)
        smoothed.append(float(np.clip(line, window.min(), window.max())))
    return smoothed


def _draw_losses(axes, train, evals) -> None:
    """Draws the training loss, smoothed when there are many points, and evaluations."""
    steps, losses = train
    if steps:
        many = len(steps) >= 20
        pale = {"alpha": 0.3, "linewidth": 1.0} if many else {"linewidth": 1.8}
        label = None if many else "training"
        axes.plot(steps, losses, color=TRAIN_COLOR, label=label, **pale)
        if many:
            axes.plot(
                steps, smooth(losses), color=TRAIN_COLOR, linewidth=2, label="training"
            )
    for number, (name, points) in enumerate(evals.items()):
        if not points[0]:
            continue
        color = EVAL_COLORS[number % len(EVAL_COLORS)]
        axes.plot(
            *points,
            color=color,
            linewidth=1.2,
            linestyle="--",
            marker="o",
            markersize=6,
            label=_EVAL_LOSS.sub(r"\1", name) or "evaluation",
        )
        axes.annotate(
            f"{points[1][-1]:.3f}",
            (points[0][-1], points[1][-1]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="right",
            color=color,
        )
    axes.legend(frameon=False, loc="upper right")


def _points(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number under `key`."""
    pairs = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]
