"""The map of the paper, ReLU(B A) ⊙ Sign(D C) in float32, as fields of `DualLoraConfig`; checks of settings read it
without torch. It is what the kernels compute, with any `ste`."""

PAPERS_MAP = {"magnitude": "relu", "direction": "sign", "direction_dtype": "float32"}
