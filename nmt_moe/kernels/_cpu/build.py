"""Compile the library: `python -m nmt_moe.kernels._cpu.build`.

This needs a C++ compiler (`CXX`, otherwise c++ or g++) and takes half a minute. Without the
library, torch's own operations do the same, more slowly.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nmt_moe.kernels._cpu.loading import SOURCES, library_path

# The loops for each level of vector instructions; each call chooses the processor's.
LEVELS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
COMMON = ["-std=c++20", "-fPIC"]
# Only explicit multiply-adds, and no floating-point exceptions, which prevent vectorisation.
LOOPS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def find_compiler() -> str | None:
    """Return the C++ compiler, if there is one."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["c++", "g++"])), None)


def build(compiler: str) -> Path:
    """Compile the library and put it where `loading` looks for it.

    Raises:
        subprocess.CalledProcessError: if the compiler fails; it has printed why.
    """
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    kind = ["-DNMT_MOE_X86"] if is_x86 else []
    torch_folder = Path(torch.__file__).parent
    target = library_path()
    target.parent.mkdir(exist_ok=True)
    # Beside the final path, so that only a complete library appears there.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = []

        def compile_file(source: str, name: str, flags: list[str]) -> None:
            objects.append(f"{folder}/{name}.o")
            files = ["-c", str(SOURCES / source), "-o", objects[-1]]
            subprocess.run([compiler, *COMMON, *kind, *flags, *files], check=True)

        for level, flags in LEVELS.items() if is_x86 else [("plain", [])]:
            compile_file("loops.cpp", level, [*LOOPS, *flags, f"-DNMT_MOE_LEVEL={level}"])
        includes = ["-isystem", str(torch_folder / "include")]
        # OpenMP's functions come from torch: a second OpenMP library would start its own threads.
        compile_file("library.cpp", "library", ["-O2", "-fopenmp", "-DNDEBUG", *includes])
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        made = Path(folder) / target.name
        subprocess.run([compiler, "-shared", *objects, "-o", str(made), *libraries], check=True)
        made.replace(target)
    return target


def main() -> None:
    """Run from the command line."""
    compiler = find_compiler()
    if compiler is None:
        sys.exit("There is no C++ compiler (Debian: apt-get install g++).")
    try:
        print(build(compiler))  # noqa: T201
    except subprocess.CalledProcessError as error:
        sys.exit(f"{compiler} failed with status {error.returncode}.")


if __name__ == "__main__":
    main()
