"""Vectors of texts: the negatives are the whole batch's, wherever its rows lie."""

import functools
import json

import numpy as np
import pytest
from tiny_experiment import losses, run_config, start, take_steps

import fjft


@pytest.fixture
def make_config(bert, tmp_path):
    random = np.random.default_rng(0)
    rows = []
    for _ in range(96):
        words = random.integers(0, 25, 3)
        texts = (" ".join(f"w{w + shift}" for w in words) for shift in (0, 25))
        rows.append(dict(zip("ab", texts, strict=True)))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    defaults = {
        "model.source": bert,
        "data.train": str(path),
        "data.eval_size": 16.0,
        "data.max_length": 32,
        "data.text_columns": "a,b",
        "objective.matryoshka_dims": (8, 24),
        "train.max_steps": 40,
        "peft.method": "full",
        "optimizer.learning_rate": 5e-3,
    }
    return functools.partial(
        run_config, "minilm_embeddings.py", tmp_path / "run", defaults
    )


def test_meshes_do_not_change_the_losses(make_config):
    config = make_config(data__packing=True)
    _, plain = take_steps(start(config), 3)
    _, sharded = take_steps(start(config, (2, 2, 2)), 3)
    np.testing.assert_allclose(losses(sharded), losses(plain), rtol=1e-4)


def test_a_run_finds_more(make_config):
    metrics = fjft.train(make_config()).metrics
    assert metrics["eval_loss"] < 0.8 * metrics["eval_loss_before"]
    assert metrics["eval_num_anchors"] == 16
    assert 0.2 < metrics["eval_accuracy"] <= metrics["eval_mrr"] <= 1
