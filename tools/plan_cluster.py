#!/usr/bin/env python3
"""Tell what a training step takes of each device of a cluster. Nothing is allocated.

    plan_cluster.py --arch lstm_moe_lm_100b_131072h --devices 128 --optimizer factored_adam
    plan_cluster.py --arch lstm_moe_gnmt --num-experts 256 --devices 8 --device a100 --json

Further flags are options of the model, as of fairseq-train. Experts are spread over as many devices
as divide the number of devices and that of experts (or groups), unless --expert-parallel-size says
otherwise; everything else is on every device. For each device:

  memory    weights, gradients and the optimizer's state are exact. Activations are what the forward
            pass keeps, temporaries the gradients of the logits and legacy_ddp's buffer. The sum is
            an upper bound: gradients come while activations go. A plan fits if it fills 90 %.
  traffic   bytes sent in a step: tokens to their experts and back (where all experts are equally
            likely), sums for the balance losses, gradients summed up in a ring.
  time      of one batch and the update after it. Products take the longer of their operations (at
            --utilisation of the device's FLOP/s) and of reading their weights; the optimizer is
            bound by memory, traffic by the link. Nothing overlaps, and everything else is left out.

Bytes are tested against real processes. Times are a model: nothing here was measured on a cluster.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nmt_moe.checks import check_range
from nmt_moe.nn import GNMTConfig, LSTMLMConfig
from tools.activations import Batch
from tools.cluster import DEVICES, FILLED, Device, Plan, Setup, halved_until_fits, make_plan
from tools.networks import VOCABULARY, choose, find_options, lay_out, make_config
from tools.printing import run

PRECISIONS = {
    "fp32": "fp32",
    "fp16": "half",
    "bf16": "half",
    "memory-efficient-fp16": "memory-efficient",
    "memory-efficient-bf16": "memory-efficient",
}
DRAWS = 8192
MOST_DEVICES = 4096


def make_setup(args: argparse.Namespace, config: LSTMLMConfig | GNMTConfig) -> Setup:
    """Turn the flags into a setup.

    Raises:
        ValueError: naming the flag, its rule and its value.
    """
    check_range("--devices", args.devices, 1)
    check_range("--sentences", args.sentences, 1)
    check_range("--length", args.length, 1)
    vocab_size = args.vocab_size or VOCABULARY[type(config)]
    check_range("--vocab-size", vocab_size, 1)
    check_range("--sampled-softmax", args.sampled_softmax, 0, vocab_size)
    if args.sampled_softmax and isinstance(config, GNMTConfig):
        raise ValueError(
            f"`--sampled-softmax` must be 0 for a translation model, but is {args.sampled_softmax}."
        )
    precision = PRECISIONS[args.precision]
    batch = Batch(
        args.sentences,
        args.length,
        vocab_size,
        args.sampled_softmax,
        4 if precision == "fp32" else 2,
        DEVICES[args.device].is_cpu,
    )
    size = args.expert_parallel_size
    check_range("--expert-parallel-size", size, 0)
    is_factored = args.optimizer == "factored_adam"
    setup = Setup(config, batch, args.devices, 1, is_factored, precision)
    if size == 0 or not setup.num_moe_layers:
        size = largest_size(setup)
    return replace(setup, size=size)


def largest_size(setup: Setup) -> int:
    """Return the largest number of devices that can share the experts, as fairseq-train takes."""
    if not setup.num_moe_layers or setup.moe is None:
        return 1
    return math.gcd(setup.devices, setup.moe.num_groups or setup.moe.num_experts)


def make_device(args: argparse.Namespace) -> Device:
    """Give the preset with what the flags change.

    Raises:
        ValueError: naming the flag, its rule and its value.
    """
    device = DEVICES[args.device]
    given = {
        "memory": args.memory and args.memory * 1e9,
        "memory_bandwidth": args.memory_bandwidth and args.memory_bandwidth * 1e9,
        "bandwidth": args.bandwidth and args.bandwidth * 1e9,
        "flops" if args.precision == "fp32" else "half_flops": args.tflops and args.tflops * 1e12,
    }
    for flag in ("memory", "memory_bandwidth", "bandwidth", "tflops", "utilisation"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            raise ValueError(
                f"`--{flag.replace('_', '-')}` must be greater than 0, but is {value}."
            )
    check_range("--utilisation", args.utilisation, 0, 1)
    device = replace(device, **{name: value for name, value in given.items() if value})
    if args.precision != "fp32" and not device.half_flops:
        raise ValueError(
            f"`--precision` must be fp32 on a {args.device}, whose FLOP/s in half precision are "
            f"not known, but is {args.precision}. Give them with --tflops, or choose another "
            "--device."
        )
    return device


def changes(setup: Setup, device: Device) -> Iterator[tuple[str, Setup]]:
    """Yield what could be changed, one at a time, the cheapest first."""
    if setup.num_moe_layers and not setup.factored:
        yield "--optimizer factored_adam", replace(setup, factored=True)
    is_lm = isinstance(setup.config, LSTMLMConfig)
    if is_lm and not setup.batch.num_draws and setup.batch.vocab_size > DRAWS:
        batch = replace(setup.batch, num_draws=DRAWS)
        yield f"--sampled-softmax {DRAWS}", replace(setup, batch=batch)
    if setup.moe is not None and setup.num_moe_layers and not setup.moe.recomputes:
        moe = replace(setup.moe, recompute="always")
        recomputing = replace(setup, config=replace(setup.config, moe=moe))
        yield "--expert-recompute always", recomputing
    if setup.precision != "memory-efficient" and device.half_flops:
        batch = replace(setup.batch, number_bytes=2)
        half = replace(setup, batch=batch, precision="memory-efficient")
        yield "--precision memory-efficient-bf16", half
    fewer = halved_until_fits(setup, device)
    if fewer != setup:
        yield f"--sentences {fewer.batch.sentences} (and a larger --update-freq)", fewer
    if setup.num_moe_layers:
        more = setup
        while more.devices < MOST_DEVICES and not make_plan(more, device, 1.0).fits:
            more = replace(more, devices=2 * more.devices, size=1)
            more = replace(more, size=largest_size(more))
        if more.size > setup.size:
            yield f"--devices {more.devices}", more


def advise(setup: Setup, device: Device) -> list[str]:
    """Tell which single changes make a setup fit; if none does, which do together.

    Returns:
        Ways, each of them enough; empty if there is none.
    """
    found = list(changes(setup, device))
    ways = [name for name, changed in found if make_plan(changed, device, 1.0).fits]
    if ways:
        return ways
    names, current = [], setup
    while not make_plan(current, device, 1.0).fits:
        left = [(name, changed) for name, changed in changes(current, device) if changed != current]
        if not left:
            return []
        # What saves the most memory, next.
        name, current = min(left, key=lambda way: make_plan(way[1], device, 1.0).total_memory)
        names.append(name)
    return [" with ".join(names)]


def in_bytes(count: float) -> str:
    """Write a number of bytes in GB, or MB where it is small."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


