"""Let fairseq's setup.py skip the three extensions that are compiled against torch's headers.

They implement BASE layers, Levenshtein transformers and an alignment operator, which this project
does not use, and take four of the build's five minutes. The rest of the build does not depend on
torch. `tools/setup.sh` puts the folder `tools/fairseq_build` on PYTHONPATH for this build only.
"""

from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext


def CppExtension(name: str, sources: list[str], **_: Any) -> Extension:  # noqa: N802
    """Return an extension without sources, which `BuildExtension` drops."""
    return Extension(name, sources=[])


class BuildExtension(build_ext):
    """Build the extensions that have sources: two in Cython, and another that counts n-grams."""

    def initialize_options(self) -> None:
        """Drop the extensions without sources before setuptools processes them."""
        super().initialize_options()
        modules = self.distribution.ext_modules
        self.distribution.ext_modules = [module for module in modules if module.sources]
