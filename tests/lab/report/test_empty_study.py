"""The checklist of a study none of whose runs has finished."""

from dual_lora.lab.report.protocol import iterate_checklist
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_outcomes


def test_no_scores_are_told_before_a_run_has_finished(runs_folder):
    experiment = Experiment.load("learning_rates", "smoke")
    cells = experiment.compose_cells([])
    lines = list(iterate_checklist(experiment, find_outcomes(cells, cells[0].settings.study)))
    assert f"runs: 0 of {len(cells)} finished; seeds 0" in lines
    assert not any(line.startswith("scores:") for line in lines)
