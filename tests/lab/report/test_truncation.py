"""Updates cut to a lower rank: the cut, the weights it is written into, the scores of runs; curvature; the reports."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers.pytorch_utils import Conv1D

from dual_lora.analysis.truncation import Decomposition, list_cut_ranks
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate.evaluate import evaluate_splits
from dual_lora.lab.evaluate.predict import check_finite
from dual_lora.lab.report.analyses.truncation import (
    Curve,
    draw_curves_by_rank,
    find_beaten_floor,
    tabulate_kept,
    tabulate_losses,
    tabulate_shares,
)
from dual_lora.lab.report.comparison.floors import Floor
from dual_lora.lab.statistics.correlation import correlate_ranks, rank_with_ties
from dual_lora.lab.weights.truncate import CutWeight, score_or_none, write_cut_weights
from tests.support.analysed_runs import check_report_without_weights, copy_runs, read_contents, sweep_smoke

PLACE = ("tiny", "glue/sst2")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_a_cut_is_the_closest_matrix_of_its_rank_as_numpy_has_it(shape):
    dW = draw(*shape)
    U, s, V = np.linalg.svd(dW.double().numpy(), full_matrices=False)
    found = Decomposition.compute(dW)
    for rank in range(min(shape) + 1):
        cut = found.truncate(rank)
        assert cut.dtype == torch.float32 and cut.numpy() == pytest.approx(U[:, :rank] * s[:rank] @ V[:rank], abs=1e-6)
        assert np.linalg.matrix_rank(cut.numpy(), tol=1e-5) == rank
        assert (dW - cut).square().sum().item() == pytest.approx((s[rank:] ** 2).sum(), rel=1e-4, abs=1e-9)
        assert found.compute_kept_share(rank) == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum())
    assert found.truncate(99).numpy() == pytest.approx(dW.numpy(), abs=1e-6)


def test_the_rank_of_a_product_is_its_inner_dimension_and_nothing_has_none():
    product = Decomposition.compute(draw(40, 3) @ draw(3, 30, seed=1))
    assert product.numerical_rank == 3
    nothing = Decomposition.compute(torch.zeros(4, 5))
    assert nothing.numerical_rank == 0 and nothing.compute_kept_share(0) == 1 and not nothing.truncate(2).any()


@pytest.mark.parametrize(
    ("rank", "ranks"), [(0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (16, [0, 1, 2, 4, 8, 16])]
)
def test_ranks_are_powers_of_two_up_to_the_update_s_own(rank, ranks):
    assert list_cut_ranks(rank) == ranks


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6), nn.Conv2d(3, 4, 2), nn.Embedding(6, 4)], ids=str)
def test_a_cut_update_is_added_to_the_original_weight_whatever_the_layer(layer):
    model, whole = nn.Sequential(layer), layer.weight.detach().clone()
    turned = isinstance(layer, Conv1D | nn.Embedding)
    original = whole.T.clone() if turned else whole.flatten(1)
    change = Decomposition.compute(draw(*original.shape))
    weight = CutWeight("0", slice(None), original, change)
    for rank in (1, 99, 0):  # each from the original, not from the one before
        write_cut_weights(model, [weight], rank)
        now = layer.weight.T if turned else layer.weight.flatten(1)
        torch.testing.assert_close(now, original + change.truncate(rank))
    assert torch.equal(layer.weight, whole)


def test_a_block_of_a_fused_layer_leaves_the_other_rows():
    layer = nn.Linear(3, 6)
    before, change = layer.weight.detach().clone(), Decomposition.compute(draw(2, 3))
    write_cut_weights(nn.Sequential(layer), [CutWeight("0", slice(2, 4), before[2:4], change)], 2)
    moved = (layer.weight - before).detach()
    torch.testing.assert_close(moved[2:4], change.truncate(2), atol=1e-6, rtol=1e-5)
    assert not moved[:2].any() and not moved[4:].any()


def curve(label: str, scores: dict[int, float], kept=0.5) -> Curve:
    whole = scores[max(scores)]
    return Curve(PLACE, label, scores, dict.fromkeys(scores, kept), whole, "macro_f1")


def test_losses_are_paired_by_seed_and_a_lower_full_rank_loses_nothing_above_it():
    dual = [curve("Dual LoRA", {0: 50, 1: 60 + s, 2: 70 + s, 4: 80 + 2 * s}) for s in (0, 1, 2)]
    lora = [curve("LoRA", {0: 50, 1: 70 + s, 2: 82 + s}) for s in (0, 1, 2)]
    first, second = tabulate_losses([*dual, *lora]).to_dict("records")
    half = 4.302653 / 3**0.5
    assert first["1"] == f"-21.0 ± {half:.1f}" and first["2"] == f"-11.0 ± {half:.1f}"
    assert first["full"] == f"82.0 ± {2 * half:.1f} (4)" and second["full"] == f"83.0 ± {half:.1f} (2)"
    assert second["1"] == "-12.0" and second["2"] == "+0.0"
    kept = tabulate_kept([*dual, *lora])
    assert list(kept) == ["task", "method", "0", "1", "2"]


def test_a_score_that_a_cut_does_not_have_is_a_dash():
    (line,) = tabulate_losses([curve("LoRA", {0: np.nan, 1: 60, 2: 70})]).to_dict("records")
    assert line["0"] == "–" and line["1"] == "-10.0"


def test_only_an_undefined_score_is_a_missing_one(monkeypatch):
    task = SimpleNamespace(choices=lambda row: [], form="classification", judge=lambda row, output: {"answer": output})
    task.name, task.metric, task.score = "planted", "pearson", lambda judged: {"pearson": math.nan}
    splits = {"test": SimpleNamespace(rows=[{"id": "a"}])}
    monkeypatch.setattr("dual_lora.lab.evaluate.evaluate.compute_outputs", lambda *_: [0.5])
    assert score_or_none(lambda: evaluate_splits(None, None, task, splits, None), "pearson") is None
    assert score_or_none(lambda: ({"pearson": 0.5}, []), "pearson") == 0.5
    with pytest.raises(UserError, match="outputs are NaN or Inf"):
        score_or_none(lambda: check_finite(torch.tensor([[math.nan, 0.0]])), "pearson")


def test_seeds_whose_updates_have_other_full_ranks_stand_together():
    low, high = curve("Full", {0: 50, 256: 70, 383: 80}), curve("Full", {0: 50, 256: 72, 384: 82})
    assert (high.get_score(383), low.get_score(384), low.get_kept(384)) == (72, 80, low.kept[383])
    (axes,) = draw_curves_by_rank([low, high], []).axes
    assert list(axes.get_lines()[0].get_ydata()) == [50, 71, 76, 81]
    assert set(tabulate_kept([low, high])) == {"task", "method", "0", "256"}


def test_a_score_that_is_no_fraction_has_decimals_enough():
    run = replace(curve("LoRA", {0: 0.25, 1: 0.5, 2: 0.75}), decimals=2)
    (line,) = tabulate_losses([run]).to_dict("records")
    assert (line["0"], line["full"]) == ("-0.50", "0.75 (2)")


def test_the_share_of_the_gain_is_told_where_the_floors_are_beaten():
    curves = [curve("Dual LoRA", {0: 50, 1: 65, 2: 80}), curve("LoRA", {0: 50, 1: 55, 2: 58})]
    floors = [
        Floor(PLACE, "majority class", 50, "Dual LoRA", 30, 1, frozenset({("Dual LoRA", ()), ("LoRA", ())})),
        Floor(PLACE, "Head only", 60, "Dual LoRA", 20, 1, frozenset({("Dual LoRA", ())})),
    ]
    dual, lora = tabulate_shares(curves, floors).to_dict("records")
    assert (dual["0"], dual["1"], dual["floor"]) == ("-50%", "25%", "60.0 (Head only)")
    assert (lora["0"], lora["1"], lora["floor"]) == ("–", "–", "–")
    assert find_beaten_floor(("other", "task"), "Dual LoRA", floors) is None


def test_of_scores_that_should_be_low_the_share_is_of_the_way_below_the_lowest_floor():
    curves = [curve("LoRA", {0: 50, 1: 35, 2: 20})]
    floors = [
        Floor(PLACE, str(s), s, "LoRA", s - 20, 1, frozenset({("LoRA", ())}), lower_is_better=True) for s in (50, 40)
    ]
    (line,) = tabulate_shares(curves, floors).to_dict("records")
    assert (line["1"], line["floor"]) == ("25%", "40.0 (40)")


def test_the_axis_names_the_score_that_was_cut():
    (axes,) = draw_curves_by_rank([curve("LoRA", {0: 50, 1: 60})], []).axes
    assert axes.get_ylabel() == "macro_f1, points"


def test_rank_correlation_is_spearman_s_with_the_interval_of_bonett_and_wright():
    xs, ys = [1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 5, 6, 4, 2, 3, 1]
    found = correlate_ranks(xs, ys)
    assert found.rho == pytest.approx(1 - 6 * sum((x - y) ** 2 for x, y in zip(xs, ys, strict=True)) / (8 * 63))
    half = 1.959964 * ((1 + found.rho**2 / 2) / 5) ** 0.5
    assert np.arctanh([found.low, found.high]) == pytest.approx(np.arctanh(found.rho) + np.array([-half, half]))
    perfect = correlate_ranks(xs, xs)
    assert perfect.rho == pytest.approx(1) and perfect.low is perfect.high is None
    assert correlate_ranks(xs[:4], ys[:4]) is None and correlate_ranks(xs, [1] * 8) is None


def test_the_p_of_a_rank_correlation_is_exact_for_few_points():
    """Of the 120 orders of five points ten have a correlation of at least 0.9 or at most -0.9."""
    assert correlate_ranks([1, 2, 3, 4, 5], [5, 4, 2, 3, 1]).p == pytest.approx(10 / 120)
    ys = np.random.default_rng(0).normal(size=10)
    assert correlate_ranks(range(10), ys).p == pytest.approx(spearmanr(range(10), ys).pvalue, abs=0.02)


def test_measured_numbers_whose_order_is_chance_are_tied():
    eigenvalues, rates = [2.84, 0.60, 0.17654, 0.17664, 0.12], [2e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    found = correlate_ranks(eigenvalues, rates, tolerance=0.001)
    assert found.rho == pytest.approx(spearmanr([5, 4, 2, 2, 1], rates).statistic)
    assert rank_with_ties([3.0, 1.0, 1.001, 1.002, 3.0], 0.0015) == [3, 0, 0, 0, 3]
    assert rank_with_ties([3.0, 1.0, 1.001, 3.0], 0.0) == [2, 0, 1, 2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The smoke runs of truncation and curvature, which share their records."""
    return sweep_smoke(tmp_path_factory.mktemp("runs"), ("truncation", "curvature"))


