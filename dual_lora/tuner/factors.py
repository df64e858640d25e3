"""The trained part of one adapter on one layer: the four factors and the state of the ramp.

One leaf module per adapter whose forward does the work, so that FSDP, which gathers parameters around a module's
forward, sees every use of them.
"""

import copy
import math
import warnings
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .. import kernels
from ..functional import RAMPS, delta_weight, init_std, is_autocast_on, is_transformed
from .config import GROUPS, DualLoraConfig
from .precision import find_stacklevel, warn_of_cast

TENSORS = ("A", "B", "C", "D", "step", "update_scale")  # of one adapter on one layer
MAX_DRAWS = 100  # attempts at initial factors that can train
# All DualLoraFactors alive in this process; the optimizer hook in warmup.py finds those that an optimizer trains here.
ALL_FACTORS: weakref.WeakSet = weakref.WeakSet()


class _Cache(NamedTuple):
    """A matrix that evaluation keeps, and what tells whether it is still right.

    A write through `.data`, as weight averaging does, does not change a tensor's version. The factors are small enough
    to compare; such a write to a base weight goes unnoticed until `train()`, `eval()` or a cast.

    key: addresses and versions of the tensors the matrix was computed from. values: copies of the factors. weight: the
    base weight of that time, kept alive so that no new tensor can reuse its address.
    """

    key: tuple
    values: list[Tensor]
    weight: Tensor | None
    matrix: Tensor


