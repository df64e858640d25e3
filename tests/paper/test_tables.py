"""Published tables: every value has source and status, averages are those of the cells, wrong files are refused."""

import os
import re
import subprocess
import sys
from decimal import Decimal

import pytest
from omegaconf import OmegaConf

import tasks
from dual_lora import paper
from dual_lora.lab.config.compose import list_choices
from tests.support.places import ROOT
from tests.support.published import get_row

DEVIATIONS = ROOT / "dual_lora/paper/DEVIATIONS.md"
SOURCE = re.compile(
    r"https?://\S+|arXiv \d{4}\.\d{5}, .+|github\.com/[\w.-]+/[\w.-]+@[0-9a-f]{8,40} .+|RandLoRA \(ICLR 2025\), .+"
    r"|ICLR 2026 withdrawn submission, public reviews.*|documentation of axolotl|own computation .+"
)
# Averages that are not those of the printed cells: table, model, method, rank.
OFF = {
    ("dora_table1_commonsense", "llama-13b", "Parallel", None),
    ("dora_table15_rank_robustness", "llama-7b", "lora", 8),
    ("dora_table15_rank_robustness", "llama-7b", "lora", 16),
    ("dora_table15_rank_robustness", "llama-7b", "dora", 8),
    ("randlora_table4_glue", "roberta-base", "lora", 4),
}
GOOD = """\
id: small
title: A table
source: [https://example.org]
version: v1
status: published
protocol: {measures: accuracy, checkpoint: last, seeds: 3}
keys: [model, rank]
columns: {a: "accuracy, %", b: "accuracy, %", mean: "of both, %"}
average: {mean: [a, b]}
rows:
- [m, 8, 8.50±.07, 9.5, 9.0]
- [m, –, 8.5, –, 9, {status: {a: inferred}, note: of another paper}]
"""


def every_row():
    return [(table, row) for table in map(paper.load_table, paper.list_tables()) for row in table.rows]


@pytest.fixture
def small(tmp_path):
    """A function that writes GOOD with something replaced and reads it."""

    def read(old="", new=""):
        assert old in GOOD
        path = tmp_path / "small.yaml"
        path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
        return paper.read_table(path)

    return read


@pytest.mark.parametrize("name", paper.list_tables())
def test_every_table_loads_with_source_and_status(name):
    table = paper.load_table(name)
    assert table.id == name and table.rows and table.source
    for source in {*table.source, *(source for row in table.rows for source in row.source)}:
        assert SOURCE.fullmatch(source), source
    for row in table.rows:
        assert row.source and row.values
        assert {value.status for value in row.values.values()} <= set(paper.STATUSES)


def recompute_average(table, row, column):
    """Return the mean of the printed cells a column averages; None where one of them is missing."""
    cells = [row.values[name].text.partition("±")[0] for name in table.average[column] if name in row.values]
    return sum(map(Decimal, cells)) / len(cells) if len(cells) == len(table.average[column]) else None


def off(table, row, column):
    """Return whether a printed average differs from its cells' by more than half of its last digit."""
    printed = row.values[column]
    difference = abs(Decimal(printed.text) - recompute_average(table, row, column))
    return difference > Decimal(5).scaleb(-printed.decimals - 1)


def test_printed_averages_are_those_of_their_cells_but_for_the_noted():
    found, compared = set(), 0
    for table, row in every_row():
        for column in table.average:
            compared += 1
            keys = (table.id, row.keys["model"], row.keys["method"], row.keys["rank"])
            assert off(table, row, column) == (row.average_note is not None), keys
            if row.average_note:
                printed, recomputed = row.average_note
                assert printed == Decimal(row.values[column].text), keys
                assert recomputed == recompute_average(table, row, column).quantize(recomputed), keys
                found.add(keys)
    assert found == OFF and compared > 50


def test_a_note_stands_only_where_an_average_is():
    assert all(table.average for table, row in every_row() if row.average_note)


def test_no_figure_of_dual_lora_counts_as_published():
    for table, row in every_row():
        if table.id.startswith("dual_lora") or row.keys.get("method") == "dual_lora":
            assert "published" not in {value.status for value in row.values.values()}, row


