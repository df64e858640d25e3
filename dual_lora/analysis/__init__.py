"""What an adapter did to a weight: from matrices to plain numbers. Leaf modules: torch and the method's own map.

Two studies of what the method's form can do are commands of their own: `python -m dual_lora.analysis.fit` and
`python -m dual_lora.analysis.teacher`, which adapts small models through PEFT.
"""

from .entries import (
    DIRECTION_EDGES,
    MAGNITUDE_EDGES,
    agreement,
    cosine_similarity,
    dead_rows,
    flipped,
    histogram,
    relative_size,
    zeros,
)
from .spectrum import TOLERANCES, spectrum
from .update import dual, overall

__all__ = [
    "DIRECTION_EDGES",
    "MAGNITUDE_EDGES",
    "TOLERANCES",
    "agreement",
    "dead_rows",
    "dual",
    "flipped",
    "histogram",
    "cosine_similarity",
    "overall",
    "relative_size",
    "spectrum",
    "zeros",
]
