"""Libraries that take seconds to import and that talk to the screen."""

import atexit
import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def import_heavy_libraries() -> Iterator[None]:
    """Import what imports torch, transformers and PEFT: half a million objects that all stay. Searches for garbage
    among them would take a fifth of the time that importing does, and later half a second after each run and plan."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)  # Triton counts what is left


def silence_libraries() -> None:
    """Keep the libraries' chatter off the screen; errors still show."""
    import datasets
    import transformers
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)  # a bar with no switch of its own
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
