"""Benchmark programs. This is a package, so that no other `benchmarks` is imported instead."""
