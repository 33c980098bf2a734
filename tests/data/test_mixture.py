"""Mixtures of sources, against `datasets`."""

import datasets
import numpy as np
import pytest

from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.data.mixture import count_epoch
from fjft.errors import UserError


@pytest.fixture
def sources(write):
    """Sources of 40 and of 10 rows, one of which cannot be used."""

    def rows(name, count):
        return [{"prompt": f"{name}:", "completion": f" {i}"} for i in range(count)]

    return {
        "large": write("{", *rows("large", 40), name="large.jsonl"),
        "small": write(*rows("small", 10), name="small.jsonl"),
    }


def count(rows):
    """How often each row is trained on."""
    return np.bincount(rows.examples.row_numbers, minlength=51)


@pytest.mark.parametrize(
    ("options", "small"),
    [
        ({}, 10),
        ({"mixture_temperature": 2.0}, 20),  # 40^(1/2) : 10^(1/2) is 2 : 1
        ({"mixture_temperature": 1e9}, 40),
        ({"mixture_weights": {"large": 2, "small": 1.0}}, 20),
        ({"mixture_weights": {"large": 9, "small": 1}, "mixture_temperature": 2}, 13),
    ],
)
def test_shares_follow_weights_and_temperature(chatml, sources, options, small):
    train, _, report = load_examples(Config(train=sources, **options), chatml)
    found = count(train)
    assert found[0] == 0  # not valid JSON
    assert found[1:41].tolist() == [1] * 40
    assert found[41:].sum() == small
    assert np.ptp(found[41:]) <= 1, "each as often as the others, but for the rest"
    assert report.mixture == {"large": (40, 40), "small": (10, small)}
    told = f"large 40 x 1, small 10 x {small / 10:.3g}"
    assert told in "\n".join(report.describe())


def test_an_epoch_follows_from_the_seed(chatml, sources):
    config = Config(
        train=sources, mixture_weights={"large": 3, "small": 1}, eval_size=5.0
    )
    trained = [load_examples(config, chatml, seed) for seed in (0, 0, 1)]
    first, again, other = (count(train) for train, _, _ in trained)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    for name, rows in trained[0][1].items():
        held_out = rows.examples.row_numbers
        assert len(held_out) == 5
        assert not first[held_out].any()
        assert ((held_out > 40) == (name == "small")).all()


def test_epochs_are_as_long_as_those_of_datasets():
    sizes, rates = np.array([300, 1000, 50]), np.array([0.5, 0.3, 0.2])
    parts = [datasets.Dataset.from_dict({"x": [i] * n}) for i, n in enumerate(sizes)]
    theirs = datasets.interleave_datasets(
        parts, rates.tolist(), seed=0, stopping_strategy="all_exhausted"
    )
    counts = np.bincount(theirs["x"][:])
    # Theirs are drawn.
    np.testing.assert_allclose(count_epoch(sizes, rates), counts, rtol=0.06)
    assert counts[1] == count_epoch(sizes, rates)[1] == 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixture_temperature": 0.0}, "data.mixture_temperature is 0.0"),
        ({"mixture_weights": {"large": 1}}, "large, small"),
        ({"mixture_weights": {"large": 1, "small": 0}}, "a weight above 0"),
        ({"train": "x.jsonl", "mixture_temperature": 2.0}, "make data.train a mapping"),
    ],
)
def test_a_mixture_that_cannot_be_is_an_error(options, said):
    with pytest.raises(UserError) as error:
        Config(**({"train": {"large": "a.jsonl", "small": "b.jsonl"}} | options))
    assert said in str(error.value)


def test_a_source_without_examples_is_an_error(chatml, sources, write):
    for lines in (["{"], []):
        sources["none"] = write(*lines, name="none.jsonl")
        with pytest.raises(UserError, match=r"data\.train\.none has no examples"):
            load_examples(Config(train=sources), chatml)
    sources["none"] = write({"prompt": "a:", "completion": "b"}, name="none.jsonl")
    with pytest.raises(UserError, match=r"0 of 1 examples of data\.train\.none"):
        load_examples(Config(train=sources, eval_size=0.1), chatml)
