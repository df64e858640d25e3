"""Finished benchmarks as text: the tables of one file, the trend over all of them, and the tables of docs/cost.md."""

from pathlib import Path

from .measure import Row
from .record import BenchError, load_record

COLUMNS = ("step / LoRA", "operations / LoRA", "over floor", "kept, MiB", "peak, MiB", "adapter, MiB", "merge, ms")
START, END = "<!-- tables: python -m dual_lora.bench --page -->", "<!-- end of tables -->"
# The cases whose sizes and counts the page shows; of the others only times, since the rest scales with the sizes.
SHOWN_CASES = ("layer 2048 x 2048, 1024 tokens, float32", "smollm2, batch 8 x 72, float32")


def format_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table; sizes in MiB, ratios with their quartiles."""
    lora = next(row for row in rows if row.method == "LoRA")
    lines = list(_format_head("method", COLUMNS))
    for row in rows:
        ratios = format_ratio(row), f"{row.flops / lora.flops:.2f}"
        over = "–" if row.flops_over_floor is None else f"{row.flops_over_floor:.3f}"
        sizes = (f"{n / 2**20:.2f}" for n in (row.kept_bytes, row.peak_bytes, row.adapter_bytes))
        lines.append(_format_line(row.method, *ratios, over, *sizes, f"{row.merge_seconds * 1e3:.1f}"))
    return "\n".join(lines)


def format_ratio(row: Row) -> str:
    """Return a row's step in steps of LoRA, with quartiles where they were kept."""
    if row.quartiles is None or row.method == "LoRA":
        return f"{row.step_ratio:.2f}"
    return f"{row.step_ratio:.2f} ({row.quartiles[0]:.2f}–{row.quartiles[1]:.2f})"


def format_record(record: dict) -> str:
    """Return every table of a finished benchmark."""
    parts = [describe_machine(record)]
    for name, case in record["cases"].items():
        parts.append(f"{name}; rank {case['rank']}, torch {case['torch']}, PEFT {case['peft']}")
        parts.append(format_table(read_rows(case)))
    if "threads" in record:
        parts.append(format_threads(record["threads"]))
    return "\n\n".join(parts)


def format_threads(found: dict) -> str:
    """Return milliseconds a step by threads and neighbour, and each over the best of its line."""
    choices = list(dict.fromkeys(choice for times in found["seconds"].values() for choice in times))
    lines = [f"{found['step']}, {found['cores']} cores, milliseconds a step by threads (over the best):"]
    lines += ["", *_format_head("machine", choices)]
    for machine, times in found["seconds"].items():
        best = min(times.values())
        lines.append(_format_line(machine, *(f"{times[c] * 1e3:.0f} ({times[c] / best:.2f})" for c in choices)))
    return "\n".join(lines)


def describe_machine(record: dict) -> str:
    """Return hardware and date, and how busy the machine was where that was kept."""
    loads = [case["load_before"] for case in record["cases"].values() if "load_before" in case]
    busy = f", load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    return f"{record['hardware']}, {record['date']}{busy}"


def read_rows(case: dict) -> list[Row]:
    """Return the rows of a case of a file."""
    return [Row(**row) for row in case["rows"]]


def index_rows(case: dict) -> dict[str, Row]:
    """Return the rows of a case of a file by method."""
    return {row.method: row for row in read_rows(case)}


def read_record(path: Path) -> dict:
    """Return the record of a file, of which all tables can be made.

    Raises:
        BenchError: it cannot be read, or is no benchmark's.
    """
    record = load_record(path)
    try:
        format_record(record)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
        raise BenchError(f"{path}: no file of a benchmark ({type(error).__name__}: {error})") from error
    return record


def read_history(folder: Path) -> dict[str, list[dict]]:
    """Return the records in a folder by hardware, each list from the oldest to the newest.

    Raises:
        BenchError: there are none, or as `read_record`.
    """
    records: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        records.setdefault(record["hardware"], []).append(record)
    if not records:
        raise BenchError(f"{folder}: no JSON file of a benchmark there")
    return records


def format_trend(folder: Path) -> str:
    """Return, for each machine and case, every method's step in steps of LoRA, a column a date."""
    parts = []
    for hardware, records in read_history(folder).items():
        for case in dict.fromkeys(name for record in records for name in record["cases"]):
            dated = {record["date"]: index_rows(record["cases"][case]) for record in records if case in record["cases"]}
            parts.append(f"{hardware}: {case}\n\n{_join_columns(dated)}")
    return "\n\n".join(parts)


def format_page_tables(folder: Path) -> str:
    """Return the tables of docs/cost.md: of the newest file of every machine, the times of all cases, the full tables
    of SHOWN_CASES, and the choice of threads."""
    parts = []
    for records in read_history(folder).values():
        newest = records[-1]
        times = {shorten_case_name(name): index_rows(case) for name, case in newest["cases"].items()}
        parts += [f"## {describe_machine(newest)}", "Step / LoRA, median (quartiles):", _join_columns(times)]
        own = {name: select_peers(rows) for name, rows in times.items()}
        if any(own.values()):
            parts += [
                "Dual LoRA over LoRA with the same dropout and type of dL/dx:",
                _join_columns(own, _format_peer),
            ]
        for name, case in newest["cases"].items():
            if name in SHOWN_CASES:
                parts += [f"{name[0].upper()}{name[1:]}:", format_table(read_rows(case))]
        if "threads" in newest:
            parts.append(format_threads(newest["threads"]))
    return "\n\n".join(parts)


def shorten_case_name(case: str) -> str:
    """Return the name of a case as the head of a column."""
    return case.removeprefix("layer ").removesuffix(", float32")


def select_peers(rows: dict[str, Row]) -> dict[str, Row]:
    """Return the rows of Dual LoRA, where the ratio to the LoRA alike was kept."""
    return {name: row for name, row in rows.items() if name.startswith("Dual") and row.peer_ratio is not None}


def update_page(page: str, tables: str) -> str:
    """Return the text of a page with these tables between its two marks.

    Raises:
        ValueError: a mark is missing from the page.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page needs the lines {START} and {END}, between which the tables go")
    return f"{before}{START}\n\n{tables}\n\n{END}{after}"


def _format_peer(row: Row) -> str:
    return f"{row.peer_ratio:.2f}"


def _join_columns(columns: dict[str, dict[str, Row]], cell=format_ratio) -> str:
    """Return a table with a line a method, a column a case or date."""
    methods = dict.fromkeys(method for rows in columns.values() for method in rows)
    lines = list(_format_head("method", columns))
    for method in methods:
        cells = (cell(rows[method]) if method in rows else "–" for rows in columns.values())
        lines.append(_format_line(method, *cells))
    return "\n".join(lines)


def _format_head(first: str, columns) -> tuple[str, str]:
    return _format_line(first, *columns), "|---" + "|---:" * len(columns) + "|"


def _format_line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
