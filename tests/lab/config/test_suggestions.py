"""What a command line most likely means: settings without their group, Hugging Face's names, folders a level off."""

import pytest

from dual_lora.lab.config.compose import iterate_keys, load_settings
from dual_lora.lab.config.overrides import HUGGING_FACE_NAMES, KNOWN_KEYS, parse_overrides
from dual_lora.lab.errors import UserError
from tests.support.official_files import write_official

MEANT = {
    "lr=1e-3": "train.lr",
    "task.lr=1e-3": "train.lr",
    "rank=8": "method.rank",
    "model.rank=8": "method.rank",
    "num_beams=3": "task.num_beams",
    "held_out=0.2": "task.options.held_out",
    "options.text=question": "task.options.text",
    "use_dora=true": "method.peft.use_dora",
    "peft.scale_warmup_steps=3": "method.peft.scale_warmup_steps",
    "learning_rate=1e-3": "train.lr",
    "lora_alpha=8": "method.alpha",
}


@pytest.mark.parametrize("word", MEANT)
def test_a_key_without_its_group_or_with_another_names_the_setting(word):
    with pytest.raises(UserError, match=f": no such setting. Did you mean {MEANT[word]}\\?$"):
        parse_overrides([word])


def test_every_nested_key_whose_last_part_is_unique_is_found_by_it():
    nested = [key for key in iterate_keys() if "." in key]
    last = [key.rpartition(".")[2] for key in nested]
    unique = {name: key for name, key in zip(last, nested, strict=True) if last.count(name) == 1}
    assert len(unique) > 40
    for name, key in unique.items():
        if name not in KNOWN_KEYS:
            with pytest.raises(UserError, match=f"^{name}: no such setting. Did you mean {key}\\?$"):
                parse_overrides([f"{name}=1"])


def test_hugging_face_s_names_are_of_settings_that_are_there():
    assert set(HUGGING_FACE_NAMES.values()) <= set(KNOWN_KEYS) and not set(HUGGING_FACE_NAMES) & set(KNOWN_KEYS)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_data_folder_too_high_names_the_one_below(levels, tmp_path):
    data = tmp_path / "/".join(["all", "official"][:levels])
    (tmp_path / "another").mkdir()
    write_official(data, "rte")
    words = ["model=tiny-roberta", "task=glue/rte"]
    with pytest.raises(UserError, match=f"below it; give data_dir={data}$"):
        load_settings([*words, f"data_dir={tmp_path}"])
    assert load_settings([*words, f"data_dir={data}"]).data_dir == str(data)


def test_a_data_folder_without_data_anywhere_near_names_none(tmp_path):
    (tmp_path / "a/b/c/d").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        load_settings(["model=tiny-roberta", "task=glue/rte", f"data_dir={tmp_path / 'a/b'}"])
    assert "give data_dir" not in str(caught.value)


def test_a_task_that_makes_its_own_data_reads_no_folder(tmp_path):
    with pytest.raises(
        UserError, match=f"^data_dir={tmp_path}: demo/restaurants reads no files, it makes its own data"
    ):
        load_settings([f"data_dir={tmp_path}"])


@pytest.mark.parametrize("task", ["classification", "instruction"])
def test_own_tables_are_checked_before_anything_is_loaded(task, tmp_path):
    (tmp_path / "train.csv").write_text("review,verdict\na,x\nb,y\n")
    model = "tiny-llama" if task == "instruction" else "tiny-roberta"
    with pytest.raises(UserError, match=r"train.csv: no columns '\w+' and '\w+', only review, verdict; name yours"):
        load_settings([f"model={model}", f"task={task}", f"data_dir={tmp_path}"])
