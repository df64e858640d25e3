"""Which activations a training step keeps for backward: all of them, or only each layer's input."""

import torch

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import require
from dual_lora.lab.model.load import unwrap_adapter


def apply_gradient_checkpointing(model: torch.nn.Module, settings: Settings) -> None:
    """With `train.gradient_checkpointing`, have every layer of a model keep only its input and run again in backward.

    Gradients are the same: the random state of dropout is restored for the second run. transformers lets the output of
    frozen embeddings require gradients, without which the layers after them would be checkpointed as constants.

    Raises:
        UserError: transformers cannot checkpoint a model of this class.
    """
    if not settings.train.gradient_checkpointing:
        return
    base = unwrap_adapter(model)
    reason = f"transformers cannot checkpoint a {type(base).__name__}; drop it"
    require(base.supports_gradient_checkpointing, f"train.gradient_checkpointing=true: {reason}")
    base.activation_checkpointing_enable({"use_reentrant": False})