@pytest.fixture
def runs(finished, tmp_path, monkeypatch):
    return copy_runs(monkeypatch, finished, tmp_path / "runs")


def test_every_trained_run_has_its_curve_and_uncut_its_recorded_score(finished):
    found = read_contents(finished, "truncation.json")
    assert len(found) == 6 and not any("head_only" in name for name in found)  # three methods, two seeds, no floors
    for name, content in found.items():
        whole = 16 if "_lora_" in name and "dual" not in name else 128
        assert content["ranks"][-1] <= whole and content["ranks"][:3] == [0, 1, 2]
        assert content["scores"][-1] == pytest.approx(content["recorded"], abs=1e-6)
        assert content["kept"] == sorted(content["kept"]) and content["kept"][0] == 0
        assert content["kept"][-1] == pytest.approx(1) and content["weights"] > 5
    text = (finished / "truncation_smoke/report/table.md").read_text()
    assert "uncut, 6 of 6 runs have their recorded score" in text and "(truncation.png)" in text


@pytest.mark.parametrize("name", ["truncation", "curvature"])
def test_a_report_does_not_need_the_trained_weights(runs, name):
    check_report_without_weights(runs, name)


def test_runs_whose_weights_are_gone_are_told_in_one_line_each_and_the_others_are_cut(runs, capsys):
    curves = sorted(runs.glob("verdict_smoke/*/truncation.json"))
    lost, kept = curves[0].parent, curves[-1].parent
    for folder in (lost, kept):
        (folder / "truncation.json").unlink()
    shutil.rmtree(lost / ("model" if "full" in lost.name else "adapter"))
    assert sweep_command(["experiment=truncation", "scale=smoke", "wandb.mode=disabled"]) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("not analysed: ")]
    assert lost.name in line and "cannot be loaded" in line and "run its command again with force=true" in line
    assert (kept / "truncation.json").is_file() and "uncut, 5 of 5 runs" in shown.out


def test_every_start_has_its_curvature_and_the_report_its_correlation(finished):
    found = read_contents(finished, "curvature.json")
    assert len(found) == 5 and all(content["rows"] == 64 for content in found.values())
    by_method = {name.split("_")[2] + ("_plus" if "_plus_" in name else ""): c for name, c in found.items()}
    assert by_method["lora_plus"]["eigenvalue"] > 1.5 * by_method["lora"]["eigenvalue"] > 0  # B at eight times the rate
    assert by_method["full"]["parameters"] > 5 * by_method["lora"]["parameters"]
    text = (finished / "curvature_smoke/report/table.md").read_text()
    assert "| all      | 5 " in text and "(curvature.png)" in text


def test_a_damaged_analysis_is_told(runs, capsys):
    path = sorted(runs.glob("verdict_smoke/*/curvature.json"))[0]
    path.write_text(path.read_text().replace('"eigenvalue"', '"eigenvalues"'))
    assert sweep_command(["experiment=curvature", "scale=smoke", "run=false"]) == 2
    assert f"{path.parent.name}" in capsys.readouterr().err
