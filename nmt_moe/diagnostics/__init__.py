"""Describe this machine and its Python, and find out which parts of nmt_moe work.

torch and nmt_moe's packages are imported only when they are tried, so that this package works
even if they are broken.
"""

from nmt_moe.diagnostics.facts import collect_facts
from nmt_moe.diagnostics.parts import Part, try_parts
from nmt_moe.diagnostics.requirements import (
    compare_requirements,
    find_broken,
    find_missing,
    known_extras,
    read_requirements,
)

__all__ = [
    "Part",
    "collect_facts",
    "compare_requirements",
    "find_broken",
    "find_missing",
    "known_extras",
    "read_requirements",
    "try_parts",
]
