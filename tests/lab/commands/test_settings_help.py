"""`train.py --help` and docs/settings.md: every setting in one line, from one place, and at once."""

import subprocess
import sys

import pytest

from dual_lora.lab.commands.evaluate import OWN_WORDS as EVALUATE_WORDS
from dual_lora.lab.commands.evaluate import RUN_WORDS
from dual_lora.lab.commands.settings_help import EXAMPLES, WORDS, iterate_settings, read_defaults, render_help
from dual_lora.lab.commands.settings_help import render_settings_markdown as render_page
from dual_lora.lab.commands.sweep import OWN_WORDS as SWEEP_WORDS
from dual_lora.lab.config.compose import GROUPS, load_settings
from dual_lora.lab.config.outside.words import CODE_KEY, FOLDER_FLAGS
from dual_lora.lab.config.overrides import KNOWN_KEYS
from dual_lora.lab.config.paths import list_choices
from dual_lora.lab.config.schema import get_setting
from tests.support.places import ROOT


def test_the_page_of_settings_is_that_of_the_declarations():
    """`python -m dual_lora.lab.commands.settings_help` writes it."""
    assert (ROOT / "docs" / "settings.md").read_text() == render_page()


def test_every_setting_is_explained_in_one_line():
    explained = {key: about for key, about, _ in iterate_settings()}
    assert explained.keys() == set(KNOWN_KEYS)
    lines = render_help().partition("Settings (KEY=VALUE)")[2].splitlines()
    for key, about in explained.items():
        assert 5 < len(about) < 120 and "\n" not in about and "|" not in about
        assert sum(line.split()[:1] in ([key], [f"{key}:"]) for line in lines) == 1, key


def test_the_words_beside_the_settings_are_those_that_the_programs_take():
    known = {words: [word.replace(" ", "=").partition("=")[0] for word in WORDS[words]] for words in WORDS}
    assert known == {
        "train.py and sweep.py": [FOLDER_FLAGS[0]],
        "train.py, sweep.py and eval.py": [CODE_KEY],
        "sweep.py": list(SWEEP_WORDS),
        "eval.py": [*RUN_WORDS, *EVALUATE_WORDS],
    }
    shown = render_help()
    for word, about in (pair for words in WORDS.values() for pair in words.items()):
        assert f"  {word:<30}{about}\n" in shown and f"| `{word}` | {about} |" in render_page()


def test_help_names_every_choice_and_example():
    shown = render_help()
    for group in (*GROUPS, "hydra/launcher"):
        assert all(choice in shown for choice in list_choices(group))
    assert all(command in shown for command in EXAMPLES)


def test_the_defaults_shown_are_those_of_a_run_without_overrides():
    settings, shown = load_settings([]), read_defaults()
    for key, _, group in iterate_settings():
        value = get_setting(settings, key)
        if group or value in ([], {}) or isinstance(value, list | dict):
            continue
        text = shown[key]
        if text in KNOWN_KEYS and isinstance(value, float | int):  # such as train.lr, which is method.lr
            assert value == get_setting(settings, text)
        elif isinstance(value, float):
            assert float(text) == value
        else:
            assert text == ("null" if value is None else str(value).lower() if value in (True, False) else str(value))


@pytest.mark.parametrize("script", ["train.py", "eval.py", "sweep.py"])
def test_help_imports_neither_torch_nor_hydra(script):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("heavy:", sorted({{"torch", "transformers", "hydra", "omegaconf", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("heavy: []\n"), done.stderr
