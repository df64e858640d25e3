"""Updates beside those of full tuning: how similar they are (`experiment=similarity`), and how well each form fits them
(`experiment=fit_updates`)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dual_lora.analysis import measure_decomposition
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import EXIT_USER, UserError
from dual_lora.lab.record.identity import serialize_identity_settings
from dual_lora.lab.record.record import Record
from dual_lora.lab.report.analyses.fit import FittedRun, tabulate_differences, tabulate_unexplained
from dual_lora.lab.report.analyses.kinds import OTHER_SEED, SAME_SEED, find_references, is_up_to_date
from dual_lora.lab.report.analyses.similarity import ComparedRun, correlate_changes, tabulate_similarity
from dual_lora.lab.study.experiment import Experiment, load_experiment_file
from dual_lora.lab.weights.fit_updates import choose_middle_updates
from tests.support.analysed_runs import check_report_without_weights, copy_runs, read_contents, sweep_smoke

PLACE = ("tiny", "demo/sentiment")
EXPERIMENTS = ("similarity", "fit_updates")


def test_size_and_direction_of_rows_are_told_apart():
    W0 = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert measure_decomposition(W0, W0) == {"magnitude_change": 3.0, "direction_change": pytest.approx(0, abs=1e-12)}
    turned = torch.tensor([[4.0, -3.0], [0.0, 1.0]]) - W0
    found = measure_decomposition(W0, turned)
    assert found["magnitude_change"] == pytest.approx(0, abs=1e-12) and found["direction_change"] == pytest.approx(1)
    empty = torch.zeros(2, 2)
    assert measure_decomposition(empty, empty) == {"magnitude_change": 0.0, "direction_change": 0.0}
    with pytest.raises(ValueError, match="expected matrices of one shape"):
        measure_decomposition(W0, torch.ones(2, 3))


def test_each_block_of_a_fused_weight_has_a_middle_layer_of_its_own():
    settings = load_settings(["model=tiny-gpt2", "task=demo/restaurants", "method=dual_lora"])
    modules = [f"base_model.model.transformer.h.{layer}.attn.c_attn" for layer in range(3)]
    updates = [SimpleNamespace(module=m, name=f"{m}[{block}]") for block in (0, 2) for m in modules]
    chosen = choose_middle_updates(updates, settings)
    assert sorted(update.name for update in chosen.values()) == [f"{modules[1]}[0]", f"{modules[1]}[2]"]


def make_outcome(label: str, seed: int, finished: bool = True) -> SimpleNamespace:
    model, task = SimpleNamespace(name="tiny"), SimpleNamespace(name="demo/sentiment")
    settings = SimpleNamespace(model=model, task=task, seed=seed)
    result = {"metric": "accuracy"} if finished else None
    return SimpleNamespace(label=label, settings=settings, record=f"{label} {seed}", result=result)


def test_a_run_is_compared_with_the_references_of_its_seed_and_of_the_next():
    experiment = SimpleNamespace(reference="Full")
    outcomes = [make_outcome("Full", seed) for seed in (0, 1, 2)]

    def find(label: str, seed: int) -> list[str | None]:
        found = find_references(experiment, make_outcome(label, seed), outcomes)
        return [found[name] and found[name][1] for name in (SAME_SEED, OTHER_SEED)]

    assert find("LoRA", 0) == ["Full 0", "Full 1"] and find("LoRA", 2) == ["Full 2", "Full 0"]
    assert find("Full", 1) == [None, "Full 2"] and find("LoRA", 5) == [None, "Full 0"]
    outcomes[2] = make_outcome("Full", 2, finished=False)
    assert find("Full", 0) == [None, "Full 1"]
    with pytest.raises(UserError, match="^Full, seed 2: not finished"):
        find("Full", 1)


def make_analysed(outcome: SimpleNamespace, content: dict) -> SimpleNamespace:
    """Return an outcome whose record holds an analysis."""
    outcome.record = SimpleNamespace(read_sealed=lambda *_: content)
    return outcome


def test_a_comparison_with_other_runs_than_asked_for_is_made_again():
    experiment = SimpleNamespace(analyse="similarity", reference="Full")
    outcomes = [make_outcome("Full", seed) for seed in (0, 1)]
    for outcome in outcomes:
        outcome.record = SimpleNamespace(name=f"full_s{outcome.settings.seed}")
    lora = make_outcome("LoRA", 0)
    for stored, current in (("full_s1", True), (None, False), ("full_s2", False)):
        content = {"references": {SAME_SEED: "full_s0", OTHER_SEED: stored}}
        assert is_up_to_date(experiment, make_analysed(lora, content), outcomes) == current
    assert is_up_to_date(SimpleNamespace(analyse="ranks"), make_analysed(lora, {}), outcomes)


@pytest.mark.parametrize("words", [{"reference": "Nobody"}, {"reference": ""}, {"analyse": "ranks"}])
def test_a_reference_is_a_row_and_belongs_to_this_analysis_alone(words):
    content = load_experiment_file("similarity") | words
    with pytest.raises(UserError, match="reference: .*: the label of a cell, only with analyse: similarity$"):
        Experiment.from_content("similarity", content, "smoke")


def row(role: str, direction: float, magnitude: float, **cosine: float | None) -> dict:
    return {"role": role, "direction_change": direction, "magnitude_change": magnitude, "cosine": cosine}


def test_medians_over_weights_and_means_over_seeds():
    runs = [
        ComparedRun(PLACE, "LoRA", [row("q", 1, 1, same=0.1 + s, null=0.0), row("v", 1, 2, same=0.3 + s, null=None)])
        for s in (0.0, 0.1, 0.2)
    ]
    (line,) = tabulate_similarity(runs, "cosine", ["same", "other"], "+.3f", 1).to_dict("records")
    half = 4.302653 * 0.1 / 3**0.5
    assert line["same"] == f"+0.300 ± {half:.3f}" and line["other"] == "–" and line["random"] == "+0.000"


def test_the_correlation_is_pearsons_over_the_weights_of_a_role():
    points = [(1, 2), (2, 1), (3, 5), (4, 4), (9, 0)]
    run = ComparedRun(PLACE, "LoRA", [row("q" if x < 9 else "v", x, y) for x, y in points])
    expected = np.corrcoef(np.array(points[:4]).T)[0, 1]
    assert correlate_changes([run], "q") == f"{expected:+.2f} (4)"
    assert correlate_changes([run], "v") == "–"


def fit_row(method: str, unexplained: float, svd: float | None = None) -> dict:
    return {"cell": {"target": "q", "method": method}, "result": {"unexplained": unexplained, "svd": svd}}


def test_the_best_rate_of_each_form_counts_and_differences_are_paired():
    labels, compared = {"a": "LoRA", "b": "Dual LoRA"}, {"a": "b", "b": "b"}
    outcome = SimpleNamespace(label="Full", settings=make_outcome("", 0).settings)
    runs = []
    for shift in (0.0, 0.1, 0.3):
        rows = [fit_row("a", 0.5, 0.2), fit_row("a", 0.25, 0.2), fit_row("a", np.nan, 0.2), fit_row("b", 0.5 + shift)]
        runs.append(FittedRun.read(outcome, {"rows": rows}))
    (line,) = tabulate_unexplained(runs, labels).to_dict("records")
    assert (
        line["LoRA"].startswith("0.250") and line["LoRA (SVD)"] == "0.200" and line["Dual LoRA"].startswith("0.633 ± ")
    )
    (line,) = tabulate_differences(runs, labels, compared).to_dict("records")
    assert line["LoRA"].startswith("+0.383 ± ") and "Dual LoRA" not in line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The smoke runs of both experiments, which share their records."""
    return sweep_smoke(tmp_path_factory.mktemp("runs"), EXPERIMENTS)


