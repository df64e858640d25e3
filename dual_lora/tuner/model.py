"""DualLoraModel: puts Dual LoRA layers into a model."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from os.path import commonprefix
from types import SimpleNamespace

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import EMBEDDING_LAYER_NAMES, AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from .bypass import find_use, mentions_in_forward, watch_uses
from .config import DualLoraConfig
from .factors import TENSORS, DualLoraFactors
from .layer import DualLoraLayer, Embedding, find_layer_class
from .precision import find_stacklevel, warn_of_rounded_products
from .ramp import describe_unfinished_ramp
from .register import NAME

try:
    from peft.utils import get_quantization_kwargs, resolve_quantization_backend
except ImportError:  # peft < 0.20 has no quantization backends

    def get_quantization_kwargs(model):
        return {}

    def resolve_quantization_backend(base_layer, **kwargs):
        return None


EMBEDDINGS = (nn.Embedding, Embedding)
# Rows of a mixed batch that no adapter acts on.
BASE_ADAPTER_NAME = "__base__"


class DualLoraModel(BaseTuner):
    """A model with Dual LoRA layers (arXiv 2512.03402); made by `peft.get_peft_model(model, DualLoraConfig(...))`.

    Raises, on creation and when an adapter is added:
        TypeError: a target is of a kind of layer that Dual LoRA does not adapt.
        ValueError: a target is one that PEFT refuses for LoRA, or the config does not fit a layer.
    """

    prefix = "dual_lora_"
    tuner_layer_cls = DualLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def _prepare_model(self, peft_config: DualLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        self._tied = _find_shared_weights(model.modules())
        self._tied_embeddings = _find_shared_weights(m for m in model.modules() if isinstance(m, EMBEDDINGS))
        self._partly_called: list[str] = []
        self._reused = _find_reused_modules(model)
        for module in model.modules():  # bitsandbytes' 4-bit layers: see `layer.is_packed`
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        self._unwatched = {True, False}  # modes (training or not) in which no forward has been watched yet

    def _check_target_module_compatiblity(self, peft_config: DualLoraConfig, model: nn.Module, target_name: str):
        """Refuse what PEFT refuses for LoRA; its list depends on the method's type. (The misspelt name is PEFT's.)"""
        try:
            super()._check_target_module_compatiblity(SimpleNamespace(peft_type="LORA"), model, target_name)
        except ValueError as error:
            raise ValueError(str(error).replace("[PEFT:LORA]", f"[PEFT:{NAME}]")) from None

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast the factors: to float32 (True), or, at the user's risk, to the dtype of the base (False).

        PEFT calls this last when it loads an adapter, so this is also where an unfinished ramp is warned about.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self._list_layers():
                layer.cast_to_base_dtype(adapter_name)
            self._warn_of_rounding(adapter_name)
        if self.peft_config[adapter_name].inference_mode:
            self._warn_of_ramp([adapter_name], "loaded", loaded=True)

    def _warn_of_rounding(self, adapter_name: str) -> None:
        """Warn, once per load, that the values of an adapter were rounded to the dtype of the base."""
        layers = [layer.dual_lora_factors for layer in self._list_layers() if adapter_name in layer.dual_lora_factors]
        rounded = [factors[adapter_name] for factors in layers if factors[adapter_name].rounded]
        for factors in rounded:
            factors.rounded = False
        if rounded:
            warnings.warn(
                f"Dual LoRA: autocast_adapter_dtype=False rounds the factors of adapter {adapter_name!r} to "
                f"{rounded[0].A.dtype}, which flips signs of D C: it computes another function than was trained. Leave "
                "the option out.",
                stacklevel=find_stacklevel(),
            )

    def _list_layers(self) -> list[DualLoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, DualLoraLayer)]

    def _iterate_factors(self) -> Iterator[DualLoraFactors]:
        for layer in self._list_layers():
            yield from layer.dual_lora_factors.values()

    def train(self, mode: bool = True):
        """As in torch; warns, once, where torch is set to take float32 products in fewer bits."""
        warn_of_rounded_products(self._iterate_factors())
        return super().train(mode)

    def _warn_of_ramp(self, adapters: list[str], occasion: str, loaded: bool | None = None) -> None:
        """Warn, once per occasion ("loaded", "merged"), that an adapter is not at full scale yet."""
        warned = self.__dict__.setdefault("_warned", set())
        for name in [name for name in adapters if (name, occasion) not in warned]:
            held = [layer.dual_lora_factors for layer in self._list_layers()]
            factors = [f[name] for f in held if name in f]
            selected = [f for f in factors if loaded in (None, f.loaded) and not f.step.is_meta]
            ramp = describe_unfinished_ramp((f.step, f.update_scale, f.warmup_steps) for f in selected)
            if ramp is not None:
                warned.add((name, occasion))
                warnings.warn(f"Dual LoRA adapter {name!r} is {occasion} {ramp}", stacklevel=find_stacklevel())

    @classmethod
    def _get_adapter_state_dict(cls, model, *args, **kwargs):
        """As in PEFT, which also saves the base weight of an adapted embedding: warns if adapters are merged there."""
        layers = {name: m for name, m in model.named_modules() if isinstance(m, DualLoraLayer) and m.merged}
        embeddings = [name for name in layers if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
        if embeddings:
            warnings.warn(
                f"Dual LoRA: {_list_names(embeddings)} merged while saving. Loaded with this base weight, the adapter "
                "counts twice: call unmerge_adapter() before saving, or save with save_embedding_layers=False.",
                stacklevel=find_stacklevel(),
            )
        return super()._get_adapter_state_dict(model, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Load a module that is registered under several names from the one name it was saved under. PEFT 0.21 saves it
        under the first, and its warning of missing keys would name the others."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if cls.prefix in name}
        saved = {id(own[name]): tensor for name, tensor in found.items() if name in own}
        return found | {name: saved[id(tensor)] for name, tensor in own.items() if id(tensor) in saved}

    def _check_merge_allowed(self) -> None:
        """Check every layer before the first is merged, and warn about layers that will not be merged.

        Raises:
            ValueError: a layer's weight is computed from other tensors, so that merging into it would have no effect,
                or cannot be written.
        """
        super()._check_merge_allowed()
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, DualLoraLayer)}
        for name, layer in layers.items():
            try:
                layer.check_merge_allowed()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        bypassed = [name for name, layer in layers.items() if layer.bypassed]
        if bypassed:
            warnings.warn(
                f"Dual LoRA: {_list_names(bypassed)} not merged, since no forward has used the factors. If another "
                "module calls the layer, run one forward before merging.",
                stacklevel=find_stacklevel(),
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; warns, once, of an adapter that is not at full scale yet, and of products in fewer bits than
        float32's.

        Raises:
            ValueError: NaN or infinite values with safe_merge, or a weight that `check_merge_allowed` refuses.
        """
        self._warn_of_ramp(adapter_names or self.active_adapters, "merged")
        warn_of_rounded_products(self._iterate_factors())
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As in PEFT; warns and raises as `merge_adapter`.

        Raises:
            ValueError: also where the merge would untie the embeddings and thereby scale the logits.
        """
        self._check_untying_allowed(adapter_names or self.active_adapters)
        self._warn_of_ramp(adapter_names or self.active_adapters, "merged")
        warn_of_rounded_products(self._iterate_factors())
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check_untying_allowed(self, adapters: list[str]) -> None:
        """Refuse to untie the embeddings of a model that needs them tied: PEFT then sets `config.tie_word_embeddings`
        to False, by which the model also scales its logits (UMT5, Switch Transformers, UDOP) or ties other parameters.

        Raises:
            ValueError: the merge would untie them.
        """
        if not self.get_model_config(self.model).get("tie_word_embeddings"):
            return
        ends = [getattr(self.model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, DualLoraLayer)}
        untied = {name for name, layer in layers.items() if layer.is_untied_by_merge(adapters)}
        for name in sorted(name for name in untied if layers[name] in ends):
            if reason := self._explain_need_of_ties(untied):
                raise ValueError(
                    f"{name}: merge_and_unload would untie the embeddings, but {reason}; call merge_adapter() instead, "
                    "or leave this layer out with exclude_modules"
                )

    def _explain_need_of_ties(self, untied: set[str]) -> str | None:
        """Return what would be wrong if these layers got weights of their own, None where nothing would be."""
        for cls in {type(module) for module in self.model.modules()}:
            if mentions_in_forward(cls, "config.tie_word_embeddings"):
                return f"{cls.__name__} scales its logits only while they are tied"
        config, lost = self.model.config, _list_tied_parameters(self.model, untied)
        # Configs of the T5 family are tied again when they are loaded.
        if not lost or type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False}).tie_word_embeddings:
            return None
        return f"the same setting ties {' and '.join(lost)}, of which a saved model would keep only one"

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """Refuse: the sum of two updates has no four factors of such ranks.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "add_weighted_adapter: Dual LoRA's dW is no linear function of its factors; activate or merge several "
            "adapters instead: base_model.set_adapter([...]), merge_adapter([...])"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """While a forward or generate with `adapter_names` runs, pass every layer the adapter name of each row. PEFT
        enters this for every forward, so the first ones are watched here.

        Raises:
            ValueError: the model is in training mode, no adapter has such a name, or `alora_offsets` is given.
            TypeError: adapter_names is not a list of str.
        """
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets: Dual LoRA has no activated form as LoRA has; leave it out")
        names = kwargs.get("adapter_names")
        handles = [] if names is None else self._hand_out_names(names, kwargs.get("num_beams"))
        try:
            with self._watch_first_forward():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hand_out_names(self, names: list[str], beams: int | None) -> list:
        """Register the hooks and return their handles. In beam search, generate repeats each row `beams` times, except
        in the encoder of an encoder-decoder model."""
        self._check_names(names)
        repeated = [name for name in names for _ in range(beams)] if isinstance(beams, int) and beams > 1 else names
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") and repeated is not names else None
        in_encoder = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        return [
            module.register_forward_pre_hook(
                partial(_set_adapter_names, adapter_names=names if module in in_encoder else repeated), with_kwargs=True
            )
            for module in self.model.modules()
            if isinstance(module, (DualLoraLayer, AuxiliaryTrainingWrapper))
        ]

    def _check_names(self, names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names={names!r}: expected a list of str, one for each row of the batch")
        known = {name for layer in self._list_layers() for name in layer.dual_lora_factors}
        unknown = sorted(set(names) - known - {BASE_ADAPTER_NAME})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    @contextmanager
    def _watch_first_forward(self):
        """Watch the first forward in training and the first in evaluation for layers whose weight others use."""
        if self.training not in self._unwatched or torch.compiler.is_compiling():
            yield
            return
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, DualLoraLayer)}
        before = {name for name, layer in layers.items() if layer.bypassed}
        with watch_uses(layers.values()) as both:
            yield
        self._unwatched.discard(self.training)
        found = [name for name in layers if layers[name] in both and name not in self._partly_called]
        self._partly_called += found
        self._warn_of_reads(found)
        self._silence([name for name, layer in layers.items() if layer.bypassed and name not in before], layers)

    def _silence(self, names: list[str], layers: dict[str, DualLoraLayer]) -> None:
        """Warn of layers found to be bypassed. In training their f becomes 0, also in the saved adapter: whoever loads
        it could not know that the factors were never used. A later training forward that calls one undoes this."""
        if not names:
            return
        if self.training:
            for name in names:
                layers[name].silence()
        self._warn_of_bypass(names)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """As in PEFT; warns of a pattern of ranks or alphas that matches nothing.

        Raises:
            ValueError: the adapter has the name of a factor, a field of its config has been set to an impossible value,
                or fused_slices names a layer that is not adapted.
        """
        if adapter_name in TENSORS:  # saving another adapter, PEFT would leave out its factors of this name
            raise ValueError(f"adapter_name={adapter_name!r}: every adapter has a tensor of that name; take another")
        self.peft_config[adapter_name].check()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for field in ("fused_slices", "rank_pattern", "alpha_pattern"):
            for pattern in filter(self._matches_nothing, getattr(self.peft_config[adapter_name], field)):
                message = f"{field}: no adapted module is called {pattern!r}"
                if field == "fused_slices":
                    raise ValueError(message)
                warnings.warn(f"Dual LoRA: {message}", stacklevel=find_stacklevel())
        self._warn_of_bypassed_layers(model, adapter_name)

    def _matches_nothing(self, pattern: str) -> bool:
        return all(get_pattern_key([pattern], name) == name != pattern for name in self.targeted_module_names)

    def _warn_of_bypassed_layers(self, model: nn.Module, adapter_name: str) -> None:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, DualLoraLayer) and m.bypassed}
        bypassed = [name for name, layer in layers.items() if adapter_name in layer.dual_lora_factors]
        if bypassed:
            self._warn_of_bypass(bypassed)
        self._warn_of_reads(self._partly_called)

    def _warn_of_reads(self, names: list[str]) -> None:
        """Warn of layers that are called and whose weight is read, too."""
        if names:
            warnings.warn(
                f"Dual LoRA: {_list_names(names)} called in some places; in others its weight itself is "
                "computed with, where the adapter has no effect until it is merged.",
                stacklevel=find_stacklevel(),
            )

    @staticmethod
    def _warn_of_bypass(names: list[str]) -> None:
        warnings.warn(
            f"Dual LoRA: {_list_names(names)} never called by the parent module, which uses the weight itself "
            "or through another layer. An adapter has no effect there and will not be merged; leave it out with "
            "exclude_modules.",
            stacklevel=find_stacklevel(),
        )

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

        layer = target if isinstance(target, DualLoraLayer) else self._create_layer(target, parent, target_name)
        try:
            layer.update_layer(
                adapter_name,
                config,
                r=of_this_module(config.rank_pattern, config.r),
                alpha=of_this_module(config.alpha_pattern, config.lora_alpha),
                fused=of_this_module(config.fused_slices, None),
            )
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from error
        if layer is not target:
            self._watch_parent(layer, parent, target_name, current_key)
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As in PEFT, which on unloading looks for a weight even in a trained head of several layers. A module that
        has several names, or belongs to several parents, is replaced in all these places."""
        places = [(parent, child_name)]
        if getattr(child, "reused", False) or id(child) in self._reused:
            places = [(m, name) for m in self.model.modules() for name, held in m._modules.items() if held is child]
            new_module.reused = True  # a plain attribute, which copies keep
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)
        for other, name in places:
            setattr(other, name, new_module)

    def _create_layer(self, target: nn.Module, parent: nn.Module, name: str) -> DualLoraLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(self.model))
        cls = find_layer_class(base, backend)
        if cls is None:
            raise TypeError(
                f"Target module {target} is not supported: Dual LoRA adapts Linear (plain or quantized), "
                "transformers' Conv1D, Embedding and Conv1d/2d/3d."
            )
        weight, use = id(getattr(base, "weight", None)), find_use(parent, name)
        return cls(
            target,
            quantization_backend=backend,
            tied=weight in self._tied,
            bypassed=not use.calls and (use.reads or weight in self._tied_embeddings),
        )

    def _watch_parent(self, layer: DualLoraLayer, parent: nn.Module, name: str, key: str) -> None:
        if isinstance(parent, nn.TransformerEncoderLayer):
            # In evaluation its fast path uses the weights directly, unless one of its modules has a hook.
            layer.register_forward_hook(_do_nothing)
        elif find_use(parent, name) == (True, True):
            self._partly_called.append(key)


def _find_reused_modules(model: nn.Module) -> set[int]:
    """Return the ids of modules that are registered in several places: under two names, or in two parents."""
    held = Counter(id(child) for module in model.modules() for child in module._modules.values() if child is not None)
    return {number for number, count in held.items() if count > 1}


def _find_shared_weights(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of parameters that share memory across modules, as one parameter or as several. A merged layer
    also holds the weight it has set aside: unmerging, which PEFT does after adding an adapter, restores it."""
    held = [p for module in modules for p in (*module._parameters.values(), *_list_set_aside(module)) if p is not None]
    holders = Counter(_locate(p) for p in held)
    return {id(p) for p in held if holders[_locate(p)] > 1}


