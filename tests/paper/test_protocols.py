"""dual_lora/paper/PROTOCOLS.md: how published rows were made beside how ours are, from the tables and the experiments.

The test computes every column but the last, `why`, which is written by hand and asked for where ours differs.
DUAL_LORA_GOLDEN=write rewrites the page: reasons are kept by experiment, model and setting, and dropped where nothing
differs any more.
"""

import os
import re
from functools import cache

from omegaconf import OmegaConf

from dual_lora import paper
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.study.experiment import Cell, Experiment
from tasks import commonsense
from tests.support.places import ROOT
from tests.support.published import get_row

PAGE = ROOT / "dual_lora/paper/PROTOCOLS.md"
HEAD = """\
# Published protocols and ours

What LoRA (GLUE, E2E) and DoRA (commonsense) print, what their code does, and what the rows "published rate" of
`conf/experiment/nlu.yaml`, `nlg.yaml` and `commonsense.yaml` do at scale=full. Where ours is not what both say, the
last column tells why. `tests/paper/test_protocols.py` computes every other column and refuses a difference without a
reason.

| experiment | model | setting | paper | code | ours | why |
|:--|:--|:--|:--|:--|:--|:--|
"""
GLUE = {"MNLI": "mnli", "SST-2": "sst2", "MRPC": "mrpc", "CoLA": "cola"}
GLUE |= {"QNLI": "qnli", "QQP": "qqp", "RTE": "rte", "STS-B": "stsb"}
KEYS = {
    "lr": "train.lr",
    "epochs": "train.epochs",
    "max_length": "task.max_length",
    "rank": "method.rank",
    "alpha": "method.alpha",
    "dropout": "method.dropout",
    "weight_decay": "train.weight_decay",
    "label_smoothing": "task.label_smoothing",
    "classifier_dropout": "task.head_dropout",
    "beams": "task.num_beams",
    "length_penalty": "task.length_penalty",
    "no_repeat_ngram": "task.no_repeat_ngram",
    "max_new_tokens": "task.max_new_tokens",
    "precision": "model.dtype",
    "schedule": "train.schedule",
    "separator": "task.options.separator",
    "references": "task.options.references",
    "dropout within the base": "model.dropout",
}
# Settings of a script that are none of ours: the batch says what they come to.
FOLDED = {"devices", "micro_batch", "warmup_steps"}


@cache
def published_cells(name: str) -> list[Cell]:
    """Return the cells of an experiment's rows that have a published rate, with one seed."""
    cells = Experiment.load(name, "full").compose_cells(["seed=0"])
    return [cell for cell in cells if "published rate" in cell.label]


def read_setting(settings: Settings, key: str) -> object:
    """Return the value of a setting, also of one that this version does not have."""
    value: object = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return value


def count_steps(settings: Settings) -> int:
    return settings.count_steps(settings.task.train_rows)


def describe_ours(name: str, setting: str, settings: Settings) -> str:
    """Return what one of our runs has, in the words of the published tables."""
    experiment, train, task = Experiment.load(name, "full"), settings.train, settings.task
    if setting == "batch":
        return f"{train.batch_size * train.accumulation * settings.hardware.devices}"
    if setting == "clipping":
        return f"{train.max_grad_norm:g}" if train.max_grad_norm else "none"
    if setting in ("warmup", "warmup_ratio"):
        steps = getattr(task, "warmup_steps", None)
        return f"{steps} steps" if steps is not None else f"ratio {task.warmup_ratio:g}"
    if setting == "modules":
        patterns = {settings.model.roles[role] for role in settings.model.adapt}
        fused = len(patterns) == 1 and not settings.model.split
        return " ".join(settings.model.adapt) + (" in one weight, adapted whole" if fused else "")
    if setting == "optimizer":
        return "AdamW"  # dual_lora/lab/train/run.py has no other
    if setting == "Adam's epsilon":
        return f"{train.adam_epsilon or 1e-8:g}"
    if setting == "start of MRPC and RTE and STS-B":
        return "best MNLI adapter" if getattr(experiment, "starts", None) else "pre-trained model"
    if setting == "checkpoint":
        return describe_checkpoint(settings)
    if setting == "seeds":
        return f"{'median and mean' if getattr(experiment, 'median', False) else 'mean'} of {len(experiment.seeds)}"
    if setting == "MNLI column":
        return (
            "matched accuracy" if paper.load_table("lora_table2_glue").ours["MNLI"] == "glue/mnli:accuracy" else "other"
        )
    if setting == "MRPC and CoLA and STS-B columns":
        ours = paper.load_table("lora_table2_glue").ours
        return ", ".join(ours[column].partition(":")[2] for column in ("MRPC", "CoLA", "STS-B"))
    if setting == "average":
        return f"mean of {len(paper.load_table('lora_table2_glue').average['avg'])} columns"
    if setting == "output ends at":
        return "end of text" + (" or a blank line" if "\n\n" in task.stop else "")
    if setting == "prompts of training and test":
        prompts = commonsense.TRAINING_PROMPT, commonsense.EVALUATION_PROMPT
        alike = prompts[0].split() == prompts[1].split() and prompts[0] != prompts[1]
        return "differ in white space" if alike else "other"
    if setting == "answer":
        kept = commonsense.cut_response(f"first {commonsense.RESPONSE} last")
        return {"first": "first option before a second marker", "last": "first option after the last marker"}[kept]
    if setting == "loss":
        return "prompt and response" if task.loss_on_prompt else "response"
    if setting == "beam search":
        return task.search or "transformers"
    if setting == "evaluated":
        return f"{'merged' if settings.model.dtype == 'float32' else 'unmerged'}, batches of {settings.eval.batch_size}"
    value = read_setting(settings, KEYS[setting])
    return "–" if value is None else f"{value:g}" if isinstance(value, float | int) else str(value)


