"""A model's tokenizer: the model decides its vocabulary and special tokens, the run's settings decide how it is used.

Without a tokenizer.json its class decides which special tokens surround a text (`add_bos_token` and
`add_eos_token` of tokenizer_config.json); with one, that file does. Around prompts only those in front are kept.
"""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend

from dual_lora.lab.config.outside.models import RESAVE_REMEDY
from dual_lora.lab.config.paths import read_json_object
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, get_first_line, is_out_of_memory, require, translate_read_errors
from dual_lora.lab.inputs.gguf import load_gguf_tokenizer
from dual_lora.lab.inputs.model_files import translate_model_errors
from dual_lora.lab.model.encode import apply_chat_template
from dual_lora.lab.model.source import find_gguf_file, find_links, get_config_fields, locate_model
from dual_lora.lab.system.distributed import print_warning

# How a tokenizer is used, whatever was saved with it. GPT-2 counts positions, and encoders classify, from the first
# column, so padding goes to the right.
USE = {
    "padding_side": "right",
    "truncation_side": "right",
    "split_special_tokens": False,
    "clean_up_tokenization_spaces": False,
}
ALL_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
TEMPLATE_SECONDS = 5.0  # a chat template takes milliseconds
# A text that classes split differently. Words from all over the vocabulary follow it, since it may be of any language.
SPLIT_PROBE = "The Café's 3rd oak (since 1987) serves 1,250 guests a week.\nIs it open?"
PROBE_WORDS = 300
PROBE = "What does the oak serve?"  # a prompt that every chat template must reproduce
ADDRESS = re.compile(r" at 0x[0-9a-f]+>")  # how Python prints a function that a template forgot to call


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer. One without a padding token pads with the end of text (masked everywhere).

    Raises:
        UserError: there is none, it has no token that the task needs, or its chat template cannot be used.
    """
    file = find_gguf_file(settings)
    with translate_model_errors(settings):
        tokenizer = load_gguf_tokenizer(file) if file else load_saved_tokenizer(settings)
        reset_use(tokenizer, settings)
    is_empty = len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids))  # transformers makes one up
    require(not is_empty, f"model={settings.model.name}: no tokenizer next to the model; save it into the same folder")
    check_special_tokens(tokenizer, settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.model.chat:
        check_chat_template(tokenizer, settings)
    return tokenizer


def reset_use(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
    """Reset how a tokenizer is used, whatever was saved with it: sides, what it returns, and truncation, padding or
    dropout inside tokenizer.json."""
    for name, value in USE.items():
        setattr(tokenizer, name, value)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        reset_backend(backend)
    types = get_config_fields(settings).get("type_vocab_size") or 0  # kinds of segment that the model knows
    marked = "token_type_ids" in tokenizer.model_input_names and types > 1
    marked = marked or "token_type_ids" in type(tokenizer).model_input_names
    tokenizer.model_input_names = ["input_ids", *["token_type_ids"][: int(marked)], "attention_mask"]


def reset_backend(backend: Tokenizer) -> None:
    """Drop truncation, padding and dropout that were saved in a tokenizer.json."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None  # of BPE: merges left out at random, which the seed does not decide


