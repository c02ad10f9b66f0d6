"""The layer's path for GPUs gives the CPU's results, and the host never waits for the device."""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nmt_moe
from nmt_moe.kernels import _backend
from nmt_moe.moe import MoEConfig, MoELayer

pytestmark = pytest.mark.device

aten = torch.ops.aten
# These operations read values from a device. torch's modes do not intercept `Tensor.tolist`.
READING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
OURS = str(Path(nmt_moe.__file__).parent)


class CountWaits(TorchDispatchMode):
    """A mode that lists the lines of nmt_moe that read values from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self) -> None:
        for frame in reversed(traceback.extract_stack()):
            if "/triton/" in frame.filename:  # a read by Triton's interpreter
                return
            if frame.filename.startswith(OURS):
                self.lines.append(f"{frame.filename}:{frame.lineno} {frame.line}")
                return

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = args[1] if func.overloadpacket in (aten.index, aten.index_put) else ()
        is_masked = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if func.overloadpacket in READING or is_masked:
            self.note()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_device(monkeypatch, request):
    """Return a function that selects the paths of an asynchronous device and returns its name."""

    def take() -> str:
        monkeypatch.setattr(_backend, "HOST_DEVICES", frozenset())
        torch.use_deterministic_algorithms(True, warn_only=True)  # fill fresh memory with NaN
        return request.getfixturevalue("device")

    yield take
    torch.use_deterministic_algorithms(False)


GATES = [
    pytest.param("noisy_top_k", 0, id="noisy"),
    pytest.param("noisy_top_k", 4, id="noisy-groups"),
    pytest.param("softmax", 0, id="softmax"),
    pytest.param("strictly_balanced", 0, id="strict"),
    pytest.param("strictly_balanced", 4, id="strict-groups"),
]
PADDING = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0], dtype=torch.bool)


def move(tensors, device):
    """Move a tensor or a tuple of tensors to a device; return None unchanged."""
    if isinstance(tensors, tuple):
        return tuple(tensor.to(device) for tensor in tensors)
    return None if tensors is None else tensors.to(device)


def run(layer, padding, noise, device="cpu"):
    """Return the results and gradients of one pass, by name."""
    torch.manual_seed(3)
    x = torch.randn(11, 6, device="cpu")
    if padding is not None:
        x[padding] = float("nan")
    x = x.to(device).requires_grad_()
    layer.to(device).zero_grad()
    y, stats = layer(x, move(padding, device), move(noise, device))
    (y.square().sum() + stats.balance_loss).backward()
    names = ("importance", "load", "tokens_per_expert", "expert_ids", "gates", "balance_loss")
    found = {"y": y, "x": x.grad, **{name: getattr(stats, name) for name in names}}
    return found | {name: weight.grad for name, weight in layer.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("gate", "groups"), GATES)
def test_a_device_computes_the_same_and_the_host_never_waits(
    gate, groups, padded, as_on_a_device, monkeypatch
):
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(6, 5, 8, 2, gate=gate, num_groups=groups))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    padding, noise = PADDING if padded else None, None
    if gate == "noisy_top_k":
        noise = torch.randn(11, 8)
        noise = (torch.randn(11, 4), noise) if groups else noise
    expected = run(layer, padding, noise)
    device = as_on_a_device()
    waits, tolist = CountWaits(), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: [waits.note(), tolist(x)][1])
    with waits:
        found = run(layer, padding, noise, device)
    if gate == "strictly_balanced":  # this gate reads the largest number of experts per token
        assert waits.lines
    else:
        assert not waits.lines
    for name, value in found.items():
        definition = expected[name].cpu()  # moving a layer moves its gradients
        largest = definition.abs().max().item()
        torch.testing.assert_close(
            value.cpu(),
            definition,
            rtol=1e-4,
            # Even if the terms of a sum cancel, their rounding errors remain.
            atol=1e-5 * max(largest, 1.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.multigpu
def test_a_device_need_not_be_the_current_one():
    layer, noise = MoELayer(MoEConfig(6, 5, 8, 2)), torch.randn(11, 8)
    expected = {name: value.clone() for name, value in run(layer, None, noise).items()}
    found = run(layer, None, noise, "cuda:1")
    for name, value in found.items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("gate", "groups"), GATES)
def test_tokens_that_are_not_finite_are_found_later(gate, groups, as_on_a_device):
    layer = MoELayer(MoEConfig(6, 5, 8, 2, gate=gate, num_groups=groups), "encoder's MoE layer")
    layer = layer.to(as_on_a_device())
    x = torch.randn(9, 6)
    x[3, 2] = float("inf")
    y, stats = layer(x)
    assert y.isnan().any()
    with pytest.raises(FloatingPointError, match="infinities or NaN in .* encoder's MoE layer"):
        stats.check_finite()
    with pytest.raises(FloatingPointError, match="infinities or NaN in .* encoder's MoE layer"):
        layer.eval()(x)
