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
from concurrent.futures import ThreadPoolExecutor
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
# The files of operators, which include torch's headers.
OPERATORS = ("training", "products", "inference", "search")
# These flags turn off floating-point exceptions, which would prevent vectorisation.
LOOPS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
# The files of loops. In the first two, only the multiply-adds that the source spells out are
# allowed, so that an element's bits do not depend on its position in a vector.
CONTRACTIONS = {"loops": "off", "inference_loops": "off", "panels": "fast"}


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
        includes = ["-isystem", str(torch_folder / "include")]
        # OpenMP's functions come from torch, because a second OpenMP library would start threads of
        # its own.
        operators = ["-O2", "-fopenmp", "-DNDEBUG", *includes]
        jobs = [(name, name, operators) for name in OPERATORS]
        for level, flags in LEVELS.items() if is_x86 else [("plain", [])]:
            for name, contraction in CONTRACTIONS.items():
                own = [*LOOPS, *flags, f"-ffp-contract={contraction}", f"-DNMT_MOE_LEVEL={level}"]
                jobs.append((name, f"{name}-{level}", own))

        def compile_file(job: tuple[str, str, list[str]]) -> str:
            source, name, flags = job
            files = ["-c", str(SOURCES / f"{source}.cpp"), "-o", f"{folder}/{name}.o"]
            subprocess.run([compiler, *COMMON, *kind, *flags, *files], check=True)
            return files[-1]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_file, jobs))
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
