"""A model and its adapter, for all objectives that need a reference."""

import contextlib

import pytest
from adapted_twins import make_adapted


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    return make_adapted(tmp_path_factory.mktemp("adapted"))


@pytest.fixture(autouse=True, scope="session")
def _keep_environment():
    """Trainers empty the environment for a moment, while XLA's threads may read it."""
    from accelerate.utils import environment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "clear_environment", contextlib.nullcontext)
        yield
