"""What a finished run did to each weight it changed: dW, the parts of dW, and the same for random factors.

A weight is out x in here, even where the layer stores it as in x out (GPT-2's Conv1D, embeddings).
"""

import copy
import functools
import math
import re
import zlib
from collections.abc import Collection, Iterator

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dual_lora import analysis
from dual_lora.functional import MAP_NAMES, delta_weight
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.evaluate.trained import load_trained_model
from dual_lora.lab.model.adapt import draw_initial_model
from dual_lora.lab.model.load import load_dequantized_model, load_model
from dual_lora.lab.model.merge import explain_unmergeable
from dual_lora.lab.record.record import Record
from dual_lora.tuner.factors import DualLoraFactors
from dual_lora.tuner.layer import DualLoraLayer

ADAPTER = "default"
NULL_SEED = 0
MATRIX_DIMENSIONS = 2  # of a weight with a rank
NAME_ROLES = "name the adapted modules in model.roles"
# Factors redrawn from the seed count as the run's own if the cosine of every trained factor with its redrawn self is
# this many standard deviations above chance. For an unrelated draw of n entries the deviation is 1 / sqrt(n).
MIN_DEVIATIONS = 8.0


def orient_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight of this base layer, or dW in its shape, as out x in in float32."""
    weight = weight.detach().float()
    return weight.T if isinstance(layer, Conv1D | nn.Embedding) else weight.flatten(1)


@torch.no_grad()
def subtract_base(layer: BaseTunerLayer, base: nn.Module) -> Tensor:
    """Return a layer's weight with its adapter merged, minus a base layer's weight, out x in.

    It is computed in float64: in float32, rounding would make W0 + dW - W0 full rank.
    """
    merged = copy.deepcopy(layer).double()
    merged.merge(adapter_names=[ADAPTER])
    return orient_weight(base, merged.get_base_layer().weight - base.weight.double())


class Update:
    """One changed weight. `ranks` are the inner dimensions of its factors, `null` says what the random draw is,
    `labels` name its parts for people."""

    ranks = ""
    size_is_meaningful = False  # whether the norm of the null dW is meaningful
    null = "a Gaussian matrix of the same shape"
    labels = {"overall": "dW"}

    def __init__(self, module: str, base: nn.Module) -> None:
        self.module, self.base, self.block = module, base, slice(None)
        self.name = module

    def get_weight(self) -> Tensor:
        """Return W0 (out x in, float32)."""
        return orient_weight(self.base, self.base.weight)[self.block]

    def get_change(self) -> Tensor:
        """Return dW (out x in, float32)."""
        return self.get_full_change()[self.block]

    def get_full_change(self) -> Tensor:
        """Return dW of the full module. `get_change` may be a block of its rows."""
        raise NotImplementedError

    def measure_parts(self, device: str) -> dict:
        """Return the ranks and entries of the parts that dW is computed from."""
        return {}

    def draw_null(self, device: str) -> tuple[Tensor, dict]:
        """Return dW of random factors, and the ranks and entries of its parts."""
        return self.draw_gaussian(*self.get_weight().shape), {}

    def get_seed(self) -> int:
        """Return the seed of this weight's null, the same in every analysis."""
        return zlib.crc32(f"{NULL_SEED} {self.name}".encode())

    def draw_gaussian(self, out: int, fan_in: int, rank: int | None = None) -> Tensor:
        """Return a standard normal out x in matrix, or a product of two over `rank`."""
        generator = torch.Generator().manual_seed(self.get_seed())
        if rank is None:
            return torch.randn(out, fan_in, generator=generator)
        return torch.randn(out, rank, generator=generator) @ torch.randn(rank, fan_in, generator=generator)


class TunedUpdate(Update):
    """A weight that trained in full: dW is the trained minus the base weight."""

    def __init__(self, module: str, base: nn.Module, trained: nn.Module) -> None:
        super().__init__(module, base)
        self.trained = trained

    def get_full_change(self) -> Tensor:
        return orient_weight(self.trained, self.trained.weight) - orient_weight(self.base, self.base.weight)


