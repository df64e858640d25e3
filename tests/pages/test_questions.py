"""docs/questions.md: 24 questions, each with a status, a command that exists, and runs that are committed."""

import re

import pytest

from dual_lora.lab.study.experiment import Experiment
from tests.support.places import ROOT

PAGE = (ROOT / "docs/questions.md").read_text()
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.rstrip(" |").endswith("status")
]
ASKED = [row for row in ROWS if len(row) == 5]
STATUS = re.compile(r"(answered by|in part, by|runnable|open: )")


def test_every_question_stands_once_with_a_status():
    assert [int(row[0]) for row in ASKED] == list(range(1, 25))
    assert all(re.fullmatch(r"R\d(, R\d)*", row[1]) for row in ASKED)
    for row in ROWS:
        assert STATUS.match(row[-1]), row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_the_experiment_of_a_question_is_there(row):
    experiment, status = row[-2:]
    named = re.findall(r"`(?:python sweep\.py experiment=)?(\w+)((?: [\w./]+=[^` ]+)*)`", experiment)
    assert named or "`python " in experiment or experiment == "–"
    assert (experiment == "–") == status.startswith("open: ")
    for name, words in named:
        if name == "tune":
            continue
        given = dict(word.split("=", 1) for word in words.split())
        extra = [f"{key}={value}" for key, value in given.items() if key != "scale"]
        assert Experiment.load(name, given.get("scale")).compose_cells([*extra, "seed=0"])


@pytest.mark.parametrize("row", [row for row in ROWS if "by [" in row[-1]], ids=lambda row: row[0][:40])
def test_what_answers_a_question_is_committed(row):
    for link in re.findall(r"\]\(\.\./((?:runs|benchmarks)/[^)]+)\)", row[-1]):
        assert (ROOT / link).is_file()
