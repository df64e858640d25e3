"""What the figures of a report share: size, colours, panels, intervals."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dual_lora.lab.report.comparison.floors import Floor, find_hardest, find_unranked, get_model_task
from dual_lora.lab.report.values import UNLEARNED
from dual_lora.lab.statistics.seeds import compute_seed_test
from dual_lora.lab.study.outcome import Outcome

PANELS = 3  # side by side
MAX_PANELS = 9  # of one figure
WIDTH = 7.0  # inches, of a page's text; figures are read at this size
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "legend.title_fontsize": 7}
# Okabe and Ito's colours, which colour-blind readers tell apart, each with a marker of its own.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#777777"
MIN_SPAN = 6.0  # points of a score that an axis shows at least
MIN_INTERVAL_SEEDS = 3  # two seeds have a t-interval nine standard deviations wide to each side


def create_panels(number: int, height: float, columns: int = PANELS) -> tuple[Figure, list[Axes]]:
    """Return a figure as wide as a page and its first `number` panels, each `height` inches high."""
    wide = 2 if number == 4 else min(number, columns)
    rows = -(-number // wide)
    width = WIDTH if wide > 1 else WIDTH * 0.6
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, wide, squeeze=False).flat)
    for spare in panels[number:]:
        spare.set_visible(False)
    return figure, panels[:number]


def get_style(number: int) -> dict[str, str]:
    """Return the colour and marker of the label at a position."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def compute_half_interval(scores: Sequence[float]) -> float:
    """Return half the width of the 95 % t-interval over seeds; 0 where there are too few to know it."""
    values = np.asarray(scores, dtype=float)
    if len(values) < MIN_INTERVAL_SEEDS:
        return 0.0
    test = compute_seed_test(values.tolist())
    return test.high - test.mean if test.high is not None else 0.0


def add_legend(figure: Figure, panels: list[Axes], title: str | None = None) -> None:
    """Set one legend of all panels below them, in as many columns as the figure has room for."""
    known = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    place = {"loc": "outside lower center", "handlelength": 2.5}
    for wide in range(len(known), 0, -1):
        drawn = figure.legend(known.values(), known, title=title, ncols=wide, **place)
        if wide == 1 or drawn.get_window_extent().width < figure.bbox.width:
            return
        drawn.remove()


def equalize_spans(panels: Iterable[Axes]) -> None:
    """Give all panels a y-axis of the same length, so that equal distances mean equal differences, and one long enough
    that small differences do not look large."""
    panels = list(panels)
    limits = [axes.get_ylim() for axes in panels]
    span = max([MIN_SPAN, *(high - low for low, high in limits)])
    for axes, (low, high) in zip(panels, limits, strict=True):
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def find_floor(outcomes: list[Outcome], floors: list[Floor]) -> Floor | None:
    """Return the hardest floor of the runs' one model and task; None where there are several or none."""
    model_tasks = {get_model_task(outcome) for outcome in outcomes}
    here = [floor for floor in floors if floor.model_task in model_tasks]
    return find_hardest(here) if len(model_tasks) == 1 else None


def is_unlearned(outcomes: list[Outcome], floors: list[Floor]) -> bool:
    """Return whether all these runs are of tasks that were not learned."""
    unranked = find_unranked(floors)
    return bool(outcomes) and all(unranked.get(get_model_task(outcome)) == UNLEARNED for outcome in outcomes)
