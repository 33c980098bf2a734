"""What GPT-2 and GPT-NeoX have that other decoders do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fjft.checkpoint.source import ModelFiles
from fjft.objectives import causal_lm

GPT2 = "gpt2/scaled-by-layer"
T = 24


def files_with(twin, change) -> ModelFiles:
    """A twin's files with other tensors."""
    files = tiny.memory_files(twin)
    assert isinstance(files.tensors, tiny.MemorySource)
    files.tensors.arrays = change(dict(files.tensors.arrays))
    return files


def test_names_without_their_first_part_are_read(get_twins):
    twins = get_twins(GPT2)

    def shorten(arrays):
        short = {n.removeprefix("transformer."): a for n, a in arrays.items()}
        # A buffer that the oldest checkpoints carry.
        return short | {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)}

    model = tiny.build_model(files_with(twins.torch, shorten))
    ids = tiny.random_ids(2, T)
    np.testing.assert_array_equal(tiny.jit_apply(model)(ids), twins.apply(ids))


def test_buffers_of_old_pythia_checkpoints_are_passed_over(get_twins):
    twins = get_twins("gpt_neox/parallel")
    layer = "gpt_neox.layers.0.attention"

    def add(arrays):
        mask = np.ones((1, 1, 64, 64), bool)
        return arrays | {
            f"{layer}.bias": mask,
            f"{layer}.masked_bias": np.array([-1e9], np.float32),
            f"{layer}.rotary_emb.inv_freq": np.ones((2,), np.float32),
        }

    model = tiny.build_model(files_with(twins.torch, add))
    ids = tiny.random_ids(2, T)
    np.testing.assert_array_equal(tiny.jit_apply(model)(ids), twins.apply(ids))


def test_positions_beyond_the_last_do_not_go_unnoticed(get_twins):
    model = get_twins(GPT2).model
    x = model.embed(jnp.ones((1, 2), jnp.int32))

    def hidden(*positions):
        where = jnp.array([positions], jnp.int32)
        return model.backbone(x, where, jnp.ones((1, 2), jnp.int32))[0]

    assert model.longest_text == 64
    assert np.isfinite(hidden(0, 63)).all()
    assert np.isnan(hidden(63, 64)[0, 1]).all()


@pytest.mark.parametrize("field", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_is_for_training_alone(field):
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    batch = jax.tree.map(jnp.asarray, tiny.make_batch([[T], [9, 15]], T))

    def losses(**options):
        twin = tiny.make_torch(tiny.make_config(GPT2, **(off | options)))
        model = tiny.build_model(tiny.memory_files(twin))
        loss = jax.jit(
            lambda rng: causal_lm.loss(model, batch, causal_lm.Config(), rng=rng).loss
        )
        plain = causal_lm.loss(model, batch, causal_lm.Config()).loss
        return float(plain), [float(loss(jax.random.key(i))) for i in (0, 0, 1)]

    plain, (first, *_) = losses()
    assert first == pytest.approx(plain, rel=1e-6)
    with_dropout, (first, again, other) = losses(**{field: 0.3})
    assert with_dropout == pytest.approx(plain, rel=1e-6)
    assert first == again
    assert abs(first - plain) > 1e-3
    assert abs(first - other) > 1e-3
