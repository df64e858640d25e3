"""How well the form of each method fits what a finished run did to its weights: `dual_lora.analysis.fit` on real dW.

One weight of every role is fitted, that of the middle layer. The fits become part of the run's record, so that a report
needs neither the weights nor another fit.
"""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from dual_lora.analysis.fit import METHODS, OURS, plan_cells, run_cell
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.record.record import FIT_FILE, Record
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.lab.weights.updates import Update, check_changed, find_layer_number, find_role, load_updates


def fit_updates(settings: Settings, record: Record, size: str) -> None:
    """Fit updates of a finished run with every form and rate and write the fits into its folder.

    size: of the study, as in `dual_lora.analysis.fit`; one start for each fit, since other runs are other updates.

    Raises:
        UserError: the run cannot be loaded, its dW is not known, or it changed no weight.
    """
    silence_libraries()
    updates = load_updates(settings, record)
    check_changed(updates, settings, record)
    chosen = choose_middle_updates(updates, settings)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "updates.safetensors"
        save_file({role: update.get_change().float().contiguous() for role, update in chosen.items()}, file)
        cells = [cell for cell in plan_cells(size, file) if cell.seed == 0]
        rows = [
            {"cell": asdict(cell), "result": run_cell(cell, file)} for cell in tqdm(cells, desc="fits", leave=False)
        ]
    content = {
        "run": record.name,
        "modules": {role: update.name for role, update in chosen.items()},
        "labels": {name: method.label for name, method in METHODS.items()},
        "compared_with": {name: OURS[method.budget] for name, method in METHODS.items()},
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    record.write_sealed(FIT_FILE, content)


def choose_middle_updates(updates: list[Update], settings: Settings) -> dict[str, Update]:
    """Return the update of the middle layer for each role, by role; blocks of a fused weight count apart."""
    by_role: dict[str, list[Update]] = {}
    for update in updates:
        block = update.name.removeprefix(update.module)  # "[0]", or nothing
        by_role.setdefault(f"{find_role(update.module, settings)}{block}", []).append(update)
    found = {}
    for role, some in by_role.items():
        some.sort(key=lambda update: find_layer_number(update.module) or 0)
        found[role.replace("/", "+")] = some[len(some) // 2]
    return found
