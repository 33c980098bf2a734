"""Methods that choose parameters by name refuse what they cannot choose."""

import copy
import json

import peft
import pytest
import tiny

import fjft
from fjft.errors import UserError
from fjft.peft import bitfit, ia3, layer_norm, select

BIASED, PLAIN = "llama/llama3-rope-biases", "llama/linear-rope-tied"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (select, {"parameters": "mlp.nothing"}, r"matches no parameter.*'weight'"),
        (select, {"parameters": "mlp("}, "is not a regex"),
        (select, {"freeze": ".*"}, "leaves nothing to train"),
        (select, {"parameters": r"layers\.0\.mlp\..*"}, "some layers of layers.blocks"),
        (layer_norm, {"target_modules": "q_proj"}, r"matches no module.*'norm'"),
        (layer_norm, {"target_modules": r"layers\.1\..*norm"}, "some layers of"),
        (ia3, {"target_modules": "lm_head"}, "which this method does not adapt"),
        (ia3, {"feedforward_modules": "q_proj"}, "feedforward_modules='q_proj' match"),
        (ia3, {"feedforward_modules": r"layers\.0\.mlp\.down_proj"}, "some layers of"),
    ],
)
def test_a_pattern_that_cannot_be_had_is_refused(get_twins, method, options, message):
    directory = get_twins(BIASED).directory
    with pytest.raises(UserError, match=message):
        tiny.build_model(directory, method, method.Config(**options))


def test_all_but_what_is_frozen_is_trained(get_twins):
    sites = get_twins(BIASED).model.provenance.sites
    frozen = r"embed_tokens\.weight|self_attn\..*"
    is_trained = select.is_trainable(select.Config(freeze=frozen), sites)
    kept = {site.path for site in sites if not is_trained(site.path)}
    assert kept == {
        site.path
        for site in sites
        if "embed_tokens" in site.hf_names[0] or "self_attn" in site.hf_names[0]
    }
    with pytest.raises(UserError, match="needs either"):
        select.Config(parameters="norm.weight", freeze=frozen)


def test_a_model_without_biases_has_nothing_for_bitfit(get_twins):
    with pytest.raises(UserError, match="this model has none; use"):
        tiny.build_model(get_twins(PLAIN).directory, bitfit, bitfit.Config())


def test_a_selection_needs_a_regex():
    with pytest.raises(UserError, match="needs either peft"):
        select.Config()


@pytest.mark.parametrize("config", [peft.IA3Config(), peft.LNTuningConfig()])
def test_parts_of_peft_that_are_missing_here_are_refused_by_name(
    get_twins, tmp_path, config
):
    twins = get_twins(BIASED)
    theirs = peft.get_peft_model(copy.deepcopy(twins.torch), config)
    theirs.save_pretrained(tmp_path)
    fjft.load_model(str(twins.directory), adapter=tmp_path)
    file = tmp_path / "adapter_config.json"
    described = json.loads(file.read_text()) | {"exclude_modules": ["v_proj"]}
    file.write_text(json.dumps(described))
    with pytest.raises(UserError, match="exclude_modules"):
        fjft.load_model(str(twins.directory), adapter=tmp_path)
