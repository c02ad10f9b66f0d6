"""Compiled loops for the CPU: a C++ library that `build` compiles on the machine that uses it."""

from nmt_moe.kernels._cpu.loading import has_compiled_loops, has_loops_for, load

__all__ = ["has_compiled_loops", "has_loops_for", "load"]
