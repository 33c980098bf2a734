"""ORPO's loss, rewards and gradients equal trl's, our rows packed and its padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from fjft import tree
from fjft.errors import UserError
from fjft.objectives import orpo as objective

CASE = "qwen3/no-window-tied"


def make_batch():
    """Two rows, of two pairs and of one."""
    batch = tiny.make_batch([[5, 7, 6, 4], [9, 8]], 24)
    examples = np.array([[[0, 0], [1, 1]], [[2, 2], [-1, -1]]], np.int32)
    return batch | {"examples": examples}


def trl_inputs(batch):
    """Chosen texts and rejected ones, padded."""
    parts = tiny.unpack({k: v for k, v in batch.items() if k != "examples"})
    found = {}
    for name, texts in (("chosen", parts[::2]), ("rejected", parts[1::2])):
        ids, seen = np.zeros((2, 3, 9), np.int64)
        labels = np.full((3, 9), -100)
        for row, part in enumerate(texts):
            size = part["input_ids"].shape[1]
            ids[row, :size], seen[row, :size] = part["input_ids"], 1
            labels[row, :size] = part["labels"]
        found |= {
            f"{name}_input_ids": torch.tensor(ids),
            f"{name}_attention_mask": torch.tensor(seen),
            f"{name}_labels": torch.tensor(labels),
        }
    return found


def test_loss_rewards_and_gradients_equal_trls(tmp_path):
    twin = tiny.make_torch(tiny.make_config(CASE))
    model = tiny.build_model(tiny.save_torch(twin, tmp_path))
    batch, config = make_batch(), objective.Config(beta=0.3, chunk_tokens=16)
    graphdef, params = tree.split(model)

    @jax.jit
    def gradient(params, batch):
        def mean_loss(params):
            sums = objective.loss(tree.merge(graphdef, params), batch, config)
            return sums.loss / sums.weight, sums

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    (loss, sums), grads = gradient(params, jax.tree.map(jnp.asarray, batch))

    rows = [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}] * 2
    trainer = ORPOTrainer(
        model=twin,
        args=ORPOConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, report_to=[], beta=0.3
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.make_tokenizer(),
    )
    theirs, logged = trainer.get_batch_loss_metrics(twin, trl_inputs(batch))
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    for ours, name in (
        (sums.chosen, "chosen"),
        (sums.rejected, "rejected"),
        (sums.correct, "accuracies"),
    ):
        assert float(ours) / 3 == pytest.approx(logged[f"rewards/{name}"], rel=1e-5)
    arrays = {n: p.grad.numpy() for n, p in twin.named_parameters()}
    for site in model.provenance.sites:
        expected = tiny.gather(site, arrays)
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], expected, atol=1e-4 * scale)


def test_certain_texts_have_finite_gradients():
    gradient = jax.grad(lambda x: objective._log1mexp(x).sum())
    x = jnp.array([0.0, -1e-9, -0.5, -30.0])
    assert np.isfinite(objective._log1mexp(x)).all()
    assert np.isfinite(gradient(x)).all()


def test_beta_is_checked():
    with pytest.raises(UserError, match=r"beta=0\.0"):
        objective.Config(beta=0.0)
