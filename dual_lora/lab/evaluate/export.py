"""A finished run as a checkpoint that plain transformers loads, without this package."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, describe_machine_error
from dual_lora.lab.evaluate.reevaluation import load_trained_model
from dual_lora.lab.model.load import get_head_class
from dual_lora.lab.model.nf4 import compute_in_float32
from dual_lora.lab.model.source import NO_CODE
from dual_lora.lab.record.record import Record
from dual_lora.lab.system.files import raise_disk_errors, remove_path
from dual_lora.lab.system.libraries import silence_libraries

MAX_SHARD_SIZE = "5GB"
# Ids of a made-up text; what they are does not matter to a comparison of logits.
PROBE_SHAPE = (4, 32)


def export_model(settings: Settings, record: Record, folder: Path, dtype: str) -> str:
    """Write the merged model, its tokenizer and, below adapter/, the adapter; return what to tell the user.

    The merge is done in float32 and rounded once to `dtype`; what is told is the relative difference (norm over norm)
    between the logits of the checkpoint as loaded again and those of the unmerged run. Of a base in 4 bits the adapter
    is merged into the values these stand for, because those are what it was trained and evaluated on.

    Raises:
        UserError: the folder cannot be written.
    """
    silence_libraries()
    task = load_task(settings)
    model, tokenizer = load_trained_model(settings, record, task)
    unmerged = compute_probe_logits(compute_in_float32(model).eval())
    if settings.hardware.base:
        model = load_trained_model(settings, record, task, plain=True)[0]
    merged: PreTrainedModel = model.merge_and_unload() if isinstance(model, PeftModel) else model
    try:
        with raise_disk_errors(folder):
            merged.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
            tokenizer.save_pretrained(folder)
            if (record.folder / "adapter").is_dir():
                shutil.copytree(record.folder / "adapter", folder / "adapter")
        options = {"dtype": getattr(torch, dtype), "use_safetensors": True, **NO_CODE}
        loaded = get_head_class(task).from_pretrained(folder, **options)
        found = compute_probe_logits(loaded.eval())
    except BaseException as error:
        for path in folder.glob("*"):  # it was empty, and is so again for the next try
            remove_path(path)
        if isinstance(error, OSError):
            raise UserError(f"export={folder}: {describe_machine_error(error)}") from error
        raise
    error = ((found - unmerged).norm() / unmerged.norm()).item()
    base = ", its 4-bit base dequantised" if settings.hardware.base else ""
    return f"exported: {folder} ({dtype}{base}); its logits differ from the unmerged run's by {error:.1e} of their norm"


@torch.inference_mode()
def compute_probe_logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().cpu()
