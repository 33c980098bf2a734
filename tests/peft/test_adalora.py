"""AdaLoRA against `peft` through its whole budget schedule, and its files both ways."""

import copy
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_twins
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file

import fjft
from fjft import tree
from fjft.errors import UserError
from fjft.models.layers import Linear, Maker, Rngs
from fjft.objectives import causal_lm
from fjft.optimize import optimizer as optimizers
from fjft.peft import adalora
from fjft.peft.adalora_config import for_training
from fjft.training import state as states
from fjft.training import step as steps

CASE = "llama/llama3-rope-biases"
T, STEPS = 16, 20
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Some layers of some stacks; a schedule whose every phase has several steps, and one
# without first and last phase, at which every step allocates.
VARIANTS = {
    "phases": {
        "init_r": 4,
        "target_r": 2,
        "tinit": 3,
        "tfinal": 5,
        "deltaT": 3,
        "total_step": STEPS,
        "lora_alpha": 9,
        # At 0.2 two scores are so near that their order is a processor's rounding.
        "orth_reg_weight": 0.3,
        "target_modules": r".*\.[12]\.self_attn\.(q|v)_proj|.*\.(up|down)_proj",
    },
    "every-step": {
        "init_r": 3,
        "target_r": 1,
        "total_step": STEPS - 2,
        "beta1": 0.7,
        "beta2": 0.6,
        "target_modules": r".*\.(q_proj|o_proj|gate_proj)",
    },
}
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 2e-2, 0.1, 0.1
# At 1e-8 Adam takes whole steps at random where a gradient is zero but for rounding.
ADAM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Trained:
    """Both models after their steps, and what each step did.

    Attributes:
      theirs: `peft`'s model.
      ours: Ours.
      rows: For each step a pair (theirs, ours) of the total loss, the gradient's norm
        and all trained values by the names of PEFT's file.
    """

    twins: tiny.Twins
    config: adalora.Config
    theirs: Any
    ours: Any
    rows: list


def batches() -> list[dict[str, np.ndarray]]:
    return [tiny.make_batch([[T], [T], [T]], T, seed) for seed in range(STEPS)]


def train_theirs(model: Any) -> list[tuple]:
    """As PEFT says it is to be done: `update_and_allocate` before `zero_grad`."""
    trained = peft_twins.trained_by_peft(model)
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        eps=ADAM_EPSILON,
    )
    scheduler = transformers.get_scheduler("linear", optimizer, 2, STEPS)
    rows = []
    for number, batch in enumerate(batches(), 1):
        ids, labels = (torch.tensor(batch[k]).long() for k in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
        values = {n: p.detach().numpy().copy() for n, p in trained.items()}
        rows.append((loss.item(), float(norm), values))
    return rows


def train_ours(model: Any, config: adalora.Config) -> tuple[Any, list[tuple]]:
    graphdef, params = tree.split(model)
    trained, frozen = tree.partition(params, peft_twins.is_trainable(model))
    rule = adalora.step_rule(model, model.provenance.sites, config, STEPS)
    optimizer = optimizers.make_optimizer(
        optimizers.Config(
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            adam_epsilon=ADAM_EPSILON,
            warmup_steps=2,
        ),
        STEPS,
    )
    step = jax.jit(
        steps.make_train_step(
            graphdef,
            lambda model, batch, rng: causal_lm.loss(
                model, batch, causal_lm.Config(), rng=rng
            ),
            optimizer,
            accumulation_steps=1,
            max_grad_norm=MAX_GRAD_NORM,
            rule=rule,
        )
    )
    penalty = jax.jit(rule.penalty)
    state, table, rows = (
        states.init_state(trained, optimizer, 0, rule),
        peft_twins.table(model),
        [],
    )
    for batch in batches():
        extra = penalty(state.params)
        state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, batch))
        loss = metrics.loss_sum / metrics.weight_sum + extra
        values = jax.device_get(state.params)
        named = {tensor.name: values[tensor.path][tensor.index] for tensor in table}
        rows.append((float(loss), float(metrics.grad_norm), named))
    tree.update(model, state.params)
    return model, rows


@pytest.fixture(
    scope="module",
    params=["phases", pytest.param("every-step", marks=pytest.mark.slow)],
)
def trained(request, get_twins, tmp_path_factory):
    """Both start from the same numbers and see the same batches."""
    torch.set_num_threads(1)
    twins, options = get_twins(CASE), VARIANTS[request.param]
    config = adalora.Config(**options)
    directory = tmp_path_factory.mktemp("start")
    ours = tiny.build_model(twins.directory, adalora, config)
    fjft.save_adapter(ours, directory)
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(twins.torch), directory, is_trainable=True
    )
    expected = train_theirs(theirs.train())
    ours, found = train_ours(ours, config)
    rows = list(zip(expected, found, strict=True))
    return Trained(twins, config, theirs.eval(), ours, rows)


