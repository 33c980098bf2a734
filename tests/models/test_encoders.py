"""Every encoder family and head against `transformers` in torch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import torch
from safetensors.numpy import load_file
from tiny_encoders import CASES, CONFIGS, make_config, make_torch, torch_outputs

import fjft
from fjft import sharding, tree
from fjft.errors import UserError
from fjft.models.deberta_attention import relative_buckets
from fjft.models.encoder import Encoder, restarting_positions
from fjft.models.families import FAMILIES
from fjft.models.fields import Fields
from fjft.models.layers import Maker, Rngs
from fjft.models.weights import sites

B, T = 2, 24
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Pair:
    """A torch model, its directory, and ours loaded from it."""

    case: str
    torch: object
    directory: object
    ours: object
    apply: object


@pytest.fixture(scope="module")
def get_pair(tmp_path_factory):
    """Gives the two models of a case, made once."""
    made = {}

    def get(case):
        if case not in made:
            twin = tiny_encoders.torch_model(case)
            directory = tmp_path_factory.mktemp("encoder")
            tiny_encoders.save(twin, directory)
            ours = fjft.load_model(str(directory))
            made[case] = Pair(case, twin, directory, ours, tiny.jit_apply(ours))
        return made[case]

    return get


@pytest.fixture(params=CASES)
def pair(request, get_pair):
    return get_pair(request.param)


def test_every_encoder_family_has_tiny_models():
    encoders = {
        name
        for name, family in FAMILIES.items()
        if isinstance(family.MODEL, type) and issubclass(family.MODEL, Encoder)
    }
    assert {case.partition("/")[0] for case in CONFIGS} == encoders


def test_outputs_equal_torch_plain_and_padded(pair, record_property):
    ids = tiny.random_ids(B, T) // 2 + 8
    types = tiny_encoders.random_types(ids.shape, pair.torch)
    mask = np.ones((B, T), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), ids.shape)
    # One compiled program serves plain, padded and packed rows.
    ours = pair.apply(ids, positions, mask, types)
    theirs = torch_outputs(pair.torch, ids, token_type_ids=types)
    plain = tiny.max_error(ours, theirs)

    mask[1, -7:] = 0
    ours = pair.apply(ids, positions, mask, types)
    theirs = torch_outputs(pair.torch, ids, token_type_ids=types, attention_mask=mask)
    if ours.ndim == 3:
        ours, theirs = ours[mask == 1], theirs[mask == 1]
    padded = tiny.max_error(ours, theirs)
    record_property("plain_error", plain)
    record_property("padded_error", padded)
    print(pair.case, plain, padded)  # pytest -rP shows the table of errors
    assert max(plain, padded) < TOLERANCE


def test_packed_and_left_padded_rows_equal_each_segment_alone(pair):
    """Positions restart, and neither attention nor convolution crosses a border."""
    batch = tiny.make_batch([[9, 15], [5, 7, 8]], T)
    # The second row begins with padding instead of ending with it.
    batch = {k: np.stack([x[0], np.roll(x[1], 4)]) for k, x in batch.items()}
    ids, segments = batch["input_ids"] // 2 + 8, batch["segment_ids"]
    types = tiny_encoders.random_types(ids.shape, pair.torch)
    head, num_segments = pair.ours.arch.head, 3
    if head == "sequence_classification":
        ours = np.asarray(
            jax.jit(
                lambda *a: pair.ours(a[0], None, *a[1:], num_segments=num_segments)
            )(*map(jnp.asarray, (ids, segments, types)))
        )
    else:
        ours = pair.apply(
            ids,
            np.asarray(restarting_positions(jnp.asarray(segments))),
            segments,
            types,
        )
    for b, row in enumerate(segments):
        for number in range(1, row.max() + 1):
            (where,) = np.nonzero(row == number)
            theirs = torch_outputs(
                pair.torch,
                ids[b : b + 1, where],
                token_type_ids=types[b : b + 1, where],
            )[0]
            mine = ours[b, number - 1] if ours.shape[1] == 3 else ours[b, where]
            assert tiny.max_error(mine, theirs) < TOLERANCE


def test_round_trip_is_bit_exact(pair, tmp_path):
    fjft.save_model(pair.ours, tmp_path)
    before, after = (
        load_file(d / "model.safetensors") for d in (pair.directory, tmp_path)
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        np.testing.assert_array_equal(value, after[name], name)
    before, after = (
        json.loads((d / "config.json").read_text()) for d in (pair.directory, tmp_path)
    )
    assert before == after


def test_every_parameter_has_axes_that_a_rule_covers(pair):
    _, params = tree.split(pair.ours)
    axes = tree.logical_axes(pair.ours)
    assert axes.keys() == params.keys()
    for path, names in axes.items():
        assert len(names) == params[path].ndim, path
        assert set(names) <= {*sharding.RULES, None}, path
        spec = [axis for axis in sharding.spec(names) if axis is not None]
        assert len(spec) == len(set(spec)), path


@pytest.mark.parametrize(
    "variant",
    [
        "albert/two-groups-of-two",
        "bert/tanh-gelu",
        "deberta-v2/v2",
        "distilbert/relu",
        "modernbert/biases-mean",
    ],
)
def test_gradients_equal_torch(variant, get_pair):
    pair = get_pair(f"{variant}/masked_lm")
    # Without the padding token, whose vector torch never moves.
    ids = tiny.random_ids(B, T, seed=3) // 2 + 8
    labels = tiny.random_ids(B, T, seed=4)
    pair.torch.zero_grad()
    loss = pair.torch(torch.tensor(ids).long(), labels=torch.tensor(labels).long()).loss
    loss.backward()
    theirs = {
        name: p.grad.numpy()
        for name, p in pair.torch.named_parameters()
        if p.grad is not None
    }
    graphdef, params = tree.split(pair.ours)

    def mean_loss(params):
        logits = tree.merge(graphdef, params)(jnp.asarray(ids))
        logs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logs, jnp.asarray(labels)[..., None], 2).mean()

    ours, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert float(ours) == pytest.approx(loss.item(), rel=1e-5)
    for site in pair.ours.provenance.sites:
        expected = tiny.gather(site, theirs)
        theirs = {n: g for n, g in theirs.items() if n not in site.hf_names}
        scale = max(np.abs(expected).max(), 1e-3)  # the keys' biases have none
        error = np.abs(np.asarray(grads[site.path]) - expected).max() / scale
        assert error < TOLERANCE, site.path
    assert not theirs


@pytest.mark.parametrize("length", [5, 64, 300])
@pytest.mark.parametrize(
    ("buckets", "reach"), [(8, 30), (32, 512), (256, 512), (-1, 9)]
)
def test_relative_buckets_equal_torch(length, buckets, reach):
    from transformers.models.deberta_v2.modeling_deberta_v2 import (
        build_relative_position,
    )

    layer = torch.zeros(1, length, 1)
    theirs = build_relative_position(layer, layer, buckets, reach)[0].numpy()
    np.testing.assert_array_equal(relative_buckets(length, buckets, reach), theirs)


def test_relative_positions_of_old_bert_are_refused():
    case = "bert/tanh-gelu/masked_lm"
    config = make_config(case, position_embedding_type="relative_key")
    with pytest.raises(UserError, match="position_embedding_type='relative_key'"):
        tiny.build_model(tiny.memory_files(make_torch(case, config)))
    for name in ("is_decoder", "add_cross_attention"):
        twin = make_torch(case)
        setattr(twin.config, name, True)
        with pytest.raises(UserError, match=name):
            tiny.build_model(tiny.memory_files(twin))


FRESH = [
    f"{variant}/{head}"
    for variant in (
        "bert/tanh-gelu",
        "roberta/pad-5",
        "xlm-roberta/pad-3",
        "electra/factorized",
        "distilbert/relu",
        "albert/one-group",
        "deberta-v2/v2",
        "modernbert/biases-mean",
    )
    for head in ("masked_lm", "sequence_classification")
]


@pytest.mark.parametrize("case", FRESH)
def test_new_weights_are_drawn_as_transformers_draws_them(case):
    import transformers

    config = make_config(case)
    torch.manual_seed(0)
    twin = getattr(transformers, tiny_encoders.HEADS[case.split("/")[2]]).from_config(
        config
    )
    twin.config.architectures = [type(twin).__name__]
    family = FAMILIES[config.model_type]
    arch = family.architecture(Fields(twin.config))
    model = family.MODEL(arch, Maker(Rngs(0), jnp.float32), "float32")
    params = tree.split(model)[1]
    theirs = {n: tiny.to_numpy(v) for n, v in twin.state_dict().items()}
    for site in sites(family.rows(arch), model):
        expected = np.stack([theirs[name] for name in site.hf_names])
        ours = np.asarray(params[site.path]).reshape(expected.shape)
        if expected.std() == 0:
            np.testing.assert_array_equal(ours, expected, site.path)
            continue
        # Rows of zeros, for padding, are in the same places.
        np.testing.assert_array_equal(ours.any(-1), expected.any(-1), site.path)
        margin = 6 / np.sqrt(2 * ours.size) * np.sqrt(2)
        assert ours.std() == pytest.approx(expected.std(), rel=margin), site.path
        spread = expected.std() * 8 / np.sqrt(ours.size)
        assert abs(ours.mean() - expected.mean()) < spread, site.path


@pytest.mark.parametrize(
    "case",
    [
        "bert/tanh-gelu/sequence_classification",
        "albert/two-groups-of-two/masked_lm",
        "deberta-v2/v2/masked_lm",
        "modernbert/biases-mean/masked_lm",
    ],
)
def test_sharded_equals_one_device(get_pair, case):
    pair = get_pair(case)
    mesh = sharding.make_mesh(sharding.Config(2, 2, 2))
    spread = fjft.load_model(str(pair.directory), mesh=mesh)
    params = tree.split(spread)[1]
    assert any(p.sharding.spec != (None,) * p.ndim for p in params.values())
    ids = tiny.random_ids(4, T) // 2 + 8
    ones = np.ones_like(ids)
    with jax.set_mesh(mesh):
        theirs = tiny.jit_apply(spread)(ids, None, ones)
    assert tiny.max_error(tiny.jit_apply(pair.ours)(ids, None, ones), theirs) < 1e-5


def test_rows_that_are_too_long_are_refused_and_late_positions_are_loud(get_pair):
    pair = get_pair("roberta/pad-3/masked_lm")
    limit = 40 - 4
    assert pair.ours.longest_text == limit
    ids = jnp.asarray(tiny.random_ids(1, limit + 1))
    with pytest.raises(UserError, match=f"the {limit} positions"):
        pair.ours(ids)
    positions = jnp.full((1, 5), limit, jnp.int32)
    assert np.isnan(np.asarray(pair.ours(ids[:, :5], positions))).all()
