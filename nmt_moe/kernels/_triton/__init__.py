"""Triton kernels and their launchers; imported only when a tensor needs them."""