def describe_checkpoint(settings: Settings) -> str:
    task = settings.task
    if task.checkpoint == "best_loss":
        return f"lowest loss on {task.validation_size} training rows, every {task.validation_interval} steps"
    return {"best": "best epoch", "last": "last"}[task.checkpoint]


def normalise(text: str) -> str:
    """Return a printed value as ours is printed: numbers without trailing zeros, a bare count of warm-up steps."""
    return f"{float(text):g}" if re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", text) else text


def group_values(values: dict[str, str]) -> str:
    """Return values by column as text: one if all are alike, else each with its columns."""
    found: dict[str, list[str]] = {}
    for column, value in values.items():
        found.setdefault(value, []).append(column)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} ({', '.join(columns)})" for value, columns in found.items())


def iterate_glue_rows():
    """Yield the settings of LoRA's Tables 9 and 10: model, setting, and its values by source and by task."""
    table = paper.load_table("lora_table9_10_glue_settings")
    for model in dict.fromkeys(row.keys["model"] for row in table.rows):
        cells = {
            cell.settings.task.name: cell.settings
            for cell in published_cells("nlu")
            if model == cell.settings.model.name
        }
        names = dict.fromkeys(row.keys["setting"] for row in table.rows if row.keys["model"] == model)
        printed = {
            (row.keys["printed_in"], row.keys["setting"]): row.values
            for row in table.rows
            if row.keys["model"] == model
        }
        for setting in (name for name in names if name not in FOLDED):
            sides = {}
            for side, source in (("paper", "paper"), ("code", "script")):
                given = printed.get((source, setting), {})
                sides[side] = {task: normalise(given[task].text) for task in GLUE if task in given}
            sides["ours"] = {task: describe_ours("nlu", setting, cells[f"glue/{name}"]) for task, name in GLUE.items()}
            if setting == "batch":
                devices = printed["script", "devices"]
                sides["code"] = {t: f"{int(v) * int(devices[t].text)}" for t, v in sides["code"].items()}
            if setting == "warmup_ratio":
                steps = printed.get(("script", "warmup_steps"), {})
                sides = {
                    side: {t: v if v.startswith("ratio") or " " in v else f"ratio {v}" for t, v in s.items()}
                    for side, s in sides.items()
                }
                sides["code"] |= {t: v.text if " " in v.text else f"{v.text} steps" for t, v in steps.items()}
            yield model, setting, sides


def iterate_e2e_rows():
    """Yield the settings of LoRA's Table 11 on E2E, as `iterate_glue_rows`."""
    table = paper.load_table("lora_table11_gpt2_settings")
    code = get_row(table, task="e2e", printed_in="readme").values
    values = get_row(table, task="e2e", printed_in="paper").values
    ours = {cell.settings.model.name: cell.settings for cell in published_cells("nlg")}
    for setting in table.columns:
        sides = {
            side: {"": normalise(given[setting].text)} if setting in given else {}
            for side, given in (("paper", values), ("code", code))
        }
        if setting == "warmup":
            sides["paper"] = {"": f"{values['warmup'].text} steps"}
        yield "–", setting, {**sides, "ours": {model: describe_ours("nlg", setting, s) for model, s in ours.items()}}


