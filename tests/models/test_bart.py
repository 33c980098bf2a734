"""BART, mBART and Marian: tables of positions, names old and new."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_seq2seq
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file
from transformers.models.marian.modeling_marian import (
    MarianSinusoidalPositionalEmbedding,
)

import fjft
from fjft.errors import UserError
from fjft.generation.seq2seq import special_tokens
from fjft.models.layers import Rngs
from fjft.models.positions import sinusoids
from fjft.peft import virtual


@pytest.mark.parametrize("size", [24, 25])
def test_sinusoids_equal_torch(size):
    theirs = MarianSinusoidalPositionalEmbedding(600, size).create_weight()
    np.testing.assert_array_equal(sinusoids(600, size), theirs.numpy())


def test_a_bare_bart_is_a_language_model_with_its_embeddings_as_head(tmp_path):
    config = tiny_seq2seq.make_config("bart/post-norm")
    torch.manual_seed(0)
    bare = transformers.BartModel(config).eval()
    bare.save_pretrained(tmp_path / "before")
    model = fjft.load_model(str(tmp_path / "before"))
    assert model.bias is None
    twin = transformers.BartForConditionalGeneration.from_pretrained(
        tmp_path / "before", attn_implementation="eager"
    ).eval()
    batch = {"input_ids": tiny_seq2seq.random_ids(2, 21)}
    batch["decoder_input_ids"] = tiny_seq2seq.random_ids(2, 13)
    ours = tiny_seq2seq.jit_apply(model)(**batch)
    assert tiny.max_error(ours, tiny_seq2seq.torch_logits(twin, **batch)) < 1e-4
    fjft.save_model(model, tmp_path / "after")
    before, after = (
        load_file(tmp_path / d / "model.safetensors") for d in ("before", "after")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _files(case, **changes):
    twin = tiny_seq2seq.torch_model(case)
    files = tiny.memory_files(twin)
    arrays = {k: tiny.to_numpy(v) for k, v in twin.state_dict().items()} | changes
    return dataclasses.replace(files, tensors=tiny.MemorySource(arrays))


def test_a_stored_table_of_sinusoids_is_passed_over():
    files = _files("marian/shared")
    assert "model.encoder.embed_positions.weight" in files.tensors.names
    assert tiny.build_model(files).encoder.positions is None


def test_a_head_that_is_not_the_copy_it_ought_to_be_is_refused():
    head = np.ones((tiny.VOCAB_SIZE, 24), np.float32)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from its model\.sh"):
        tiny.build_model(_files("bart/post-norm", **{"lm_head.weight": head}))


def test_a_position_beyond_the_table_does_not_go_unnoticed():
    model = tiny.build_model(_files("mbart/pre-norm"))
    limit = model.longest_text
    assert limit == 40
    positions = jnp.array([[0, limit - 1], [0, limit]])
    states = model.encode(jnp.full((2, 2), 7), positions).states
    assert np.isfinite(states[0]).all()
    assert np.isnan(states[1]).any()
    # Virtual tokens take the first places.
    model.prompt = nnx.data(virtual.Tokens(Rngs(0), 4, 24, 4))
    assert model.longest_text == limit - 4
    states = model.encode(jnp.full((2, 2), 7), positions - 4).states
    assert np.isfinite(states[0]).all()
    assert np.isnan(states[1]).any()


def test_generation_options_in_an_old_config_are_heeded_and_kept(tmp_path):
    files = _files("bart/post-norm")
    written = files.config.to_dict() | {"num_beams": 4, "forced_bos_token_id": 0}
    files = dataclasses.replace(
        files, config_dict=written, load_tokenizer=tiny.make_tokenizer
    )
    model = tiny.build_model(files)
    special = special_tokens(model, 9, (2,))
    assert special is not None
    assert (special.first_id, special.start_id) == (0, 5)
    assert np.asarray(special.last_ids)[0] == 2
    fjft.save_model(model, tmp_path)
    saved = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (saved.num_beams, saved.forced_bos_token_id) == (4, 0)
    assert transformers.AutoConfig.from_pretrained(tmp_path).d_model == 24
