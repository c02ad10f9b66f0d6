"""Benchmark programs, in a package so that no other `benchmarks` package is imported instead."""
