"""The Dual LoRA map: four low-rank factors to one weight update.

    W' = W0 + dW,    dW = scale * ReLU(B A) ⊙ Sign(D C),    scale = f * alpha / sqrt(r1 * r2)

Source: "Dual LoRA: Enhancing LoRA with Magnitude and Direction Updates", arXiv 2512.03402, method section.

    A  r1 x in     B  out x r1     magnitude group
    C  r2 x in     D  out x r2     direction group
    f  factor that ramps from 0 to 1 over the first optimizer steps

Sign(x) is +1 for x > 0, else -1, so Sign(0) = -1; NaN stays NaN. Its gradient is straight-through,
dL/dx = clip(dL/dSign, -1, 1).

Where we depart from the paper: every value but the first of the tables MAGNITUDES, DIRECTIONS, DIRECTION_DTYPES,
STRAIGHT_THROUGH and RAMPS below; the rule for the initial sigma (`init_std`), which the paper does not give; and
factors with leading dimensions, where each index is a separate update.

f is called `update_scale` in the code; its ramp lasts `scale_warmup_steps` optimizer steps, which the harness sets as a
share of all steps (`method.ramp_share`). It is not the learning rate's warm-up.
"""

import contextlib
import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# softplus(x) = log(1 + exp(beta * x)) / beta. Entries of B A are near 1e-3 at initialization; beta = 1 would map them
# all to about ln 2, a hundred times the size of a pretrained weight.
SOFTPLUS_BETA = 1000.0
LEAKY_SLOPE = 0.01  # of "leaky_relu" below 0, torch's default
# Root mean square of a fresh dW at f = 1, in units of 1 / sqrt(fan_in), the usual size of a pretrained weight.
INIT_RELATIVE_SIZE = 0.02

MAGNITUDES = {
    "relu": torch.relu,
    "abs": torch.abs,
    "softplus": lambda x: F.softplus(x, beta=SOFTPLUS_BETA),
    "leaky_relu": lambda x: F.leaky_relu(x, LEAKY_SLOPE),
    "squared_relu": lambda x: torch.relu(x).square(),
    "identity": lambda x: x,
}
# "sign" is `sign_ste`, which needs `ste`. "sigmoid" with the magnitude "identity" is a gated linear unit (GLU).
DIRECTIONS = {"sign": None, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda x: x}
MAP_NAMES = {"relu": "ReLU", "sign": "Sign", "identity": ""}  # as formulas show them; the others by their own names
# What D and C may be rounded to before their product.
DIRECTION_DTYPES = ("float32", "bfloat16", "float16")
# The straight-through gradients of "sign", see `sign_ste`.
STRAIGHT_THROUGH = ("clip", "identity", "hardtanh")
# The shapes of the ramp. Each maps the share of its steps that are done, 0 to 1, to f.
RAMPS = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - torch.cos(math.pi * share)) / 2,
    "quadratic": torch.square,
    "root": torch.sqrt,
}


class ClipCounter:
    """While `enabled`, counts the entries of dL/dSign and those that `ste="clip"` clips. It counts on the device,
    without synchronizing. The Triton kernels do not count."""

    def __init__(self) -> None:
        self.enabled = False
        self.clipped: Tensor | int = 0
        self.entries = 0

    def count(self, grad: Tensor) -> None:
        """Count the entries of dL/dSign, of any shape, if `enabled`."""
        if self.enabled:
            self.clipped = self.clipped + (grad.abs() > 1).sum()
            self.entries += grad.numel()

    def pop_share(self) -> float | None:
        """Return the fraction of entries clipped since the last call and reset the counts; None if there were none."""
        share = float(self.clipped) / self.entries if self.entries else None
        self.clipped = self.entries = 0
        return share


CLIPPED = ClipCounter()


