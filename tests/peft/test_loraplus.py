"""LoRA+: the learning rates of A and B, against `peft`'s own optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import peft_twins
import pytest
import tiny
import torch
from peft.optimizers import create_loraplus_optimizer

from fjft import tree
from fjft.errors import UserError
from fjft.optimize import optimizer as optimizers
from fjft.peft import lora

RATE, RATIO, EMBEDDING_RATE, DECAY = 1e-3, 8.0, 3e-5, 0.1
OPTIONS = {"r": 3, "target_modules": r".*\.(q_proj|up_proj|embed_tokens)"}


def test_steps_equal_pefts_optimizer(get_twins):
    """B learns faster and decays faster, and so does what is trained whole decay."""
    twins = get_twins("llama/llama3-rope-biases")
    config = lora.Config(
        **OPTIONS,
        loraplus_lr_ratio=RATIO,
        loraplus_lr_embedding=EMBEDDING_RATE,
        modules_to_save="lm_head",
    )
    theirs = peft_twins.randomize(
        peft_twins.make_peft(twins.torch, **OPTIONS, modules_to_save=["lm_head"])
    )
    ours = tiny.build_model(twins.directory, lora, config)
    wanted = peft_twins.trained_by_peft(theirs)
    ours = peft_twins.copy_values(ours, wanted)
    params = tree.partition(tree.split(ours)[1], peft_twins.is_trainable(ours))[0]
    axes = tree.logical_axes(ours)
    stacks = {path: axes[path].count("layers") for path in params}
    mine = optimizers.make_optimizer(
        optimizers.Config(learning_rate=RATE, schedule="constant", weight_decay=DECAY),
        5,
        stack_axes=stacks,
        rates={p: lora.rate(config, p, len(axes[p]) - stacks[p], RATE) for p in params},
    )
    other = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=RATE,
        loraplus_lr_ratio=RATIO,
        loraplus_lr_embedding=EMBEDDING_RATE,
        loraplus_weight_decay=DECAY,
    )
    before = jax.tree.map(np.asarray, params)
    state, rng = mine.init(params), np.random.default_rng(0)
    for _ in range(5):
        grads = {path: np.zeros(p.shape, np.float32) for path, p in params.items()}
        for tensor in peft_twins.trained_table(ours):
            part = grads[tensor.path][tensor.index]
            part[...] = rng.standard_normal(part.shape)
            wanted[tensor.name].grad = torch.tensor(part)
        updates, state = mine.update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optimizers.apply_updates(params, updates)
        other.step()
    for tensor in peft_twins.trained_table(ours):
        value = wanted[tensor.name].detach().numpy()
        moved = np.abs(value - before[tensor.path][tensor.index]).max()
        assert (moved > 10 * RATE) == tensor.name.endswith("lora_B.weight")
        assert (moved < RATE) == ("lora_embedding_" in tensor.name)
        error = tiny.max_error(params[tensor.path][tensor.index], value)
        # An embedding's B starts with numbers as large as 3.
        assert error < 1e-6 * max(1, np.abs(value).max()), tensor.name


def test_what_has_one_axis_learns_as_b_does():
    config = lora.Config(loraplus_lr_ratio=4)
    paths = {"q.adapter.a": 2, "q.adapter.b": 2, "q.adapter.magnitude": 1}
    rates = [lora.rate(config, path, axes, 1e-3) for path, axes in paths.items()]
    assert rates == [1, 4, 4]
    with pytest.raises(UserError, match="loraplus_lr_ratio=0"):
        lora.Config(loraplus_lr_ratio=0)
