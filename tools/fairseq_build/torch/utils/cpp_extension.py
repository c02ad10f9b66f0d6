"""Let fairseq's setup.py skip the three extensions that are compiled against torch's headers.

They serve BASE layers, Levenshtein transformers and an alignment operator, none of which this
project uses, and take four of the build's five minutes; what is left does not depend on torch.
`tools/setup.sh` puts the folder above on PYTHONPATH for that one build.
"""

from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext


def CppExtension(name: str, sources: list[str], **_: Any) -> Extension:  # noqa: N802
    """Return an extension without sources, for `BuildExtension` to drop."""
    return Extension(name, sources=[])


class BuildExtension(build_ext):
    """Build the extensions that have sources: the two in Cython and the counter of n-grams."""

    def initialize_options(self) -> None:
        """Drop what has no sources before setuptools looks at it."""
        super().initialize_options()
        modules = self.distribution.ext_modules
        self.distribution.ext_modules = [module for module in modules if module.sources]
