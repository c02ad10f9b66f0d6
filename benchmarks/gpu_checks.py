"""Compare the Triton kernels' results on this device with reference results in float64."""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_gating_checks import check_gating
from benchmarks.gpu_report import ROUNDING, Report, differentiate
from nmt_moe import kernels
from nmt_moe.kernels import reference
from nmt_moe.moe import MoEConfig, MoELayer

HALVES = torch.bfloat16, torch.float16


def leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Draw a standard normal tensor that requires a gradient."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def check_rows(report: Report, device: str, tiny: bool) -> None:
    """Check gathering, combining, products and whole experts."""
    shapes = [(9, 6, 2, 16, 24)]  # tokens, experts, top_k, D, H
    if not tiny:
        shapes += [(70, 7, 3, 33, 70), (512, 512, 4, 512, 1024), (8192, 4, 2, 512, 1024)]
    for dtype in (torch.float32, *HALVES):
        for tokens, experts, top_k, dim, hidden in shapes:
            ids = torch.rand(tokens, experts, device=device).argsort(1)[:, :top_k].contiguous()
            ids[::3, -1] = experts  # empty slots
            ids[ids == 1] = experts  # an expert without rows
            plan = kernels.plan_rows(ids, experts, int((ids < experts).sum()))
            num_rows = len(plan.row_token)
            name = f"{str(dtype).removeprefix('torch.')} N={tokens} E={experts} D={dim}"
            make = {"dtype": dtype, "device": device}
            x, rows = leaf(tokens, dim, **make), leaf(num_rows, dim, **make)
            gates = (torch.rand(ids.shape, device=device) * (ids < experts)).requires_grad_()
            # Scale the weights as a layer does, so that results are of order 1.
            weight_in = (leaf(experts, dim, hidden, **make) / dim**0.5).detach().requires_grad_()
            weight_out = (leaf(experts, hidden, dim, **make) / hidden**0.5).detach()
            weight_out.requires_grad_()
            pairs = (
                ("gather", kernels.gather_rows, reference.gather_rows, (x,), plan),
                ("combine", kernels.combine_rows, reference.combine_rows, (rows, gates), plan),
                (
                    "product",
                    kernels.grouped_gemm,
                    reference.grouped_gemm,
                    (rows, weight_in),
                    plan.offsets,
                ),
                (
                    "experts",
                    kernels.expert_ffn,
                    reference.expert_ffn,
                    (rows, weight_in, weight_out),
                    plan.offsets,
                ),
            )
            for kind, ours, theirs, leaves, last in pairs:
                differentiate(
                    report,
                    f"{kind} {name}",
                    lambda *tensors, ours=ours, last=last: ours(*tensors, last),
                    lambda *tensors, theirs=theirs, last=last: theirs(*tensors, last),
                    leaves,
                )