def test_figure_2_peaks_at_equal_ranks():
    rows = [row for row in paper.load_table("dual_lora_fig2_magnitude_ratio").rows if row.keys["r1"]]
    assert [row.keys["r1"] for row in rows] == list(range(1, 16))
    for row in rows:
        assert row.keys["r1"] + row.keys["r2"] == row.keys["rank"] == 16
        assert row.keys["magnitude_ratio"] == row.keys["r1"] / 16
    best = max(rows, key=lambda row: row.values["avg"].number)
    assert best.keys["magnitude_ratio"] == 0.5 and best.values["avg"].number == 85.77
    dora = get_row(paper.load_table("dual_lora_fig2_magnitude_ratio"), method="dora", rank=16).values["avg"].number
    below = {row.keys["magnitude_ratio"] for row in rows if row.values["avg"].number < dora}
    assert below == {0.0625, 0.125, 0.1875, 0.75, 0.8125, 0.875, 0.9375}


def test_the_two_tables_of_dora_share_their_rows():
    one, other = (paper.load_table(f"dora_{name}") for name in ("table1_commonsense", "table15_rank_robustness"))
    for method, rank in (("lora", 32), ("dora", 16), ("dora", 32)):
        keys = {"model": "llama-7b", "method": method, "rank": rank, "printed_in": "paper"}
        assert get_row(other, **keys).values == get_row(one, **keys).values


def test_learning_rates_beside_commonsense_scores_are_those_of_the_settings():
    settings, rows = (
        paper.load_table("dora_table8_settings"),
        paper.load_table("dora_table1_commonsense").select_rows(["lr"]),
    )
    for row in rows:
        known = {"model": row.keys["model"], "printed_in": "paper"} if row.keys["method"] == "dora" else {"model": None}
        keys = {"method": row.keys["method"], "rank": row.keys["rank"]}
        assert get_row(settings, **keys, **known).values["lr"].text == row.values["lr"].text
    assert len(rows) == 12


def test_inferred_figures_are_their_base_and_the_gap():
    inferred, isolated = paper.load_table("dual_lora_inferred"), paper.load_table("dual_lora_isolated")
    gains = {
        row.keys["model"]: row.values["gain"].number for row in isolated.select_rows(["gain"], method="dual_lora")[:4]
    }
    assert gains == {"llama3-8b": 0.6, "llama-7b": 0.9, "llama-13b": 0.6, "roberta-base": 1.6}
    for row in inferred.select_rows(method="dual_lora"):
        (value,) = row.values.values()
        assert value.number == pytest.approx(row.keys["base"] + gains[row.keys["model"]]), row


def test_scripts_and_paper_differ_where_deviations_says():
    glue, settings = paper.load_table("lora_table9_10_glue_settings"), paper.load_table("lora_table11_gpt2_settings")
    assert get_row(glue, model="roberta-base", printed_in="paper", setting="alpha").values["MNLI"].number == 8
    assert get_row(glue, model="roberta-base", printed_in="script", setting="alpha").values["MNLI"].number == 16
    assert get_row(settings, task="e2e", printed_in="paper").values["length_penalty"].number == 0.9
    assert get_row(settings, task="e2e", printed_in="readme").values["length_penalty"].number == 0.8


