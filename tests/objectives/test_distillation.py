"""Distillation's loss and gradients equal torch's, ours packed and in chunks."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from fjft import tree
from fjft.errors import UserError
from fjft.objectives import distillation as objective
from fjft.objectives.divergence import Mixture, distilled_sums


@pytest.mark.parametrize(
    ("case", "teacher_case", "vocab_size"),
    [
        # With bent logits, and one's vocabulary padded further than the other's.
        ("gemma2/tight-caps", "llama/linear-rope-tied", 72),
        ("llama/linear-rope-tied", "gemma2/tight-caps", 56),
    ],
)
def test_packed_loss_and_gradients_equal_torchs(case, teacher_case, vocab_size):
    twin = tiny.make_torch(tiny.make_config(case))
    taught_by = tiny.make_torch(tiny.make_config(teacher_case, vocab_size=vocab_size))
    model, teacher = (
        tiny.build_model(tiny.memory_files(torch_model))
        for torch_model in (twin, taught_by)
    )
    batch = tiny.make_batch([[5, 7, 6, 4], [9, 8]], 24)
    batch["input_ids"] = np.minimum(batch["input_ids"], 55)
    batch["labels"] = np.minimum(batch["labels"], 55)
    config = objective.Config(
        teacher="", temperature=2.5, teacher_weight=0.3, chunk_tokens=16
    )
    graphdef, params = tree.split(model)

    @jax.jit
    def gradient(params, teacher_params, batch):
        def mean_loss(params):
            ours = tree.merge(graphdef, params)
            theirs = tree.merge(tree.split(teacher)[0], teacher_params)
            sums = objective.loss(ours, batch, config, teacher=theirs)
            return sums.loss / sums.weight, sums

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    arrays = jax.tree.map(jnp.asarray, batch)
    (loss, sums), grads = gradient(params, tree.split(teacher)[1], arrays)

    total, entropies, divergences = torch.zeros(3)
    count = 0
    size = min(64, vocab_size)
    for part in tiny.unpack(batch):
        ids, labels = (torch.tensor(part[n]).long() for n in ("input_ids", "labels"))
        is_learned = labels[0, 1:] != -100
        targets = labels[0, 1:][is_learned]
        logits = twin(ids).logits[0, :-1][is_learned]
        with torch.no_grad():
            wanted = taught_by(ids).logits[0, :-1][is_learned]
        entropy = functional.cross_entropy(logits, targets, reduction="sum")
        divergence = functional.kl_div(
            functional.log_softmax(logits[:, :size] / 2.5, -1),
            functional.softmax(wanted[:, :size] / 2.5, -1),
            reduction="sum",
        )
        total = total + 0.7 * entropy + 0.3 * 2.5**2 * divergence
        entropies, divergences = entropies + entropy, divergences + divergence
        count += len(targets)
    (total / count).backward()
    assert float(sums.weight) == count
    for ours, theirs in (
        (loss, total / count),
        (sums.cross_entropy, entropies),
        (sums.divergence, divergences),
    ):
        assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    named = {n: p.grad.numpy() for n, p in twin.named_parameters()}
    for site in model.provenance.sites:
        expected = tiny.gather(site, named)
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], expected, atol=1e-4 * scale)


def test_nothing_holds_all_logits_and_frozen_matrices_cost_no_gradient():
    B, T, D, V = 2, 12, 16, 60
    hidden, matrix = jnp.ones((B, T, D)), jnp.ones((V, D))
    targets, weights = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))

    def loss(hidden):
        return distilled_sums(
            [(hidden, matrix)],
            [(hidden, matrix)],
            targets,
            weights,
            chunk_tokens=8,
            mixture=Mixture(2.0, 0.5),
        ).loss

    shapes = jaxprs.shapes(jax.make_jaxpr(jax.grad(loss))(hidden).jaxpr)
    assert max(map(np.prod, shapes)) < B * T * V
    assert (V, D) not in shapes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"teacher_weight": 1.5}, r"teacher_weight=1\.5"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        objective.Config(teacher="x", **options)