def load_saved_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model's files. Most classes of transformers take the vocabulary from tokenizer.json,
    but not how texts are normalized and split, or which special tokens surround them. Where the class that transformers
    chooses encodes texts differently from the file, or cannot be built from it, the file is used as it is, and a
    warning printed."""
    place, file = locate_model(settings), find_links(settings) / "tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place, **USE)
        reset_use(tokenizer, settings)
    except Exception as error:  # whatever a class raises over a file that is not of its kind
        if not file.is_file() or is_out_of_memory(error) or "trust_remote_code" in str(error):
            raise
        differs = f"class cannot take its tokenizer.json ({get_first_line(error)[:80]})"
    else:
        if type(tokenizer) is TokenizersBackend or not file.is_file() or encodes_as_file(tokenizer, str(file)):
            return tokenizer
        differs = f"class, {type(tokenizer).__name__}, encodes texts differently from its tokenizer.json"
    tokenizer = TokenizersBackend.from_pretrained(**place, **USE, model_input_names=ALL_INPUTS)
    print_warning(f"model={settings.model.name}: its tokenizer's {differs}; the file is used")
    return tokenizer


def encodes_as_file(tokenizer: PreTrainedTokenizerBase, file: str) -> bool:
    """Return whether a tokenizer gives a text and a pair of texts the ids that a tokenizer.json gives them, and, if it
    marks the two texts of a pair, the same marks."""
    backend = Tokenizer.from_file(file)
    reset_backend(backend)
    ids = sorted(backend.get_vocab(with_added_tokens=False).values())
    words = [backend.decode([number]).strip() for number in ids[:: max(1, len(ids) // PROBE_WORDS)]]
    probe = " ".join([SPLIT_PROBE, *filter(None, words)])
    try:
        for texts, special in (((probe,), False), ((PROBE,), True), ((PROBE, SPLIT_PROBE), True)):
            found = tokenizer(*texts, add_special_tokens=special)
            expected = backend.encode(*texts, add_special_tokens=special)
            marks = found.get("token_type_ids", expected.type_ids)
            if (found["input_ids"], marks) != (expected.ids, expected.type_ids):
                return False
    except Exception as error:  # whatever a class raises over a vocabulary that is not of its kind
        if is_out_of_memory(error):
            raise
        return False
    return True


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
    """Refuse a tokenizer that cannot end a text or pad a batch, or that makes a special token of an ordinary word.

    Raises:
        UserError: with the token that is missing or wrong.
    """
    where = f"model={settings.model.name}: its tokenizer"
    remedy = "set it in tokenizer_config.json, or save the tokenizer with it"
    longest = tokenizer.model_max_length
    is_length = isinstance(longest, (int, float)) and longest > 0
    require(is_length, f"{where} has model_max_length={longest!r}, which is not a length; {remedy}")
    has_end = tokenizer.eos_token_id is not None
    writes = load_task(settings).form == "generation"
    require(has_end or not writes, f"{where} names no end of text (eos_token); {remedy}")
    can_pad = has_end or tokenizer.pad_token_id is not None
    require(can_pad, f"{where} names neither padding (pad_token) nor an end of text (eos_token); {remedy}")
    words = read_ordinary_words(find_links(settings) / "tokenizer.json")
    added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    turned = sorted(words & (added | set(tokenizer.all_special_tokens)))
    require(
        not turned,
        f"{where} makes special tokens of ordinary words, first {turned[:1]}; remove them from tokenizer_config.json "
        "and special_tokens_map.json, or save the tokenizer again",
    )


@cache
def read_ordinary_words(file: Path) -> frozenset[str]:
    """Return the vocabulary of a tokenizer.json without its special tokens. It is empty if there is no such file, or if
    its form is not known here."""
    if not file.is_file():
        return frozenset()
    state = read_json_object(file, RESAVE_REMEDY)
    added, model = state.get("added_tokens"), state.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, (dict, list)) or not isinstance(added, list):
        return frozenset()
    words = (entry[0] if isinstance(entry, list) else entry for entry in vocabulary)
    return frozenset(words) - {token["content"] for token in added}


def check_chat_template(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
    """Refuse a chat template that cannot be used for a task's prompts.

    Raises:
        UserError: there is none, it fails on a prompt, does not end, draws at random, or leaves the prompt out.
    """
    where, remedy = f"model.chat=true: {settings.model.name}", "take model.chat=false"
    require(bool(tokenizer.chat_template), f"{where}'s tokenizer has no chat template; {remedy}")
    fails = f"{where}'s chat template fails on a single prompt"
    try:
        with translate_read_errors(fails, remedy), limit_time(TEMPLATE_SECONDS):
            text = apply_chat_template(tokenizer, [{"role": "user", "content": PROBE}])
    except MemoryError as error:  # the template's fault, not the machine's
        raise UserError(f"{fails} (it fills the memory); {remedy}") from error
    require(PROBE in text, f"{where}'s chat template leaves the prompt out; {remedy}")
    require(not ADDRESS.search(text), f"{where}'s chat template prints an address in memory; {remedy}")


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Stop Python code that takes longer. A template is compiled to Python, and this works in every thread.

    Raises:
        TimeoutError: the code took longer.
    """
    end, earlier = time.monotonic() + seconds, sys.gettrace()

    def trace(frame: FrameType, event: str, value: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it takes longer than {seconds:.0f} s")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(earlier)
