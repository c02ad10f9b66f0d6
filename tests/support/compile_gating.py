"""Compile the kernels of noisy top-k gating as launched; print a report by name."""

import json
from collections.abc import Iterator
from functools import partial

import torch

from nmt_moe.kernels._triton import gating
from tests.support.compile_triton import CAPABILITIES, compile_launch

# (experts, per token, noise), for whole blocks of rows, of columns, and chunks of columns.
CASES = [
    (6, 6, "drawn"),
    (256, 4, "drawn"),
    (1024, 8, "drawn"),
    (1024, 4, "given"),
    (4096, 4, "drawn"),
    (4100, 4, "none"),
]
SEED = 2**62


def arguments(experts: int, noise: str) -> tuple:
    clean = torch.empty(64, experts)
    raw_scale = None if noise == "none" else clean
    given = clean if noise == "given" else None
    seed = SEED if noise == "drawn" else 0
    return clean, raw_scale, given, seed, torch.empty(64), torch.tensor([0, 64])


def backward(experts: int, top_k: int, inputs: tuple):
    count = top_k + (inputs[1] is not None and top_k < experts)
    choice = torch.empty(64, top_k), torch.empty(64, count), torch.empty(64, count).long()
    grad = torch.empty(1, experts)
    grads = torch.empty(64, top_k), grad, grad if count > top_k else None
    return gating.gating_backward(*inputs, choice, grads, 1e-2)


def compile_all(gpu: str) -> Iterator[tuple[str, dict]]:
    for experts, top_k, noise in CASES:
        name, inputs = f"{gpu} {experts} {top_k} {noise}", arguments(experts, noise)
        forward = partial(gating.gating_forward, *inputs, top_k, 1e-2)
        if experts > gating.MAX_BLOCK_COLUMNS:
            sums = {}

            def both(forward=forward, sums=sums):
                sums.update(compile_launch(gating, "sum_kernel", gpu, forward))

            yield f"{name} select", compile_launch(gating, "select_kernel", gpu, both)
            yield f"{name} sum", sums
        else:
            yield f"{name} forward", compile_launch(gating, "forward_kernel", gpu, forward)
        back = partial(backward, experts, top_k, inputs)
        yield f"{name} backward", compile_launch(gating, "backward_kernel", gpu, back)


def main() -> None:
    reports = {}
    for gpu in CAPABILITIES:
        reports.update(compile_all(gpu))
    print(json.dumps(reports))  # noqa: T201


if __name__ == "__main__":
    main()
