"""The trained part of one adapter on one layer: the four factors and the state of the ramp.

One leaf module per adapter whose forward does the work, so that FSDP, which gathers parameters around a module's
forward, sees every use of them.
"""

import math
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import delta_weight, init_std
from .config import DualLoraConfig

MAX_DRAWS = 100
# Every module of this kind there is; the optimizer hook of warmup.py looks here for those an optimizer trains.
LIVE: weakref.WeakSet = weakref.WeakSet()


class DualLoraFactors(nn.Module):
    """Factors of a linear layer; forward gives the adapter's own term x dW^T.

    Args:
        fan_in, fan_out: shape of dW is fan_out x fan_in.
        r: the budget r1 + r2.
        alpha: numerator of the scale.
        blocks: None, or the number of updates of that shape to hold: every factor then has this leading dimension.
    """

    def __init__(
        self,
        config: DualLoraConfig,
        fan_in: int,
        fan_out: int,
        r: int,
        alpha: float,
        blocks: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        r1, r2 = config.split(r)
        lead = () if blocks is None else (blocks,)
        self.A = nn.Parameter(torch.empty(*lead, r1, fan_in, dtype=dtype))
        self.B = nn.Parameter(torch.empty(*lead, fan_out, r1, dtype=dtype))
        self.C = nn.Parameter(torch.empty(*lead, r2, fan_in, dtype=dtype))
        self.D = nn.Parameter(torch.empty(*lead, fan_out, r2, dtype=dtype))
        self.scaling = alpha / math.sqrt(r1 * r2)
        self.kinds = {"magnitude": config.magnitude, "direction": config.direction, "ste": config.ste}
        self.dropout = config.lora_dropout
        self.warmup_steps = config.scale_warmup_steps
        ramp_over = not config.init_weights or self.warmup_steps == 0
        self.register_buffer("step", torch.tensor(self.warmup_steps if ramp_over else 0))
        self.register_buffer("update_scale", torch.tensor(float(ramp_over), dtype=torch.float32))
        fan = self.usual_fan(fan_in, fan_out)
        self.reset_parameters(config.init_std or init_std(fan, r1, r2, alpha, config.magnitude, config.direction))
        LIVE.add(self)

    def __setstate__(self, state):
        super().__setstate__(state)
        LIVE.add(self)  # a copy or an unpickled module did not pass through __init__

    @staticmethod
    def usual_fan(fan_in: int, fan_out: int) -> int:
        """n where pretrained weights of this kind are usually of size 1 / sqrt(n)."""
        return fan_in

    @property
    def weight(self) -> Tensor:
        """Where PEFT's FSDP wrapping policy looks whether a leaf module is trained."""
        return self.A

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Draw the factors from N(0, std^2), again where every entry of a ReLU(B A) comes out 0: such a layer has no
        gradient and stays 0 for ever. Only layers of a few entries can meet with it, so a 64 x 64 corner is enough."""
        for _ in range(MAX_DRAWS):
            for factor in (self.A, self.B, self.C, self.D):
                factor.normal_(0.0, std)
            corner = self.B[..., :64, :] @ self.A[..., :64]
            if self.kinds["magnitude"] != "relu" or corner.is_meta or (corner.amax((-2, -1)) > 0).all():
                return

    @property
    def scale(self) -> Tensor:
        """f * alpha / sqrt(r1 * r2) at the present f."""
        return self.update_scale.to(self.A.dtype) * self.scaling

    def delta_weight(self) -> Tensor:
        """dW at the present f, (blocks x) fan_out x fan_in, float32 or float64."""
        return delta_weight(self.A, self.B, self.C, self.D, self.scale, **self.kinds)

    def advance(self) -> None:
        """Count one optimizer step: while the ramp lasts, f = step / warmup_steps. Never waits for the device."""
        ramping = self.step < self.warmup_steps
        self.step += ramping
        self.update_scale.copy_(torch.where(ramping, self.step.float() / max(self.warmup_steps, 1), self.update_scale))

    def set_update_scale(self, factor: float, ramp: bool) -> None:
        step = min(round(factor * self.warmup_steps), self.warmup_steps) if ramp else self.warmup_steps
        self.step.fill_(step)
        self.update_scale.fill_(factor)

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x fan_in -> ... x (blocks *) fan_out, in x's dtype or autocast's."""
        dW = self.delta_weight().flatten(0, -2)
        return F.linear(F.dropout(x, self.dropout, self.training), dW.to(x.dtype))


class EmbeddingFactors(DualLoraFactors):
    """Factors of an embedding table; dW is embedding_dim x num_embeddings."""

    @staticmethod
    def usual_fan(fan_in: int, fan_out: int) -> int:
        return fan_out

    def forward(self, ids: Tensor) -> Tensor:
        """ids: any shape of int -> ids.shape x embedding_dim; only these columns of dW are computed.

        An id that occurs several times is looked up at its last place, where its gradients meet before the
        straight-through clip, as they do in a whole dW.
        """
        flat = ids.flatten()
        places = torch.arange(flat.numel(), device=ids.device)
        last = places.new_zeros(self.A.shape[-1]).scatter_reduce(0, flat, places, "amax")
        columns = delta_weight(self.A[:, flat], self.B, self.C[:, flat], self.D, self.scale, **self.kinds)
        return F.embedding(last[ids], columns.T)


class ConvFactors(DualLoraFactors):
    """Factors of a convolution; dW is out_channels x (in_channels / groups * kernel size)."""

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """x: the convolution's input -> its output for dW in place of the weight of `base`, without bias."""
        dW = self.delta_weight().view(base.weight.shape).to(x.dtype)
        return base._conv_forward(F.dropout(x, self.dropout, self.training), dW, None)
