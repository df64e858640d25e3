"""How well does a method's form fit a known weight update? Gradient descent on the update itself, without any data.

    unexplained = ||dW - form(factors)||_F^2 / ||dW||_F^2          0: fitted exactly, 1: nothing fitted

    python -m dual_lora.analysis.fit --out runs/fit/rows.jsonl [--updates FILE.safetensors [--targets NAME...]]
    python -m dual_lora.analysis.fit --out ROWS --rows-only        the report from only the rows, without FILE

Every method has r (out + in) parameters, the budget of LoRA of rank r, except those called "double":

    lora              B A                        A: r x in, B: out x r; starts at B = 0; its optimum is known by SVD
    loha              B A ⊙ D C                  each of rank r / 2; starts as PEFT's LoHa does, at 0
    hadamard          B A ⊙ D C                  the same form, all factors Gaussian at the start
    relu_tanh         ReLU(B A) ⊙ tanh(D C)      Dual LoRA with a smooth direction
    dual_lora         ReLU(B A) ⊙ Sign(D C)      arXiv 2512.03402, with its straight-through gradient
    dual_annealed     the same form, from the optimum of relu_tanh, whose tanh is made steeper in stages first: tells
                      what the form can express from what the straight-through gradient finds
    lora_double, dual_lora_double: rank 2 r, r1 = r2 = r, twice the parameters

A target has a root mean square of 1; a Gaussian start has 0.02, by the rule of `init_std`. The loss is the unexplained
share, whose gradient is so small that Sign's clip never acts. The optimizer is Adam with epsilon 1e-12, since the
gradients of C and D are far below the usual 1e-8. Whenever the least loss so far has not fallen by 0.1 % within 200
steps, the rate is multiplied by 0.1. A fit has converged the third time that this happens, or at a loss below 1e-6. Of
several stages, the last one's least loss counts.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..functional import delta_weight, init_std
from .cells.averages import choose_rate, estimate_difference, estimate_mean, select_rate
from .cells.command import create_parser, run_command
from .cells.report import describe_rows, format_average, format_rate, format_table, write_dot_report
from .cells.rows import StudyError, group_rows, hash_file, read_rows
from .targets import draw_update, normalize_update

EXPLAINED = 1e-6  # a loss below this is a perfect fit
# The rate is multiplied by CUT, at most CUTS times, when WINDOW steps have not lowered the loss by the share PROGRESS.
WINDOW, PROGRESS, CUT, CUTS = 200, 1e-3, 0.1, 2


@dataclass(frozen=True)
class Cell:
    """One fit.

    target: as in `draw_update`, or the name of a matrix in the file `updates`, whose SHA-256 is `digest`; n: width of a
    drawn target, n x n; r: the budget; max_steps: of each stage; seed: of a drawn target and of the start.
    """

    target: str
    method: str
    rate: float
    seed: int
    n: int | None
    r: int
    max_steps: int
    digest: str | None = None


@dataclass(frozen=True)
class Stage:
    """A part of a fit: the direction's function, and the factors by which D and the rate are multiplied."""

    direction: str
    steepness: float = 1.0
    rate: float = 1.0


@dataclass(frozen=True)
class Method:
    """A form with its parameter budget (1: LoRA of rank r) and its start; magnitude "none" is LoRA, with one pair;
    rates: None for those of the study."""

    label: str
    magnitude: str
    stages: tuple[Stage, ...] = (Stage("identity"),)
    start: str = "gaussian"
    budget: int = 1
    rates: tuple[float, ...] | None = None


STEEPER = (Stage("tanh"), Stage("tanh", 4.0, 0.3), Stage("tanh", 16.0, 0.3), Stage("sign", 1.0, 0.3))
METHODS = {
    "lora": Method("LoRA", "none", start="zero"),
    "loha": Method("LoHa", "identity", start="zero"),
    "hadamard": Method("Hadamard BA⊙DC", "identity"),
    "relu_tanh": Method("ReLU⊙tanh", "relu", (Stage("tanh"),)),
    "dual_lora": Method("Dual LoRA", "relu", (Stage("sign"),)),
    "dual_annealed": Method("Dual LoRA, annealed", "relu", STEEPER, rates=(0.1,)),
    "lora_double": Method("LoRA, 2r", "none", start="zero", budget=2),
    "dual_lora_double": Method("Dual LoRA, 2r", "relu", (Stage("sign"),), budget=2),
}
OURS = {1: "dual_lora", 2: "dual_lora_double"}  # what the others are compared with, by budget
TARGETS = {
    "gaussian": "dense Gaussian",
    "rank_16": "rank 16",
    "rank_64": "rank 64",
    "power_0.5": "power law 1/2",
    "power_1": "power law 1",
    "signs": "random signs",
    "relu_signs": "ReLU⊙signs",
    "sign_rank_8": "signs, rank 8",
    "dual_8": "a Dual LoRA",
}
RATES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SIZES = {
    "full": {"n": 128, "r": 16, "max_steps": 20_000, "rates": RATES, "seeds": range(5), "targets": TARGETS},
    "smoke": {
        "n": 12,
        "r": 4,
        "max_steps": 30,
        "rates": (1e-2, 1e-1),
        "seeds": range(2),
        "targets": ("gaussian", "dual_2"),
    },
}


