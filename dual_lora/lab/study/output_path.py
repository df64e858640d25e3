"""Where the report or the plan of an experiment is written, beside those of others in the same study."""

import sys
from collections.abc import Callable
from pathlib import Path

from dual_lora.lab.study.experiment import Experiment


def choose_path(
    name_path: Callable[[str], Path],
    experiment: Experiment,
    find_owner: Callable[[Path], tuple[str, str] | None],
    leaves_out: Callable[[Path], bool],
) -> Path:
    """Return where a report or plan is written to, so that it replaces neither another experiment's nor one of more
    runs. That of a selection replaces that of another selection, which is said on the screen.

    name_path: ending of the name -> path. find_owner: path -> name and scale of the experiment whose it is, None where
    there is none. leaves_out: path -> whether it has runs that the new one leaves out.
    """
    ending = ""
    if find_owner(name_path(ending)) not in (None, (experiment.name, experiment.scale)):
        ending = f"_{experiment.name}_{experiment.scale}"
    if not leaves_out(name_path(ending)):
        return name_path(ending)
    path = name_path(f"{ending}_selection")
    if leaves_out(path):
        print(f"{path}: replaces that of another selection; repeat its command to have it back", file=sys.stderr)
    return path
