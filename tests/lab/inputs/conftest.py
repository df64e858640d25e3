"""What models compute."""

import pytest


@pytest.fixture(scope="module")
def plain() -> dict:
    """The outputs of the bundled folders, by model, task and overrides, computed once each."""
    return {}