class DualLoraFactors(nn.Module):
    """Factors of a linear layer; forward gives the adapter's own term x dW^T.

    Args:
        fan_in, fan_out: shape of dW is fan_out x fan_in.
        r: the budget r1 + r2.
        alpha: numerator of the scale.
        blocks: None, or the number of separate updates of that shape; every factor then has this leading dimension.

    Raises:
        ValueError: dW would have no entries, or no draw of the initial factors can train.
    """

    # One entry of each factor as it was drawn; None once f has been given a value, or where the draw has no values.
    _drawn: list[float] | None = None

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
        self.config = config
        if fan_in == 0 or fan_out == 0:
            raise ValueError(f"a weight of {fan_out} x {fan_in} cannot be adapted; leave it out with exclude_modules")
        r1, r2 = config.split(r)
        lead = () if blocks is None else (blocks,)
        self.A = nn.Parameter(torch.empty(*lead, r1, fan_in, dtype=dtype))
        self.B = nn.Parameter(torch.empty(*lead, fan_out, r1, dtype=dtype))
        self.C = nn.Parameter(torch.empty(*lead, r2, fan_in, dtype=dtype))
        self.D = nn.Parameter(torch.empty(*lead, fan_out, r2, dtype=dtype))
        self.frozen = GROUPS.get(config.freeze, ())
        self.freeze_group()
        self.scaling = alpha / math.sqrt(r1 * r2)
        self.variants = {name: getattr(config, name) for name in ("magnitude", "direction", "ste", "direction_dtype")}
        self.is_papers_map = config.is_papers_map
        self.kernel = config.kernel
        names = config.weight_gradient_dtype, config.input_gradient_dtype
        self.gradient_types = kernels.GradientTypes(*(name and getattr(torch, name) for name in names))
        self.keeps_update = config.keep_update
        self.dropout = config.lora_dropout
        self.warmup_steps = config.scale_warmup_steps
        self.warmup_shape = config.scale_warmup_shape
        ramp_over = not config.init_weights or self.warmup_steps == 0
        self.register_buffer("step", torch.tensor(self.warmup_steps if ramp_over else 0))
        self.register_buffer("update_scale", torch.tensor(float(ramp_over), dtype=torch.float32))
        fan = self.choose_fan(fan_in, fan_out)
        std = config.init_std or init_std(fan, r1, r2, alpha, config.magnitude, config.direction)
        self.reset_parameters(std, config.direction_init_std)
        # Whether evaluation may keep dW, which is as large as the weight; not where a device holds the weight in part.
        self.caches_update = True
        self._cache: _Cache | None = None
        self.loaded = False  # whether the values come from a file; read by `DualLoraModel._warn_of_ramp`
        self.rounded = False  # whether values from a file were rounded; read by `DualLoraModel._warn_of_rounding`
        ALL_FACTORS.add(self)

    def __getstate__(self):
        return {**super().__getstate__(), "_cache": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        ALL_FACTORS.add(self)  # a copy or an unpickled module did not pass through __init__

    @staticmethod
    def choose_fan(fan_in: int, fan_out: int) -> int:
        """Return the n for which pretrained weights of this kind typically have size 1 / sqrt(n)."""
        return fan_in

    @property
    def weight(self) -> Tensor:
        """The tensor that PEFT's FSDP wrapping policy inspects to see whether a leaf module trains."""
        return self.C if "A" in self.frozen else self.A

    def copy_values(self) -> "DualLoraFactors":
        """Return factors of the present values, which nobody trains. Unlike a deep copy, they share all else, such as
        hooks that hold offloaded weights."""
        twin = copy.copy(self)
        values = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        twin._parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
        twin._buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        return twin

    def freeze_group(self) -> None:
        """Stop the gradients of the group that does not train; PEFT starts those of all factors of an adapter."""
        for name in self.frozen:
            getattr(self, name).requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self, std: float, direction_std: float | None = None) -> None:
        """Draw A and B from N(0, std^2), C and D from N(0, direction_std^2) (None: std^2).

        Redraws if every entry of ReLU(B A) is 0: such a layer has no gradient and would stay 0 forever. That can only
        happen in layers with a few entries, so checking a 64 x 64 corner is enough.

        Raises:
            ValueError: no draw can train, because the products under- or overflow float32 at this sigma.
        """
        for _ in range(MAX_DRAWS):
            for factor, sigma in ((self.A, std), (self.B, std), (self.C, direction_std), (self.D, direction_std)):
                factor.normal_(0.0, std if sigma is None else sigma)
            if self.A.is_meta:
                return
            if self._can_train():
                self._drawn = self._sample()
                return
        raise ValueError(
            f"init_std={std:.3g}, direction_init_std={direction_std}: all entries of B A or D C become 0 or infinite; "
            "take init_std=None, or a lora_alpha for which its rule gives a usable sigma"
        )

    def _can_train(self) -> bool:
        """Return whether the corners of B A and D C are finite and not all 0; for ReLU, B A needs a positive entry in
        every block."""
        size, direction = (b[..., :64, :] @ a[..., :64] for a, b in ((self.A, self.B), (self.C, self.D)))
        rectified = self.variants["magnitude"] in ("relu", "squared_relu")
        live = size.amax((-2, -1)) > 0 if rectified else size.any()
        return bool(live.all() and direction.any() and size.isfinite().all() and direction.isfinite().all())

    def _sample(self) -> list[float]:
        """Return one entry of each factor."""
        return [factor[(0,) * factor.ndim].item() for factor in (self.A, self.B, self.C, self.D)]

    def _has_lost_scale(self) -> bool:
        """Return whether f is still its initial 0 although the factors are no longer those that were drawn.

        Rounding to 16 bits moves an entry by less than 1 %; another draw, or a training that began with one, moves all.
        """
        drawn = self._drawn
        if drawn is None or self.is_fsdp_sharded or any(map(_is_untrackable, (*self.parameters(), self.update_scale))):
            return False
        if self.update_scale != 0:
            self._drawn = None
            return False
        return not all(math.isclose(*pair, rel_tol=0.01) for pair in zip(drawn, self._sample(), strict=True))

    def _warn_of_lost_scale(self) -> None:
        """Warn, once for all layers, where factors are evaluated that were copied without their f: it is a buffer, and
        `parameters()`, or what requires a gradient, leaves it out."""
        if torch.is_grad_enabled() or _is_recorded(self.A) or not self._has_lost_scale():
            return
        for factors in ALL_FACTORS:
            if factors._has_lost_scale():
                factors._drawn = None
        warnings.warn(
            "Dual LoRA: an adapter got new factors while its f is 0, so it computes the base model. f is a buffer, "
            "which a copy of the parameters leaves out. For the full dW, call dual_lora.set_update_scale(model, 1.0).",
            stacklevel=find_stacklevel(),
        )

    @property
    def scale(self) -> Tensor:
        """f * alpha / sqrt(r1 * r2) at the present f, in the dtype dW is computed in."""
        self._warn_of_lost_scale()
        return self.update_scale.to(self._product_dtype) * self.scaling

    @property
    def _product_dtype(self) -> torch.dtype:
        return torch.float64 if self.A.dtype == torch.float64 else torch.float32

    @property
    def recomputes(self) -> bool:
        """Whether dW is rebuilt in backward. The kernels compute only the paper's map; variants use autograd."""
        return self.kernel != "eager" and self.is_papers_map

    @property
    def kernel_used(self) -> str:
        """The kernel that actually computes dW (eager, recompute or triton) if `kernel` is "auto" or unavailable."""
        if not self.recomputes:
            return "eager"
        return "recompute" if self._kernel_options["ops"] is kernels.TORCH else "triton"

    @property
    def follows_float32_setting(self) -> bool:
        """Whether signs of D C depend on torch's setting for float32 products, such as TF32."""
        signs = self.variants["direction"] == "sign" and self.variants["direction_dtype"] == "float32"
        if not signs or self.C.dtype != torch.float32:
            return False
        ops = kernels.choose_ops(self.kernel, self.A.device)
        return not (self.recomputes and kernels.takes_ieee_products(ops, self.A, self.C))

    def delta_weight(self) -> Tensor:
        """Return dW at the present f, (blocks x) fan_out x fan_in, float32 or float64."""
        return self._delta_weight(self.A, self.B, self.C, self.D)

    def _delta_weight(self, *factors: Tensor) -> Tensor:
        if not self.recomputes:
            return delta_weight(*factors, self.scale, **self.variants)
        if factors[0].ndim == 3:
            return torch.stack([self._delta_weight(*block) for block in zip(*factors, strict=True)])
        return kernels.delta_weight(*self._upcast(*factors), **self._kernel_options)

    def _upcast(self, *factors: Tensor) -> list[Tensor]:
        return [factor.to(self._product_dtype) for factor in factors]

    @property
    def _kernel_options(self) -> dict:
        return {
            "scale": self.scale,
            "ste": self.variants["ste"],
            "ops": kernels.choose_ops(self.kernel, self.A.device),
        }

    def advance_ramp(self) -> None:
        """Count one optimizer step: while the ramp lasts, f = shape(step / warmup_steps). Never waits for the device.

        f is written at every step, even after the ramp, so that its version changes: this is how `_get_cached_matrix`
        notices a step on sharded parameters, which are gathered again without a change of version.
        """
        ramping = self.step < self.warmup_steps
        self.step += ramping
        self.update_scale.copy_(torch.where(ramping, self._compute_height(self.step), self.update_scale))

    def _compute_height(self, step: Tensor) -> Tensor:
        """Return the ramp's f at a step, in float32; a quotient of integers would have torch's default dtype."""
        return RAMPS[self.warmup_shape](step.float() / max(self.warmup_steps, 1))

    def set_update_scale(self, factor: float, ramp: bool) -> None:
        """Set f, of this adapter on this layer; see `dual_lora.set_update_scale`."""
        self.step.fill_(self._find_step(factor) if ramp else self.warmup_steps)
        self.update_scale.fill_(factor)
        self._drawn = None

    def _find_step(self, f: float) -> int:
        """Return the step of the ramp whose height is nearest to f."""
        steps = torch.arange(self.warmup_steps + 1, device=self.step.device)
        return int((self._compute_height(steps) - f).abs().argmin())

    def _reconcile_ramp(self) -> None:
        """Let a ramp that was saved under another length or shape go on from the step nearest to its f.

        It has ended if f is of a ramp's end or of no ramp, or if the step is the last one, where f may be set by hand.
        """
        step, f = int(self.step), float(self.update_scale)
        if not 0 <= f < 1 or (f == 0 and step > 0):
            self.step.fill_(self.warmup_steps)
        elif step not in (self.warmup_steps, nearest := self._find_step(f)):
            self.step.fill_(nearest)
            warnings.warn(
                f"Dual LoRA: an adapter was saved {step} steps into another ramp, at f = {f:.3g}: it goes on at step "
                f"{nearest} of its present one ({self.warmup_shape}, scale_warmup_steps={self.warmup_steps}). If f was "
                "set by hand, set it again with dual_lora.set_update_scale.",
                stacklevel=find_stacklevel(),
            )

    @property
    def applies_dropout(self) -> bool:
        """Whether dropout acts on the input now."""
        return self.training and self.dropout > 0

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return x dW^T, or x (weight + dW)^T + bias, in x's dtype or autocast's.

        x: ... x fan_in; result: ... x (blocks * fan_out). weight (fan_out x fan_in) and bias (fan_out) are constants.
        They may only be given without blocks, if `recomputes`, and if not `applies_dropout`: dropout must not act on
        the base.

        Raises:
            ValueError: training asks for bfloat16 products on a device that is no faster with them.
        """
        device = x.device.type
        if is_autocast_on(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        if not self.training and not torch.is_grad_enabled():
            return self._infer(x, weight, bias)
        x = F.dropout(x, self.dropout, self.training)
        if not self.recomputes or x.is_nested:  # nested: what nn.TransformerEncoder makes of a padding mask
            return F.linear(x, self.delta_weight().flatten(0, -2).to(x.dtype))
        factors, options = self._upcast(self.A, self.B, self.C, self.D), self._kernel_options
        options["gradient_types"] = self._check_gradient_types(x)
        dW = self._keep_update() if self.keeps_update else None
        if self.A.ndim == 2:
            return kernels.dual_linear(x, *factors, **options, weight=weight, bias=bias, dW=dW)
        kept = [None] * len(self.A) if dW is None else dW.chunk(len(self.A))
        blocks = zip(zip(*factors, strict=True), kept, strict=True)
        return torch.cat([kernels.dual_linear(x, *block, **options, dW=known) for block, known in blocks], -1)

    @property
    def is_fsdp_sharded(self) -> bool:
        """Whether FSDP divides the factors among devices. FSDP1 puts tensors in place of the parameters."""
        return not isinstance(self.A, nn.Parameter) or is_fsdp_sharded(self)

    def _keep_update(self) -> Tensor | None:
        """Return dW, kept from an earlier forward if no factor has changed since; None where it may not be kept."""
        with torch.no_grad():
            return None if self.is_fsdp_sharded else self._get_cached_matrix(None, self._product_dtype, keep=True)

    def _check_gradient_types(self, x: Tensor) -> kernels.GradientTypes:
        """Return the types of the gradients' products. Except in training, a device without fast ones takes none.

        Raises:
            ValueError: in training, one is narrower than x's and no faster on x's device.
        """
        if x.dtype.itemsize <= 2 or not any(self.gradient_types):  # torch 2.7 cannot compile what follows
            return self.gradient_types
        asked = [name for name, dtype in self.gradient_types._asdict().items() if dtype]
        reason = kernels.explain_slow_bfloat16(x.device.type)
        if reason and self.training:
            raise ValueError(f"{asked[0]}_gradient_dtype='bfloat16': {reason}; leave it None to train here")
        return kernels.GradientTypes() if reason else self.gradient_types

    def _infer(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is not None and x.dtype != self._product_dtype:
            # Rounding weight + dW to 16 bits would lose dW.
            base = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            return base + F.linear(x, self._get_cached_matrix(None, x.dtype, self.caches_update))
        return F.linear(x, self._get_cached_matrix(weight, x.dtype, self.caches_update), bias)

    def _get_cached_matrix(self, weight: Tensor | None, dtype: torch.dtype, keep: bool) -> Tensor:
        """Return dW, or weight + dW, (blocks * fan_out) x fan_in. With `keep`, it is cached between calls until one of
        the tensors it is computed from changes, unless they are sharded: it is as large as the full weight."""
        factors = [self.A, self.B, self.C, self.D, self.update_scale]
        parts = factors if weight is None else [*factors, weight]
        keepable = keep and not (_is_recorded(self.A) or self.is_fsdp_sharded or any(map(_is_untrackable, parts)))
        cache_key = (*((t.data_ptr(), t._version) for t in parts), dtype, self.scaling) if keepable else None
        cache = self._cache  # read once: another thread may clear it
        # Autograd cannot save a matrix made in inference mode.
        usable = cache is not None and (torch.is_inference_mode_enabled() or not cache.matrix.is_inference())
        if keepable and usable and cache.key == cache_key and all(map(torch.equal, cache.values, factors)):
            return cache.matrix
        dW = self.delta_weight().flatten(0, -2)
        matrix = (dW if weight is None else dW.add_(weight)).to(dtype)
        held = None if weight is None else weight.detach()
        self._cache = _Cache(cache_key, [t.clone() for t in factors], held, matrix) if keepable else None
        return matrix

    def clear_cache(self) -> None:
        """Free the matrix that evaluation, or `keep_update`, cached."""
        self._cache = None

    def train(self, mode: bool = True):
        self.clear_cache()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        """As in torch, for casts and moves; f stays float32, which a ramp of many steps needs. Factors are cast as
        asked (DeepSpeed and FSDP need one dtype); a cast to 16 bits warns. The ramp does not move to meta: where
        accelerate offloads a layer, it brings back the factors from their file, but no buffers."""
        self.clear_cache()
        step, f, dtype = self.step, self.update_scale, self.A.dtype
        super()._apply(fn, recurse)
        warn_of_cast(dtype, self.A, fn)
        if self.update_scale.is_meta:
            self.step, self.update_scale = step, f
        elif self.update_scale.dtype != f.dtype:
            self.update_scale = f.to(self.update_scale.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """As in torch; four factors without f, as in a file of only the parameters, count as trained: f is 1. A
        ramp of another length or shape goes on from its f."""
        self.clear_cache()
        self.loaded = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.note_rounding({name: state_dict[prefix + name] for name in "ABCD" if prefix + name in state_dict})
        has_scale = f"{prefix}update_scale" in state_dict
        if not has_scale and all(prefix + name in state_dict for name in "ABCD"):
            self.set_update_scale(1.0, ramp=False)
        if has_scale:
            self._drawn = None
            if not self.update_scale.is_meta and not _is_recorded(self.A):
                self._reconcile_ramp()

    def note_rounding(self, values: dict[str, Tensor]) -> None:
        """Note in `rounded` whether the factors, by name, hold these values only in fewer bits."""
        for name, value in values.items():
            factor = getattr(self, name)
            narrower = factor.dtype.itemsize < value.dtype.itemsize and not (factor.is_meta or value.is_meta)
            if narrower and not torch.equal(factor.to(value), value):
                self.rounded = True

    def extra_repr(self) -> str:
        """Shapes, ranks, scale, kernel and f, for print(model)."""
        shapes = ", ".join(f"{name}={'x'.join(map(str, getattr(self, name).shape))}" for name in "ABCD")
        f = "?" if self.update_scale.is_meta else f"{self.update_scale.item():.3g}"
        ranks = f"r1={self.A.shape[-2]}, r2={self.C.shape[-2]}"
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        types = "".join(f", {name}_gradient={dtype}" for name, dtype in self.gradient_types._asdict().items() if dtype)
        return f"{ranks}, {shapes}, scale={self.scaling:.4g}, f={f}, kernel={self.kernel}{dropout}{types}"


def is_fsdp_sharded(module: nn.Module) -> bool:
    """Return whether the parameters that the module itself holds are divided among devices.

    They are then DTensors. In a forward FSDP2 puts the gathered ones, which are plain, in their place, but it leaves a
    hook on every module of which it divides a parameter.
    """
    hooks = (getattr(hook, "__module__", None) or "" for hook in module._load_state_dict_post_hooks.values())
    divided = any(hasattr(p, "placements") for p in module._parameters.values())
    return divided or any(name.startswith("torch.distributed.fsdp") for name in hooks)


def _is_recorded(tensor: Tensor) -> bool:
    """Return whether what this tensor is used in now is recorded, to be run again later (by torch.compile, by
    torch.jit.trace or as a CUDA graph), computed without values (by FakeTensorMode), or transformed (`is_transformed`),
    where tensors have tangents or levels that are gone afterwards."""
    if (
        is_transformed()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or isinstance(torch.empty(0), FakeTensor)
    ):
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_untrackable(tensor: Tensor) -> bool:
    """Return whether changes to this tensor leave no trace: one made in inference mode, wrapped by torch.func, without
    values, or of another class."""
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class EmbeddingFactors(DualLoraFactors):
    """Factors of an embedding table; dW is embedding_dim x num_embeddings.

    padding_idx: the row that never changes, dW being 0 there. scale_grad_by_freq: as in nn.Embedding.
    """

    padding_idx: int | None = None
    scale_grad_by_freq = False

    @staticmethod
    def choose_fan(fan_in: int, fan_out: int) -> int:
        return fan_out

    def delta_weight(self) -> Tensor:
        """Return dW at the present f, embedding_dim x num_embeddings, with zeros at padding_idx."""
        dW = super().delta_weight()
        if self.padding_idx is None:
            return dW
        return dW.index_fill(-1, torch.tensor([self.padding_idx], device=dW.device), 0)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of dW^T at `ids` (integers of any shape): ids.shape x embedding_dim. Only these are computed.

        An id that occurs several times is looked up at its last position, so that its gradients add up before the
        straight-through clip, as they would in the full dW.
        """
        flat = ids.flatten()
        places = torch.arange(flat.numel(), device=ids.device)
        last = places.new_zeros(self.A.shape[-1]).scatter_reduce(0, flat, places, "amax")
        columns = self._delta_weight(self.A[:, flat], self.B, self.C[:, flat], self.D)
        rows = F.embedding(last[ids], columns.T, scale_grad_by_freq=self.scale_grad_by_freq)
        return rows if self.padding_idx is None else rows.masked_fill((ids == self.padding_idx).unsqueeze(-1), 0)


class ConvFactors(DualLoraFactors):
    """Factors of a convolution; dW is out_channels x (in_channels / groups * kernel size)."""

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the output of the convolution `base` for input x, with dW in place of its weight and without bias."""
        dW = self.delta_weight().view(base.weight.shape).to(x.dtype)
        return base._conv_forward(F.dropout(x, self.dropout, self.training), dW, None)
