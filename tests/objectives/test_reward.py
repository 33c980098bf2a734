"""Rewards of texts: loss and gradients of packed pairs equal trl's, padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import torch
from datasets import Dataset
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from fjft import tree
from fjft.objectives import reward as objective

CASE = "bert/tanh-gelu/sequence_classification"


def make_batch():
    """Two rows, of two pairs and of one."""
    batch = tiny.make_batch([[5, 7, 6, 4], [9, 8]], 24)
    del batch["labels"]
    # torch never trains the vector of the padding token, wherever it stands.
    batch["input_ids"] = np.where(batch["input_ids"] == 3, 4, batch["input_ids"])
    examples = np.array([[[0, 0], [1, 1]], [[2, 2], [-1, -1]]], np.int32)
    return batch | {"examples": examples}


def test_loss_and_gradients_equal_trls(tmp_path):
    twin_config = tiny_encoders.make_config(CASE)
    twin_config.num_labels = 1
    twin = tiny_encoders.make_torch(CASE, twin_config)
    model = tiny.build_model(tiny_encoders.save(twin, tmp_path))
    batch = make_batch()
    config = objective.Config(center_rewards_coefficient=0.1)
    graphdef, params = tree.split(model)

    @jax.jit
    def gradient(params, batch):
        def mean_loss(params):
            sums = objective.loss(tree.merge(graphdef, params), batch, config)
            return sums.loss / sums.weight, sums

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    (loss, sums), grads = gradient(params, jax.tree.map(jnp.asarray, batch))

    parts = tiny.unpack({k: v for k, v in batch.items() if k != "examples"})
    ids, seen = np.full((6, 9), 3, np.int64), np.zeros((6, 9), np.int64)
    for row, part in enumerate(parts[::2] + parts[1::2]):
        size = part["input_ids"].shape[1]
        ids[row, :size], seen[row, :size] = part["input_ids"], 1
    trainer = RewardTrainer(
        model=twin,
        args=RewardConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            report_to=[],
            center_rewards_coefficient=0.1,
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_list([{"chosen": "w1", "rejected": "w2"}] * 2),
        processing_class=tiny.make_tokenizer(),
    )
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}
    theirs = trainer.compute_loss(twin.eval(), inputs)
    assert isinstance(theirs, torch.Tensor)
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    logged = trainer._metrics["eval"]
    assert float(sums.correct) / 3 == pytest.approx(logged["accuracy"][-1])
    margin = float(sums.chosen - sums.rejected) / 3
    assert margin == pytest.approx(logged["margin"][-1], rel=1e-4)
    arrays = {n: p.grad.numpy() for n, p in twin.named_parameters()}
    for site in model.provenance.sites:
        expected = tiny.gather(site, arrays)
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], expected, atol=1e-4 * scale)
