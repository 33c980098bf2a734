"""Rewards of texts: loss and gradients of packed pairs equal trl's, padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import torch
import transformers
from datasets import Dataset
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

import fjft
from fjft import tree
from fjft.errors import UserError
from fjft.objectives import reward as objective

CASES = [
    "bert/tanh-gelu/sequence_classification",
    "llama/llama3-rope-biases",
    "qwen3/no-window-tied",
]


def make_twin(case, num_labels=1):
    """The torch model of a case with a head for whole texts."""
    if case.startswith("bert"):
        config = tiny_encoders.make_config(case)
        config.num_labels = num_labels
        return tiny_encoders.make_torch(case, config)
    config = tiny.make_config(case, num_labels=num_labels, pad_token_id=3)
    twin = tiny.make_torch(config, auto=transformers.AutoModelForSequenceClassification)
    twin.config.architectures = [type(twin).__name__]
    return twin


def make_batch():
    """Two rows, of two pairs and of one."""
    batch = tiny.make_batch([[5, 7, 6, 4], [9, 8]], 24)
    del batch["labels"]
    # torch never trains the vector of the padding token, wherever it stands.
    batch["input_ids"] = np.where(batch["input_ids"] == 3, 4, batch["input_ids"])
    examples = np.array([[[0, 0], [1, 1]], [[2, 2], [-1, -1]]], np.int32)
    return batch | {"examples": examples}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_trls(tmp_path, case):
    twin = make_twin(case)
    model = tiny.build_model(tiny_encoders.save(twin, tmp_path))
    batch = make_batch()
    config = objective.Config(center_rewards_coefficient=0.1)
    graphdef, params = tree.split(model)

    @jax.jit
    def gradient(params, batch):
        def mean_loss(params):
            sums = objective.loss(tree.merge(graphdef, params), batch, config)
            return sums.loss / sums.weight, sums

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    (loss, sums), grads = gradient(params, jax.tree.map(jnp.asarray, batch))

    parts = tiny.unpack({k: v for k, v in batch.items() if k != "examples"})
    # trl makes its tokenizer's padding the model's, by which decoders find the end.
    ids, seen = np.zeros((2, 6, 9), np.int64)
    for row, part in enumerate(parts[::2] + parts[1::2]):
        size = part["input_ids"].shape[1]
        ids[row, :size], seen[row, :size] = part["input_ids"], 1
    trainer = RewardTrainer(
        model=twin,
        args=RewardConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            report_to=[],
            center_rewards_coefficient=0.1,
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_list([{"chosen": "w1", "rejected": "w2"}] * 2),
        processing_class=tiny.make_tokenizer(),
    )
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}
    theirs = trainer.compute_loss(twin.eval(), inputs)
    assert isinstance(theirs, torch.Tensor)
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    logged = trainer._metrics["eval"]
    assert float(sums.correct) / 3 == pytest.approx(logged["accuracy"][-1])
    margin = float(sums.chosen - sums.rejected) / 3
    assert margin == pytest.approx(logged["margin"][-1], rel=1e-4)
    arrays = {n: p.grad.numpy() for n, p in twin.named_parameters()}
    for site in model.provenance.sites:
        expected = tiny.gather(site, arrays)
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(grads[site.path], expected, atol=1e-4 * scale)


@pytest.mark.parametrize("case", CASES[1:])
def test_a_decoder_can_get_a_new_head_and_goes_to_transformers(tmp_path, case):
    base = tiny.make_torch(tiny.make_config(case, pad_token_id=3))
    tiny.save_torch(base, tmp_path / "base")
    model = fjft.load_model(
        str(tmp_path / "base"), head="sequence_classification", num_labels=3
    )
    assert model.provenance.new == ("score.weight",)
    tied = base.config.tie_word_embeddings
    assert model.provenance.passed_over == (() if tied else ("lm_head.weight",))
    fjft.save_model(model, tmp_path / "saved")
    twin = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved"
    ).eval()
    ids = np.full((2, 12), 3, np.int32)
    ids[0], ids[1, :7] = tiny.random_ids(12) + 1, tiny.random_ids(7, seed=1) + 1
    ids = np.minimum(ids, tiny.VOCAB_SIZE - 1)
    segments = (np.arange(12)[None] < np.array([[12], [7]])).astype(np.int32)
    with torch.no_grad():
        theirs = twin(
            torch.tensor(ids).long(), attention_mask=torch.tensor(segments).long()
        ).logits
    ours = model(jnp.asarray(ids), segment_ids=jnp.asarray(segments))
    assert tiny.max_error(ours, theirs.numpy()) < 1e-4
    with pytest.raises(UserError, match="writes none"):
        model.unembed(jnp.zeros((1, 1, 48)))
