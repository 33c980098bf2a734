"""Rotary embeddings against transformers' own, and what they do with long sequences."""

import copy
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fjft.errors import UserError
from fjft.generation.decode import Config, generate_tokens
from fjft.models import rope

HEAD_DIM, CONTEXT = 16, 32
PAIRS = HEAD_DIM // 2
YARN = {"rope_type": "yarn", "rope_theta": 2e3, "factor": 3.0}
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 7e2},
    "linear": {"rope_type": "linear", "rope_theta": 3e3, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 3e3, "factor": 2.5},
    "yarn": YARN | {"original_max_position_embeddings": 8},
    "yarn-betas": YARN
    | {
        "original_max_position_embeddings": 16,
        "beta_fast": 11.0,
        "beta_slow": 0.3,
        "truncate": False,
    },
    "yarn-mscale": YARN
    | {
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    "yarn-factor": YARN
    | {"original_max_position_embeddings": 16, "attention_factor": 1.7},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 3e3,
        "original_max_position_embeddings": 20,
        "short_factor": [1 + i / 9 for i in range(PAIRS)],
        "long_factor": [2.0 + i for i in range(PAIRS)],
    },
    "longrope-factor": {
        "rope_type": "longrope",
        "rope_theta": 3e3,
        "factor": 1.5,
        "attention_factor": 0.8,
        "original_max_position_embeddings": 20,
        "short_factor": [1.2] * PAIRS,
        "long_factor": [5.0] * PAIRS,
    },
    "llama3": tiny.LLAMA3_ROPE,
}


@pytest.mark.parametrize("length", [7, 20, 21, 32, 33, 70])
@pytest.mark.parametrize("name", SCALINGS)
def test_rotations_equal_transformers(name, length):
    config = LlamaConfig(
        hidden_size=HEAD_DIM * 2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters=dict(SCALINGS[name]),
    )
    embedding = LlamaRotaryEmbedding(config)
    positions = torch.arange(length)[None]
    cos, sin = embedding(torch.zeros(1), positions)
    parameters: Any = config.rope_parameters
    read = rope.from_config(parameters, HEAD_DIM, CONTEXT)
    place = jnp.arange(length, dtype=jnp.int32)[None]
    ours = rope.rotation(place, read, jnp.full_like(place, length))
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        assert tiny.max_error(mine, theirs[..., :PAIRS]) < 2e-5


def test_every_sequence_has_its_own_length():
    segments = jnp.array([[0, 1, 1, 1, 2, 2, 0, 0], [1] * 8], jnp.int32)
    positions = jnp.array([[0, 0, 1, 2, 0, 1, 0, 0], range(8)], jnp.int32)
    lengths = rope.sequence_lengths(segments, positions, segments)
    np.testing.assert_array_equal(lengths[0, 1:6], [3, 3, 3, 2, 2])
    np.testing.assert_array_equal(lengths[1], [8] * 8)


def test_only_the_first_dimensions_are_rotated():
    positions = jnp.arange(3, dtype=jnp.int32)[None]
    read = rope.from_config(
        {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.5},
        HEAD_DIM,
        CONTEXT,
        partial=True,
    )
    x = jnp.ones((1, 3, 2, HEAD_DIM))
    y = rope.rotate(x, rope.rotation(positions, read))
    np.testing.assert_array_equal(y[..., 8:], 1)
    assert (np.abs(np.asarray(y[:, 1:, :, :8]) - 1) > 1e-6).all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral"}, "'spiral' is not supported; known:"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "type 'linear' lack 'factor'"),
        (
            SCALINGS["default"] | {"partial_rotary_factor": 0.5},
            r"partial_rotary_factor=0\.5 is not supported",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(parameters, message):
    with pytest.raises(UserError, match=message):
        rope.from_config(parameters, HEAD_DIM, CONTEXT)


LONG = {
    "phi3/short-longrope": {
        "original_max_position_embeddings": 12,
        "max_position_embeddings": 64,
    },
    "llama/linear-rope-tied": {
        "max_position_embeddings": 12,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 3e3, "factor": 3.0},
    },
}


@pytest.fixture(scope="module", params=LONG)
def long_twins(request):
    """A model whose rope changes after 12 tokens, and its twin."""
    twin = tiny.make_torch(tiny.make_config(request.param, **LONG[request.param]))
    model = tiny.build_model(tiny.memory_files(copy.deepcopy(twin)))
    # Generation keeps to this number, which "dynamic" means otherwise.
    model.provenance.files.config.max_position_embeddings = 64
    return twin, model


def torch_logits(twin, ids):
    """The oracle's, which remembers lengths that it has seen, unless it is a copy."""
    return tiny.torch_logits(copy.deepcopy(twin), ids)


@pytest.mark.parametrize("length", [9, 12, 13, 24])
def test_logits_of_short_and_long_sequences_equal_torch(long_twins, length):
    twin, model = long_twins
    ids = tiny.random_ids(2, length)
    error = tiny.max_error(tiny.jit_apply(model)(ids), torch_logits(twin, ids))
    assert error < 1e-4


def test_a_packed_sequence_turns_as_it_does_alone(long_twins):
    twin, model = long_twins
    batch = tiny.make_batch([[16, 8], [5, 19]], 24)
    names = ("input_ids", "positions", "segment_ids")
    ours = tiny.jit_apply(model)(*(batch[name] for name in names))
    parts = [torch_logits(twin, p["input_ids"])[0] for p in tiny.unpack(batch)]
    real = batch["segment_ids"] > 0
    assert tiny.max_error(ours[real], np.concatenate(parts)) < 1e-4


@pytest.mark.parametrize("length", [4, 15])
def test_greedy_tokens_equal_transformers(long_twins, length):
    twin, model = long_twins
    num_new = 8 if length < 12 else 20
    prompt = tiny.random_ids(1, length)
    ours = generate_tokens(
        model, prompt.tolist(), Config(max_new_tokens=num_new, stop_token_ids=())
    )
    theirs = copy.deepcopy(twin).generate(
        torch.tensor(prompt).long(),
        attention_mask=torch.ones(1, length).long(),
        max_new_tokens=num_new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ours == theirs[:, length:].tolist()


def test_a_prompt_that_is_read_in_pieces_is_long_from_the_start(
    long_twins, monkeypatch
):
    from fjft.generation import steps

    _, model = long_twins
    prompt = tiny.random_ids(1, 32).tolist()
    config = Config(max_new_tokens=9, stop_token_ids=())
    whole = generate_tokens(model, prompt, config)
    steps.prefill_jit.clear_cache()
    monkeypatch.setattr(steps, "PREFILL_TOKENS", 8)
    assert generate_tokens(model, prompt, config) == whole
    steps.prefill_jit.clear_cache()


def test_generating_over_the_limit_of_longrope_is_refused():
    case = "phi3/short-longrope"
    twin = tiny.make_torch(tiny.make_config(case, **LONG[case]))
    model = tiny.build_model(tiny.memory_files(twin))
    config = Config(max_new_tokens=5, stop_token_ids=())
    with pytest.raises(UserError, match="pass 12 tokens, where"):
        generate_tokens(model, [[3] * 10], config)
