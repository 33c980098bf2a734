"""How layers are grouped into scans, and that the grouping changes nothing."""

import numpy as np
import pytest
import tiny

from fjft import tree
from fjft.models.stack import plan_stack
from fjft.peft import last_layers


@pytest.mark.parametrize(
    ("kinds", "cuts", "runs"),
    [
        ("aaaa", (), [[[0, 1, 2, 3]]]),
        ("ssfssfs", (), [[[0, 3], [1, 4], [2, 5]], [[6]]]),
        ("ffffss", (), [[[0, 1, 2, 3]], [[4, 5]]]),
        ("abab", (), [[[0, 2], [1, 3]]]),
        ("abc", (), [[[0]], [[1]], [[2]]]),
        ("aaaa", (3,), [[[0, 1, 2]], [[3]]]),
        ("aaaa", (0, 4), [[[0, 1, 2, 3]]]),
        ("ababab", (2,), [[[0]], [[1]], [[2, 4], [3, 5]]]),
        ("a", (), [[[0]]]),
    ],
)
def test_layers_are_grouped_into_the_fewest_scans(kinds, cuts, runs):
    assert plan_stack(kinds, cuts) == runs


@pytest.mark.parametrize("seed", range(20))
def test_every_plan_runs_every_layer_once_and_in_order(seed):
    rng = np.random.default_rng(seed)
    kinds = "".join(rng.choice(list("ab"), rng.integers(1, 14)))
    cuts = tuple(int(c) for c in rng.integers(0, len(kinds), rng.integers(0, 3)))
    order = []
    for run in plan_stack(kinds, cuts):
        assert len({len(block) for block in run}) == 1
        for block in run:
            assert len({kinds[layer] for layer in block}) == 1
        order += [layer for step in zip(*run, strict=True) for layer in step]
        for cut in cuts:
            layers = [layer for block in run for layer in block]
            assert min(layers) >= cut or max(layers) < cut
    assert order == list(range(len(kinds)))


@pytest.mark.parametrize("num_layers", [2, 3])
def test_a_cut_stack_gives_the_same_logits(get_twins, num_layers):
    twins = get_twins("qwen3/alternating-biases")
    cut = tiny.build_model(
        twins.directory, last_layers, last_layers.Config(num_layers=num_layers)
    )
    assert cut.layers.layers != twins.model.layers.layers
    ids = tiny.random_ids(2, 16)
    assert tiny.max_error(tiny.jit_apply(cut)(ids), twins.apply(ids)) < 1e-5
    assert tree.count(tree.split(cut)[1]) == tree.count(tree.split(twins.model)[1])