def check_adam(report: Report, device: str, tiny: bool) -> None:
    """Check three updates with factored Adam, and check that repeated runs are bit-identical."""
    shapes = [(2, 33, 65)] if tiny else [(2, 33, 65), (3, 1, 7), (64, 512, 1024), (5, 1024, 300)]
    options = {"lr": 0.02, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    for dtype in (torch.float32, *HALVES):
        for experts, dim, hidden in shapes:
            name = f"factored Adam {str(dtype).removeprefix('torch.')} ({experts}, {dim}, {hidden})"
            start = torch.randn(experts, dim, hidden, device=device).to(dtype)
            means = (
                torch.rand(experts, dim, device=device),
                torch.rand(experts, hidden, device=device),
            )
            ours = [tensor.clone() for tensor in (start, *means)]
            again = [tensor.clone() for tensor in ours]
            for step in (1, 2, 3):
                grad = torch.randn_like(start)
                wide = [tensor.double() for tensor in (ours[0], grad, *ours[1:])]
                expected = reference.factored_adam(*wide, step=step, **options)
                for state in (ours, again):
                    kernels.factored_adam(state[0], grad, *state[1:], step=step, **options)
                for key, one, other in zip(
                    ("weight", "row means", "column means"), ours, expected, strict=True
                ):
                    report.compare(f"{name}, update {step}: {key}", one, other, ROUNDING[one.dtype])
            same = all(one.equal(other) for one, other in zip(ours, again, strict=True))
            report.claim(f"{name}: bit-identical when repeated", same)


def check_layer(report: Report, device: str, tiny: bool) -> None:
    """Check the layer with each gate, with padding, in half precision and under autocast."""
    sizes = (6, 5, 8, 2) if tiny else (256, 512, 64, 4)
    tokens = 11 if tiny else 2000
    gates = [("noisy_top_k", 0), ("noisy_top_k", 4), ("softmax", 0)]
    kinds = [(torch.float32, False), *((half, False) for half in HALVES), (torch.float32, True)]
    for gate, groups in gates[1:2] if tiny else gates:
        config = MoEConfig(*sizes, gate=gate, num_groups=groups)
        for padded in (False, True):
            for dtype, autocast in kinds[-1:] if tiny and padded else kinds:
                kind = "autocast to bfloat16" if autocast else str(dtype).removeprefix("torch.")
                name = f"layer, {gate}{' with groups' if groups else ''}, {kind}"
                name += ", padding" if padded else ""
                _check_layer_case(report, name, config, tokens, padded, dtype, autocast, device)


def _check_layer_case(
    report: Report,
    name: str,
    config: MoEConfig,
    tokens: int,
    padded: bool,
    dtype: torch.dtype,
    autocast: bool,
    device: str,
) -> None:
    """Compare an evaluation pass with torch's operations on the same numbers in float64."""
    torch.manual_seed(3)
    layer = MoELayer(config).eval()
    for key, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "gate" in key else 0.3)
    layer.to(device, dtype)
    padding = torch.rand(tokens, device=device) < 0.2 if padded else None
    # Use numbers with few bits, so that x and the gates are the same in all dtypes and rounding
    # does not decide between experts.
    x = torch.randn(tokens, config.model_dim).to(dtype).to(device).requires_grad_()
    wide = MoELayer(config).eval().to(device, torch.float64)
    wide.load_state_dict(layer.state_dict())
    wide_x = x.detach().double().requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y, stats = layer(x, padding)
    with mock.patch.dict("os.environ", {"NMT_MOE_KERNELS": "torch"}):
        expected, expected_stats = wide(wide_x, padding)
    same = (stats.expert_ids == expected_stats.expert_ids).all(1)
    share = same.double().mean().item()
    report.claim(f"{name}: tokens with the same experts", share > 0.99, f"{share:.4f}", "0.99")
    limit = 2 * ROUNDING[torch.bfloat16 if autocast else dtype]
    keep = same.unsqueeze(1)
    report.compare(f"{name}: output", y * keep, expected * keep, limit)
    grad = torch.randn_like(y) * keep
    mine = torch.autograd.grad(y, [x, *layer.experts.parameters()], grad)
    with mock.patch.dict("os.environ", {"NMT_MOE_KERNELS": "torch"}):
        wanted = torch.autograd.grad(
            expected, [wide_x, *wide.experts.parameters()], grad.to(expected.dtype)
        )
    for key, one, other in zip(("x", "weight_in", "weight_out"), mine, wanted, strict=True):
        report.compare(f"{name}: gradient of {key}", one, other, 2 * limit)


def check_products(report: Report, device: str, tiny: bool) -> None:
    """Check half-precision products, and the products of gates, at the sizes of a training run."""
    shapes = [(4, 16, 16, 24)] if tiny else [(32, 2048, 512, 1024), (512, 16, 512, 1024)]
    for dtype in HALVES:
        for experts, mean, dim, hidden in shapes:
            rows = leaf(experts * mean, dim, dtype=dtype, device=device)
            weight = (torch.randn(experts, dim, hidden, device=device) / dim**0.5).to(dtype)
            offsets = torch.arange(experts + 1, device=device) * mean
            name = f"product {str(dtype).removeprefix('torch.')} E={experts} rows={mean}"
            differentiate(
                report,
                name,
                lambda *tensors, offsets=offsets: kernels.grouped_gemm(*tensors, offsets),
                lambda *tensors, offsets=offsets: reference.grouped_gemm(*tensors, offsets),
                (rows, weight.requires_grad_()),
            )

    for tokens, experts in ((40, 20),) if tiny else ((65536, 256), (4096, 4096)):
        rows = leaf(tokens, 512, dtype=torch.float32, device=device)
        weight = (torch.randn(512, experts, device=device) / 512**0.5).requires_grad_()
        differentiate(
            report,
            f"gate logits N={tokens} E={experts}",
            lambda *tensors: kernels.gate_logits(*tensors, None)[0],
            torch.matmul,
            (rows, weight),
        )


# The check that each part of a session runs, by the part's name.
CHECKS: dict[str, Callable[[Report, str, bool], None]] = {
    "rows": check_rows,
    "gating": check_gating,
    "adam": check_adam,
    "layer": check_layer,
    "products": check_products,
}
