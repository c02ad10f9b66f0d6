"""The Triton kernels are tried before use, and a kernel that fails is replaced with a warning."""

import importlib
import warnings

import pytest
import torch

from nmt_moe.kernels import (
    _backend,
    _trial,
    factored_adam,
    gate_logits,
    gather_rows,
    grouped_gemm,
    noisy_top_k,
    plan_rows,
)

pytest.importorskip("triton")

KERNELS = sorted(_trial.TRIALS)
DTYPES = torch.float32, torch.bfloat16, torch.float16
CASES = [
    (kernel, dtype)
    for kernel in KERNELS
    for dtype in DTYPES[: 1 if kernel in ("gating", "gate_logits") else 3]
]
LAUNCHERS = {  # one launcher for each kernel
    "combine_rows": ("combine_rows", "combine_rows_backward"),
    "factored_adam": ("factored_adam", "factored_adam"),
    "gate_logits": ("grouped_gemm", "one_weight_gradient"),
    "gather_rows": ("gather_rows", "sum_rows"),
    "gating": ("gating", "gating_backward"),
    "grouped_gemm": ("grouped_gemm", "weight_gradient"),
}


@pytest.fixture
def untried(device, monkeypatch):
    """Discard the results of earlier trials, and return the device."""
    monkeypatch.delenv("NMT_MOE_KERNELS")
    monkeypatch.setattr(_trial, "_answers", {})
    monkeypatch.setattr(_trial, "GATINGS", _trial.GATINGS[:1])  # the interpreter is slow
    return device


def launcher(kernel: str):
    module, name = LAUNCHERS[kernel]
    return importlib.import_module(f"nmt_moe.kernels._triton.{module}"), name


def ask(kernel: str, dtype: torch.dtype = torch.float32) -> bool:
    return _backend.uses_triton(torch.empty(1, dtype=dtype), kernel)


def break_by(monkeypatch, kernel: str, replacement) -> None:
    module, name = launcher(kernel)
    monkeypatch.setattr(module, name, replacement)


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_sound_kernels_pass_silently(kernel, dtype, untried):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(kernel, dtype)


def test_rows_with_more_experts_than_fit_into_a_block_are_tried(untried, monkeypatch):
    launchers = importlib.import_module("nmt_moe.kernels._triton.gating")
    monkeypatch.setattr(launchers, "MAX_BLOCK_COLUMNS", 16)
    monkeypatch.setattr(_trial, "GATINGS", [(5, 37, 4, [5])])
    calls = []
    original = launchers.sum_kernel
    monkeypatch.setattr(launchers, "sum_kernel", _Spy(original, calls))
    assert ask("gating")
    assert calls


class _Spy:
    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        self.calls.append(grid)
        return self.kernel[grid]


