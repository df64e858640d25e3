"""A finished run evaluated again, from its record alone."""

import torch
from peft import PeftModel

import dual_lora.tuner  # noqa: F401 - registers DUAL_LORA with PEFT
from dual_lora.lab import evaluation, memory, methods, models, processes
from dual_lora.lab.runs import Record, task_of
from dual_lora.lab.settings import Settings, require
from dual_lora.lab.summary import compared
from dual_lora.lab.training import quiet
from tasks import Task


def run(settings: Settings, record: Record) -> int:
    """Print the scores now beside the recorded ones, keep them as evaluation.json, return 0 if they are equal, else 1.

    Raises:
        UserError: the run is not finished, or the rows are not those it was evaluated on.
    """
    stored = record.result()
    require(stored is not None, f"run={record.shown()}: not finished, it has no result.json")
    quiet()
    processes.join()
    task = task_of(settings)
    require(
        stored.get("task_version") in (task.version, None),
        f"run={record.shown()}: done with version {stored.get('task_version')} of {task.name}, which is now version "
        f"{task.version}; its scores are not to be had again",
    )
    splits = evaluation.load_scored(task, settings)
    for name, split in splits.items():
        same = split.facts()["sha256"] == stored["data"].get(name, {}).get("sha256")
        require(
            same, f"{split.origin}: not the {name} rows this run was evaluated on; give their folder as data_dir=DIR"
        )
    model, tokenizer = load_trained(settings, record, task)
    models.to_device(model)
    if stored.get("merged"):
        methods.merge(model)
    with memory.told(memory.fewer_rows(settings, models.sharded(model))):
        metrics, _ = evaluation.evaluate(model, tokenizer, task, splits, settings)
    print(compared(stored, metrics, record))
    kept = {"metrics": metrics, "equal": metrics == stored["metrics"]}
    processes.share(lambda: record.write("evaluation.json", kept))
    return 0 if metrics == stored["metrics"] else 1


def load_trained(settings: Settings, record: Record, task: Task, plain: bool = False) -> tuple[torch.nn.Module, object]:
    """Return the model as it was when the run ended, and its tokenizer. plain: see `models.load_plain`.

    Raises:
        UserError: the base model or what was trained cannot be loaded, or is not as the run left it.
    """
    record.check("config.yaml")
    record.check_model(settings)
    tuned = settings.method.peft is None
    load = models.load_plain if plain else models.load
    base, tokenizer = (None, models.load_tokenizer(settings)) if tuned else load(settings, task)
    folder = record.folder / ("model" if tuned else "adapter")
    name = "model.safetensors" if tuned else "adapter_model.safetensors"
    mend = "run its command again with force=true"
    whole = (folder / name).is_file() or (folder / f"{name}.index.json").is_file()  # the index of a large one's parts
    require(whole, f"{folder}: cannot be loaded (no {name}, the only format that is read); {mend}")
    with models.readable(f"{folder}: cannot be loaded", mend):
        if tuned:
            model = models.head_class(task).from_pretrained(folder, use_safetensors=True, **models.NO_CODE)
        else:
            model = PeftModel.from_pretrained(base, folder)
    record.check(folder.name)
    return model, tokenizer
