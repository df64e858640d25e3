"""Figures as files. The same figure gives the same bytes, whatever the user's matplotlibrc says."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.figure import Figure

from dual_lora.lab.system.files import replace_file

# Without these, files would hold their creation time and matplotlib's version.
METADATA = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


@contextmanager
def use_style(style: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Draw and save figures with matplotlib's own defaults but for `style`."""
    date = os.environ.pop("SOURCE_DATE_EPOCH", None)  # matplotlib reads it, though no date is written
    try:
        with rc_context():
            rcdefaults()
            rcParams.update(style or {})
            yield
    finally:
        os.environ |= {} if date is None else {"SOURCE_DATE_EPOCH": date}


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf, each completely or not at all, and return them. Call it where `use_style` holds.

    Raises:
        OSError: one cannot be written.
    """
    paths = [folder / f"{name}.{kind}" for kind in METADATA]
    for path, metadata in zip(paths, METADATA.values(), strict=True):
        with replace_file(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)
        figure.set_layout_engine("none")  # the layout is computed once: it takes longer than drawing
    return paths