def test_every_run_is_compared_with_full_tuning_as_numpy_does(finished):
    found = read_contents(finished, "similarity.json")
    assert len(found) == 10
    for name, content in found.items():
        seeds = {key: other and other.split("_")[-2] for key, other in content["references"].items()}
        mine = name.split("_")[-2]
        assert seeds[SAME_SEED] == (None if "_full_" in name else mine)
        assert seeds[OTHER_SEED] == {"s0": "s1", "s1": "s0"}[mine]
        for line in content["rows"]:
            assert (line["cosine"][SAME_SEED] is None) == ("_full_" in name)
            assert abs(line["cosine"]["null"]) < 0.2 and line["direction_change"] > 0
    name = next(name for name in found if "_lora_s0" in name and "dual" not in name)
    line = found[name]["rows"][0]
    module, folder = line["module"], finished / "verdict_smoke"
    adapter = load_file(folder / name / "adapter/adapter_model.safetensors")
    A, B = (next(t for key, t in adapter.items() if f"{module}.lora_{part}." in key) for part in "AB")
    base = load_file(paths.BUNDLED / "tiny-roberta/model.safetensors")
    trained = load_file(folder / found[name]["references"][SAME_SEED] / "model/model.safetensors")
    dW = trained[f"{module}.weight"].astype(float) - base[f"{module}.weight"]
    product = B.astype(float) @ A
    cosine = (product * dW).sum() / np.linalg.norm(product) / np.linalg.norm(dW)
    assert line["cosine"][SAME_SEED] == pytest.approx(cosine, rel=1e-4) and cosine > 0.05  # both descend the same loss


