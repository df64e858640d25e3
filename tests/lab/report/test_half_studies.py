"""A report of a study that was stopped half way says what is missing, and how it is made."""

from types import SimpleNamespace

import pytest

from dual_lora.lab.errors import UserError
from dual_lora.lab.record.record import Record
from dual_lora.lab.report.analyses.kinds import check_analysis


def test_a_finished_run_that_is_not_analysed_yet_is_not_called_unfinished(tmp_path):
    experiment = SimpleNamespace(analyse="truncation", floors=[])
    outcome = SimpleNamespace(label="LoRA", result={}, record=Record(tmp_path))
    with pytest.raises(UserError, match="truncation.json: missing; sweep.py without run=false analyses the run$"):
        check_analysis(experiment, outcome)