class LowRankUpdate(Update):
    """LoRA: dW = alpha / r * B A. It is computed from the factors, because rounding W0 + dW would raise its rank."""

    null = "B A with both factors Gaussian (its ranks do not depend on their sizes)"
    labels = {"overall": "dW = BA"}

    def __init__(self, module: str, layer: LoraLayer) -> None:
        super().__init__(module, layer.get_base_layer())
        self.layer = layer
        self.ranks = str(layer.r[ADAPTER])

    def get_product(self) -> Tensor:
        """Return alpha / r * B A, out x in."""
        return orient_weight(self.base, self.layer.get_delta_weight(ADAPTER))

    def get_full_change(self) -> Tensor:
        return self.get_product()

    def draw_null(self, device: str) -> tuple[Tensor, dict]:
        return self.draw_gaussian(*self.get_weight().shape, self.layer.r[ADAPTER]), {}


class DoraUpdate(LowRankUpdate):
    """DoRA: dW is the merged minus the base weight. B A is reported in addition, as `product`."""

    size_is_meaningful = True
    null = "B A with both factors Gaussian and ||B A|| as trained, all else as at initialisation"
    labels = {"product": "BA", "overall": "dW"}

    def get_full_change(self) -> Tensor:
        return subtract_base(self.layer, self.base)

    def measure_parts(self, device: str) -> dict:
        return measure_product(self.get_product().to(device))

    @torch.no_grad()
    def draw_null(self, device: str) -> tuple[Tensor, dict]:
        layer = copy.deepcopy(self.layer).double()
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        B.zero_()
        layer.lora_variant[ADAPTER].init(layer, ADAPTER)
        generator = torch.Generator().manual_seed(self.get_seed())
        for factor in (A, B):
            factor.copy_(torch.randn(factor.shape, generator=generator))
        B.mul_(self.get_product().norm() / layer.get_delta_weight(ADAPTER).norm())
        numbers = measure_product(orient_weight(self.base, layer.get_delta_weight(ADAPTER)).to(device))
        return subtract_base(layer, self.base), numbers


def measure_product(BA: Tensor) -> dict:
    """Return the ranks of B A (out x in), under names that begin with `product`."""
    return {f"product_{key}": value for key, value in analysis.compute_ranks(BA).items()}


class MergedUpdate(Update):
    """Any other method that changes weights, and LoRA whose initialization changes the base (PiSSA, OLoRA, LoftQ).

    dW is the merged weight minus that of the model as it is loaded. `original` is that model's layer."""

    def __init__(self, module: str, layer: BaseTunerLayer, original: nn.Module) -> None:
        super().__init__(module, original)
        self.layer = layer
        if isinstance(layer, LoraLayer) and ADAPTER in layer.r:
            self.ranks = str(layer.r[ADAPTER])

    def get_full_change(self) -> Tensor:
        return subtract_base(self.layer, self.base)


class DualLoraUpdate(Update):
    """Dual LoRA. In a fused layer, one adapted block of rows."""

    size_is_meaningful = True
    null = "fresh factors by the adapter's own rule and shapes, at full scale"

    def __init__(self, module: str, layer: DualLoraLayer, config: object, index: int | None = None) -> None:
        super().__init__(module, layer.get_base_layer())
        self.layer, self.config, self.index = layer, config, index
        self.factors: DualLoraFactors = layer.dual_lora_factors[ADAPTER]
        A, _, C, _ = self.get_factors(self.factors)
        self.r1, self.r2 = len(A), len(C)
        self.ranks = f"{self.r1}+{self.r2}"
        variants = self.factors.variants
        size, sign = (MAP_NAMES.get(variants[k], variants[k]) for k in ("magnitude", "direction"))
        self.labels = {"magnitude": f"{size}(BA)", "direction": f"{sign}(DC)", "overall": "dW"}
        if index is not None:
            n, blocks = layer.fused_slices[ADAPTER]
            rows = layer.out_features // n
            self.block = slice(blocks[index] * rows, (blocks[index] + 1) * rows)
            self.name = f"{module}[{blocks[index]}]"

    def get_factors(self, factors: DualLoraFactors) -> list[Tensor]:
        """Return A, B, C, D of this update."""
        four = (factors.A, factors.B, factors.C, factors.D)
        return [t.detach() if self.index is None else t.detach()[self.index] for t in four]

    def get_full_change(self) -> Tensor:
        return orient_weight(self.base, self.layer.get_delta_weight(ADAPTER))

    def measure_factors(self, factors: DualLoraFactors, device: str) -> dict:
        variants = factors.variants
        four = (t.to(device) for t in self.get_factors(factors))
        return analysis.measure_groups(*four, **{name: value for name, value in variants.items() if name != "ste"})

    def measure_parts(self, device: str) -> dict:
        return self.measure_factors(self.factors, device)

    @torch.no_grad()
    def draw_null(self, device: str) -> tuple[Tensor, dict]:
        factors = self.draw_fresh_factors()
        four = [t.to(device) for t in self.get_factors(factors)]
        return delta_weight(*four, factors.scaling, **factors.variants), self.measure_factors(factors, device)

    def draw_fresh_factors(self) -> DualLoraFactors:
        """Return fresh factors, drawn by the adapter's own rule."""
        trained = self.factors
        fan_in, fan_out = trained.A.shape[-1], trained.B.shape[-2]
        alpha = trained.scaling * math.sqrt(self.r1 * self.r2)
        blocks = None if trained.A.ndim == 2 else len(trained.A)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.get_seed())
            return type(trained)(self.config, fan_in, fan_out, self.r1 + self.r2, alpha, blocks)

    def measure_flipped_signs(self, initial_factors: DualLoraFactors, device: str) -> float:
        """Return the share of signs that differ from those of the factors the run began with."""
        C, D, C0, D0 = (
            t.to(device) for t in (*self.get_factors(self.factors)[2:], *self.get_factors(initial_factors)[2:])
        )
        return analysis.compute_flipped_share(C, D, C0, D0, self.factors.variants["direction_dtype"])


