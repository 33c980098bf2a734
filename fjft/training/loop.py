"""Training, from the first note to the last file. Read it top to bottom."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from fjft import distributed, sharding, tree
from fjft.blueprint import choose_head, read_architecture
from fjft.build import build_experiment
from fjft.checkpoint.orbax import Checkpoints, digest
from fjft.errors import StoppedError, UserError
from fjft.experiment import Experiment
from fjft.peft.lora_adapter import is_start
from fjft.programs import keep_programs
from fjft.telemetry import Screen, Writers
from fjft.telemetry_speed import CompileWatcher, SpeedMeter, peak_flops
from fjft.training.best import compare
from fjft.training.describe import (
    describe_devices,
    describe_model,
    explain_bad_step,
)
from fjft.training.files import open_log, write_results
from fjft.training.fit import check_fits
from fjft.training.progress import Progress
from fjft.training.resume import as_saved, refuse_second_run, restore_state, resume
from fjft.training.run import Run, build_run
from fjft.training.spikes import find_usual
from fjft.training.state import TrainState
from fjft.training.step import StepMetrics
from fjft.training.stopping import StopRequest
from fjft.training.tokenizer import ensure_tokenizer

# Shorter compilations are those of single operations.
_COMPILE_WORTH_A_LINE = 0.5  # seconds


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training run leaves.

    Attributes:
      metrics: The last value of every metric, or the best step's where that one is the
        result; and `eval_loss_before`.
      directory: Config, log, curve, checkpoints, and the adapter or the model.
      model: The trained model.
      tokenizer: Its tokenizer.
    """

    metrics: dict[str, float]
    directory: Path
    model: Any
    tokenizer: Any


def train(
    config: ml_collections.ConfigDict,
    watch: Callable[[int, float], None] | None = None,
) -> Result:
    """Trains as `config` says.

    Writes into `checkpoint.directory`: `config.json`, `log.jsonl`, `loss.png`,
    `checkpoints/`, and at the end `adapter/` (a PEFT directory) or `model/` (a Hugging
    Face one).

    Args:
      config: A config, see `load_config`.
      watch: Takes the step and the metric that counts, after each evaluation but the
        first; what it raises ends the run.

    Raises:
      UserError: The config, the data, the model or the disk will not do, or the loss
        is no longer a number.
      StoppedError: The process was asked to stop.
    """
    distributed.start()
    experiment = build_experiment(config)
    keep_programs(experiment.train.compilation_cache)
    directory = Path(experiment.checkpoint.directory)
    refuse_second_run(experiment)
    mesh = sharding.make_mesh(experiment.mesh)
    sharding.check_batch(
        experiment.train.batch_size, experiment.train.accumulation_steps, mesh
    )
    distributed.check_shared(directory)
    screen = Screen(show=distributed.is_first())
    watcher = CompileWatcher()
    screen.say(describe_devices(mesh))

    if experiment.model.tokenizer:
        screen.say(ensure_tokenizer(experiment))
    files = experiment.open_model()
    # What cannot be trained is said before the data is read.
    head, num_labels = experiment.objective_module.HEAD, experiment.count_labels()
    read_architecture(choose_head(files, head, num_labels))
    if experiment.data.packing:
        check_fits(experiment, mesh, files, experiment.data.max_length)
    tokenizer = files.load_tokenizer()
    rows, held_out, report = experiment.load_examples(tokenizer)
    if not experiment.data.packing:
        num_labels = experiment.count_labels(rows.examples.labels)
        check_fits(experiment, mesh, files, rows.longest, num_labels)
    for line in report.describe():
        screen.say(line)
    for warning in report.warnings():
        screen.warn(warning)
    shown = experiment.encoder_module.show_example(
        tokenizer, rows.example(0), rows.examples.labels
    )
    screen.say(f"an example, with what is learned:\n{shown}")

    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        closing.callback(watcher.close)
        run, state = build_run(experiment, mesh, files, rows, held_out)
        distributed.check_same(
            {
                "config": json.dumps(config.to_dict()).encode(),
                "training data": rows.lengths.tobytes(),
                "held-out data": b"".join(
                    each.lengths.tobytes() for each in held_out.values()
                ),
            }
        )
        screen.say(describe_model(run, state))
        _, unchanged = tree.partition(run.frozen, is_start)
        base = {"source": files.source, "digest": digest(unchanged)}
        checkpoints = Checkpoints(experiment.checkpoint)
        closing.callback(checkpoints.close)
        progress = Progress()
        if experiment.checkpoint.resume and checkpoints.latest is not None:
            run, state, progress = resume(checkpoints, run, base)
            screen.say(f"resumed at step {progress.step}")
        writers = open_log(config, experiment, progress)
        closing.callback(writers.close)
        closing.callback(screen.stop)
        loop = Loop(
            experiment,
            run,
            screen,
            writers,
            watcher,
            checkpoints,
            base,
            tokenizer,
            watch,
        )
        state, metrics = loop.run_all(state, progress)
        model = run.model(state)
        screen.say(write_results(experiment, model))
    return Result(metrics, directory, model, tokenizer)


