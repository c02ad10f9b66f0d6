"""Triton kernels and their launchers, which are imported only when a tensor needs them."""
