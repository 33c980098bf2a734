"""Logs that survive a kill, what the screen shows, speed, compiles and the picture."""

import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from fjft import telemetry, telemetry_plot, telemetry_speed
from fjft.errors import UserError


def write_run(directory, steps, **options) -> None:
    writers = telemetry.make_writers(directory, **options)
    for step in steps:
        writers.write(step, {"loss": 3.0 / (step + 1), "learning_rate": 1e-4})
    writers.close()


def read_lines(directory) -> list[dict]:
    text = (directory / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# ------------------------------------------------------------------- log files


def test_no_space_for_the_log_names_the_log(tmp_path):
    writer = telemetry.JsonlWriter(telemetry.Run(tmp_path, None, "run", {}))
    writer._file.close()
    writer._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    for act in (lambda: writer.write({"step": 1}), writer.close):
        with pytest.raises(OSError, match="No space left") as caught:
            act()
        assert caught.value.filename == "/dev/full"


def test_rows_are_plain_json_and_on_disk_before_close(tmp_path):
    writers = telemetry.make_writers(tmp_path)
    loss = jnp.float32(0.1)
    writers.write(
        1,
        {
            "loss": loss,
            "grad_norm": np.float32("nan"),
            "n": np.int64(3),
            "t": "é\u2028",
        },
    )
    (row,) = telemetry.read_log(tmp_path)
    # The float32 itself: a later run can be compared to the last digit.
    assert np.float32(row["loss"]) == np.float32(0.1)
    assert row == {
        "step": 1,
        "loss": float(loss),
        "grad_norm": None,
        "n": 3,
        "t": "é\u2028",
    }
    writers.close()


def test_resume_drops_what_was_logged_after_the_checkpoint(tmp_path):
    write_run(tmp_path, range(6))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in mid-line
    write_run(tmp_path, range(4, 8), resume_step=3)
    assert [row["step"] for row in read_lines(tmp_path)] == list(range(8))
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_fresh_run_starts_an_empty_log(tmp_path):
    write_run(tmp_path, range(3))
    write_run(tmp_path, [0])
    assert len(read_lines(tmp_path)) == 1


def test_only_the_main_process_writes(tmp_path):
    write_run(tmp_path / "run", [1], report_to="tensorboard", is_main_process=False)
    assert not (tmp_path / "run").exists()


def test_a_broken_line_is_named_and_a_missing_log_too(tmp_path):
    with pytest.raises(UserError, match="no log at"):
        telemetry.read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        telemetry.read_log(tmp_path)


def test_tensorboard_has_the_curves_under_train_and_eval(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    writers = telemetry.make_writers(tmp_path, "tensorboard")
    writers.write(1, {"loss": 2.5, "note": "text is left out"})
    writers.write(1, {"eval_loss": 2.25})
    writers.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = {}
    data = path.read_bytes()
    while data:  # length (8), its checksum (4), the record, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        for value in event_pb2.Event.FromString(data[12 : 12 + size]).summary.value:
            found[value.tag] = value.simple_value
        data = data[16 + size :]
    assert found == {"train/loss": 2.5, "eval/loss": 2.25}


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, package in [("tensorboard", "tensorboardX"), ("wandb", "wandb")]:
        with pytest.raises(UserError, match=f"pip install {package}"):
            telemetry.make_writers(tmp_path, [name])


def test_an_unknown_writer_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"'mlflow'.*tensorboard, wandb"):
        telemetry.make_writers(tmp_path, "tensorboard,mlflow")
    telemetry.make_writers(tmp_path, "none").close()


@pytest.mark.slow
def test_wandb_works_offline_and_resumes_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_run(tmp_path, [1, 2], report_to="wandb", config={"train": {"seed": 1}})
    name = (tmp_path / "wandb_id.txt").read_text()
    write_run(tmp_path, [3], report_to="wandb", resume_step=2)
    assert (tmp_path / "wandb_id.txt").read_text() == name
    # Offline, each part has a directory; `wandb sync` joins them by the id.
    parts = list((tmp_path / "wandb").glob(f"offline-run-*-{name}*"))
    assert len(parts) == 2


# ------------------------------------------------------------------ the screen


def make_screen(is_terminal: bool, **options) -> tuple[telemetry.Screen, io.StringIO]:
    out = io.StringIO()
    console = rich.console.Console(
        file=out,
        force_terminal=is_terminal,
        force_jupyter=False,
        width=100,
        _environ={"TERM": "xterm"},
    )
    return telemetry.Screen(console=console, **options), out


def test_without_a_terminal_one_plain_line_every_n_steps():
    screen, out = make_screen(is_terminal=False, print_every=5)
    screen.say("kept 10 rows [bold]as they are[/bold], " + "x" * 200)
    screen.start(12)
    for step in range(1, 13):
        screen.update(step, loss=2.0, tokens_per_second=12345.6)
    screen.warn("odd")
    screen.stop()
    lines = out.getvalue().splitlines()
    assert lines[0] == "kept 10 rows [bold]as they are[/bold], " + "x" * 200
    assert [line.split()[1] for line in lines[1:5]] == [
        "1/12",
        "5/12",
        "10/12",
        "12/12",
    ]
    assert lines[1] == "step 1/12  loss 2.0000  12,346 tokens/s"
    assert lines[4].endswith("tokens/s  0:00 left")
    assert lines[5] == "warning: odd"


def test_on_a_terminal_the_bar_moves_and_notes_stand_above_it():
    screen, out = make_screen(is_terminal=True)
    screen.start(4, start_step=1)
    screen.update(2, loss=1.5)
    screen.say("a note")
    screen.update(4, loss=1.25, tokens_per_second=1000.0)
    screen.stop()
    screen.stop()
    text = out.getvalue()
    assert "a note" in text
    assert "4/4" in text
    assert "loss 1.2500" in text


def test_a_hidden_screen_prints_nothing():
    screen, out = make_screen(is_terminal=True, show=False)
    screen.start(2)
    screen.say("x")
    screen.update(1, loss=1.0)
    screen.stop()
    assert out.getvalue() == ""


def test_importing_loads_neither_jax_nor_matplotlib():
    code = (
        "import sys, fjft.telemetry, fjft.telemetry_plot\n"
        "sys.exit(bool({'jax', 'matplotlib', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------------- speed


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_meter_reads_tokens_per_second_and_mfu():
    clock = Clock()
    meter = telemetry_speed.SpeedMeter(2e9, 1e13, clock)
    meter.add(3000)
    meter.add(1000)
    clock.now = 12.0
    speed = meter.read(excluded_seconds=10.0)
    assert speed == telemetry_speed.Speed(2000.0, 2000 * 2e9 / 1e13)
    meter.add(100)
    clock.now = 13.0
    assert meter.read().tokens_per_second == 100.0
    clock.now = 14.0
    assert telemetry_speed.SpeedMeter(clock=clock).read().mfu is None


def test_time_left_leaves_the_compiling_step_out():
    clock = Clock()
    ticks = telemetry_speed.StepClock(10, 20, clock)
    clock.now = 100.0
    ticks.tick(11)
    assert ticks.seconds_left() is None
    clock.now = 104.0
    ticks.tick(13)
    assert ticks.seconds_left() == 2.0 * 7


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3671, "1:01:11")]
)
def test_seconds_are_readable(seconds, text):
    assert telemetry_speed.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v4", 275),
        ("TPU v4 lite", None),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("Tesla T4", 65),
        ("cpu", None),
    ],
)
def test_peaks_by_device_kind(kind, teraflops):
    expected = None if teraflops is None else teraflops * 1e12
    assert telemetry_speed.peak_flops(kind) == expected


