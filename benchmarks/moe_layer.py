"""Time an MoE layer against the bare matrix products of its experts, and against other libraries.

    python -m benchmarks.moe_layer --list
    python -m benchmarks.moe_layer --check --peers all
    python -m benchmarks.moe_layer --peers all --grid paper --threads 2 --json paper.json
    python -m benchmarks.moe_layer --shape 4096,512,1024,32,4 --peers deepspeed_dropless
    python -m benchmarks.moe_layer --grid scaling --json scaling.json --plot scaling.png
    python -m benchmarks.moe_layer --render paper.json

Modes: "forward" is an evaluation pass without gradients, "fwd+bwd" is a training pass that creates
the gradients of tokens and weights, "step" adds the optimizer to this pass, and "gate" is the
forward and backward pass of nmt_moe's gate without experts. Limits: "gemm" does as many operations
as the experts, in dense products over all k T rows, and "bmm" does as many in products with n
weight matrices and equal numbers of rows; neither allocates memory. Tokens and the logits of the
random gates are standard normal, so experts get unequal numbers of tokens, as in training.

Each competitor runs in its own process, and is measured once in each round.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import moe_gating, timing
from benchmarks.moe_check import check_all
from benchmarks.moe_layers import OWN, PLAIN
from benchmarks.moe_limits import LIMITS
from benchmarks.moe_peers import LAYERS, PEERS, missing_packages
from benchmarks.moe_plot import draw
from benchmarks.moe_points import GRIDS, MODES, TRAINING, Point, parse_shape
from benchmarks.moe_rounds import play_point
from benchmarks.moe_tables import format_all


def choose_peers(words: list[str]) -> list[str]:
    """Return the requested peers, with "all" replaced by those that can be imported.

    Raises:
        SystemExit: if a peer is unknown, or was requested but is not installed.
    """
    others = {**PEERS, **PLAIN}
    unknown = [word for word in words if word != "all" and word not in others]
    if unknown:
        known, wrong = ", ".join(others), ", ".join(unknown)
        sys.exit(f"--peers must be all or some of {known}, but contains {wrong}.")
    named = [word for word in words if word != "all"]
    names = list(dict.fromkeys([*named, *(PEERS if "all" in words else ())]))
    missing = missing_packages(names)
    for name, requirement in missing.items():
        message = f"{name} is not installed: pip install {requirement}"
        if name in named:
            sys.exit(f"--peers: {message}, or use --peers all, which leaves it out.")
        timing.say(f"left out: {message}")
    return [name for name in names if name not in missing]


def list_all() -> str:
    """Describe every competitor and every grid."""
    missing = missing_packages(list(PEERS))
    lines = [[name, "limit", note] for name, note in LIMITS.items()]
    lines += [[name, "gate's arithmetic", ""] for name in moe_gating.NAMES]
    for name, layer in LAYERS.items():
        kind = "own" if name in OWN else "plain torch" if name in PLAIN else "peer"
        lines.append([name, f"{kind}, not installed" if name in missing else kind, layer.notes])
    table = "\n".join(f"{name:22}{kind:20}{note}" for name, kind, note in lines)
    grids = "\n".join(
        f"{name + ':':14}{point}, {' '.join(point.modes)}"
        for name, points in GRIDS.items()
        for point in points
    )
    return f"{table}\n\n{grids}"


def choose_points(args: argparse.Namespace) -> list[Point]:
    """Return the points of --shape, or the points of --grid that have any of --modes.

    Raises:
        SystemExit: if --only does not name one of these points.
    """
    if args.shape:
        modes = tuple(mode for mode in MODES if mode in (args.modes or TRAINING))
        return [dataclasses.replace(point, modes=modes) for point in args.shape]
    wanted = args.modes or MODES
    grid = GRIDS[args.grid]
    if args.only is not None and not 1 <= args.only <= len(grid):
        sys.exit(f"--only must be from 1 to {len(grid)} for {args.grid}, but is {args.only}.")
    points = [
        dataclasses.replace(point, modes=tuple(mode for mode in point.modes if mode in wanted))
        for number, point in enumerate(grid, 1)
        if args.only in (None, number)
    ]
    return [point for point in points if point.modes]


def measure(args: argparse.Namespace, peers: list[str]) -> dict[str, Any]:
    """Measure all points, saving the results after each."""
    hardware = timing.describe_hardware(args.device, args.threads)
    document: dict[str, Any] = {"settings": vars(args), "hardware": hardware, "rows": []}
    with tempfile.NamedTemporaryFile("w", prefix="moe_layer_", suffix=".log", delete=False) as log:
        timing.say(f"competitors' output: {log.name}")
        match_of = {
            "device": args.device,
            "threads": args.threads,
            "step_limit": args.step_limit,
            "log": log,
        }
        for point in choose_points(args):
            document["rows"].append(play_point(point, peers, args.rounds, match_of))
            timing.write_json(args.json, args, hardware, document["rows"])
    return document


def finish(document: dict[str, Any], plot: Path | None) -> None:
    """Print the tables, and draw the plot if a file is given."""
    print(format_all(document))
    if plot is not None:
        try:
            draw(document, plot)
        except ValueError as error:
            sys.exit(str(error))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers",
        default="",
        metavar="NAMES",
        help="layers to compare with, separated by commas; all means every installed library",
    )
    parser.add_argument("--grid", default="paper", choices=list(GRIDS), help="sizes (paper)")
    parser.add_argument(
        "--shape",
        action="append",
        type=parse_shape,
        metavar="T,d,h,n,k[,groups]",
        help="tokens, width, hidden width, experts, experts per token; instead of --grid",
    )
    parser.add_argument("--only", type=int, metavar="N", help="measure only the grid's Nth point")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        help="modes to measure (with --grid, only modes that the grid has)",
    )
    parser.add_argument(
        "--step-limit",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="abandon a layer if its step takes longer than this many seconds (60)",
    )
    parser.add_argument("--list", action="store_true", help="list layers and grids, and exit")
    parser.add_argument(
        "--check", action="store_true", help="compare with a dense definition, and exit"
    )
    parser.add_argument(
        "--render", type=Path, metavar="FILE", help="print the tables of a file that --json wrote"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="plot the time of a step against the number of experts",
    )
    timing.add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    args = make_parser().parse_args(argv)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot: matplotlib is not installed: pip install matplotlib.")
    if args.list:
        print(list_all())
        return
    if args.render is not None:
        if not args.render.is_file():
            sys.exit(f"--render: there is no file {args.render}. Make one with --json.")
        finish(json.loads(args.render.read_text()), args.plot)
        return
    timing.prepare(args)
    peers = choose_peers([word for word in args.peers.split(",") if word])
    if args.check or args.device == "cuda":
        # Tests without a GPU do not cover the kernels that run on one.
        own = [name for name in OWN if not name.endswith("_adam")]
        dtypes = ["float32", "bfloat16"] if args.device == "cuda" else ["float32"]
        names = [*own, *PLAIN] if args.device == "cuda" else own
        table, all_agree = check_all(list(dict.fromkeys([*names, *peers])), args.device, dtypes)
        print(f"{table}\n")
        if args.check:
            sys.exit(not all_agree)
    finish(measure(args, peers), args.plot)


if __name__ == "__main__":
    main()
