"""LoRA on every linear map of every decoder family, to `peft` and back."""

import json

import peft_twins
import pytest
import tiny

import fjft
from fjft.errors import UserError
from fjft.peft import lora

# `peft` cannot tell experts from a dense layer's maps of the same names: no such mix.
CASES = [
    f"{family}/{next(iter(names))}"
    for family, names in tiny.CONFIGS.items()
    if family != "qwen3_moe"
] + ["qwen3_moe/windowed-tied"]
CONFIG = lora.Config(r=3, lora_alpha=7)
# Families whose experts `peft` adapts as whole parameters, which is refused here.
FUSED_EXPERTS = ("mixtral/", "qwen3_moe/")


@pytest.mark.parametrize("name", CASES)
def test_adapters_go_to_peft_and_back(name, get_twins, tmp_path, record_property):
    twins = get_twins(name)
    targets = "all-linear"
    if name.startswith(FUSED_EXPERTS):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    theirs = peft_twins.make_peft(
        twins.torch, r=3, lora_alpha=7, target_modules=targets
    )
    peft_twins.randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peft_twins.load(twins.directory, tmp_path / "theirs")
    error = peft_twins.assert_same_logits(ours, theirs, 1e-4)

    ours = peft_twins.scatter(tiny.build_model(twins.directory, lora, CONFIG))
    fjft.save_adapter(ours, tmp_path / "ours")
    theirs = peft_twins.load_peft(twins.torch, tmp_path / "ours")
    record_property(
        "max_error", max(error, peft_twins.assert_same_logits(ours, theirs, 1e-4))
    )
    described = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert described["fan_in_fan_out"] == name.startswith("gpt2/")


def test_a_head_of_another_name_is_no_target(get_twins):
    twins = get_twins("gpt_neox/parallel")
    config = lora.Config(r=2, target_modules="embed_out|dense")
    with pytest.raises(UserError, match="means embed_out, which this method does not"):
        tiny.build_model(twins.directory, lora, config)
