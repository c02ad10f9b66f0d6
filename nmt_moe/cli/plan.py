"""`nmt-moe plan`: predict the cost of a training step on each device of a cluster."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import click

from nmt_moe.checks import check_range
from nmt_moe.cli._command import command
from nmt_moe.cli.card import align
from nmt_moe.nn import GNMTConfig
from nmt_moe.planning import (
    DEVICES,
    FILLED,
    VOCABULARY,
    Batch,
    Device,
    NetworkConfig,
    Plan,
    Setup,
    check_known,
    find_options,
    make_config,
    make_plan,
)
from nmt_moe.planning.advice import advise, largest_size

PRECISIONS = {
    "fp32": "fp32",
    "fp16": "half",
    "bf16": "half",
    "memory-efficient-fp16": "memory-efficient",
    "memory-efficient-bf16": "memory-efficient",
}
PRESETS = "; ".join(f"{name}: {device.source}" for name, device in DEVICES.items())
EXAMPLES = """
nmt-moe plan --arch lstm_moe_lm_100b_131072h --devices 128 --optimizer factored_adam
nmt-moe plan --arch lstm_moe_gnmt --num-experts 256 --devices 8 --device a100 --json
nmt-moe plan --arch lstm_moe_gnmt --model-dim 256 --lstm-hidden-dim 512 --device cpu
"""


@command(
    "plan",
    EXAMPLES,
    epilog=f"Devices. {PRESETS}.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.option("--arch", required=True, metavar="NAME", help="Architecture of this project.")
@click.option("--devices", default=1, show_default=True, help="Number of devices.")
@click.option(
    "--device",
    type=click.Choice(list(DEVICES)),
    default="a100",
    show_default=True,
    help="Device that supplies the figures not set by the options below.",
)
@click.option("--tflops", type=float, help="Peak speed at --precision, in TFLOP/s [preset].")
@click.option("--memory", type=float, metavar="GB", help="Memory per device [preset].")
@click.option(
    "--memory-bandwidth", type=float, metavar="GB/S", help="Memory bandwidth per device [preset]."
)
@click.option(
    "--bandwidth", type=float, metavar="GB/S", help="Bandwidth of a link in one direction [preset]."
)
@click.option(
    "--utilisation",
    default=0.3,
    show_default=True,
    help="Share of the peak FLOP/s that matrix products reach (1.23 of 4.29 TFLOP/s in Table 8).",
)
@click.option(
    "--sentences",
    default=160,
    show_default=True,
    help="Number of sentences in each device's batch.",
)
@click.option(
    "--length", default=25, show_default=True, help="Number of tokens per sentence, on each side."
)
@click.option("--vocab-size", default=0, help="Vocabulary size [793471; for translation, 32000].")
@click.option(
    "--sampled-softmax",
    default=0,
    show_default=True,
    help="Number of sampled symbols, as in fairseq-train.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adam", "factored_adam"]),
    default="adam",
    show_default=True,
    help="Optimizer to plan for.",
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="Type of weights and activations.",
)
@click.option(
    "--expert-parallel-size",
    default=0,
    help="Number of devices that the experts are divided among; 0: as many as possible.",
)
@click.option("--json", "as_json", is_flag=True, help="Print exact numbers as JSON.")
@click.pass_context
def plan(ctx: click.Context, **values: Any) -> None:
    """Predict the cost of a training step on each device of a cluster, without running it.

    The command also takes the model's options, as in fairseq-train. Experts are spread over the
    largest number of devices that divides both the number of devices and the number of experts (or
    groups); all other parameters are on every device.

    Memory: weights, gradients and optimizer state are exact. Activations are the values that the
    forward pass keeps; temporaries are the gradients of the logits and the buffer of legacy_ddp.
    The sum is an upper bound, because activations are freed while gradients are created. A plan
    fits if it fills at most 90 % of the memory.

    Traffic: the bytes that a device sends in a step. They carry tokens to the experts and back
    (assuming that all experts are equally likely), the sums for the balance losses, and the
    gradients of the ring all-reduce.

    Time: the time for one batch and the update after it. A matrix product takes as long as its
    operations (at --utilisation times the device's FLOP/s) or as reading its weights, whichever is
    longer; the optimizer is bound by memory bandwidth, and traffic by the link. The prediction
    assumes that nothing overlaps, and ignores everything else.

    Byte counts are tested against real processes. Times are only predictions, which have not been
    compared with a real cluster.
    """
    args = argparse.Namespace(**values)
    try:
        known = find_options()
        check_known([args.arch], list(known))
        setup = make_setup(args, read_model_options(*known[args.arch], ctx.args))
        device = make_device(args)
    except ValueError as error:
        named = re.sub(r"`(\w+)`", lambda name: f"`--{name[1].replace('_', '-')}`", str(error))
        raise ValueError(named) from error
    found = make_plan(setup, device, args.utilisation)
    ways = [] if found.fits else advise(setup, device)
    if args.as_json:
        document = {
            "architecture": args.arch,
            "setup": asdict(setup),
            "device": asdict(device),
            **asdict(found),
            "total_memory": found.total_memory,
            "step_seconds": sum(found.seconds.values()),
            "fits": found.fits,
            "fits_with": ways,
        }
        click.echo(json.dumps(document, indent=1))
    else:
        click.echo(lay_out_plan(args.arch, setup, found, device, ways))


def read_model_options(
    options: Any, args: argparse.Namespace, given: Sequence[str]
) -> NetworkConfig:
    """Return the network's sizes for an architecture and the options that change it."""
    from fairseq.dataclass.utils import gen_parser_from_dataclass

    parser = argparse.ArgumentParser(
        argument_default=argparse.SUPPRESS, prog="nmt-moe plan", allow_abbrev=False
    )
    gen_parser_from_dataclass(parser, options(), delete_default=True)
    changed = vars(parser.parse_args(list(given)))
    return make_config(options, argparse.Namespace(**{**vars(args), **changed}))


def make_setup(args: argparse.Namespace, config: NetworkConfig) -> Setup:
    """Build a setup from the options.

    Raises:
        ValueError: if an option is out of range. The message gives the option, the constraint and
            the value.
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


def make_device(args: argparse.Namespace) -> Device:
    """Return the preset device with the figures that the options set.

    Raises:
        ValueError: if an option is out of range. The message gives the option, the constraint and
            the value.
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
            f"`--precision` must be fp32, but is {args.precision}: the FLOP/s of a {args.device} "
            "in half precision are not known. Set them with --tflops, or choose another --device."
        )
    return device


