"""Runs of every kind can be planned: what each learns from, and what that takes."""

import functools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import fjft
from fjft import sharding
from fjft.build import build_experiment
from fjft.planning.flops import count_flops
from fjft.training.flops import attention_flops
from fjft.training.placing import place
from fjft.training.program import build_program

# Models whose weights are on the hub alone.
ON_THE_HUB = {"llama31_8b_lora", "llama32_1b_full", "qwen3_4b_lora"}
NAMES = sorted({path.stem for path in Path("configs").glob("*.py")} - ON_THE_HUB)
# A tokenizer that is trained first would read all of the data.
TRAINED = {"bert_masked_lm", "cmudict_t5", "gpt_pretraining", "news_t5"}


@functools.cache
def build(name: str, num_labels: int | None = None):
    config = fjft.load_config(f"configs/{name}.py:smoke", {"model.remat": "none"})
    experiment = build_experiment(config)
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        files = experiment.model.open_info()
        return experiment, build_program(experiment, mesh, files, 10, num_labels)


@pytest.mark.parametrize("name", sorted(set(NAMES) - TRAINED))
def test_a_batch_is_shaped_as_planned(name):
    experiment, _ = build(name)
    tokenizer = experiment.open_model().load_tokenizer()
    rows, _, _ = experiment.load_examples(tokenizer)
    _, program = build(name, experiment.count_labels(rows.examples.labels))
    size = program.batch_size
    batch = rows.assemble(np.arange(size), size, rows.longest)
    found = {k: (v.shape, v.dtype) for k, v in place(batch, program.mesh).items()}
    planned = program.batch_shapes(rows.longest)
    assert {k: (v.shape, v.dtype) for k, v in planned.items()} == found


@pytest.mark.parametrize("name", NAMES)
def test_what_is_multiplied_is_what_is_counted(name):
    """The run's formula of model FLOPs, and the products of the step itself."""
    experiment, program = build(name)
    length = experiment.data.max_length
    with jax.set_mesh(program.mesh):
        step = program.train_step.trace(
            program.state_shapes, program.frozen_shapes, program.batch_shapes(length)
        )
    attention = attention_flops(program.blueprint.model.arch, length)
    expected = program.flops_per_token + attention
    if hasattr(experiment.objective_module, "REFERENCE"):
        # It attends too; and logits, which are never kept, are worked out again.
        table = program.blueprint.params["embedding.weight"]
        expected += attention / 3 + 2 * math.prod(table.shape)
    tokens = program.batch_size * length
    assert count_flops(step.jaxpr) == pytest.approx(tokens * expected, rel=0.02)