def layout(name: str, setup: Setup, plan: Plan, device: Device, ways: Sequence[str]) -> str:
    """Lay a plan out for people."""
    local, everywhere = plan.parameters
    batch = setup.batch
    lines = [
        f"{name}: {everywhere / 1e6:.1f}M parameters, {local / 1e6:.1f}M of them on each of "
        f"{setup.devices} devices; {setup.size} share the experts",
        f"{batch.sentences} sentences of {batch.length} tokens a device, "
        f"{batch.vocab_size} symbols",
        "",
    ]
    rows = [["memory of a device", ""]]
    rows += [[f"  {part}", in_bytes(count)] for part, count in plan.memory.items()]
    rows += [["  all", in_bytes(plan.total_memory)]]
    rows += [["activations", ""]]
    rows += [[f"  {part}", in_bytes(count)] for part, count in plan.activations.items() if count]
    rows += [["sent by a device in a step", ""]]
    rows += [[f"  {part}", in_bytes(count)] for part, count in plan.traffic.items()]
    rows += [["time of a step", ""]]
    rows += [[f"  {part}", f"{seconds * 1e3:.1f} ms"] for part, seconds in plan.seconds.items()]
    rows += [["  all", f"{sum(plan.seconds.values()) * 1e3:.1f} ms"]]
    lines += [lay_out(rows), ""]
    limit = f"{FILLED:.0%} of {in_bytes(device.memory)}"
    if plan.fits:
        lines.append(f"It fits: {in_bytes(plan.total_memory)} of at most {limit}.")
    else:
        lines.append(f"It does not fit: {in_bytes(plan.total_memory)}, but at most {limit} may be.")
        lines += [f"  It fits with {way}." for way in ways]
        if not ways:
            lines.append("  No change known here makes it fit: use devices with more memory.")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    presets = "; ".join(f"{name}: {device.source}" for name, device in DEVICES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Devices. {presets}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--arch", required=True, metavar="NAME", help="architecture of this project")
    add("--devices", type=int, default=1, help="their number (1)")
    add("--device", choices=DEVICES, default="a100", help="preset (a100)")
    add("--tflops", type=float, help="1e12 operations per second in --precision (the preset's)")
    add("--memory", type=float, metavar="GB", help="of a device (the preset's)")
    add("--memory-bandwidth", type=float, metavar="GB/S", help="(the preset's)")
    add("--bandwidth", type=float, metavar="GB/S", help="of its link, one way (the preset's)")
    add(
        "--utilisation",
        type=float,
        default=0.3,
        help="share of the FLOP/s that products reach (0.3; 1.23 of 4.29 TFLOP/s in Table 8)",
    )
    add("--sentences", type=int, default=160, help="of a batch on a device (160)")
    add("--length", type=int, default=25, help="tokens of a sentence, on both sides (25)")
    add("--vocab-size", type=int, default=0, help="symbols (793471; translation 32000)")
    add("--sampled-softmax", type=int, default=0, help="draws, as of fairseq-train (0)")
    add("--optimizer", choices=["adam", "factored_adam"], default="adam", help="(adam)")
    add("--precision", choices=PRECISIONS, default="fp32", help="(fp32)")
    add("--expert-parallel-size", type=int, default=0, help="devices that share the experts (0)")
    add("--json", action="store_true", help="print exact numbers as JSON")
    return parser


def read_model_flags(options: Any, args: argparse.Namespace, flags: Sequence[str]) -> Any:
    """Turn an architecture and the options that change it into the network's sizes."""
    from fairseq.dataclass.utils import gen_parser_from_dataclass

    parser = argparse.ArgumentParser(
        argument_default=argparse.SUPPRESS, prog="plan_cluster.py", allow_abbrev=False
    )
    gen_parser_from_dataclass(parser, options(), delete_default=True)
    given = vars(parser.parse_args(flags))
    return make_config(options, argparse.Namespace(**{**vars(args), **given}))


def main(arguments: Sequence[str] | None = None) -> int:
    args, flags = build_parser().parse_known_args(arguments)
    try:
        known = find_options()
        choose([args.arch], list(known))
        setup = make_setup(args, read_model_flags(*known[args.arch], flags))
        device = make_device(args)
        plan = make_plan(setup, device, args.utilisation)
        ways = [] if plan.fits else advise(setup, device)
    except ValueError as error:
        named = re.sub(r"`(\w+)`", lambda name: f"`--{name[1].replace('_', '-')}`", str(error))
        sys.stderr.write(f"error: {named}\n")
        return 1
    if args.json:
        found = {
            "architecture": args.arch,
            "setup": asdict(setup),
            "device": asdict(device),
            **asdict(plan),
            "total_memory": plan.total_memory,
            "step_seconds": sum(plan.seconds.values()),
            "fits": plan.fits,
            "fits_with": ways,
        }
        print(json.dumps(found, indent=1))
    else:
        print(layout(args.arch, setup, plan, device, ways))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