def in_bytes(count: float) -> str:
    """Format a number of bytes in GB, or in MB if it is small."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


def lay_out_plan(name: str, setup: Setup, plan: Plan, device: Device, ways: Sequence[str]) -> str:
    """Return a plan as text."""
    local, everywhere = plan.parameters
    batch = setup.batch
    lines = [
        f"{name}: {everywhere / 1e6:.1f}M parameters, {local / 1e6:.1f}M of them on each "
        f"device; devices: {setup.devices}; experts divided among: {setup.size}",
        f"{batch.sentences} sentences of {batch.length} tokens on each device, "
        f"{batch.vocab_size} symbols",
        "",
    ]
    rows = [["memory per device", ""]]
    rows += [[f"  {part}", in_bytes(count)] for part, count in plan.memory.items()]
    rows += [["  total", in_bytes(plan.total_memory)]]
    rows += [["activations", ""]]
    rows += [[f"  {part}", in_bytes(count)] for part, count in plan.activations.items() if count]
    rows += [["sent per device in a step", ""]]
    rows += [[f"  {part}", in_bytes(count)] for part, count in plan.traffic.items()]
    rows += [["time per step", ""]]
    rows += [[f"  {part}", f"{seconds * 1e3:.1f} ms"] for part, seconds in plan.seconds.items()]
    rows += [["  total", f"{sum(plan.seconds.values()) * 1e3:.1f} ms"]]
    lines += [align(rows), ""]
    limit = f"{FILLED:.0%} of {in_bytes(device.memory)}"
    if plan.fits:
        lines.append(f"It fits: it needs {in_bytes(plan.total_memory)} and may use {limit}.")
    else:
        lines.append(
            f"It does not fit: it needs {in_bytes(plan.total_memory)}, but may use {limit}."
        )
        lines += [f"  It fits with {way}." for way in ways]
        if not ways:
            lines.append("  No known change makes it fit: use devices with more memory.")
    return "\n".join(lines)
