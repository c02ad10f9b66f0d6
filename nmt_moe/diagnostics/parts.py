"""Try each part of nmt_moe on a tiny example."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nmt_moe.diagnostics.requirements import (
    HOST,
    compare_requirements,
    describe,
    find_broken,
    known_extras,
)

INSTALL = "pip install 'nmt-moe[{}]'"


@dataclass(frozen=True)
class Part:
    """The result of trying one part of nmt_moe.

    Attributes:
        name: Name of the part, as shown to users.
        works: Whether the part worked; None for a part that this machine does not need.
        note: How the part works on this machine, or why it does not work and how to fix it.
    """

    name: str
    works: bool | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as plain values."""
        return asdict(self)


class NotHereError(Exception):
    """An error for a part that cannot work on this machine and is not needed on it."""


def try_parts() -> list[Part]:
    """Try all parts, each after the parts that it builds on."""
    return [
        _try("MoE layer", _try_layer),
        _try("CPU loops", _try_loops),
        _try("GPU kernels", _try_gpu),
        _try("int8 and bfloat16", _try_products),
        _try("bundles, translator", _try_bundles),
        _try("training with fairseq", _try_training),
        _try("several processes", _try_processes),
        *[_try_extra(name, extra) for name, extra in EXTRAS.items() if extra in known_extras()],
    ]


# Maps each optional part to the extra that installs its packages.
EXTRAS = {"HTTP server": "serve", "figures": "plot", "demo": "demo"}


def _try(name: str, attempt: Callable[[], str]) -> Part:
    try:
        return Part(name, True, attempt())
    except NotHereError as reason:
        return Part(name, None, str(reason))
    except Exception as error:  # a broken installation may raise anything
        return Part(name, False, describe(error))


def _try_layer() -> str:
    """Run both passes, and compare the output with equation 1 of the paper."""
    import torch

    from nmt_moe.moe import MoEConfig, MoELayer

    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(model_dim=8, hidden_dim=16, num_experts=4, top_k=2)).eval()
    x = torch.randn(12, 8, requires_grad=True)
    y, stats = layer(x)
    expected = torch.zeros_like(y)
    for row, (gates, experts) in enumerate(zip(stats.gates, stats.expert_ids, strict=True)):
        for gate, expert in zip(gates, experts.tolist(), strict=True):
            hidden = (x[row] @ layer.experts.weight_in[expert]).relu()
            expected[row] += gate * (hidden @ layer.experts.weight_out[expert])
    difference = (y - expected).abs().max().item()
    y.sum().backward()
    if not difference < 1e-5:
        raise RuntimeError(f"its output differs from its definition by {difference:.1e}")
    return "forward and backward passes, on the CPU"


def _try_loops() -> str:
    import torch

    from nmt_moe.kernels import PackedLinear, compiled_operators

    if compiled_operators() is None:
        raise NotHereError(
            "not compiled, so training and translation are slower on the CPU. With a C++ "
            "compiler, run `python -m nmt_moe.kernels._cpu.build`"
        )
    torch.manual_seed(0)
    x, weight = torch.randn(20, 33), torch.randn(50, 33)
    difference = (PackedLinear.pack(weight)(x) - x @ weight.t()).abs().max().item()
    if not difference < 1e-4:
        raise RuntimeError(f"a product differs from torch's by {difference:.1e}")
    return f"compiled, using {torch.backends.cpu.get_cpu_capability()} instructions"


