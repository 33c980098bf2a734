"""Encoder-decoders: loss and gradients of packed rows, by torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_seq2seq
import torch

from fjft import tree
from fjft.objectives import seq2seq as objective

LENGTHS = [[(9, 5), (4, 7)], [(6, 6), (3, 8), (5, 2)]]  # of sources and targets
T = 20


def make_batch(rows):
    """Packed rows of random texts, with -1 and -100 where one of the two has ended."""
    columns = ("input_ids", "labels", "positions", "segment_ids")
    batch: dict[str, Any] = {
        name: np.zeros((len(rows), T), np.int32) for name in columns
    }
    batch["input_ids"] -= 1
    batch["labels"] -= 100
    ids = tiny_seq2seq.random_ids(2, len(rows), T)
    for row, texts in enumerate(rows):
        start = 0
        for number, (source, target) in enumerate(texts, 1):
            size = max(source, target)
            here = slice(start, start + size)
            batch["segment_ids"][row, here] = number
            batch["positions"][row, here] = np.arange(size)
            for name, length, values in zip(
                columns, (source, target), ids, strict=False
            ):
                part = slice(start, start + length)
                batch[name][row, part] = values[row, part]
            start += size
    return batch


def _texts(batch):
    """Each example's source and target for torch."""
    for part in tiny.unpack(batch):
        source, target = part["input_ids"], part["labels"]
        yield [torch.tensor(ids[ids >= 0])[None].long() for ids in (source, target)]


@pytest.mark.parametrize("case", ["t5/relu-tied", "mbart/pre-norm", "bart/post-norm"])
def test_packed_loss_and_gradients_equal_torchs(case):
    twin = tiny_seq2seq.make_torch(tiny_seq2seq.make_config(case))
    model = tiny.build_model(tiny.memory_files(twin))
    batch = make_batch(LENGTHS)
    graphdef, params = tree.split(model)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        model = tree.merge(graphdef, params)
        arrays = jax.tree.map(jnp.asarray, batch)
        sums = objective.loss(model, arrays, objective.Config())
        return sums.loss / sums.weight

    loss, grads = mean_loss(params)
    total, count = torch.zeros(()), 0
    for source, target in _texts(batch):
        total = total + twin(input_ids=source, labels=target).loss * target.numel()
        count += target.numel()
    (total / count).backward()
    assert float(loss) == pytest.approx(total.item() / count, rel=1e-5)
    named = twin.named_parameters()
    arrays = {n: p.grad.numpy() for n, p in named if p.grad is not None}
    for site in model.provenance.sites:
        if site.path == "bias":  # never trained
            continue
        expected = tiny.gather(site, arrays)
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], expected, atol=1e-4 * scale)
