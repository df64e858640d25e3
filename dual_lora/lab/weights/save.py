"""`eval.py run=... save_updates=FILE`: dW of every weight that a finished run changed, as one safetensors file.

A weight has the name of its module; a bias, and any other parameter of a module, its own. A task's head
has no W0 and is left out. The matrices can be the targets of `python -m dual_lora.analysis.fit --updates FILE`.
"""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import require
from dual_lora.lab.model.merge import unload_adapter
from dual_lora.lab.record.record import Record
from dual_lora.lab.system.files import allow_by_umask, replace_file, translate_save_errors
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.lab.weights.updates import (
    MATRIX_DIMENSIONS,
    check_changed,
    list_updates,
    load_trained_and_base,
    orient_weight,
)


def save_updates(settings: Settings, record: Record, file: Path) -> str:
    """Write dW of a finished run, each out x in in float32, and return the text to print.

    Raises:
        UserError: the run cannot be loaded, its dW is not known, it changed no weight, or the file cannot be written or
            was written meanwhile.
    """
    silence_libraries()
    trained, base, _ = load_trained_and_base(settings, record)
    changes = collect_changes(trained, base, settings)
    check_changed(changes, settings, record)
    with translate_save_errors(file, "give another file as save_updates=FILE"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as temporary:
            save_file(changes, temporary, metadata={"run": record.name})
            allow_by_umask(temporary)
            require(not os.path.lexists(file), f"save_updates={file}: another process wrote it; give a new name")
    return f"{len(changes)} updates of {record.format_path()}: {file}"


def collect_changes(trained: nn.Module, base: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """Return dW of every weight that training changed, whether by an adapter or in full, by the name to save it under.
    The adapter is taken out of `trained`.

    Raises:
        UserError: the method changes more than a weight can show.
    """
    updates = list_updates(trained, base, settings)
    found = {update.name: update.get_change().contiguous() for update in updates}
    known = {f"{update.module}.weight" for update in updates}
    before = dict(base.named_parameters(remove_duplicate=False))
    for name, weight in unload_adapter(trained).named_parameters():
        if name in known or settings.model.heads & set(name.split(".")):
            continue
        module, _, kind = name.rpartition(".")
        change = weight.detach().float() - before[name].detach().float()
        if kind == "weight" and change.ndim >= MATRIX_DIMENSIONS:
            change = orient_weight(base.get_submodule(module), change)
        if change.any():
            found[module if kind == "weight" else name] = change.contiguous()
    return found
