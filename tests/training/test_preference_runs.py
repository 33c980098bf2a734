"""DPO and its kin from rows to an adapter: margins grow, whatever cuts the batch."""

import functools
import json

import numpy as np
import pytest
from tiny_experiment import (
    assert_cuts_change_nothing,
    losses,
    run_config,
    start,
    take_steps,
)

import fjft
from fjft.cli.main import main


@pytest.fixture
def make_config(llama, tmp_path):
    random = np.random.default_rng(0)
    rows = []
    for _ in range(48):
        a, b = random.integers(0, 10, 2)
        asked = [{"role": "user", "content": f"What is {a} and {b}?"}]
        answers = (f"It is {a + b}.", f"No, it is {a} {b}!")
        good, bad = ([{"role": "assistant", "content": c}] for c in answers)
        rows.append({"prompt": asked, "chosen": good, "rejected": bad})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    defaults = {
        "model.source": llama,
        "data.train": str(path),
        "data.eval": "",
        "evaluate.eval_steps": 0,
        "data.eval_size": 16.0,
        "data.max_length": 160,
        "train.accumulation_steps": 1,
        "train.max_steps": 10,
        "train.log_steps": 1,
        "optimizer.learning_rate": 1e-2,
    }

    def make(file="smollm2_dpo.py", **overrides):
        return run_config(file, tmp_path / "run", defaults, **overrides)

    return make


def test_cuts_and_meshes_do_not_change_the_losses(make_config):
    assert_cuts_change_nothing(make_config(data__packing=True, data__max_length=320))


def test_orpo_needs_no_adapter(make_config):
    """Its likelihood is a microbatch's mean, so only the mesh may differ."""
    assert_meshes_change_nothing(
        make_config(objective__name="orpo", peft__method="full")
    )


def assert_meshes_change_nothing(config):
    _, plain = take_steps(start(config), 3)
    _, sharded = take_steps(start(config, (2, 2, 2)), 3)
    np.testing.assert_allclose(losses(sharded), losses(plain), rtol=1e-4)


@pytest.fixture
def make_kto_config(make_config, tmp_path):
    """The same answers, each by itself."""
    rows = []
    for line in (tmp_path / "rows.jsonl").open():
        row = json.loads(line)
        for name, label in (("chosen", True), ("rejected", False)):
            rows.append(
                {"prompt": row["prompt"], "completion": row[name], "label": label}
            )
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return functools.partial(
        make_config, file="smollm2_kto.py", data__train=str(path), data__eval_size=32.0
    )


def test_ktos_losses_are_the_same_on_every_mesh(make_kto_config):
    """Its reference point is a microbatch's, so only the mesh may differ."""
    assert_meshes_change_nothing(
        make_kto_config(data__packing=True, data__max_length=320)
    )


def test_desirable_answers_are_rewarded(make_kto_config, tmp_path, capsys):
    result = fjft.train(make_kto_config())
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    first, last = (row for row in log if "eval_loss" in row)
    # Where nothing has diverged, every sigmoid is a half.
    assert first["eval_loss"] == pytest.approx(0.5, rel=1e-6)
    assert last["eval_rewards/chosen"] > 0.05 > -0.05 > last["eval_rewards/rejected"]
    assert last["eval_num_answers"] == 32
    assert main(["evaluate", f"--run={tmp_path / 'run'}"]) == 0
    assert f"{result.metrics['eval_loss']:.6g}" in capsys.readouterr().out


def test_margins_grow_from_nothing(make_config, tmp_path, capsys):
    result = fjft.train(make_config())
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    first, last = (row for row in log if "eval_loss" in row)
    assert first["eval_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["eval_rewards/margins"] > 0.1
    assert last["eval_rewards/accuracies"] > 0.9
    assert last["eval_num_pairs"] == 16
    assert main(["evaluate", f"--run={tmp_path / 'run'}"]) == 0
    assert f"{result.metrics['eval_loss']:.6g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [{"peft__method": "full"}, {"peft__modules_to_save": "lm_head"}]
)
def test_the_reference_must_stay_as_it_is(make_config, options):
    with pytest.raises(fjft.UserError, match=r"without its adapter.*peft\.method=lora"):
        fjft.train(make_config(**options))


def test_the_start_must_be_the_reference(make_config):
    config = make_config(peft__init_lora_weights="loftq", model__quantization="int8")
    with pytest.raises(fjft.UserError, match=r"loftq.*another from the start"):
        fjft.train(config)
