"""Trains a small adapted Llama for a few steps, alone or as one of several processes that share every batch.

`torchrun --nproc-per-node N -m tests.tuner.distributed_worker FILE` trains it in every mode of MODES: DDP,
FSDP2 and FSDP2 on a bf16 base; the first process writes {mode: result of `train`} to FILE, and as "caches" how many
matrices one process keeps after an evaluation, in every mode of EVALUATED.
"""

import sys

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dual_lora.tuner.factors import DualLoraFactors
from dual_lora.tuner.warmup import list_factors
from tests.tuner.tiny_llama import adapted, batches, llama, trained

STEPS = 5
# FSDP2 of torch 2.7 wants one dtype for all parameters of a layer, frozen ones included, and on gloo it adds gradients
# instead of averaging them, LoRA's too.
HAS_FSDP2 = not torch.__version__.startswith("2.7.")
MODES = ["ddp", *["fsdp2", "fsdp2-bf16"] * HAS_FSDP2]
# FSDP2 around the adapted model and below its adapters; FSDP1 with the original parameters and with flat ones only.
EVALUATED = ["ddp", *["fsdp2", "fsdp2-bf16", "fsdp2-base"] * HAS_FSDP2, "fsdp1", "fsdp1-flat"]


def parallel(model, mode):
    if mode == "none":
        return model
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode.startswith("fsdp1"):
        units = ModuleWrapPolicy({DualLoraFactors})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=units, use_orig_params=mode == "fsdp1", device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(mode: str, rank: int = 0, size: int = 1) -> dict:
    """Trained tensors, {(step, f)} of all adapters, and this process's losses."""
    torch.manual_seed(0)
    base = llama().bfloat16() if mode.endswith("bf16") else llama()
    inner = adapted(base, init_std=0.1, scale_warmup_steps=3)
    model = parallel(inner, mode)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    losses = []
    for ids in batches(1) * STEPS:
        part = ids.chunk(size)[rank]
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: whole(p.detach()) for name, p in inner.named_parameters() if p.requires_grad}
    return {
        "weights": weights,
        "ramp": {(int(f.step), float(f.update_scale)) for f in list_factors(inner)},
        "losses": losses,
    }


def count_caches(mode: str) -> dict[str, int]:
    """{"evaluation", "training": how many layers keep a matrix after a forward, with `keep_update`}."""
    torch.manual_seed(0)
    base = llama().bfloat16() if mode.endswith("bf16") else llama()
    if mode == "fsdp2-base":
        inner = model = adapted(parallel(base, mode), init_weights=False, keep_update=True)
    else:
        inner = adapted(base, init_weights=False, keep_update=True)
        model = parallel(inner, mode)
    every, (ids,), found = list_factors(inner), batches(1), {}
    with torch.no_grad():
        model.eval()(input_ids=ids)
    found["evaluation"] = sum(factors._cache is not None for factors in every)
    model.train()(input_ids=ids)
    found["training"] = sum(factors._cache is not None for factors in every)
    return found


def main(path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    results = {mode: train(mode, rank, size) for mode in MODES}
    results["caches"] = {mode: count_caches(mode) for mode in EVALUATED}
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
