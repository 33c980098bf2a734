"""Several adapters on one base, against `peft`'s own."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch

import fjft
from fjft import sharding, tree
from fjft.errors import UserError
from fjft.peft import combine, lora

T = 12
# Two of one rank, on different maps; one of another rank; one on some layers.
ADAPTERS = {
    "one": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "two": {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]},
    "wide": {
        "r": 4,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["q_proj", "o_proj"],
    },
    "some": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r".*layers\.[02]\.self_attn\.(q|k)_proj",
    },
}


@dataclasses.dataclass(frozen=True)
class Both:
    """Four adapters on one base, in `peft` and here."""

    theirs: Any
    ours: Any
    twins: tiny.Twins
    directories: dict[str, Path]


@pytest.fixture(scope="module")
def both(get_twins, tmp_path_factory):
    twins = get_twins("llama/llama3-rope-biases")
    directory = tmp_path_factory.mktemp("adapters")
    theirs = None
    for name, options in ADAPTERS.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        if theirs is None:
            base = copy.deepcopy(twins.torch)
            theirs = peft.get_peft_model(base, config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    assert theirs is not None
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    theirs.eval().save_pretrained(directory)
    directories = {name: directory / name for name in ADAPTERS}
    ours = fjft.load_adapters(fjft.load_model(str(twins.directory)), directories)
    return Both(theirs, ours, twins, directories)


def logits(model, ids):
    return tiny.jit_apply(model)(ids)


def test_one_after_another_speaks(both):
    ids = tiny.random_ids(2, T)
    first = logits(both.ours, ids)
    for name in ADAPTERS:
        both.theirs.set_adapter(name)
        fjft.set_adapters(both.ours, name)
        expected = tiny.torch_logits(both.theirs, ids)
        assert tiny.relative_error(logits(both.ours, ids), expected) < 1e-5, name
        alone = fjft.load_model(
            str(both.twins.directory), adapter=both.directories[name]
        )
        assert tiny.relative_error(logits(alone, ids), expected) < 1e-5, name
    fjft.set_adapters(both.ours, "one")
    np.testing.assert_array_equal(logits(both.ours, ids), first)
    fjft.set_adapters(both.ours, None)
    bare = both.twins.apply(ids)
    assert tiny.relative_error(logits(both.ours, ids), bare) < 1e-6


def test_a_choice_needs_no_new_program(both):
    fjft.set_adapters(both.ours, "one")
    before, _ = tiny.split_bare(both.ours)
    fjft.set_adapters(both.ours, {"one": 0.3, "wide": -2.0})
    assert tiny.split_bare(both.ours)[0] == before
    fjft.set_adapters(both.ours, rows=["one", None])
    by_row, _ = tiny.split_bare(both.ours)
    fjft.set_adapters(both.ours, rows=["two", "wide"])
    assert tiny.split_bare(both.ours)[0] == by_row


def test_several_are_added_up(both):
    ids = tiny.random_ids(2, T)
    both.theirs.base_model.set_adapter(["one", "some"])
    fjft.set_adapters(both.ours, ["one", "some"])
    expected = tiny.torch_logits(both.theirs, ids)
    assert tiny.relative_error(logits(both.ours, ids), expected) < 1e-5
    merged = fjft.merge_adapter(both.ours)
    assert tiny.relative_error(logits(merged, ids), expected) < 1e-5


def test_each_row_has_an_adapter_of_its_own(both):
    names = ["two", None, "wide", "some", "two"]
    ids = tiny.random_ids(len(names), T)
    fjft.set_adapters(both.ours, rows=names)
    found = logits(both.ours, ids)
    with torch.no_grad():
        out = both.theirs(
            torch.tensor(ids).long(),
            adapter_names=[name or "__base__" for name in names],
        )
    assert tiny.relative_error(found, out.logits.numpy()) < 1e-5
    for row, name in enumerate(names):
        fjft.set_adapters(both.ours, name)
        alone = logits(both.ours, ids[row : row + 1])
        assert tiny.relative_error(found[row : row + 1], alone) < 1e-5, row


@pytest.fixture(params=["int8", "mesh"])
def elsewhere(request):
    """How a base is loaded that lies in codes, or on several devices."""
    if request.param == "int8":
        return {"quantization": "int8"}
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    return {"mesh": mesh}


def test_several_stand_on_a_base_in_codes_or_on_a_mesh(both, elsewhere):
    source, names = str(both.twins.directory), ["two", None, "some", "one"]
    base = fjft.load_model(source, **elsewhere)
    several = fjft.load_adapters(base, both.directories)
    for path, param in tree.split(several)[1].items():
        assert param.sharding.mesh == base.norm.weight[...].sharding.mesh, path
    ids = tiny.random_ids(len(names), T)
    fjft.set_adapters(several, rows=names)
    by_row = logits(several, ids)
    for row, name in enumerate(names):
        adapter = name and both.directories[name]
        alone = fjft.load_model(source, adapter=adapter, **elsewhere)
        expected = logits(alone, ids)[row]
        assert tiny.relative_error(by_row[row], expected) < 1e-5, name
    # What is merged is the weights in full precision.
    fjft.set_adapters(several, {"one": 0.3, "some": -2.0})
    fjft.set_adapters(both.ours, {"one": 0.3, "some": -2.0})
    merged, expected = (
        logits(fjft.merge_adapter(m), ids) for m in (several, both.ours)
    )
    assert tiny.relative_error(merged, expected) < 1e-5


COMBINED = {
    "linear": ({"one": 0.7, "two": -0.4}, {}),
    "cat": ({"one": 0.7, "wide": -0.4}, {}),
    "svd": ({"one": 0.7, "wide": 0.4}, {"svd_rank": 5}),
    "ties": ({"one": 0.7, "two": 0.4}, {"density": 0.5}),
    "ties-by-number": (
        {"one": 0.7, "two": 0.4},
        {"density": 0.6, "majority_sign_method": "frequency"},
    ),
    "magnitude_prune": ({"one": 1.0, "two": -0.5}, {"density": 0.3}),
    # All is kept, so that nothing is random.
    "dare_linear": ({"one": 0.7, "two": 0.4}, {"density": 1.0}),
    "dare_ties": ({"one": 0.7, "two": 0.4}, {"density": 1.0}),
}


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("cat", "ties") else pytest.param(case, marks=pytest.mark.slow)
        for case in COMBINED
    ],
)
def test_what_is_made_of_several_is_what_peft_makes(case, both, tmp_path):
    weights, options = COMBINED[case]
    kind = case.partition("-")[0]
    both.theirs.add_weighted_adapter(
        list(weights), list(weights.values()), case, combination_type=kind, **options
    )
    both.theirs.set_adapter(case)
    combined = fjft.combine_adapters(
        both.ours, weights, combination_type=kind, **options
    )
    ids = tiny.random_ids(2, T)
    expected = tiny.torch_logits(both.theirs, ids)
    assert tiny.relative_error(logits(combined, ids), expected) < 1e-5
    fjft.save_adapter(combined, tmp_path)
    again = fjft.load_model(str(both.twins.directory), adapter=tmp_path)
    np.testing.assert_array_equal(logits(again, ids), logits(combined, ids))
    both.theirs.delete_adapter(case)


def test_dare_drops_a_share_and_scales_the_rest():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 50), np.float32)
    parts = [combine.Part(a, a.T, 4.0)]
    config = combine.Config(combination_type="dare_linear", density=0.25)
    made, _ = combine.combine(parts, config, np.random.default_rng(1))
    kept = made != 0
    assert abs(kept.mean() - 0.25) < 0.04
    np.testing.assert_allclose(made[kept], (2 * a / 0.25)[kept], rtol=1e-6)


def test_the_base_and_its_weights_are_shared(both):
    bare = fjft.load_model(str(both.twins.directory))
    joined = fjft.load_adapters(bare, both.directories)
    own = tree.split(joined)[1]
    for path, param in tree.split(bare)[1].items():
        assert own[path] is param, path


def test_mistakes_are_named(both, tmp_path):
    bare = fjft.load_model(str(both.twins.directory))
    with pytest.raises(UserError, match="at least one directory"):
        fjft.load_adapters(bare, {})
    config = lora.Config(target_modules="lm_head")
    head = tiny.build_model(both.twins.directory, lora, config)
    fjft.save_adapter(head, tmp_path / "head")
    with pytest.raises(UserError, match="'head' changes more than the layers' maps"):
        fjft.load_adapters(bare, {"head": tmp_path / "head"})
    with pytest.raises(UserError, match="no several adapters"):
        fjft.set_adapters(bare, "one")
    with pytest.raises(UserError, match="three"):
        fjft.set_adapters(both.ours, "three")
    with pytest.raises(UserError, match="not both"):
        fjft.set_adapters(both.ours, "one", rows=["one"])
    with pytest.raises(UserError, match="use cat or svd"):
        fjft.combine_adapters(both.ours, {"one": 1.0, "wide": 1.0})
    with pytest.raises(UserError, match="at least one"):
        fjft.combine_adapters(both.ours, {})
    with pytest.raises(UserError, match="combination_type"):
        fjft.combine_adapters(both.ours, {"one": 1.0}, combination_type="mean")
    with pytest.raises(UserError, match="carries no adapter"):
        fjft.save_adapter(both.ours, tmp_path)
    fjft.set_adapters(both.ours, rows=["one", "two"])
    with pytest.raises(UserError, match="no one model to merge"):
        fjft.merge_adapter(both.ours)
    with pytest.raises(UserError, match="the batch has 3"):
        logits(both.ours, tiny.random_ids(3, T))
    fjft.set_adapters(both.ours, "one")
    with pytest.raises(UserError, match="carries an adapter"):
        fjft.save_model(both.ours, tmp_path)
