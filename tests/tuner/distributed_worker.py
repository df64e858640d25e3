"""Trains a small adapted Llama for a few steps, alone or as one of several processes that share every batch.

`torchrun --nproc-per-node N -m tests.tuner.distributed_worker FILE` trains it in every mode of MODES: DDP,
FSDP2 and FSDP2 on a bf16 base; the first process writes {mode: result of `train`} to FILE.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dual_lora.tuner.warmup import list_factors

from .tiny_llama import adapted, batches, llama, trained

STEPS = 5
# FSDP2 of torch 2.7 wants one dtype for all parameters of a layer, frozen ones included, and on gloo it adds gradients
# instead of averaging them, LoRA's too.
HAS_FSDP2 = not torch.__version__.startswith("2.7.")
MODES = ["ddp", *["fsdp2", "fsdp2-bf16"] * HAS_FSDP2]


def parallel(model, mode):
    if mode == "none":
        return model
    if mode == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
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


def main(path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    results = {mode: train(mode, rank, size) for mode in MODES}
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
