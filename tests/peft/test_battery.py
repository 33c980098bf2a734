"""What every method promises, held against `peft` and torch; see `method_cases.py`."""

import dataclasses
import functools
import json
from typing import Any

import bases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_twins
import pytest
import tiny
import torch
import torch_training
from method_cases import (
    CASES,
    FIRST,
    IDS,
    MERGED,
    WITH_FILES,
    Case,
    get_case,
    make_theirs,
)
from safetensors.numpy import load_file

import fjft
from fjft import sharding, tree
from fjft.checkpoint import orbax
from fjft.errors import UserError
from fjft.optimize import optimizer as optimizers
from fjft.peft.methods import METHODS
from fjft.training import state as states
from fjft.training import step as steps

STEPS = 20
TOLERANCE = 1e-5
# A gradient that is zero but for rounding, as a key's bias has in most models, makes
# Adam take whole steps at random, unless its epsilon says what zero is.
ADAM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Built:
    """A case's models on both sides, and what tests share of it.

    Attributes:
      theirs: The oracle, with random numbers in all that is trained.
    """

    case: Case
    method: Any
    base: bases.Base
    theirs: Any

    @functools.cached_property
    def config(self) -> Any:
        """Our options."""
        return self.method.Config(**self.case.options)

    def build(self, **options: Any) -> Any:
        """Our model as it starts."""
        return tiny.build_model(
            self.base.directory, self.method, self.config, **options
        )

    @functools.cached_property
    def fresh(self) -> Any:
        """Our model as it starts; left so."""
        return self.build()

    def like(self, theirs: Any) -> Any:
        """Our model with the numbers of an oracle's trained parameters."""
        return peft_twins.copy_values(self.fresh, self.case.trained(theirs))

    @functools.cached_property
    def ours(self) -> Any:
        """Our model with the oracle's random numbers."""
        return self.like(self.theirs)

    @functools.cached_property
    def batch(self) -> bases.Batch:
        """Rows to compare outputs on."""
        return self.base.make_batch(0, self.case.rows)

    @functools.cached_property
    def step(self) -> Any:
        """The compiled train step of our model on one device."""
        return jax.jit(make_step(self, self.fresh))

    def start(self, model: Any) -> tuple[states.TrainState, tree.Params]:
        """The train state of a model, and its frozen parameters."""
        _, params = tree.split(model)
        trained, frozen = tree.partition(params, peft_twins.is_trainable(model))
        return states.init_state(trained, make_optimizer(self, model), 0), frozen

    def sum_loss(self, model: Any, batch: bases.Batch, num_items: int) -> torch.Tensor:
        """The oracle's mean loss."""
        loss = self.case.sum_loss or self.base.sum_loss
        return loss(model, batch, num_items)