def _list_tied_parameters(model: nn.Module, untied: set[str]) -> list[str]:
    """Return the names of parameters that the model's config ties to others, apart from the weights of `untied` layers.
    A part of the model with another config that ties, such as the language model of Florence-2, goes by that one."""
    places, parts = defaultdict(list), []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is not model.config and getattr(config, "tie_word_embeddings", False):
            parts.append(f"{name}.")
        for kind, parameter in module._parameters.items():
            if parameter is not None and not (kind == "weight" and name.removesuffix(".base_layer") in untied):
                places[_locate(parameter)].append(f"{name}.{kind}".replace(".base_layer", ""))
    groups = [names for names in places.values() if len(names) > 1]
    return [name for names in groups if not commonprefix(names).startswith(tuple(parts)) for name in names]


def _list_set_aside(module: nn.Module) -> list[nn.Parameter]:
    """Return the tied weight that a merged layer has replaced by its own, if any; other layers write in place."""
    kept = [weight for weight, _ in module._unmerged] if isinstance(module, DualLoraLayer) else []
    return [weight for weight in kept if isinstance(weight, nn.Parameter)]


def _locate(parameter: nn.Parameter) -> int:
    """Return a parameter's address; its identity where it has none."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel() > 0
    return parameter.data_ptr() if plain else id(parameter)


def _set_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _do_nothing(module: nn.Module, args: tuple, output) -> None:
    """A forward hook whose mere presence disables the fast path of nn.TransformerEncoderLayer."""


def _list_names(names: list[str]) -> str:
    """Return the first three names and "is" or "are", to begin a sentence."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"
