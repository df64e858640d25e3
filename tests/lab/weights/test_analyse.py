"""Analysis of a run's weights: known matrices, an independent numpy computation, whole runs, what is refused."""

import json
import math
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from peft import LilyConfig, get_peft_model
from safetensors.numpy import load_file

import tasks
from dual_lora import analysis, delta_weight
from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.recorded import load_recorded_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.adapt import attach_method
from dual_lora.lab.model.load import load_model
from dual_lora.lab.present import rank_figure as present_rank_figure
from dual_lora.lab.present.histogram_figure import draw_histograms
from dual_lora.lab.present.rank_figure import (
    AnalysedRun,
    draw_own_ranks,
    draw_published_ranks,
    draw_ranks,
    read_published_ranks,
)
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from dual_lora.lab.weights import analyse as weights_analyse
from dual_lora.lab.weights.analyse import drop_histograms
from dual_lora.lab.weights.updates import MIN_DEVIATIONS, draw_initial_factors, find_role, list_adapter_updates
from dual_lora.tuner.warmup import list_factors
from tests.support.places import ROOT

ROLES = {"q", "k", "v", "up", "down"}
Q0 = "model.layers.0.self_attn.q_proj"


def factors(out: int = 96, fan_in: int = 64, r1: int = 3, r2: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((r1, fan_in), (out, r1), (r2, fan_in), (out, r2))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def by_numpy(A, B, C, D, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Return ReLU(B A), Sign(D C) and dW in float64, written anew."""
    A, B, C, D = (np.asarray(t, np.float64) for t in (A, B, C, D))
    size, sign = np.maximum(B @ A, 0), np.where(D @ C > 0, 1.0, -1.0)
    return {"magnitude": size, "direction": sign, "overall": scale * size * sign}


def soft_ranks(W: np.ndarray) -> tuple[float, float]:
    s = np.linalg.svd(W, compute_uv=False)
    p = s / s.sum()
    p = p[p > 0]
    return (s**2).sum() / s[0] ** 2, math.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize("n", [1, 7, 64])
def test_every_rank_of_the_identity_is_its_size(n):
    found = analysis.compute_ranks(3 * torch.eye(n))
    assert {found[key] for key in found if key.startswith("rank")} == {n}
    assert found["stable_rank"] == pytest.approx(n) and found["effective_rank"] == pytest.approx(n)


def test_ranks_of_known_singular_values():
    found = analysis.compute_ranks(torch.diag(torch.tensor([2.0, 1.0, 0.1, 0.01, 1e-3, 1e-9])))
    ranks = [found[key] for key in ("rank", "rank_0.001", "rank_0.01", "rank_0.1")]
    assert ranks == [5, 4, 3, 2]
    assert found["stable_rank"] == pytest.approx((4 + 1 + 0.01 + 1e-4 + 1e-6) / 4)
    two = analysis.compute_ranks(torch.diag(torch.tensor([3.0, 1.0])))
    assert two["effective_rank"] == pytest.approx(4 / 3**0.75)


def test_a_zero_matrix_has_rank_nought_and_no_nan():
    zero = torch.zeros(5, 3)
    found = analysis.measure_overall(zero, torch.ones(5, 3))
    assert {v for k, v in found.items() if "rank" in k} == {0}
    assert (found["zeros"], found["dead_rows"], found["relative_size"]) == (1.0, 5, 0.0)
    assert analysis.compute_relative_size(torch.ones(2, 2), torch.zeros(2, 2)) is None
    assert analysis.compare_updates(zero, torch.ones(5, 3)) == {"cosine": None, "sign_agreement": None}


@pytest.mark.parametrize("shape", [(96, 64), (40, 64), (64, 64)])
def test_ranks_of_random_factors_are_those_of_numpy(shape):
    four = factors(*shape)
    found = analysis.measure_groups(*four) | analysis.measure_overall(delta_weight(*four, 0.25), None)
    for part, W in by_numpy(*four, scale=0.25).items():
        stable, effective = soft_ranks(W)
        assert found[f"{part}_stable_rank"] == pytest.approx(stable, rel=1e-5)
        assert found[f"{part}_effective_rank"] == pytest.approx(effective, rel=1e-5)
        assert found[f"{part}_rank"] == np.linalg.matrix_rank(W.astype(np.float32))
        s = np.linalg.svd(W, compute_uv=False)
        assert found[f"{part}_rank_0.1"] == (s > 0.1 * s[0]).sum() < min(shape)
    assert found["overall_rank"] > 8  # r1 + r2


def test_the_rank_is_torchs_where_it_is_not_full():
    A, B, _, _ = factors()
    W = B @ A
    assert analysis.compute_ranks(W)["rank"] == torch.linalg.matrix_rank(W) == 3
    wide = torch.randn(40, 400, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -7, 40)[:, None]
    assert 10 < analysis.compute_ranks(wide)["rank"] == torch.linalg.matrix_rank(wide) < 40


def test_variants_of_the_map_are_followed():
    A, B, C, D = factors()
    found = analysis.measure_groups(A, B, C, D, "identity", "identity")
    assert (found["magnitude_rank"], found["direction_rank"]) == (3, 5)
    assert analysis.measure_groups(A, B, C, D, "abs", "tanh")["magnitude_rank"] > 3


def test_a_rounded_product_is_looked_at_as_it_was_computed():
    A, B, C, D = factors()
    rounded = (D.bfloat16() @ C.bfloat16()).float()
    found = analysis.measure_groups(A, B, C, D, direction="identity", direction_dtype="bfloat16")
    assert found["direction_rank"] == analysis.compute_ranks(rounded)["rank"] > 5  # rounding gives more than r2 = 5
    flipped = ((rounded > 0) != (D @ C > 0)).double().mean().item()
    assert flipped > 0
    exact = analysis.compute_flipped_share(C.bfloat16(), D.bfloat16(), C, D, "bfloat16")
    assert exact == 0 < analysis.compute_flipped_share(C.bfloat16(), D.bfloat16(), C, D)


def test_histograms_count_every_entry_in_its_bin():
    assert analysis.count_by_bin(torch.tensor([-5.0, 0.0, 0.5, 1.0, 1.5, 9.0]), (0.0, 1.0)) == [2, 2, 2]
    A, B, C, D = factors()
    found, by_hand = analysis.measure_groups(A, B, C, D), by_numpy(A, B, C, D)
    assert sum(found["magnitude_histogram"]) == sum(found["direction_histogram"]) == 96 * 64
    assert found["magnitude_histogram"][0] == (by_hand["magnitude"] == 0).sum()
    negative = analysis.DIRECTION_EDGES.index(0.0)
    assert sum(found["direction_histogram"][: negative + 1]) == (by_hand["direction"] < 0).sum()
    assert len(found["direction_histogram"]) == len(analysis.DIRECTION_EDGES) + 1
    tenth = analysis.MAGNITUDE_EDGES.index(0.1)
    below = (by_hand["magnitude"] <= 0.1).sum()
    assert sum(found["magnitude_histogram"][: tenth + 1]) == below


def test_zeros_dead_rows_and_flipped_signs_are_counted():
    W = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, -1.0, 2.0]])
    assert (analysis.compute_zero_share(W), analysis.count_dead_rows(W), analysis.count_dead_rows(W.T)) == (5 / 8, 1, 1)
    _, _, C, D = factors()
    turned = D.clone()
    turned[:24] *= -1
    assert analysis.compute_flipped_share(C, D, C, D) == 0
    assert analysis.compute_flipped_share(C, turned, C, D) == 0.25
    assert analysis.compute_flipped_share(2 * C, D, C, 3 * D) == 0  # of the size of a draw no sign depends


def test_agreement_of_known_updates():
    a = torch.tensor([[3.0, 0.0, -4.0, 1.0]])
    assert analysis.compare_updates(a, a) == {"cosine": pytest.approx(1), "sign_agreement": 1.0}
    assert analysis.compare_updates(a, -2 * a) == {"cosine": pytest.approx(-1), "sign_agreement": 0.0}
    b = torch.tensor([[4.0, 7.0, 3.0, 0.0]])
    assert analysis.compare_updates(a, b) == {"cosine": 0.0, "sign_agreement": 0.5}


METHODS = ("dual_lora", "lora", "dora", "full")
SHORT = ["train.max_steps=2", "train.max_examples=64", "eval.max_examples=4", "eval.before=false"]
SHORT += ["wandb.mode=disabled"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of one short run of each method on tiny-llama."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        yield {m: train(f"method={m}") for m in METHODS}


def train(*overrides: str):
    chosen = load_settings(["model=tiny-llama", "task=demo/restaurants", *SHORT, *overrides])
    return paths.RUNS / "adhoc" / train_run(Run.prepare(chosen))["identity"]


@cache
def analysed(folder, *arguments: str) -> tuple[dict, dict[str, dict]]:
    """Return analysis.json and its rows by module; no figure is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_analyse, "draw_analysis", lambda *_: None)
        return analysed_anew(folder, *arguments)


def analysed_anew(folder, *arguments: str) -> tuple[dict, dict[str, dict]]:
    assert evaluate_command([f"run={folder}", "analyse=true", *arguments]) == 0
    content = json.loads((folder / "analysis.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    return content, {row["module"]: row for row in content["rows"]}


def base_weight(module: str) -> np.ndarray:
    weights = load_file(ROOT / "dual_lora/lab/model/bundled/tiny-llama/model.safetensors")
    return weights[f"{module}.weight"].astype(np.float64)


def adapter_weights(folder, module: str) -> dict[str, np.ndarray]:
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    return {name.partition(f"{module}.")[2]: value for name, value in weights.items() if f"{module}." in name}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_analysed_into_files_and_a_table(method, trained, capsys):
    content, rows = analysed_anew(trained[method])
    roles = ROLES | {"o", "gate"} if method == "full" else ROLES
    assert {row["role"] for row in rows.values()} == roles
    assert [row["layer"] for row in rows.values() if row["role"] == "q"] == [0, 1, 2]
    csv = pd.read_csv(trained[method] / "analysis.csv")
    assert list(csv["module"]) == list(rows) and len(rows) == 3 * len(roles)
    assert {"overall_rank", "overall_rank_null", "overall_rank_0.01", "zeros_null", "signs_flipped"} <= set(csv)
    for row in rows.values():
        full = min(row["out"], row["in"])
        for part in content["labels"]:
            for null in ("", "_null"):
                assert 1 <= row[f"{part}_stable_rank{null}"] <= row[f"{part}_rank{null}"] <= full
        assert row["overall_stable_rank"] != row["overall_stable_rank_null"]
        assert row["relative_size"] > 0 and row["cosine"] is None
    assert (trained[method] / "ranks.png").stat().st_size > 5000
    assert (trained[method] / "stable_ranks.png").stat().st_size > 5000
    assert (trained[method] / "histograms.pdf").is_file() == (method == "dual_lora")
    assert (trained[method] / "ranks.pdf").read_bytes().startswith(b"%PDF")
    said = capsys.readouterr().out
    assert "trained | null" in said and content["null"] in said and "analysed: " in said


def test_dual_lora_rows_are_those_of_numpy(trained):
    content, rows = analysed(trained["dual_lora"])
    row, weights = rows[Q0], adapter_weights(trained["dual_lora"], Q0)
    four = [next(v for k, v in weights.items() if k.rpartition(".")[2] == name) for name in "ABCD"]
    assert row["ranks"] == "8+8" and content["update_scale"] == 1
    by_hand = by_numpy(*four, scale=16 / 8)
    for part, W in by_hand.items():
        stable, effective = soft_ranks(W)
        assert row[f"{part}_stable_rank"] == pytest.approx(stable, rel=1e-3)
        assert row[f"{part}_effective_rank"] == pytest.approx(effective, rel=1e-3)
    size = np.linalg.norm(by_hand["overall"]) / np.linalg.norm(base_weight(Q0))
    assert row["relative_size"] == pytest.approx(size, rel=1e-4)
    assert row["zeros"] == pytest.approx((by_hand["overall"] == 0).mean(), abs=1e-3)
    nulls = [r["relative_size_null"] * np.linalg.norm(base_weight(m)) / math.sqrt(r["out"]) for m, r in rows.items()]
    assert np.median(nulls) == pytest.approx(0.02, rel=0.1)  # the rule of `init_std`, at full scale


def test_lora_is_of_its_rank_and_dora_is_more_than_its_product(trained):
    _, lora = analysed(trained["lora"])
    _, dora = analysed(trained["dora"])
    for row in lora.values():
        assert (row["ranks"], row["overall_rank"], row["overall_rank_null"]) == ("16", 16, 16)
        assert row["relative_size_null"] is None and row["signs_flipped"] is None
    weights = adapter_weights(trained["lora"], Q0)
    BA = weights["lora_B.weight"].astype(np.float64) @ weights["lora_A.weight"]
    assert lora[Q0]["relative_size"] == pytest.approx(np.linalg.norm(BA) / np.linalg.norm(base_weight(Q0)), rel=1e-4)
    assert lora[Q0]["overall_effective_rank"] == pytest.approx(soft_ranks(BA)[1], rel=1e-4)
    for row in dora.values():
        assert (row["product_rank"], row["product_rank_null"]) == (16, 16) and row["overall_rank"] > 16
        assert row["relative_size_null"] == pytest.approx(row["relative_size"], rel=0.5)
    weights, W0 = adapter_weights(trained["dora"], Q0), base_weight(Q0)
    adapted = W0 + weights["lora_B.weight"].astype(np.float64) @ weights["lora_A.weight"]
    magnitude = next(v for k, v in weights.items() if "magnitude" in k).reshape(-1, 1)
    dW = magnitude * adapted / np.linalg.norm(adapted, axis=1, keepdims=True) - W0
    assert dora[Q0]["overall_stable_rank"] == pytest.approx(soft_ranks(dW)[0], rel=1e-3)
    assert dora[Q0]["relative_size"] == pytest.approx(np.linalg.norm(dW) / np.linalg.norm(W0), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_two_analyses_are_identical_byte_for_byte(method, trained):
    kept = []
    for seed in (1, 2):  # whatever was drawn before
        torch.manual_seed(seed)
        analysed_anew(trained[method])
        kept.append([(trained[method] / f).read_bytes() for f in ("analysis.json", "analysis.csv", "ranks.png")])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_agrees_with_itself_and_its_null_does_not(method, trained):
    content, rows = analysed(trained[method], f"against={trained[method]}")
    digest = json.loads((trained[method] / "result.json").read_text())["digest"]
    assert content["against"] == trained[method].name and content["digests"] == {content["against"]: digest}
    for row in rows.values():
        assert row["cosine"] == pytest.approx(1) and row["sign_agreement"] == 1
        assert abs(row["cosine_null"]) < 0.2 and row["sign_agreement_null"] == pytest.approx(0.5, abs=0.1)


def test_likeness_to_full_tuning_is_that_of_numpy(trained):
    _, lora = analysed(trained["lora"], f"against={trained['full']}")
    _, full = analysed(trained["full"], f"against={trained['lora']}")
    weights = adapter_weights(trained["lora"], Q0)
    BA = weights["lora_B.weight"].astype(np.float64) @ weights["lora_A.weight"]
    dW = load_file(trained["full"] / "model/model.safetensors")[f"{Q0}.weight"].astype(np.float64) - base_weight(Q0)
    cosine = (BA * dW).sum() / np.linalg.norm(BA) / np.linalg.norm(dW)
    assert lora[Q0]["cosine"] == pytest.approx(cosine, rel=1e-4) == full[Q0]["cosine"]
    assert cosine > 0.05  # both descend the same loss
    assert full["model.layers.0.self_attn.o_proj"]["cosine"] is None  # which LoRA did not adapt
    assert full[Q0]["relative_size"] == pytest.approx(np.linalg.norm(dW) / np.linalg.norm(base_weight(Q0)), rel=1e-4)


def test_a_run_that_moved_nothing_has_exactly_the_factors_its_seed_draws(runs_folder, monkeypatch):
    load, drawn = load_model, iter(range(1, 99))

    def load_and_draw(*arguments):
        torch.rand(next(drawn))  # a fresh head would draw too; how much must not matter
        return load(*arguments)

    monkeypatch.setattr("dual_lora.lab.model.adapt.load_model", load_and_draw)
    folder = train("method=dual_lora", "train.lr=1e-30", "seed=3")
    first = draw_initial_factors(load_recorded_settings(folder))
    weights = adapter_weights(folder, Q0)
    for name in "ABCD":
        stored = next(v for k, v in weights.items() if k.rpartition(".")[2] == name)
        assert np.array_equal(stored, getattr(first[Q0], name).detach().numpy())
    content, rows = analysed(folder)
    assert content["beginning"]["rebuilt"] and content["beginning"]["least_cosine"] == pytest.approx(1)
    assert {row["signs_flipped"] for row in rows.values()} == {0}


def test_signs_flipped_are_reported_only_where_the_beginning_is_known(trained, tmp_path, capsys, monkeypatch):
    _, rows = analysed(trained["dual_lora"])
    assert all(0 < row["signs_flipped"] < 0.2 for row in rows.values())
    other = shutil.copytree(trained["dual_lora"], tmp_path / "run")
    stored = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(stored | {"seed": 1}))
    monkeypatch.setattr("dual_lora.lab.record.record.Record.verify_files", lambda *names: None)  # as of one not sealed
    capsys.readouterr()
    content, rows = analysed(other)
    assert {row["signs_flipped"] for row in rows.values()} == {None}
    assert not content["beginning"]["rebuilt"] and content["beginning"]["least_over_chance"] < MIN_DEVIATIONS
    assert "Signs flipped: unknown, because the factors redrawn from the seed do not match" in capsys.readouterr().out


def attached(method: str, *overrides: str):
    """Return settings, tiny-gpt2, whose linear layers keep their weights in x out, and another with random factors."""
    chosen = load_settings(["model=tiny-gpt2", "task=demo/choice", f"method={method}", *overrides])
    task = tasks.load(chosen.task.name)
    base, _ = load_model(chosen, task)
    torch.manual_seed(0)
    model = attach_method(base, chosen, task.form)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "magnitude" in name:
            parameter.data *= 1.1
    for dual in list_factors(model):
        dual.set_update_scale(0.5, ramp=False)
    return chosen, load_model(chosen, task)[0], model


FUSED = "+method.peft.fused_slices={c_attn: [3, [0, 2]]}"


@pytest.mark.parametrize("case", [("dual_lora",), ("dual_lora", FUSED), ("lora",), ("dora",)])
def test_dw_is_what_merging_adds_also_in_transposed_and_fused_layers(case):
    chosen, base, model = attached(*case)
    found = list(list_adapter_updates(model, base, chosen))
    before = {u.name: u.get_weight().clone() for u in found}
    changes = {u.name: u.get_change().clone() for u in found}
    nulls = {u.name: u.draw_null("cpu")[0] for u in found}
    fused = {n.partition("c_attn")[2] for n in changes if "c_attn" in n}
    assert fused == ({"[0]", "[2]"} if FUSED in case else {""})
    model.merge_adapter()
    for update in found:
        assert update.get_weight().shape == changes[update.name].shape == nulls[update.name].shape
        torch.testing.assert_close(
            update.get_weight() - before[update.name], changes[update.name], atol=1e-6, rtol=1e-3
        )
        assert changes[update.name].any()
    some = next(u for u in found if "c_attn" in u.name)
    assert some.get_weight().shape == ((128, 128) if FUSED in case else (384, 128))
    assert find_role(some.module, chosen) == "q/k/v"


@pytest.mark.parametrize("method", ["dual_lora", "lora", "dora"])
def test_a_null_is_drawn_by_its_module_alone(method):
    chosen, base, model = attached(method)
    first, second = [u for u in list_adapter_updates(model, base, chosen) if "c_attn" in u.name][:2]
    nulls = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nulls.append(first.draw_null("cpu")[0])
        state = torch.get_rng_state()
        assert torch.equal(state, torch.manual_seed(seed).get_state())
    assert torch.equal(*nulls)
    assert abs(analysis.compute_cosine(nulls[0], second.draw_null("cpu")[0])) < 0.1


def test_a_method_that_cannot_be_merged_is_not_analysed():
    chosen = load_settings(["model=tiny-llama", "task=demo/restaurants"])
    bare, base = (load_model(chosen, tasks.load(chosen.task.name))[0] for _ in range(2))
    model = get_peft_model(base, LilyConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"dual_lora \(LILY\): cannot be merged .* so its dW is not known"):
        list(list_adapter_updates(model, bare, chosen))


def analysed_run(name: str, rank: int) -> AnalysedRun:
    frame = pd.DataFrame({"layer": [0, 1], "role": "q", "out": 40, "in": 50})
    frame = frame.assign(overall_rank=rank, overall_rank_null=30)
    return AnalysedRun(name, "dual_lora", {"overall": "dW"}, frame)


def test_runs_stand_beside_one_null_as_shares_of_the_full_rank():
    axes = Figure().subplots()
    runs = [analysed_run("trained", 20), analysed_run("untrained", 10)]
    draw_own_ranks(axes, runs, "overall", "rank", ("q", 40, 50))
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn == {"trained": [0.5, 0.5], "untrained": [0.25, 0.25], "random factors, dual_lora": [0.75, 0.75]}


def test_every_value_lies_within_its_axis(trained, tmp_path, monkeypatch):
    content, _ = analysed(trained["dual_lora"])
    drawn = []
    monkeypatch.setattr(present_rank_figure, "save_figure", lambda figure, *_: drawn.append(figure) or [tmp_path])
    run = AnalysedRun("run", "dual_lora", content["labels"], drop_histograms(content["rows"]))
    draw_ranks([run], tmp_path, "stable_rank")
    for axes in drawn[0].axes:
        assert max(max(line.get_ydata()) for line in axes.get_lines()) <= axes.get_ylim()[1]


def test_published_ranks_and_their_null_are_shares_of_4096_also_those_not_told_by_layer():
    axes = Figure().subplots()
    draw_published_ranks(axes, "overall")
    drawn = {line.get_label(): line for line in axes.get_lines()}
    published = drawn["published: LLaMA2-7B, 4096 x 4096 (digitized)"]
    assert list(published.get_xdata())[0] == 0 and list(published.get_ydata())[0] == 4003 / 4096
    assert set(drawn["published, rank of LoRA's update: LLaMA2-7B, 4096 x 4096 (digitized)"].get_ydata()) == {32 / 4096}
    assert drawn["random factors, 4096 x 4096, r1 = r2 = 16 (own)"].get_ydata()[0] == 4077 / 4096
    assert read_published_ranks("magnitude")[1] == (3550 / 4096, 3604 / 4096)


def test_histograms_are_drawn_of_dual_lora_alone(trained, tmp_path):
    content, _ = analysed(trained["dual_lora"])
    assert draw_histograms(content, tmp_path).stat().st_size > 5000
    content, _ = analysed(trained["lora"])
    assert draw_histograms(content, tmp_path) is None


def test_what_cannot_be_analysed_is_refused_in_one_line(trained, runs_folder, tmp_path):
    run, lora = f"run={trained['dual_lora']}", trained["lora"]
    other_model = train("model=tiny-roberta", "task=demo/sentiment", "method=lora")
    unfinished = shutil.copytree(lora, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    only_o = train("method=lora", "model.adapt=[o]")
    broken = shutil.copytree(lora, tmp_path / "broken")
    (broken / "adapter/adapter_model.safetensors").write_bytes(b"nothing")
    gone = shutil.copytree(trained["full"], tmp_path / "gone")
    shutil.rmtree(gone / "model")
    for arguments, message in (
        ([run, "analyse=yes"], "analyse=yes: must be true or false"),
        ([run, f"against={lora}"], "against: only with analyse=true"),
        ([run, "analyse=false", f"against={lora}"], "against: only with analyse=true"),
        ([run, "analyse=True", "eval.batch_size=2"], "eval.batch_size: analyse=true scores no rows; drop it"),
        ([run, "analyse=true", f"export={tmp_path / 'out'}"], "analyse=true and export=DIR: one at a time"),
        ([run, "analyse=true", "eval.batch_size=2"], "eval.batch_size: analyse=true scores no rows; drop it"),
        ([run, "analyse=true", "save_updates=x.safetensors"], "analyse=true and save_updates=FILE: one at a time"),
        ([run, f"save_updates={tmp_path / 'updates.npz'}"], "give a name that ends in .safetensors"),
        ([f"run={unfinished}", f"save_updates={tmp_path / 'a.safetensors'}"], "run=.*: not finished"),
        ([run, "analise=true"], "analise: no such setting of .* Did you mean analyse?"),
        (["run=/nowhere", "analyse=true"], "run=/nowhere: no config.yaml there"),
        ([run, "analyse=true", "against=/nowhere"], "against=/nowhere: no config.yaml there"),
        ([f"run={unfinished}", "analyse=true"], "run=.*: not finished"),
        ([run, "analyse=true", f"against={unfinished}"], "against=.*: not finished"),
        ([run, "analyse=true", f"against={other_model}"], "its model is tiny-roberta, this run's is tiny-llama"),
        ([run, "analyse=true", f"against={only_o}"], "changed none of the weights that this run changed"),
        ([f"run={broken}", "analyse=true"], "adapter: cannot be loaded"),
        ([f"run={gone}", "analyse=true"], "model: cannot be loaded"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            evaluate_command(arguments)
        assert "\n" not in str(caught.value)


def check_saved_updates(run: Path, model: str, tmp_path: Path) -> dict[str, np.ndarray]:
    """Hold the saved updates of a run against exported minus original weights, all of them; return them."""
    file, folder = tmp_path / "new/updates.safetensors", tmp_path / "export"
    for words in (f"save_updates={file}", f"export={folder}"):
        assert evaluate_command([f"run={run}", words]) == 0
    bundled = ROOT / f"dual_lora/lab/model/bundled/{model}/model.safetensors"
    exported, base, saved = load_file(folder / "model.safetensors"), load_file(bundled), load_file(file)
    changed = {name for name, weight in base.items() if name in exported and (exported[name] != weight).any()}
    assert {name if name in base else f"{name}.weight" for name in saved} == changed
    for name, change in saved.items():
        weight = name if name in base else f"{name}.weight"
        difference = exported[weight] - base[weight].astype(np.float32)
        turned = difference.T if re.search(r"embed|wte|wpe|c_attn|c_proj|c_fc", name) else difference
        assert np.allclose(change, turned, atol=1e-6), name
    return saved


@pytest.mark.parametrize("method", ["dual_lora", "lora", "full"])
def test_saved_updates_are_what_an_export_adds_to_the_base(trained, tmp_path, method, capsys):
    saved = check_saved_updates(trained[method], "tiny-llama", tmp_path)
    file = tmp_path / "new/updates.safetensors"
    assert str(file) in capsys.readouterr().out
    vectors = {name for name, change in saved.items() if change.ndim == 1}
    assert bool(vectors) == (method == "full") and all(name.endswith("norm") for name in vectors)
    with pytest.raises(UserError, match="exists; give a new name"):
        evaluate_command([f"run={trained[method]}", f"save_updates={file}"])


@pytest.mark.parametrize(
    ("model", "method", "more", "beside"),
    [
        (
            "tiny-llama",
            "lora",
            "+method.peft.modules_to_save=[embed_tokens,norm]",
            {"model.embed_tokens", "model.norm"},
        ),
        (
            "tiny-gpt2",
            "dual_lora",
            "+method.peft.modules_to_save=[ln_f]",
            {"transformer.ln_f", "transformer.ln_f.bias"},
        ),
        ("tiny-gpt2", "lora", "+method.peft.bias=all", {"transformer.ln_f.bias", "transformer.h.0.attn.c_proj.bias"}),
    ],
)
def test_what_trains_beside_an_adapter_is_among_the_saved_updates(model, method, more, beside, runs_folder, tmp_path):
    run = train(f"model={model}", f"method={method}", "train.lr=0.01", more)
    assert beside <= check_saved_updates(run, model, tmp_path).keys()
    rates = json.loads((run / "result.json").read_text())["learning_rates"]
    assert rates == {"adapter": 0.01, "weights": 0.01}
