"""Check that the measured layers compute the right results."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.moe_layers import Layer, build_layer
from benchmarks.moe_peers import LAYERS
from benchmarks.moe_points import Point

SMALL = Point(tokens=64, model_dim=32, hidden_dim=48, num_experts=8, top_k=4, num_groups=4)
COLUMNS = ["layer", "dtype", "output", "gradient of x", "gradients of weights", "verdict"]
# The largest difference, divided by the largest value, that counts as agreement.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


def compare(name: str, device: str, dtype: str = "float32") -> dict[str, float]:
    """Compare a layer in evaluation, where it drops no pairs, with its definition in float32.

    Returns:
        The largest difference divided by the largest value, for `output`, `gradient of x` and
        `gradients of weights` (of the weight that differs most). A layer without a backward pass
        has only `output`.
    """
    point = dataclasses.replace(SMALL, dtype=dtype)
    layer = build_layer(LAYERS[name], point, device, capacity=float(point.num_experts)).eval()
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(2, point.tokens, point.model_dim, generator=generator)
    x, grad_y = both.to(device, getattr(torch, dtype))
    if not layer.has_backward:
        with torch.no_grad():
            found, wanted = layer(x)[0], layer.float().dense(x.float())
        return {"output": ((found - wanted).abs().max() / wanted.abs().max()).item()}
    found = _differentiate(layer, lambda x: layer(x)[0], x, grad_y)
    layer.float()
    wanted = _differentiate(layer, layer.dense, x.float(), grad_y.float())
    errors = [
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
        for a, b in zip(found, wanted, strict=True)
    ]
    return {
        "output": errors[0],
        "gradient of x": errors[1],
        # torch's maximum propagates NaN, unlike Python's.
        "gradients of weights": torch.tensor(errors[2:]).max().item(),
    }


def _differentiate(
    layer: Layer, function: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor
) -> list[Tensor]:
    """Return the output and the gradients of x and all parameters, with zeros for missing ones."""
    x = x.clone().requires_grad_()
    torch.manual_seed(4)  # a layer may use random numbers
    y = function(x)
    inputs = [x, *layer.parameters()]
    grads = torch.autograd.grad(y, inputs, grad_y, allow_unused=True)
    pairs = zip(inputs, grads, strict=True)
    return [y, *(torch.zeros_like(of) if grad is None else grad for of, grad in pairs)]


def check_all(names: list[str], device: str, dtypes: list[str]) -> tuple[str, bool]:
    """Compare all layers, in all dtypes, with their dense definitions.

    Returns:
        A table, and whether all agree.
    """
    lines, all_agree = [], True
    for dtype in dtypes:
        for name in names:
            timing.say(f"checking {name} in {dtype}")
            try:
                errors = compare(name, device, dtype)
            except (RuntimeError, ValueError, TypeError) as error:
                lines.append([name, dtype, "-", "-", "-", f"fails: {str(error).splitlines()[0]}"])
                all_agree = False
                continue
            agrees = all(error <= TOLERANCES[dtype] for error in errors.values())
            all_agree &= agrees
            cells = [f"{error:.1e}" for error in errors.values()]
            cells += ["-"] * (len(COLUMNS) - 3 - len(cells))
            lines.append([name, dtype, *cells, "agrees" if agrees else "DIFFERS"])
    return timing.markdown_table(COLUMNS, lines), all_agree
