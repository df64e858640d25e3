"""What tables of an analysis are made of: its rows, and medians next to those of their null. Needs neither torch nor a
model."""

import pandas as pd

from dual_lora.lab.present.document import MISSING

RANK_KINDS = ("rank", "stable_rank", "effective_rank")
UPDATE_ENTRIES = ("zeros", "dead_rows", "relative_size", "signs_flipped")


def drop_histograms(rows: list[dict]) -> pd.DataFrame:
    """Return the rows without their histograms."""
    return pd.DataFrame([{k: v for k, v in row.items() if "histogram" not in k} for row in rows])


def format_with_null(group: pd.DataFrame, name: str) -> str:
    """Return the medians of a column and of its null, as far as they are there."""
    return " | ".join(format_median(group[n]) for n in (name, f"{name}_null") if n in group) or MISSING


def format_median(column: pd.Series) -> str:
    """Return the median of the known values of a column; a dash if none is known."""
    values = pd.to_numeric(column).dropna()
    return MISSING if values.empty else f"{values.median():.4g}"
