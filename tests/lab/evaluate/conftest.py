"""A run to export."""

from pathlib import Path

import pytest

from tests.support.finished_runs import train_dual_lora


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run of Dual LoRA on tiny-roberta."""
    return train_dual_lora(tmp_path_factory.mktemp("runs"))
