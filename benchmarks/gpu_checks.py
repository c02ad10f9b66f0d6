"""Compare the results of the Triton kernels on this device with their definitions in float64."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from benchmarks import timing
from nmt_moe import kernels
from nmt_moe.kernels import reference
from nmt_moe.moe import MoEConfig, MoELayer

HALVES = torch.bfloat16, torch.float16
# The largest difference, relative to the largest value, that one or two final roundings can cause.
ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
SEED = 2**62 + 12345


class WrongResultError(RuntimeError):
    """A kernel and its definition give different results."""


@dataclass
class Report:
    """The comparisons made so far; the first failure ends the check.

    Attributes:
        rows: Rows of the table, each with a description, a figure, its limit and a verdict.
    """

    rows: list[list[str]] = field(default_factory=list)

    def compare(self, what: str, found: Tensor, expected: Tensor, limit: float) -> None:
        """Check that the largest difference, relative to the largest value, is within a limit."""
        found, expected = found.detach().double(), expected.detach().double()
        error = 0.0
        if expected.numel():
            largest = expected.abs().max().clamp_min(1e-30)
            error = ((found - expected).abs().max() / largest).item()
        self.claim(what, error <= limit, f"{error:.1e}", f"{limit:.0e}")

    def claim(self, what: str, holds: bool, figure: str = "", limit: str = "") -> None:
        """Record whether a claim holds, and raise an error if it does not."""
        self.rows.append([what, figure, limit, "right" if holds else "WRONG"])
        if not holds:
            over = f": {figure} exceeds the limit {limit}" if limit else ""
            raise WrongResultError(f"{what}: wrong{over}")

    def table(self) -> str:
        """Lay out all rows."""
        return timing.markdown_table(["checked", "difference", "limit", "verdict"], self.rows)


def leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Draw a standard normal tensor that requires a gradient."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def differentiate(
    report: Report,
    name: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    leaves: Sequence[Tensor],
) -> None:
    """Compare a kernel's results and gradients with its definition's, computed in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    found, expected = ours(*leaves), theirs(*wide)
    limit = ROUNDING[leaves[0].dtype]
    report.compare(name, found, expected, limit)
    grad = torch.randn_like(found)
    mine = torch.autograd.grad(found, leaves, grad)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for index, (one, other) in enumerate(zip(mine, wanted, strict=True)):
        report.compare(f"{name}, gradient {index + 1}", one, other, limit)


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
            # Scale the weights as a layer does, so that results are about 1.
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


def check_gating(report: Report, device: str, tiny: bool) -> None:
    """Check the forward and backward passes of gating in training, and the noise."""
    cases = [(40, 6, 2, None), (12, 20, 3, [5, 0, 7])]
    if not tiny:
        cases += [
            (4096, 256, 4, None),
            (2048, 1024, 8, [1000, 0, 1048]),
            (1000, 4096, 4, None),
            (300, 4100, 15, None),
        ]
    for rows, experts, top_k, sizes in cases:
        _check_gating_case(report, device, rows, experts, top_k, sizes)
    _check_special_logits(report, device)
    _check_noise(report, device, 200 if tiny else 4000)


def _check_gating_case(
    report: Report, device: str, rows: int, experts: int, top_k: int, sizes: list[int] | None
) -> None:
    clean, raw_scale, noise = (torch.randn(rows, experts, device=device) for _ in range(3))
    drawn = _launchers().write_noise(_seed(device), 0, torch.empty_like(clean))
    offsets = None if sizes is None else torch.tensor([0, *sizes], device=device).cumsum(0)
    weight = torch.rand(rows, device=device)
    name = f"gating N={rows} E={experts} K={top_k}{' groups' if sizes else ''}"
    for kind, given, passed in (("given", noise, noise), ("drawn", drawn, None)):
        leaves = [_part_ties(clean, raw_scale, given, top_k), raw_scale, weight]
        leaves = [tensor.clone().requires_grad_() for tensor in leaves]
        wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
        with fixed_seed():
            ours = kernels.noisy_top_k(*leaves[:2], top_k, passed, offsets, leaves[2])
        theirs = reference.noisy_top_k(*wide[:2], top_k, given.double(), offsets, wide[2])
        report.claim(f"{name}, {kind} noise: ids", ours.expert_ids.equal(theirs.expert_ids))
        counts = ours.tokens_per_expert.equal(theirs.tokens_per_expert)
        report.claim(f"{name}, {kind} noise: counts", counts)
        fields = ["gates", "importance", *(["load"] if top_k < experts else [])]
        for field_name in fields:
            pair = getattr(ours, field_name), getattr(theirs, field_name)
            report.compare(f"{name}, {kind} noise: {field_name}", *pair, 1e-4)
        grads = [torch.randn_like(getattr(ours, field_name)) for field_name in fields]
        mine = torch.autograd.grad([getattr(ours, key) for key in fields], leaves, grads)
        wanted = torch.autograd.grad(
            [getattr(theirs, key) for key in fields], wide, [grad.double() for grad in grads]
        )
        for key, one, other in zip(("clean", "raw_scale", "weight"), mine, wanted, strict=True):
            report.compare(f"{name}, {kind} noise: gradient of {key}", one, other, 1e-4)