def test_names_of_ours_exist():
    for table in map(paper.load_table, paper.list_tables()):
        for name, metric in (where.split(":") for where in table.ours.values()):
            if name == "glue":  # of all eight
                assert metric == "average"
                continue
            task = tasks.load(name)
            known = {*task.eval_splits, "average", "BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "TER", task.metric}
            if name == "webnlg":
                known |= {f"{group}_{score}" for group in ("seen", "unseen") for score in known}
            assert name in list_choices("task") and metric in known
            assert metric == task.metric or not name.startswith("glue")


def test_rows_are_found_by_the_name_of_a_choice_however_they_are_printed():
    (row,) = paper.load_table("randlora_table4_glue").select_rows(model="roberta-base", method="vera")
    assert row.keys["method"] == "VeRA" and row in paper.find_rows(method="vera", rank=1024)
    assert paper.is_same_key("Dual LoRA", "dual_lora") and not paper.is_same_key("LoRA+", "lora")
    assert paper.is_same_key(16, 16) and not paper.is_same_key("16", 16) and not paper.is_same_key(None, "lora")


def test_models_have_the_name_of_their_choice():
    known = {re.sub(r"\W|_", "", name): name for name in list_choices("model")}
    for _, row in every_row():
        for name in filter(None, [row.keys.get("model")]):
            assert known.get(re.sub(r"\W|_", "", name.lower()), name) == name


def test_a_row_is_found_by_model_method_rank_and_column():
    table = paper.load_table("dora_table1_commonsense")
    row = get_row(table, model="llama3-8b", method="dora", rank=16)
    assert row.values["avg"] == paper.Value("85.0", "published", 85.0, None)
    assert row in paper.find_rows(["avg", "BoolQ"], model="llama3-8b", method="dora", rank=16)
    assert {r.table for r in paper.find_rows(["avg"], model="llama3-8b", method="dual_lora")} == {
        "dual_lora_fig2_magnitude_ratio",
        "dual_lora_inferred",
    }
    assert paper.find_rows(["BoolQ"], method="dual_lora") == []
    assert len(table.select_rows(model="llama-7b", method="dora", rank=32)) == 2


def test_values_keep_what_was_printed(small):
    table = small()
    first, second = table.rows
    assert first.values["a"] == paper.Value("8.50±.07", "published", 8.5, 0.07) and first.values["a"].decimals == 2
    assert first.keys == {"model": "m", "rank": 8} and recompute_average(table, first, "mean") == Decimal("9.0")
    assert second.keys["rank"] is None and "b" not in second.values and recompute_average(table, second, "mean") is None
    assert second.values["a"].status == "inferred" and second.values["mean"].status == "published"
    assert second.note == "of another paper"


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("status: published", "status: guessed", "status: guessed"),
        ("{a: inferred}", "{a: guessed}", r"rows\[1\].status: guessed"),
        ("{a: inferred}", "{c: inferred}", r"rows\[1\].status: names c"),
        ("source: [https://example.org]", "source: []", "source: is missing"),
        ("source: [https://example.org]", "source: somewhere", "source: must be a list"),
        ("version: v1\n", "", "version: is missing"),
        (", seeds: 3", "", "protocol.seeds: is missing"),
        (", 9.5, 9.0]", ", 9.5]", r"rows\[0\]: has no mean"),
        (", 9.5, 9.0]", ", 9.5, 9.0, 1]", r"rows\[0\]: has 6 cells for 5"),
        ("[a, b]", "[a, c]", "average.mean: names c"),
        ("[m, –,", "[m, 8,", r"rows\[1\]: repeats"),
        ("note: of", "nota: of", r"rows\[1\]: nota"),
        ("title:", "tittle: x\ntitle:", "tittle: is not a field"),
        ("id: small", "id: large", "id: is large"),
        ("rows:", "rows: [", "file: "),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_field(small, old, new, field):
    with pytest.raises(ValueError, match=f"^small.yaml: {field}"):
        small(old, new)


def test_an_unknown_table_is_told():
    with pytest.raises(ValueError, match="no such table; known: dora_table"):
        paper.load_table("table9")


def test_it_needs_neither_torch_nor_peft():
    code = "import sys; from dual_lora import paper; paper.find_rows(); print({'torch', 'peft'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"DUAL_LORA_LAZY": "1"}
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_deviations_names_files_that_exist_and_settings_as_they_are():
    text = DEVIATIONS.read_text()
    for name in re.findall(r"`((?:conf|tasks|dual_lora|runs)/[\w./*-]+)`", text):
        assert list(ROOT.glob(name)), name
    for name in re.findall(r"`(\w+)\.yaml`", text):
        assert name in paper.list_tables(), name
    assert len(text.splitlines()) < 150
    dual = OmegaConf.load(ROOT / "conf/method/dual_lora.yaml")
    assert f"a share of {dual.ramp_share} of all optimizer steps" in text
    assert OmegaConf.load(ROOT / "conf/task/e2e.yaml").length_penalty == 0.8
