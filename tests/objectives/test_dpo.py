"""DPO's losses, rewards and gradients equal trl's, our rows packed and its padded."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import tiny
import torch
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

import fjft
from fjft import tree
from fjft.errors import UserError
from fjft.models.bare import without_adapters
from fjft.objectives import dpo as objective
from fjft.objectives.cross_entropy import Chunks, token_log_probs
from fjft.peft import lora

CASE = "llama/llama3-rope-biases"
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Our model with an adapter that has learned something, and its PEFT directory."""
    root = tmp_path_factory.mktemp("dpo")
    twin = tiny.make_torch(tiny.make_config(CASE))
    base = tiny.save_torch(twin, root / "base")
    config = lora.Config(r=4, lora_alpha=8.0, target_modules="|".join(TARGETS))
    model = tiny.build_model(base, method=lora, peft_config=config)
    random = np.random.default_rng(0)
    graphdef, params = tree.split(model)
    learned, frozen = tree.partition(params, lora.is_trainable(config, ()))
    learned = {
        path: jnp.asarray(0.2 * random.standard_normal(x.shape), jnp.float32)
        for path, x in learned.items()
    }
    model = tree.merge(graphdef, frozen, learned)
    fjft.save_adapter(model, root / "adapter")
    return model, learned, frozen, twin, root


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


def make_trainer(twin, root, config):
    args = DPOConfig(
        output_dir=str(root / "trl"),
        use_cpu=True,
        report_to=[],
        beta=config.beta,
        loss_type=[config.loss_type],
    )
    rows = [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}] * 2
    trainer = DPOTrainer(
        model=twin,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.make_tokenizer(),
        peft_config=peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
    )
    weights = safetensors.numpy.load_file(root / "adapter/adapter_model.safetensors")
    tensors = {name: torch.tensor(value) for name, value in weights.items()}
    peft.set_peft_model_state_dict(trainer.model, tensors)
    return trainer


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_losses_rewards_and_gradients_equal_trls(adapted, tmp_path, loss_type):
    model, learned, frozen, _, root = adapted
    batch = make_batch()
    config = objective.Config(loss_type=loss_type, beta=0.3, chunk_tokens=16)
    graphdef, _ = tree.split(model)

    @jax.jit
    def gradient(learned, batch):
        def mean_loss(learned):
            model = tree.merge(graphdef, frozen, learned)
            reference = without_adapters(model)
            sums = objective.loss(model, batch, config, reference=reference)
            return sums.loss / sums.weight, sums

        return jax.value_and_grad(mean_loss, has_aux=True)(learned)

    (loss, sums), grads = gradient(learned, jax.tree.map(jnp.asarray, batch))

    trainer = make_trainer(tiny.make_torch(tiny.make_config(CASE)), root, config)
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
    # Gradients lie where the factors do, so PEFT's names are theirs too.
    tree.update(shown := tree.merge(graphdef, frozen, learned), grads)
    fjft.save_adapter(shown, tmp_path)
    assert trainer.model is not None
    named = dict(trainer.model.named_parameters())
    ours = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert len(ours) == 2 * 2 * 3
    for name, value in ours.items():
        wanted = named[name.replace(".weight", ".default.weight")].grad
        assert wanted is not None
        scale = max(float(wanted.abs().max()), 1e-3)
        np.testing.assert_allclose(value, wanted.numpy(), atol=1e-4 * scale)


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