def test_the_trial_also_covers_rows_read_in_chunks():
    launchers = importlib.import_module("nmt_moe.kernels._triton.gating")
    assert any(experts > launchers.MAX_BLOCK_COLUMNS for _, experts, _, _ in _trial.GATINGS)
    assert any(len(sizes) > 1 for *_, sizes in _trial.GATINGS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_does_not_compile_causes_one_warning(kernel, untried, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("ptxas fatal: no such architecture\nmore lines")

    break_by(monkeypatch, kernel, refuse)
    found = rf"kernel `{kernel}` .* on {untried}.* with torch .*: ptxas fatal: no such architecture"
    with pytest.warns(RuntimeWarning, match=found):
        assert not ask(kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ask(kernel)
    assert _trial.failed() == [kernel]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_with_wrong_results_is_found(kernel, untried, monkeypatch):
    module, name = launcher(kernel)
    original = getattr(module, name)

    def spoil(*arguments, **options):
        found = original(*arguments, **options)
        wrong = arguments[0] if found is None else found if torch.is_tensor(found) else found[0]
        wrong.view(-1)[-1] += 0.25
        return found

    break_by(monkeypatch, kernel, spoil)
    with pytest.warns(RuntimeWarning, match="differs from the definition by up to 0.25"):
        assert not ask(kernel)


@pytest.mark.skipif(not _backend.INTERPRETED, reason="a GPU needs no simulated rounding")
def test_a_gpu_that_rounds_too_much_is_found(untried, monkeypatch):
    from tests.support import tensor_cores

    with tensor_cores.simulated_rounding():
        assert ask("gate_logits")
    monkeypatch.setattr(_trial, "_answers", {})
    monkeypatch.setattr(tensor_cores, "multiply_tf32x3", tensor_cores.multiply_tf32)
    found = "`gate_logits` .* its result `product` differs from the definition"
    with tensor_cores.simulated_rounding(), pytest.warns(RuntimeWarning, match=found):
        assert not ask("gate_logits")


def test_a_result_that_is_not_a_number_is_found(untried, monkeypatch):
    nothing = lambda x, tokens: torch.full((len(tokens), x.shape[1]), float("nan"))  # noqa: E731
    module = importlib.import_module("nmt_moe.kernels._triton.gather_rows")
    monkeypatch.setattr(module, "gather_rows", nothing)
    with pytest.warns(RuntimeWarning, match="`gathered rows` differs"):
        assert not ask("gather_rows")


def test_operations_continue_with_torch(untried, monkeypatch):
    """Check that results and gradients are unchanged if no kernel works."""

    def refuse(*arguments, **options):
        raise RuntimeError("out of resource")

    for kernel in KERNELS:
        break_by(monkeypatch, kernel, refuse)
    torch.manual_seed(1)
    clean, weight = torch.randn(9, 6), torch.randn(6, 4, 5)
    with pytest.warns(RuntimeWarning) as caught:
        found = pass_through(clean, weight)
    assert len({str(warning.message) for warning in caught}) == len(caught) == len(KERNELS) - 1
    monkeypatch.setenv("NMT_MOE_KERNELS", "torch")
    for one, other in zip(found, pass_through(clean, weight), strict=True):
        assert torch.equal(one, other)


def pass_through(clean: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the results and gradients of all operations except `combine_rows`."""
    leaves = clean, weight = clean.clone().requires_grad_(), weight.clone().requires_grad_()
    clean = gate_logits(clean, torch.eye(6), None)[0]
    gating = noisy_top_k(clean, None, 2)
    plan = plan_rows(gating.expert_ids, 6)
    rows = gather_rows(clean[:, :4].detach(), plan)
    product = grouped_gemm(rows, weight, plan.offsets)
    grads = torch.autograd.grad(product.sum() + gating.gates.square().sum(), leaves)
    state = weight.detach().clone(), torch.zeros(6, 4), torch.zeros(6, 5)
    factored_adam(state[0], grads[1], *state[1:], step=1, lr=0.1, beta2=0.9, eps=1e-6)
    return [product, gating.gates, *grads, *state]


def test_a_trial_does_not_change_the_callers_state(untried):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ask("combine_rows")
        assert ask("factored_adam")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("forced", ["torch", "triton"])
def test_the_variable_forces_torch_or_triton_without_a_trial(forced, untried, monkeypatch):
    monkeypatch.setenv("NMT_MOE_KERNELS", forced)
    monkeypatch.setattr(_trial, "TRIALS", {})  # a trial would fail
    assert ask("gating") == (forced == "triton")
    assert not ask("gating", torch.float64)


def test_other_values_of_the_variable_are_refused(monkeypatch):
    monkeypatch.setenv("NMT_MOE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="NMT_MOE_KERNELS must be torch or triton, but is 'cuda'"):
        _backend.uses_triton(torch.empty(1), "gating")


def test_triton_is_not_forced_if_it_is_not_installed(untried, monkeypatch):
    monkeypatch.setattr(_backend, "has_triton", lambda: False)
    assert not ask("gating")
    monkeypatch.setenv("NMT_MOE_KERNELS", "triton")
    with pytest.raises(ValueError, match="is triton, but Triton is not installed"):
        ask("gating")
