"""`eval.py run=... save_updates=FILE`: dW of every weight that a finished run changed, as one safetensors file.

The matrices can be the targets of `python -m dual_lora.analysis.fit --updates FILE`.
"""

import os
from pathlib import Path

from safetensors.torch import save_file

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import require
from dual_lora.lab.record.record import Record
from dual_lora.lab.system.files import allow_by_umask, replace_file, translate_save_errors
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.lab.weights.updates import check_changed, load_updates


def save_updates(settings: Settings, record: Record, file: Path) -> str:
    """Write dW of a finished run, each out x in in float32 under the name of its module, and return the text to print.

    Raises:
        UserError: the run cannot be loaded, its dW is not known, it changed no weight, or the file cannot be written or
            was written meanwhile.
    """
    silence_libraries()
    updates = load_updates(settings, record)
    check_changed(updates, settings, record)
    changes = {update.name: update.get_change().contiguous() for update in updates}
    with translate_save_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as temporary:
            save_file(changes, temporary, metadata={"run": record.name})
            allow_by_umask(temporary)
            require(not os.path.lexists(file), f"save_updates={file}: another process wrote it; give a new name")
    return f"{len(changes)} updates of {record.format_path()}: {file}"
