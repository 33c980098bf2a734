"""KTO's loss, rewards and gradients equal trl's, our rows packed and its padded."""

import numpy as np
import pytest
import tiny
import torch
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from fjft.errors import UserError
from fjft.objectives import kto as objective

IS_DESIRABLE = [True, False, True]


def make_batch(seed):
    """Two rows, of two answers and of one, each beside a mismatched one."""
    batch = tiny.make_batch([[5, 7, 6, 4], [9, 8]], 24, seed)
    # Of each answer's three parts, of which one is never there.
    numbers = np.array([0, 1, 3, 5, 6], np.int32)
    batch["segment_ids"] = numbers[batch["segment_ids"]]
    examples = np.array(
        [[[0, -1, 0], [-1, 1, 1]], [[2, -1, 2], [-1, -1, -1]]], np.int32
    )
    return batch | {"examples": examples}


def trl_inputs(batch):
    """The answers, and the mismatched ones, padded."""
    parts = tiny.unpack({k: v for k, v in batch.items() if k != "examples"})
    parts = [part for part in parts if part["input_ids"].size]
    found = {"label": torch.tensor(IS_DESIRABLE)}
    for prefix, texts in (("", parts[::2]), ("KL_", parts[1::2])):
        ids, seen, learned = np.zeros((3, 3, 9), np.int64)
        for row, text in enumerate(texts):
            size = text["input_ids"].shape[1]
            ids[row, :size], seen[row, :size] = text["input_ids"], 1
            learned[row, :size] = text["labels"] != -100
        found |= {
            f"{prefix}input_ids": torch.tensor(ids),
            f"{prefix}attention_mask": torch.tensor(seen),
            f"{prefix}completion_mask": torch.tensor(learned),
        }
    return found


@pytest.mark.parametrize(("seed", "has_diverged"), [(3, True), (0, False)])
def test_loss_rewards_and_gradients_equal_trls(adapted, tmp_path, seed, has_diverged):
    batch = make_batch(seed)
    config = objective.Config(
        beta=0.3, desirable_weight=0.7, undesirable_weight=1.4, chunk_tokens=16
    )
    loss, sums, grads = adapted.gradients(objective, config, batch)

    args = KTOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=2,
        beta=0.3,
        desirable_weight=0.7,
        undesirable_weight=1.4,
    )
    rows = [{"prompt": "w1 ", "completion": "w2", "label": True}] * 2
    trainer = adapted.make_trainer(KTOTrainer, args, rows)
    theirs = trainer._compute_loss(trainer.model, trl_inputs(batch), False)
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert float(sums.weight) == 3
    assert (float(sums.kl) > 0) == has_diverged
    for ours, count, name in (
        (sums.desirable, 2, "rewards/chosen"),
        (sums.undesirable, 1, "rewards/rejected"),
        (sums.kl, 3, "kl"),
    ):
        assert float(ours) / count == pytest.approx(logged[name], rel=1e-4)
    adapted.assert_gradients_equal(grads, trainer.model, tmp_path)


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"desirable_weight": 0.0}, {"undesirable_weight": -1.0}]
)
def test_options_are_checked(options):
    with pytest.raises(UserError, match=r"objective\.\w+=[-\d.]+ is not positive"):
        objective.Config(**options)
