"""Triton kernels and their launchers; imported only where a tensor runs them."""
