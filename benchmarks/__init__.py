"""Benchmark programs. A package, so that none of that name in site-packages is imported instead."""
