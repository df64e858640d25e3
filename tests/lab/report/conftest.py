"""Studies whose runs are made up."""

import pytest

from dual_lora.lab.record.run import Run
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_outcomes
from tests.support.reports import finish


@pytest.fixture
def study(runs_folder):
    """A function that finishes an experiment's runs with the given numbers right and returns what is known of them.
    right: a function of the label, the settings; None leaves a run undone."""

    def study(spec, right, **changes):
        experiment = Experiment.from_content("made", spec)
        cells = experiment.compose_cells([])
        for cell in cells:
            number = right(cell.label, cell.settings)
            if number is not None and not Run.prepare(cell.settings).record.read_result():
                finish(cell.settings, number, **changes)
        return experiment, find_outcomes(cells, "made")

    return study