def make_optimizer(built: Built, model: Any) -> optax.GradientTransformation:
    """AdamW as training has it, which also keeps the last gradients in its state."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )
    axes = tree.logical_axes(model)
    config = optimizers.Config(
        learning_rate=built.case.learning_rate,
        warmup_steps=3,
        weight_decay=0.1,
        adam_epsilon=ADAM_EPSILON,
        schedule="linear",
    )
    stacks = {path: a.count("layers") + a.count("expert") for path, a in axes.items()}
    adamw = optimizers.make_optimizer(
        config, STEPS, stack_axes=lambda path: stacks[path]
    )
    return optax.chain(keep, adamw)


def make_step(built: Built, model: Any) -> Any:
    """The train step, without clipping, which the tests of training have."""
    graphdef, _ = tiny.split_bare(model)
    return steps.make_train_step(
        graphdef,
        built.base.loss,
        make_optimizer(built, model),
        accumulation_steps=1,
        max_grad_norm=0,
    )


def on_device(batch: bases.Batch) -> steps.Batch:
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="session")
def get_base(tmp_path_factory):
    """Gives the base model of a name, made once."""
    return functools.cache(
        lambda name: bases.make_base(name, tmp_path_factory.mktemp("base"))
    )


@pytest.fixture(scope="module", params=IDS)
def built(request, get_base):
    """Every case in turn."""
    torch.set_num_threads(1)
    name, case = get_case(request.param)
    base = get_base(case.base)
    theirs = peft_twins.randomize(make_theirs(case, base), case.trained)
    return Built(case, METHODS[name], base, theirs)


def test_every_method_has_a_case():
    assert CASES.keys() == METHODS.keys()


def test_it_starts_as_peft_and_as_the_bare_model(built):
    theirs = make_theirs(built.case, built.base)
    copied = built.like(theirs)
    expected = built.base.their_logits(theirs, built.batch)
    logits = built.base.logits(copied, built.batch)
    assert tiny.relative_error(logits, expected) < TOLERANCE
    if built.case.starts_as_base:
        bare = built.base.their_logits(built.base.twin, built.batch)
        logits = built.base.logits(built.fresh, built.batch)
        assert tiny.relative_error(logits, bare) < TOLERANCE


def test_the_same_numbers_are_trained(built):
    theirs = built.case.trained(built.theirs)
    params = tree.split(built.fresh)[1]
    table = peft_twins.trained_table(built.fresh)
    assert {tensor.name for tensor in table} == theirs.keys()
    for tensor in table:
        shape = params[tensor.path][tensor.index].shape
        assert shape == tuple(theirs[tensor.name].shape), tensor.name
    assert {t.path for t in table} == set(
        filter(peft_twins.is_trainable(built.fresh), params)
    )
    counted = built.method.num_trainable(
        built.fresh, built.fresh.provenance.sites, built.config
    )
    assert counted == sum(p.numel() for p in theirs.values())


def test_loss_and_gradients(built, record_property):
    built.theirs.zero_grad()
    loss = built.sum_loss(
        built.theirs, built.batch, torch_training.count_items(built.batch)
    )
    loss.backward()
    state, frozen = built.start(built.ours)
    state, metrics = built.step(state, frozen, on_device(built.batch))
    mean = float(metrics.loss_sum / metrics.weight_sum)
    assert mean == pytest.approx(loss.item(), rel=TOLERANCE)
    (grads, _) = state.opt_state
    theirs = {n: p.grad.numpy() for n, p in built.case.trained(built.theirs).items()}
    largest = max(float(np.abs(grad).max()) for grad in theirs.values())
    worst, rest = 0.0, {path: np.array(grad) for path, grad in grads.items()}
    for tensor in peft_twins.trained_table(built.ours):
        part = rest[tensor.path][tensor.index]
        worst = max(worst, tiny.max_error(part, theirs[tensor.name]))
        rest[tensor.path][tensor.index] = 0
    record_property("relative_error", worst / largest)
    assert worst < TOLERANCE * largest
    # What only pads a stack of unequal ranks never moves.
    assert not any(grad.any() for grad in rest.values())


def test_twenty_steps_of_training(built, record_property):
    batches = [built.base.make_batch(seed, built.case.rows) for seed in range(STEPS)]
    theirs = make_theirs(built.case, built.base)
    model = built.like(theirs)
    before = jax.device_get(tree.split(model)[1])
    state, frozen = built.start(model)
    metrics = []
    for batch in batches:
        state, metric = built.step(state, frozen, on_device(batch))
        metrics.append(jax.device_get(metric))
    expected = torch_training.train(
        theirs,
        batches,
        learning_rate=built.case.learning_rate,
        warmup_steps=3,
        total_steps=STEPS,
        weight_decay=0.1,
        max_grad_norm=np.inf,
        adam_epsilon=ADAM_EPSILON,
        sum_loss=built.sum_loss,
    )
    losses = np.array([m.loss_sum / m.weight_sum for m in metrics])
    norms = np.array([m.grad_norm for m in metrics])
    record_property("loss_error", float(np.max(np.abs(losses / expected.losses - 1))))
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-4)
    np.testing.assert_allclose(norms, expected.grad_norms, rtol=1e-3)
    wanted = built.case.trained(theirs)
    table = peft_twins.trained_table(model)
    learned, errors = {}, {}
    for tensor in table:
        value = wanted[tensor.name].detach().numpy()
        start = before[tensor.path][tensor.index]
        ours = state.params[tensor.path][tensor.index]
        learned[tensor.name] = tiny.max_error(start, value)
        errors[tensor.name] = tiny.max_error(ours, value)
    assert all(learned.values())
    most = max(learned.values())
    assert max(errors.values()) < 2e-3 * most, errors
    # Each by itself too, but for those whose gradient is zero up to rounding.
    moved = [name for name, distance in learned.items() if distance > 1e-3 * most]
    assert all(errors[name] < 1e-2 * learned[name] for name in moved), errors
    # Gradients and moments only where something is trained; the rest stays bit for bit.
    trained = set(filter(peft_twins.is_trainable(model), before))
    assert state.params.keys() == trained
    sizes = {p.size for p in state.params.values()}
    assert {x.size for x in jax.tree.leaves(state.opt_state) if x.ndim} <= sizes
    assert frozen.keys() == before.keys() - trained
    for path, param in frozen.items():
        np.testing.assert_array_equal(param, before[path])


@pytest.mark.parametrize("built", MERGED, indirect=True)
def test_merged_equals_adapted(built):
    expected = built.base.logits(built.ours, built.batch)
    merged = fjft.merge_adapter(built.ours)
    logits = built.base.logits(merged, built.batch)
    assert tiny.relative_error(logits, expected) < TOLERANCE
    # The given model is left as it was, and the merged one is a plain model.
    np.testing.assert_array_equal(built.base.logits(built.ours, built.batch), expected)
    bare = tiny.build_model(built.base.directory)
    assert jax.tree.map(jnp.shape, tree.split(merged)[1]) == jax.tree.map(
        jnp.shape, tree.split(bare)[1]
    )


@pytest.mark.parametrize(
    "built", [i for i in WITH_FILES if i not in MERGED], indirect=True
)
def test_what_cannot_be_merged_says_so(built):
    with pytest.raises(UserError, match="merge"):
        fjft.merge_adapter(built.ours)


@pytest.mark.parametrize("built", WITH_FILES, indirect=True)
def test_files_go_to_peft_and_back(built, tmp_path):
    expected = built.base.their_logits(built.theirs, built.batch)
    fjft.save_adapter(built.ours, tmp_path / "ours")
    theirs = built.case.load(built.base.twin, tmp_path / "ours")
    logits = built.base.their_logits(theirs, built.batch)
    assert tiny.relative_error(logits, expected) < TOLERANCE
    built.case.save(theirs, tmp_path / "theirs")
    again = fjft.load_model(str(built.base.directory), adapter=tmp_path / "theirs")
    logits = built.base.logits(again, built.batch)
    if built.case.is_written_as_it_is:
        expected = built.base.logits(built.ours, built.batch)
        np.testing.assert_array_equal(logits, expected)
    assert tiny.relative_error(logits, expected) < TOLERANCE
    fjft.save_adapter(again, tmp_path / "again")
    ours, written, back = (
        load_file(next((tmp_path / name).glob("*.safetensors")))
        for name in ("ours", "theirs", "again")
    )
    assert ours.keys() == written.keys() == back.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(written[name], array)
        np.testing.assert_array_equal(back[name], array)
    described = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert described["peft_type"] == built.method.PEFT_TYPE


@pytest.mark.parametrize(
    "built", [i for i in IDS if i not in WITH_FILES], indirect=True
)
def test_files_go_to_transformers_and_back(built, tmp_path):
    """Of a method that has no files of its own."""
    expected = built.base.their_logits(built.theirs, built.batch)
    fjft.save_model(built.ours, tmp_path)
    theirs = type(built.base.twin).from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    logits = built.base.their_logits(theirs, built.batch)
    assert tiny.relative_error(logits, expected) < TOLERANCE
    again = fjft.load_model(str(tmp_path))
    logits = built.base.logits(again, built.batch)
    assert tiny.relative_error(logits, expected) < TOLERANCE
    with pytest.raises(UserError, match="save_model"):
        fjft.save_adapter(built.ours, tmp_path)


@pytest.mark.parametrize("built", FIRST, indirect=True)
def test_orbax_gives_back_what_it_was_given(built, tmp_path):
    state, _ = built.start(built.ours)
    checkpoints = orbax.Checkpoints(orbax.Config(directory=str(tmp_path)))
    checkpoints.save(1, state, {})
    checkpoints.wait()
    other, _ = built.start(built.fresh)
    restored = checkpoints.restore(1, other)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def spread_out(built: Built) -> tuple[Any, Any]:
    """A mesh of every axis, and our model on it with the oracle's random numbers."""
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    model = built.build(mesh=mesh)
    start = jax.device_get(tree.split(built.fresh)[1])
    for path, param in tree.split(model)[1].items():
        if ".adapter." in path:
            # Worked out from weights that are cut up, it has another order of sums.
            assert tiny.relative_error(param, start[path]) < TOLERANCE, path
        else:
            np.testing.assert_array_equal(param, start[path])
    return mesh, peft_twins.copy_values(model, built.case.trained(built.theirs))