def plan_cells(size: str = "full", updates: Path | None = None, targets: Sequence[str] | None = None) -> list[Cell]:
    """Return the cells of a study, seed by seed.

    updates: a safetensors file whose matrices are the targets in place of the drawn ones; targets: those to fit.

    Raises:
        KeyError: an unknown size.
        StudyError: as `read_updates` does, or for an unknown target.
    """
    chosen = SIZES[size]
    names, n, digest = list(chosen["targets"]), chosen["n"], None
    if updates is not None:
        names, n, digest = list(read_updates(updates)), None, _hash_updates(updates)
    if unknown := [target for target in targets or () if target not in names]:
        raise StudyError(f"target {unknown[0]}: not among {', '.join(names)}")
    names = list(dict.fromkeys(targets or names))  # a target given twice would count as two seeds
    return [
        Cell(target, method, rate, seed, n, chosen["r"], chosen["max_steps"], digest)
        for seed in chosen["seeds"]
        for target in names
        for method in METHODS
        for rate in METHODS[method].rates or chosen["rates"]
    ]


def read_cells(path: Path) -> list[Cell]:
    """Return the cells that a file of rows holds, each once, in its order.

    Raises:
        StudyError: they are not those of one complete study.
    """
    try:
        cells = list(dict.fromkeys(Cell(**row["cell"]) for row in read_rows(path)))
    except TypeError as error:
        raise StudyError(f"{path}: holds rows of another study than this one ({error})") from error
    studies = {(cell.n, cell.r, cell.max_steps, cell.digest) for cell in cells}
    if len(studies) != 1:
        raise StudyError(f"{path}: holds rows of {len(studies)} studies; expected those of one")
    seeds: dict[tuple, set[int]] = {}
    for cell in cells:
        seeds.setdefault((cell.target, cell.method, cell.rate), set()).add(cell.seed)
    complete = {(t, m) for t in {c.target for c in cells} for m in METHODS} <= {(t, m) for t, m, _ in seeds}
    if not complete or len(set(map(frozenset, seeds.values()))) > 1:
        raise StudyError(f"{path}: cells are missing; run them first")
    return cells


