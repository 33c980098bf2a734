"""The search for the fastest settings, on a machine that is made up."""

import dataclasses
from typing import Any, cast

import jax
import pytest

import fjft
from fjft.build import override
from fjft.errors import UserError
from fjft.planning import tune
from fjft.planning.picture import draw
from fjft.planning.planner import Planner
from fjft.planning.report import Report
from fjft.planning.targets import Target

GIB = 2**30
# What each setting costs: memory of a row in GiB, and FLOPs over the model's.
REMAT = {"full": (0.1, 4 / 3), "dots": (0.4, 1.1), "none": (20.0, 1.0)}


def cost(remat: str) -> tuple[float, float]:
    """Of a policy that is not in the table, as much as full."""
    return REMAT.get(remat, REMAT["full"])


def make_report(**changes: Any) -> Report:
    report = Report(
        target="x-1",
        devices=1,
        mesh="",
        batch_size=1,
        length=1000,
        fits=True,
        peak_bytes=3 * GIB,
        limit_bytes=10 * GIB,
        parts={"frozen weights": 2 * GIB, "temporaries": GIB},
        host_bytes=0,
        buffers=[],
        model_flops=1e12,
        hardware_flops=2e12,
        wide_flops=2e12,
        memory_bytes=1e9,
        collectives={"all-gather": (3, 1e6)},
        compute_seconds=2.0,
        memory_seconds=0.5,
        link_seconds=0.1,
        price_per_hour=36.0,
        total_steps=None,
        repeats=0,
        compile_seconds=1.0,
        notes=[],
        find_max_batch=lambda: 7,
    )
    return dataclasses.replace(report, **changes)


class MadeUp:
    """Weights of 2 GiB on a chip of 10; a lighter policy is faster and takes more."""

    def __init__(
        self,
        limit: int | None = 10 * GIB,
        fixed: float = 2.0,
        update: float = 0.0,
        devices: int = 1,
        is_slow: bool = True,
    ):
        self.target = Target(
            name="x-1",
            devices=jax.devices()[:devices],
            memory_bytes=limit,
            peak_flops=1e12,
            memory_bandwidth=1e9,
            link_bandwidth=1e9,
            price=1.0,
        )
        self.config = fjft.load_config("configs/llama31_8b_lora.py")
        self.fixed = fixed
        self.update = update  # seconds of memory traffic
        self.is_slow = is_slow  # its memory
        self.searched = []

    def mesh(self, changes):
        return Planner.mesh(cast(Any, self), changes)

    def _change(self, changes):
        return Planner._change(cast(Any, self), changes)

    def least_batch(self, changes):
        return changes.get("train.accumulation_steps", 1)

    def max_batch(self, changes, slack):
        self.searched.append(changes)
        room, _ = cost(changes.get("model.remat", "full"))
        pieces = changes.get("train.accumulation_steps", 1)
        return max(0, int((10 - self.fixed) / room)) * pieces

    def plan(self, changes):
        batch = changes["train.batch_size"]
        room, work = cost(changes.get("model.remat", "full"))
        chunk = changes.get("objective.chunk_tokens", 512)
        pieces = changes.get("train.accumulation_steps", 1)
        seconds = batch * work
        traffic = seconds * (1 + 1 / chunk) + self.update
        peak = int((self.fixed + room * batch / pieces) * GIB)
        return make_report(
            batch_size=batch,
            fits=peak <= 10 * GIB,
            peak_bytes=peak,
            compute_seconds=seconds,
            memory_seconds=traffic if self.is_slow else 0.0,
            link_seconds=0.0,
        )


def test_the_fastest_that_fits_wins():
    said, planner = [], MadeUp()
    best = tune.tune(planner, said.append)  # type: ignore[arg-type]
    assert best.changes == {
        "model.remat": "dots",
        "objective.chunk_tokens": 4096,
        "train.accumulation_steps": 1,
        "train.batch_size": 20,
    }
    assert any("does not fit" in line and "none" in line for line in said)
    # What computes longer than the best took is not given a batch.
    searched = [changes.get("model.remat") for changes in planner.searched]
    assert searched == [None, "attention", *["dots"] * 7]
    assert any("at most" in line and "offload" in line for line in said)
    length = planner.config.to_dict()["data"]["max_length"]
    assert f"data.max_length={length * 2}" in said[-3]
    assert said[-1].startswith("not chosen: ")
    assert f"data.max_length={length // 2}" in said[-1]


def test_a_step_is_cut_where_that_is_worth_its_batch():
    best = tune.tune(MadeUp(update=2.0))  # type: ignore[arg-type]
    assert best.changes["train.accumulation_steps"] == 4
    assert best.changes["train.batch_size"] == 80


def test_memory_is_not_filled_where_that_is_slower(monkeypatch):
    """As where the compiler works out again what it has no room for."""
    planner = MadeUp()

    def plan(changes):
        report = MadeUp.plan(planner, changes)
        is_full = report.peak_bytes > 0.9 * 10 * GIB
        slowed = (report.memory_seconds or 0.0) * (1.2 if is_full else 1.0)
        return dataclasses.replace(report, memory_seconds=slowed, repeats=is_full)

    monkeypatch.setattr(planner, "plan", plan)
    best = tune.tune(planner)  # type: ignore[arg-type]
    assert best.is_eased
    assert best.changes["model.remat"] == "dots"
    assert best.changes["train.batch_size"] == 15  # of 20 that fit


