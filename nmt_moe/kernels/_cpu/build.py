"""Compile the library: `python -m nmt_moe.kernels._cpu.build`.

This needs a C++ compiler (`CXX`, otherwise c++ or g++) and takes half a minute. Without the
library, torch's own, slower operations run instead.
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

# Compiler flags for each level of vector instructions. The loops are compiled once per level, and
# each call uses the highest level that the processor supports.
LEVELS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
COMMON = ["-std=c++20", "-fPIC"]
# These flags allow multiply-adds only where the source spells them out, and turn off floating-point
# exceptions, which would prevent vectorisation.
LOOPS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def find_compiler() -> str | None:
    """Return the path of the C++ compiler, or None if there is none."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["c++", "g++"])), None)


def build(compiler: str) -> Path:
    """Compile the library, put it where `loading` looks for it, and return its path.

    Raises:
        subprocess.CalledProcessError: if the compiler fails, after it has printed the reason.
    """
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    kind = ["-DNMT_MOE_X86"] if is_x86 else []
    torch_folder = Path(torch.__file__).parent
    target = library_path()
    target.parent.mkdir(exist_ok=True)
    # Compile in a folder beside the final path, so that only a complete library appears there.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = []

        def compile_file(source: str, name: str, flags: list[str]) -> None:
            objects.append(f"{folder}/{name}.o")
            files = ["-c", str(SOURCES / source), "-o", objects[-1]]
            subprocess.run([compiler, *COMMON, *kind, *flags, *files], check=True)

        for level, flags in LEVELS.items() if is_x86 else [("plain", [])]:
            compile_file("loops.cpp", level, [*LOOPS, *flags, f"-DNMT_MOE_LEVEL={level}"])
        includes = ["-isystem", str(torch_folder / "include")]
        # OpenMP's functions come from torch, because a second OpenMP library would start threads of
        # its own.
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
        sys.exit("No C++ compiler was found. Install one (Debian: apt-get install g++) or set CXX.")
    try:
        print(build(compiler))  # noqa: T201
    except subprocess.CalledProcessError as error:
        sys.exit(f"{compiler} failed with status {error.returncode}.")


if __name__ == "__main__":
    main()
