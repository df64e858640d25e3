"""`python train.py --help` and docs/settings.md, both from the settings' declarations and conf/.

Imports neither torch nor Hydra, so that help appears at once.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from dual_lora.lab.config.paths import CONF, ROOT, list_choices
from dual_lora.lab.config.schema import GROUPS, Settings

EXAMPLES = {
    "python train.py": "the demo: a bundled tiny model, no downloads, about a minute",
    "python train.py model=llama3-8b task=glue/rte method=dual_lora": "a model of the hub, adapted with Dual LoRA",
    "python train.py model=roberta-base task=glue/sst2 method=lora train.lr=5e-4 seed=1": "any setting by its name",
    "python train.py model=minilm-l6 model.path=DIR task=glue/sst2 data_dir=DIR train.max_steps=200": "your own files",
    "python train.py model=DIR task=classification data_dir=DIR": "your own model and tables; or model=ORG/NAME",
    "python train.py plugins=FILE.py --config-dir DIR task=NAME data_dir=DIR": "your own task and its settings files",
    "python train.py -m method=lora,lora_plus,dora,dual_lora seed=0,1,2": "every combination, a table at the end",
    "python train.py -m method=dual_lora method.rank=16 method.magnitude_ratio=0.25,0.5,0.75": "three ratios",
    "python train.py -m hydra/launcher=workstation seed=0,1,2": "several runs at once; on a cluster: slurm",
    "python train.py model=llama3-8b plan=true": "memory and hours that a run would need; loads no weights",
    "python train.py --cfg job method=lora": "show every setting of a run, without running it",
    "python eval.py run=runs/STUDY/ID": "evaluate again from the run's own record",
    "python sweep.py experiment=NAME": "all runs that a table needs, and the table",
}
# What a command line may hold in addition to the settings, by the programs that take it.
WORDS = {
    "train.py and sweep.py": {
        "--config-dir DIR": "a folder of your own settings files, DIR/GROUP/NAME.yaml",
    },
    "train.py, sweep.py and eval.py": {
        "plugins=FILE.py": "your own code: a file, the folder of a package, or a module; several: [FILE.py,FILE.py]",
    },
    "sweep.py": {
        "experiment=NAME": "the table to fill and report, conf/experiment/NAME.yaml; several: NAME,NAME, or all",
        "scale=NAME": "how large its runs are: full, small or smoke",
        "run=false": "run nothing, report what there is",
    },
    "eval.py": {
        "run=DIR": "the finished run, runs/STUDY/ID",
        "data_dir=DIR": "its data, if they lie elsewhere now",
        "model.path=DIR": "its base model, if it lies elsewhere now",
        "eval.batch_size=N": "rows scored at a time, if not as in the run",
        "export=DIR": "write the model with its adapter merged, and the adapter separately, instead of evaluating",
        "model.dtype=TYPE": "type of the exported weights",
        "push_to_hub=ORG/NAME": "send the exported folder to the Hugging Face hub, too",
        "analyse=true": "measure what the run did to each weight: ranks, zeros, norms, flipped signs",
        "against=DIR": "with analyse=true: compare these with those of another run on the same model",
        "save_updates=FILE": "write dW of every changed weight, FILE.safetensors",
    },
}
SWEEPS = "Several runs (-m), in Hydra's syntax: KEY=VALUE,VALUE or KEY=range(START,STOP,STEP) or GROUP=glob(PATTERN)"
TABLE_HEAD = ("| setting | default | meaning |", "|---|---|---|")
MANY = "..."  # a list or a dictionary that would fill the line


def iterate_settings(cls: type = Settings, prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """Yield full name and explanation of every setting, and whether it is a group of others."""
    for field in sorted(fields(cls), key=lambda field: is_dataclass(field.type)):
        yield prefix + field.name, field.metadata["about"], is_dataclass(field.type)
        if is_dataclass(field.type):
            yield from iterate_settings(field.type, f"{prefix}{field.name}.")


def read_defaults() -> dict[str, str]:
    """Return the value of every setting in `python train.py`, by its full name, as one would type it."""
    content = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    chosen = {key: name for entry in content.pop("defaults") if isinstance(entry, dict) for key, name in entry.items()}
    found = {key: format_setting(value) for key, value in iterate_defaults(content)}
    for group in GROUPS:
        choice = yaml.safe_load((CONF / group / f"{chosen[group]}.yaml").read_text(encoding="utf-8"))
        found |= {f"{group}.{key}": format_setting(value) for key, value in choice.items()}
        found[group] = chosen[group]
    return found


def iterate_defaults(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield full name and value of every setting of conf/config.yaml."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", part) for name, part in value.items())
        else:
            yield key, value


def format_setting(value: Any) -> str:
    """Return a value as one would type it: a reference as the other setting's name, a filled list or dict as ..."""
    if isinstance(value, str):
        return value.removeprefix("${").removesuffix("}")
    return MANY if isinstance(value, dict | list) and value else yaml.safe_dump(value).partition("\n")[0]


def render_help() -> str:
    """Return what `python train.py --help` prints."""
    lines = ["Adapt a model to a task with a method, evaluate it, and keep a record below runs/.", ""]
    lines += [f"  {command}\n      {about}" for command, about in EXAMPLES.items()]
    lines += ["", "Choices (GROUP=NAME), each a file conf/GROUP/NAME.yaml:", ""]
    lines += [f"  {group:<16}{', '.join(list_choices(group))}" for group in (*GROUPS, "hydra/launcher")]
    for programs, words in WORDS.items():
        lines += ["", f"Words of {programs}:", ""]
        lines += [f"  {word:<30}{about}" for word, about in words.items()]
    lines += ["", "Settings (KEY=VALUE) [default in `python train.py`]; other choices change the defaults.", ""]
    defaults = read_defaults()
    for key, about, group in iterate_settings():
        value = f" [{defaults[key]}]" if key in defaults else ""
        lines.append(f"\n  {key}: {about}{value}" if group else f"  {key:<30}{about}{value}")
    return "\n".join([*lines, "", SWEEPS])


def render_settings_markdown() -> str:
    """Return docs/settings.md."""
    head = "Made from `dual_lora/lab/config/schema.py` and `conf/` (`python -m dual_lora.lab.commands.settings_help`)."
    lines = ["# Settings", "", f"{head} `python train.py --help` prints the same."]
    lines += ["", "Commands, each with what it does:", ""]
    lines += [f"- `{command}`: {about}" for command, about in EXAMPLES.items()]
    lines += ["", f"{SWEEPS}. The defaults below are those of `python train.py`; other choices bring others."]
    lines += ["", "| group | choices |", "|---|---|"]
    lines += [f"| `{group}` | {', '.join(list_choices(group))} |" for group in (*GROUPS, "hydra/launcher")]
    lines += [
        "",
        "## Words of the programs",
        "",
        "What they take in addition to the settings.",
        "",
        "| program | word | meaning |",
        "|---|---|---|",
    ]
    lines += [f"| {names} | `{word}` | {about} |" for names, words in WORDS.items() for word, about in words.items()]
    lines += ["", "## The run", "", *TABLE_HEAD]
    defaults = read_defaults()
    for key, about, group in iterate_settings():
        value = f"`{defaults[key]}`" if key in defaults else ""
        if group:
            line = f"{about[0].upper()}{about[1:]}" + (f", by default {value}" if value else "")
            lines += ["", f"## {key}", "", f"{line}.", "", *TABLE_HEAD]
        else:
            lines.append(f"| `{key}` | {value} | {about} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(render_settings_markdown(), encoding="utf-8")
