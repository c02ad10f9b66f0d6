"""Describe the devices of a cluster with figures from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device and its link to other devices.

    Attributes:
        flops: Operations per second in float32; a multiplication and an addition count as two.
        half_flops: Operations per second in half precision; 0 if the device does not support it.
        memory: Size of the memory in bytes.
        memory_bandwidth: Bandwidth of the memory in bytes per second.
        bandwidth: Bandwidth of the link to other devices, in bytes per second in one direction.
        source: Source of the figures.
        is_cpu: Whether the device is a CPU.
    """

    flops: float
    half_flops: float
    memory: float
    memory_bandwidth: float
    bandwidth: float
    source: str = ""
    is_cpu: bool = False


DEVICES = {
    "k40": Device(
        *(4.29e12, 0, 12e9, 288e9, 1.25e9),
        "Tesla K40 data sheet, without boost (4.29 TFLOP/s); 10 Gbit/s Ethernet is assumed",
    ),
    "v100": Device(
        *(15.7e12, 125e12, 32e9, 900e9, 150e9),
        "V100 SXM2 data sheet; NVLink",
    ),
    "a100": Device(
        *(19.5e12, 312e12, 80e9, 2039e9, 300e9),
        "A100 80 GB SXM data sheet, float32 without TF32; NVLink",
    ),
    "h100": Device(
        *(67e12, 989e12, 80e9, 3350e9, 450e9),
        "H100 SXM data sheet, float32 without TF32, half precision without sparsity; NVLink",
    ),
    "h200": Device(
        *(67e12, 989e12, 141e9, 4800e9, 450e9),
        "H200 SXM data sheet, float32 without TF32, half precision without sparsity; NVLink",
    ),
    "cpu": Device(
        *(0.1e12, 0, 8e9, 10e9, 1e9),
        "two cores of the machine in benchmarks/results/cpu.md, with products at 82-102 GFLOP/s; "
        "memory and link are assumed",
        True,
    ),
}
