"""Collect facts for bug reports: versions, processor, memory and devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from nmt_moe import __version__
from nmt_moe.diagnostics.requirements import HOST, compare_requirements, describe, known_extras

# Instruction sets that make matrix products much faster.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")
COMPILERS = ("c++", "g++", "clang++")
# Prefixes of environment variables that change how the programs behave.
VARIABLES = ("NMT_MOE_", "OMP_", "MKL_", "MALLOC_", "CUDA_", "NCCL_", "TORCH", "TRITON_", "PYTHON")
GIB = 2**30

Facts = dict[str, dict[str, Any]]


def collect_facts() -> Facts:
    """Return facts about this installation, by group and name.

    A fact that cannot be determined is None. Paths in the home folder begin with `~`.
    """
    return {
        "software": _software(),
        "packages": _packages(),
        "processor": _processor(),
        "memory": _memory(),
        "devices": _devices(),
        "environment": _environment(),
    }


def _software() -> dict[str, Any]:
    return {
        "nmt_moe": f"{__version__}{_commit()}",
        "folder": _shorten(str(Path(__file__).parents[1])),
        "Python": f"{platform.python_version()} ({_shorten(sys.executable)})",
        "system": f"{platform.platform()}, {platform.machine()}",
        "compiler": _compiler(),
    }


def _packages() -> dict[str, Any]:
    needed = compare_requirements()
    every = {**compare_requirements(tuple(known_extras())), **needed}
    found = {
        name: fault or version
        for name, (version, fault) in sorted(every.items(), key=lambda item: item[0].lower())
        if name in needed or version is not None
    }
    for name in (f"{HOST}-fixed", HOST):
        try:
            return {**found, HOST: f"{importlib.metadata.version(name)} ({name})"}
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, HOST: "not installed: needed only for training"}


def _processor() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    table = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = (table.get("flags") or table.get("Features") or "").split()
    model = table.get("model name") or platform.processor() or None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "cores": f"{usable} of {os.cpu_count()} usable by this process",
        "instructions": ", ".join(name for name in FEATURES if name in flags) or None,
        "torch uses": _ask_torch(lambda torch: torch.backends.cpu.get_cpu_capability()),
        "threads": _ask_torch(lambda torch: torch.get_num_threads()),
    }


def _memory() -> dict[str, Any]:
    table = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            table[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    limit: str | None = "none"
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            number = int(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        limit = _gib(number) if number < 2**60 else "none"
        break
    disk = shutil.disk_usage(Path.cwd())
    return {
        "total": _gib(table.get("MemTotal")),
        "available": _gib(table.get("MemAvailable")),
        "container limit": limit,
        "free disk space": f"{_gib(disk.free)} of {_gib(disk.total)}",
        "shared memory": _gib(_free("/dev/shm")),
    }


def _devices() -> dict[str, Any]:
    def describe_all(torch: Any) -> dict[str, Any]:
        if not torch.cuda.is_available():
            build = torch.version.cuda or torch.version.hip
            how = "without CUDA" if build is None else f"for CUDA or ROCm {build}"
            return {"GPU": f"none that torch can use; torch is built {how}"}
        found: dict[str, Any] = {"torch's CUDA": torch.version.cuda or torch.version.hip}
        for index in range(torch.cuda.device_count()):
            one = torch.cuda.get_device_properties(index)
            free = torch.cuda.mem_get_info(index)[0]
            found[f"GPU {index}"] = (
                f"{one.name}, compute capability {one.major}.{one.minor}, "
                f"{_gib(one.total_memory)}, {_gib(free)} free"
            )
        return found

    found = _ask_torch(describe_all)
    return found if isinstance(found, dict) else {"GPU": found}


def _environment() -> dict[str, Any]:
    names = sorted(name for name in os.environ if name.startswith(VARIABLES))
    return {name: _shorten(os.environ[name]) for name in names}


def _ask_torch(question: Any) -> Any:
    """Return `question(torch)`, or a description of the error that it raises."""
    try:
        import torch

        return question(torch)
    except Exception as error:  # a broken installation or driver may raise anything
        return describe(error)


def _commit() -> str:
    """Return the commit, and whether the code is modified, if it runs from a git clone."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return ""
    commit = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    status = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f", commit {commit or 'unknown'}{', altered' if status else ''}"


def _compiler() -> str | None:
    """Return the first line of the C++ compiler's version text."""
    given = os.environ.get("CXX")
    for name in (given.split()[0],) if given and given.strip() else COMPILERS:
        if shutil.which(name) is not None:
            lines = (_output(name, "--version") or "").splitlines()
            return f"{name}: {lines[0] if lines else 'does not run'}"
    return None


def _output(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _free(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _gib(number: int | None) -> str | None:
    return None if number is None else f"{number / GIB:.1f} GiB"


def _shorten(text: str) -> str:
    """Replace the home folder with ~, so that a report can be pasted without a user's name."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text
