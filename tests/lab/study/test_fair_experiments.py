"""What the rows of an experiment share, so that a comparison is one of methods: the width of the grids that rates are
chosen from, and the scale of the update."""

import math
from collections import defaultdict

import pytest
from omegaconf import OmegaConf

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.study.experiment import SCALES, Experiment
from tests.support.places import ROOT

FILES = {path.stem: path for path in sorted((ROOT / "conf/experiment").glob("*.yaml"))}
PLACES = [
    (name, scale)
    for name, path in FILES.items()
    if "kind" not in (content := OmegaConf.load(path))
    for scale in SCALES
    if scale in content
]
# Where records or costs keep the scales of the past; the head of each file says so.
UNEQUAL = {"commonsense": {"small", "smoke"}, "rank_allocation": {"small", "smoke"}}
UNEQUAL |= {"learning_rates": {"small", "smoke"}, "update_rank": set(SCALES), "cost": set(SCALES)}
SAID = "Dual LoRA's scale is twice LoRA's"


def compute_scale(settings: Settings) -> float | None:
    """Return what multiplies BA, or ReLU(BA) ⊙ Sign(DC); None for methods of another kind."""
    peft, method = settings.method.peft or {}, settings.method
    plain = peft.get("peft_type") == "LORA" and not {"use_rslora", "init_lora_weights", "target_modules"} & peft.keys()
    if plain:
        return method.alpha / method.rank
    if peft.get("peft_type") == "DUAL_LORA":
        r1 = method.r1 or round(method.rank * method.magnitude_ratio)
        r2 = method.r2 or method.rank - r1
        return method.alpha / math.sqrt(r1 * r2)
    return None


def read_head(name: str) -> str:
    """Return the comment at the head of an experiment's file as one line."""
    return " ".join(line.lstrip("# ") for line in FILES[name].read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize(("name", "scale"), PLACES)
def test_grids_are_equally_wide_for_every_row(name, scale):
    tune = Experiment.load(name, scale).tune
    for label, rates in tune.grid.items() if tune else ():
        first = next(iter(tune.grid.values()))
        assert len(rates) == len(first), label
        assert max(rates) / min(rates) == pytest.approx(max(first) / min(first)), label
        assert rates == sorted(rates), label


@pytest.mark.parametrize(("name", "scale"), PLACES)
def test_dual_lora_has_a_row_at_the_scale_of_each_row_of_lora(name, scale):
    ours, theirs = defaultdict(set), defaultdict(set)
    for cell in Experiment.load(name, scale).compose_cells(["seed=0"]):
        settings = cell.settings
        place = settings.model.name, settings.task.name, settings.method.rank
        if (factor := compute_scale(settings)) is not None:
            dual = settings.method.peft["peft_type"] == "DUAL_LORA"
            (ours if dual else theirs)[place].add(round(factor, 2))
    pairs = [(ours[place], theirs[place]) for place in ours.keys() & theirs.keys()]
    if scale in UNEQUAL.get(name, ()):
        assert any(not dual & lora for dual, lora in pairs), "equal by now: take it out of the list"
        assert SAID in read_head(name)
    else:
        assert all(lora <= dual for dual, lora in pairs), pairs
