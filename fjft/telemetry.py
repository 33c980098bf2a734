"""What a run writes down and what it shows: log files, notes and a progress bar.

Nothing above this floor prints or opens a log. Log keys are trl's: `loss`,
`grad_norm`, `learning_rate`, `epoch`, `num_tokens`, `mean_token_accuracy`,
`eval_loss` and so on; `step` is in every row.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import rich.console
import rich.progress

from fjft.errors import UserError
from fjft.telemetry_speed import StepClock, format_seconds

LOG_NAME = "log.jsonl"

# ------------------------------------------------------------------- log files


class Writer(Protocol):
    """Something that keeps rows of metrics."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Keeps one row; plain numbers and strings by key, `step` among them."""

    def close(self) -> None:
        """Finishes; nothing may be written afterwards."""


class Writers:
    """All writers of a run behind one call; on processes other than 0, none."""

    def __init__(self, writers: Iterable[Writer]):
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one row everywhere.

        Args:
          step: Optimizer steps done; 0 is before training.
          metrics: Values by key; arrays of one element become plain numbers.
        """
        row = {"step": step} | {k: _to_plain(v) for k, v in metrics.items()}
        for writer in self._writers:
            writer.write(row)

    def close(self) -> None:
        """Finishes all writers."""
        for writer in self._writers:
            writer.close()


def make_writers(
    directory: str | os.PathLike,
    report_to: str | Iterable[str] = (),
    *,
    resume_step: int | None = None,
    run_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    is_main_process: bool = True,
) -> Writers:
    """Opens the log files of a run: `log.jsonl` always, others when asked.

    Args:
      directory: Where the run lives; made when missing.
      report_to: Names from `WRITERS`, as a list or separated by commas; `"none"` and
        the empty string are no others.
      resume_step: When resuming, the step that was restored: what was logged after it
        is dropped, so that no step appears twice. None starts an empty log.
      run_name: Shown by W&B; the directory's name by default.
      config: The run's settings, for W&B.
      is_main_process: Only process 0 writes.

    Returns:
      The writers.

    Raises:
      UserError: An unknown name, or a package that is not installed.
    """
    names = report_to.split(",") if isinstance(report_to, str) else list(report_to)
    names = [n.strip() for n in names if n.strip() not in ("", "none")]
    for name in names:
        if name not in WRITERS:
            raise UserError(
                f"unknown report_to {name!r}; use none or any of {', '.join(WRITERS)}"
            )
    if not is_main_process:
        return Writers([])
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    run = Run(directory, resume_step, run_name or directory.name, dict(config or {}))
    return Writers([JsonlWriter(run), *(WRITERS[name](run) for name in names)])


@dataclass(frozen=True)
class Run:
    """What a writer may want to know of the run."""

    directory: Path
    resume_step: int | None
    name: str
    config: dict[str, Any]


class JsonlWriter:
    """One JSON object a line in `log.jsonl`, on disk as soon as it is written.

    Numbers JSON cannot say (NaN, infinity) are written as null.
    """

    def __init__(self, run: Run):
        path = run.directory / LOG_NAME
        kept = []
        if run.resume_step is not None and path.exists():
            kept = [r for r in read_log(path) if r["step"] <= run.resume_step]
        # A new file that then takes the old one's place: a kill loses nothing.
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(map(_to_line, kept)), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a line.

        Raises:
          OSError: No space left; it names the file.
        """
        with self._named_in_errors():
            self._file.write(_to_line(row))
            self._file.flush()

    def close(self) -> None:
        """Closes the file; raises as `write` does."""
        with self._named_in_errors():
            self._file.close()

    @contextlib.contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        """An open file's own errors do not say which file it is."""
        try:
            yield
        except OSError as error:
            error.filename = self._file.name
            raise