@functools.cache
def read_updates(path: Path) -> dict[str, Tensor]:
    """Return the matrices of a safetensors file, as they are; other tensors are left out.

    Raises:
        StudyError: the file cannot be read, holds no matrix, or one that is 0 or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StudyError(f"{path}: cannot be read as safetensors ({error})") from error
    found = {name: tensor for name, tensor in sorted(tensors.items()) if tensor.ndim == 2}
    if not found:
        raise StudyError(f"{path}: holds no matrix to fit")
    for name, matrix in found.items():
        if not (matrix.isfinite().all() and matrix.any()):
            raise StudyError(f"{path}: the matrix {name} is 0 or not finite; leave it out")
    return found


_hash_updates = functools.cache(hash_file)  # every cell asks for the hash of the same file


def run_cell(cell: Cell, updates: Path | None = None) -> dict:
    """Fit the target of a cell. The same cell gives the same bits.

    Keys: unexplained, the least of all steps of the last stage; svd, the optimum of LoRA's form (None for others);
    steps; converged; zeros, the share of entries of the fit that are 0.

    Raises:
        StudyError: the cell belongs to another file.
    """
    target = _build_target(cell, updates)
    method = METHODS[cell.method]
    factors = draw_factors(method, *target.shape, cell.r, Generator().manual_seed(2 * cell.seed + 1))
    steps, converged, loss = 0, True, math.inf
    for stage in method.stages:
        loss_of = functools.partial(_compute_loss, method, stage, factors, target)
        loss, taken, done = minimize_loss(loss_of, factors, cell.rate * stage.rate, cell.max_steps)
        steps, converged = steps + taken, converged and done
    with torch.no_grad():
        zeros = (compute_form(method, stage, factors) == 0).double().mean().item()
    svd = compute_svd_optimum(target, cell.r * method.budget) if method.magnitude == "none" else None
    return {"unexplained": loss, "svd": svd, "steps": steps, "converged": converged, "zeros": zeros}


def _compute_loss(method: Method, stage: Stage, factors: Sequence[Tensor], target: Tensor) -> Tensor:
    return compute_unexplained_share(compute_form(method, stage, factors), target)


def _build_target(cell: Cell, updates: Path | None) -> Tensor:
    if cell.digest is None:
        return draw_update(cell.target, cell.n, cell.n, Generator().manual_seed(2 * cell.seed))
    if updates is None or _hash_updates(updates) != cell.digest:
        raise StudyError(f"target {cell.target}: the cell was planned for another file of updates than {updates}")
    return normalize_update(read_updates(updates)[cell.target].float())


def draw_factors(method: Method, out: int, fan_in: int, r: int, generator: Generator) -> list[Tensor]:
    """Return the factors A, B or A, B, C, D of a method at their start, each with requires_grad.

    A, C: rank x in; B, D: out x rank; rank is the budget for one pair, half of it for two.
    """
    pairs = 1 if method.magnitude == "none" else 2
    rank = r * method.budget // pairs
    shapes = [(rank, fan_in), (out, rank)] * pairs
    if method.start == "zero":
        factors = [(torch.rand(s, generator=generator) * 2 - 1) / math.sqrt(s[1]) for s in shapes]
        factors[-1].zero_()
    else:
        # alpha and fan_in at which a fresh update is 0.02 of a target of size 1
        std = init_std(1, rank, rank, rank, method.magnitude, method.stages[0].direction)
        factors = [torch.randn(s, generator=generator) * std for s in shapes]
    return [factor.requires_grad_() for factor in factors]


def compute_form(method: Method, stage: Stage, factors: Sequence[Tensor]) -> Tensor:
    """Return the update of a method's factors, out x in."""
    if method.magnitude == "none":
        A, B = factors
        return B @ A
    A, B, C, D = factors
    return delta_weight(A, B, C, stage.steepness * D, 1.0, method.magnitude, stage.direction)


def compute_unexplained_share(fitted: Tensor, target: Tensor) -> Tensor:
    """Return ||target - fitted||_F^2 / ||target||_F^2, a scalar with gradient."""
    return (target - fitted).square().sum() / target.square().sum()


def compute_svd_optimum(target: Tensor, rank: int) -> float:
    """Return the least unexplained share of any matrix of this rank (Eckart and Young 1936)."""
    energy = torch.linalg.svdvals(target.double()).square()
    return (energy[rank:].sum() / energy.sum()).item()


def minimize_loss(
    loss_of: Callable[[], Tensor], factors: Sequence[Tensor], rate: float, max_steps: int
) -> tuple[float, int, bool]:
    """Run Adam until convergence, as defined at the head of this file, changing the factors in place.

    Return the least loss, the steps taken and whether it converged within max_steps.
    """
    optimizer = torch.optim.Adam(factors, lr=rate, eps=1e-12)
    best, mark, waited, cuts, steps = math.inf, math.inf, 0, 0, 0
    while steps < max_steps and best >= EXPLAINED and cuts <= CUTS:
        steps += 1
        loss = loss_of()
        best = min(best, loss.item())
        mark, waited = (best, 0) if best < mark * (1 - PROGRESS) else (mark, waited + 1)
        if waited >= WINDOW:
            cuts, waited = cuts + 1, 0
            optimizer.param_groups[0]["lr"] *= CUT
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best, steps, best < EXPLAINED or cuts > CUTS


def summarize_rows(rows: Sequence[dict]) -> list[dict]:
    """Return a line for each target and method, at the rate with the least mean unexplained share over seeds.

    Keys: target, method, rate, at_edge, values (by seed), mean, low, high, svd (mean, None where not LoRA's form),
    converged (share of the seeds), steps (mean), and dual_minus: `estimate_mean` of Dual LoRA's values minus these, by
    seed, at the same budget (None for Dual LoRA itself).

    Raises:
        StudyError: cells are missing.
    """
    lines = []
    for (target, method), group in group_rows(rows, "target", "method").items():
        rate, at_edge = choose_rate(group, "unexplained")
        results = [row["result"] for row in select_rate(group, rate)]
        values = [result["unexplained"] for result in results]
        line = {"target": target, "method": method, "rate": rate, "at_edge": at_edge, "values": values}
        optima = [result["svd"] for result in results if result["svd"] is not None]
        line["svd"] = sum(optima) / len(optima) if optima else None
        line |= {key: sum(r[key] for r in results) / len(results) for key in ("converged", "steps")}
        lines.append(line | estimate_mean(values))
    return [line | {"dual_minus": _subtract_from_dual(line, lines)} for line in lines]


