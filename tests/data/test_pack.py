import datasets
import numpy as np
import pytest
from trl.data_utils import pack_dataset

from fjft.data.config import Config
from fjft.data.examples import Example, Spool
from fjft.data.pack import Rows, choose_buckets, pack_best_fit
from fjft.errors import UserError
from fjft.labels import IGNORED


def random_lengths(seed, n=400, capacity=128):
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(3, 1, n).astype(int), 1, capacity)


@pytest.mark.parametrize("seed", range(5))
def test_every_example_once_and_no_bin_too_full(seed):
    lengths = random_lengths(seed)
    bins = pack_best_fit(lengths, 128)
    assert sorted(bins.order) == list(range(len(lengths)))
    assert bins.starts[0] == 0
    assert bins.starts[-1] == len(lengths)
    sums = [lengths[bins[i]].sum() for i in range(len(bins))]
    assert 0 < min(sums) <= max(sums) <= 128


@pytest.mark.parametrize("seed", range(5))
def test_as_tight_as_trl(seed):
    lengths = random_lengths(seed)
    data = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})
    theirs = pack_dataset(data, seq_length=128, strategy="bfd")
    bins = pack_best_fit(lengths, 128)
    ours = sorted(int(lengths[bins[i]].sum()) for i in range(len(bins)))
    assert ours == sorted(map(len, theirs["input_ids"]))


def test_literal_example():
    bins = pack_best_fit(np.array([5, 3, 2, 4]), 8)
    assert [bins[i].tolist() for i in range(len(bins))] == [[0, 1], [3, 2]]


def test_nothing_and_out_of_range():
    assert len(pack_best_fit(np.zeros(0, int), 8)) == 0
    for length in (0, 9):
        with pytest.raises(ValueError, match="capacity 8"):
            pack_best_fit(np.array([3, length]), 8)


@pytest.mark.slow
def test_a_million_examples_in_seconds():
    lengths = np.random.default_rng(0).integers(1, 2048, 1_000_000)
    assert len(pack_best_fit(lengths, 4096)) < 1.01 * lengths.sum() / 4096


def assemble_all(rows, batch_size=3):
    for first in range(0, len(rows), batch_size):
        indices = np.arange(first, min(first + batch_size, len(rows)))
        yield rows.assemble(indices, batch_size, rows.choose_length(indices))


@pytest.mark.parametrize("packing", [True, False])
def test_round_trip(packing, make_examples):
    examples = make_examples(random_lengths(1, n=60))
    rows = Rows(examples, Config(max_length=128, packing=packing))
    assert int(rows.lengths.sum()) == int(examples.lengths.sum())
    found = {}
    for batch in assemble_all(rows):
        assert {k: v.dtype for k, v in batch.items()} == dict.fromkeys(batch, np.int32)
        for row in range(len(batch["input_ids"])):
            one = {k: v[row] for k, v in batch.items()}
            padding = one["segment_ids"] == 0
            assert (one["labels"][padding] == IGNORED).all()
            assert (one["positions"][padding] == 0).all()
            # Segments are numbered from 1, in order, with padding last.
            present = one["segment_ids"][~padding]
            assert not padding[: len(present)].any()
            assert set(np.diff(present)) <= {0, 1}
            for segment in range(1, present.max(initial=0) + 1):
                members = np.flatnonzero(one["segment_ids"] == segment)
                assert (one["positions"][members] == np.arange(len(members))).all()
                assert one["labels"][members[0]] == IGNORED
                found[one["input_ids"][members[0]]] = (
                    one["input_ids"][members],
                    one["labels"][members],
                )
    assert len(found) == len(examples)
    for i in range(len(examples)):
        ids, labels = examples[i].columns.values()
        np.testing.assert_array_equal(found[ids[0]][0], ids)
        np.testing.assert_array_equal(found[ids[0]][1], labels)


@pytest.mark.parametrize("packing", [True, False])
def test_texts_without_positions_are_refused(packing, make_examples):
    rows = Rows(make_examples([5, 9, 7]), Config(max_length=16, packing=packing))
    rows.check_texts(None)
    rows.check_texts(9)
    with pytest.raises(UserError, match=r"row 1 has 9 tokens.*max_length=8"):
        rows.check_texts(8)


def test_each_part_of_an_example_has_positions_of_its_own():
    spool = Spool(columns=("input_ids", "parts"))
    parts = np.repeat(np.arange(2, dtype=np.int32), [4, 6])
    example = Example({"input_ids": np.arange(10, dtype=np.int32), "parts": parts})
    spool.add([example], [0])
    rows = Rows(spool.finish(), Config(max_length=16), num_parts=2)
    rows.check_texts(6)
    with pytest.raises(UserError, match="row 0 has 6 tokens"):
        rows.check_texts(5)


def test_supervised_tokens_are_preserved(make_examples):
    examples = make_examples(random_lengths(2))
    rows = Rows(examples, Config(max_length=128))
    learned = sum((b["labels"] != IGNORED).sum() for b in assemble_all(rows))
    assert learned == examples.supervised.sum()
    assert rows.efficiency == examples.lengths.sum() / (len(rows) * 128)


def test_buckets():
    assert choose_buckets(1024, 10, ()) == [128, 256, 512, 1024]
    assert choose_buckets(1000, 10, ()) == [128, 256, 504, 1000]
    assert choose_buckets(8, 8, ()) == [8]
    assert choose_buckets(1024, 60, (32, 64)) == [32, 64]
    with pytest.raises(UserError, match="add a bucket of at least 65"):
        choose_buckets(1024, 65, (32, 64))


def test_batches_take_the_smallest_bucket_that_fits(make_examples):
    examples = make_examples([5, 17, 100, 128])
    rows = Rows(examples, Config(max_length=128, packing=False, buckets=(16, 64, 128)))
    lengths = [
        rows.choose_length(np.array(i, int)) for i in ([0], [0, 1], [2], [3, 0], [])
    ]
    assert lengths == [16, 64, 128, 128, 16]
