"""Starts and ends of answers: packed loss and gradients equal torch's, by window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import torch

from fjft import tree
from fjft.objectives import question_answering as objective

CASE = "bert/tanh-gelu/question_answering"
LABELS = np.array([[[3, 5], [0, 0], [-100, -100]], [[2, 2], [1, 9], [4, 4]]], np.int32)


def make_batch():
    """Two rows with two and three windows."""
    batch = tiny.make_batch([[9, 14], [6, 10, 5]], 24)
    types = np.random.default_rng(0).integers(0, 3, (2, 24)).astype(np.int32)
    # torch never trains the vector of the padding token, wherever it stands.
    ids = np.where(batch["input_ids"] == 3, 4, batch["input_ids"])
    examples = np.array([[0, 1, -1], [2, 3, 4]], np.int32)
    return batch | {
        "input_ids": ids,
        "token_type_ids": types,
        "labels": LABELS,
        "examples": examples[..., None],
    }


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
    labels = [pair for row in LABELS for pair in row if pair[0] >= 0]
    tokens = {k: v for k, v in batch.items() if v.shape == (2, 24)}
    total, right = torch.zeros(()), 0
    for number, part in enumerate(tiny.unpack(tokens)):
        start, end = (torch.tensor([place]) for place in labels[number].tolist())
        names = ("input_ids", "token_type_ids")
        inputs = {name: torch.tensor(part[name]).long() for name in names}
        out = twin(**inputs, start_positions=start, end_positions=end)
        total = total + out.loss / len(labels)
        said = out.start_logits.argmax(), out.end_logits.argmax()
        right += int(said == (start, end))
        row, segment = np.argwhere(batch["examples"][..., 0] == number)[0]
        ours = judged.logits[row][batch["segment_ids"][row] == segment + 1]
        theirs = torch.stack([out.start_logits, out.end_logits], -1)[0]
        assert tiny.max_error(ours, theirs.detach()) < 1e-4
    total.backward()
    assert float(loss) == pytest.approx(total.item(), rel=1e-5)
    assert (sums.correct, sums.weight) == (right, 5)
    arrays = {n: p.grad.numpy() for n, p in twin.named_parameters()}
    for site in model.provenance.sites:
        expected = tiny.gather(site, arrays)
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], expected, atol=1e-4 * scale)