def test_rates_of_8_bits_by_device_kind():
    for kind in ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6e"):
        assert telemetry_speed.narrow_rates(kind) == {"int8": 2.0}
    hopper = telemetry_speed.narrow_rates("NVIDIA H100 80GB HBM3")
    assert hopper == {"int8": 2.0, "fp8": 2.0}
    for kind in ("TPU v4", "TPU v4 lite", "cpu"):
        assert telemetry_speed.narrow_rates(kind) == {}


def test_compiles_are_counted_by_name_until_closed():
    watcher = telemetry_speed.CompileWatcher()

    def watched_step(x):
        return x * 2

    step = jax.jit(watched_step)
    for shape in [(3,), (4,), (3,)]:
        step(np.zeros(shape, np.float32))
    names = [c.name for c in watcher.drain()]
    assert names.count("watched_step") == 2
    assert watcher.drain() == []
    assert watcher.count == len(names)
    assert watcher.seconds > 0
    watcher.close()
    step(np.zeros((5,), np.float32))
    assert watcher.count == len(names)


# ---------------------------------------------------------------- the picture


def test_the_curve_is_a_png_even_with_gaps(tmp_path):
    writers = telemetry.make_writers(tmp_path)
    writers.write(0, {"eval_seen_loss": 3.0, "eval_other_loss": 3.5})
    for step in range(1, 40):
        loss = float("nan") if step == 7 else 3.0 / step
        writers.write(step, {"loss": loss, "learning_rate": 1e-4 / step})
    writers.close()
    path = telemetry_plot.draw_curve(tmp_path, tmp_path / "figures" / "loss.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("rows", [[{"loss": 1.0}], [{"eval_loss": 1.0}]])
def test_the_curve_of_a_single_point(tmp_path, rows):
    writers = telemetry.make_writers(tmp_path)
    for row in rows:
        writers.write(1, row)
    writers.close()
    assert telemetry_plot.draw_curve(tmp_path, tmp_path / "loss.png").exists()


def test_a_log_without_a_loss_cannot_be_drawn(tmp_path):
    write = telemetry.make_writers(tmp_path)
    write.write(1, {"seconds": 3.0})
    write.close()
    with pytest.raises(UserError, match="no loss to draw"):
        telemetry_plot.draw_curve(tmp_path, tmp_path / "loss.png")


def test_smoothing_keeps_a_line_and_calms_noise():
    line = [float(i) for i in range(200)]
    np.testing.assert_allclose(telemetry_plot.smooth(line), line)
    noise = list(np.random.default_rng(0).normal(size=200))
    assert np.std(telemetry_plot.smooth(noise)) < 0.5 * np.std(noise)
