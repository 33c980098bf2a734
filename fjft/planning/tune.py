"""Searches settings: the fastest that fit, and what would make a config fit."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fjft.build import build_experiment, option_types
from fjft.errors import UserError
from fjft.models.stack import REMAT_POLICIES
from fjft.planning.planner import Planner
from fjft.planning.report import Report
from fjft.sharding import count_slices
from fjft.training.fit import gib

# Tokens a device whose logits exist at a time.
CHUNKS = (512, 1024, 2048, 4096)
# Microbatches of a step.
PIECES = (2, 4)
# What of the largest batch is tried besides, where the compiler works out again what no
# policy told it to: that takes longer than the rows are worth.
EASE = 0.75
# How near the largest batch is near enough, in parts of it, until the rest is settled.
SLACK = 0.1
# How much faster several microbatches must be, whose batch is so much larger, and rows
# of double the length.
WORTH = 1.01
# What a change must leave of the memory that is too much, at most, to be advice.
HELPFUL = 0.99

Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tried:
    """Settings that were tried, and what came of them.

    Attributes:
      changes: Values by dotted key.
      report: None if they cannot be had.
      is_hopeless: No batch makes them the fastest, so only the smallest was tried.
      is_eased: A larger batch fits, and is slower.
    """

    changes: Changes
    report: Report | None
    is_hopeless: bool = False
    is_eased: bool = False

    @property
    def speed(self) -> float:
        """Tokens a second; 0 if they do not fit."""
        if self.report is None or not self.report.fits:
            return 0.0
        return self.report.tokens_per_second or 0.0

    def describe(self) -> str:
        """One line."""
        settings = ", ".join(f"{k}={v}" for k, v in self.changes.items())
        if self.report is None or not self.report.fits:
            return f"does not fit: {settings}"
        if self.is_hopeless:
            most = self.report.most_tokens_per_second
            return f"at most {most:,.0f} tokens/s: {settings}"
        return f"{self.speed:,.0f} tokens/s, {gib(self.report.peak_bytes)}: {settings}"


def tune(planner: Planner, say: Callable[[str], None] = lambda line: None) -> Tried:
    """Searches the settings of highest estimated tokens a second that fit.

    One kind of setting after the other: how devices share the work, what is
    recomputed, how many logits exist at a time, into how many microbatches a step is
    cut, how long packed rows are; each with about the largest batch that fits, and with
    three quarters of it where the compiler has to make room, and the best one in the
    end with the largest. Settings whose products alone take longer than the best so far
    are given up after one compile; where products are all that holds up the best so
    far, the last three kinds are left out. Rows of half the length are told but not
    chosen: they would not hold the same examples.

    Args:
      planner: Of the config to start from.
      say: Told of each setting tried.

    Raises:
      UserError: Nothing fits, or the target's speed is not known.
    """
    target = planner.target
    if target.memory_bytes is None or target.peak_flops is None:
        raise UserError(
            f"the memory and speed of {target.name} are not known, so nothing can be "
            "tuned for it; name a target such as v5e-8"
        )
    best = Tried({}, None)

    def try_each(choices: Iterator[Changes], least_gain: float = 1.0) -> None:
        nonlocal best
        for choice in choices:
            to_beat = best.speed * least_gain
            tried = _try(planner, best.changes | choice, to_beat)
            say(tried.describe())
            if tried.speed > to_beat:
                best = tried

    try_each(_meshes(planner))
    try_each(_remats(planner))
    if best.report is None:
        raise UserError(
            f"nothing fits {target.name}: not one row on each device, whatever is "
            "recomputed; use a smaller data.max_length, peft.method=lora, or more "
            "devices"
        )
    if best.speed < (best.report.most_tokens_per_second or 0.0):
        try_each(_chunks(planner))
        try_each(_pieces(), WORTH)
        try_each(_longer(planner), WORTH)
        if not best.is_eased:
            largest = _try(planner, best.changes, slack=0.0)
            say(largest.describe())
            best = max(best, largest, key=lambda tried: tried.speed)
    else:
        say(
            "its products alone take as long as the whole step, so other chunks, more "
            "pieces and longer rows would not be faster"
        )
    half = {"data.max_length": _length(planner) // 2}
    say(f"not chosen: {_try(planner, best.changes | half).describe()}")
    return best


def _try(
    planner: Planner, changes: Changes, to_beat: float = 0.0, slack: float = SLACK
) -> Tried:
    """Settings with their fastest batch, or the smallest if none beats the best."""
    changes = {"train.accumulation_steps": 1} | changes
    changes.pop("train.batch_size", None)

    def plan(batch: int) -> Tried:
        sized = changes | {"train.batch_size": batch}
        return Tried(sized, planner.plan(sized))

    try:
        unit = planner.least_batch(changes)
        least = plan(unit)
    except UserError:
        return Tried(changes, None)  # a mesh that the model does not divide over
    if least.report is None or not least.report.fits:
        return least
    if (least.report.most_tokens_per_second or 0.0) <= to_beat:
        return dataclasses.replace(least, is_hopeless=True)
    most = plan(planner.max_batch(changes, slack))
    assert most.report is not None
    if not most.report.repeats:
        return most
    rows = max(int(most.report.batch_size * EASE) // unit, 1) * unit
    eased = dataclasses.replace(plan(rows), is_eased=True)
    return max(most, eased, key=lambda tried: tried.speed)


def _meshes(planner: Planner) -> Iterator[Changes]:
    """As the config says, and powers of two of copies and of tensor parallelism."""
    yield {}
    known = [planner.mesh({})]
    slices = count_slices(planner.target.devices)
    shared = known[0].shape["sequence"] * known[0].shape["expert"]
    devices = len(planner.target.devices) // (slices * shared)
    for data, tensor in ((1, 1), (2, 1), (devices, 1), (1, 2), (1, 4)):
        rest, left = divmod(devices, data * tensor)
        choice = {
            "mesh.data": data * slices,
            "mesh.fsdp": rest,
            "mesh.tensor": tensor,
        }
        if rest and not left and (mesh := planner.mesh(choice)) not in known:
            known.append(mesh)
            yield choice


def _remats(planner: Planner) -> Iterator[Changes]:
    given = build_experiment(planner.config).model.remat
    return ({"model.remat": name} for name in REMAT_POLICIES if name != given)


def _chunks(planner: Planner) -> Iterator[Changes]:
    if "objective.chunk_tokens" in option_types(planner.config.to_dict()):
        yield from ({"objective.chunk_tokens": tokens} for tokens in CHUNKS)


def _pieces() -> Iterator[Changes]:
    return ({"train.accumulation_steps": pieces} for pieces in PIECES)


def _longer(planner: Planner) -> Iterator[Changes]:
    """Packed rows of double the length hold the same examples."""
    if build_experiment(planner.config).data.packing:
        yield {"data.max_length": 2 * _length(planner)}


def _length(planner: Planner) -> int:
    return build_experiment(planner.config).data.max_length


def advise(planner: Planner, report: Report) -> Iterator[Tried]:
    """What would make a config that does not fit need less, one change at a time.

    Args:
      planner: Of the config.
      report: Its plan; changes that save nothing of it are left out.
    """
    config = planner.config.to_dict()

    def get(key: str, default: Any) -> Any:
        section, option = key.split(".")
        return config.get(section, {}).get(option, default)

    shards = len(planner.target.devices)
    rows = get("train.batch_size", 1)
    candidates: list[Changes] = []
    if get("model.remat", "full") != "full":
        candidates.append({"model.remat": "full"})
    if get("mesh.fsdp", -1) != -1:
        slices = count_slices(planner.target.devices)
        candidates.append({"mesh.data": slices, "mesh.fsdp": -1, "mesh.tensor": 1})
    if rows > shards and rows % shards == 0:
        candidates.append({"train.accumulation_steps": rows // shards})
    if get("data.max_length", 1024) >= 512:
        candidates.append({"data.max_length": get("data.max_length", 1024) // 2})
    if get("model.dtype", "bfloat16") == "float32":
        candidates.append({"model.dtype": "bfloat16"})
    if not get("optimizer.offload", False):
        candidates.append({"optimizer.offload": True})
    if get("optimizer.name", "adamw") == "adamw":
        candidates.append({"optimizer.name": "adafactor"})
    if get("peft.method", "full") == "full":
        candidates.append({"peft.method": "lora"})
    for changes in candidates:
        try:
            changed = planner.plan(changes)
        except UserError:
            continue  # cannot be had with the rest of the config
        if changed.peak_bytes < HELPFUL * report.peak_bytes:
            yield Tried(changes, changed)


def describe_advice(report: Report, tried: Tried) -> str:
    """`model.remat=full: 12.1 GiB instead of 17.3 GiB, which fits`."""
    assert tried.report is not None
    settings = ", ".join(f"{k}={v}" for k, v in tried.changes.items())
    verdict = "which fits" if tried.report.fits else "which is still too much"
    return (
        f"{settings}: {gib(tried.report.peak_bytes)} instead of "
        f"{gib(report.peak_bytes)}, {verdict}"
    )


def write_config(path: str, base: str, changes: Mapping[str, Any], how: str) -> str:
    """The text of a config that is another one with changes.

    Args:
      path: Where it will stand; named in its docstring.
      base: The other one, as `--config` takes it.
      changes: Values by dotted key.
      how: It came about.
    """
    values = "\n".join(f"    {key!r}: {value!r}," for key, value in changes.items())
    file, _, argument = base.partition(":")
    return f'''"""{file}, {how}.

    fjft train --config={path}
"""

import fjft

CHANGES = {{
{values}
}}


def get_config(arg: str = ""):
    """Returns the experiment; the argument is that of {file}."""
    variant = arg or {argument!r}
    return fjft.load_config({file!r} + (f":{{variant}}" if variant else ""), CHANGES)
'''