class Loop:
    """The loop itself, and what it writes to.

    Attributes:
      last: The last value of every metric.
    """

    def __init__(
        self,
        experiment: Experiment,
        run: Run,
        screen: Screen,
        writers: Writers,
        watcher: CompileWatcher,
        checkpoints: Checkpoints,
        base: Mapping[str, str],
        tokenizer: Any,
        watch: Callable[[int, float], None] | None,
    ):
        self.last: dict[str, float] = {}
        self._experiment = experiment
        self._run = run
        self._screen = screen
        self._writers = writers
        self._watcher = watcher
        self._checkpoints = checkpoints
        self._base = base
        self._tokenizer = tokenizer
        self._watch = watch
        peak = peak_flops(run.mesh.devices.flat[0].device_kind)
        self._meter = SpeedMeter(
            run.flops_per_token, peak and peak * run.mesh.devices.size
        )
        # Seconds since the meter was read in which nothing was trained.
        self._lost_seconds = 0.0

    def run_all(
        self, state: TrainState, progress: Progress
    ) -> tuple[TrainState, dict[str, float]]:
        """Judges, trains, and judges again."""
        is_done = self._is_done(progress)
        if is_done:
            self._screen.say(f"all {progress.step} steps are done already")
        if progress.step == 0:
            self._evaluate(state, progress)
            progress.eval_loss_before = self._eval_loss()
            self._answer(state, "before")
        elif is_done or (
            # Stopped there in a hurry.
            self._is_evaluation(progress.step) and progress.judged_step < progress.step
        ):
            self._evaluate(state, progress)
            self._keep_best(progress)
        state = self._train(state, progress)
        if self._experiment.evaluate.load_best_model_at_end and progress.kept_step:
            del state  # The best one takes its memory.
            state, _ = restore_state(self._checkpoints, progress.kept_step, self._run)
            self.last |= progress.best_metrics
            self._screen.say(
                f"step {progress.kept_step} was the best: it is the result"
            )
        self._answer(state, "after")
        before, after = progress.eval_loss_before, self._eval_loss()
        if before is not None and after is not None:
            self.last["eval_loss_before"] = before
            name = self._run.evaluation.loss_name
            self._screen.say(f"{name} {before:.4f} before, {after:.4f} after")
        self._screen.say(
            f"{self._watcher.count} compilations, {self._watcher.cache_hits} of them "
            f"kept from an earlier start, {self._watcher.seconds:.1f} s in all"
        )
        return state, self.last

    def _train(self, state: TrainState, progress: Progress) -> TrainState:
        """Takes all steps.

        A step's numbers are read while the next one runs. Nothing is saved before
        the numbers of all its steps have been found good.
        """
        run, batches = self._run, self._run.batches()
        self._screen.start(run.total_steps, progress.step)
        self._say_compiled()
        self._meter.read()
        pending: StepMetrics | None = None
        with StopRequest() as stop:
            for number in range(progress.step + 1, run.total_steps + 1):
                if self._is_done(progress):
                    break
                state, metrics = run.train_step(state, run.frozen, next(batches))
                if pending is not None:
                    self._settle(pending, progress)
                pending = metrics
                must_stop = stop.is_due(number)
                if self._is_pause(number) or must_stop:
                    self._settle(metrics, progress)
                    pending = None
                    self._pause(state, progress, must_stop)
            # A request to stop that comes now waits for the last checkpoint.
            self._checkpoints.wait()
        self._screen.stop()
        return state

    def _settle(self, metrics: StepMetrics, progress: Progress) -> None:
        """Waits for a step's numbers, checks them and logs them."""
        metrics = jax.device_get(metrics)
        step = progress.step + 1
        if not metrics.is_finite or not metrics.weight_sum:
            self._checkpoints.wait()
            saved = self._checkpoints.latest
            raise UserError(explain_bad_step(self._run, step, metrics, saved))
        self._warn_of_spike(step, metrics, progress)
        progress.add(metrics)
        self._meter.add(int(metrics.num_tokens))
        self._lost_seconds += self._say_compiled()
        log_steps = self._experiment.train.log_steps
        if step % log_steps and step != self._run.total_steps:
            self._screen.update(step)
            return
        speed = self._meter.read(self._lost_seconds)
        self._lost_seconds = 0.0
        metrics_of = self._experiment.metrics_module.summarize_training
        row = metrics_of(*progress.take_window()) | {
            "grad_norm": progress.grad_norm,
            "num_tokens": progress.num_tokens,
            # The rate that this step was taken with.
            "learning_rate": float(self._run.schedule(step - 1)),
            "epoch": step / self._run.loader.batches_per_epoch,
            "tokens_per_second": speed.tokens_per_second,
        }
        if speed.mfu is not None:
            row["mfu"] = speed.mfu
        if progress.gradient_noise_scale is not None:
            row["gradient_noise_scale"] = progress.gradient_noise_scale
        self._log(step, row)
        self._screen.update(step, row["loss"], speed.tokens_per_second)

    def _warn_of_spike(
        self, step: int, metrics: StepMetrics, progress: Progress
    ) -> None:
        loss = float(metrics.loss_sum) / float(metrics.weight_sum)
        usual = find_usual(progress.recent_losses, loss)
        if usual is None:
            return
        rows = self._run.loader.choose_rows(step - 1).tolist()
        self._screen.warn(
            f"step {step}: loss {loss:.4g} is far above the recent {usual:.4g}; if "
            f"this goes on, look at its rows ({', '.join(map(str, rows))})"
        )
        spike = {"loss_spike": loss, "usual_loss": usual, "rows": rows}
        self._writers.write(step, spike)

    def _say_compiled(self) -> float:
        """Reports what was compiled since the last call; returns its seconds."""
        seconds = 0.0
        for compiled in self._watcher.drain(_COMPILE_WORTH_A_LINE):
            self._screen.say(f"compiled {compiled.name} in {compiled.seconds:.1f} s")
            seconds += compiled.seconds
        return seconds

    def _is_pause(self, step: int) -> bool:
        """Whether something is evaluated or saved after this step."""
        return self._is_evaluation(step) or _is_multiple(
            step, self._experiment.checkpoint.save_steps
        )

    def _is_evaluation(self, step: int) -> bool:
        return step == self._run.total_steps or _is_multiple(
            step, self._experiment.evaluate.eval_steps
        )

    def _is_done(self, progress: Progress) -> bool:
        """Whether all steps are taken, or it does not pay to take more."""
        patience = self._experiment.evaluate.early_stopping_patience
        waited = progress.evaluations_without_gain
        return progress.step >= self._run.total_steps or 0 < patience <= waited

    def _pause(self, state: TrainState, progress: Progress, must_stop: bool) -> None:
        """Evaluates and saves, where it is time to."""
        step, save_steps = progress.step, self._experiment.checkpoint.save_steps
        started = time.perf_counter()
        must_save = must_stop or _is_multiple(step, save_steps)
        if self._is_evaluation(step) and not must_stop:
            self._evaluate(state, progress)
            is_best = progress.best_step == step
            must_save |= self._experiment.evaluate.load_best_model_at_end and is_best
        if must_save or self._is_done(progress):
            self._save(state, progress)
        if must_stop:
            self._checkpoints.wait()
            raise StoppedError(f"stopped at step {step}, which is saved; use --resume")
        if self._is_done(progress) and step < self._run.total_steps:
            self._screen.say(
                f"stopped at step {step}: {progress.evaluations_without_gain} "
                f"evaluations running were no better than that of step "
                f"{progress.best_step}"
            )
        self._say_compiled()
        self._lost_seconds += time.perf_counter() - started

    def _keep_best(self, progress: Progress) -> None:
        """Sees to it that the best step stays, once it is saved."""
        if progress.best_step == progress.step:
            progress.kept_step = progress.step
        self._checkpoints.kept_step = progress.kept_step

    def _save(self, state: TrainState, progress: Progress) -> None:
        self._keep_best(progress)
        self._checkpoints.save(
            progress.step,
            as_saved(self._run, state),
            {
                "progress": dataclasses.asdict(progress),
                "data": self._run.loader.state() | {"served": progress.step},
                "base": dict(self._base),
            },
        )

    def _evaluate(self, state: TrainState, progress: Progress) -> None:
        """Judges what is held out, if anything is, and says and logs what it finds."""
        judged, step = self._run.evaluate(state, self._tokenizer), progress.step
        if not judged.metrics:
            return
        judged.check_finite(step)
        options = self._experiment.evaluate
        metric = judged.find_metric(options.metric_for_best_model)
        self.last |= judged.metrics
        if progress.judged_step < step:
            self._log(step, judged.metrics)
            progress.judged_step = step
            if step:
                threshold = options.early_stopping_threshold
                compare(progress, judged.metrics, metric, threshold)
        numbers = (f"{name} {value:.5g}" for name, value in judged.metrics.items())
        for text in (f"step {step}: {', '.join(numbers)}", *judged.reports):
            self._screen.say(text)
        if self._watch is not None and step:
            self._watch(step, judged.metrics[metric])

    def _eval_loss(self) -> float | None:
        return self.last.get(self._run.evaluation.loss_name)

    def _answer(self, state: TrainState, when: str) -> None:
        """Shows what the model says to the config's prompt."""
        asked = self._experiment.evaluate
        if not asked.prompt:
            return
        from fjft.generation.text import ask, generate

        system = self._experiment.data.system
        answer = generate(
            self._run.model(state),
            self._tokenizer,
            [ask(self._tokenizer, asked.prompt, system)],
            max_new_tokens=asked.max_new_tokens,
        )[0]
        self._screen.say(f"{when} training\n  > {asked.prompt}\n  {answer.strip()}")

    def _log(self, step: int, row: Mapping[str, float]) -> None:
        self._writers.write(step, row)
        self.last |= row


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
