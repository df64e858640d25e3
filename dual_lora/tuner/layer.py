"""The adapted layers: Linear (and GPT-2's Conv1D, and quantised linear layers), Embedding, Conv1d/2d/3d."""

import math
import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..functional import autocasts
from .config import DualLoraConfig
from .factors import ConvFactors, DualLoraFactors, EmbeddingFactors

# A merge that rounds away more of dW than this warns.
MAX_ROUNDING = 0.1


class DualLoraLayer(nn.Module, BaseTunerLayer):
    """A base layer with any number of Dual LoRA adapters.

    y = base(x) + the sum over the active adapters of x dW^T. In 16 bits the base output and the adapter's own term are
    computed apart, since rounding W0 + dW would swallow most of dW.
    """

    adapter_layer_names = ("dual_lora_factors",)
    other_param_names = ()
    factors_cls: type[DualLoraFactors] = DualLoraFactors

    def __init__(self, base_layer: nn.Module, quantization_backend=None, tied: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.tied = tied
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.dual_lora_factors = nn.ModuleDict()
        self.merged_adapters = []
        self._disable_adapters = False
        self._unmerged: list[Tensor] = []  # in a list, since an attribute would become a registered parameter

    def update_layer(
        self, adapter_name: str, config: DualLoraConfig, r: int, alpha: float, fused: list | None = None
    ) -> None:
        """Add the adapter, of budget r. fused: see `DualLoraConfig.fused_slices`; ValueError where it does not fit."""
        factors = self._create_factors(config, r, alpha, fused)
        factors.keeps = not self._quantized()  # dW would take several times the memory of what was made small
        self.dual_lora_factors[adapter_name] = factors.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _create_factors(self, config: DualLoraConfig, r: int, alpha: float, fused: list | None) -> DualLoraFactors:
        if fused is not None:
            raise ValueError(f"fused_slices: {type(self.get_base_layer()).__name__} is not a linear layer")
        return self.factors_cls(config, *self._delta_shape(), r, alpha, dtype=self._dtype())

    def _delta_shape(self) -> tuple[int, int]:
        """fan_in, fan_out of dW."""
        return self.in_features, self.out_features

    def _dtype(self) -> torch.dtype:
        weight = getattr(self.get_base_layer(), "weight", None)
        return torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device only: the factors stay float32 on a 16-bit base."""
        if adapter_name not in self.dual_lora_factors:
            return
        factors = self.dual_lora_factors[adapter_name]
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is not None and not factors.A.is_meta:
            factors.to(device)

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Cast the factors to the dtype of the base weight, if that is a floating one."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        if adapter_name in self.dual_lora_factors and dtype is not None and dtype.is_floating_point:
            for factor in self.dual_lora_factors[adapter_name].parameters():
                factor.data = factor.data.to(dtype)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of one adapter at its present f, shaped like the base weight, float32 or float64.

        Warns when ReLU(B A) has no positive entry left: such a layer gets no gradient any more.
        """
        factors = self.dual_lora_factors[adapter]
        dW = factors.delta_weight()
        if factors.update_scale > 0 and not dW.any():
            warnings.warn(
                "A Dual LoRA layer is dead: its magnitude is 0 in every entry, so it gets no gradient any more.",
                stacklevel=2,
            )
        return self._like_base_weight(dW, adapter)

    def _like_base_weight(self, dW: Tensor, adapter: str) -> Tensor:
        return dW

    def set_adapter(self, adapter_names: str | list[str], *args, **kwargs) -> None:
        """As in PEFT; what evaluation has kept of the other adapters is released."""
        super().set_adapter(adapter_names, *args, **kwargs)
        for name, factors in self.dual_lora_factors.items():
            if name not in self.active_adapters:
                factors.release()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add dW of the adapters (None: the active ones) to the base weight, in float32, rounded once.

        The unmerged weight is kept until `unmerge`, which therefore is exact. A tied base weight is not written to:
        this layer gets a weight of its own and its partner keeps the old one. safe_merge: raise ValueError instead
        of merging an adapter with NaN or infinite values.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.dual_lora_factors]
        if not names:
            return
        for factors in self.dual_lora_factors.values():
            factors.release()
        before = self._base_weight()
        delta = sum(self.get_delta_weight(name).to(before.device) for name in names)
        target = before.to(delta.dtype) + delta
        merged = target.to(before.dtype)
        if safe_merge:
            self._check_finite(names, merged)
        if not self._unmerged:
            # An untied weight waits in host memory; a tied one is the partner's and stays where and what it is.
            self._unmerged.append(self.get_base_layer().weight if self.tied else before.cpu())
        self._set_base_weight(merged)
        self.merged_adapters.extend(names)
        if (self._base_weight().to(delta.dtype) - target).norm() > MAX_ROUNDING * delta.norm():
            kind = "quantised" if self._quantized() else before.dtype
            warnings.warn(
                f"Merging Dual LoRA into {kind} base weights rounds away more than {MAX_ROUNDING:.0%} of dW; "
                "merge into a base of higher precision to keep it.",
                stacklevel=2,
            )

    def unmerge(self) -> None:
        """Put the weight from before the first merge back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._set_base_weight(self._unmerged.pop().to(self.get_base_layer().weight.device))
        self.merged_adapters.clear()

    def _check_finite(self, names: list[str], merged: Tensor) -> None:
        for name in names:
            # Sign(NaN) is -1, so a NaN in C or D does not show in dW.
            if not all(t.isfinite().all() for t in (merged, *self.dual_lora_factors[name].parameters())):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def _quantized(self) -> bool:
        return self.quantization_backend is not None

    def _base_weight(self) -> Tensor:
        if self._quantized():
            return self.quantization_backend.get_base_weight(self.get_base_layer())
        weight = self.get_base_layer().weight
        if not weight.is_floating_point():
            raise NotImplementedError("merging into a quantised base layer needs peft >= 0.20")
        return weight.data

    def _set_base_weight(self, weight: Tensor) -> None:
        if self._quantized():
            self.quantization_backend.set_base_weight(self, weight)
        else:
            base = self.get_base_layer()
            if not isinstance(weight, nn.Parameter):
                weight = nn.Parameter(weight, requires_grad=base.weight.requires_grad)
            base.weight = weight

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if self._quantized():
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.dual_lora_factors:
                result = self._add_term(result, x, name)
        return result.to(dtype)

    def _add_term(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        return result + self.dual_lora_factors[adapter](x)

    def extra_repr(self) -> str:
        return f"quantization_backend='{self.quantization_backend.backend_name}'" if self._quantized() else ""

    def __repr__(self) -> str:
        return "dual_lora." + super().__repr__()


class Linear(DualLoraLayer):
    """nn.Linear, GPT-2's Conv1D (whose weight is in x out) or a quantised linear layer."""

    other_param_names = ("fused_slices",)

    def __init__(self, base_layer: nn.Module, **kwargs) -> None:
        super().__init__(base_layer, **kwargs)
        self.fused_slices: dict[str, list] = {}

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        factors = None if args or kwargs else self._fusable(x)
        if factors is None or factors.drops:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        return factors(x, base.weight.T if isinstance(base, Conv1D) else base.weight, base.bias)

    def _fusable(self, x: Tensor) -> DualLoraFactors | None:
        """The active adapter's factors where one product with W0 + dW can serve for base and adapter: one adapter, a
        plain base layer that takes x and whose weights are constants, and nobody listening to it."""
        names = [name for name in self.active_adapters if name in self.dual_lora_factors]
        base = self.base_layer
        if (
            self.disable_adapters
            or self.merged
            or len(names) != 1
            or names[0] in self.fused_slices
            or type(base) not in (nn.Linear, Conv1D)
            or "forward" in base.__dict__
            or any((base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks))
        ):
            return None
        constants = [base.weight] if base.bias is None else [base.weight, base.bias]
        if any(type(t) is not nn.Parameter or t.requires_grad or not t.is_floating_point() for t in constants):
            return None
        if x.dtype != base.weight.dtype and not autocasts(x.device.type):
            return None  # the base layer has its own say on that
        factors = self.dual_lora_factors[names[0]]
        return factors if factors.recomputes else None

    def _create_factors(self, config, r, alpha, fused):
        if fused is None:
            return super()._create_factors(config, r, alpha, None)
        n, blocks = fused
        if self.out_features % n:
            raise ValueError(f"fused_slices: {n} equal blocks do not fit {self.out_features} output features")
        return DualLoraFactors(
            config, self.in_features, self.out_features // n, r, alpha, blocks=len(blocks), dtype=self._dtype()
        )

    def update_layer(self, adapter_name, config, r, alpha, fused=None):
        super().update_layer(adapter_name, config, r, alpha, fused)
        if fused is not None:
            self.fused_slices[adapter_name] = fused

    def _like_base_weight(self, dW, adapter):
        if adapter in self.fused_slices:
            n, blocks = self.fused_slices[adapter]
            whole = dW.new_zeros(n, *dW.shape[1:])
            whole[blocks] = dW
            dW = whole.flatten(0, 1)
        return dW.T if isinstance(self.get_base_layer(), Conv1D) else dW

    def _add_term(self, result, x, adapter):
        if adapter not in self.fused_slices:
            return super()._add_term(result, x, adapter)
        n, blocks = self.fused_slices[adapter]
        parts = list(result.chunk(n, dim=-1))
        for block, term in zip(blocks, self.dual_lora_factors[adapter](x).chunk(len(blocks), dim=-1), strict=True):
            parts[block] = parts[block] + term
        return torch.cat(parts, dim=-1)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """dW is additive, so `peft.convert_to_lora` works, but has full rank: the conversion loses most of it unless
        the LoRA rank is that of the layer."""
        return True


