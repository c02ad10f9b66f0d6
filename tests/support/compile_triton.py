"""Compile kernels for GPUs that are not there. Run in a process without TRITON_INTERPRET."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

SM80, SM90 = 80, 90


def compile_kernel(
    kernel: triton.JITFunction, capability: int, arguments: dict, **options: int
) -> CompiledKernel:
    """Compile for a CUDA compute capability, down to machine code.

    Args:
        kernel: A function under `@triton.jit`.
        capability: 80 for A100, 90 for H100 and H200.
        arguments: Types ("*bf16", "i32", ...) of run-time arguments and values of constants, by
            name. Pointers, and integers given as "i32:16", are taken to be multiples of 16.
        options: num_warps, num_stages.
    """
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for place, param in enumerate(kernel.params):
        value = arguments[param.name]
        if param.name in constants or not isinstance(value, str):
            signature[param.name], constexprs[param.name] = "constexpr", value
            continue
        signature[param.name], _, multiple = value.partition(":")
        if value.startswith("*") or multiple:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
