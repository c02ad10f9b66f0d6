"""Compile factored Adam's kernels for GPUs that need not be present; print a report."""

import json
import re
import subprocess
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nmt_moe.kernels._triton import factored_adam

COLUMNS, WARPS = factored_adam.TILE_COLUMNS, factored_adam.WARPS
TILE = {"BLOCK_D": factored_adam.TILE_ROWS, "BLOCK_H": COLUMNS}
KERNELS = {  # name: constants, warps
    "_square_sums_kernel": (TILE, WARPS),
    "_column_means_kernel": ({"BLOCK_H": COLUMNS}, 4),
    "_update_kernel": ({**TILE, "BLOCK_MEAN": 512}, WARPS),
}
MEANS = {"row_mean": "*fp32", "column_mean": "*fp32", "column_sums": "*fp32"}
FLOATS = {"beta2", "gain", "step_size", "eps", "keep"}


def type_of(name: str, dtype: str) -> str:
    """Return the type of the launcher's argument."""
    if name in ("weight", "grad"):
        return f"*{dtype}"
    return MEANS.get(name, "fp32" if name in FLOATS else "i32")


def compile_kernel(name: str, capability: int, dtype: str) -> dict[str, int]:
    """Compile one kernel down to machine code and read its use of registers."""
    kernel, (constants, warps) = getattr(factored_adam, name), KERNELS[name]
    signature, attributes = {}, {}
    for index, param in enumerate(kernel.params):
        is_constant = param.name in constants
        signature[param.name] = "constexpr" if is_constant else type_of(param.name, dtype)
        if signature[param.name].startswith("*") or param.name.endswith(("_dim", "_stride")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = subprocess.check_output(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


if __name__ == "__main__":
    reports = {
        f"sm_{capability} {dtype} {name}": compile_kernel(name, capability, dtype)
        for capability in (80, 90)
        for dtype in ("fp32", "bf16")
        for name in KERNELS
    }
    print(json.dumps(reports))  # noqa: T201