def _subtract_from_dual(line: dict, lines: Sequence[dict]) -> dict | None:
    ours = OURS[METHODS[line["method"]].budget]
    if line["method"] == ours:
        return None
    dual = next(other for other in lines if (other["target"], other["method"]) == (line["target"], ours))
    return estimate_difference(dual["values"], line["values"])


def name_targets(targets: Sequence[str]) -> dict[str, str]:
    """Return a title for each target; matrices of a model lose the modules that all their names begin with."""
    shared = os.path.commonprefix(list(targets)) if len(set(targets)) > 1 else ""
    return {target: TARGETS.get(target, target[shared.rfind(".") + 1 :]) for target in targets}


def format_report(lines: Sequence[dict]) -> str:
    """Return the study's tables as Markdown."""
    targets, methods = (list(dict.fromkeys(line[key] for line in lines)) for key in ("target", "method"))
    found = {(line["target"], line["method"]): line for line in lines}
    titles = name_targets(targets)
    seeds = len(lines[0]["values"])
    averaged = f"mean over {seeds} seeds ± half the 95 % t-interval" if seeds > 1 else "one seed"
    head = ["target", "LoRA (SVD)", *(METHODS[m].label for m in methods), "LoRA, 2r (SVD)"]

    def fill(method: str, show: Callable[[dict], str]) -> list[str]:
        return [show(found[target, method]) for target in targets]

    def shape(*columns: Sequence[str]) -> list[list[str]]:
        return [[titles[t], *cells] for t, *cells in zip(targets, *columns, strict=True)]

    def optimum(line: dict) -> str:
        return f"{line['svd']:.3f}"

    shares = [fill(m, format_average) for m in methods]
    others = [m for m in methods if m not in ("dual_lora", "dual_lora_double")]
    differences = [fill(m, lambda line: format_average(line["dual_minus"])) for m in others]
    rates = [fill(m, format_rate) for m in methods]
    converged = [fill(m, lambda line: f"{line['converged']:.0%}, {line['steps']:.0f}") for m in methods]
    tables = {
        f"Share of ||dW||² left unexplained: {averaged}": format_table(
            head, shape(fill("lora", optimum), *shares, fill("lora_double", optimum))
        ),
        "Dual LoRA minus the others at the same budget, paired by seed (above 0: Dual LoRA fits less)": format_table(
            ["target", *(METHODS[m].label for m in others)], shape(*differences)
        ),
        "Learning rate with the least mean, of the same grid for all (the annealed reference has one)": format_table(
            ["target", *(METHODS[m].label for m in methods)], shape(*rates)
        ),
        "Share of the seeds that converged, and mean steps": format_table(
            ["target", *(METHODS[m].label for m in methods)], shape(*converged)
        ),
    }
    return "".join(f"## {title}\n\n{table}\n" for title, table in tables.items())


def write_report(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Write table.md and figure.png and return their paths.

    Raises:
        StudyError: cells are missing.
    """
    lines = summarize_rows(rows)
    text = "# Fitting a known update\n\n" + describe_rows(rows, "fit") + format_report(lines)
    titles = name_targets([line["target"] for line in lines])
    values: dict[str, dict[str, dict]] = {}
    for line in lines:
        values.setdefault(titles[line["target"]], {})[METHODS[line["method"]].label] = line
    labels = [method.label for method in METHODS.values()]
    return write_dot_report(folder, text, values, labels, "share of dW left unexplained", across=3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing cells of the study, then write its report."""
    parser = create_parser("fit", SIZES, main.__doc__)
    parser.add_argument("--updates", type=Path, help="safetensors file of matrices to fit; give it an --out of its own")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="targets to fit (default: all)")
    parser.add_argument("--rows-only", action="store_true", help="fit nothing: write the report of the rows there are")
    chosen = parser.parse_args(arguments)
    if chosen.rows_only:
        run_command(chosen, lambda: read_cells(chosen.out), run_cell, write_report)
        return
    run = functools.partial(run_cell, updates=chosen.updates)
    run_command(chosen, lambda: plan_cells(chosen.size, chosen.updates, chosen.targets), run, write_report)


if __name__ == "__main__":
    main()
