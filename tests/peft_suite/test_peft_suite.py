"""PEFT's own test matrix on DualLoraConfig, group by group."""

import pytest

from . import runner


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("peft")


SKIPPED = {
    "quantization": "no quantisation library is installed",
    "encoder_decoder": "this PEFT wraps no encoder-decoder model of this transformers",
}


@pytest.mark.slow
@pytest.mark.parametrize("group", runner.GROUPS)
def test_group_has_no_unexpected_failure(group, work):
    if not (runner.fetch_tests(work) / f"{runner.GROUPS[group]}.py").exists():
        pytest.skip(f"this PEFT has no {runner.GROUPS[group]}.py")
    outcomes = runner.run([group], work)
    if group in SKIPPED and set(outcomes.values()) <= {"skipped"}:
        pytest.skip(SKIPPED[group])
    assert "passed" in outcomes.values() and runner.unexpected(outcomes) == []
