"""What a run prints when it is done."""

from typing import Any

from tabulate import tabulate

from dual_lora.lab.runs import Record


def summary(result: dict[str, Any], record: Record) -> str:
    """Return a finished run as a small table of scores (in percent), and what it trained, how long, and where it is."""
    before = result["metrics_before"] or {}
    rows = [
        [name, percent(before.get(name)), percent(value)]
        for name, value in sorted(result["metrics"].items(), key=lambda item: item[0] != result["metric"])
    ]
    table = scores(rows, "before", "after")
    share = result["trainable_parameters"] / result["parameters"]
    facts = [
        ["trained", f"{result['trainable_parameters']:,} of {result['parameters']:,} parameters ({share:.2%})"],
        [
            "time",
            f"{result['train_seconds']:.1f} s for {result['steps']} steps, "
            f"{result['tokens_per_second']:,.0f} tokens/s, peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ],
        ["record", record.shown()],
    ]
    title = f"{result['model']}  {result['task']}  {result['method']}  seed {result['seed']}"
    return f"\n{title}\n\n{table}\n\n{tabulate(facts, tablefmt='plain')}"


def scores(rows: list[list[str]], *columns: str) -> str:
    aligned = ("left", "right", "right")
    return tabulate(rows, headers=["%", *columns], disable_numparse=True, colalign=aligned)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def compared(recorded: dict[str, float], now: dict[str, float], record: Record) -> str:
    """Return the scores of a second evaluation beside the recorded ones, and whether every digit is equal."""
    rows = [[name, percent(recorded.get(name)), percent(value)] for name, value in now.items()]
    table = scores(rows, "recorded", "now")
    verdict = "reproduced exactly" if recorded == now else "NOT reproduced"
    return f"{table}\n\n{verdict}: {record.shown()}"
