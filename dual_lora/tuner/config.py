"""DualLoraConfig: what a user may choose about the method."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path

import torch
from peft.config import PeftConfig
from torch import nn

from ..functional import DIRECTION_DTYPES, DIRECTIONS, MAGNITUDES, RAMPS, STRAIGHT_THROUGH
from ..papers_map import PAPERS_MAP
from .card import describe_low_precision, describe_ramp, extend_card
from .precision import find_caller, find_stacklevel
from .register import NAME, add_peft_type

KERNELS = ("auto", "eager", "recompute", "triton")
GRADIENT_DTYPES = (None, "bfloat16")
GROUPS = {"magnitude": ("A", "B"), "direction": ("C", "D")}


@dataclass
class DualLoraConfig(PeftConfig):
    """Configuration of Dual LoRA (arXiv 2512.03402).

    The update of a weight W0 (out x in) is dW = f * lora_alpha / sqrt(r1 * r2) * ReLU(B A) ⊙ Sign(D C), with
    A: r1 x in, B: out x r1, C: r2 x in, D: out x r2. It has as many parameters as LoRA of rank r = r1 + r2.

    Args:
        r: the full budget r1 + r2, at least 2. Default 16, or r1 + r2 where both are given.
        magnitude_ratio: r1 / r, between 0 and 1; r1 = round(r * magnitude_ratio), at least 1 and at most r - 1.
            Default 0.5.
        r1, r2: the two ranks, instead of r and magnitude_ratio. If only one is given, the other is the rest of r.
        lora_alpha: numerator of the scale. Note that alpha / sqrt(r1 r2) is twice LoRA's alpha / r at r1 = r2 = r / 2.
        lora_dropout: probability of dropout on the adapter's input, as in LoRA; not applied to embeddings.
        init_weights: True starts at f = 0, so that the model computes what its base computes; False starts at f = 1.
        init_std: sigma of the Gaussian all four factors are drawn from. None chooses it for each layer so that dW at
            f = 1 has a root mean square of 0.02 / sqrt(fan_in), 2 % of a typical pretrained weight, whatever the width,
            ranks and alpha: sigma^2 = 0.02 * sqrt(2 * r2 / fan_in) / lora_alpha (`dual_lora.init_std`). fan_in is
            in_features, or in_channels / groups * kernel size, or embedding_dim. With `direction_init_std` and a
            direction other than the sign, dW has another size, as it depends on C and D.
        direction_init_std: sigma of C and D if it is to differ from that of A and B; None means the same. Sign(D C)
            does not depend on it, but training does: the gradients of C and D are proportional to it. A larger sigma
            keeps them well above Adam's epsilon, but Adam's steps, whose size is the learning rate, then take longer to
            flip a sign.
        scale_warmup_steps: optimizer steps over which f rises from 0 to 1; 0 starts at f = 1. A run should be
            several times as long: before the ramp ends, only a fraction of dW is saved or merged. Default 10, which
            suits runs of 20 steps and hardly affects runs of 200 (under 2 % of the loss, on tiny models).
        scale_warmup_shape: how f rises over these steps: "linear", "cosine" (slow at both ends), "quadratic" (late) or
            "root" (early).
        ste: gradient of Sign: "clip" (paper), "identity", "hardtanh" (see `dual_lora.sign_ste`).
        magnitude: "relu" (paper), "abs", "softplus" (with a sharpness of 1000), "leaky_relu" (slope 0.01),
            "squared_relu" or "identity" of B A.
        direction: "sign" (paper), "tanh", "sigmoid" or "identity" of D C. Both at identity is a Hadamard product, as in
            LoHa; identity with sigmoid is a gated linear unit.
        direction_dtype: "float32", "bfloat16" or "float16": what D and C are rounded to before their product. 16 bits
            flip signs; they are here to measure what that costs.
        freeze: "magnitude" keeps A and B as they were drawn, "direction" keeps C and D; None trains all four. For
            ablations: what a trained group adds to a random one. Frozen magnitudes keep dW at its initial size.
        kernel: how dW is computed; all give the same result. "eager" is plain autograd, "recompute" rebuilds dW in
            backward instead of storing it, "triton" does so with Triton kernels (plain torch if Triton is missing),
            "auto" is the best one measured, now "recompute". Variants of magnitude, direction and direction_dtype
            always use "eager".
        weight_gradient_dtype: "bfloat16" takes G = dL/ddW, the product that the gradients of all four factors are
            computed from, in bfloat16 with float32 sums, where a linear layer computes in float32. None takes it in
            the layer's own dtype. Faster, not in the paper, and training on a processor or GPU without bfloat16 units
            is refused. Forward and evaluation do not change. Needs the kernels, not "eager".
        input_gradient_dtype: the same for dL/dx, which the layers before this one learn from. With dropout or
            `fused_slices`, only the adapter's own share of it.
        keep_update: whether linear layers keep dW between the forwards of one optimizer step (gradient accumulation,
            activation checkpointing) instead of rebuilding it. The same to the bit and faster with few tokens a
            forward, but it takes the memory of one more float32 weight a layer, on a quantized base too. Layers that
            FSDP shards keep nothing. Not with ste="hardtanh", whose gradient needs D C itself.
        target_modules: names, suffixes or a regex of the modules to adapt; "all-linear"; None takes LoRA's default for
            the architecture.
        exclude_modules: names, suffixes or a regex of modules to leave out.
        fused_slices: for layers that hold several projections in one weight: {module name or regex: [n, [i, ...]]}
            splits the output in n equal blocks and adapts the blocks i, each with four factors of its own. LoRA's q
            and v of GPT-2: {"c_attn": [3, [0, 2]]}.
        rank_pattern: {module name or regex: budget r}, split by magnitude_ratio.
        alpha_pattern: {module name or regex: lora_alpha}.
        layers_to_transform, layers_pattern: restrict target_modules to these layer indexes, as in LoRA.
        bias: biases of the base model to train and save: "none", "all", or "dual_lora_only", those of adapted layers.
            With the adapter disabled such a model does not compute what its base did, as with LoRA.
        modules_to_save: further modules to train and save in full.
        trainable_token_indices: ids of tokens whose embeddings to train and save, as in LoRA; a list is of the input
            embedding, a dictionary of the modules it names. Such an embedding cannot be adapted as well.

    Raises:
        ValueError: on impossible or contradictory values.
    """

    r: int | None = field(default=None, metadata={"help": "Parameter budget r1 + r2 (default 16)."})
    magnitude_ratio: float | None = field(default=None, metadata={"help": "r1 / r (default 0.5)."})
    r1: int | None = field(default=None, metadata={"help": "Rank of the magnitude group."})
    r2: int | None = field(default=None, metadata={"help": "Rank of the direction group."})
    lora_alpha: float = field(default=16, metadata={"help": "Scale numerator: alpha / sqrt(r1 * r2)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    init_weights: bool = field(default=True, metadata={"help": "True: f starts at 0; False: at 1."})
    init_std: float | None = field(default=None, metadata={"help": "Sigma of the factors; None: by the rule."})
    direction_init_std: float | None = field(default=None, metadata={"help": "Sigma of C and D; None: as init_std."})
    scale_warmup_steps: int = field(default=10, metadata={"help": "Optimizer steps over which f goes from 0 to 1."})
    ste: str = field(default="clip", metadata={"help": "Gradient of Sign: clip, identity or hardtanh."})
    magnitude: str = field(default="relu", metadata={"help": "One of " + ", ".join(MAGNITUDES)})
    direction: str = field(default="sign", metadata={"help": "One of " + ", ".join(DIRECTIONS)})
    direction_dtype: str = field(default="float32", metadata={"help": "What D C is computed in."})
    scale_warmup_shape: str = field(default="linear", metadata={"help": "One of " + ", ".join(RAMPS)})
    freeze: str | None = field(default=None, metadata={"help": "Group that does not train: magnitude or direction."})
    kernel: str = field(default="auto", metadata={"help": "auto, eager, recompute or triton."})
    weight_gradient_dtype: str | None = field(
        default=None, metadata={"help": "bfloat16: dtype of dL/ddW; None: the layer's own."}
    )
    input_gradient_dtype: str | None = field(
        default=None, metadata={"help": "bfloat16: dtype of dL/dx; None: the layer's own."}
    )
    keep_update: bool = field(default=False, metadata={"help": "Keep dW between the forwards of an optimizer step."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules not to adapt."})
    fused_slices: dict[str, list] = field(default_factory=dict, metadata={"help": "Blocks of fused layers to adapt."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Budgets of single modules."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Alphas of single modules."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indexes to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or dual_lora_only."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings to train."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type(NAME)
        self._warned: set[str] = set()  # no field, so it is not saved
        self.check()

    def check(self) -> None:
        """Refuse impossible or contradictory values, and derive what is not given. Again when an adapter is made or
        saved, since fields may have been set in the meantime.

        Raises:
            ValueError: with the field.
        """
        for f in fields(self):  # JSON has no numbers of numpy
            setattr(self, f.name, _make_plain(getattr(self, f.name)))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check_types()
        self.fused_slices, self.rank_pattern, self.alpha_pattern = (
            dict(p or {}) for p in (self.fused_slices, self.rank_pattern, self.alpha_pattern)
        )
        self._resolve_ranks()
        self._check_values()
        self._check_targets()

    @property
    def is_papers_map(self) -> bool:
        """Whether dW is the paper's map, which the kernels compute; plain autograd computes the others."""
        return all(getattr(self, name) == value for name, value in PAPERS_MAP.items())

    def split(self, r: int) -> tuple[int, int]:
        """Return (r1, r2), the split of a budget r >= 2 by `magnitude_ratio`."""
        r1 = min(max(round(r * self.magnitude_ratio), 1), r - 1)
        return r1, r - r1

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As in PEFT. Also extends the model card, and warns once if the ramp of f has not ended, and once if the
        factors of the model that is saved are in 16 bits.

        Raises:
            ValueError: fields have been set to impossible or contradictory values.
        """
        self.check()
        super().save_pretrained(save_directory, **kwargs)
        folder, model = Path(save_directory), find_caller(nn.Module)  # the model that is saved, if any
        factors = [] if model is None else [m for m in model.modules() if getattr(m, "config", None) is self]
        extend_card(folder)
        for name, found in {"ramp": describe_ramp(folder, factors), "dtype": describe_low_precision(factors)}.items():
            if found is not None and name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"Dual LoRA adapter in {save_directory} is saved {found}", stacklevel=find_stacklevel())

    def _check_types(self) -> None:
        """Refuse values of another type where they would be computed with, or tested for truth."""
        for name in ("r", "r1", "r2"):
            rank = getattr(self, name)
            _require(rank is None or _is_integer(rank), name, rank, "None or an integer")
        ratio = self.magnitude_ratio
        _require(ratio is None or _is_number(ratio), "magnitude_ratio", ratio, "None or a number between 0 and 1")
        for name in ("init_weights", "keep_update"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name in ("fused_slices", "rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            _require(pattern is None or isinstance(pattern, Mapping), name, pattern, "a dictionary of modules")
        tokens = self.trainable_token_indices
        known = tokens is None or isinstance(tokens, list | Mapping)
        _require(known, "trainable_token_indices", tokens, "None, a list of ids or a dictionary of such lists")

    def _resolve_ranks(self) -> None:
        if self.r is None:
            given = self.r1 is not None and self.r2 is not None
            self.r = self.r1 + self.r2 if given else 16
        r1 = self.r1 if self.r1 is not None or self.r2 is None else self.r - self.r2
        if r1 is not None and (r1 < 1 or r1 >= self.r or self.r2 not in (None, self.r - r1)):
            raise ValueError(f"r1={self.r1}, r2={self.r2}: need r1 >= 1, r2 >= 1 and r1 + r2 = r, which is {self.r}")
        if self.magnitude_ratio is None:
            self.magnitude_ratio = 0.5 if r1 is None else r1 / self.r
        _require(
            0 < self.magnitude_ratio < 1, "magnitude_ratio", self.magnitude_ratio, "between 0 and 1, both excluded"
        )
        for name, r in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            _require(isinstance(r, int) and r >= 2, name, r, "an integer of at least 2, a rank for either group")
        if r1 is not None and self.split(self.r)[0] != r1:
            raise ValueError(f"magnitude_ratio={self.magnitude_ratio} of r={self.r} contradicts r1={r1}")

    def _check_values(self) -> None:
        for name, kinds in (
            ("ste", STRAIGHT_THROUGH),
            ("magnitude", MAGNITUDES),
            ("direction", DIRECTIONS),
            ("direction_dtype", DIRECTION_DTYPES),
            ("scale_warmup_shape", RAMPS),
            ("kernel", KERNELS),
            ("freeze", (None, *GROUPS)),
            ("bias", ("none", "all", "dual_lora_only")),
        ):
            known = list(kinds)  # a list: `in` a dict would raise for a value that cannot be hashed
            _require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(map(str, known))}")
        self._check_kernel_options()
        steps = self.scale_warmup_steps
        _require(_is_integer(steps) and steps >= 0, "scale_warmup_steps", steps, "an integer of at least 0")
        for name in ("init_std", "direction_init_std"):
            std = getattr(self, name)
            _require(std is None or _is_positive(std), name, std, "None or a finite number above 0")
        dropout = self.lora_dropout
        _require(isinstance(dropout, Real) and 0 <= dropout < 1, "lora_dropout", dropout, "at least 0 and below 1")
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            _require(_is_positive(alpha), name, alpha, "a finite number above 0")

    def _check_kernel_options(self) -> None:
        plain = self.kernel == "eager" or not self.is_papers_map
        variants = "kernel='eager' or another magnitude, direction or direction_dtype, which plain autograd computes"
        for name in ("weight_gradient_dtype", "input_gradient_dtype"):
            value = getattr(self, name)
            _require(value in GRADIENT_DTYPES, name, value, "None or 'bfloat16'")
            _require(value is None or not plain, name, value, f"None with {variants}")
        _require(not (self.keep_update and plain), "keep_update", self.keep_update, f"False with {variants}")
        needs_product = self.keep_update and self.ste == "hardtanh"
        _require(not needs_product, "keep_update", True, "False with ste='hardtanh', whose gradient needs D C itself")

    def _check_targets(self) -> None:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        for key, value in self.fused_slices.items():
            try:
                n, blocks = value
                integers = all(map(_is_integer, (n, *blocks)))
                good = integers and n >= 2 and 0 < len(set(blocks)) == len(blocks) and set(blocks) <= set(range(n))
            except (TypeError, ValueError):
                good = False
            _require(good, f"fused_slices[{key!r}]", value, "[n, [i, ...]]: n >= 2 blocks and distinct indexes below n")


def _make_plain(value):
    """Return a number, or a list or dictionary of numbers, in Python's own types; anything else as it is."""
    if isinstance(value, Mapping):
        return {key: _make_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_make_plain(item) for item in value]
    if isinstance(value, bool | int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_positive(value) -> bool:
    """Return whether the value is a number that stays finite and above 0 in float32, in which dW is scaled."""
    return _is_number(value) and torch.finfo(torch.float32).tiny <= value <= torch.finfo(torch.float32).max


def _require(condition: bool, name: str, value, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")