def test_one_weight_of_every_role_of_full_tuning_is_fitted_by_every_form(finished):
    found = read_contents(finished, "fit.json")
    assert len(found) == 2 and all("_full_" in name for name in found)
    for name, content in found.items():
        assert set(content["modules"]) == {"q", "k", "v", "o", "up", "down"}
        base = load_file(paths.BUNDLED / "tiny-roberta/model.safetensors")
        trained = load_file(finished / "verdict_smoke" / name / "model/model.safetensors")
        module = content["modules"]["q"]
        dW = trained[f"{module}.weight"].astype(float) - base[f"{module}.weight"]
        energy = np.linalg.svd(dW, compute_uv=False) ** 2
        (svd,) = {
            r["result"]["svd"] for r in content["rows"] if (r["cell"]["target"], r["cell"]["method"]) == ("q", "lora")
        }
        assert svd == pytest.approx(energy[4:].sum() / energy.sum(), rel=1e-3)
        assert {r["cell"]["method"] for r in content["rows"]} == set(content["labels"])


def test_a_reference_that_was_done_again_is_compared_with_again(finished, tmp_path, monkeypatch, capsys):
    runs = copy_runs(monkeypatch, finished, tmp_path / "runs")
    before = read_contents(runs, "similarity.json")
    assert all(digest for content in before.values() for digest in content["digests"].values())
    name = next(name for name in before if "_full_s0" in name)
    reference = Record(runs / "verdict_smoke" / name)
    result = reference.read_result()
    reference.write_result({key: value for key, value in result.items() if key != "digest"} | {"train_seconds": 9.0})
    compared = {other for other, content in before.items() if name in content["digests"]}
    words = ["experiment=similarity", "scale=smoke", "wandb.mode=disabled"]
    assert len(compared) == 9 and sweep_command([*words, "run=false"]) == EXIT_USER
    told = capsys.readouterr().err
    for other in before:
        line = f"{other}/similarity.json: compares with {name}, done again since; sweep.py without run=false analyses"
        assert (line in told) == (other in compared)
    assert sweep_command(words) == 0
    after = read_contents(runs, "similarity.json")
    changed = {other for other, content in after.items() if content != before[other]}
    assert changed == compared and capsys.readouterr().out.count("analysing ") == 9
    assert {content["digests"].get(name) for content in after.values()} == {None, reference.read_digest()}


def test_comparisons_of_earlier_versions_name_no_digests_and_stay(finished, tmp_path, monkeypatch, capsys):
    runs = copy_runs(monkeypatch, finished, tmp_path / "runs")
    contents = read_contents(runs, "similarity.json")
    for name, content in contents.items():
        kept = {key: value for key, value in content.items() if key not in ("digests", "digest")}
        Record(runs / "verdict_smoke" / name).write_sealed("similarity.json", kept)
    before = read_contents(runs, "similarity.json")
    report = {path.name: path.read_bytes() for path in (runs / "similarity_smoke/report").iterdir()}
    assert sweep_command(["experiment=similarity", "scale=smoke", "wandb.mode=disabled"]) == 0
    assert "analysing" not in capsys.readouterr().out and read_contents(runs, "similarity.json") == before
    assert {path.name: path.read_bytes() for path in (runs / "similarity_smoke/report").iterdir()} == report


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_report_regenerates_from_the_records_alone(name, finished, tmp_path, monkeypatch):
    check_report_without_weights(copy_runs(monkeypatch, finished, tmp_path / "runs"), name)


def test_both_experiments_share_the_runs_of_the_verdict():
    def compose(name: str) -> dict[tuple[str, str], list[str]]:
        cells = Experiment.load(name, "small").compose_cells(["seed=0"])
        assert {cell.settings.study for cell in cells} == {"verdict"}
        runs = {(c.label, c.settings.task.name): [c.settings, *c.tuning] for c in cells}
        return {place: list(map(serialize_identity_settings, some)) for place, some in runs.items()}

    whole = compose("verdict")
    for name in EXPERIMENTS:
        assert all(whole[place] == runs for place, runs in compose(name).items())
