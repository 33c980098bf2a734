"""What of bottleneck adapters is not in the battery."""

import bases
import pytest
import tiny
import torch
from safetensors.torch import load_file

import fjft
from fjft.errors import UserError
from fjft.generation import decode
from fjft.peft import bottleneck

HUB = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16}
HUB |= {"non_linearity": "gelu", "original_ln_before": False}


def test_an_old_file_loads_and_a_cache_sees_its_adapter(tmp_path):
    base = bases.make_base("llama/llama3-rope-biases", tmp_path / "base")
    config = bottleneck.Config(reduction_factor=4)
    model = tiny.build_model(base.directory, bottleneck, config)
    model.layers.blocks[0].adapter.mlp.up[...] += 0.3
    fjft.save_adapter(model, tmp_path / "new")
    file = tmp_path / "new" / "adapter.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_adapter.bin"))
    file.unlink()
    again = fjft.load_model(str(base.directory), adapter=tmp_path / "new")
    options = decode.Config(max_new_tokens=6, stop_token_ids=())
    made = decode.generate_tokens(again, [[5, 9, 4]], options)[0]
    bare = decode.generate_tokens(
        fjft.load_model(str(base.directory)), [[5, 9, 4]], options
    )[0]
    assert made != bare
    logits = tiny.jit_apply(model)([[5, 9, 4, *made]])
    assert made == logits[0, 2:-1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("changes", "version", "expected"),
    [
        ({}, {}, "gelu_new"),
        ({}, {"version": "adapters.1.0"}, "gelu"),
        ({"non_linearity": "swish", "scaling": 2.0}, {}, "swish"),
    ],
)
def test_hub_configs_are_read(changes, version, expected):
    described = {"name": "sst-2", "config": HUB | changes} | version
    config = bottleneck.from_peft(described)
    assert (config.kind, config.name) == ("houlsby", "sst-2")
    assert config.non_linearity == expected
    assert config.scaling == changes.get("scaling", 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"ln_before": True},
        {"scaling": "learned"},
        {"reduction_factor": {"1": 8, "default": 16}},
        {"output_adapter": False},
        {"inv_adapter": "nice"},
    ],
    ids=str,
)
def test_parts_of_the_library_that_are_missing_here_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        bottleneck.from_peft({"name": "x", "config": HUB | changes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "series"}, "houlsby"),
        ({"non_linearity": "sine"}, "relu"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        bottleneck.Config(**options)


@pytest.mark.parametrize("case", ["albert/one-group/masked_lm", "t5/relu-tied"])
def test_layers_without_a_slot_are_refused(case, tmp_path):
    base = bases.make_base(case, tmp_path)
    with pytest.raises(UserError, match="own weights"):
        tiny.build_model(base.directory, bottleneck, bottleneck.Config())
