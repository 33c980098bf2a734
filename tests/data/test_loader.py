import json

import numpy as np
import pytest

from fjft.data.config import Config
from fjft.data.loader import Loader
from fjft.data.pack import Rows
from fjft.errors import UserError


@pytest.fixture
def make_rows(make_examples):
    def make(n=53, packing=False):
        lengths = np.random.default_rng(0).integers(2, 32, n)
        return Rows(make_examples(lengths), Config(max_length=32, packing=packing))

    return make


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("packing", [True, False])
def test_every_row_once_per_epoch_in_a_new_order(packing, make_rows):
    rows = make_rows(packing=packing)
    loader = Loader(rows, 4, seed=3, num_epochs=3)
    batches = list(loader)
    assert len(batches) == loader.num_batches == 3 * loader.batches_per_epoch
    orders = []
    for epoch in range(3):
        first = epoch * loader.batches_per_epoch
        ids = np.concatenate(
            [
                row[segments > 0]
                for batch in batches[first : first + loader.batches_per_epoch]
                for row, segments in zip(
                    batch["input_ids"], batch["segment_ids"], strict=True
                )
            ]
        )
        orders.append(ids.tolist())
        assert sorted(ids) == list(range(1, rows.examples.lengths.sum() + 1))
    assert orders[0] != orders[1] != orders[2]
    assert loader.epoch == 3.0


def test_every_batch_has_the_same_shape_when_packed(make_rows):
    rows = make_rows(packing=True)
    assert {b["labels"].shape for b in Loader(rows, 4)} == {(4, 32)}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("processes", [2, 4])
def test_order_does_not_depend_on_the_number_of_processes(
    packing, processes, make_rows
):
    rows = make_rows(packing=packing)
    whole = list(Loader(rows, 8, seed=1, num_epochs=2))
    parts = [
        list(Loader(rows, 8, seed=1, num_epochs=2, shards=[p], num_shards=processes))
        for p in range(processes)
    ]
    joined = [
        {k: np.concatenate([part[k] for part in batch]) for k in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("stop", [0, 1, 7, 14, 27, 28])
def test_resume_continues_with_the_same_batches(stop, make_rows):
    rows = make_rows()
    whole = list(Loader(rows, 4, seed=5, num_epochs=2))
    loader = Loader(rows, 4, seed=5, num_epochs=2)
    served = [batch for batch, _ in zip(loader, range(stop), strict=False)]
    # `zip` takes one batch more than it gives when the range ends first.
    state = {**loader.state(), "served": stop}
    resumed = Loader(rows, 4, seed=5, num_epochs=2)
    resumed.restore(json.loads(json.dumps(state)))
    assert resumed.epoch == stop / resumed.batches_per_epoch
    assert_equal(served + list(resumed), whole)
    assert list(resumed) == []


def test_state_counts_batches_served_not_prefetched(make_rows):
    loader = Loader(make_rows(), 4)
    iterator = iter(loader)
    assert loader.state()["served"] == 0
    next(iterator)
    next(iterator)
    assert loader.state()["served"] == 2
    assert len(json.dumps(loader.state())) < 200


def test_seed_changes_the_order_and_equal_seeds_do_not(make_rows):
    rows = make_rows()
    one, same, other = (list(Loader(rows, 4, seed=s)) for s in (1, 1, 2))
    assert_equal(one, same)
    differs = [
        a["input_ids"].shape != b["input_ids"].shape
        or (a["input_ids"] != b["input_ids"]).any()
        for a, b in zip(one, other, strict=True)
    ]
    assert any(differs)


def test_evaluation_reads_in_order_again_and_again(make_rows):
    rows = make_rows(n=10)
    loader = Loader(rows, 4, shuffle=False)
    first = list(loader.batches())
    assert_equal(first, list(loader.batches()))
    assert loader.served == 0
    starts = np.concatenate([b["input_ids"][:, 0] for b in first])
    np.testing.assert_array_equal(
        starts[:10], [rows.examples[i].columns["input_ids"][0] for i in range(10)]
    )
    assert not first[-1]["segment_ids"][2:].any()


def test_no_end(make_rows):
    loader = Loader(make_rows(n=5), 4, num_epochs=None)
    assert loader.num_batches is None
    for _ in zip(range(20), loader, strict=False):
        pass
    assert loader.epoch >= 10


def test_no_rows_no_batches(make_rows):
    assert list(Loader(make_rows(n=0), 4)) == []


def test_other_data_or_settings_are_refused(make_rows):
    rows = make_rows()
    state = Loader(rows, 4, seed=1).state()
    for other in (
        Loader(rows, 8, seed=1),
        Loader(rows, 4, seed=2),
        Loader(make_rows(n=50), 4, seed=1),
    ):
        with pytest.raises(UserError, match="resume with the same data and settings"):
            other.restore(state)


def test_indivisible_batch_names_sizes_that_work(make_rows):
    with pytest.raises(UserError, match="10 is not divisible by 4 parts; use 8 or 12"):
        Loader(make_rows(), 10, num_shards=4)
