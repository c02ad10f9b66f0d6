"""Run one part of the checks and timings on a GPU; gpu_session.sh runs all parts in order.

    python -m benchmarks.gpu_session rows --out OUT
    python -m benchmarks.gpu_session rows --out OUT --dry-run    # tiny, under Triton's interpreter

The program prints a Markdown table. It exits with status 1 if a result is wrong.
"""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*CHECKS, *TABLES])
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for the results of all parts",
    )
    parser.add_argument("--tiny", action="store_true", help="use tiny sizes, as under a sanitizer")
    parser.add_argument("--dry-run", action="store_true", help="use tiny sizes and no GPU")
    return parser.parse_args(words)


def describe_machine(device: str, tiny: bool, out: Path) -> str:
    """Report versions and clocks, try every kernel, and measure the GPU's top speeds."""
    import torch
    import triton

    from benchmarks import gpu_times, timing
    from nmt_moe.kernels import _trial

    facts = [["torch", torch.__version__], ["Triton", triton.__version__]]
    if device == "cuda":
        facts += [["GPU", torch.cuda.get_device_name()], ["CUDA", str(torch.version.cuda)]]
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            found = "nvidia-smi failed"
        facts.append([query.replace(",", ", "), found.strip()])
    trials = []
    cases = _trial.GATINGS[: 1 if tiny else None]
    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch.object(_trial, "GATINGS", cases),
    ):
        warnings.simplefilter("always")
        for kernel in _trial.TRIALS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if kernel in ("gating", "gate_logits") and dtype != torch.float32:
                    continue
                is_sound = _trial.is_sound(kernel, torch.device(device), dtype)
                trials.append([kernel, str(dtype), "passes" if is_sound else "FAILS"])
    tables = [
        timing.markdown_table(["", ""], facts),
        timing.markdown_table(["kernel", "dtype", "trial"], trials),
        *(str(warning.message) for warning in caught),
    ]
    if _trial.failed():
        print("\n\n".join(tables))
        sys.exit("A kernel failed its trial.")
    return "\n\n".join([*tables, gpu_times.measure_ceilings(device, tiny, out)])


def run_check(name: str, device: str, tiny: bool) -> str:
    """Run one of the checks; after the first wrong result, print the check's table and exit."""
    import torch

    from benchmarks import gpu_checks, gpu_report

    torch.manual_seed(1)
    report = gpu_report.Report()
    try:
        gpu_checks.CHECKS[name](report, device, tiny)
    except gpu_report.WrongResultError as error:
        print(report.table())
        sys.exit(str(error))
    return report.table()


def run_times(name: str) -> Callable[[str, bool, Path], str]:
    """Return a wrapper that imports and calls a function of `gpu_times`."""

    def run(device: str, tiny: bool, out: Path) -> str:
        from benchmarks import gpu_times

        return getattr(gpu_times, name)(device, tiny, out)

    return run


CHECKS = ("rows", "gating", "adam", "layer", "products")
TABLES: dict[str, Callable[[str, bool, Path], str]] = {
    "machine": describe_machine,
    "kernels": run_times("time_kernels"),
    "sweep-products": run_times("sweep_products"),
    "sweep-adam": run_times("sweep_adam"),
    "profile": run_times("profile_layer"),
}


def main() -> None:
    """Run one part."""
    args = parse()
    device = "cpu" if args.dry_run else "cuda"
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    os.environ["NMT_MOE_KERNELS"] = "triton"  # otherwise torch's operations might be measured
    import torch

    from nmt_moe.kernels import _backend

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU. Use --dry-run, which needs none.")
    args.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if args.dry_run:  # take the code paths for a GPU
            for name, types in (("TRITON_DEVICES", {"cpu"}), ("HOST_DEVICES", set())):
                stack.enter_context(mock.patch.object(_backend, name, frozenset(types)))
        tiny = args.tiny or args.dry_run
        if args.part in CHECKS:
            print(run_check(args.part, device, tiny))
        else:
            print(TABLES[args.part](device, tiny, args.out))


if __name__ == "__main__":
    main()
