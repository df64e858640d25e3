"""The adapted layers: Linear (and GPT-2's Conv1D, and quantized linear layers), Embedding, Conv1d/2d/3d."""

import math
import sys
import warnings

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from ..functional import is_autocast_on, suspend_autocast
from .bypass import list_uses
from .config import DualLoraConfig
from .factors import ConvFactors, DualLoraFactors, EmbeddingFactors, is_fsdp_sharded
from .precision import find_stacklevel

# A merge that rounds away more of dW than this warns.
MAX_ROUNDING = 0.1
# As bitsandbytes does on CPUs with AVX512-BF16; `DualLoraModel._prepare_model` prevents it.
PACKED = "its 4-bit weight was packed for this CPU in an evaluation without an adapter"
# torch's hooks of all modules, as `nn.Module.__call__` reads them.
GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
CHECKED = 2**24  # entries of a weight whose bits are summed at once, in 128 MB
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DualLoraLayer(nn.Module, BaseTunerLayer):
    """A base layer with any number of Dual LoRA adapters.

    y = base(x) + the sum over the active adapters of x dW^T. In 16 bits the base output and the adapter's own term are
    computed separately, since rounding W0 + dW would lose most of dW. A base layer with a custom forward is run on
    W0 + dW instead, since only that forward knows how it uses the weight.

    Args:
        base_layer: the layer to adapt.
        quantization_backend: PEFT's, for a quantized base layer.
        tied: whether another layer holds the same weight; merging then leaves that layer's weight unchanged.
        bypassed: whether the parent never calls this layer, judging by its source; the first call sets it to False.
    """

    adapter_layer_names = ("dual_lora_factors",)
    other_param_names = ()
    factors_cls: type[DualLoraFactors] = DualLoraFactors

    def __init__(
        self, base_layer: nn.Module, quantization_backend=None, tied: bool = False, bypassed: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.tied = tied
        self.bypassed = bypassed
        self.uses: set[str] | None = None  # noted during a forward that `watch_uses` watches: "calls" and `list_uses`
        self._silenced: dict[str, tuple[int, float]] = {}  # step and f that adapters had before `silence`
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self._copy_settings()
        self.dual_lora_factors = nn.ModuleDict()
        self.merged_adapters = []
        self._disable_adapters = False
        # The weight from before the first merge and the checksum of the merged one; in a list, since a parameter
        # assigned to an attribute would be registered.
        self._unmerged: list[tuple[Tensor, list[Tensor] | None]] = []
        self._merged_factors: dict[str, DualLoraFactors] = {}  # as they were merged; in no module, so not trained
        self.has_plain_forward = quantization_backend is not None or has_plain_forward(self.get_base_layer())

    def _copy_settings(self) -> None:
        """Take over what the base layer declares as its settings, such as a stride: parents read them from here."""
        base = self.get_base_layer()
        for name in getattr(base, "__constants__", ()):
            if hasattr(base, name) and not hasattr(self, name):
                setattr(self, name, getattr(base, name))

    def update_layer(
        self, adapter_name: str, config: DualLoraConfig, r: int, alpha: float, fused: list | None = None
    ) -> None:
        """Add the adapter, of budget r. fused: see `DualLoraConfig.fused_slices`.

        Raises:
            ValueError: fused does not fit the layer, the weight has no entries, or the base layer has a forward of its
                own, to which dropout on the adapter's input cannot be applied.
        """
        if not self.has_plain_forward and config.lora_dropout > 0:
            cls = type(self.get_base_layer()).__name__
            raise ValueError(f"lora_dropout={config.lora_dropout}: {cls} has a forward of its own; take lora_dropout=0")
        factors = self._create_factors(config, r, alpha, fused)
        # dW takes several times the memory of a quantized weight, or of this device's part of a sharded one.
        sharded = is_fsdp_sharded(self.get_base_layer())
        factors.caches_update = not (self._is_quantized() or sharded)
        factors.keeps_update = config.keep_update and not sharded
        self.dual_lora_factors[adapter_name] = factors.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _create_factors(self, config: DualLoraConfig, r: int, alpha: float, fused: list | None) -> DualLoraFactors:
        if fused is not None:
            raise ValueError(f"fused_slices: {type(self.get_base_layer()).__name__} is not a linear layer")
        return self.factors_cls(config, *self._get_delta_shape(), r, alpha, dtype=self._choose_dtype())

    def _get_delta_shape(self) -> tuple[int, int]:
        """Return fan_in, fan_out of dW."""
        return self.in_features, self.out_features

    def _choose_dtype(self) -> torch.dtype:
        weight = getattr(self.get_base_layer(), "weight", None)
        return torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move to the device only: the factors stay float32 on a 16-bit base."""
        if adapter_name not in self.dual_lora_factors:
            return
        factors = self.dual_lora_factors[adapter_name]
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is not None and not any(factor.is_meta for factor in factors.parameters()):
            factors.to(device)

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Cast the factors to the dtype of the base weight, if that is a floating one."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        if adapter_name in self.dual_lora_factors and dtype is not None and dtype.is_floating_point:
            factors = self.dual_lora_factors[adapter_name]
            before = {name: factor.data for name, factor in factors.named_parameters()}
            for factor in factors.parameters():
                factor.data = factor.data.to(dtype)
            if factors.loaded:
                factors.note_rounding(before)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return dW of one adapter at its present f, shaped like the base weight, float32 or float64.

        Args:
            adapter: its name.

        Raises:
            KeyError: this layer has no such adapter.

        Warns if ReLU(B A) has no positive entry left: such a layer no longer gets a gradient.
        """
        return self._compute_delta_weight(self.dual_lora_factors[adapter], adapter)

    def _compute_delta_weight(self, factors: DualLoraFactors, adapter: str) -> Tensor:
        dW = factors.delta_weight()
        if factors.update_scale > 0 and not dW.any():
            warnings.warn(
                "A Dual LoRA layer is dead: its magnitude is 0 in every entry, so it no longer gets a gradient.",
                stacklevel=find_stacklevel(),
            )
        return self._reshape_like_base_weight(dW, adapter)

    def _reshape_like_base_weight(self, dW: Tensor, adapter: str) -> Tensor:
        return dW

    def set_adapter(self, adapter_names: str | list[str], *args, **kwargs) -> None:
        """As in PEFT; an adapter that is named twice counts once, and a frozen group stays frozen. Also frees what
        evaluation cached for the other adapters."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        super().set_adapter(list(dict.fromkeys(names)), *args, **kwargs)
        for name, factors in self.dual_lora_factors.items():
            factors.freeze_group()
            if name not in self.active_adapters:
                factors.clear_cache()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """As in PEFT; a frozen group stays frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        for factors in self.dual_lora_factors.values():
            factors.freeze_group()

    def check_merge_allowed(self) -> None:
        """Raise if merging would have no effect, or another than dW, on the layer's output.

        Raises:
            ValueError: the base weight is computed from other tensors at every use, has 8 bits an entry, or is
                quantized in a way that PEFT cannot read or write.
        """
        base = self.get_base_layer()
        if is_packed(base):
            raise ValueError(f"cannot merge into {type(base).__name__}: {PACKED}; reload the base model to merge")
        if self._is_quantized() and self.quantization_backend.supports_merge:
            return
        weight = base._parameters.get("weight")
        if self._is_quantized() or (weight is not None and not weight.is_floating_point()):
            kind = self.quantization_backend.backend_name if self._is_quantized() else weight.dtype
            raise ValueError(
                f"cannot merge into {type(base).__name__}: PEFT {peft.__version__} cannot write a weight in {kind}; "
                "leave the adapter unmerged, or load the base model without quantization"
            )
        if weight is not None and weight.is_floating_point() and weight.itemsize == 1:  # a scale lies elsewhere
            raise ValueError(
                f"cannot merge into {type(base).__name__}: its weight is {weight.dtype}, scaled when it is used; "
                "leave the adapter unmerged, or load the base model in higher precision"
            )
        if weight is None:
            raise ValueError(
                f"cannot merge into {type(base).__name__}: its weight is computed from other tensors (parametrized, "
                "weight_norm, spectral_norm, pruned or sharded flat); remove that first, or leave the adapter unmerged"
            )

    def is_untied_by_merge(self, adapters: list[str]) -> bool:
        """Return whether a merge of these adapters, or an earlier merge, gives a tied layer a weight of its own."""
        merges = not self.bypassed and any(name in self.dual_lora_factors for name in adapters)
        return self.tied and (self.merged or merges)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add dW of the adapters (None: the active ones) to the base weight, in float32, rounded once.

        Written into the same parameter, so that references to it, such as an optimizer's, stay valid. A tied base
        weight is not written to: this layer gets its own weight and the other layer keeps the old one. The unmerged
        weight is kept until `unmerge`, which is therefore exact; a quantized one is quantized again, and where its
        scales are quantized, too (double quantization), they are rounded anew. If the layer is `bypassed`, nothing is
        merged, since no forward has used the factors.

        Args:
            safe_merge: raise instead of merging an adapter with NaN or infinite values.
            adapter_names: the adapters; None takes the active ones.

        Raises:
            ValueError: NaN or infinite values with safe_merge, or a weight that `check_merge_allowed` refuses.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.dual_lora_factors]
        if not names or self.bypassed:
            return
        self.check_merge_allowed()
        for factors in self.dual_lora_factors.values():
            factors.clear_cache()
        before = self._get_base_weight()
        factors = {name: self.dual_lora_factors[name] for name in names}
        delta = self._sum_delta_weights(factors, before.device)
        target = self._apply_max_norm(before.to(delta.dtype)) + delta
        merged = target.to(before.dtype)
        if safe_merge:
            self._check_finite(names, merged)
        # An untied weight is kept in host memory; a tied one still belongs to the other layer and is left as it is.
        if self._unmerged:
            kept = self._pop_unmerged_weight()
        else:
            kept = self.get_base_layer().weight if self.tied else before.to("cpu", copy=True)
        self._set_base_weight(merged, replace=self.tied)
        self._unmerged.append((kept, self._sum_weight_bits()))
        self._merged_factors |= {name: some.copy_values() for name, some in factors.items()}
        self.merged_adapters.extend(names)
        if (self._get_base_weight().to(delta.dtype) - target).norm() > MAX_ROUNDING * delta.norm():
            kind = "quantized" if self._is_quantized() else before.dtype
            warnings.warn(
                f"Merging Dual LoRA into {kind} base weights rounds away more than {MAX_ROUNDING:.0%} of dW; "
                "merge into a base of higher precision to keep it.",
                stacklevel=find_stacklevel(),
            )

    def unmerge(self) -> None:
        """Restore the weight from before the first merge.

        If the merged weight has been written to since, by an optimizer or through `.data`, that change is kept: dW, as
        it was merged, is subtracted instead.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=find_stacklevel())
            return
        kept = self._pop_unmerged_weight()
        self._set_base_weight(kept, replace=isinstance(kept, nn.Parameter))
        self.merged_adapters.clear()
        self._merged_factors.clear()

    def _pop_unmerged_weight(self) -> Tensor:
        """Return the weight from before the first merge, with what has been written to the merged one since."""
        intact = self._is_as_merged()
        kept, _ = self._unmerged.pop()
        if intact:
            return kept
        weight = self._get_base_weight()
        delta = self._sum_delta_weights(self._merged_factors, weight.device)
        return (weight.to(delta.dtype) - delta).to(weight.dtype)

    @torch.no_grad()
    def _sum_delta_weights(self, factors: dict[str, DualLoraFactors], device: torch.device) -> Tensor:
        return sum(self._compute_delta_weight(some, name).to(device) for name, some in factors.items())

    def _apply_max_norm(self, weight: Tensor) -> Tensor:
        """Return the base weight as the base layer's forward uses it."""
        return weight

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """As in torch; a base weight is not loaded into a merged layer, since unmerging would discard it."""
        if self.merged and any(name.startswith(f"{prefix}base_layer.") for name in state_dict):
            errors.append(f"{prefix}base_layer holds merged adapters; call unmerge_adapter() before load_state_dict.")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _check_finite(self, names: list[str], merged: Tensor) -> None:
        for name in names:
            # An infinite C or D has signs, so it does not show in dW.
            if not all(t.isfinite().all() for t in (merged, *self.dual_lora_factors[name].parameters())):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def _is_quantized(self) -> bool:
        return self.quantization_backend is not None

    def _get_base_weight(self) -> Tensor:
        if self._is_quantized():
            return self.quantization_backend.get_base_weight(self.get_base_layer())
        return self.get_base_layer().weight.data

    def _set_base_weight(self, weight: Tensor, replace: bool) -> None:
        """Write into the base layer's parameter, or, with `replace`, put another in its place."""
        base = self.get_base_layer()
        if self._is_quantized():
            self.quantization_backend.set_base_weight(self, weight)
        elif replace or base.weight.is_inference():
            if not isinstance(weight, nn.Parameter):
                weight = nn.Parameter(weight, requires_grad=base.weight.requires_grad)
            base.weight = weight
        else:
            with torch.no_grad():
                base.weight.copy_(weight)

    def _sum_weight_bits(self) -> list[Tensor] | None:
        """Return a checksum of the base weight, whoever writes to it and wherever it is: the sums of the bits of each
        row and each column, which wrap. None where PEFT or the layer's own forward writes it anew, or where it has
        no bits of its own here."""
        weight = getattr(self.get_base_layer(), "weight", None)
        plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and not weight.is_meta
        if self._is_quantized() or not plain or self._writes_to_its_weight():
            return None
        bits = weight.detach().flatten(1).view(INTEGERS[weight.itemsize])
        sums = [(part.sum(0), part.sum(1)) for part in bits.split(max(1, CHECKED // bits.shape[1]))]
        return [sum(columns for columns, _ in sums).cpu(), torch.cat([rows for _, rows in sums]).cpu()]

    def _is_as_merged(self) -> bool:
        """Return whether the base weight has the bits that merging left."""
        (_, before), now = self._unmerged[0], self._sum_weight_bits()
        return before is None or now is None or all(map(torch.equal, before, now))

    def _apply(self, fn, recurse=True):
        """As in torch; a cast of a merged weight is not a write to it."""
        intact = bool(self._unmerged) and self._is_as_merged()
        super()._apply(fn, recurse)
        if intact:
            self._unmerged = [(kept, self._sum_weight_bits()) for kept, _ in self._unmerged]
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"uses": None, "_merged_factors": {}, "_silenced": {}, **state})

    def _writes_to_its_weight(self) -> bool:
        """Return whether the base layer's own forward writes to its weight."""
        return False

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as in PEFT: whoever computes with it computes without the adapters."""
        if self.uses is not None:
            self.uses |= list_uses(sys._getframe(1))
        return super().weight

    def forward(self, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
        """Return the base layer's output for x plus the adapters' terms.

        adapter_names: one for each row of x, "__base__" for none; set by the model for a batch of mixed adapters.

        Raises:
            ValueError: adapter_names has another length than x, adapters are merged, or x needs a gradient through a
                4-bit weight that gives none.
        """
        self._note_call()
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed_batch(x, adapter_names, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.dual_lora_factors]
        if not self.has_plain_forward and names:
            return self._forward_merged_weight(x, names, *args, **kwargs)
        trains = self._is_quantized() and torch.is_grad_enabled() and x.requires_grad
        if trains and is_packed(self.get_base_layer()):
            raise ValueError(f"{PACKED}, and gives no gradient; reload the base model to train on it")
        result = self.base_layer(x, *args, **kwargs)
        if self._is_quantized():
            result = self.quantization_backend.maybe_clone_base_result(result)
        return self._add_terms(result, x, names)

    def silence(self) -> None:
        """Set f of every adapter to 0, also for the saved adapter, until a training forward calls this layer."""
        for name, factors in self.dual_lora_factors.items():
            self._silenced[name] = int(factors.step), float(factors.update_scale)
            factors.set_update_scale(0.0, ramp=False)

    def _end_silence(self) -> None:
        """Give adapters the step and f from before `silence`, except where f has been set since."""
        for name in self._silenced.keys() & self.dual_lora_factors.keys():
            factors, (step, f) = self.dual_lora_factors[name], self._silenced[name]
            silent = factors.update_scale == 0
            factors.step.copy_(torch.where(silent, step, factors.step))
            factors.update_scale.copy_(torch.where(silent, f, factors.update_scale))
        self._silenced = {}

    def _note_call(self) -> None:
        if self.bypassed:
            self.bypassed = False
        if self._silenced and self.training:
            self._end_silence()
        if self.uses is not None:
            self.uses.add("calls")

    def _check_mixed_batch(self, x: Tensor, adapter_names: list[str]) -> None:
        if isinstance(x, Tensor) and len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _forward_mixed_batch(self, x: Tensor, adapter_names: list[str], *args, **kwargs) -> Tensor:
        """Return the base layer's output for the full batch, with each adapter's term added to its own rows.

        No dW stays cached, since those of N adapters would take the memory of N models. A forward of its own gets the
        full batch for each adapter, since only it knows which of its arguments have rows.

        Raises:
            ValueError: the output has no row for every name.
        """
        result = self.base_layer(x, *args, **kwargs)
        result = result.clone() if isinstance(result, Tensor) else result
        for name in dict.fromkeys(adapter_names):
            if name not in self.dual_lora_factors:
                continue  # the base, or an adapter of other layers
            rows = [row for row, of_row in enumerate(adapter_names) if of_row == name]
            if self.has_plain_forward:
                result[rows] = self._add_terms(result[rows], x[rows], [name])
            elif _has_row_for_row(result, x):
                result[rows] = self._forward_merged_weight(x, [name], *args, **kwargs)[rows]
            else:
                raise ValueError(
                    f"adapter_names: {type(self.get_base_layer()).__name__} has no output of its own for each row of "
                    "a batch, so its adapters cannot be mixed; run the rows of each adapter on their own"
                )
            self.dual_lora_factors[name].clear_cache()
        return result

    def _forward_merged_weight(self, x: Tensor, names: list[str], *args, **kwargs) -> Tensor:
        """Run the base layer's own forward on W0 + dW, in the precision of the factors, since 16 bits would lose dW."""
        base = self.get_base_layer()
        dW = sum(self._reshape_like_base_weight(self.dual_lora_factors[name].delta_weight(), name) for name in names)
        tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
        state = _cast_floats(tensors, dW.dtype)
        state["weight"] = self._apply_max_norm(state["weight"]) + dW
        dtype = x.dtype if _is_floating(x) else base.weight.dtype
        with suspend_autocast(dW.device.type):
            result = torch.func.functional_call(base, state, (_cast_floats(x, dW.dtype), *args), kwargs)
        return _cast_floats(result, dtype)

    def _add_terms(self, result: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """Return result plus the terms of these adapters, in result's dtype."""
        dtype = result.dtype
        for name in names:
            result = self._add_term(result, x, name)
        return result.to(dtype)

    def _add_term(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        return result + self.dual_lora_factors[adapter](x)

    def extra_repr(self) -> str:
        return f"quantization_backend='{self.quantization_backend.backend_name}'" if self._is_quantized() else ""

    def __repr__(self) -> str:
        return "dual_lora." + super().__repr__()


class Linear(DualLoraLayer):
    """nn.Linear, GPT-2's Conv1D (whose weight is in x out) or a quantized linear layer."""

    other_param_names = ("fused_slices",)

    def __init__(self, base_layer: nn.Module, **kwargs) -> None:
        super().__init__(base_layer, **kwargs)
        self.fused_slices: dict[str, list] = {}

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As `DualLoraLayer.forward`, ... x in -> ... x out; uses one product for base and adapter if possible."""
        factors = None if args or kwargs else self._find_fusable_factors(x)
        if factors is None or factors.applies_dropout:
            return super().forward(x, *args, **kwargs)
        self._note_call()
        base = self.base_layer
        return factors(x, base.weight.T if isinstance(base, Conv1D) else base.weight, base.bias)

    def _find_fusable_factors(self, x: Tensor) -> DualLoraFactors | None:
        """Return the active adapter's factors if one product with W0 + dW can replace those of base and adapter, else
        None. That needs exactly one adapter and a plain base layer with x's dtype, frozen weights and no hooks."""
        names = [name for name in self.active_adapters if name in self.dual_lora_factors]
        base = self.base_layer
        if (
            self.disable_adapters
            or self.merged
            or len(names) != 1
            or names[0] in self.fused_slices
            or x.is_nested
            or type(base) not in (nn.Linear, Conv1D)
            or "forward" in base.__dict__
            or any((base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks))
            or _has_hooks_of_all_modules()
        ):
            return None
        constants = [base.weight] if base.bias is None else [base.weight, base.bias]
        if any(type(t) is not nn.Parameter or t.requires_grad or not t.is_floating_point() for t in constants):
            return None
        if x.dtype != base.weight.dtype and not is_autocast_on(x.device.type):
            return None  # the base layer decides (or raises) about the dtype
        factors = self.dual_lora_factors[names[0]]
        return factors if factors.recomputes else None

    def _create_factors(self, config, r, alpha, fused):
        if fused is None:
            return super()._create_factors(config, r, alpha, None)
        n, blocks = fused
        if self.out_features % n:
            raise ValueError(f"fused_slices: {n} equal blocks do not fit {self.out_features} output features")
        return DualLoraFactors(
            config, self.in_features, self.out_features // n, r, alpha, blocks=len(blocks), dtype=self._choose_dtype()
        )

    def update_layer(self, adapter_name, config, r, alpha, fused=None):
        super().update_layer(adapter_name, config, r, alpha, fused)
        if fused is not None:
            self.fused_slices[adapter_name] = fused

    def _reshape_like_base_weight(self, dW, adapter):
        if adapter in self.fused_slices:
            n, blocks = self.fused_slices[adapter]
            full = dW.new_zeros(n, *dW.shape[1:])
            full[blocks] = dW
            dW = full.flatten(0, 1)
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
        """Return True: `peft.convert_to_lora` works, because dW is additive. But dW has full rank, so the conversion
        loses most of it unless the LoRA rank is that of the layer."""
        return True


class Embedding(DualLoraLayer):
    """nn.Embedding. Dropout is not applied, as in LoRA.

    The base layer's options apply to the sum: the row of `padding_idx` does not change, `max_norm` limits W0 + dW, and
    `scale_grad_by_freq` divides the gradient. `sparse` affects the base weight's gradient only; that of the factors is
    dense.
    """

    factors_cls = EmbeddingFactors

    def _create_factors(self, config, r, alpha, fused):
        factors = super()._create_factors(config, r, alpha, fused)
        base = self.get_base_layer()
        factors.padding_idx, factors.scale_grad_by_freq = base.padding_idx, base.scale_grad_by_freq
        return factors

    def _reshape_like_base_weight(self, dW, adapter):
        return dW.T

    def _writes_to_its_weight(self):
        return self.get_base_layer().max_norm is not None

    def _apply_max_norm(self, weight):
        base = self.get_base_layer()
        return weight if base.max_norm is None else torch.renorm(weight, base.norm_type, 0, base.max_norm)

    def _add_terms(self, result, x, names):
        base, added = self.get_base_layer(), super()._add_terms(result, x, names)
        if base.max_norm is None or not names:
            return added
        scale = self._get_embed_scale()
        limit = base.max_norm * (1.0 if scale is None else float(scale))
        rows = added.reshape(-1, added.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return torch.renorm(rows, base.norm_type, 0, limit).view(added.shape).to(added.dtype)

    def _add_term(self, result, x, adapter):
        term = self.dual_lora_factors[adapter](x)
        scale = self._get_embed_scale()
        return result + (term if scale is None else term * scale.to(term.dtype))


class ConvNd(DualLoraLayer):
    """nn.Conv1d, Conv2d, Conv3d, with groups and padding modes; dW has the shape of the base weight."""

    factors_cls = ConvFactors

    def _get_delta_shape(self):
        weight = self.get_base_layer().weight
        return math.prod(weight.shape[1:]), weight.shape[0]

    def _reshape_like_base_weight(self, dW, adapter):
        return dW.view(self.get_base_layer().weight.shape)

    def _add_term(self, result, x, adapter):
        return result + self.dual_lora_factors[adapter](x, self.get_base_layer())


ADAPTED = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: ConvNd,
    nn.Conv2d: ConvNd,
    nn.Conv3d: ConvNd,
}


def find_layer_class(base_layer: nn.Module, quantization_backend) -> type[DualLoraLayer] | None:
    """Return the class that adapts this layer, None where there is none."""
    if quantization_backend is not None:
        return Linear if quantization_backend.layer_type == "linear" else None
    return next((cls for kind, cls in ADAPTED.items() if isinstance(base_layer, kind)), None)


def _is_floating(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast_floats(values, dtype: torch.dtype):
    """Return a tensor, or a tuple with tensors, with the floating ones cast: a forward of its own may take a shape and
    may return its positions, too."""
    return tree_map(lambda value: value.to(dtype) if _is_floating(value) else value, values)


def _has_row_for_row(result, x) -> bool:
    """Return whether a layer's output has the rows of its input. Positions that all rows share have one row, or no
    dimension for rows. (A table's output has a dimension more than its input, the ids.)"""
    if not (isinstance(result, Tensor) and isinstance(x, Tensor)):
        return False
    return len(result) == len(x) and result.ndim == x.ndim + (not x.is_floating_point())


def _has_hooks_of_all_modules() -> bool:
    """Return whether torch has hooks for all modules, other than those by which its FlopCounterMode only looks on."""
    hooks = [hook for name in GLOBAL_HOOKS for hook in getattr(torch.nn.modules.module, name).values()]
    return any(getattr(hook, "__module__", None) != "torch.utils.module_tracker" for hook in hooks)


def is_packed(base_layer: nn.Module) -> bool:
    """Return whether bitsandbytes has packed a 4-bit weight in an order that PEFT cannot read and that gives no
    gradient."""
    quant_state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    return getattr(quant_state, "packing_format_for_cpu", False)


def has_plain_forward(base_layer: nn.Module) -> bool:
    """Return whether the layer computes what the torch or transformers class it derives from computes.

    A subclass may pad, shift or scale. Embeddings with an `embed_scale` are handled and count as plain; a linear layer
    with a custom forward is tried on two rows. Weights in other formats count as plain: their layers are known by type.
    """
    kind = next((kind for kind in ADAPTED if isinstance(base_layer, kind)), None)
    weight = getattr(base_layer, "weight", None)
    known = kind is None or type(base_layer).forward is kind.forward or hasattr(base_layer, "embed_scale")
    if known or weight is None or not weight.is_floating_point():
        return True
    return kind in (nn.Linear, Conv1D) and _agrees_on_two_rows(base_layer, kind)


def _agrees_on_two_rows(base_layer: nn.Module, kind: type[nn.Module]) -> bool:
    weight = base_layer.weight
    try:
        n_in = weight.shape[0 if kind is Conv1D else 1]
        rows = torch.linspace(-1, 1, 2 * n_in, device=weight.device, dtype=weight.dtype).view(2, n_in)
        with torch.no_grad():
            own, plain = type(base_layer).forward(base_layer, rows), kind.forward(base_layer, rows)
        return torch.allclose(own, plain, 1e-2, 1e-4)
    except Exception:  # needs other inputs, or the weight is on the meta device: counts as plain, as in PEFT
        return True
