"""Benchmark programs, in a package so that no other `benchmarks` is imported instead."""
