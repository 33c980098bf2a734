"""Reward models from rows to a directory that transformers loads."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_experiment import assert_cuts_change_nothing, run_config

import fjft
from fjft.build import build_experiment


@pytest.fixture
def make_config(bert, tmp_path):
    random = np.random.default_rng(0)
    rows = []
    for _ in range(64):
        words = random.integers(0, 40, (2, 6))
        texts = (" ".join(f"w{w}" for w in text) for text in words)
        chosen, rejected = texts
        rows.append({"chosen": f"{chosen} w48", "rejected": f"{rejected} w49"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    defaults = {
        "model.source": bert,
        "data.train": str(path),
        "data.eval": "",
        "data.eval_size": 16.0,
        "data.max_length": 32,
        "train.max_steps": 20,
        "optimizer.learning_rate": 1e-2,
    }
    return functools.partial(run_config, "minilm_reward.py", tmp_path / "run", defaults)


def test_cuts_and_meshes_do_not_change_the_losses(make_config):
    assert_cuts_change_nothing(make_config(data__packing=True))


def test_a_decoder_with_an_adapter_goes_to_peft(make_config, llama, tmp_path):
    config = make_config(
        model__source=llama,
        peft__method="lora",
        peft__r=4,
        peft__target_modules="q_proj|down_proj",
        peft__modules_to_save="score",
        data__packing=True,
        data__max_length=96,
        train__max_steps=2,
    )
    result = fjft.train(config)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "run/adapter", num_labels=1
    ).eval()
    ids = result.tokenizer("w1 w2", return_tensors="np")["input_ids"]
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits
    ours = result.model(jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    rows, _, _ = build_experiment(config).load_examples(result.tokenizer)
    example = rows.example(0).columns
    last = np.flatnonzero(np.diff(example["parts"], append=2))
    assert set(example["input_ids"][last]) == {result.tokenizer.eos_token_id}


def test_a_run_ends_in_what_transformers_loads(make_config, tmp_path):
    config = make_config()
    metrics = fjft.train(config).metrics
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run/model"
    ).eval()
    assert model.config.num_labels == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    held_out = build_experiment(config).load_examples(tokenizer)[1][""]
    rewards = np.zeros((16, 2))
    for i in range(16):
        columns = held_out.example(i).columns
        for part in (0, 1):
            ids = torch.tensor(columns["input_ids"][columns["parts"] == part])
            with torch.no_grad():
                rewards[i, part] = model(ids[None].long()).logits.item()
    margins = rewards[:, 0] - rewards[:, 1]
    assert metrics["eval_rewards/margins"] == pytest.approx(margins.mean(), rel=1e-4)
    assert metrics["eval_rewards/accuracies"] == np.mean(margins > 0) > 0.9
