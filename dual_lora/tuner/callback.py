"""DualLoraWarmupCallback: the ramp where the optimizer does not hold the factors themselves."""

from transformers import TrainerCallback

from .warmup import factors_of, first_trained


class DualLoraWarmupCallback(TrainerCallback):
    """Advances f once per optimizer step of a Hugging Face Trainer, unless the optimizer hook has done so.

    Only needed where the optimizer holds copies or flat partitions of the parameters (DeepSpeed); harmless elsewhere.
    """

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._before = [(f, int(f.step)) for f in factors_of(model) if first_trained(f) is not None]

    def on_step_end(self, args, state, control, **kwargs):
        for factors, step in self._before:
            if int(factors.step) == step:
                factors.advance()
