"""A program of shapes is the run that it becomes, to the last array."""

import shutil
from pathlib import Path

import jax
import pytest
import tiny_experiment

import fjft
from fjft import sharding
from fjft.build import build_experiment, override
from fjft.checkpoint.source import open_info
from fjft.errors import UserError
from fjft.training import fit
from fjft.training.program import build_program


def build(config, mesh):
    experiment = build_experiment(config)
    with jax.set_mesh(mesh):
        return build_program(experiment, mesh, open_info(experiment.model.source), 20)


def describe(arrays):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), arrays)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_shapes_are_those_of_the_run(method, llama, tmp_path):
    overrides = {"peft.method": method, "model__dtype": "bfloat16"}
    config = tiny_experiment.make_config(llama, tmp_path, **overrides)
    started = tiny_experiment.start(config, (2, 2, 2))
    program = build(config, started.mesh)
    assert describe(program.state_shapes) == describe(started.state)
    assert describe(program.frozen_shapes) == describe(started.run.frozen)
    with jax.set_mesh(started.mesh):
        batch = next(started.run.batches())
    assert describe(program.batch_shapes(96)) == describe(batch)


def test_a_config_alone_gives_the_program(llama, tmp_path):
    full = build(tiny_experiment.make_config(llama, tmp_path), one_device())
    shutil.copy(Path(llama) / "config.json", tmp_path)
    config = tiny_experiment.make_config(str(tmp_path), tmp_path)
    alone = build(config, one_device())
    assert describe(alone.state_shapes) == describe(full.state_shapes)
    assert describe(alone.frozen_shapes) == describe(full.frozen_shapes)
    assert alone.num_trainable == full.num_trainable
    override(config, {"model.dtype": "auto"})
    dtypes = {str(p.dtype) for p in build(config, one_device()).frozen_shapes.values()}
    assert dtypes == {"float32"}


def test_texts_longer_than_the_table_of_positions(tmp_path):
    sizes = {"vocab_size": 512, "n_layer": 1, "n_positions": 16}
    config = tiny_experiment.run_config(
        "gpt_pretraining.py:smoke",
        tmp_path,
        {f"model.sizes.{name}": size for name, size in sizes.items()},
    )
    with pytest.raises(UserError, match="the model has positions for 16; set data"):
        fjft.train(config)


def test_what_fits_is_asked_of_rows_as_long_as_they_get(llama, tmp_path, monkeypatch):
    """With packing they are all of one length; without, the data say."""
    monkeypatch.setattr(fit, "_limit", lambda mesh: 1000)
    for packing, length in ((True, 2048), (False, 1024)):
        options = {"data__packing": packing, "data__max_length": 2048}
        config = tiny_experiment.make_config(llama, tmp_path, **options)
        with pytest.raises(UserError, match=f"8 rows of {length} tokens needs"):
            fjft.train(config)


def test_a_batch_that_does_not_divide(llama, tmp_path):
    config = tiny_experiment.make_config(llama, tmp_path, train__batch_size=6)
    mesh = sharding.make_mesh(sharding.Config(data=4, fsdp=2))
    with pytest.raises(UserError, match="batch 6 is not divisible"):
        build(config, mesh)


def one_device():
    return sharding.single_device_mesh()
