"""The studies of analysis/: targets of known structure, fits, teachers and students, rows that survive a crash."""

import json
import sys
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from dual_lora.analysis import fit, targets, teacher
from dual_lora.analysis.cells.averages import choose_rate, estimate_mean
from dual_lora.analysis.cells.report import format_average
from dual_lora.analysis.cells.rows import (
    StudyError,
    append_row,
    hash_package,
    hash_row,
    hold_file,
    read_rows,
    run_missing,
    select_rows,
)

SMALL = fit.plan_cells("smoke")
STUDENT = teacher.plan_cells("smoke")[0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(kind: str, out: int = 20, fan_in: int = 30) -> np.ndarray:
    return targets.draw_update(kind, out, fan_in, generator()).double().numpy()


@pytest.mark.parametrize("kind", ["gaussian", "rank_3", "power_0.5", "signs", "relu_signs", "sign_rank_2", "dual_3"])
def test_a_target_has_size_one_and_is_the_generators_alone(kind):
    update = drawn(kind)
    assert update.shape == (20, 30) and (update**2).mean() == pytest.approx(1, rel=1e-5)
    torch.rand(3)
    assert np.array_equal(update, drawn(kind))
    assert not np.array_equal(update, targets.draw_update(kind, 20, 30, generator(1)).numpy())


def test_a_study_without_the_libraries_of_its_report_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(SystemExit, match=r"error: the report needs scipy; .*\.\[analysis\]"):
        fit.main(["--out", str(tmp_path / "rows.jsonl"), "--size", "smoke"])
    assert not list(tmp_path.iterdir())


def test_targets_have_the_structure_they_are_named_for():
    assert np.linalg.matrix_rank(drawn("rank_3"), tol=1e-4) == 3
    s = np.linalg.svd(drawn("power_0.5"), compute_uv=False)
    assert s / s[0] == pytest.approx(np.arange(1, 21) ** -0.5, rel=1e-4)
    for kind in ("signs", "sign_rank_2"):
        assert np.abs(drawn(kind)) == pytest.approx(1)
    for kind in ("relu_signs", "dual_3"):
        assert (drawn(kind) == 0).mean() == pytest.approx(0.5, abs=0.1)
    assert np.linalg.matrix_rank(drawn("signs")) == 20
    # Signs of rank 2 are a half-plane's for each row, so that any two rows differ in two runs around the circle.
    assert stats.entropy(np.linalg.svd(drawn("sign_rank_2"), compute_uv=False) ** 2) < 2.0


@pytest.mark.parametrize("kind", ["gauss", "rank_", "rank_0", "rank_x", "rank", "signs_4"])
def test_an_unknown_target_is_refused(kind):
    with pytest.raises(ValueError, match=f"target '{kind}': expected one of gaussian, .*rank_NUMBER"):
        drawn(kind)


def test_an_update_of_nothing_cannot_be_scaled():
    for update in (torch.zeros(2, 2), torch.tensor([[1.0, float("nan")]])):
        with pytest.raises(ValueError, match="finite and not 0"):
            targets.normalize_update(update)


def start(method: str, r: int = 4) -> list[torch.Tensor]:
    return fit.draw_factors(fit.METHODS[method], 10, 14, r, generator())


@pytest.mark.parametrize("method", fit.METHODS)
def test_every_method_has_the_budget_it_is_named_for(method):
    double = 2 if method.endswith("double") else 1
    assert sum(factor.numel() for factor in start(method)) == 4 * (10 + 14) * double
    form = fit.compute_form(fit.METHODS[method], fit.METHODS[method].stages[0], start(method))
    assert form.shape == (10, 14)
    size = form.square().mean().sqrt().item()
    assert size == 0 if fit.METHODS[method].start == "zero" else 0.005 < size < 0.06


def test_forms_are_those_of_numpy():
    A, B, C, D = (f.detach().double().numpy() * 9 for f in start("dual_lora"))
    expected = {
        "hadamard": (B @ A) * (D @ C),
        "loha": (B @ A) * (D @ C),
        "relu_tanh": np.maximum(B @ A, 0) * np.tanh(D @ C),
        "dual_lora": np.maximum(B @ A, 0) * np.where(D @ C > 0, 1, -1),
        "dual_annealed": np.maximum(B @ A, 0) * np.where(D @ C > 0, 1, -1),
    }
    factors = [torch.tensor(f) for f in (A, B, C, D)]
    for name, form in expected.items():
        method = fit.METHODS[name]
        assert fit.compute_form(method, method.stages[-1], factors).numpy() == pytest.approx(form)
    assert fit.compute_form(fit.METHODS["lora"], fit.Stage("identity"), factors[:2]).numpy() == pytest.approx(B @ A)
    steep = fit.compute_form(fit.METHODS["relu_tanh"], fit.Stage("tanh", 3.0), factors).numpy()
    assert steep == pytest.approx(np.maximum(B @ A, 0) * np.tanh(3 * D @ C))


def test_the_unexplained_share():
    target = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert (
        fit.compute_unexplained_share(torch.zeros(2, 2), target) == 1
        and fit.compute_unexplained_share(target, target) == 0
    )
    assert fit.compute_unexplained_share(torch.diag(torch.tensor([0.0, 4.0])), target).item() == pytest.approx(9 / 25)
    assert fit.compute_svd_optimum(target, 1) == pytest.approx(9 / 25) and fit.compute_svd_optimum(target, 2) == 0


def small_cell(**changes) -> fit.Cell:
    return replace(SMALL[0], rate=0.1, max_steps=5000, **changes)


@pytest.mark.parametrize("target", ["gaussian", "power_1"])
def test_trained_lora_reaches_the_optimum_of_svd(target):
    result = fit.run_cell(small_cell(target=target, method="lora"))
    assert result["converged"] and result["unexplained"] == pytest.approx(result["svd"], abs=2e-3)
    assert result["unexplained"] >= result["svd"] - 1e-6


def test_a_fit_of_its_own_rank_ends_early_with_nothing_left():
    result = fit.run_cell(small_cell(target="rank_4", method="lora"))
    assert result["converged"] and result["unexplained"] < fit.EXPLAINED and result["steps"] < 5000
    assert not fit.run_cell(replace(small_cell(target="rank_4", method="lora"), max_steps=5))["converged"]


def test_dual_lora_fits_structured_signs_better_and_a_dense_matrix_worse_than_lora():
    def left(target, method):
        cell = replace(SMALL[0], n=32, r=8, max_steps=3000, rate=0.1, target=target, method=method)
        return fit.run_cell(cell)["unexplained"]

    assert left("sign_rank_2", "dual_lora") < 0.02 < left("sign_rank_2", "lora")
    assert left("gaussian", "dual_lora") > left("gaussian", "lora") + 0.1


@pytest.mark.parametrize("method", ["lora", "loha", "dual_lora", "dual_annealed"])
def test_the_same_fit_gives_the_same_bits_whatever_was_drawn_before(method):
    cell = replace(SMALL[0], method=method)
    first = fit.run_cell(cell)
    torch.rand(5)
    again = fit.run_cell(cell)
    assert again == first and again is not first  # computed anew
    assert fit.run_cell(replace(cell, seed=1)) != first


def test_matrices_of_a_file_are_targets(tmp_path):
    path, other = tmp_path / "updates.safetensors", tmp_path / "other.safetensors"
    low_rank = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 10))
    save_file({"b": low_rank, "a": torch.eye(6, 9, dtype=torch.float16), "bias": torch.ones(9)}, path)
    planned = fit.plan_cells("smoke", path)
    assert list(dict.fromkeys(cell.target for cell in planned)) == ["a", "b"] and planned[0].n is None
    assert {cell.target for cell in fit.plan_cells("smoke", path, ["b"])} == {"b"}
    with pytest.raises(StudyError, match="target c: not among a, b"):
        fit.plan_cells("smoke", path, ["c"])
    fitted = fit.run_cell(replace(planned[0], target="b", rate=0.1, max_steps=3000), path)
    assert fitted["svd"] < 1e-10 and fitted["unexplained"] < 1e-4
    assert fit.run_cell(planned[0], path)["svd"] == pytest.approx(2 / 6)  # rank 4 of six equal singular values
    save_file({"b": low_rank + 1}, other)
    with pytest.raises(StudyError, match="target a: the cell was planned for another file"):
        fit.run_cell(planned[0], other)


