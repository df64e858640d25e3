"""DualLoraModel: puts Dual LoRA layers into a model."""

from collections import Counter

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from .config import DualLoraConfig
from .layer import DualLoraLayer, layer_class

try:
    from peft.utils import get_quantization_kwargs, resolve_quantization_backend
except ImportError:  # peft < 0.20 has no quantisation backends

    def get_quantization_kwargs(model):
        return {}

    def resolve_quantization_backend(base_layer, **kwargs):
        return None


class DualLoraModel(BaseTuner):
    """A model with Dual LoRA layers (arXiv 2512.03402); made by `peft.get_peft_model(model, DualLoraConfig(...))`."""

    prefix = "dual_lora_"
    tuner_layer_cls = DualLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def _prepare_model(self, peft_config: DualLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        self._tied = {parameter for parameter, count in holders.items() if count > 1}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """True: factors in float32, whatever the base is in. False, at the user's risk: in the dtype of the base."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, DualLoraLayer):
                    module.cast_to_base_dtype(adapter_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """As in PEFT. Raises ValueError when fused_slices names a layer that is not adapted."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for pattern in self.peft_config[adapter_name].fused_slices:
            if all(get_pattern_key([pattern], name) == name != pattern for name in self.targeted_module_names):
                raise ValueError(f"fused_slices: no adapted module is called {pattern!r}")

    def _create_and_replace(
        self,
        config: DualLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs,
    ) -> None:
        def of_this_module(pattern: dict, default):
            return pattern.get(get_pattern_key(pattern.keys(), current_key), default)

        layer = target if isinstance(target, DualLoraLayer) else self._create_layer(target)
        layer.update_layer(
            adapter_name,
            config,
            r=of_this_module(config.rank_pattern, config.r),
            alpha=of_this_module(config.alpha_pattern, config.lora_alpha),
            fused=of_this_module(config.fused_slices, None),
        )
        if layer is not target:
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As in PEFT, which on unloading looks for a weight even in a trained head of several layers."""
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _create_layer(self, target: nn.Module) -> DualLoraLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(self.model))
        cls = layer_class(base, backend)
        if cls is None:
            raise TypeError(
                f"Target module {target} is not supported: Dual LoRA adapts Linear (plain or quantised), "
                "transformers' Conv1D, Embedding and Conv1d/2d/3d."
            )
        return cls(target, quantization_backend=backend, tied=id(getattr(base, "weight", None)) in self._tied)
