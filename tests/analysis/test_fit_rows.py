"""The report of fits of a file's matrices, written again from their rows alone."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dual_lora.analysis import fit
from dual_lora.analysis.cells import hash_row


def test_the_report_is_written_again_without_the_file_of_updates(tmp_path, capsys):
    rows, file = tmp_path / "rows.jsonl", tmp_path / "updates.safetensors"
    save_file({name: torch.randn(6, 8, generator=torch.manual_seed(n)) for n, name in enumerate("ab")}, file)
    fit.main(["--out", str(rows), "--size", "smoke", "--updates", str(file)])
    report = tmp_path / "report"
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    file.unlink()
    for path in report.iterdir():
        path.unlink()
    fit.main(["--out", str(rows), "--rows-only"])
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before
    assert b"| a |" in before["table.md"]

    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines * 2))  # two files that were joined: a cell twice is no second seed
    fit.main(["--out", str(rows), "--rows-only"])
    assert (report / "table.md").read_bytes() == before["table.md"]
    assert fit.plan_cells("smoke", targets=["gaussian"] * 2) == fit.plan_cells("smoke", targets=["gaussian"])
    foreign = {"cell": {"update": "rank_4"}, "result": {}}
    rows.write_text(json.dumps(foreign | {"digest": hash_row(foreign)}) + "\n")
    with pytest.raises(SystemExit, match="holds rows of another study than this one"):
        fit.main(["--out", str(rows), "--rows-only"])
    of_dual = [line for line in lines if json.loads(line)["cell"]["method"] != "dual_lora"]
    for content, said in ((lines[:-1], "cells are missing"), (of_dual, "cells are missing"), ([], "0 studies")):
        rows.write_text("".join(content))
        with pytest.raises(SystemExit, match=said):
            fit.main(["--out", str(rows), "--rows-only"])
