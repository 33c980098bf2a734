"""Hidden tokens: losses and gradients of packed rows equal torch's, text by text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import torch

from fjft import tree
from fjft.objectives import masked_lm

# Outputs that are tied to the embeddings, and some that are not.
CASES = {"bert/tanh-gelu/masked_lm": {}, "modernbert/no-biases-cls/masked_lm": {}}


def make_batch():
    """Two rows with two and three segments; a seventh of the tokens is learned."""
    random = np.random.default_rng(0)
    batch = tiny.make_batch([[9, 14], [6, 10, 5]], 24)
    # torch never trains the vector of the padding token, wherever it stands.
    ids = np.where(batch["input_ids"] == 3, 4, batch["input_ids"])
    is_learned = (random.random(ids.shape) < 1 / 7) & (batch["segment_ids"] != 0)
    labels = random.integers(4, tiny.VOCAB_SIZE, ids.shape)
    labels = np.where(is_learned, labels, -100).astype(np.int32)
    return batch | {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("case", CASES)
def test_packed_loss_and_gradients_equal_torchs(tmp_path, case):
    twin = tiny_encoders.make_torch(case)
    model = tiny.build_model(tiny_encoders.save(twin, tmp_path))
    batch = make_batch()
    graphdef, params = tree.split(model)

    def mean_loss(params, batch):
        config = masked_lm.Config(chunk_tokens=16, chunk_vocab_parts=4)
        sums = masked_lm.loss(tree.merge(graphdef, params), batch, config)
        return sums.loss / sums.weight, sums

    (loss, sums), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(
        params, jax.tree.map(jnp.asarray, batch)
    )
    total, right, count = torch.zeros(()), 0, 0
    for part in tiny.unpack(batch):
        labels = torch.tensor(part["labels"]).long()
        if (learned := int((labels != -100).sum())) == 0:
            continue
        out = twin(torch.tensor(part["input_ids"]).long(), labels=labels)
        total = total + out.loss * learned
        right += int((out.logits.argmax(-1) == labels).sum())
        count += learned
    (total / count).backward()
    assert float(loss) == pytest.approx(total.item() / count, rel=1e-5)
    assert (sums.correct, sums.weight) == (right, count)
    arrays = {n: p.grad.numpy() for n, p in twin.named_parameters()}
    for site in model.provenance.sites:
        expected = tiny.gather(site, arrays)
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], expected, atol=1e-4 * scale)
