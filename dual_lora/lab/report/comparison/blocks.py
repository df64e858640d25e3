"""The comparisons of a report as tables: verdicts first, then what is exploratory, then what the design could find."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from dual_lora.lab.present.document import MISSING, Block, Table, Text
from dual_lora.lab.report.comparison.comparisons import OVER_SEEDS, Comparison, Comparisons
from dual_lora.lab.report.comparison.floors import STANDARD_ERRORS, Floor, find_unranked
from dual_lora.lab.report.comparison.matches import Key
from dual_lora.lab.report.values import UNSETTLED, format_value, get_heading
from dual_lora.lab.statistics.seeds import MIN_SEEDS, compute_detectable_difference
from dual_lora.lab.statistics.verdict import EQUIVALENT, UNDECIDED

PLANNED_SEEDS = (5, 8, 12, 20)  # what the power table looks ahead to


def tabulate_comparisons(found: list[Comparison]) -> pd.DataFrame:
    """Return comparisons as a table of numbers, in points."""
    lines = []
    for c in found:
        seeds, difference = c.seed_test, c.difference
        low, high = (None if v is None else v * c.unit for v in (difference.low, difference.high))
        lines.append(
            {"task": c.task, "score": c.score, **c.place, "method": c.label, "baseline": c.baseline}
            | {"planned": c.planned, "difference": difference.mean * c.unit}
            | {"low": seeds and seeds.low, "high": seeds and seeds.high}
            | {"low_examples": None, "high_examples": None}
            | ({} if difference.test == OVER_SEEDS else {"low_examples": low, "high_examples": high})
            | {"p_predictions": None if difference.test == OVER_SEEDS else difference.p, "p_seeds": seeds and seeds.p}
            | {"p": c.p, "margin": c.margin, "p_equivalent": c.p_equivalent, "test": difference.test}
            | {"examples": difference.examples, "seeds": difference.seeds}
            | {
                "deviation": seeds and seeds.deviation,
                "spread": c.spread,
                "could_find": c.detectable,
                "verdict": c.verdict,
            }
        )
    return pd.DataFrame(lines)


def iterate_verdict_blocks(found: Comparisons) -> Iterator[Block]:
    """Yield the planned family, if there is one."""
    if not found.planned:
        return
    yield Text("Verdicts", heading=True)
    yield Table(
        format_comparisons(found.planned),
        f"The planned comparisons, in points{describe_correction(found)}.",
    )
    yield Text(items=tuple(explain_verdicts(found.planned)))


def describe_correction(found: Comparisons) -> str:
    """Return what a caption says of the correction of the planned family."""
    if found.family < 2:
        return ""
    missing = found.family - sum(c.p is not None for c in found.planned)
    unknown = f"; {missing} of them are not tested and count as p = 1" if missing else ""
    return f"; p is corrected for all {found.family} by Holm's method{unknown}"


def explain_verdicts(found: list[Comparison]) -> Iterator[str]:
    """Yield how verdicts are reached."""
    yield (
        f"better, worse: at least {MIN_SEEDS} seeds, and a p below 0.05 in each of two tests: one of the "
        "predictions, paired by example (exact McNemar or permutation), whose interval over examples and seeds must "
        "exclude zero, too; one of the seeds (paired t)"
    )
    margins = dict.fromkeys((c.margin, c.unit == 1) for c in found if c.margin)
    known = " or ".join(f"{m:g} ({'mean over tasks' if mean else 'one task'})" for m, mean in margins)
    yield (
        f"equivalent: two one-sided t-tests over seeds reject a difference of {known} points, corrected likewise; for "
        "one comparison this is the same as a 90 % interval inside the margin; it holds for these test examples only"
        if known
        else "equivalent: never, as the experiment gives no margin"
    )
    untested = ", or not tested, for the reason given" if any(c.untested for c in found) else ""
    yield f"undecided: neither{untested}"
    yield (
        "could find: the smallest true difference that as many seeds would find in four of five studies by the t-test "
        "at the strictest step of the correction, given the spread of the seeds' differences, and by an interval over "
        "examples and seeds as wide as the one seen"
    )
    yield (
        "a mean over tasks, or over several sets that one training is scored on, is one observation a seed; means over "
        "tasks are tested over seeds alone"
    )
    if any(c.contrast for c in found):
        yield "a contrast sets the mean over some columns of a row against that over others"
    yield "the interval is the t-interval over seeds; it holds for these test examples only"
    yield from describe_mixed_machines(found)


def describe_mixed_machines(found: list[Comparison]) -> Iterator[str]:
    """Yield which comparisons pair runs of several kinds of machine, and of which."""
    mixed: dict[frozenset[str], list[str]] = {}
    for c in found:
        if c.machines:
            mixed.setdefault(c.machines, []).append(f"{c.name} ({c.task})")
    for machines, names in mixed.items():
        yield (
            f"a seed pairs runs of different machines ({', '.join(sorted(machines))}), which round differently, in: "
            + "; ".join(names)
        )


def iterate_exploratory_blocks(found: Comparisons) -> Iterator[Block]:
    """Yield the comparisons that are not planned, outside any correction."""
    groups = {"by the main score": found.exploratory, "by set and by other scores": found.further}
    if any(groups.values()):
        yield Text("Exploratory", heading=True)
        yield Text(
            "Not planned, and not corrected for their number: of twenty such comparisons of equal methods one has a p "
            "below 0.05. They suggest what to test next and show nothing."
        )
    for name, some in groups.items():
        if some:
            yield Table(format_comparisons(some), f"Exploratory differences {name}, in points, uncorrected.")
            if mixed := list(describe_mixed_machines(some)):
                yield Text(items=tuple(mixed))


def format_comparisons(found: list[Comparison]) -> pd.DataFrame:
    """Return comparisons as they are printed."""
    frame = tabulate_comparisons(found)
    styles = [f"+.{c.decimals}f" for c in found]
    table = frame[["task", "score"]].copy()
    for key in dict.fromkeys(key for c in found for key in c.place):
        table[get_heading(key).replace("_", " ")] = frame[key].map(
            lambda value: format_value(None if pd.isna(value) else value)
        )
    table["comparison"] = [c.name for c in found]
    table["difference"], low, high = (
        list(map(format_number, frame[key], styles)) for key in ("difference", "low", "high")
    )
    table["95 % t-interval"] = [
        MISSING if MISSING in ends else " to ".join(ends) for ends in zip(low, high, strict=True)
    ]
    planned = found[0].planned
    heads = {"p predictions": "p_predictions", "p seeds": "p_seeds", "Holm" if planned else "larger p": "p"}
    if planned and frame["margin"].notna().any():
        heads["Holm, equivalence"] = "p_equivalent"
    for head, column in heads.items():
        table[head] = [format_p(p) for p in frame[column]]
    table["seeds"] = frame["seeds"]
    table["verdict" if planned else "verdict, uncorrected"] = list(map(format_verdict, found))
    table["could find"] = [
        format_number(c.detectable, style.replace("+", "")) if c.verdict == UNDECIDED else ""
        for c, style in zip(found, styles, strict=True)
    ]
    return table


def format_verdict(comparison: Comparison) -> str:
    """Return a verdict with what it depends on: the margin, or why it was not tested."""
    verdict, difference = comparison.verdict, comparison.difference
    if np.isnan(difference.mean):
        return f"cannot be compared ({difference.test})"
    if verdict == EQUIVALENT:
        return f"{verdict} within {comparison.margin:g}"
    if comparison.untested:
        return f"{verdict}: {comparison.untested}"
    if verdict == UNDECIDED and difference.seeds < MIN_SEEDS:
        return f"{verdict}: under {MIN_SEEDS} seeds"
    if verdict == UNDECIDED and difference.p is None:
        return f"{verdict}: {difference.test}"
    return verdict


def format_number(value: float | None, style: str) -> str:
    """Return a number in a format; a dash if it is missing."""
    return MISSING if pd.isna(value) else format(value, style)


def format_p(p: float | None) -> str:
    """Return a p-value with three decimals; a dash if it is missing."""
    return MISSING if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def iterate_floor_blocks(floors: list[Floor]) -> Iterator[Block]:
    """Yield the floors and which tasks were learned."""
    shown = [floor for floor in floors if floor.best is not None or not floor.measured]
    if not shown:
        return
    several, unranked = len({floor.model_task[0] for floor in shown}) > 1, find_unranked(floors)
    lines = [
        ({"model": f.model_task[0]} if several else {})
        | {"task": f.model_task[1], "floor": f.name, "score": format_number(f.score, f".{f.decimals}f")}
        | {"clearest above": f.best or MISSING, "by": format_number(f.above, f"+.{f.decimals}f")}
        | {"standard error": format_number(f.error, f".{f.decimals}f")}
        | {"task learned": unranked.get(f.model_task, "learned")}
        for f in shown
    ]
    lacking = any(line["task learned"] == UNSETTLED for line in lines)
    turned = sorted({floor.model_task[1] for floor in shown if floor.lower_is_better})
    yield Table(
        pd.DataFrame(lines),
        f"Floors. A task is learned where one row beats every floor by {STANDARD_ERRORS} standard errors (over "
        "examples and the seeds of both). Clearest above is the row that lies above by most standard errors. A task "
        "that is not learned ranks no methods and is left out of means over tasks."
        + (f" {UNSETTLED.capitalize()}: runs are missing, or cannot be compared; means lack it." if lacking else "")
        + (f" Of {', '.join(turned)} lower is better: above means below." if turned else ""),
    )


def iterate_power_blocks(found: Comparisons) -> Iterator[Block]:
    """Yield what smallest differences more seeds would find, from the spread that was seen: that of a comparison, or of
    all that were pooled."""
    pools: dict[tuple[Key, float], list[Comparison]] = {}
    for c in found.planned or found.exploratory:
        if c.spread is not None:
            pools.setdefault((c.pool, c.spread), []).append(c)
    lines = []
    for ((model, task, score), spread), some in pools.items():
        ahead = sorted({max(MIN_SEEDS, *(c.difference.seeds for c in some)), *PLANNED_SEEDS})
        family = max(c.family for c in some)
        decimals = some[0].decimals
        known = {f"{n} seeds": f"{compute_detectable_difference(spread, n, family):.{decimals}f}" for n in ahead}
        where = ({"model": model} if model else {}) | {"task": task, "score": score}
        where |= {"comparison": some[0].name if len(some) == 1 else f"all {len(some)}"}
        lines.append(where | {"corrected for": family, "spread": f"{spread:.{decimals + 1}f}"} | known)
    if lines:
        yield Text("Power", heading=True)
        yield Table(
            pd.DataFrame(lines).fillna(MISSING),
            "The smallest difference, in points, that a paired t-test over so many seeds finds in four of five studies "
            "(two-sided, 0.05, at the strictest step of Holm's correction). The test on the predictions may ask for "
            "more. Spread: standard deviation of the seeds' differences, pooled over a task's comparisons, planned "
            f"or not, of fewer than {MIN_SEEDS} seeds, under which no verdict is given.",
        )