@pytest.mark.parametrize("built", FIRST, indirect=True)
def test_sharded_equals_one_device(built):
    _, model = spread_out(built)
    logits = built.base.logits(model, built.batch)
    expected = built.base.logits(built.ours, built.batch)
    assert tiny.relative_error(logits, expected) < TOLERANCE


@pytest.mark.slow
def test_sharded_gradients_equal_one_device(built):
    mesh, model = spread_out(built)
    batch = jax.device_put(built.batch, sharding.batch_sharding(mesh))
    single, frozen = built.start(built.ours)
    single, expected = built.step(single, frozen, on_device(built.batch))
    with jax.set_mesh(mesh):
        state, frozen = built.start(model)
        state, metrics = jax.jit(make_step(built, model))(state, frozen, batch)
    assert float(metrics.loss_sum) == pytest.approx(float(expected.loss_sum), rel=1e-5)
    largest = max(float(np.abs(g).max()) for g in single.opt_state[0].values())
    for path, grad in single.opt_state[0].items():
        error = tiny.max_error(state.opt_state[0][path], grad)
        # Products that are cut are summed in another order: every tensor, of every
        # layer, is off by about 1e-5 of its own largest number.
        assert error < 2 * TOLERANCE * largest, path


@pytest.mark.parametrize("built", FIRST, indirect=True)
def test_what_is_trained_is_float32_over_a_bfloat16_base(built):
    model = built.build(dtype="bfloat16")
    trainable = peft_twins.is_trainable(model)
    dtypes = {path: p.dtype for path, p in tree.split(model)[1].items()}
    names = {site.path for site in model.provenance.sites}
    single, half = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    assert {d for path, d in dtypes.items() if trainable(path)} == {single}
    frozen = {d for path, d in dtypes.items() if path in names and not trainable(path)}
    assert frozen <= {half}
    state, frozen = built.start(model)
    batch = on_device(built.batch)
    after, _ = jax.eval_shape(make_step(built, model), state, frozen, batch)
    floats = [x for x in jax.tree.leaves((after.params, after.opt_state)) if x.ndim]
    assert {x.dtype for x in floats} == {single}
