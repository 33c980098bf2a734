"""Evaluation against torch, token by token, whatever the batches."""

import jax
import numpy as np
import pytest
import torch
import transformers
from tiny_experiment import make_config, start

from fjft.build import build_experiment
from fjft.data.dataset import load_examples


@pytest.fixture(scope="module")
def judged(llama):
    """What torch makes of each held-out example: NLLs, and whether it hit."""
    experiment = build_experiment(make_config(llama, "unused"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    held_out = load_examples(experiment.data, tokenizer, 0)[1][""]
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype="float32")
    losses, hits = [], []
    for i in range(len(held_out.examples)):
        ids, labels = held_out.examples[i].columns.values()
        with torch.no_grad():
            logits = model(torch.tensor(ids[None]).long()).logits[0, :-1].double()
        log_probs = logits.log_softmax(-1).numpy()
        for position, target in enumerate(labels[1:]):
            if target != -100:
                losses.append(-log_probs[position, target])
                hits.append(log_probs[position].argmax() == target)
    return held_out, np.mean(losses), np.mean(hits), len(losses)


@pytest.mark.parametrize(
    ("batch_size", "packing", "mesh"),
    [
        (16, True, (1, 1, 1)),
        (3, True, (1, 1, 1)),  # the last batch is partly empty
        (5, False, (1, 1, 1)),
        (8, True, (2, 2, 2)),
    ],
)
def test_eval_loss_is_torchs_mean_over_tokens(
    llama, judged, tmp_path, batch_size, packing, mesh
):
    held_out, loss, accuracy, count = judged
    config = make_config(
        llama, tmp_path, evaluate__batch_size=batch_size, data__packing=packing
    )
    started = start(config, mesh)
    assert len(held_out.examples) == 16
    if batch_size == 3:
        assert len(held_out) % 3, "the last batch should have been partial"
    with jax.set_mesh(started.mesh):
        found = started.run.evaluate(started.state).metrics
    assert found["eval_num_tokens"] == count
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert found["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-12)
    assert found["eval_perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
