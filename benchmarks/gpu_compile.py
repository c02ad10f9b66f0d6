"""Compile Triton kernels for a GPU that need not be present, and report their resource usage.

Triton cannot compile while it interprets, so TRITON_INTERPRET must not be set.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Gpu(NamedTuple):
    """A GPU to compile for, and the shared memory of one of its multiprocessors.

    Source: NVIDIA, CUDA C++ Programming Guide, compute capabilities.
    """

    capability: int
    name: str  # its name in ptxas
    shared_bytes: int


GPUS = {
    "A100": Gpu(80, "sm_80", 164 * 1024),
    "H100": Gpu(90, "sm_90a", 228 * 1024),
}
# These limits are the same on both GPUs. CUDA also reserves 1 KiB of shared memory per block.
REGISTERS, WARPS, BLOCKS, RESERVED_BYTES = 65536, 64, 32, 1024
# Registers are allocated to a warp in units of 256.
REGISTER_UNIT, WARP_THREADS = 256, 32

TYPES = {
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
NARROW_OFFSETS = r"tt\.addptr .*: tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+xi32>"
# An instruction's address, name and operands.
INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([^;]*);", re.MULTILINE
)


class Launch(NamedTuple):
    """A call to a launcher, and the kernel to compile from that call.

    Attributes:
        name: The name shown in tables.
        module: The module in which the launcher finds its kernel.
        kernel: The kernel's name in that module.
        call: A function that calls the launcher once, with CPU tensors.
        elements: How many numbers a block processes at a time; 0 if that would be meaningless.
        repeats: How often the innermost loop runs each time that the code around it runs; 0 if so
            often that only the loop counts.
    """

    name: str
    module: ModuleType
    kernel: str
    call: Callable[[], object]
    elements: int = 0
    repeats: int = 1


def compile_launch(launch: Launch, gpu: str) -> dict[str, Any]:
    """Compile the kernel that `launch` would start, for its arguments, to machine code.

    Args:
        launch: The launch to compile.
        gpu: A name in GPUS.

    Returns:
        A report with these entries:
        registers, spilled: Registers per thread, and bytes per thread that do not fit into them.
        shared: Bytes of shared memory per block.
        blocks, warps: How many blocks, and how many warps of these blocks, fit on a multiprocessor
            at a time.
        warnings: The codes of ptxas' warnings, such as C7514 (wgmma serialised).
        instructions: The number of instructions in the code, with those in loops counted once.
        per_element: Instructions that a thread executes per element; 0 if unknown.
        wgmma, mma: Whether the code uses the tensor-core instructions of Hopper or of older GPUs.
        wide_copies: The number of 16-byte copies from global to shared memory.
        narrow_offsets: The number of 32-bit offsets of two-dimensional blocks, which overflow
            with large tensors.
    """
    kernels = {
        name: kernel for name, kernel in vars(launch.module).items() if name.endswith("_kernel")
    }
    recorder = _Recorder(kernels[launch.kernel], GPUS[gpu], launch)
    try:
        for name in kernels:
            setattr(launch.module, name, recorder if name == launch.kernel else _Nothing())
        launch.call()
    finally:
        for name, kernel in kernels.items():
            setattr(launch.module, name, kernel)
    return recorder.report


class _Nothing:
    """A stand-in for an unwanted kernel: `kernel[grid](...)` does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values, **named: None


class _Recorder:
    """A stand-in for a kernel: `kernel[grid](...)` compiles the kernel but does not run it."""

    def __init__(self, kernel: Any, gpu: Gpu, launch: Launch) -> None:
        self.kernel, self.gpu, self.launch = kernel, gpu, launch
        self.report: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *values: Any, **named: Any) -> None:
        params = self.kernel.params
        named = dict(zip((param.name for param in params), values, strict=False)) | named
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        signature, constants, multiples = {}, {}, {}
        for index, param in enumerate(params):
            value = named[param.name]
            kind = _type(value, param)
            signature[param.name] = kind
            if kind == "constexpr":
                constants[param.name] = value
            elif _is_multiple(value, param):
                multiples[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, multiples)
        target = GPUTarget("cuda", self.gpu.capability, WARP_THREADS)
        compiled = triton.compile(source, target=target, options=options)
        self.report = _read(compiled, self.gpu, self.launch)


