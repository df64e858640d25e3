"""The report of a study: a table in Markdown and a figure of dots."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .dots import Panel, draw_dots


def format_average(found: dict, digits: int = 3) -> str:
    """Return what `estimate_mean` found as text: the mean ± half the width of the interval."""
    if found["low"] is None:
        return f"{found['mean']:.{digits}f}"
    return f"{found['mean']:.{digits}f} ± {found['high'] - found['mean']:.{digits}f}"


def format_rate(line: Mapping) -> str:
    """Return the rate of a report's line as text. Keys of the line: rate, at_edge, as from `choose_rate`."""
    return f"{line['rate']:g}{' (edge)' if line['at_edge'] else ''}"


def describe_rows(rows: Sequence[dict], study: str) -> str:
    """Return the line of a report that says what its numbers come from."""
    seeds = len({row["cell"]["seed"] for row in rows})
    versions = " and ".join(sorted({f"torch {row['torch']}, {row['threads']} thread" for row in rows}))
    code = ", ".join(sorted({row["code"][:10] if "code" in row else "not recorded" for row in rows}))
    return (
        f"`python -m dual_lora.analysis.{study}`: {len(rows)} runs, {seeds} seed{'s' * (seeds > 1)}, {versions}, "
        f"code {code}. "
        "Every comparison is exploratory: each interval is of 95 %, not corrected for their number.\n\n"
    )


def format_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; columns after the first are aligned right."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def write_dot_report(
    folder: Path, text: str, values: Mapping[str, Mapping[str, Mapping]], labels: Sequence[str], unit: str, across: int
) -> list[Path]:
    """Write table.md and figure.png, each completely or not at all, and return their paths.

    text: of table.md. values: of each panel, by the labels of its lines, as in `Panel`. across: panels side by side.
    """
    table, figure = "table.md", "figure.png"
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as made:
        (Path(made) / table).write_text(text, "utf-8")
        draw_dots([Panel(title, lines) for title, lines in values.items()], labels, unit, Path(made) / figure, across)
        return [(Path(made) / name).replace(folder / name) for name in (table, figure)]
