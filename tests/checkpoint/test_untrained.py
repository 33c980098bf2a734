"""A model that starts from random weights: which numbers of its config may change."""

from pathlib import Path

import pytest

from fjft.checkpoint.untrained import open_untrained
from fjft.errors import UserError

T5 = str(Path(__file__).parents[2] / "configs" / "cmudict_t5")


def test_numbers_of_the_config_are_changed():
    files = open_untrained(T5, None, {"num_layers": 1, "dropout_rate": 0})
    assert (files.config.num_layers, files.config.dropout_rate) == (1, 0)
    assert files.config_dict["num_layers"] == 1
    assert files.config.num_decoder_layers == 2


@pytest.mark.parametrize(
    ("name", "value", "now"),
    [("layers", 1, "None"), ("num_layers", 1.5, "2"), ("is_gated_act", 1, "False")],
)
def test_what_is_no_such_number_is_refused(name, value, now):
    with pytest.raises(UserError, match=rf"sizes\.{name}={value}.*it is {now}"):
        open_untrained(T5, None, {name: value})
