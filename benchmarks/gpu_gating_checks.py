"""Compare the Triton kernels of noisy top-k gating with their definition in float64."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_report import Report
from nmt_moe import kernels
from nmt_moe.kernels import reference

SEED = 2**62 + 12345


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
        apart = f"{down} row(s) and {right} column(s) apart"
        what = f"correlation of noise values {apart}, in standard errors"
        report.claim(what, figure < 4.5, f"{figure:.2f}", "4.5")


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
