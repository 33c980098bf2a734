"""A label for each word: loss and gradients of packed rows equal torch's, by text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import torch

from fjft import tree
from fjft.objectives import token_classification as objective

CASE = "bert/tanh-gelu/token_classification"


def make_batch():
    """Two rows with two and three segments, where a word has one token or two."""
    random = np.random.default_rng(0)
    batch = tiny.make_batch([[9, 14], [6, 10, 5]], 24)
    # torch never trains the vector of the padding token, wherever it stands.
    ids = np.where(batch["input_ids"] == 3, 4, batch["input_ids"])
    labels = random.integers(0, 5, ids.shape)
    is_first = (random.random(ids.shape) < 0.7) & (batch["segment_ids"] != 0)
    labels = np.where(is_first, labels, -100).astype(np.int32)
    return batch | {"input_ids": ids, "labels": labels}


def test_packed_loss_and_gradients_equal_torchs(tmp_path):
    twin = tiny_encoders.make_torch(CASE)
    model = tiny.build_model(tiny_encoders.save(twin, tmp_path))
    batch = make_batch()
    graphdef, params = tree.split(model)

    def mean_loss(params, batch):
        model, config = tree.merge(graphdef, params), objective.Config()
        sums = objective.loss(model, batch, config)
        judged = objective.evaluate(model, batch, config)
        return sums.loss / sums.weight, (sums, judged)

    (loss, (sums, judged)), grads = jax.jit(
        jax.value_and_grad(mean_loss, has_aux=True)
    )(params, jax.tree.map(jnp.asarray, batch))
    total, said = torch.zeros(()), []
    for part in tiny.unpack(batch):
        labels = torch.tensor(part["labels"]).long()
        out = twin(torch.tensor(part["input_ids"]).long(), labels=labels)
        total = total + out.loss * int((labels != -100).sum())
        said.append(out.logits.argmax(-1)[labels != -100].numpy())
    count = int((batch["labels"] != -100).sum())
    (total / count).backward()
    assert float(loss) == pytest.approx(total.item() / count, rel=1e-5)
    is_word = batch["labels"] != -100
    np.testing.assert_array_equal(judged.said[is_word], np.concatenate(said))
    said = np.concatenate(said)
    assert float(sums.correct) == (said == batch["labels"][is_word]).sum()
    arrays = {n: p.grad.numpy() for n, p in twin.named_parameters()}
    for site in model.provenance.sites:
        expected = tiny.gather(site, arrays)
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], expected, atol=1e-4 * scale)
