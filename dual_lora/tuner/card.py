"""What `save_pretrained` adds to the model card, and its warnings about an unfinished ramp and 16-bit factors."""

import re
from pathlib import Path

from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .ramp import describe_unfinished_ramp

FACTORS = (".A", ".B", ".C", ".D")
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

    PEFT rewrites the tags at every save but keeps the text.

    folder: where the adapter's weights are. PEFT puts the card of an adapter with a name of its own one folder above.
    """
    places = (folder, folder.parent) if (folder / SAFETENSORS_WEIGHTS_NAME).is_file() else (folder,)
    file = next((place / "README.md" for place in places if (place / "README.md").is_file()), None)
    card = None if file is None else ModelCard.load(file)
    if card is None or card.data.get("library_name") != "peft":
        return
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *TAGS})
    if HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{SECTION}"
    card.save(file)


def describe_saved_ramp(folder: Path, steps: int) -> str | None:
    """Return what `describe_unfinished_ramp` says of the weights saved in this folder, whose ramp takes `steps` steps.

    A Trainer's checkpoints (checkpoint-N) are skipped: training continues from them.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file() or any(re.fullmatch(r"checkpoint-\d+", part.name) for part in (folder, folder.parent)):
        return None
    with safe_open(file, "pt") as saved:
        names = [name.removesuffix("update_scale") for name in saved.keys() if name.endswith(".update_scale")]  # noqa: SIM118
        states = [(saved.get_tensor(f"{n}step"), saved.get_tensor(f"{n}update_scale"), steps) for n in names]
    return describe_unfinished_ramp(states)


def describe_low_precision(folder: Path) -> str | None:
    """Return the end of a sentence about the factors saved in this folder; None if they have more than 16 bits."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return None
    with safe_open(file, "pt") as saved:
        names = [name for name in saved.keys() if "dual_lora_factors" in name and name.endswith(FACTORS)]  # noqa: SIM118
        low = sorted({saved.get_slice(name).get_dtype() for name in names} & {"BF16", "F16"})
    if not low:
        return None
    return (
        f"with factors in {', '.join(low)}. If they were trained in float32, rounding has flipped signs of D C, and "
        "the adapter computes another function: save it before the model is cast to 16 bits."
    )
