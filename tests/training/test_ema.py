"""Averages of weights equal torch's, and are what is judged, written and resumed."""

import jax
import numpy as np
import pytest
import torch
from test_resume import interrupt_at, rows_of
from tiny_experiment import make_config, start
from torch.optim import swa_utils

import fjft
from fjft.build import build_experiment
from fjft.cli import evaluate, weights
from fjft.training.loop import train

DECAY = 0.7
VALUES = {
    "train__ema_decay": DECAY,
    "train__max_steps": 6,
    "evaluate__eval_steps": 3,
    "checkpoint__save_steps": 2,
}


def test_averages_equal_torchs(llama, tmp_path):
    started = start(make_config(llama, tmp_path, **VALUES))
    state, run = started.state, started.run
    names = {path: path.replace(".", "/") for path in state.params}
    twin = torch.nn.Module()
    for path, name in names.items():
        value = torch.tensor(np.array(state.params[path]))
        twin.register_parameter(name, torch.nn.Parameter(value))
    average = swa_utils.get_ema_multi_avg_fn(DECAY)
    theirs = swa_utils.AveragedModel(twin, multi_avg_fn=average)
    with jax.set_mesh(started.mesh):
        for _, batch in zip(range(5), run.batches(), strict=False):
            state, _ = run.train_step(state, run.frozen, batch)
            with torch.no_grad():
                for path, name in names.items():
                    value = torch.tensor(np.array(state.params[path]))
                    getattr(twin, name).copy_(value)
            theirs.update_parameters(twin)
            for path, name in names.items():
                expected = getattr(theirs.module, name).detach().numpy()
                np.testing.assert_allclose(state.average[path], expected, atol=1e-6)


def test_the_average_is_judged_written_and_resumed(llama, tmp_path, monkeypatch):
    whole = train(make_config(llama, tmp_path / "whole", **VALUES))
    judged = rows_of(tmp_path / "whole")
    # The parameters that were averaged are in the checkpoint too.
    adapter = tmp_path / "whole" / "adapter"
    for decay, step in ((DECAY, None), (DECAY, 6), (0.0, 6)):
        options = VALUES | {"train__ema_decay": decay}
        config = make_config(llama, tmp_path / "whole", **options)
        chosen = weights.Weights(
            source=llama,
            dtype="float32",
            experiment=build_experiment(config),
            adapter=None if step else adapter,
            step=step,
        )
        again = evaluate.evaluate(chosen).metrics["eval_loss"]
        is_same = again == pytest.approx(whole.metrics["eval_loss"], rel=1e-5)
        assert is_same == (decay > 0)

    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        with pytest.raises(fjft.UserError, match="stopped at step 3"):
            train(make_config(llama, tmp_path / "cut", **VALUES))
    train(make_config(llama, tmp_path / "cut", checkpoint__resume=True, **VALUES))
    assert rows_of(tmp_path / "cut") == judged
    name = "adapter/adapter_model.safetensors"
    written = (tmp_path / "cut" / name).read_bytes()
    assert written == (tmp_path / "whole" / name).read_bytes()


def test_what_is_pruned_is_not_averaged(llama, tmp_path):
    config = make_config(llama, tmp_path, **VALUES)
    config.peft = {"method": "adalora"}
    with pytest.raises(fjft.UserError, match=r"train\.ema_decay averages"):
        train(config)