def test_every_step_of_the_schedule_equals_peft(trained, record_property):
    budgets, worst = [], 0.0
    # A singular value may be all but zero on its way from one side to the other.
    largest = {
        name: max(float(np.abs(values[name]).max()) for (*_, values), _ in trained.rows)
        for name in trained.rows[0][0][2]
    }
    for number, ((loss, norm, values), (our_loss, our_norm, ours)) in enumerate(
        trained.rows, 1
    ):
        assert our_loss == pytest.approx(loss, rel=1e-5), number
        assert our_norm == pytest.approx(norm, rel=1e-4), number
        assert ours.keys() == values.keys()
        for name, value in values.items():
            np.testing.assert_array_equal(ours[name] == 0, value == 0, err_msg=name)
            error = tiny.max_error(ours[name], value)
            worst = max(worst, error / largest[name])
        singular = [v for n, v in values.items() if n.endswith("lora_E")]
        budgets.append(sum(int((v != 0).sum()) for v in singular))
    record_property("relative_error", worst)
    assert worst < 5e-5
    # The schedule did what it says, and not to every module alike.
    count = len(singular)
    # The first learning rate is zero, as is every E until then.
    assert budgets[0] == 0
    assert budgets[1] > budgets[-1]
    assert budgets[-1] == trained.config.target_r * count
    assert len({int((v != 0).sum()) for v in singular}) > 1
    assert any(norm > MAX_GRAD_NORM for (_, norm, _), _ in trained.rows)


def test_the_trained_adapter_is_written_as_peft_writes_it(trained, tmp_path):
    fjft.save_adapter(trained.ours, tmp_path / "ours")
    trained.theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        json.loads((tmp_path / name / CONFIG).read_text())
        for name in ("ours", "theirs")
    )
    assert ours["rank_pattern"] == theirs["rank_pattern"]
    same = set(ours) & set(theirs) - {"target_modules", "base_model_name_or_path"}
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    written, expected = (
        load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs")
    )
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert written[name].shape == value.shape
        np.testing.assert_allclose(written[name], value, atol=1e-4)


def test_a_pruned_adapter_goes_to_peft_and_back(trained, tmp_path, record_property):
    fjft.save_adapter(trained.ours, tmp_path / "ours")
    theirs = peft_twins.load_peft(trained.twins.torch, tmp_path / "ours")
    error = peft_twins.assert_same_logits(trained.ours, theirs, 1e-4)
    record_property("max_error", error)

    trained.theirs.save_pretrained(tmp_path / "theirs")
    again = peft_twins.load(trained.twins.directory, tmp_path / "theirs")
    peft_twins.assert_same_logits(again, trained.theirs, 1e-4)
    # Cut to what is left, and written back bit for bit.
    kept = again.provenance.peft_config.rank_pattern
    assert min(map(sum, kept.values())) < trained.config.init_r
    for path, param in tree.split(again)[1].items():
        if path.endswith(".adapter.e"):
            assert param.shape[-2] <= max(map(sum, kept.values()))
    fjft.save_adapter(again, tmp_path / "again")
    written, expected = (
        load_file(tmp_path / name / WEIGHTS) for name in ("again", "theirs")
    )
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value)
    described, first = (
        json.loads((tmp_path / name / CONFIG).read_text())["rank_pattern"]
        for name in ("again", "theirs")
    )
    assert described == first


def test_a_module_that_lost_every_rank_is_still_there(get_twins, tmp_path):
    """Whole stacks of them too: `v_proj` has nothing left in any layer."""
    twins = get_twins(CASE)
    config = adalora.Config(init_r=3, target_modules="q_proj|v_proj")
    ours = peft_twins.scatter(tiny.build_model(twins.directory, adalora, config))
    kept = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)[..., None]
    for name, keep in (("q", kept), ("v", np.zeros_like(kept))):
        adapter = getattr(ours.layers.blocks[0].attention, name).adapter
        adapter.e[...] = jnp.where(keep, adapter.e[...], 0)
    fjft.save_adapter(ours, tmp_path)
    pattern = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    assert list(map(sum, pattern.values())) == [2, 0, 1, 0, 0, 0]
    theirs = peft_twins.load_peft(twins.torch, tmp_path)
    peft_twins.assert_same_logits(ours, theirs, 1e-4)
    again = peft_twins.load(twins.directory, tmp_path)
    peft_twins.assert_same_logits(again, theirs, 1e-4)
    assert again.layers.blocks[0].attention.v.adapter.a.shape[-2] == 1


def test_a_new_adapter_starts_as_pefts_does():
    maker = Maker(Rngs(0), jnp.float32)
    linear = Linear(maker, "q", (300, 200), ("heads", "embed"), bias=False, std=1.0)
    adapter = adalora.Adapter(Rngs(1), linear, (100,), 1.0, 0.0)
    for vectors in (adapter.a[...], adapter.b[...]):
        assert np.std(vectors) == pytest.approx(0.02, rel=0.03)
        assert np.mean(vectors) == pytest.approx(0, abs=0.0005)
    assert not adapter.e[...].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_r": 12}, r"target_r=12 .* less than peft.init_r=12"),
        ({"tinit": 6, "tfinal": 4}, "tinit=6 and peft.tfinal=4 leave no step"),
        ({"total_step": 11}, "the run's 10 steps end before"),
        ({"deltaT": 0}, "peft.deltaT=0 at least 1"),
        ({"beta2": 1.0}, "peft.beta2=1.0 must lie between 0 and 1"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight=-1.0 is negative"),
        ({"rank_pattern": {"q_proj": (True,)}}, "leave it empty"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        for_training(adalora.Config(**options), total_steps=10)
