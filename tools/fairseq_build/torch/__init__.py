"""Stands in for torch while fairseq is being built, and only then: see utils/cpp_extension.py."""