def _type(value: Any, param: Any) -> str:
    """Return the type that Triton would give an argument when compiling."""
    is_one = isinstance(value, int) and value == 1 and not param.do_not_specialize
    if value is None or param.is_constexpr or is_one:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i64" if value >= 2**31 else "i32"


def _is_multiple(value: Any, param: Any) -> bool:
    """Return whether Triton would treat an address or number as a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize


def _read(compiled: Any, gpu: Gpu, launch: Launch) -> dict[str, Any]:
    ptx, warps, shared = compiled.asm["ptx"], compiled.metadata.num_warps, compiled.metadata.shared
    with tempfile.TemporaryDirectory() as folder:
        code, assembly = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        code.write_bytes(compiled.asm["cubin"])
        assembly.write_text(ptx)
        listing = _run(knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", code)
        said = _run(
            *(knobs.nvidia.ptxas.path, "-v", f"--gpu-name={gpu.name}", assembly),
            *("-o", Path(folder, "again.cubin")),
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    instructions = [found for found in INSTRUCTION.findall(listing) if found[1] != "NOP"]
    blocks = blocks_on_multiprocessor(found["REG"], warps, shared, gpu)
    executed = count_executed(instructions, launch.repeats)
    elements = launch.elements / (WARP_THREADS * warps)
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": shared,
        "blocks": blocks,
        "warps": blocks * warps,
        "warnings": sorted(set(re.findall(r"\bC7\d{3}\b", said))),
        "instructions": len(instructions),
        "per_element": round(executed / elements) if elements else 0,
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx,
        "wide_copies": len(re.findall(r"cp\.async\.cg", ptx)),
        "narrow_offsets": len(re.findall(NARROW_OFFSETS, compiled.asm["ttir"])),
    }


def count_executed(instructions: list[tuple[str, str, str]], repeats: int) -> float:
    """Compute how many instructions a thread executes for each run of the innermost loop.

    Args:
        instructions: The address, name and operands of each instruction. A loop is what lies
            between a branch and an earlier address that it leads to.
        repeats: How often the innermost loop runs each time that the code around it (an outer
            loop, or everything else) runs; 0 if so often that only the loop counts.
    """
    addresses = [int(address, 16) for address, _, _ in instructions]
    branches = [
        (int(operands.split()[-1], 16), int(address, 16))
        for address, name, operands in instructions
        if name == "BRA"
    ]
    loops = [loop for loop in branches if loop[0] < loop[1]]
    if not loops:
        return len(instructions)
    inner = min(loops, key=lambda loop: loop[1] - loop[0])
    outer = [loop for loop in loops if loop[0] < inner[0] and inner[1] < loop[1]]
    around = min(outer, key=lambda loop: loop[1] - loop[0], default=(0, addresses[-1]))

    def size(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= address <= loop[1] for address in addresses)

    return size(inner) + ((size(around) - size(inner)) / repeats if repeats else 0)


def blocks_on_multiprocessor(registers: int, warps: int, shared: int, gpu: Gpu) -> int:
    """Compute how many blocks fit on a multiprocessor at a time.

    Args:
        registers: Registers per thread.
        warps: Warps per block.
        shared: Bytes of shared memory per block.
        gpu: The GPU.
    """
    by_warp = -(-registers * WARP_THREADS // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // (by_warp * warps)
    by_memory = gpu.shared_bytes // (shared + RESERVED_BYTES)
    return min(by_registers, by_memory, WARPS // warps, BLOCKS)


def _run(*command: str | Path) -> str:
    return subprocess.run(
        command, text=True, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout
