"""The layer can be captured in a CUDA graph: the host never needs a value from the device."""

import contextlib
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmt_moe.kernels import _backend
from nmt_moe.moe import MoEConfig, MoELayer

pytest.importorskip("triton")
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

layers = importlib.import_module("nmt_moe.moe.layer")


class RefuseHostTensors(TorchDispatchMode):
    """A mode that refuses operations on CPU tensors, such as copies to or from the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert not any(x.device.type == "cpu" for x in tensors), func
        return out


@pytest.fixture
def launched(monkeypatch):
    """Make "meta" a device with Triton; return the list of started kernels.

    Tensors on "meta" have no values. torch refuses operations that need them (`item`, `tolist`,
    `nonzero`, `cpu`, `numpy`, a mask as an index).
    """
    monkeypatch.setenv("NMT_MOE_KERNELS", "triton")
    monkeypatch.setattr(_backend, "TRITON_DEVICES", frozenset({"meta"}))
    kernels = []
    start = lambda kernel, *args, **named: kernels.append(kernel.fn.__name__)  # noqa: E731
    monkeypatch.setattr(GridExecutor, "__call__", start)
    monkeypatch.setattr(JITFunction, "run", start)

    def wait(*_):
        raise AssertionError("the host waits for the device")

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", wait)
    # torch does not support autocast on this device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return kernels


def make(gate, groups, training, padded):
    """Return a layer and its inputs."""
    config = MoEConfig(16, 32, 8, 2, gate=gate, num_groups=groups)
    x = torch.empty(64, 16, device="meta", requires_grad=True)
    padding = torch.empty(64, dtype=torch.bool, device="meta") if padded else None
    return MoELayer(config).to("meta").train(training), x, padding


def backward(x, y, stats):
    loss = y.sum() + stats.balance_loss
    loss.backward()
    assert x.grad is not None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("gate", "groups"),
    [
        pytest.param("noisy_top_k", 0, id="noisy"),
        pytest.param("noisy_top_k", 4, id="noisy-groups"),
        pytest.param("softmax", 0, id="softmax"),
    ],
)
def test_no_value_from_the_device_is_needed(gate, groups, training, padded, launched, monkeypatch):
    layer, x, padding = make(gate, groups, training, padded)
    monkeypatch.setattr(layers, "is_captured", lambda x: True)
    with RefuseHostTensors():
        backward(x, *layer(x, padding))
    if gate == "noisy_top_k":
        levels = 2 if groups else 1
        assert launched.count("forward_kernel") == launched.count("backward_kernel") == levels
    assert launched.count("_combine_backward_kernel") == 1


def test_outside_a_capture_evaluation_checks_the_tokens(launched):
    layer, x, _ = make("noisy_top_k", 0, training=False, padded=False)
    with pytest.raises(RuntimeError, match="item"):
        layer(x)


def test_strict_balance_waits_for_the_device(launched, monkeypatch):
    """Check that the host needs a value: the number of slots, which depends on the tokens."""
    layer, x, _ = make("strictly_balanced", 0, training=True, padded=False)
    monkeypatch.setattr(layers, "is_captured", lambda x: True)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        layer(x)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [0, 4])
def test_each_replay_of_a_graph_draws_new_noise(groups):
    config = MoEConfig(16, 32, 8, 2, num_groups=groups)
    layer, x = MoELayer(config).cuda(), torch.randn(64, 16, device="cuda", requires_grad=True)

    def step():
        x.grad = None
        y, stats = layer(x)
        (y.sum() + stats.balance_loss).backward()
        return stats.expert_ids

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = step()
    found = []
    for _ in range(3):
        graph.replay()
        found.append(ids.clone())
    assert not found[0].equal(found[1])
    assert not found[1].equal(found[2])
    assert x.grad.isfinite().all()
