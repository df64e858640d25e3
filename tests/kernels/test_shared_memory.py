"""What the Triton kernels need of a card, from compiling them for it, which needs no card."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.places import ROOT

# A block's most shared memory by compute capability, in NVIDIA's programming guide: the least of all since Turing, and
# the least of those where Triton loads tiles ahead.
SHARED_BYTES = {75: 64 << 10, 86: 99 << 10}
# A process of its own: others of these tests import the kernels for Triton's interpreter.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from dual_lora.kernels import triton as kernels

names = kernels._project.arg_names
def count_shared_bytes(rank, capability):
    sizes = dict(STE=0, R1=rank, R2=rank, ROWS=kernels.ROWS, COLUMNS=kernels.COLUMNS)
    pointers = ("A", "B", "C", "D", "G", "scale", "dB", "dD")
    signature = {n: "constexpr" if n in sizes else "*fp32" if n in pointers else "i32" for n in names}
    constants = {(names.index(name),): value for name, value in sizes.items()}
    source = triton.compiler.ASTSource(fn=kernels._project, signature=signature, constexprs=constants)
    options = {"num_stages": kernels._count_stages(rank, rank)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared

print(json.dumps([count_shared_bytes(kernels.MAX_RANK, 75), count_shared_bytes(kernels.MAX_PIPELINED_RANK, 86)]))
"""


def test_every_card_has_the_shared_memory_that_the_kernels_need(tmp_path):
    """`_project` needs most."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "DUAL_LORA_LAZY": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(0 < used <= room for used, room in zip(found, SHARED_BYTES.values(), strict=True)), found
