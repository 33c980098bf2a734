"""A model and its adapter, for all objectives that need a reference."""

import pytest
from adapted_twins import make_adapted


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    return make_adapted(tmp_path_factory.mktemp("adapted"))
