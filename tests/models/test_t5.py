"""T5: buckets of distances, heads that no config tells of, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_seq2seq
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from fjft import tree
from fjft.errors import UserError
from fjft.labels import IGNORED
from fjft.models.encoder_decoder import shift_tokens_right
from fjft.models.positions import relative_buckets
from fjft.objectives.chunks import Chunks
from fjft.objectives.cross_entropy import cross_entropy_sums

B, E, T = 2, 21, 13


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"),
    [(32, 128), (32, 20), (12, 17), (64, 1000), (8, 128), (16, 64)],
)
def test_buckets_equal_torch(num_buckets, max_distance, bidirectional):
    distance = np.arange(-1100, 1101, dtype=np.int32)
    options = {
        "num_buckets": num_buckets,
        "max_distance": max_distance,
        "bidirectional": bidirectional,
    }
    ours = relative_buckets(jnp.asarray(distance), **options)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distance), **options)
    np.testing.assert_array_equal(ours, theirs.numpy())


def _files(twin, **changes):
    files = tiny.memory_files(twin)
    arrays = {k: tiny.to_numpy(v) for k, v in twin.state_dict().items()} | changes
    return dataclasses.replace(files, tensors=tiny.MemorySource(arrays))


def test_copies_of_the_embeddings_are_passed_over():
    twin = tiny_seq2seq.torch_model("t5/relu-tied")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    model = tiny.build_model(_files(twin, **{unused: np.ones((12, 4), np.float32)}))
    assert model.arch.ties_head
    assert model.arch.logit_scale == 24**-0.5


def test_embeddings_under_any_of_their_names_are_found():
    twin = tiny_seq2seq.torch_model("t5/relu-tied")
    files = _files(twin)
    arrays = dict(files.tensors.arrays)  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"):
        del arrays[name]
    files = dataclasses.replace(files, tensors=tiny.MemorySource(arrays))
    model = tiny.build_model(files)
    np.testing.assert_array_equal(
        model.embedding.weight[...], twin.shared.weight.detach().numpy()
    )


def test_two_token_tables_are_refused():
    twin = tiny_seq2seq.torch_model("t5/relu-tied")
    other = np.ones((tiny.VOCAB_SIZE, 24), np.float32)
    with pytest.raises(UserError, match=r"decoder\.embed_tokens\.weight differs"):
        tiny.build_model(_files(twin, **{"decoder.embed_tokens.weight": other}))


def test_a_head_of_another_kind_is_refused():
    twin = tiny_seq2seq.make_torch(tiny_seq2seq.make_config("t5/relu-tied"))
    twin.config.architectures = ["T5ForSequenceClassification"]
    with pytest.raises(UserError, match="T5ForSequenceClassification"):
        tiny.build_model(_files(twin))


@pytest.mark.parametrize(
    "case",
    [
        "t5/relu-tied",
        "mt5/gated-own-head",
        "bart/post-norm",
        "mbart/pre-norm",
        "marian/two-vocabularies",
    ],
)
def test_loss_and_gradients_equal_torch(case, record_property):
    own_head = case.endswith("own-head")
    twin = tiny_seq2seq.make_torch(tiny_seq2seq.make_config(case), own_head)
    if hasattr(twin, "final_logits_bias"):
        twin.final_logits_bias.zero_()  # the objective has no bias to add
    model = tiny.build_model(_files(twin))
    ids = tiny_seq2seq.random_ids(B, E)
    mask = np.ones((B, E), np.int32)
    mask[0, -6:] = 0
    labels = tiny_seq2seq.random_ids(B, T, seed=1)
    labels[1, -5:] = IGNORED
    out = twin(
        input_ids=torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask),
        labels=torch.tensor(labels).long(),
    )
    out.loss.backward()
    theirs = {
        name: p.grad.numpy() for name, p in twin.named_parameters() if p.requires_grad
    }
    graphdef, params = tree.split(model)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        model = tree.merge(graphdef, params)
        decoder_ids = shift_tokens_right(jnp.asarray(labels), model.arch)
        memory = model.encode(jnp.asarray(ids), None, jnp.asarray(mask), remat="full")
        positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        x, _ = model.backbone(
            model.embed(decoder_ids),
            positions,
            jnp.ones((B, T), jnp.int32),
            memory=memory,
            remat="full",
        )
        trained = labels != IGNORED
        sums = cross_entropy_sums(
            model.logit_terms(x),
            jnp.asarray(np.where(trained, labels, 0)),
            jnp.asarray(trained, jnp.float32),
            chunks=Chunks(),
        )
        return sums.loss / sums.weight

    loss, grads = mean_loss(params)
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    worst = 0.0
    for site in model.provenance.sites:
        if site.path == "bias":
            assert not np.asarray(grads["bias"]).any()
            continue
        expected = tiny.gather(site, theirs)
        if site.path.endswith(".k.bias"):
            # It adds the same to all scores of a query, so that nothing depends on it.
            assert max(np.abs(grads[site.path]).max(), np.abs(expected).max()) < 1e-6
            continue
        worst = max(worst, tiny.relative_error(grads[site.path], expected))
    record_property("max_relative_error", worst)
    assert worst < 1e-4


def test_dropout_is_for_training_alone():
    config = tiny_seq2seq.make_config("t5/gated-own-head", dropout_rate=0.3)
    model = tiny.build_model(tiny.memory_files(tiny_seq2seq.make_torch(config)))
    ids = jnp.asarray(tiny_seq2seq.random_ids(B, E))
    with jax.disable_jit():
        plain = model.encode(ids).states
        first, second, again = (
            model.encode(ids, rng=jax.random.key(seed)).states for seed in (1, 2, 1)
        )
    np.testing.assert_array_equal(first, again)
    assert tiny.max_error(first, plain) > 0.1
    assert tiny.max_error(first, second) > 0.1
    assert float(jnp.mean(first == 0)) == pytest.approx(0.3, abs=0.06)