def test_titles_of_matrices_leave_out_what_their_names_share():
    assert fit.name_targets(["h.1.q", "h.12.q"]) == {"h.1.q": "1.q", "h.12.q": "12.q"}
    assert fit.name_targets(["h.1.q"]) == {"h.1.q": "h.1.q"}
    assert fit.name_targets(["gaussian", "rank_16"]) == {"gaussian": "dense Gaussian", "rank_16": "rank 16"}


def test_files_without_a_usable_matrix_are_refused(tmp_path):
    contents = {"bias": torch.ones(3)}, {"w": torch.zeros(2, 2)}, {"w": torch.full((2, 2), float("inf"))}
    for number, (content, message) in enumerate(
        zip(contents, ("holds no matrix", "w is 0 or not finite", "w is 0 or not finite"), strict=True)
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(content, path)
        with pytest.raises(StudyError, match=message):
            fit.plan_cells("smoke", path)
    (tmp_path / "damaged").write_bytes(b"no tensors")
    for name in ("damaged", "missing"):
        with pytest.raises(SystemExit, match=f"error: .*{name}: cannot be read"):
            fit.main(["--out", str(tmp_path / "rows.jsonl"), "--updates", str(tmp_path / name)])


@dataclass(frozen=True)
class Square:
    number: int
    rate: float = 1.0


def run_squares(path, *numbers: int) -> list[int]:
    planned = [Square(n) for n in numbers]
    return [row["cell"]["number"] for row in run_missing(planned, lambda c: {"square": c.number**2}, path)]


def test_a_study_resumes_cell_by_cell(tmp_path):
    path = tmp_path / "folder/rows.jsonl"
    assert run_squares(path, 1, 2) == [1, 2] and run_squares(path, 1, 2, 3) == [3]
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # a crash in the middle of a line
    assert [row["result"]["square"] for row in read_rows(path)] == [1, 4]
    assert run_squares(path, 1, 2, 3) == [3]
    rows = read_rows(path)
    assert [row["result"] for row in rows] == [json.loads(line)["result"] for line in whole.splitlines()]
    assert rows[0]["torch"] == torch.__version__ and rows[0]["threads"] == torch.get_num_threads()
    assert {row["code"] for row in rows} == {hash_package()}
    assert select_rows(rows, [Square(3), Square(7), Square(1)]) == [rows[2], rows[0]]


def test_a_damaged_line_and_a_second_process_are_told_in_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    run_squares(path, 1, 2)
    with hold_file(path), pytest.raises(StudyError, match="another process writes to it"):
        run_squares(path, 3)
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0][:20]}\n{lines[1]}\n")
    with pytest.raises(StudyError, match=r"rows.jsonl, line 1: damaged; remove the line"):
        run_squares(path, 1)