def take_sign_(x: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """Take factor * Sign(x) in place; x: any shape, factor: broadcast to it. NaN stays NaN, so that it shows in dW.

    On a CPU these passes take a tenth of the time of `torch.where` with scalars.
    """
    return x.ceil_().sub_(0.5).clamp_(-0.5, 0.5).mul_(2 * factor)


class _Sign(torch.autograd.Function):
    generate_vmap_rule = True  # every step is plain torch, so that torch.func can batch it

    @staticmethod
    def forward(x: Tensor, ste: str) -> Tensor:
        return take_sign_(x.clone())

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.ste = inputs
        if ctx.ste == "hardtanh":
            ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.ste == "clip":
            CLIPPED.count(grad)
            grad = grad.clamp(-1, 1)
        elif ctx.ste == "hardtanh":
            (x,) = ctx.saved_tensors
            grad = grad * (x.abs() <= 1)
        return grad, None


class _SignWithTangent(_Sign):
    """`_Sign` in forward mode too, which torch.compile cannot trace."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Sign.setup_context(ctx, inputs, output)
        if ctx.ste == "hardtanh":
            ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        # "clip" clips the gradient that arrives from the loss. Forward mode has none, so the tangent passes unchanged.
        if ctx.ste == "hardtanh":
            (x,) = ctx.saved_tensors
            return tangent * (x.abs() <= 1)
        return tangent.clone()


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Refuse an unknown value of the argument `name`.

    Raises:
        ValueError: with the known ones.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")


def check_ste(ste: str) -> None:
    """Refuse an unknown straight-through gradient.

    Raises:
        ValueError: with the known ones.
    """
    check_choice("ste", ste, STRAIGHT_THROUGH)


def sign_ste(x: Tensor, ste: str = "clip") -> Tensor:
    """Sign of x with a straight-through gradient; Sign(0) = -1.

    x: any shape. ste, with g = dL/dSign: "clip" gives dL/dx = clip(g, -1, 1) (the paper), "identity" gives g (as
    DoReFa-Net, arXiv 1606.06160), "hardtanh" gives g where |x| <= 1, else 0 (as XNOR-Net, arXiv 1603.05279).
    In forward mode (`torch.func.jvp`) the tangent t of x becomes t, with "hardtanh" t where |x| <= 1, else 0. Reverse
    mode therefore agrees with forward mode except where "clip" clips.

    Raises:
        ValueError: another ste.
    """
    check_ste(ste)
    if is_traced_without_gradient():
        return _Sign.forward(x, ste)
    return (_Sign if torch.compiler.is_dynamo_compiling() else _SignWithTangent).apply(x, ste)


def is_traced_without_gradient() -> bool:
    """Return whether torch.jit.trace records what runs now, without gradients. It cannot serialize Python functions,
    such as custom gradients."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing() and not torch.is_grad_enabled()


def is_transformed() -> bool:
    """Return whether a transform of torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_autocast_on(device_type: str) -> bool:
    """Return whether autocast is on for a device type; the meta device has none."""
    # torch 2.7 cannot compile `torch.amp.is_autocast_available`
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def suspend_autocast(device_type: str):
    """A context in which autocast is off for a device type; the meta device has none."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def check_factors(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> None:
    """Refuse factors whose products B A and D C have different shapes: torch would broadcast them.

    Raises:
        ValueError: with the shapes.
    """
    if (*A.shape[:-2], B.shape[-2], A.shape[-1]) != (*C.shape[:-2], D.shape[-2], C.shape[-1]):
        named = {"A": A, "B": B, "C": C, "D": D}
        shapes = ", ".join(f"{name}: {' x '.join(map(str, t.shape))}" for name, t in named.items())
        raise ValueError(f"{shapes}: expected A: r1 x in, B: out x r1, C: r2 x in, D: out x r2")


def delta_weight(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    scale: Tensor | float,
    magnitude: str = "relu",
    direction: str = "sign",
    ste: str = "clip",
    direction_dtype: str = "float32",
) -> Tensor:
    """Return dW = scale * magnitude(B A) ⊙ direction(D C), (leading dimensions x) out x in.

    A: r1 x in, B: out x r1, C: r2 x in, D: out x r2, each with the same leading dimensions, if any. The products are
    taken in float32 (float64 factors stay float64) with autocast off, because rounding B A or D C to 16 bits flips
    signs; `direction_dtype` rounds C and D, to measure what that costs. Plain autograd, so it works under `torch.func`
    (vmap, grad, jvp, jacfwd, jacrev, hessian), except forward mode over forward mode: PyTorch treats the inner tangent
    of a custom function as a constant.

    Raises:
        ValueError: unknown magnitude, direction, ste or direction_dtype, or B A and D C have different shapes.
    """
    check_factors(A, B, C, D)
    check_choice("magnitude", magnitude, MAGNITUDES)
    check_choice("direction", direction, DIRECTIONS)
    check_ste(ste)
    check_choice("direction_dtype", direction_dtype, DIRECTION_DTYPES)
    with suspend_autocast(A.device.type):
        A, B, C, D = (t if t.dtype == torch.float64 else t.float() for t in (A, B, C, D))
        magnitude_BA = MAGNITUDES[magnitude](B @ A)
        DC = multiply_direction(D, C, direction_dtype)
        sign = sign_ste(DC, ste) if direction == "sign" else DIRECTIONS[direction](DC)
        return scale * magnitude_BA * sign


def multiply_direction(D: Tensor, C: Tensor, direction_dtype: str = "float32") -> Tensor:
    """Return D C, out x in, in the dtype of D. In 16 bits both factors are rounded to `direction_dtype` and multiplied
    in it, and so are their gradients. D: out x r2, C: r2 x in."""
    if direction_dtype == "float32":
        return D @ C
    rounded = getattr(torch, direction_dtype)
    return (D.to(rounded) @ C.to(rounded)).to(D.dtype)


def init_std(fan_in: int, r1: int, r2: int, alpha: float, magnitude: str = "relu", direction: str = "sign") -> float:
    """Return the sigma at which a fresh dW at f = 1 has root mean square INIT_RELATIVE_SIZE / sqrt(fan_in).

    With all four factors from N(0, sigma^2), an entry of B A has variance r1 sigma^4, ReLU keeps half of its mean
    square and the sign has mean square 1, so dW has root mean square alpha / sqrt(r1 r2) * sqrt(r1 / 2) * sigma^2.
    A direction other than the sign contributes sqrt(r2) * sigma^2 more, but the sigmoid of such small products is 1/2.
    Softplus and leaky ReLU count as ReLU; its square has root mean square sqrt(1.5 r1^2 + 3 r1) * sigma^4.

    Raises:
        ValueError: fan_in, a rank or alpha is not above 0 and finite, or magnitude or direction is unknown.
    """
    for name, value in {"fan_in": fan_in, "r1": r1, "r2": r2, "alpha": alpha}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: expected a finite number above 0")
    check_choice("magnitude", magnitude, MAGNITUDES)
    check_choice("direction", direction, DIRECTIONS)
    kept = 1.0 if magnitude in ("abs", "identity") else 0.5
    target = INIT_RELATIVE_SIZE / math.sqrt(fan_in)
    if direction == "sigmoid":
        target, direction = 2 * target, "sign"
    if magnitude == "squared_relu":
        size = alpha / math.sqrt(r1 * r2) * math.sqrt(1.5 * r1**2 + 3 * r1)
        return (target / size) ** 0.25 if direction == "sign" else (target / (size * math.sqrt(r2))) ** (1 / 6)
    if direction == "sign":
        return math.sqrt(target / (alpha * math.sqrt(kept / r2)))
    return (target / (alpha * math.sqrt(kept))) ** 0.25
