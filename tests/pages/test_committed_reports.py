"""Every committed report is what `sweep.py run=false` writes from the committed records, without weights or data."""

import shutil
import subprocess

import pytest

from dual_lora.analysis import fit, teacher
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.config import paths
from tests.support.places import ROOT

REPORTS = {
    "verdict": ["experiment=verdict", "scale=small"],
    "half_rates": ["experiment=half_rates", "scale=small"],
    "base_size": ["experiment=base_size", "scale=small", "task=glue/stsb"],
    "own_knobs": ["experiment=own_knobs", "scale=small", "train.lr=4e-3"],
    "similarity": ["experiment=similarity", "scale=small"],
    "truncation": ["experiment=truncation", "scale=small", "task=glue/sst2"],
    "ratio": ["experiment=ratio", "scale=small"],
    "base_size_half_rates": ["experiment=base_size_half_rates", "scale=small"],
    "base_size_same_machine": ["experiment=base_size", "scale=small", "task=glue/stsb", "study=base_size_same_machine"],
    "ratio_same_machine": ["experiment=ratio", "scale=small", "study=ratio_same_machine"],
    "curvature": ["experiment=curvature", "scale=small", "task=glue/sst2,glue/stsb"],
    "frozen_groups": ["experiment=frozen_groups", "scale=small"],
    "gradient_dtype": ["experiment=gradient_dtype", "scale=small"],
    "rank_allocation_small": ["experiment=rank_allocation", "scale=small"],
    "update_rank_small": ["experiment=update_rank", "scale=small"],
    "commonsense_small": ["experiment=commonsense", "scale=small"],
    "fit": ["experiment=fit"],
    "teacher": ["experiment=teacher"],
}
OF_ROWS = {"fit_full_tuning"}  # reports of the fits of one run's updates, by `python -m dual_lora.analysis.fit`
WRITTEN = (".md", ".tex", ".csv")
KEPT = (".json", ".jsonl", ".yaml", *WRITTEN)


def list_committed():
    """Return the tracked files below runs/: others may be of runs in progress. Without git, there are no others."""
    listed = subprocess.run(["git", "ls-files", "runs"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return [
            str(path.relative_to(ROOT))
            for path in (ROOT / "runs").rglob("*")
            if path.suffix in KEPT or path.is_symlink()
        ]
    return listed.stdout.splitlines()


def copy_committed(folder):
    for name in list_committed():
        target = folder.joinpath(*name.split("/")[1:])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target, follow_symlinks=False)  # links to another study's records


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("committed") / "runs"
    copy_committed(folder)
    return folder


def test_every_committed_report_is_known(committed):
    assert {path.parents[1].name for path in committed.glob("*/report/table.md")} == REPORTS.keys() | OF_ROWS


@pytest.mark.parametrize(("report", "words"), REPORTS.items())
def test_a_committed_report_is_written_again_from_the_records(report, words, committed, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", committed)
    monkeypatch.setenv("DUAL_LORA_RUNS", str(committed))
    folder = committed / report / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in WRITTEN}
    assert "table.md" in before
    shutil.rmtree(folder)
    assert sweep_command([*words, "run=false"]) == 0
    for name, content in before.items():
        assert (folder / name).read_bytes() == content, name


@pytest.mark.parametrize("report", sorted(OF_ROWS))
def test_a_committed_report_of_fits_is_written_again_from_its_rows(report, committed):
    table = committed / report / "report/table.md"
    before = table.read_bytes()
    table.unlink()
    fit.main(["--out", str(committed / report / "rows.jsonl"), "--rows-only"])
    assert table.read_bytes() == before


def test_the_committed_report_of_the_longer_training_is_written_again_from_its_rows(committed, tmp_path):
    rows = committed / "teacher/rows.jsonl"
    kept = rows.read_bytes()
    teacher.main(["--out", str(rows), "--size", "long", "--report", str(tmp_path)])
    assert (tmp_path / "table.md").read_bytes() == (ROOT / "runs/teacher/report/long/table.md").read_bytes()
    assert rows.read_bytes() == kept  # no cell ran
