"""VeRA's random matrices, drawn as torch draws them."""

import numpy as np
import pytest
import torch
from peft.tuners.vera.model import _kaiming_init

from fjft.errors import UserError
from fjft.peft import vera


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5])
def test_matrices_are_torchs_bit_for_bit(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = (256, 1500), (700, 256)
    for ours, shape in zip(vera.draw(seed, *shapes), shapes, strict=True):
        np.testing.assert_array_equal(ours, _kaiming_init(shape, generator).numpy())


@pytest.mark.parametrize("options", [{"r": 0}, {"vera_dropout": 1.0}], ids=str)
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError):
        vera.Config(**options)


def test_parts_of_peft_that_are_missing_here_are_refused_by_name():
    with pytest.raises(UserError, match="layers_to_transform"):
        vera.from_peft({"target_modules": ["q_proj"], "layers_to_transform": [1]})
