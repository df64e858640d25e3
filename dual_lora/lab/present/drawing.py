"""Figures as files. The same figure gives the same bytes."""

from pathlib import Path

from matplotlib.figure import Figure

from dual_lora.lab.system.files import replace_file

# Without these, files would hold their creation time and matplotlib's version.
METADATA = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf, each whole or not at all, and return them.

    Raises:
        OSError: one cannot be written.
    """
    paths = [folder / f"{name}.{kind}" for kind in METADATA]
    for path, metadata in zip(paths, METADATA.values(), strict=True):
        with replace_file(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)
        figure.set_layout_engine("none")  # the layout is computed once: it takes longer than drawing
    return paths