def load_updates(settings: Settings, record: Record) -> list[Update]:
    """Return an update for every weight that a finished run changed; for a fully trained model, those with a role. If
    the base is in 4 bits, W0 is dequantized.

    Raises:
        UserError: the run cannot be loaded, holds NaN or Inf, or its method changes more than a weight can show.
    """
    trained, base, _ = load_trained_and_base(settings, record)
    return list_updates(trained, base, settings)


def check_changed(updates: Collection, settings: Settings, record: Record) -> None:
    """Refuse a run that left every weight as it was.

    Raises:
        UserError: with the run and the model whose roles were looked for.
    """
    unchanged = f"no weight of a role that model={settings.model.name} names was changed"
    require(bool(updates), f"run={record.format_path()}: {unchanged}; {NAME_ROLES}")


def load_trained_and_base(settings: Settings, record: Record) -> tuple[nn.Module, nn.Module, object]:
    """Return the model as a finished run left it, the model as it is loaded, and the tokenizer. A base in 4 bits is
    dequantized.

    Raises:
        UserError: the run cannot be loaded, or holds NaN or Inf.
    """
    task = load_task(settings)
    trained, tokenizer = load_trained_model(settings, record, task, plain=True)
    for name, parameter in trained.named_parameters():
        require(bool(parameter.isfinite().all()), f"run={record.format_path()}: {name} contains NaN or Inf")
    check_update_scales(trained, record)
    base, _ = (load_dequantized_model if settings.hardware.base else load_model)(settings, task)
    return trained, base, tokenizer


def list_updates(trained: nn.Module, base: nn.Module, settings: Settings) -> list[Update]:
    """Return an update for every weight that training changed; for a fully trained model, those with a role.

    Raises:
        UserError: the method changes more than a weight can show.
    """
    if isinstance(trained, PeftModel):
        return list(list_adapter_updates(trained, base, settings))
    after = dict(trained.named_modules())
    names = [(name, module) for name, module in base.named_modules() if find_role(name, settings)]
    return [TunedUpdate(name, module, after[name]) for name, module in names]


