"""Adapters that start as what quantization took away from the weights."""

import bitsandbytes.functional as bnb
import numpy as np
import peft_twins
import pytest
import tiny
import torch
import transformers
from peft.utils.loftq_utils import _low_rank_decomposition

import fjft
from fjft import sharding, tree
from fjft.errors import UserError
from fjft.models.weights import module_at
from fjft.peft import lora, targets

OPTIONS = {"r": 4, "lora_alpha": 4, "target_modules": "q_proj|down_proj"}
CONFIG = lora.Config(init_lora_weights="loftq", **OPTIONS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint whose rows are whole blocks."""
    config = tiny.make_config(
        "llama/llama3-rope-biases",
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        head_dim=32,
        num_hidden_layers=2,
    )
    return tiny.save_torch(tiny.make_torch(config), tmp_path_factory.mktemp("loftq"))


@pytest.fixture(scope="module")
def whole(directory):
    return tiny.build_model(directory)


@pytest.fixture(scope="module")
def model(directory):
    return tiny.build_model(directory, lora, CONFIG, quantization="nf4")


def logits(model):
    return tiny.jit_apply(model)(tiny.random_ids(2, 12))


def test_the_start_is_pefts_on_the_codes_of_bitsandbytes(model, whole):
    for site, adapter in targets.adapters(model, model.provenance.sites):
        for layer, weight in enumerate(module_at(whole, site.path)[...]):
            full = torch.tensor(np.asarray(weight))
            codes, state = bnb.quantize_4bit(full, quant_type="nf4")
            lost = full - bnb.dequantize_4bit(codes, state)
            theirs = _low_rank_decomposition(lost, reduced_rank=4)
            expected = (theirs["L"] @ theirs["R"]).numpy()
            ours = np.asarray(adapter.b[layer] @ adapter.a[layer])
            assert tiny.relative_error(ours, expected) < 1e-4
            # A part of what was lost is back.
            assert np.linalg.norm(lost - ours) < np.linalg.norm(lost)


def test_the_model_starts_nearer_to_the_whole_one(model, whole, directory):
    plain = tiny.build_model(directory, quantization="nf4")
    wanted = logits(whole)
    ours, without = (np.linalg.norm(logits(m) - wanted) for m in (model, plain))
    assert ours < without


def test_what_is_merged_leaves_the_start_out(model, whole):
    merged = fjft.merge_adapter(model)
    assert tiny.relative_error(logits(merged), logits(whole)) < 1e-5


def test_a_file_is_for_the_quantized_base_and_says_so(model, directory, tmp_path):
    trained = tree.merge(*tree.split(model))
    trained.provenance = model.provenance
    peft_twins.scatter(trained)
    fjft.save_adapter(trained, tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(directory)
    for site in model.provenance.sites:
        weight = np.asarray(module_at(model, site.path)[...])
        for name, place in site.tensors():
            twin.get_parameter(name).data = torch.tensor(weight[place])
    with pytest.warns(UserWarning, match="fjft_start"):
        theirs = peft_twins.load_peft(twin, tmp_path)
    peft_twins.assert_same_logits(trained, theirs, 1e-4)
    again = fjft.load_model(str(directory), adapter=tmp_path, quantization="nf4")
    np.testing.assert_array_equal(logits(again), logits(trained))
    merged, expected = (logits(fjft.merge_adapter(m)) for m in (again, trained))
    np.testing.assert_array_equal(merged, expected)
    for quantization in ("", "int8"):
        with pytest.raises(UserError, match="quantization"):
            fjft.load_model(str(directory), adapter=tmp_path, quantization=quantization)


def test_a_mesh_starts_as_one_device_does(model, directory):
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    spread = tiny.build_model(directory, lora, CONFIG, quantization="nf4", mesh=mesh)
    for (_, one), (_, other) in zip(
        *(targets.adapters(m, m.provenance.sites) for m in (model, spread)), strict=True
    ):
        product, expected = (np.asarray(a.b[...] @ a.a[...]) for a in (other, one))
        assert tiny.relative_error(product, expected) < 1e-4
