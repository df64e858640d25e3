"""What `save_pretrained` adds to the model card, and its warnings about an unfinished ramp and 16-bit factors."""

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from yaml import YAMLError

from .precision import find_stacklevel
from .ramp import describe_unfinished_ramp
from .register import NAME

if TYPE_CHECKING:
    from .factors import DualLoraFactors

TAGS = ("dual-lora", "peft")
HEADING = "## Loading this adapter"
SECTION = f"""{HEADING}

This is a Dual LoRA adapter ([arXiv 2512.03402](https://arxiv.org/abs/2512.03402)). PEFT learns the method from the
package `dual-lora`: import `dual_lora` first, otherwise loading ends in `KeyError: 'DUAL_LORA'`. The package is not on
PyPI. In a clone of its repository:

```sh
pip install .
```

```python
import dual_lora  # registers DUAL_LORA with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or name of this adapter")
```
"""


def extend_card(folder: Path) -> None:
    """Add how to load the adapter, and tags, to the model card that PEFT has written, if there is one.

    PEFT rewrites the tags at every save but keeps the text. A card that cannot be read or written is left as it is,
    with a warning, since the weights may not have been saved yet.

    folder: where the adapter is. PEFT puts the card of an adapter with a name of its own one folder above.
    """
    file = _find_card(folder)
    try:
        card = None if file is None else ModelCard.load(file)
        if card is None or card.data.get("library_name") != "peft":
            return
        tags = card.data.get("tags") or []
        card.data["tags"] = sorted({*(tags if isinstance(tags, list) else [tags]), *TAGS}, key=str)
        if HEADING not in card.text:
            card.text = f"{card.text.rstrip()}\n\n{SECTION}"
        card.save(file)
    except (OSError, ValueError, TypeError, YAMLError) as error:
        warnings.warn(
            f"Dual LoRA: {file} is left without how to load the adapter ({type(error).__name__})",
            stacklevel=find_stacklevel(),
        )


def _find_card(folder: Path) -> Path | None:
    """Return the model card of the adapter in this folder: there, or one folder above if that is not of another one."""
    places = [folder]
    if any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        places += [] if _holds_another_method(folder.parent) else [folder.parent]
    return next((place / "README.md" for place in places if (place / "README.md").is_file()), None)


def _holds_another_method(folder: Path) -> bool:
    try:
        return json.loads((folder / CONFIG_NAME).read_bytes()).get("peft_type") != NAME
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError):
        return True


def describe_ramp(folder: Path, factors: Iterable["DualLoraFactors"]) -> str | None:
    """Return what `describe_unfinished_ramp` says of an adapter's factors, which are saved in this folder.

    A Trainer's checkpoints (checkpoint-N) are skipped: training continues from them.
    """
    if any(re.fullmatch(r"checkpoint-\d+", part.name) for part in (folder, folder.parent)):
        return None
    return describe_unfinished_ramp((f.step, f.update_scale, f.warmup_steps) for f in factors if not f.step.is_meta)


def describe_low_precision(factors: Iterable["DualLoraFactors"]) -> str | None:
    """Return the end of a sentence about an adapter's factors; None if they have more than 16 bits."""
    low = sorted({str(f.A.dtype).removeprefix("torch.") for f in factors if f.A.dtype.itemsize < 4})
    if not low:
        return None
    return (
        f"with factors in {', '.join(low)}. If they were trained in float32, rounding has flipped signs of D C, and "
        "the adapter computes another function: save it before the model is cast to 16 bits."
    )