def _part_ties(clean: Tensor, raw_scale: Tensor, noise: Tensor, top_k: int) -> Tensor:
    """Move logits apart in rows where rounding might decide which experts are chosen."""
    scale = torch.nn.functional.softplus(raw_scale.double()) + reference.NOISE_FLOOR
    noisy = clean.double() + noise.double() * scale
    top = noisy.topk(min(top_k + 2, clean.shape[1]), dim=1)
    is_close = (top.values.diff(dim=1).abs() < 1e-4).any(1, keepdim=True)
    steps = torch.arange(top.indices.shape[1], 0, -1, device=clean.device).float()
    return clean.scatter_add(1, top.indices, steps.expand(len(clean), -1) * is_close)


def _check_special_logits(report: Report, device: str) -> None:
    equal = kernels.noisy_top_k(torch.zeros(5, 20, device=device), None, 3)
    report.claim(
        "equal logits: the lowest ids are chosen", equal.expert_ids.tolist() == [[0, 1, 2]] * 5
    )
    clean = torch.full((2, 40), float("-inf"), device=device)
    clean[0, 7], clean[1, 30:32] = 0.0, 1.0
    lonely = kernels.noisy_top_k(clean, None, 3)
    wanted = [[7, 0, 1], [30, 31, 0]]
    report.claim("logits of -inf: no expert is chosen twice", lonely.expert_ids.tolist() == wanted)
    load = kernels.noisy_top_k(clean, torch.zeros_like(clean), 3).load
    report.compare("thresholds of -inf: load", load, clean.isfinite().sum(0), 1e-6)
    clean = torch.randn(6, 40, device=device)
    clean[2, 17] = float("nan")
    for kind, raw_scale in (("training", torch.zeros_like(clean)), ("evaluation", None)):
        found = kernels.noisy_top_k(clean, raw_scale, 3).gates.isnan().all(1).tolist()
        wanted = [row == 2 for row in range(6)]
        report.claim(f"a logit of NaN in {kind}: only its row is NaN", found == wanted)


def _check_noise(report: Report, device: str, rows: int) -> None:
    """Compare statistics of the noise with limits that only one seed in a thousand exceeds."""
    noise = torch.empty(rows, 250, device=device)
    noise = _launchers().write_noise(_seed(device), 0, noise).double()
    number = noise.numel()
    ordered = noise.flatten().sort().values
    ranks = torch.arange(1, number + 1, device=device) / number
    distance = (torch.special.ndtr(ordered) - ranks).abs().max().item() * number**0.5
    report.claim("noise is normal (Kolmogorov-Smirnov)", distance < 1.95, f"{distance:.2f}", "1.95")
    for down, right in ((0, 1), (0, 2), (0, 4), (1, 0)):
        pairs = noise[down:, right:] * noise[: rows - down, : 250 - right]
        figure = pairs.mean().abs().item() * pairs.numel() ** 0.5
        what = f"noise {down} rows below, {right} columns to the right: correlation in sigmas"
        report.claim(what, figure < 4.5, f"{figure:.2f}", "4.5")


def check_adam(report: Report, device: str, tiny: bool) -> None:
    """Check three updates with factored Adam, and check that repeating them gives the same bits."""
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
            report.claim(f"{name}: the same bits when repeated", same)


def check_layer(report: Report, device: str, tiny: bool) -> None:
    """Check the layer with each kind of gate, padding, half precision and autocast."""
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
    """Check products in half precision, and those of gates, at the sizes of a training run."""
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


def _launchers():  # noqa: ANN202
    return importlib.import_module("nmt_moe.kernels._triton.gating")


def _seed(device: str | torch.device) -> Tensor:
    return torch.tensor([SEED], device=device)


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Make gates draw their noise with the seed `SEED`."""
    operation = importlib.import_module("nmt_moe.kernels.gating")
    with mock.patch.object(operation, "draw_seed", _seed):
        yield
