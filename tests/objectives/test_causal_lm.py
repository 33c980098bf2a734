"""Next-token loss: packing, noise, and what a training step never holds."""

import types

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import optax
import pytest
import tiny

from fjft import tree
from fjft.objectives import causal_lm
from fjft.training import state as states
from fjft.training import step as steps

CASES = ["llama/llama3-rope-biases", "qwen3/alternating-biases"]


def test_a_segments_last_token_never_predicts_the_next_ones_first():
    labels = jnp.array([[-100, 5, 6, 8, 7, 3]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    targets, trained = causal_lm.next_tokens(labels, segments)
    assert targets[trained].tolist() == [5, 6, 7]
    assert trained.tolist() == [[True, True, False, True, False, False]]


def _sums(model, **config):
    graphdef, params = tree.split(model)
    config = causal_lm.Config(**config)

    @jax.jit
    def sums(params, batch):
        return causal_lm.loss(tree.merge(graphdef, params), batch, config)

    return lambda batch: sums(params, jax.tree.map(jnp.asarray, batch))


@pytest.mark.parametrize("case", CASES)
def test_packed_equals_unpacked(get_twins, case):
    sums = _sums(get_twins(case).model)
    packed = tiny.make_batch([[9, 14], [6, 10, 5]], 24)
    together = sums(packed)
    apart = [sums(part) for part in tiny.unpack(packed)]
    assert float(together.loss) == pytest.approx(
        sum(float(s.loss) for s in apart), 1e-6
    )
    assert float(together.weight) == sum(float(s.weight) for s in apart)
    assert float(together.correct) == sum(float(s.correct) for s in apart)


def test_neither_chunks_nor_padding_change_the_sums(get_twins):
    model = get_twins(CASES[0]).model
    plain = _sums(model)(tiny.make_batch([[24], [11, 13]], 24))
    chunked = _sums(model, chunk_tokens=6, chunk_vocab_parts=5)(
        tiny.make_batch([[24], [11, 13]], 24)
    )
    np.testing.assert_allclose(chunked, plain, rtol=1e-6)
    batch = tiny.make_batch([[24], [11, 13]], 24)
    padded = {
        name: np.pad(
            x, ((0, 2), (0, 8)), constant_values=-100 if name == "labels" else 0
        )
        for name, x in batch.items()
    }
    np.testing.assert_allclose(_sums(model)(padded), plain, rtol=1e-6)


def test_a_batch_without_a_trained_token_sums_to_nothing(get_twins):
    batch = tiny.make_batch([[8]], 8)
    batch["labels"][:] = -100
    assert [float(x) for x in _sums(get_twins(CASES[0]).model)(batch)] == [0, 0, 0]


def _noises(alpha, rng, batch, size=4096):
    """What is added to the embeddings, seen through a model that has none."""
    seen = []

    def backbone(x, positions, segments, **_):
        seen.append(x)
        return x, None

    model = types.SimpleNamespace(
        embed=lambda ids: jnp.zeros((*ids.shape, size)),
        backbone=backbone,
        logit_terms=lambda x, rng: [(x, jnp.zeros((tiny.VOCAB_SIZE, size)))],
        balance_coefficient=0.0,
        logit_softcap=None,
    )
    config = causal_lm.Config(neftune_noise_alpha=alpha)
    causal_lm.loss(model, jax.tree.map(jnp.asarray, batch), config, rng=rng)
    return np.asarray(seen[0])


def test_embedding_noise_is_uniform_in_its_bound_for_each_segment():
    batch = tiny.make_batch([[4, 16]], 20)
    noise = _noises(5.0, jax.random.key(0), batch)
    for segment, length in ((1, 4), (2, 16)):
        bound = 5.0 / np.sqrt(length * noise.shape[-1])
        here = noise[0][batch["segment_ids"][0] == segment]
        assert 0.99 * bound < np.abs(here).max() <= bound
        assert here.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
        assert abs(here.mean()) < 0.02 * bound
    assert not np.array_equal(noise, _noises(5.0, jax.random.key(1), batch))


def test_evaluation_has_neither_noise_nor_smoothing(get_twins):
    batch = tiny.make_batch([[4, 16]], 20)
    assert not _noises(5.0, None, batch).any()
    assert not _noises(0.0, jax.random.key(0), batch).any()
    model = get_twins(CASES[0]).model
    np.testing.assert_array_equal(
        _sums(model, label_smoothing=0.3, neftune_noise_alpha=5.0)(batch),
        _sums(model)(batch),
    )


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_training_step_never_holds_all_logits(get_twins, parts, remat):
    model = get_twins(CASES[0]).model
    graphdef, params = tree.split(model)
    rows, length, tokens = 2, 26, 4
    vocab = tiny.VOCAB_SIZE
    # No other axis of the model is as long as the sequence or the vocabulary.
    axes = {size for param in params.values() for size in param.shape}
    assert length not in axes
    config = causal_lm.Config(chunk_tokens=tokens, chunk_vocab_parts=parts)
    optimizer = optax.sgd(0.1)
    step = steps.make_train_step(
        graphdef,
        lambda model, batch, rng: causal_lm.loss(
            model, batch, config, rng=rng, remat=remat
        ),
        optimizer,
        accumulation_steps=1,
        max_grad_norm=1.0,
    )
    state = states.init_state(params, optimizer, 0)
    batch = jax.tree.map(jnp.asarray, tiny.make_batch([[length]] * rows, length))
    shapes = jaxprs.shapes(jax.make_jaxpr(step)(state, {}, batch).jaxpr)
    size = model.arch.hidden_size
    logits = {s for s in shapes if s and s[-1] in (vocab, vocab // parts)}
    logits = {s for s in logits if size not in s and np.prod(s) > s[-1]}
    assert any(s[-1] == vocab // parts for s in logits)
    for shape in logits:
        assert np.prod(shape) <= tokens * vocab // parts, shape
