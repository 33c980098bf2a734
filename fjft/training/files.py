"""What a run writes into its directory besides checkpoints."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from fjft import distributed
from fjft.checkpoint.adapter import save_adapter
from fjft.checkpoint.huggingface import save_model
from fjft.experiment import Experiment
from fjft.telemetry import LOG_NAME, Writers, make_writers
from fjft.telemetry_plot import draw_curve
from fjft.training.progress import Progress


def open_log(
    config: ml_collections.ConfigDict, experiment: Experiment, progress: Progress
) -> Writers:
    """Writes the resolved config, and opens the log where the run stands."""
    directory = Path(experiment.checkpoint.directory)
    is_main_process = distributed.is_first()
    if is_main_process:
        text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False)
        (directory / "config.json").write_text(text + "\n", "utf-8")
    return make_writers(
        directory,
        experiment.train.report_to,
        resume_step=progress.step if progress.step else None,
        config=config.to_dict(),
        is_main_process=is_main_process,
    )


def write_results(experiment: Experiment, model: Any) -> str:
    """Writes the curve, and the adapter or the weights.

    Returns:
      What was written, in words.
    """
    directory = Path(experiment.checkpoint.directory)
    if distributed.is_first():
        draw_curve(directory / LOG_NAME, directory / "loss.png")
    if experiment.method.PEFT_TYPE is None:
        out = directory / "model"
        save_model(model, out, jax.numpy.dtype(model.compute_dtype))
    else:
        out = directory / "adapter"
        save_adapter(model, out)
    return f"wrote {out} and {directory / 'loss.png'}"