class TensorBoardWriter:
    """Scalars in `directory/tensorboard`, under `train/` and `eval/`."""

    def __init__(self, run: Run):
        try:
            import tensorboardX
        except ImportError as error:
            raise UserError(
                "report_to 'tensorboard' needs the package tensorboardX; "
                "install it with: pip install tensorboardX"
            ) from error
        purge = None if run.resume_step is None else run.resume_step + 1
        self._writer = tensorboardX.SummaryWriter(
            str(run.directory / "tensorboard"), purge_step=purge
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds each number as a point of its own curve."""
        for key, value in _grouped(row).items():
            self._writer.add_scalar(key, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run; `WANDB_MODE=offline` keeps it on disk."""

    def __init__(self, run: Run):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "report_to 'wandb' needs the package wandb; "
                "install it with: pip install wandb"
            ) from error
        # The id is kept, so that a resumed run continues the same curve.
        id_file = run.directory / "wandb_id.txt"
        if run.resume_step is None or not id_file.exists():
            id_file.write_text(os.urandom(8).hex(), encoding="utf-8")
        self._run = wandb.init(
            dir=str(run.directory),
            name=run.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            config=run.config,
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs a row; W&B itself drops steps that it already has."""
        self._run.log(_grouped(row), step=row["step"])

    def close(self) -> None:
        """Waits until everything is stored."""
        self._run.finish()


WRITERS: dict[str, Callable[[Run], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
}


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a `log.jsonl`; a last line that a kill cut short is left out.

    Args:
      path: The file, or the directory of the run.

    Returns:
      The rows in the order they were written.

    Raises:
      UserError: There is no such file, or a line before the last is not JSON.
    """
    path = Path(path)
    path = path / LOG_NAME if path.is_dir() else path
    if not path.exists():
        raise UserError(f"there is no log at {path}; has the run started?")
    rows = []
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


def _to_plain(value: Any) -> Any:
    """A JAX or numpy scalar becomes the Python number in it."""
    return value.item() if hasattr(value, "item") else value


def _to_line(row: Mapping[str, Any]) -> str:
    def say(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    safe = {key: say(value) for key, value in row.items()}
    return json.dumps(safe, ensure_ascii=False, allow_nan=False) + "\n"


def _grouped(row: Mapping[str, Any]) -> dict[str, float]:
    """`eval_loss` becomes `eval/loss`, `loss` becomes `train/loss`; numbers only."""
    return {
        f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"train/{k}": v
        for k, v in row.items()
        if k != "step" and isinstance(v, int | float)
    }


# ------------------------------------------------------------------ the screen


class Screen:
    """Everything a run prints: notes, warnings and a progress bar.

    On a terminal, and in a notebook that has ipywidgets, the bar moves in place;
    elsewhere one plain line is printed every `print_every` steps.

    Args:
      show: False prints nothing, for processes other than 0.
      print_every: Steps between plain lines.
      console: Where to; by default standard output.
    """

    def __init__(
        self,
        show: bool = True,
        print_every: int = 10,
        console: rich.console.Console | None = None,
    ):
        self._show = show
        self._print_every = max(1, print_every)
        self._console = console or rich.console.Console()
        self._bar: rich.progress.Progress | None = None
        self._clock = StepClock(0, 0)

    def say(self, message: str) -> None:
        """Prints a note, as it is: brackets are no markup."""
        self._print(message)

    def warn(self, message: str) -> None:
        """Prints a warning, in yellow where there are colours."""
        self._print(f"warning: {message}", style="yellow")

    def start(self, total_steps: int, start_step: int = 0) -> None:
        """Starts the progress bar.

        Args:
          total_steps: Steps of the whole run.
          start_step: Steps already done, after a resume.
        """
        self.stop()
        self._clock = StepClock(start_step, total_steps)
        if not (self._show and _can_animate(self._console)):
            return
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.fields[status]}"),
            console=self._console,
            expand=True,
        )
        self._bar.add_task("", total=total_steps, completed=start_step, status="")
        self._bar.start()

    def update(
        self,
        step: int,
        loss: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Shows that `step` steps are done; None leaves a number out."""
        self._clock.tick(step)
        left = self._clock.seconds_left()
        parts = [
            f"loss {loss:.4f}" if loss is not None else "",
            f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second else "",
            f"{format_seconds(left)} left" if left is not None else "",
        ]
        status = "  ".join(part for part in parts if part)
        total = self._clock.total_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, status=status)
        elif step % self._print_every == 0 or step in (1, total):
            self._print(f"step {step}/{total}  {status}")

    def stop(self) -> None:
        """Ends the progress bar, leaving it as it last was; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def _print(self, text: str, style: str | None = None) -> None:
        if self._show:
            self._console.print(
                text, style=style, markup=False, highlight=False, soft_wrap=True
            )


def _can_animate(console: rich.console.Console) -> bool:
    """Whether a bar can move in place there."""
    if console.is_jupyter:
        from importlib.util import find_spec

        return find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal
