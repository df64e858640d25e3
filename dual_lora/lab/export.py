"""A finished run as a checkpoint that plain transformers loads, without this package."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from dual_lora.lab import faults, models, nf4, reevaluation, training
from dual_lora.lab.disk import remove
from dual_lora.lab.loop import disk_errors
from dual_lora.lab.runs import Record, task_of
from dual_lora.lab.settings import Settings, UserError

SHARD = "5GB"
# Ids of a made-up text; what they are does not matter to a comparison of logits.
PROBE = (4, 32)


def write(settings: Settings, record: Record, folder: Path, dtype: str) -> str:
    """Write the merged model, its tokenizer and, below adapter/, the adapter; return what to tell the user.

    The merge is done in float32 and rounded once to `dtype`; what is told is the relative difference (norm over norm)
    between the logits of the checkpoint as loaded again and those of the unmerged run. Of a base in 4 bits the adapter
    is merged into the values these stand for, because those are what it was trained and evaluated on.

    Raises:
        UserError: the folder cannot be written.
    """
    training.quiet()
    task = task_of(settings)
    model, tokenizer = reevaluation.load_trained(settings, record, task)
    unmerged = logits(nf4.in_float32(model).eval())
    if settings.hardware.base:
        model = reevaluation.load_trained(settings, record, task, plain=True)[0]
    merged: PreTrainedModel = model.merge_and_unload() if isinstance(model, PeftModel) else model
    try:
        with disk_errors(folder):
            merged.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=SHARD)
            tokenizer.save_pretrained(folder)
            if (record.folder / "adapter").is_dir():
                shutil.copytree(record.folder / "adapter", folder / "adapter")
        options = {"dtype": getattr(torch, dtype), "use_safetensors": True, **models.NO_CODE}
        loaded = models.head_class(task).from_pretrained(folder, **options)
        found = logits(loaded.eval())
    except BaseException as error:
        for path in folder.glob("*"):  # it was empty, and is so again for the next try
            remove(path)
        if isinstance(error, OSError):
            raise UserError(f"export={folder}: {faults.line(error)}") from error
        raise
    error = ((found - unmerged).norm() / unmerged.norm()).item()
    base = ", its 4-bit base dequantised" if settings.hardware.base else ""
    return f"exported: {folder} ({dtype}{base}); its logits differ from the unmerged run's by {error:.1e} of their norm"


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, PROBE, generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().cpu()
