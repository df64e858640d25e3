"""Experiments that are studies of many small cells, not tables of runs: no model or task is loaded for them.

conf/experiment/NAME.yaml says `kind: cells` and, below the name of a scale, the `size` of dual_lora/analysis/NAME.py.
The rows are in runs/STUDY/rows.jsonl, one line a cell, and the report next to them; a stopped study resumes cell by
cell.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.overrides import parse_override, parse_overrides
from dual_lora.lab.config.paths import list_choices
from dual_lora.lab.errors import EXIT_OK, UserError, require
from dual_lora.lab.study.experiment import choose_scale, load_experiment_file
from dual_lora.lab.system.distributed import is_first_process
from dual_lora.lab.system.files import translate_write_errors
from dual_lora.lab.system.libraries import import_heavy_libraries

KIND = "cells"
ROWS_FILE, RERUN_FILE = "rows.jsonl", "rows.again.jsonl"


@dataclass(frozen=True)
class CellStudy:
    """One study at one size. study: its folder below runs/."""

    name: str
    study: str
    size: str

    @classmethod
    def find(cls, name: str, scale: str | None) -> "CellStudy | None":
        """Return the study of that name at a scale; None where the experiment is a table of runs.

        Raises:
            UserError: there is no such scale, or the experiment's file is wrong.
        """
        if name not in list_choices("experiment"):
            return None  # `Experiment.load` says so
        content = load_experiment_file(name)
        if not isinstance(content, dict) or "kind" not in content:
            return None
        where = f"conf/experiment/{name}.yaml"
        require(content["kind"] == KIND, f"{where}: kind: {content['kind']}: {KIND} is the only kind")
        module = f"dual_lora/analysis/{name}.py"
        require((paths.ROOT / module).is_file(), f"{where}: kind: {KIND}: there is no {module}, which has the study")
        scale, study = choose_scale(name, content, scale)
        own = content[scale]
        is_size = isinstance(own, dict) and set(own) == {"size"}
        require(is_size, f"{where}: {scale}: {{size: ...}} of {module} is needed")
        return cls(name, study, str(own["size"]))

    def check_words(self, words: list[str], launcher: list[str]) -> None:
        """Refuse settings of runs, which this study has none of. words: of the command line, without its own.

        Raises:
            UserError: with the first one.
        """
        require(not launcher, f"experiment={self.name}: its cells run in this process; drop hydra/launcher")
        other = [word for word in words if not is_of_study(word)]
        require(not other, f"experiment={self.name}: has no model, task or method; drop {' '.join(other[:1])}")

    def run(self, missing: bool, force: bool) -> int:
        """Run the cells that have no row, write the report, print it and return the exit code.

        missing: False only writes the report from the rows. force: all cells run again; the new rows replace the old
        ones once they are complete.

        Raises:
            UserError: cells are missing, or the rows cannot be read.
        """
        if not is_first_process():
            return EXIT_OK
        with import_heavy_libraries():
            import torch

            from dual_lora.analysis.cells.rows import StudyError

            module = import_module(f"dual_lora.analysis.{self.name}")
        folder, threads = paths.RUNS / self.study, torch.get_num_threads()
        try:
            with translate_write_errors(folder):
                self.run_module(module, missing, force)
        except StudyError as error:
            raise UserError(f"experiment={self.name}: {error}") from error
        finally:
            torch.set_num_threads(threads)  # the study takes one, runs after it may have more
        print(f"\n{(folder / 'report' / 'table.md').read_text('utf-8')}\nreport: {folder / 'report'}")
        return EXIT_OK

    def run_module(self, module: ModuleType, missing: bool, force: bool) -> None:
        """Run the cells and write the report with the functions of the study's module."""
        from dual_lora.analysis.cells.command import rewrite_report, run_study
        from dual_lora.analysis.cells.rows import copy_other_rows, discard_other_code

        folder, cells = paths.RUNS / self.study, module.plan_cells(self.size)
        rows, report = folder / ROWS_FILE, folder / "report"
        if missing:
            path = folder / RERUN_FILE if force else rows
            if force:
                discard_other_code(path)
            run_study(cells, module.run_cell, module.write_report, path, report)
            copy_other_rows(rows, path)
            path.replace(rows)
        else:
            rewrite_report(cells, module.write_report, rows, report)


def is_of_study(word: str) -> bool:
    """Return whether a word of the command line is one that a study of cells takes: force or wandb.KEY.

    Raises:
        UserError: it is not of the form KEY=VALUE.
    """
    key = parse_override(word).key_or_group
    return key == "force" or key.startswith("wandb.")


def is_forced(words: list[str]) -> bool:
    """Return whether a command line asks for all cells to run again.

    Raises:
        UserError: force or a setting of wandb is wrong, or has several values.
    """
    own = [word for word in words if is_of_study(word)]
    runs = parse_overrides(own)
    require(len(runs) == 1, f"{' '.join(own)}: a study of cells runs once; give single values")
    return load_settings(runs[0]).force
