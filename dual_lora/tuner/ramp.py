"""What is said of a ramp of f that has not ended, whether the adapter is saved, loaded or merged."""

from collections.abc import Iterable

from torch import Tensor


def describe_unfinished_ramp(states: Iterable[tuple[Tensor | int, Tensor | float, int]]) -> str | None:
    """Return the end of a sentence about the least advanced unfinished ramp; None if all ramps have ended.

    states: (optimizer steps done, f, steps of the ramp) for each layer. An f set by hand ends the ramp.
    """
    open_ramps = [(float(f), int(step), steps) for step, f, steps in states if int(step) < steps and float(f) < 1]
    if not open_ramps:
        return None
    f, step, steps = min(open_ramps)
    return (
        f"at f = {f:.3g}, {step} of {steps} steps into its ramp, so it computes only that fraction of dW. Train "
        "longer, set scale_warmup_steps well below the number of optimizer steps, or end the ramp with "
        "dual_lora.set_update_scale(model, 1.0), after unmerge_adapter() if it is merged."
    )
