"""DPO's losses, rewards and gradients equal trl's, our rows packed and its padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from fjft import tree
from fjft.errors import UserError
from fjft.models.bare import without_adapters
from fjft.objectives import dpo as objective
from fjft.objectives.chunks import Chunks
from fjft.objectives.cross_entropy import token_log_probs


def make_batch():
    """Two rows, of two pairs and of one."""
    batch = tiny.make_batch([[5, 7, 6, 4], [9, 8]], 24)
    examples = np.array([[[0, 0], [1, 1]], [[2, 2], [-1, -1]]], np.int32)
    return batch | {"examples": examples}


def trl_inputs(batch):
    """Chosen texts, then rejected ones, padded."""
    parts = tiny.unpack({k: v for k, v in batch.items() if k != "examples"})
    parts = parts[::2] + parts[1::2]
    arrays = {name: np.zeros((6, 9), np.int64) for name in ("ids", "seen", "learned")}
    for row, part in enumerate(parts):
        size = part["input_ids"].shape[1]
        arrays["ids"][row, :size] = part["input_ids"]
        arrays["seen"][row, :size] = 1
        arrays["learned"][row, :size] = part["labels"] != -100
    names = ("input_ids", "attention_mask", "completion_mask")
    return dict(zip(names, map(torch.tensor, arrays.values()), strict=True))


def make_trainer(adapted, config):
    args = DPOConfig(
        output_dir=str(adapted.root / "trl"),
        use_cpu=True,
        report_to=[],
        beta=config.beta,
        loss_type=[config.loss_type],
    )
    rows = [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}] * 2
    return adapted.make_trainer(DPOTrainer, args, rows)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_losses_rewards_and_gradients_equal_trls(adapted, tmp_path, loss_type):
    batch = make_batch()
    config = objective.Config(loss_type=loss_type, beta=0.3, chunk_tokens=16)
    loss, sums, grads = adapted.gradients(objective, config, batch)

    trainer = make_trainer(adapted, config)
    theirs = trainer._compute_loss(trainer.model, trl_inputs(batch), False)
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert float(sums.weight) == 3
    for ours, name in (
        (sums.chosen, "chosen"),
        (sums.rejected, "rejected"),
        (sums.correct, "accuracies"),
    ):
        assert float(ours) / 3 == pytest.approx(logged[f"rewards/{name}"], rel=1e-4)
    adapted.assert_gradients_equal(grads, trainer.model, tmp_path)


def test_how_far_the_model_is_from_its_reference_equals_torchs(adapted):
    batch = make_batch()
    config = objective.Config(chunk_tokens=16)
    model = tree.merge(adapted.graphdef, adapted.frozen, adapted.learned)
    reference = without_adapters(model)
    arrays = jax.tree.map(jnp.asarray, batch)
    sums = objective.evaluate(model, arrays, config, reference=reference)

    twin = make_trainer(adapted, config).model.eval()
    total, count = 0.0, 0
    for part in tiny.unpack({k: v for k, v in batch.items() if k != "examples"}):
        ids = torch.tensor(part["input_ids"]).long()
        with torch.no_grad():
            ours = twin(ids).logits.log_softmax(-1)
            with twin.disable_adapter():
                theirs = twin(ids).logits.log_softmax(-1)
        kl = torch.nn.functional.kl_div(theirs, ours, reduction="none", log_target=True)
        is_learned = torch.tensor(part["labels"])[:, 1:] != -100
        total += float(kl.sum(-1)[:, :-1][is_learned].sum())
        count += int(is_learned.sum())
    assert int(sums.num_tokens) == count
    assert total > 0
    assert float(sums.kl) == pytest.approx(total, rel=1e-5)


def test_smoothed_labels_are_wrong_so_often():
    """Conservative DPO: the loss of a pair and of its reverse, by their shares."""
    margins = np.array([[-7.0, 0.0, 0.5, 40.0]], np.float32)
    config = objective.Config(beta=0.3, label_smoothing=0.2)
    for is_training, share in ((True, 0.2), (False, 0.0)):
        ours = objective._losses(jnp.asarray(margins), config, is_training=is_training)
        scaled = 0.3 * torch.tensor(margins)
        right, wrong = (-torch.nn.functional.logsigmoid(x) for x in (scaled, -scaled))
        np.testing.assert_allclose(ours, (1 - share) * right + share * wrong, rtol=1e-6)


def test_log_probs_and_their_gradients_equal_torchs():
    random = np.random.default_rng(0)
    hidden = random.standard_normal((2, 12, 16)).astype(np.float32)
    matrix = random.standard_normal((60, 16)).astype(np.float32)
    targets = random.integers(0, 60, (2, 12)).astype(np.int32)
    weights = random.standard_normal((2, 12)).astype(np.float32)

    def total(hidden, matrix):
        found = token_log_probs(
            ((hidden, matrix),), jnp.asarray(targets), chunks=Chunks(8), softcap=3.0
        )
        return jnp.sum(found * weights)

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, matrix)
    leaves = [torch.tensor(x, requires_grad=True) for x in (hidden, matrix)]
    logits = 3 * torch.tanh(leaves[0] @ leaves[1].T / 3)
    found = torch.log_softmax(logits, -1).gather(
        -1, torch.tensor(targets)[..., None].long()
    )
    expected = (found[..., 0] * torch.tensor(weights)).sum()
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    for ours, leaf in zip(grads, leaves, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(ours, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type='dpo'"),
        ({"beta": 0.0}, r"beta=0\.0"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "loss_type=sigmoid only"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        objective.Config(**options)
