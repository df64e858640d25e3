"""A finished run as a checkpoint that plain transformers loads, without this package."""

import glob
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, describe_machine_error, require
from dual_lora.lab.evaluate.model_card import CARD_NAME, format_adapter_card, format_model_card
from dual_lora.lab.evaluate.trained import load_trained_model
from dual_lora.lab.inputs.adapter_files import ADAPTER_CONFIG
from dual_lora.lab.model.encode import get_position_limit
from dual_lora.lab.model.fused_layers import fuse_layers
from dual_lora.lab.model.load import COARSE_ROUNDING, get_head_class
from dual_lora.lab.model.merge import MERGE_TOLERANCE, explain_unmergeable, merge_and_unload
from dual_lora.lab.model.nf4 import compute_in_float32
from dual_lora.lab.model.source import NO_CODE
from dual_lora.lab.record.record import Record
from dual_lora.lab.system.files import flush_to_disk, raise_disk_errors, read_umask, remove_path
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.lab.system.sealed import list_files
from tasks import Task

MAX_SHARD_SIZE = "5GB"
# How many characters of the folder's name its unfinished copy has (not too long in any script), and how that ends.
NAME_CHARACTERS, PARTIAL = 40, ".partial"
# Batch size and length of random token ids on which logits are compared.
PROBE_SHAPE = (4, 32)
# What tells a run's folder from any other.
RECORD_FILES = ("config.yaml", "environment.json")


def export_model(settings: Settings, record: Record, folder: Path, dtype: str) -> str:
    """Write the merged model, its tokenizer, a model card and, below adapter/, the adapter. Return a message with the
    relative error (norm over norm) of the reloaded checkpoint's logits, compared with the unmerged run's.

    An adapter of split layers is left out: the model it fits exists only here.

    The merge is done in float32 and rounded once to `dtype`. A 4-bit base is dequantized first, because the adapter was
    trained and evaluated on those values. The folder appears complete or not at all.

    Raises:
        UserError: the method cannot be merged, the merged model or the one read back from the folder computes something
            else or NaN or Inf, or the folder cannot be written or was made by somebody else meanwhile.
    """
    check_export_folder(folder)
    report_unfinished_exports(folder)
    silence_libraries()
    task = load_task(settings)
    model, tokenizer = load_trained_model(settings, record, task)
    unmerged = compute_probe_logits(compute_in_float32(model).eval())
    if settings.hardware.base:
        model = load_trained_model(settings, record, task, plain=True)[0]
    merged = merge_trained_model(model, settings, record, folder)
    check_difference(folder, compare_logits(compute_probe_logits(merged.float().eval()), unmerged))
    with build_folder(folder) as partial:
        merged.to(getattr(torch, dtype)).save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(partial)
        if (record.folder / "adapter").is_dir() and not settings.splits_layers:
            copy_adapter(record.folder / "adapter", partial / "adapter", settings, record, task)
        options = {"dtype": getattr(torch, dtype), "use_safetensors": True, **NO_CODE}
        loaded = get_head_class(task).from_pretrained(partial, **options)
        check_weights(folder, loaded, dtype)
        error = compare_logits(compute_probe_logits(loaded.eval()), unmerged)
        check_difference(folder, error, dtype)
        card = format_model_card(settings, record, task, dtype, (partial / "adapter").is_dir())
        (partial / CARD_NAME).write_text(card, encoding="utf-8")
    base = ", its 4-bit base dequantized" if settings.hardware.base else ""
    return f"exported: {folder} ({dtype}{base}); its logits differ from the unmerged run's by {error:.1e} of their norm"


def copy_adapter(source: Path, folder: Path, settings: Settings, record: Record, task: Task) -> None:
    """Copy a run's adapter, with a card of its own, and with the base model's name instead of its place here."""
    shutil.copytree(source, folder)
    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    config["base_model_name_or_path"] = settings.model.hub or settings.model.name
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), "utf-8")
    (folder / CARD_NAME).write_text(format_adapter_card(settings, record, task), encoding="utf-8")


def merge_trained_model(model: torch.nn.Module, settings: Settings, record: Record, folder: Path) -> PreTrainedModel:
    """Return a trained model as plain transformers knows it, split layers fused.

    Raises:
        UserError: PEFT cannot merge the method.
    """
    if not isinstance(model, PeftModel):
        return model
    why = explain_unmergeable(model)
    require(
        why is None,
        f"export={folder}: method={settings.method.name} cannot be merged into the base weights ({why}); share "
        f"only the adapter, {record.format_path()}/adapter, which PEFT loads onto the base model",
    )
    return fuse_layers(merge_and_unload(model))