def iterate_commonsense_rows():
    """Yield the settings of DoRA's Table 8, as `iterate_glue_rows`: by method and rank."""
    table = paper.load_table("dora_table8_settings")
    for model in dict.fromkeys(cell.settings.model.name for cell in published_cells("commonsense")):
        mine = {
            f"{c.settings.method.name} {c.settings.method.rank}": c.settings
            for c in published_cells("commonsense")
            if c.settings.model.name == model
        }
        for setting in (name for name in table.columns if name not in FOLDED | {"modules"}):
            sides = {"paper": {}, "code": {}}
            for row in table.rows:
                place = f"{row.keys['method']} {row.keys['rank']}"
                if row.keys["model"] in (model, None) and place in mine and setting in row.values:
                    side = "paper" if row.keys["printed_in"] == "paper" else "code"
                    text = normalise(row.values[setting].text)
                    sides[side][place] = f"{text} steps" if setting == "warmup" else text
            yield (
                model,
                setting,
                {**sides, "ours": {place: describe_ours("commonsense", setting, s) for place, s in mine.items()}},
            )


def iterate_other_rows(name: str):
    """Yield what stands in no table of hyper-parameters, as `iterate_glue_rows`."""
    for row in paper.load_table("published_protocols").select_rows(experiment=name):
        model = row.keys["model"]
        ours = {
            c.settings.model.name: c.settings for c in published_cells(name) if model in (None, c.settings.model.name)
        }
        given = {
            side: {"": normalise(row.values[side].text)} if side in row.values else {} for side in ("paper", "code")
        }
        setting = row.keys["setting"]
        yield model or "–", setting, {**given, "ours": {m: describe_ours(name, setting, s) for m, s in ours.items()}}


def differs(sides: dict[str, dict[str, str]]) -> bool:
    """Whether one of our values is not what the paper says and the code does."""
    ours = sides["ours"]
    for side in ("paper", "code"):
        for place, value in sides[side].items():
            mine = {ours[place]} if place in ours else set(ours.values())
            if mine != {value}:
                return True
    return False


def build_rows():
    """Return the rows of the page without their reasons: key, cells, whether ours differs."""
    made = [("nlu", *row) for row in (*iterate_glue_rows(), *iterate_other_rows("nlu"))]
    made += [("nlg", *row) for row in (*iterate_e2e_rows(), *iterate_other_rows("nlg"))]
    made += [("commonsense", *row) for row in (*iterate_commonsense_rows(), *iterate_other_rows("commonsense"))]
    found = []
    for name, model, setting, sides in made:
        cells = [group_values(sides[side]) if sides[side] else "–" for side in ("paper", "code", "ours")]
        found.append(((name, model, setting), cells, differs(sides)))
    return found


def read_reasons() -> dict[tuple[str, ...], str]:
    """Return the reasons that the page gives, by experiment, model and setting."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")] if PAGE.exists() else []
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]
    return {tuple(cells[:3]): cells[6] for cells in split}


def test_the_page_is_what_the_tables_and_the_experiments_say_and_every_difference_has_a_reason():
    reasons, rows = read_reasons(), build_rows()
    lines = []
    for key, cells, differing in rows:
        why = reasons.get(key, "") if differing else ""
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in (*key, *cells)) + f" | {why} |")
    text = HEAD + "\n".join(lines) + "\n"
    if os.environ.get("DUAL_LORA_GOLDEN") == "write":
        PAGE.write_text(text)
        reasons = read_reasons()
    assert PAGE.read_text() == text, "DUAL_LORA_GOLDEN=write rewrites the page"
    unexplained = [key for key, _, differing in rows if differing and not reasons.get(key)]
    assert not unexplained and len(rows) > 60
    assert {key for key, why in reasons.items() if why} == {key for key, _, differing in rows if differing}


def test_the_page_names_files_that_exist():
    text = PAGE.read_text()
    for name in re.findall(r"`((?:conf|tasks|dual_lora|runs|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    assert OmegaConf.load(ROOT / "conf/experiment/nlu.yaml").full.blocks