class Embedding(DualLoraLayer):
    """nn.Embedding. Dropout is not applied, as in LoRA."""

    factors_cls = EmbeddingFactors

    def _like_base_weight(self, dW, adapter):
        return dW.T

    def _add_term(self, result, x, adapter):
        term = self.dual_lora_factors[adapter](x)
        scale = self._get_embed_scale()
        return result + (term if scale is None else term * scale.to(term.dtype))


class ConvNd(DualLoraLayer):
    """nn.Conv1d, Conv2d, Conv3d, with groups and padding modes; dW has the shape of the base weight."""

    factors_cls = ConvFactors

    def _delta_shape(self):
        weight = self.get_base_layer().weight
        return math.prod(weight.shape[1:]), weight.shape[0]

    def _like_base_weight(self, dW, adapter):
        return dW.view(self.get_base_layer().weight.shape)

    def _add_term(self, result, x, adapter):
        return result + self.dual_lora_factors[adapter](x, self.get_base_layer())


def layer_class(base_layer: nn.Module, quantization_backend) -> type[DualLoraLayer] | None:
    """The class that adapts this layer, None where there is none."""
    if quantization_backend is not None:
        return Linear if quantization_backend.layer_type == "linear" else None
    for kinds, cls in (
        ((nn.Linear, Conv1D), Linear),
        (nn.Embedding, Embedding),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvNd),
    ):
        if isinstance(base_layer, kinds):
            return cls
    return None