def check_export_folder(folder: Path) -> None:
    """Refuse a folder that an export must not become, before anything is loaded. That it is new or empty is checked by
    the command, and once more when it is renamed into place.

    Raises:
        UserError: it is a link, or within a run's record.
    """
    remedy = "give a new folder"
    require(not folder.is_symlink(), f"export={folder}: a link; {remedy}")
    place = folder.resolve()
    for parent in (place, *place.parents):
        is_record = all((parent / name).is_file() for name in RECORD_FILES)
        require(not is_record, f"export={folder}: within the record of a run, {parent}; {remedy} elsewhere")


def report_unfinished_exports(folder: Path) -> None:
    """Print the hidden folders that killed exports to `folder` left next to it: they may be as large as the model.
    Another process may be writing one now, so they are not removed."""
    for path in sorted(folder.parent.glob(f".{glob.escape(folder.name[:NAME_CHARACTERS])}.*{PARTIAL}")):
        print(f"{path}: an unfinished export; remove it, unless it is still being written", file=sys.stderr)


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder next to `folder` to write into. It takes that name when the block ends. If the block fails, it
    is removed and nothing else is touched.

    Raises:
        UserError: the disk fails, or something of that name exists by then.
    """
    partial = None
    try:
        with raise_disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            # A name that no other export chooses.
            prefix = f".{folder.name[:NAME_CHARACTERS]}."
            partial = Path(tempfile.mkdtemp(prefix=prefix, suffix=PARTIAL, dir=folder.parent))
            yield partial
            apply_umask(partial)
            install_folder(partial, folder)
    except OSError as error:
        raise UserError(f"export={folder}: {describe_machine_error(error)}") from error
    finally:
        if partial:
            remove_path(partial)


def apply_umask(folder: Path) -> None:
    """Give a folder of `mkdtemp`, and the files in it, the permissions of new ones: some writers make their files
    readable only by the owner."""
    mask = read_umask()
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def install_folder(partial: Path, folder: Path) -> None:
    """Rename a complete folder into place. The system allows this only if there is nothing, or an empty folder.

    Raises:
        UserError: somebody else was first.
    """
    for path in list_files(partial):
        flush_to_disk(path)
    try:
        partial.rename(folder)
    except OSError:
        taken = folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
        require(
            not taken,
            f"export={folder}: another process wrote to it meanwhile, so it was left unchanged; give a new folder",
        )
        raise
    flush_to_disk(folder.parent)


def check_weights(folder: Path, model: PreTrainedModel, dtype: str) -> None:
    """Refuse weights that `dtype` does not hold.

    Raises:
        UserError: with the first weight that contains NaN or Inf.
    """
    bad = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    require(
        bad is None, f"export={folder}: {bad} contains NaN or Inf in {dtype}; take model.dtype=float32, or another run"
    )


def check_difference(folder: Path, error: float, dtype: str | None = None) -> None:
    """Refuse a merge that changed the outputs, or a folder that gives others. error: relative error of the logits, norm
    over norm. dtype: that of the folder's weights; None before they are written, in float32.

    Raises:
        UserError: it is NaN or Inf, or more than rounding can make.
    """
    rounded = dtype not in (None, "float32")
    model = f"model that is read back in {dtype}" if dtype else "merged model"
    remedy = "take model.dtype=float32" if rounded else "take another run"
    wrong = "are NaN" if math.isnan(error) else f"differ from the run's by {error:.1e} of their norm"
    require(
        error < (COARSE_ROUNDING if rounded else MERGE_TOLERANCE),
        f"export={folder}: the logits of the {model} {wrong}, so its weights or its method cannot be exported; "
        f"{remedy}, or only the adapter",
    )


def compare_logits(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference of two tensors over the norm of the second."""
    return ((found - expected).norm() / expected.norm()).item()


@torch.inference_mode()
def compute_probe_logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of random token ids, batch x length x vocabulary, in float64 on the CPU."""
    rows, length = PROBE_SHAPE
    shape, generator = (rows, min(length, get_position_limit(model) or length)), torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, shape, generator=generator)
    ids = ids.to(model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().cpu()
