"""Predict the memory, traffic and time of a training step on each device of a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nmt_moe.checks import check_divides, check_range
from nmt_moe.moe import MoEConfig
from nmt_moe.parallel import ring_bytes
from nmt_moe.planning.architectures import NetworkConfig
from nmt_moe.planning.batch import Batch
from nmt_moe.planning.devices import Device
from nmt_moe.planning.mixture import kept_by_mixture, ranks_per_token, rows_per_token
from nmt_moe.planning.network import count, describe
from nmt_moe.planning.recorder import Network

# Maximum number of values in the buffer that fairseq's legacy_ddp sums over ranks. The gradient of
# a larger parameter is summed separately.
BUFFER_NUMBERS = 2**28
# Fraction of a device's memory that a plan may fill. The rest is for the runtime and fragmentation.
FILLED = 0.9


@dataclass(frozen=True)
class Setup:
    """A training setup: the network, and how it is spread over devices.

    Attributes:
        config: Configuration of the network.
        batch: Batch that each device processes at a time.
        devices: Number of devices.
        size: Number of devices that the experts are divided among.
        factored: Whether the optimizer is factored Adam instead of Adam.
        precision: "fp32"; "half" for half precision with fp32 copies of the weights; or
            "memory-efficient" for half precision without such copies.

    Raises:
        ValueError: if a value is not allowed. The message gives the field, the constraint and
            the value.
    """

    config: NetworkConfig
    batch: Batch
    devices: int = 1
    size: int = 1
    factored: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_range("devices", self.devices, 1)
        check_divides("devices", self.devices, "`expert_parallel_size`", self.size)
        moe = self.moe
        if getattr(self.config, "decoder_moe", moe) != moe:
            raise ValueError(
                "`decoder_num_experts` must be 0 or `num_experts` here, because a plan assumes MoE "
                "layers of the same size. Plan with the larger number."
            )
        if moe is not None:
            name = "num_groups" if moe.num_groups else "num_experts"
            value = moe.num_groups or moe.num_experts
            check_divides(name, value, "`expert_parallel_size`", self.size)

    @property
    def moe(self) -> MoEConfig | None:
        """Return the configuration of the MoE layers, or None if there are none."""
        return self.config.moe

    @property
    def num_moe_layers(self) -> int:
        """Return the number of MoE layers with experts that can be spread over devices."""
        return describe_setup(self).num_moe_layers


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters and operations on one device.

    Attributes:
        dense: Number of parameters that do not belong to experts.
        buffered: Number of these parameters whose gradient is small enough for the buffer.
        experts: Number of parameters of the experts on the device.
        factored: Total number of rows and columns in the matrices of these experts.
        macs: Number of multiply-adds in the forward pass of a batch, by part of the network.
        weights: Number of parameters that these operations read, by part of the network.
    """

    dense: int
    buffered: int
    experts: int
    factored: int
    macs: dict[str, float]
    weights: dict[str, int]

    @property
    def total(self) -> int:
        """Return the total number of parameters on the device."""
        return self.dense + self.experts


def count_sizes(setup: Setup) -> Sizes:
    """Count the parameters and operations of one device's network."""
    network = describe_setup(setup)
    width, batch = setup.config.model_dim, setup.batch
    softmax = batch.vocab_size * width
    dense = [softmax, softmax]
    experts = factored = 0
    weights: dict[str, int] = {"softmax": (batch.num_draws or batch.vocab_size) * width}
    for weight in network.weights:
        size = weight.size
        if weight.is_expert:
            size //= setup.size
            experts += size
            factored += weight.factored_size // setup.size
        else:
            dense.append(size)
        if weight.is_matrix:
            weights[weight.part] = weights.get(weight.part, 0) + size
    macs = count(setup.config, replace(batch, num_draws=0)).macs
    if batch.num_draws:
        macs["softmax"] = batch.tokens * weights["softmax"]  # an upper bound
    buffered = sum(size for size in dense if size <= BUFFER_NUMBERS)
    return Sizes(sum(dense), buffered, experts, factored, macs, weights)


def describe_setup(setup: Setup) -> Network:
    """Describe a setup's network with a small batch, because parameters do not depend on it."""
    return describe(setup.config, Batch(1, 2, setup.batch.vocab_size))


def count_activations(setup: Setup) -> tuple[dict[str, int], int]:
    """Count the bytes that the forward pass of one batch keeps.

    Returns:
        The bytes kept, by part of the network, and the bytes of the softmax layer's largest
        temporary tensors.
    """
    batch = setup.batch
    kept = count(setup.config, replace(batch, num_draws=0)).kept
    if setup.moe is not None:
        for part, size in kept_by_mixture(setup.moe, batch, setup.size).items():
            kept[part] = kept.get(part, 0) + setup.num_moe_layers * size
    workspace = 8.0 * batch.tokens * batch.vocab_size  # gradients of log-probabilities and logits
    if batch.num_draws:
        classes = batch.distinct_classes
        rows = (classes + 2 * batch.tokens) * setup.config.model_dim * batch.number_bytes
        kept["softmax"] = rows + batch.tokens * 5 * (classes + 1)
        workspace = batch.tokens * 8 * classes
    return {part: round(size) for part, size in kept.items()}, round(workspace)


