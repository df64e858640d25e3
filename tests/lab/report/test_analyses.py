"""Analyses in a report: entries layer by layer, those that are missing, and which run each is of."""

from types import SimpleNamespace

import pytest

from dual_lora.analysis import DIRECTION_EDGES, MAGNITUDE_EDGES
from dual_lora.lab.errors import UserError
from dual_lora.lab.present import histogram_figure
from dual_lora.lab.record.record import Record
from dual_lora.lab.report.analyses.entries import tabulate_layers
from dual_lora.lab.report.analyses.kinds import check_analysis
from dual_lora.lab.report.analyses.ranks import read_analyses


def row(layer: int, role: str, zeros: float, dead: int, flipped: float | None) -> dict:
    return {"layer": layer, "role": role, "zeros": zeros, "dead_rows": dead, "signs_flipped": flipped}


def test_layers_have_medians_of_shares_and_sums_of_dead_rows():
    first = [row(0, "q", 0.4, 1, 0.1), row(0, "v", 0.6, 2, 0.3), row(1, "q", 0.5, 0, 0.2)]
    found = tabulate_layers({"SST-2": {"rows": first}, "LoRA": {"rows": [row(1, "q", 0.0, 0, None)]}})
    assert found.to_dict("records") == [
        {"layer": "0", "SST-2": "0.5 | 3 | 0.2", "LoRA": "–"},
        {"layer": "1", "SST-2": "0.5 | 0 | 0.2", "LoRA": "0 | 0 | –"},
    ]


def test_a_line_sums_over_the_roles_of_a_layer(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, folder, name):
        drawn.update({line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()})
        return [folder / f"{name}.png"]

    monkeypatch.setattr(histogram_figure, "save_figure", keep)
    edges = {"magnitude_edges": MAGNITUDE_EDGES, "direction_edges": DIRECTION_EDGES}
    sizes = {"magnitude": len(MAGNITUDE_EDGES) + 1, "direction": len(DIRECTION_EDGES) + 1}

    def count(part: str, entries: int) -> list[int]:
        return [entries, *[0] * (sizes[part] - 2), 1]

    rows = [
        {"layer": layer, "role": role}
        | {f"{part}_histogram{null}": count(part, entries) for part in sizes for null in ("", "_null")}
        for layer, role, entries in ((0, "q", 1), (0, "v", 5), (3, "q", 9))
    ]
    content = {"rows": rows, "labels": {"magnitude": "ReLU(BA)", "direction": "Sign(DC)"}, **edges}
    histogram_figure.draw_histograms(content, tmp_path, "layers", "layer")
    assert set(drawn) == {"layer 0", "layer 0, random", "layer 3", "layer 3, random"}
    assert drawn["layer 0"][0] == 100 * 6 / 8 and drawn["layer 3"][-1] == 10
    drawn.clear()
    histogram_figure.draw_histograms(content, tmp_path)
    assert set(drawn) == {"q", "q, random", "v", "v, random"} and drawn["q"][0] == 100 * 10 / 12


def test_a_finished_run_that_is_not_analysed_yet_is_not_called_unfinished(tmp_path):
    experiment = SimpleNamespace(analyse="truncation", floors=[])
    outcome = SimpleNamespace(label="LoRA", result={}, record=Record(tmp_path))
    with pytest.raises(UserError, match="truncation.json: missing; sweep.py without run=false analyses the run$"):
        check_analysis(experiment, outcome)


# Analyses of several models and tasks.


def analyse(model: str, task: str, seed: int = 0, label: str = "LoRA", name: str = "run"):
    """Return an analysed run whose analysis says which one it is."""
    settings = SimpleNamespace(model=SimpleNamespace(name=model), task=SimpleNamespace(name=task), seed=seed)
    record = SimpleNamespace(name=name, read_sealed=lambda *_: {"of": (model, task, seed, name)})
    return SimpleNamespace(label=label, settings=settings, record=record)


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([("a", "t"), ("b", "t")], ["LoRA, a", "LoRA, b"]),
        ([("a", "t"), ("a", "u")], ["LoRA, t", "LoRA, u"]),
        ([("a", "t", 0), ("b", "t", 1)], ["LoRA, a, seed 0", "LoRA, b, seed 1"]),
        ([("a", "t", 0), ("a", "t", 0, "DoRA")], ["LoRA", "DoRA"]),
        ([("a", "t", 0, "LoRA", "r4"), ("a", "t", 0, "LoRA", "r8")], ["LoRA, r4", "LoRA, r8"]),
    ],
    ids=str,
)
def test_no_analysis_stands_in_the_place_of_another(runs, names):
    outcomes = [analyse(*run) for run in runs]
    found = read_analyses(outcomes)
    assert list(found) == names
    assert [content["of"] for content in found.values()] == [outcome.record.read_sealed()["of"] for outcome in outcomes]
