"""Suggest changes that make training fit into a device's memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from nmt_moe.nn import LSTMLMConfig
from nmt_moe.planning.cluster import Setup, make_plan
from nmt_moe.planning.devices import Device

DRAWS = 8192
MOST_DEVICES = 4096


def largest_size(setup: Setup) -> int:
    """Return the largest number of devices that the experts can be divided among.

    This is the number that fairseq-train chooses by default.
    """
    if not setup.num_moe_layers or setup.moe is None:
        return 1
    return math.gcd(setup.devices, setup.moe.num_groups or setup.moe.num_experts)


def halved_until_fits(setup: Setup, device: Device) -> Setup:
    """Halve a setup's batch until the setup fits or the batch contains only one sentence."""
    while not make_plan(setup, device, 1.0).fits and setup.batch.sentences > 1:
        smaller = replace(setup.batch, sentences=setup.batch.sentences // 2)
        setup = replace(setup, batch=smaller)
    return setup


def changes(setup: Setup, device: Device) -> Iterator[tuple[str, Setup]]:
    """Yield possible changes, each with the changed setup, cheapest first."""
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
    """Return changes that make a setup fit into a device's memory.

    Returns:
        All single changes that are sufficient. If there are none, the list contains one combination
        of changes that is sufficient; if there is no such combination either, the list is empty.
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
        # Add the change that saves the most memory.
        name, current = min(left, key=lambda way: make_plan(way[1], device, 1.0).total_memory)
        names.append(name)
    return [" with ".join(names)]
