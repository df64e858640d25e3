"""All figures of a report, drawn and written."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dual_lora.lab.present.document import Block
from dual_lora.lab.report.comparison.comparisons import Comparisons
from dual_lora.lab.report.comparison.floors import Floor
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome


def draw_figures(
    experiment: Experiment,
    done: list[Outcome],
    values: pd.DataFrame,
    comparisons: Comparisons,
    floors: list[Floor],
    folder: Path,
) -> Iterator[Block]:
    yield from ()
