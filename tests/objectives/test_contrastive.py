"""Vectors that find each other: packed loss and gradients equal a formula in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import torch

from fjft import tree
from fjft.errors import UserError
from fjft.objectives import contrastive as objective


def make_batch():
    """Two rows with two groups of three texts and one; a negative is missing."""
    batch = tiny.make_batch([[4, 6, 3, 5, 4], [6, 7, 5]], 24)
    del batch["labels"]
    batch["input_ids"] = np.where(batch["input_ids"] == 3, 4, batch["input_ids"])
    examples = [[[0, 0, 0], [1, 1, -1]], [[2, 2, 2], [-1, -1, -1]]]
    return batch | {"examples": np.array(examples, np.int32)}


def by_torch(vectors, dims):
    """Mean of anchors' losses, accuracy and reciprocal rank; of the last size both."""
    anchors, own, others = (
        torch.cat([vectors[i] for i in part]) for part in ((0, 3, 5), (1, 4, 6), (2, 7))
    )
    total = torch.zeros(())
    for size in dims:
        a, texts = (
            torch.nn.functional.normalize(x[:, :size], dim=-1)
            for x in (anchors, torch.cat([own, others]))
        )
        scores = 7.0 * a @ texts.T
        total = total + torch.nn.functional.cross_entropy(scores, torch.arange(3))
    order = scores.argsort(descending=True)
    ranks = 1 + (order == torch.arange(3)[:, None]).nonzero()[:, 1]
    return total, int((ranks == 1).sum()), float((1 / ranks).sum())


def test_packed_loss_and_gradients_equal_torchs(tmp_path):
    twin = tiny_encoders.make_torch("bert/tanh-gelu/base")
    model = tiny.build_model(tiny_encoders.save(twin, tmp_path))
    batch = make_batch()
    graphdef, params = tree.split(model)
    config = objective.Config(scale=7.0, matryoshka_dims=(8, 24))

    def mean_loss(params, batch):
        sums = objective.loss(tree.merge(graphdef, params), batch, config)
        return sums.loss / sums.weight, sums

    (loss, sums), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(
        params, jax.tree.map(jnp.asarray, batch)
    )
    tokens = {k: v for k, v in batch.items() if k != "examples"}
    states = [
        twin(torch.tensor(part["input_ids"]).long()).last_hidden_state
        for part in tiny.unpack(tokens)
    ]
    vectors = [x.mean(1) for x in states]
    expected, correct, ranks = by_torch(vectors, (8, 24))
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    assert (float(sums.weight), float(sums.correct)) == (3, correct)
    assert float(sums.reciprocal_ranks) == pytest.approx(ranks)
    arrays = {
        n: np.zeros(p.shape) if p.grad is None else p.grad.numpy()
        for n, p in twin.named_parameters()
    }
    for site in model.provenance.sites:
        wanted = tiny.gather(site, arrays)
        scale = max(np.abs(wanted).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], wanted, atol=1e-4 * scale)


def test_an_unknown_pooling_is_said():
    with pytest.raises(UserError, match=r"objective\.pooling='max'"):
        objective.Config(pooling="max")