def _try_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise NotHereError("no CUDA device: torch's own operations are used, on the CPU")
    from nmt_moe.kernels import failed_kernels, mixture_ffn, noisy_top_k, plan_rows

    torch.manual_seed(0)
    x, weight_in, weight_out = (
        torch.randint(-2, 3, shape).float() for shape in ((64, 32), (4, 32, 48), (4, 48, 32))
    )
    logits = torch.randn(64, 4)
    results = []
    for device in ("cpu", "cuda"):
        gating = noisy_top_k(logits.to(device), None, 2)
        plan = plan_rows(gating.expert_ids, 4)
        weights = weight_in.to(device), weight_out.to(device)
        y = mixture_ffn(x.to(device), gating.gates, plan, *weights)
        results.append(y.cpu())
    difference = (results[0] - results[1]).abs().max().item()
    if not difference < 1e-2 * results[0].abs().max().item():
        raise RuntimeError(f"the GPU's result differs from the CPU's by {difference:.1e}")
    if find_spec("triton") is None:
        return "using torch's operations: Triton, which is faster, is not installed"
    if failed := failed_kernels():
        names = ", ".join(failed)
        return f"using torch's operations for {names}, because their Triton kernels failed a trial"
    return "using the Triton kernels, which give the same results as the CPU"


def _try_products() -> str:
    import torch

    from nmt_moe.kernels import PackedLinear, quantise_rows

    torch.manual_seed(0)
    x, weight = torch.randn(4, 64), torch.randn(32, 64)
    expected = x @ weight.t()
    for dtype in ("bfloat16", "int8"):
        product = (
            PackedLinear.from_int8(*quantise_rows(weight))
            if dtype == "int8"
            else PackedLinear.pack(weight, dtype=dtype)
        )
        error = (product(x) - expected).norm() / expected.norm()
        if not error < 0.05:
            raise RuntimeError(f"matrix products in {dtype} have a relative error of {error:.2f}")
    return "matrix products are correct"


def _try_bundles() -> str:
    import numpy
    import sentencepiece
    import torch
    from safetensors.torch import load_file, save_file

    import nmt_moe.inference  # noqa: F401

    sentencepiece.SentencePieceProcessor()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({"weight": torch.arange(4.0)}, path)
        total = float(numpy.sum(load_file(path)["weight"].numpy()))
    if total != 6.0:
        raise RuntimeError("a weight read from a file differs from the one written")
    return "weights can be written and mapped; sentencepiece and numpy work"


def _try_training() -> str:
    if find_spec(HOST) is None:
        raise NotHereError(
            "fairseq, which is needed only for training, is not installed: "
            + INSTALL.format("fairseq")
        )
    broken = find_broken()
    if broken:
        raise RuntimeError(f"{broken[0]}; the README explains how to install it")
    from fairseq.models import MODEL_REGISTRY

    from nmt_moe import plugin

    plugin.register()
    if "lstm_moe_gnmt" not in MODEL_REGISTRY:
        raise RuntimeError("fairseq does not list the model `lstm_moe_gnmt`")
    return "fairseq, its compiled loops and the plugin"


def _try_processes() -> str:
    import torch
    from torch import distributed

    if not distributed.is_available():
        raise NotHereError("torch is built without torch.distributed")
    names = [
        name
        for name, there in (
            ("gloo (CPU)", distributed.is_gloo_available()),
            ("NCCL (GPUs)", distributed.is_nccl_available()),
        )
        if there
    ]
    if not names:
        raise RuntimeError("torch has neither gloo nor NCCL")
    with tempfile.TemporaryDirectory() as folder:
        store = distributed.FileStore(str(Path(folder) / "store"), 1)
        store.set("key", "value")
        assert store.get("key") == b"value"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"{', '.join(names)}; {count} GPUs"


def _try_extra(name: str, extra: str) -> Part:
    def attempt() -> str:
        found, needed = compare_requirements((extra,)), compare_requirements()
        faults = [found[package][1] for package in sorted(found.keys() - needed.keys())]
        missing = "; ".join(filter(None, faults))
        if missing:
            raise NotHereError(f"optional; {missing}: {INSTALL.format(extra)}")
        for module in MODULES.get(extra, ()):
            importlib.import_module(module)
        return f"has the packages of the extra `{extra}`"

    return _try(name, attempt)


# Modules whose import shows that an extra's packages work.
MODULES = {"plot": ("matplotlib",), "serve": ("fastapi", "uvicorn", "prometheus_client")}
