"""Compile kernels for GPUs that need not be present.

Triton cannot compile while it interprets, so a test starts a separate program, which calls
`compile_launch` and prints the answers as one JSON object, which `compile_report` reads.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NARROW_OFFSETS = r"tt\.addptr .*: tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+xi32>"
CAPABILITIES = {"A100": 80, "H100": 90}
TYPES = {
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


def compile_report(program: Path) -> dict[str, Any]:
    """Run `program` in a process in which Triton compiles, and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compile_launch(
    module: ModuleType, kernel_name: str, gpu: str, launch: Callable[[], object]
) -> dict[str, Any]:
    """Compile the kernel that `launch` would start, with its arguments, down to machine code.

    Args:
        module: The module in which the launcher finds its kernel.
        kernel_name: The kernel's name in that module.
        gpu: A name in CAPABILITIES.
        launch: A function that calls the launcher once, with CPU tensors.

    Returns:
        A report with these entries:
        wgmma, mma: Whether Hopper's and older tensor-core instructions occur.
        wide_copies: The number of copies of 16 bytes from global to shared memory.
        registers, spilled: The registers of a thread, and the bytes that it keeps outside of them.
        narrow_offsets: The number of 32-bit offsets of two-dimensional blocks from a base pointer.
        shared: The bytes of shared memory of a block.
    """
    kernel = getattr(module, kernel_name)
    recorder = _Recorder(kernel, gpu)
    setattr(module, kernel_name, recorder)
    try:
        launch()
    finally:
        setattr(module, kernel_name, kernel)
    return recorder.report


class _Recorder:
    """A replacement for a kernel, with which `kernel[grid](...)` compiles but does not run."""

    def __init__(self, kernel: Any, gpu: str) -> None:
        self.kernel, self.gpu, self.report = kernel, gpu, {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *values: Any, **options: int) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, multiples = {}, {}, {}
        for index, (param, value) in enumerate(zip(self.kernel.params, values, strict=True)):
            if (
                value is None
                or param.is_constexpr
                or (isinstance(value, int) and value == 1 and not param.do_not_specialize)
            ):
                signature[param.name], constants[param.name] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            whole = "i64" if not is_tensor and value >= 2**31 else "i32"
            signature[param.name] = f"*{TYPES[value.dtype]}" if is_tensor else whole
            if is_tensor or (value % 16 == 0 and not param.do_not_specialize):
                multiples[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, multiples)
        target = GPUTarget("cuda", CAPABILITIES[self.gpu], 32)
        compiled = triton.compile(source, target=target, options=options)
        ptx = compiled.asm["ptx"]
        self.report = {
            "wgmma": "wgmma.mma_async" in ptx,
            "mma": "mma.sync" in ptx,
            "wide_copies": len(re.findall(r"cp\.async\.cg", ptx)),
            "narrow_offsets": len(re.findall(NARROW_OFFSETS, compiled.asm["ttir"])),
            "shared": compiled.metadata.shared,
            **_resources(compiled.asm["cubin"]),
        }


def _resources(machine_code: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        text = subprocess.check_output(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True
        )
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}
