"""Weight updates of known structure: what a method is asked to fit, or a student to recover.

Every update is out x in with a root mean square of 1. G is a Gaussian matrix, new at each mention:

    gaussian      G, out x in
    rank_k        G G, out x k times k x in
    power_a       U diag(i^-a) V^T, U and V random orthogonal: singular values that fall like i^-a
    signs         Sign(G), out x in: dense signs without structure, all entries of one size
    relu_signs    ReLU(G) ⊙ Sign(G), out x in: the form of Dual LoRA, but dense
    sign_rank_k   Sign(G G), of rank k before the sign: structured signs, all entries of one size
    dual_k        ReLU(G G) ⊙ Sign(G G), both products of rank k: an update of Dual LoRA itself (arXiv 2512.03402)
"""

import torch
from torch import Generator, Tensor

from ..functional import delta_weight, sign_ste


def draw_update(kind: str, out: int, fan_in: int, generator: Generator) -> Tensor:
    """Draw an update of a kind of the table above, out x fan_in, float32, with a root mean square of 1.

    kind: its name, with a number in place of k or a ("rank_16", "power_0.5").

    Raises:
        ValueError: another name.
    """
    name, _, number = kind.rpartition("_")
    if kind in PLAIN:
        update = PLAIN[kind](out, fan_in, generator)
    elif name in NUMBERED and _is_positive(number):
        update = NUMBERED[name](float(number), out, fan_in, generator)
    else:
        expected = [*PLAIN, *(f"{n}_NUMBER" for n in NUMBERED)]
        raise ValueError(f"target {kind!r}: expected one of {', '.join(expected)}")
    return normalize_update(update)


def normalize_update(update: Tensor) -> Tensor:
    """Scale an update to a root mean square of 1.

    Raises:
        ValueError: it is 0 or not finite.
    """
    size = update.double().square().mean().sqrt()
    if not 0 < size < torch.inf:
        raise ValueError("an update to fit must be finite and not 0 throughout")
    return (update / size).float()


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def _gaussian(out: int, fan_in: int, generator: Generator) -> Tensor:
    return torch.randn(out, fan_in, generator=generator)


def _low_rank(k: float, out: int, fan_in: int, generator: Generator) -> Tensor:
    return _gaussian(out, int(k), generator) @ _gaussian(int(k), fan_in, generator)


def _power_law(a: float, out: int, fan_in: int, generator: Generator) -> Tensor:
    n = min(out, fan_in)
    U, V = (torch.linalg.qr(_gaussian(size, n, generator)).Q for size in (out, fan_in))
    return U * torch.arange(1, n + 1) ** -a @ V.T


def _dual(k: float, out: int, fan_in: int, generator: Generator) -> Tensor:
    r = int(k)
    A, B, C, D = (_gaussian(*shape, generator) for shape in ((r, fan_in), (out, r), (r, fan_in), (out, r)))
    return delta_weight(A, B, C, D, scale=1.0)


PLAIN = {
    "gaussian": _gaussian,
    "signs": lambda *shape: sign_ste(_gaussian(*shape)),
    "relu_signs": lambda *shape: torch.relu(_gaussian(*shape)) * sign_ste(_gaussian(*shape)),
}
NUMBERED = {
    "rank": _low_rank,
    "power": _power_law,
    "sign_rank": lambda k, *shape: sign_ste(_low_rank(k, *shape)),
    "dual": _dual,
}
