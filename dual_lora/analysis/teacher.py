"""Which student recovers a planted update? A teacher is the base model plus an update of known structure in every
linear layer; students start from the base, adapt the same layers through PEFT and see the teacher's outputs only.

    function   ||student(x) - teacher(x)||^2 / ||base(x) - teacher(x)||^2, over held-out x     0: recovered, 1: nothing
    weights    sum ||dW - planted||_F^2 / sum ||planted||_F^2, over the layers                 likewise

    python -m dual_lora.analysis.teacher --out runs/teacher/rows.jsonl [--size long|smoke]

The base is a small pre-norm transformer over vectors, with Gaussian weights of variance 1 / fan_in and no biases; its
inputs are Gaussian, and a fixed set of sequences is all that training sees. A planted update has a fifth of the base
weight's norm. Adapters have the same budget: LoRA and DoRA of rank r, LoHa of rank r / 2, Dual LoRA with r1 + r2 = r,
all with alpha = r (scales 1, 1, 2 and 2); DoRA also trains its magnitudes. The optimizer is Adam with epsilon 1e-12 and
no weight decay. The rate rises linearly over the first 6 % of the steps, as Dual LoRA's ramp does, then falls linearly
to 0. Each student's rate is the one with the least mean validation loss over seeds, from a grid as large as everybody
else's; the scores are of rows that neither training nor that choice saw.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Generator, Tensor, nn

from ..tuner import DualLoraConfig
from .cells.averages import choose_rate, estimate_difference, estimate_mean, select_rate
from .cells.command import create_parser, run_command
from .cells.report import describe_rows, format_average, format_rate, format_table, write_dot_report
from .cells.rows import group_rows
from .targets import draw_update

LINEAR = ["q", "k", "v", "o", "up", "down"]
WARM_UP = 0.06  # share of the steps


@dataclass(frozen=True)
class Cell:
    """One student. update: as in `draw_update`; seed: of base, planted update, data and student; width, layers, heads
    and length (of a sequence) of the model; rows: sequences to train on; held_out: to validate on, and as many to
    score on; relative_size: ||planted||_F / ||base weight||_F."""

    update: str
    student: str
    rate: float
    seed: int
    r: int
    width: int
    layers: int
    heads: int
    length: int
    rows: int
    held_out: int
    batch: int
    steps: int
    relative_size: float


UPDATES = {
    "rank_4": "rank 4",
    "gaussian": "dense Gaussian",
    "sign_rank_4": "signs, rank 4",
    "dual_4": "a Dual LoRA",
}
STUDENTS = {"full": "Full", "lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "dual_lora": "Dual LoRA"}
FULL = {
    "updates": UPDATES,
    "students": STUDENTS,
    # as many for each student, around the best of a wider grid on one seed of a model twice as deep
    "rates": {"full": (1e-3, 3e-3, 1e-2), "loha": (3e-2, 1e-1, 3e-1), "others": (3e-3, 1e-2, 3e-2)},
    "seeds": range(5),
    "model": {"r": 8, "width": 64, "layers": 1, "heads": 4, "length": 8},
    "data": {"rows": 512, "held_out": 256, "batch": 32, "steps": 400, "relative_size": 0.2},
}
SIZES = {
    "full": FULL,
    # whether the slowest learner catches up
    "long": FULL | {"students": ("lora", "loha", "dual_lora"), "data": FULL["data"] | {"steps": 1600}},
    "smoke": {
        "updates": ("rank_4", "dual_4"),
        "students": STUDENTS,
        "rates": {"others": (3e-3, 1e-2)},
        "seeds": range(2),
        "model": {"r": 4, "width": 16, "layers": 1, "heads": 2, "length": 4},
        "data": {"rows": 16, "held_out": 8, "batch": 8, "steps": 8, "relative_size": 0.2},
    },
}


class Block(nn.Module):
    """A pre-norm transformer block without biases; its norms have no weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """batch x length x width -> the same."""
        normed = F.layer_norm(x, x.shape[-1:])
        q, k, v = (self._split_heads(layer(normed)) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def build_base(cell: Cell, generator: Generator) -> nn.Sequential:
    """Return the base model, its weights from N(0, 1 / fan_in)."""
    model = nn.Sequential(*(Block(cell.width, cell.heads) for _ in range(cell.layers)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
    return model


def plant_updates(base: nn.Module, kind: str, relative_size: float, generator: Generator) -> dict[str, Tensor]:
    """Return an update of a kind of `draw_update` for each weight, relative_size of the weight's Frobenius norm."""
    planted = {}
    for name, weight in base.named_parameters():
        update = draw_update(kind, *weight.shape, generator)
        planted[name] = update * (relative_size * weight.detach().norm() / update.norm())
    return planted


def build_teacher(base: nn.Module, planted: dict[str, Tensor]) -> nn.Module:
    """Return the base with the planted updates added."""
    teacher = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            weight.add_(planted[name])
    return teacher


def build_student_config(student: str, r: int, steps: int) -> PeftConfig:
    """Return the PEFT configuration of a student other than "full".

    Raises:
        KeyError: an unknown student.
    """
    return {
        "lora": lambda: LoraConfig(r=r, lora_alpha=r, target_modules=LINEAR),
        "dora": lambda: LoraConfig(r=r, lora_alpha=r, target_modules=LINEAR, use_dora=True),
        "loha": lambda: LoHaConfig(r=r // 2, alpha=r, target_modules=LINEAR),
        "dual_lora": lambda: DualLoraConfig(
            r=r, lora_alpha=r, target_modules=LINEAR, scale_warmup_steps=count_warm_up_steps(steps)
        ),
    }[student]()


def count_warm_up_steps(steps: int) -> int:
    """Return over how many steps the rate and Dual LoRA's factor f rise, at least 1."""
    return max(round(WARM_UP * steps), 1)


def attach_student(base: nn.Module, cell: Cell) -> nn.Module:
    """Return a copy of the base with the student's parameters set to train."""
    model = copy.deepcopy(base)
    return (
        model
        if cell.student == "full"
        else get_peft_model(model, build_student_config(cell.student, cell.r, cell.steps))
    )


def plan_cells(size: str = "full") -> list[Cell]:
    """Return the cells of a study, seed by seed.

    Raises:
        KeyError: an unknown size.
    """
    chosen = SIZES[size]
    return [
        Cell(update, student, rate, seed, **chosen["model"], **chosen["data"])
        for seed in chosen["seeds"]
        for update in chosen["updates"]
        for student in chosen["students"]
        for rate in chosen["rates"].get(student, chosen["rates"]["others"])
    ]


def run_cell(cell: Cell) -> dict:
    """Train one student on the teacher's outputs. The same cell gives the same bits; torch's global generator is left
    as it was.

    Keys: function (held-out share unexplained), validation (the same of the rows that choose the rate), train (of the
    rows trained on), weights (the distance of the updates), parameters (how many are trained).
    """
    generator = Generator().manual_seed(2 * cell.seed)
    with torch.random.fork_rng(devices=[]):
        base = build_base(cell, generator)
        planted = plant_updates(base, cell.update, cell.relative_size, generator)
        data = _draw_data(base, build_teacher(base, planted), cell, generator)
        torch.manual_seed(2 * cell.seed + 1)
        student = attach_student(base, cell)
        trained = [p for p in student.parameters() if p.requires_grad]
        _train_student(student, trained, data["train"], cell)
        student.eval()
        scores = {part: _compute_unexplained(student, *rows) for part, rows in data.items()}
        scores["weights"] = _compute_distance(student, base, planted)  # the last one: it merges the student
    return scores | {"parameters": sum(p.numel() for p in trained)}


@torch.no_grad()
def _draw_data(base: nn.Module, teacher: nn.Module, cell: Cell, generator: Generator) -> dict[str, tuple]:
    """Return inputs, the teacher's outputs and the squared norm of their distance to the base's, per sequence, for each
    part: rows x length x width, the same, and a scalar."""
    parts = {}
    for part, rows in (("train", cell.rows), ("validation", cell.held_out), ("function", cell.held_out)):
        x = torch.randn(rows, cell.length, cell.width, generator=generator)
        y = teacher(x)
        parts[part] = x, y, (base(x) - y).square().sum() / rows
    return parts


def _train_student(student: nn.Module, trained: Sequence[Tensor], rows: tuple, cell: Cell) -> None:
    x, y, scale = rows
    optimizer = torch.optim.Adam(trained, lr=cell.rate, eps=1e-12)
    warm_up = count_warm_up_steps(cell.steps)
    for step in range(cell.steps):
        rising, falling = (step + 1) / warm_up, (cell.steps - step) / max(cell.steps - warm_up, 1)
        optimizer.param_groups[0]["lr"] = cell.rate * min(rising, falling, 1.0)
        chosen = torch.randint(len(x), (cell.batch,))
        loss = (student(x[chosen]) - y[chosen]).square().sum() / cell.batch / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _compute_unexplained(student: nn.Module, x: Tensor, y: Tensor, scale: Tensor) -> float:
    return ((student(x) - y).square().sum() / len(x) / scale).item()


@torch.no_grad()
def _compute_distance(student: nn.Module, base: nn.Module, planted: dict[str, Tensor]) -> float:
    merged = student.merge_and_unload() if hasattr(student, "merge_and_unload") else student
    found, before = dict(merged.named_parameters()), dict(base.named_parameters())
    missed = sum((found[name] - before[name] - update).square().sum() for name, update in planted.items())
    return (missed / sum(update.square().sum() for update in planted.values())).item()


def summarize_rows(rows: Sequence[dict]) -> list[dict]:
    """Return a line for each update and student, at the rate with the least mean validation loss over seeds.

    Keys: update, student, rate, at_edge, parameters, train (mean), function and weights (each `estimate_mean` and the
    values by seed), dual_minus (`estimate_mean` of Dual LoRA's function score minus this one's, by seed; None for Dual
    LoRA itself).

    Raises:
        StudyError: cells are missing.
    """
    lines = []
    for (update, student), group in group_rows(rows, "update", "student").items():
        rate, at_edge = choose_rate(group, "validation")
        results = [row["result"] for row in select_rate(group, rate)]
        line = {"update": update, "student": student, "rate": rate, "at_edge": at_edge}
        line |= {"parameters": results[0]["parameters"], "train": sum(r["train"] for r in results) / len(results)}
        for score in ("function", "weights"):
            values = [result[score] for result in results]
            line[score] = {"values": values} | estimate_mean(values)
        lines.append(line)
    return [line | {"dual_minus": _subtract_from_dual(line, lines)} for line in lines]


def _subtract_from_dual(line: dict, lines: Sequence[dict]) -> dict | None:
    if line["student"] == "dual_lora":
        return None
    dual = next(other for other in lines if (other["update"], other["student"]) == (line["update"], "dual_lora"))
    return estimate_difference(dual["function"]["values"], line["function"]["values"])


def format_report(lines: Sequence[dict]) -> str:
    """Return the study's tables as Markdown."""
    updates = list(dict.fromkeys(line["update"] for line in lines))
    students = list(dict.fromkeys(line["student"] for line in lines))
    found = {(line["update"], line["student"]): line for line in lines}

    def build_table(show: Callable[[dict], str], left_out: str | None = None) -> str:
        shown = [student for student in students if student != left_out]
        body = [[UPDATES.get(u, u), *(show(found[u, s]) for s in shown)] for u in updates]
        return format_table(["planted update", *(STUDENTS[s] for s in shown)], body)

    seeds = len(lines[0]["function"]["values"])
    tables = {
        f"Share of the teacher's function left unexplained, held-out rows: mean over {seeds} seeds ± half the 95 % "
        "t-interval": build_table(lambda line: format_average(line["function"])),
        "Distance of the weights, share of ||planted||²": build_table(lambda line: format_average(line["weights"])),
        "Dual LoRA minus the others, share of the function, paired by seed (above 0: Dual LoRA recovers less)": (
            build_table(lambda line: format_average(line["dual_minus"]), left_out="dual_lora")
        ),
        "Share of the function left unexplained on the training rows": build_table(lambda line: f"{line['train']:.3f}"),
        "Learning rate with the least mean validation loss, of as many for each": build_table(format_rate),
        "Trained parameters": build_table(lambda line: f"{line['parameters']:,}"),
    }
    return "".join(f"## {title}\n\n{table}\n" for title, table in tables.items())


def write_report(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Write table.md and figure.png and return their paths.

    Raises:
        StudyError: cells are missing.
    """
    lines = summarize_rows(rows)
    title = f"# Recovering a planted update, {rows[0]['cell']['steps']} steps of training\n\n"
    text = title + describe_rows(rows, "teacher") + format_report(lines)
    values: dict[str, dict[str, dict]] = {}
    for line in lines:
        values.setdefault(UPDATES.get(line["update"], line["update"]), {})[STUDENTS[line["student"]]] = line["function"]
    labels = [STUDENTS[student] for student in dict.fromkeys(line["student"] for line in lines)]
    return write_dot_report(folder, text, values, labels, "share of the teacher's function left unexplained", across=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing cells of the study, then write its report."""
    chosen = create_parser("teacher", SIZES, main.__doc__).parse_args(arguments)
    run_command(chosen, lambda: plan_cells(chosen.size), run_cell, write_report)


if __name__ == "__main__":
    main()