def predict_memory(setup: Setup, sizes: Sizes) -> dict[str, int]:
    """Predict the memory on one device in bytes, by purpose.

    The sum of these sizes is an upper bound on the peak.
    """
    total = sizes.total
    number, copies = {"fp32": (4, 0), "half": (2, 4), "memory-efficient": (2, 0)}[setup.precision]
    optimizer = 8 * total
    if setup.factored:
        optimizer = 8 * sizes.dense + 4 * sizes.factored
    buffer = min(BUFFER_NUMBERS, sizes.buffered) * number if setup.devices > 1 else 0
    activations, workspace = count_activations(setup)
    return {
        "weights": (number + copies) * total,
        "gradients": (number + copies) * total,
        "optimizer": optimizer,
        "activations": sum(activations.values()),
        "temporaries": workspace + buffer,
    }


def predict_traffic(setup: Setup, sizes: Sizes) -> dict[str, int]:
    """Predict the bytes that one device sends in a step, by purpose.

    The exchange sends tokens and their gates to the ranks of their experts, sends the results back,
    and sends the gradients of all three in the opposite directions. It also sends the experts' ids
    and three counts per rank. The balance losses sum the importance and load of all experts (and,
    in a hierarchy, of all groups) over the ranks, in the forward and in the backward pass.
    """
    number = 4 if setup.precision == "fp32" else 2
    devices, size, moe = setup.devices, setup.size, setup.moe
    traffic = {"exchange": 0, "balance": 0, "dense gradients": 0, "expert gradients": 0}
    if devices == 1:
        return traffic
    if moe is not None and setup.num_moe_layers:
        tokens = setup.batch.tokens
        slots, dim = rows_per_token(moe), moe.model_dim
        # Gates are float32 in any training precision.
        row = 4 * number * dim + 2 * 4 * slots + 4 * slots
        away = ranks_per_token(moe, size) * (size - 1) / size
        layer = tokens * away * row + 24 * (size - 1) * (size > 1)
        traffic["exchange"] = round(setup.num_moe_layers * layer)
        sums = 2 * (moe.num_experts + moe.num_groups)
        traffic["balance"] = setup.num_moe_layers * 2 * ring_bytes(4 * sums, devices)
    traffic["dense gradients"] = ring_bytes(number * sizes.dense, devices)
    local = number * sizes.experts
    traffic["expert gradients"] = ring_bytes(local, devices // size)
    return traffic


def predict_time(
    setup: Setup, sizes: Sizes, traffic: dict[str, int], device: Device, utilisation: float
) -> dict[str, float]:
    """Predict the time of one step in seconds, by part, as if no parts overlapped.

    A product takes as long as its operations at the fraction `utilisation` of the device's FLOP/s,
    or as long as moving its weights between memory and processor, whichever is longer. Weights are
    read in the forward and the backward pass (in an LSTM, at each position of the sentences), and
    their gradient is written once.
    """
    number = 4 if setup.precision == "fp32" else 2
    flops = utilisation * (device.flops if setup.precision == "fp32" else device.half_flops)
    seconds = {}
    for part, macs in sizes.macs.items():
        passes = 3.0
        if part == "experts" and setup.moe is not None and setup.moe.recomputes:
            passes = 3.5  # the first of the two products is recomputed
        operations = passes * 2 * macs
        reads = 2 * setup.batch.length + 1 if part == "LSTM" else 3
        moved = reads * sizes.weights[part] * number
        seconds[part] = max(operations / flops, moved / device.memory_bandwidth)
    # Bytes moved for each parameter. Adam reads weights, gradients and both moments, and writes
    # weights and moments. Factored Adam reads weights once and the gradients of experts twice, and
    # writes weights.
    adam, factored = 28, 16
    moved = adam * sizes.dense + (factored if setup.factored else adam) * sizes.experts
    seconds["optimizer"] = moved / device.memory_bandwidth
    seconds["network"] = sum(traffic.values()) / device.bandwidth
    return seconds


@dataclass(frozen=True)
class Plan:
    """The predicted costs of a step on one device.

    Attributes:
        memory: Bytes of memory, by purpose.
        activations: Bytes of activations, by part of the network.
        traffic: Bytes sent, by purpose.
        seconds: Time in seconds, by part of the step.
        parameters: Number of parameters on this device, and in the whole cluster.
        capacity: Bytes of the device's memory that a plan may fill.
    """

    memory: dict[str, int]
    activations: dict[str, int]
    traffic: dict[str, int]
    seconds: dict[str, float]
    parameters: tuple[int, int]
    capacity: float

    @property
    def total_memory(self) -> int:
        """Return the total number of bytes of memory."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Return whether the plan fits into the device's memory."""
        return self.total_memory <= self.capacity


def make_plan(setup: Setup, device: Device, utilisation: float) -> Plan:
    """Predict the memory, traffic and time of a setup.

    Args:
        setup: The training setup.
        device: The kind of device; all devices are of this kind.
        utilisation: Fraction of the device's FLOP/s that products reach.
    """
    sizes = count_sizes(setup)
    traffic = predict_traffic(setup, sizes)
    return Plan(
        memory=predict_memory(setup, sizes),
        activations=count_activations(setup)[0],
        traffic=traffic,
        seconds=predict_time(setup, sizes, traffic, device, utilisation),
        parameters=(sizes.total, sizes.dense + sizes.experts * setup.size),
        capacity=FILLED * device.memory,
    )
