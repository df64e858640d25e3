"""pytest plugin: lets PEFT's parametrised tests run on our cases instead of PEFT's methods.

Every test of PEFT's matrix names a module-level list in its `parametrize` mark. Where `cases.tables` has a table for
that list, the test gets our table. Tests that then do not concern DualLoraConfig are deselected.
"""

import importlib
import importlib.util
import inspect
import json
import os
import sys
import types
from pathlib import Path

import peft
import pytest
from transformers.generation import GenerationMixin

from dual_lora import DualLoraConfig

from . import cases

WORK = Path(os.environ["PEFT_SUITE_WORK"])
OUTCOMES: dict[str, str] = {}
# These read a real repository of the Hugging Face hub.
NEED_THE_HUB = {"test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config"}
# PEFT 0.19 and 0.20 take this method from an encoder-decoder model, whatever the adapter; transformers 5.23 has none.
TAKEN_FROM_BASE = "_prepare_encoder_decoder_kwargs_for_generation"


def pytest_configure(config):
    """Empty stand-ins for packages that PEFT's test modules import and our part of the matrix does not use."""
    names = {"diffusers": ["StableDiffusionPipeline"], "parameterized": ["parameterized"], "datasets": ["load_dataset"]}
    for name, attributes in names.items():
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            for attribute in attributes:
                setattr(sys.modules[name], attribute, type(attribute, (), {}))


def pytest_sessionstart(session):
    """PEFT's tests skip GPT-2 for every class not on their list of those that adapt a Conv1D; ours does."""
    common = importlib.import_module("tests.testing_common")
    skip = common._skip_if_conv1d_not_supported

    def skip_others(model_id, config_cls, config_kwargs):
        if config_cls is not DualLoraConfig:
            skip(model_id, config_cls, config_kwargs)

    common._skip_if_conv1d_not_supported = skip_others


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    parametrize = metafunc.parametrize
    tables = cases.tables(metafunc.module, WORK)

    def with_our_values(names, values, *args, **kwargs):
        for variable, table in tables.items():
            if values is getattr(metafunc.module, variable, None):
                values = table
        return parametrize(names, values, *args, **kwargs)

    metafunc.parametrize = with_our_values


def _is_ours(item) -> bool:
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(value is DualLoraConfig for value in values)


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if not _is_ours(item)]
    items[:] = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=others)
    missing = TAKEN_FROM_BASE in inspect.getsource(peft.peft_model) and not hasattr(GenerationMixin, TAKEN_FROM_BASE)
    for item in items:
        if missing and item.path.name == "test_encoder_decoder_models.py":
            item.add_marker(pytest.mark.skip(reason="this PEFT wraps no encoder-decoder model of this transformers"))
        if item.path.name == "test_config.py" and item.originalname in NEED_THE_HUB:
            item.add_marker(pytest.mark.skip(reason="reads the Hugging Face hub"))


def pytest_runtest_logreport(report):
    if (report.when == "call" or report.outcome != "passed") and OUTCOMES.get(report.nodeid) != "failed":
        OUTCOMES[report.nodeid] = report.outcome


def pytest_unconfigure(config):
    (WORK / "outcomes.json").write_text(json.dumps(OUTCOMES, indent=1))