def test_what_products_alone_hold_up_is_searched_no_further():
    said, planner = [], MadeUp(is_slow=False)
    best = tune.tune(planner, said.append)  # type: ignore[arg-type]
    assert best.changes["model.remat"] == "dots"
    assert "objective.chunk_tokens" not in best.changes
    assert any("would not be faster" in line for line in said)
    searched = [changes.get("model.remat") for changes in planner.searched]
    assert searched == [None, "dots", "dots"]  # the last for rows of half the length


@pytest.mark.parametrize("packing", [True, False])
def test_packed_rows_are_made_longer_where_that_is_faster(monkeypatch, packing):
    """As where one row is too little for a chip, and two are too much for it."""
    planner = MadeUp()
    override(planner.config, {"data.packing": packing, "data.max_length": 512})

    def plan(changes):
        report = MadeUp.plan(planner, changes)
        length = changes.get("data.max_length", 512)
        seconds = (report.memory_seconds or 0.0) * 500 / length
        return dataclasses.replace(report, compute_seconds=0.1, memory_seconds=seconds)

    monkeypatch.setattr(planner, "plan", plan)
    said = []
    best = tune.tune(planner, said.append)  # type: ignore[arg-type]
    assert best.changes.get("data.max_length") == (1024 if packing else None)
    assert "data.max_length=256" in said[-1]


@pytest.mark.parametrize(
    ("sequence", "meshes"),
    [
        (1, [(1, 8, 1), (2, 4, 1), (8, 1, 1), (1, 4, 2), (1, 2, 4)]),
        (4, [(1, 2, 1), (2, 1, 1), (1, 1, 2)]),
    ],
)
def test_every_mesh_is_tried_once(sequence, meshes):
    planner = MadeUp(devices=8)
    override(planner.config, {"mesh.sequence": sequence})
    tried = [planner.mesh(choice) for choice in tune._meshes(planner)]  # type: ignore[arg-type]
    sizes = [tuple(m.shape[axis] for axis in ("data", "fsdp", "tensor")) for m in tried]
    assert sizes == meshes


def test_nothing_fits():
    with pytest.raises(UserError, match="nothing fits x-1"):
        tune.tune(MadeUp(fixed=11.0))  # type: ignore[arg-type]


def test_a_machine_of_unknown_memory_is_not_tuned_for():
    with pytest.raises(UserError, match="are not known"):
        tune.tune(MadeUp(limit=None))  # type: ignore[arg-type]


def test_advice_says_what_each_change_helps(monkeypatch):
    planner = MadeUp()
    planner.config = fjft.load_config(
        "configs/llama31_8b_lora.py",
        {"model.remat": "none", "train.batch_size": 4, "data.max_length": 1024},
    )
    base = {"train.batch_size": 4, "model.remat": "none"}
    planner.plan = lambda changes: MadeUp.plan(planner, base | changes)
    report = planner.plan({})
    found = {str(t.changes): t for t in tune.advise(planner, report)}  # type: ignore[arg-type]
    assert "{'data.max_length': 512}" not in found  # takes as much on this machine
    line = tune.describe_advice(report, found["{'model.remat': 'full'}"])
    assert line == "model.remat=full: 2.40 GiB instead of 82.00 GiB, which fits"


def test_what_was_found_is_written_as_a_config(tmp_path):
    path = tmp_path / "tuned.py"
    base = "configs/llama31_8b_lora.py:smoke"
    changes = {"train.batch_size": 96, "model.remat": "dots"}
    path.write_text(tune.write_config(str(path), base, changes, "tuned"))
    config = fjft.load_config(str(path)).to_dict()
    assert config["train"]["batch_size"] == 96
    assert config["model"]["remat"] == "dots"
    assert config["data"]["max_length"] == 64  # the smoke variant's


def test_times_and_prices():
    report = make_report(total_steps=100)
    assert report.step_seconds == 2.0
    assert report.tokens_per_second == 500
    assert report.mfu == 0.5
    assert report.total_seconds == 200
    assert report.total_price == pytest.approx(2.0)
    text = "\n".join(report.describe())
    assert "100 steps, 0.06 h, 2.00 dollars" in text
    assert "2.00 times as many" in text
    assert "a million tokens" in "\n".join(make_report().describe())
    assert "largest batch" not in text
    free = dataclasses.replace(report, price_per_hour=None)
    assert free.total_price is None
    assert any("give it by --price" in line for line in free.describe())
    assert report.max_batch == 7
    assert report.to_dict()["max_batch"] == 7


@pytest.mark.parametrize("known", [True, False])
def test_the_picture(tmp_path, known):
    report = make_report()
    if not known:
        report = dataclasses.replace(report, compute_seconds=None, limit_bytes=None)
    path = tmp_path / "plan.png"
    draw(report).savefig(path)
    assert path.stat().st_size > 5000
