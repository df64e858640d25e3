"""Simulate studies of equal methods, write docs/calibration.md, and fail where a promise of the statistics is broken.

python -m tools.calibrate [STUDIES]      STUDIES of each kind, 4,000 unless given
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("DUAL_LORA_LAZY", "1")  # needs neither torch nor peft

import pandas as pd

from dual_lora.lab.statistics.calibration import calibrate_verdicts, find_misses, summarize_worst_cases

PAGE = Path(__file__).parent.parent / "docs" / "calibration.md"
INTRODUCTION = """# Do verdicts and intervals keep their promise?

`make calibration` simulates studies of two methods and judges them with the code that judges real ones
(`dual_lora/lab/statistics/calibration.py` defines them). Examples are answered wrongly in 9 % on average, a few hard
ones more often. "Seed SD" is how far a seed alone moves a run's accuracy, in points.

- equal: both methods have the same chance of error on every example. Different: called better or worse, which never
  happens with under five seeds. Computed: how often equal methods should be called equivalent within 1 point, given the
  spread of the seeds' differences.
- equal, own difficulties: each method finds other examples hard. They are equal over all possible examples, but not on
  those at hand. A test over seeds alone would take that for a finding.
- a margin apart: one method is better by exactly 1 point, the margin; "equivalent" is then an error.
- covered: the share of 95 % t-intervals over seeds that hold the true difference on the examples at hand.
"""


def main(studies: int) -> int:
    """Write the page, print its table and its worst cases, and return the exit code."""
    found = calibrate_verdicts(studies)
    table = format_table(found)
    misses = find_misses(found)
    lines = [INTRODUCTION, table, "", *(f"missed: {miss}" for miss in misses), summarize_worst_cases(found)]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines[1:]))
    return 1 if misses else 0


def format_table(found: pd.DataFrame) -> str:
    """Return the table as it is printed, shares in percent."""
    shares = ["covered", "different", "equivalent", "computed"]
    cells = found.copy()
    for name in shares:
        cells[name] = ["–" if pd.isna(value) else f"{100 * value:.1f}" for value in found[name]]
    cells = cells.rename(columns={name: f"{name}, %" for name in shares})
    return cells.to_markdown(index=False, disable_numparse=True, colalign=("right",) * 3 + ("left",) + ("right",) * 5)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 4000))
