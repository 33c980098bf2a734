"""Names in a config become objects, or an error says which name and what instead."""

import dataclasses
import typing

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny

import fjft
from fjft import build, options, tree
from fjft.errors import UserError
from fjft.objectives.objectives import OBJECTIVES
from fjft.peft.methods import METHODS

CASE = "llama/llama3-rope-biases"


def _config(**sections):
    config = ml_collections.ConfigDict(
        {
            "model": {"source": "org/name", "dtype": "float32"},
            "peft": {"method": "lora", "r": 4},
            "data": {"train": "x.jsonl"},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "train": {"batch_size": 4},
            "checkpoint": {"directory": "runs/x"},
        }
    )
    for name, section in sections.items():
        config[name] = section
    return config


def test_sections_become_checked_dataclasses():
    experiment = build.build_experiment(_config())
    assert experiment.method is METHODS["lora"]
    assert experiment.peft == METHODS["lora"].Config(r=4)
    assert experiment.objective_module is OBJECTIVES["causal_lm"]
    assert experiment.train.batch_size == 4
    assert experiment.model.source == "org/name"
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.train.batch_size = 5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trian": {}}, "section 'trian' is unknown; did you mean 'train'"),
        ({"train": {"batch_sise": 4}}, "train.batch_sise.* did you mean .*batch_size"),
        ({"train": {}}, "'train.batch_size' is missing"),
        ({"train": {"batch_size": "four"}}, "train.batch_size='four'.*whole number"),
        ({"train": {"batch_size": True}}, "train.batch_size=True.*whole number"),
        ({"peft": {"method": "lorra"}}, r"peft.method='lorra'.*'lora'"),
        ({"peft": {"method": "full", "r": 8}}, "'peft.r' is unknown"),
        ({"peft": {"method": "lora", "r": 0}}, "ranks are at least 1"),
        ({"objective": {"name": "dream"}}, "objective.name='dream'.*'causal_lm'"),
        ({"model": {"source": "x", "dtype": "int8"}}, "model.dtype='int8'.*'bfloat16'"),
        ({"model": {"source": "x", "remat": "some"}}, "model.remat='some'.*'full'"),
        ({"checkpoint": {"directory": "gs://b/run"}}, "'gs://b/run' is no directory"),
        (
            {"model": {"source": "x", "attention_block": 100}},
            "model.attention_block=100 is not a multiple of 128 up to 2048",
        ),
        (
            {"model": {"source": "x", "attention_block": 4096}},
            "model.attention_block=4096 is not a multiple of 128 up to 2048",
        ),
        ({"train": 3}, "section 'train' is 3, not a mapping"),
        ({"data": {"eval": {"a": 3}}}, "data.eval=.*a mapping of names to: a text"),
        ({"evaluate": {"early_stopping_patience": 2}}, "evaluate.eval_steps is 0"),
    ],
)
def test_a_mistake_in_a_config_is_named(sections, message):
    config = _config()
    with config.unlocked(), config.ignore_type():
        config.update(_config())
        for name, section in sections.items():
            config[name] = section
    with pytest.raises(UserError, match=message):
        build.build_experiment(config)


def test_options_are_overridden_by_dotted_key(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import ml_collections\n"
        "def get_config(arg=''):\n"
        "    config = ml_collections.ConfigDict()\n"
        "    config.model = {'source': arg or 'whole'}\n"
        "    config.peft = {'method': 'lora', 'r': 4}\n"
        "    config.train = {'batch_size': 2, 'num_epochs': 1.0}\n"
        "    return config\n"
    )
    assert fjft.load_config(str(file)).to_dict()["model"] == {"source": "whole"}
    overrides = {
        "train.batch_size": 8,
        "train.num_epochs": 2,
        "train.max_steps": 5,  # the file leaves it out
        "mesh.tensor": 2,  # and this section
        "peft.rank_pattern.q_proj": 3,
        "data.eval.movies": "movies.jsonl",
    }
    assert fjft.load_config(f"{file}:smoke", overrides).to_dict() == {
        "model": {"source": "smoke"},
        "peft": {"method": "lora", "r": 4, "rank_pattern": {"q_proj": 3}},
        "train": {"batch_size": 8, "num_epochs": 2, "max_steps": 5},
        "mesh": {"tensor": 2},
        "data": {"eval": {"movies": "movies.jsonl"}},
    }
    other = fjft.load_config(str(file), {"peft.method": "full"}).to_dict()
    assert other["peft"] == {"method": "full"}

    with pytest.raises(UserError, match=r"train.max_step.*did you mean.*max_steps"):
        fjft.load_config(str(file), {"train.max_step": 5})
    with pytest.raises(UserError, match=r"train.batch_size='8'"):
        fjft.load_config(str(file), {"train.batch_size": "8"})


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_is_of_a_type_that_flags_know(name):
    config = METHODS[name].Config
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        given = field.default
        if field.default_factory is not dataclasses.MISSING:
            given = field.default_factory()
        assert options.fits(given, hints[field.name]), field.name


def test_a_config_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config file"):
        fjft.load_config(str(tmp_path / "gone.py"))
    (tmp_path / "empty.py").touch()
    with pytest.raises(UserError, match="defines no function get_config"):
        fjft.load_config(str(tmp_path / "empty.py"))


def _files(get_twins, change):
    files = tiny.memory_files(get_twins(CASE).torch)
    source = files.tensors
    assert isinstance(source, tiny.MemorySource)
    arrays = dict(source.arrays)
    change(arrays)
    return dataclasses.replace(files, tensors=tiny.MemorySource(arrays))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(Q), f"1 tensors are missing, the first is '{Q}'"),
        (
            lambda a: a.update({Q: np.zeros((60, 40), np.float32)}),
            rf"{Q} has shape \(60, 40\), its config asks for \(60, 48\)",
        ),
        (
            lambda a: a.update({"model.layers.3.mlp.up_proj.weight": a[Q]}),
            "1 tensors have no place .*the first is 'model.layers.3.mlp",
        ),
    ],
    ids=["missing", "wrong-shape", "superfluous"],
)
def test_weights_that_do_not_fit_the_config_are_refused(get_twins, change, message):
    with pytest.raises(UserError, match=message):
        tiny.build_model(_files(get_twins, change))


def test_an_unknown_model_type_lists_the_known_ones(get_twins):
    import transformers

    files = tiny.memory_files(get_twins(CASE).torch)
    files = dataclasses.replace(files, config=transformers.BloomConfig())
    with pytest.raises(UserError, match=r"model_type='bloom'.*'llama'.*'qwen3'"):
        tiny.build_model(files)


def test_a_type_that_is_none_is_refused(get_twins):
    with pytest.raises(UserError, match=r"dtype='float8'.*'auto'"):
        fjft.load_model(str(get_twins(CASE).directory), dtype="float8")


def test_the_config_of_a_loaded_model_is_hugging_faces(get_twins):
    twins = get_twins(CASE)
    assert twins.model.config.model_type == "llama"
    assert twins.model.config.rope_parameters == twins.torch.config.rope_parameters


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "float32")],
)
def test_weights_and_activations_have_the_type_that_is_asked_for(
    get_twins, dtype, expected
):
    model = fjft.load_model(str(get_twins(CASE).directory), dtype=dtype)
    _, params = tree.split(model)
    assert {p.dtype for p in params.values()} == {jnp.dtype(expected)}
    assert model.compute_dtype == jnp.dtype(expected)