@pytest.mark.parametrize(
    "words", [["--report", "{here}/file"], ["--report", "{here}/file/below"], ["--out", "{here}/file/rows"]]
)
def test_a_place_that_cannot_be_written_is_told_before_any_cell_runs(words, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(fit, "run_cell", lambda cell: pytest.fail("ran"))
    words = ["--out", str(tmp_path / "rows"), "--size", "smoke", *(word.format(here=tmp_path) for word in words)]
    with pytest.raises(SystemExit, match=f"error: .*{tmp_path / 'file'}") as error:
        fit.main(words)
    assert "\n" not in str(error.value)


def scored(rate: float, seed: int, score: float) -> dict:
    return {"cell": {"rate": rate, "seed": seed}, "result": {"score": score}}


def test_the_rate_with_the_least_mean_is_chosen_and_an_edge_is_told():
    def chosen(*means):
        rows = [scored(rate, seed, mean + seed / 100) for rate, mean in enumerate(means) for seed in (0, 1)]
        return choose_rate(reversed(rows), "score")

    assert chosen(0.3, 0.1, 0.2) == (1, False)
    assert chosen(0.1, 0.2, 0.3) == (0, True) and chosen(0.3, 0.2, 0.1) == (2, True)
    assert chosen(0.3, 0.2, 0.199) == (2, False) and chosen(0.1) == (0, False)
    assert chosen(float("nan"), 0.2, 0.3) == (1, False) and chosen(0.3, 0.2, float("nan")) == (1, False)
    with pytest.raises(StudyError, match="fewer seeds"):
        choose_rate([scored(1, 0, 0.1), scored(1, 1, 0.1), scored(2, 0, 0.1)], "score")


def test_an_average_has_the_t_interval():
    values = [1.0, 2.0, 4.0, 7.0]
    found, expected = estimate_mean(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((3.5, *expected))
    assert estimate_mean([2.0]) == {"mean": 2.0, "low": None, "high": None}
    assert estimate_mean([2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert format_average(estimate_mean([2.0])) == "2.000"
    assert format_average({"mean": 0.5, "low": 0.4, "high": 0.6}, 2) == "0.50 ± 0.10"


def test_fits_are_summarized_at_their_best_rate_and_paired_by_seed():
    left = {("lora", 1.0): (0.5, 0.7), ("lora", 2.0): (0.4, 0.6), ("dual_lora", 1.0): (0.3, 0.4)}
    left[("dual_lora", 2.0)] = (0.9, 0.9)
    rows = [
        {
            "cell": {"target": "t", "method": method, "rate": rate, "seed": seed},
            "result": {"unexplained": v, "svd": None, "converged": True, "steps": 9, "zeros": 0.0},
        }
        for (method, rate), values in left.items()
        for seed, v in enumerate(values)
    ]
    lora, dual = fit.summarize_rows(rows[::-1])[::-1]
    assert (lora["rate"], lora["values"], lora["mean"]) == (2.0, [0.4, 0.6], pytest.approx(0.5))
    assert (dual["rate"], dual["dual_minus"]) == (1.0, None)
    assert lora["dual_minus"]["mean"] == pytest.approx(-0.15)


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    """A base, what is planted in it and its teacher, as in a cell."""
    base = teacher.build_base(STUDENT, generator())
    planted = teacher.plant_updates(base, "rank_2", 0.25, generator(1))
    return SimpleNamespace(base=base, planted=planted, taught=teacher.build_teacher(base, planted))


def test_a_teacher_is_its_base_with_updates_of_a_given_size(parts):
    taught = dict(parts.taught.named_parameters())
    assert len(taught) == 6 * STUDENT.layers == len(parts.planted)
    for name, weight in parts.base.named_parameters():
        assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.2)
        assert (parts.planted[name].norm() / weight.norm()).item() == pytest.approx(0.25)
        assert torch.linalg.matrix_rank(parts.planted[name], rtol=1e-4) == 2
        torch.testing.assert_close(taught[name] - weight, parts.planted[name], atol=1e-6, rtol=1e-4)


def test_the_teacher_itself_is_at_no_distance_and_the_base_at_one(parts):
    x, y, scale = teacher._draw_data(parts.base, parts.taught, STUDENT, generator(2))["function"]
    assert x.shape == y.shape == (STUDENT.held_out, STUDENT.length, STUDENT.width)
    for model, expected in ((parts.taught, 0), (parts.base, 1)):
        assert teacher._compute_unexplained(model, x, y, scale) == pytest.approx(expected, abs=1e-6)
        assert teacher._compute_distance(model, parts.base, parts.planted) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("student", teacher.STUDENTS)
def test_students_start_as_the_base_with_equal_budgets(student, parts):
    cell = replace(STUDENT, student=student)
    torch.manual_seed(0)
    model = teacher.attach_student(parts.base, cell)
    x = torch.randn(2, cell.length, cell.width, generator=generator())
    torch.testing.assert_close(model(x), parts.base(x), atol=1e-5, rtol=1e-5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = list(parts.base.parameters())
    budget = 4 * sum(sum(weight.shape) for weight in weights)
    extra = {"full": sum(w.numel() for w in weights) - budget, "dora": sum(len(w) for w in weights)}
    assert trained == budget + extra.get(student, 0)
    assert teacher._compute_distance(model, parts.base, parts.planted) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("student", teacher.STUDENTS)
def test_a_student_learns_and_the_same_student_gives_the_same_bits(student):
    cell = replace(STUDENT, student=student, steps=40, rate=3e-2 if student == "loha" else 1e-2, update="rank_2")
    state = torch.random.get_rng_state()
    first = teacher.run_cell(cell)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first["train"] < 0.85 and first["function"] < 0.99
    torch.rand(3)
    assert teacher.run_cell(cell) == first


def test_the_rate_of_a_student_is_the_validations_choice():
    def row(student, rate, validation, function):
        result = {"validation": validation, "function": function, "weights": 0.5, "train": 0.1, "parameters": 7}
        return {"cell": {"update": "u", "student": student, "rate": rate, "seed": 0}, "result": result}

    rows = [row("lora", 1.0, 0.2, 0.6), row("lora", 2.0, 0.3, 0.1), row("dual_lora", 1.0, 0.2, 0.4)]
    lora, dual = teacher.summarize_rows(rows)
    assert (lora["rate"], lora["at_edge"], lora["function"]["mean"]) == (1.0, True, 0.6)
    assert lora["dual_minus"]["mean"] == pytest.approx(-0.2) and dual["dual_minus"] is None


@pytest.mark.parametrize("study", [fit, teacher])
def test_a_study_runs_reports_and_does_not_run_again(study, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    study.main(["--out", str(out), "--size", "smoke"])
    rows = read_rows(out)
    assert [row["cell"] for row in rows] == [asdict(cell) for cell in study.plan_cells("smoke")]
    report = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert report["figure.png"].startswith(b"\x89PNG")
    names = fit.METHODS.values() if study is fit else teacher.STUDENTS.values()
    for name in names:
        assert getattr(name, "label", name) in report["table.md"].decode()
    capsys.readouterr()
    study.main(["--out", str(out), "--size", "smoke", "--report", str(tmp_path / "again")])
    assert f"0 of {len(rows)} cells to run" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == report
    with pytest.raises(StudyError, match="fewer seeds"):
        study.summarize_rows(rows[:-1])


@pytest.mark.parametrize("line", ["5", "[]", "{}", '{"cell": 1, "result": {}}', "{damaged"])
def test_a_damaged_line_of_a_study_of_cells_is_named(line, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"cell": {"seed": 0}, "result": {"error": 0.5}, "seconds": 1.0}
    append_row(file, row | {"digest": hash_row(row)})
    assert read_rows(file) == [row | {"digest": hash_row(row)}]
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(StudyError, match="rows.jsonl, line 2: damaged; remove the line"):
        read_rows(file)


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