def check_update_scales(model: nn.Module, record: Record) -> None:
    """Refuse a ramp factor that is NaN or Inf: a buffer, so not among the parameters.

    Raises:
        UserError: with the adapter's name.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("update_scale"):
            require(bool(buffer.isfinite().all()), f"run={record.format_path()}: {name} contains NaN or Inf")


def list_adapter_updates(model: PeftModel, base: nn.Module, settings: Settings) -> Iterator[Update]:
    """Yield the updates of an adapted model. base: the same model as it is loaded, without an adapter.

    dW is computed from the factors only for Dual LoRA and for LoRA that left the base weights unchanged. For all other
    methods it is the merged minus the base weight.

    Raises:
        UserError: the method cannot be merged, so that its dW is not known.
    """
    config = model.peft_config[ADAPTER]
    originals = dict(base.named_modules())
    merges = functools.cache(lambda: explain_unmergeable(model))
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if isinstance(layer, DualLoraLayer):
            fused = getattr(layer, "fused_slices", {}).get(ADAPTER)
            indexes = [None] if fused is None else range(len(fused[1]))
            yield from (DualLoraUpdate(name, layer, config, index) for index in indexes)
            continue
        original = originals.get(name)
        why = merges() if getattr(original, "weight", None) is not None else f"{name} has no weight of its own"
        where = f"analyse: method={settings.method.name} ({config.peft_type.value})"
        require(why is None, f"{where}: cannot be merged into the base weights ({why}), so its dW is not known")
        if original.weight.ndim >= MATRIX_DIMENSIONS:  # a norm's weight has no rank
            yield choose_update(name, layer, original, config)


def choose_update(name: str, layer: BaseTunerLayer, original: nn.Module, config: PeftConfig) -> Update:
    """Return how dW of a layer is known: from LoRA's factors only if the base weights are as they were loaded."""
    kept = torch.equal(layer.get_base_layer().weight, original.weight)
    if config.peft_type == PeftType.LORA and kept:
        if ADAPTER not in layer.lora_variant:
            return LowRankUpdate(name, layer)
        if layer.use_dora[ADAPTER] and ADAPTER in layer.lora_A:
            return DoraUpdate(name, layer)
    return MergedUpdate(name, layer, original)


def find_role(module: str, settings: Settings) -> str:
    """Return a module's role, such as "q", or several if they share one weight, such as "q/k/v"; "" if it has none."""
    roles = settings.roles.items()
    return "/".join(role for role, pattern in roles if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module))


def find_layer_number(module: str) -> int | None:
    """Return the layer number in a module's name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(found[1]) if found else None


def rebuild_initial_factors(settings: Settings, updates: list[Update]) -> tuple[dict[str, DualLoraFactors], dict]:
    """Return the factors the run began with, by module, and how well they match the trained ones.

    The record does not hold them, so they are redrawn from the run's seed, as training does. They are accepted only if
    every trained factor is far more similar to its redrawn counterpart than by chance (`MIN_DEVIATIONS`); if even one
    more or one fewer random number had been drawn before, none would be. Rounding may differ between machines, and
    sigma between versions of the rule, but neither changes a sign. If they do not match, no factors are returned, only
    the reason.
    """
    dual = [u for u in updates if isinstance(u, DualLoraUpdate)]
    if not dual:
        return {}, {"rebuilt": False, "why": "the method has no direction group"}
    try:
        initial_factors = draw_initial_factors(settings)
    except UserError as error:
        return {}, {"rebuilt": False, "why": str(error)}
    cosines, deviations = [], []
    for update in dual:
        if update.module not in initial_factors:
            return {}, {"rebuilt": False, "why": f"training would not adapt {update.module} now"}
        pairs = list(
            zip(update.get_factors(update.factors), update.get_factors(initial_factors[update.module]), strict=True)
        )
        if any(a.shape != b.shape for a, b in pairs):
            return {}, {"rebuilt": False, "why": f"training would give {update.module} other shapes now"}
        for a, b in pairs:
            cosine = analysis.compute_cosine(a, b) or 0.0
            cosines.append(cosine)
            deviations.append(cosine * math.sqrt(a.numel()))
    found = {"least_cosine": min(cosines), "least_over_chance": min(deviations)}
    if min(deviations) < MIN_DEVIATIONS:
        why = "the factors redrawn from the seed do not match those this run began with"
        return {}, {"rebuilt": False, "why": why, **found}
    return initial_factors, {"rebuilt": True, "why": None, **found}


def draw_initial_factors(settings: Settings) -> dict[str, DualLoraFactors]:
    """Return the factors as training draws them from the run's seed, by module.

    Raises:
        UserError: the model cannot be loaded, or the method does not fit it.
    """
    model, _ = draw_initial_model(settings, load_task(settings))
    layers = model.get_base_model().named_modules()
    return {name: m.dual_lora_factors[ADAPTER] for name, m in layers if isinstance(m, DualLoraLayer)}
