"""Figures as files. The same figure gives the same bytes."""

from pathlib import Path

from matplotlib.figure import Figure

# Without these, files would hold their creation time and matplotlib's version.
METADATA = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf and return them."""
    paths = [folder / f"{name}.{kind}" for kind in METADATA]
    for path, metadata in zip(paths, METADATA.values(), strict=True):
        path.unlink(missing_ok=True)  # a link is replaced, not followed
        figure.savefig(path, dpi=150, metadata=metadata)
        figure.set_layout_engine("none")  # the layout is computed once: it takes longer than drawing
    return paths
