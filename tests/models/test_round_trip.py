"""Hugging Face in, Hugging Face out: bit for bit, and with all that belongs to it."""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import fjft
from fjft import sharding
from fjft.checkpoint import huggingface
from fjft.models.layers import TiedHead


def _tensors(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


WHOLE, SHARDS = 5_000_000_000, 30_000


@pytest.fixture(
    params=[("float32", WHOLE), ("bfloat16", SHARDS)],
    ids=["float32-whole", "bfloat16-sharded"],
)
def original(request, twins, tmp_path, monkeypatch):
    """A directory as the hub has it; what we write is cut into shards as small."""
    dtype, size = request.param
    model = tiny.cast(twins.torch, dtype)
    directory = tmp_path / "original"
    tiny.save_torch(model, directory, max_shard_size=size)
    write = functools.partial(huggingface.write_sharded, max_shard_size=size)
    monkeypatch.setattr(huggingface, "write_sharded", write)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (size == SHARDS)
    return directory, model


def test_what_was_loaded_is_saved_bit_for_bit(original, tmp_path):
    directory, _ = original
    saved = tmp_path / "saved"
    fjft.save_model(fjft.load_model(str(directory), dtype="auto"), saved)
    before, after = _tensors(directory), _tensors(saved)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    files = [len(list(d.glob("*.safetensors"))) for d in (directory, saved)]
    assert (files[0] > 1) == (files[1] > 1)


def test_a_checkpoint_of_mixed_types_is_saved_bit_for_bit(get_twins, tmp_path):
    twin = tiny.cast(get_twins("llama/linear-rope-tied").torch, "bfloat16")
    # Of one stack some layers are wider, and one weight is narrower in another way.
    twin.model.layers[1].input_layernorm.float()
    twin.model.layers[0].mlp.up_proj.half()
    twin.model.norm.float()
    tiny.save_torch(twin, tmp_path / "original")
    before = _tensors(tmp_path / "original")
    assert {str(t.dtype) for t in before.values()} == {
        "torch.float32",
        "torch.float16",
        "torch.bfloat16",
    }
    model = fjft.load_model(str(tmp_path / "original"), dtype="auto")
    assert str(model.compute_dtype) == "bfloat16"
    fjft.save_model(model, tmp_path / "saved")
    after = _tensors(tmp_path / "saved")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name


def test_what_is_saved_loads_in_transformers_with_the_same_logits(original, tmp_path):
    directory, model = original
    fjft.save_model(fjft.load_model(str(directory), dtype="auto"), tmp_path / "saved")
    both: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        dtype="auto",
        attn_implementation="eager",
        output_loading_info=True,
    )
    loaded, info = both
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(model)
    assert loaded.dtype == model.dtype
    ids = tiny.random_ids(2, 16)
    np.testing.assert_array_equal(
        tiny.torch_logits(loaded, ids), tiny.torch_logits(model, ids)
    )


def test_configs_tokenizer_and_chat_template_come_along(twins, tmp_path):
    fjft.save_model(twins.model, tmp_path)
    ours, theirs = (
        transformers.AutoConfig.from_pretrained(d).to_dict() | {"_name_or_path": ""}
        for d in (tmp_path, twins.directory)
    )
    assert ours == theirs
    for name in ("generation_config.json",):
        ours, theirs = (
            json.loads((d / name).read_text()) for d in (tmp_path, twins.directory)
        )
        assert ours == theirs
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(d)
        for d in (tmp_path, twins.directory)
    )
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map
    text = "w1 w5 nothing w7"
    assert ours(text).input_ids == theirs(text).input_ids


def test_a_tied_head_that_is_stored_too_is_passed_over(get_twins):
    twin = get_twins("llama/linear-rope-tied").torch
    files = tiny.memory_files(twin)
    tensors = dict(files.tensors.arrays)  # pyright: ignore[reportAttributeAccessIssue]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    model = tiny.build_model(
        dataclasses.replace(files, tensors=tiny.MemorySource(tensors))
    )
    assert isinstance(model.lm_head, TiedHead)


def test_a_model_on_eight_devices_is_saved_bit_for_bit(twins, tmp_path):
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    assert len(jax.devices()) == 8
    fjft.save_model(tiny.build_model(twins.directory, mesh=mesh), tmp_path)
    before, after = _tensors(twins.directory), _tensors(tmp_path)
    assert all(torch.equal(after[name], before[name]) for name in before)
