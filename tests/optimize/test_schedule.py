"""Schedules against transformers' own, every step, and their error messages."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from fjft.errors import UserError
from fjft.optimize import schedule

TOTAL_STEPS = 50
PEAK = 3e-4

# name -> (our fields, transformers' scheduler_specific_kwargs)
EXTRAS = {
    "polynomial": [({"power": 2.0, "lr_end": 1e-5}, {"power": 2.0, "lr_end": 1e-5})],
    "cosine_with_min_lr": [({"min_lr_ratio": 0.1}, {"min_lr_rate": 0.1})],
    "inverse_sqrt": [({}, {}), ({"timescale": 20}, {"timescale": 20})],
    "warmup_stable_decay": [
        (
            {"num_decay_steps": 12, "decay_type": kind, "min_lr_ratio": floor},
            {"num_decay_steps": 12, "decay_type": kind, "min_lr_ratio": floor},
        )
        for kind, floor in [("cosine", 0.0), ("linear", 0.1), ("1-sqrt", 0.0)]
    ],
}
CASES = [
    (name, warmup, ours, theirs)
    for name in schedule.SCHEDULES
    for ours, theirs in EXTRAS.get(name, [({}, {})])
    for warmup in ([0] if name == "constant" else [0, 7])
]


def theirs_rates(name: str, warmup: int, extras: dict) -> np.ndarray:
    """Learning rates that transformers gives steps 0 to TOTAL_STEPS."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = transformers.optimization.get_scheduler(
        name, optimizer, warmup, TOTAL_STEPS, extras
    )
    rates = []
    for _ in range(TOTAL_STEPS + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize(("name", "warmup", "ours", "theirs"), CASES)
def test_equals_transformers_at_every_step(name, warmup, ours, theirs):
    config = schedule.Config(
        schedule=name, learning_rate=PEAK, warmup_steps=warmup, **ours
    )
    rate = jax.jit(schedule.make_schedule(config, TOTAL_STEPS))
    rates = np.array([rate(step) for step in range(TOTAL_STEPS + 1)])
    assert rates.dtype == np.float32
    expected = theirs_rates(name, warmup, theirs)
    # atol: 1 + cos(pi) is not quite 0 in anyone's float64.
    np.testing.assert_allclose(rates, expected, rtol=1e-7, atol=1e-15 * PEAK)


@pytest.mark.parametrize("total_steps", [10, 99, 1000])
@pytest.mark.parametrize("warmup_steps", [0, 0.03, 0.1, 0.999, 1, 7])
def test_counts_and_fractions_equal_transformers(warmup_steps, total_steps, tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), warmup_steps=warmup_steps, use_cpu=True
    )
    expected = arguments.get_warmup_steps(total_steps)
    assert schedule.count_steps(warmup_steps, total_steps) == expected


def test_step_zero_of_a_warmup_is_zero():
    config = schedule.Config(warmup_steps=0.1)
    rate = schedule.make_schedule(config, 20)
    assert float(rate(0)) == 0.0
    assert float(rate(2)) == np.float32(config.learning_rate)


def test_python_ints_and_traced_steps_agree_after_the_end():
    for name in schedule.SCHEDULES:
        rate = schedule.make_schedule(schedule.Config(schedule=name), 10)
        at_end = float(rate(12))
        assert math.isfinite(at_end)
        assert at_end == float(jax.jit(rate)(jnp.int32(12)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosinus"}, "'cosinus'.*linear, cosine.*polynomial"),
        ({"warmup_steps": 30}, "warmup_steps 30 is more than the run's 20 steps"),
        ({"warmup_steps": -1}, "warmup_steps -1 not negative"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 must be positive"),
        ({"schedule": "constant", "warmup_steps": 2}, "constant_with_warmup"),
        ({"schedule": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr"),
        ({"schedule": "polynomial", "learning_rate": 1e-8}, "lr_end 1e-07"),
        (
            {"schedule": "warmup_stable_decay", "num_decay_steps": 21},
            "0 warmup and 21 decay steps do not fit into 20",
        ),
        (
            {"schedule": "warmup_stable_decay", "decay_type": "exp"},
            "'exp'.*cosine, linear, 1-sqrt",
        ),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        schedule.make_schedule(schedule.Config(**fields), 20)
