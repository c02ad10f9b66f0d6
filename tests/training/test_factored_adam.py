"""The updates and the state of FactoredAdam, and the options that it refuses."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing import assert_close

from nmt_moe.moe import MoEConfig, MoELayer
from nmt_moe.parallel import is_expert, mark_expert
from nmt_moe.training import FactoredAdam

CONFIG = MoEConfig(model_dim=6, hidden_dim=10, num_experts=4, top_k=2)


def make_experts(dtype=torch.float64) -> Parameter:
    torch.manual_seed(1)
    parameter = Parameter(torch.randn(3, 4, 5).to(dtype))
    mark_expert(parameter)
    return parameter


def make_layer() -> MoELayer:
    torch.manual_seed(2)
    return MoELayer(CONFIG).double()


def train(layer: MoELayer, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        y, stats = layer(torch.randn(20, CONFIG.model_dim, dtype=torch.float64))
        optimizer.zero_grad()
        ((y - 1).square().sum() + stats.balance_loss).backward()
        optimizer.step()


def reload(state: dict) -> dict:
    """Write a state and read it with torch's safe loader."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def rank_one_grad(step: int) -> Tensor:
    """Return a gradient whose squares have rank one, with a different factor at each update."""
    generator = torch.Generator().manual_seed(3)
    row, column = (
        torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        for shape in ((3, 4, 1), (3, 1, 5))
    )
    signs = torch.randint(0, 2, (3, 4, 5), generator=generator) * 2 - 1
    return row * column * signs * (1 + math.sin(step))


def test_if_squared_gradients_have_rank_one_it_equals_adam_without_momentum():
    ours, theirs = make_experts(), make_experts()
    # This eps is too small to have an effect, wherever it is added.
    options = {"lr": 0.1, "betas": (0.0, 0.9), "eps": 1e-30, "weight_decay": 0.2}
    factored = FactoredAdam([ours], **options)
    adam = torch.optim.AdamW([theirs], **options)
    for step in range(6):
        for parameter, optimizer in ((ours, factored), (theirs, adam)):
            parameter.grad = rank_one_grad(step)
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_parameters_are_trained_by_adam(dtype):
    torch.manual_seed(1)
    shapes = [(4, 5), (7,), (2, 3, 4), ()]
    ours = [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    # This parameter has a different memory layout.
    ours.append(Parameter(torch.randn(5, 4, dtype=dtype).t()))
    theirs = [Parameter(parameter.detach().clone()) for parameter in ours]
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-30, "weight_decay": 0.2}
    factored, adam = FactoredAdam(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(5):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad = torch.randn_like(one) if (step + place) % 3 else None
            other.grad = None if one.grad is None else one.grad.clone()
        factored.step()
        adam.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_eps_is_added_to_the_root_of_the_uncorrected_moment():
    # In the first update with gradient 1, the second moment is 0.25 with root 0.5, and eps 0.5
    # makes the divisor 1. The first moment of 0.5 and the correction sqrt(0.25) / 0.5 of both
    # moments give a step of 0.5 lr. Experts use the gradient 1 instead of the first moment, without
    # its correction, so the step is also 0.5 lr.
    for parameter in (Parameter(torch.zeros(2, 3)), make_experts(torch.float32)):
        before = parameter.detach().clone()
        parameter.grad = torch.ones_like(parameter)
        FactoredAdam([parameter], lr=0.1, betas=(0.5, 0.75), eps=0.5).step()
        torch.testing.assert_close(before - parameter, torch.full_like(parameter, 0.05))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_updated_in_float32(dtype):
    for make in (make_experts, lambda dtype: Parameter(make_experts().detach().to(dtype))):
        ours = make(dtype)
        wide = Parameter(ours.detach().float())
        if is_expert(ours):
            mark_expert(wide)
        ours.grad = torch.randn(ours.shape).to(dtype)
        wide.grad = ours.grad.float()
        for parameter in (ours, wide):
            FactoredAdam([parameter], lr=0.1).step()
        assert ours.dtype == dtype
        # Both compute in float32, but compiled loops and torch round the last bits differently.
        assert_close(ours, wide.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_experts_of_a_layer_keep_a_row_and_a_column():
    layer = make_layer()
    optimizer = FactoredAdam(layer.parameters(), lr=0.01)
    train(layer, optimizer, range(1))
    state = optimizer.state[layer.experts.weight_in]
    assert {name: value.shape for name, value in state.items() if name != "step"} == {
        "row_mean": (4, 6),
        "column_mean": (4, 10),
    }
    assert sorted(optimizer.state[layer.gate.gate_weight]) == ["exp_avg", "exp_avg_sq", "step"]


def test_parameter_groups_may_say_which_parameters_are_factored():
    layer, other = make_layer(), make_layer()
    experts = list(other.experts.parameters())
    named = [
        {"params": experts, "factored": True},
        {"params": list(other.gate.parameters()), "factored": False},
    ]
    train(layer, FactoredAdam(layer.parameters(), lr=0.01), range(3))
    train(other, FactoredAdam(named, lr=0.01), range(3))
    for one, two, start in zip(
        layer.parameters(), other.parameters(), make_layer().parameters(), strict=True
    ):
        assert one.equal(two)
        assert not one.equal(start)


def test_a_single_matrix_may_be_factored():
    experts = make_experts()
    matrix = Parameter(experts.detach()[0].clone())
    for parameter in (experts, matrix):
        parameter.grad = torch.ones_like(parameter)
    FactoredAdam([experts], lr=0.1).step()
    FactoredAdam([matrix], lr=0.1, factored=True).step()
    assert matrix.equal(experts[0])


def test_it_learns():
    layer = make_layer()
    x = torch.randn(50, CONFIG.model_dim, dtype=torch.float64)
    optimizer = FactoredAdam(layer.parameters(), lr=0.01)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (layer(x)[0] - x).square().mean()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(60)]
    assert losses[-1] < losses[0] / 4


def test_a_parameter_without_a_gradient_is_not_changed():
    used, unused = make_experts(), make_experts()
    used.grad = torch.ones_like(used)
    optimizer = FactoredAdam([used, unused], weight_decay=0.1)
    optimizer.step()
    assert unused.equal(make_experts())
    assert not optimizer.state[unused]


def test_a_reloaded_optimizer_continues_with_the_same_bits():
    one = make_layer()
    first = FactoredAdam(one.parameters(), lr=0.01)
    train(one, first, range(3))
    two = copy.deepcopy(one)
    for parameter in two.experts.parameters():
        mark_expert(parameter)  # the copies are new parameters
    second = FactoredAdam(two.parameters(), lr=1.0)
    second.load_state_dict(reload(first.state_dict()))
    train(one, first, range(3, 6))
    train(two, second, range(3, 6))
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert mine.equal(other)
    # Loading has copied the state, so the second optimizer has not changed the first one's.
    assert first.state[one.experts.weight_in]["step"] == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_stay_float32_across_a_reload(dtype):
    experts, dense = make_experts(dtype), Parameter(torch.randn(4).to(dtype))
    first = FactoredAdam([experts, dense])
    for parameter in (experts, dense):
        parameter.grad = torch.randn(parameter.shape).to(dtype) * 1e-4
    first.step()
    second = FactoredAdam([experts, dense])
    second.load_state_dict(reload(first.state_dict()))
    for parameter in (experts, dense):
        for name, value in first.state[parameter].items():
            other = second.state[parameter][name]
            if name == "step":
                assert (value, other) == (1, 1)
            else:
                assert other.dtype == torch.float32
                assert value.equal(other)
                assert value.data_ptr() != other.data_ptr()


def test_the_state_of_adam_loads_if_nothing_is_factored():
    ours, theirs = Parameter(torch.ones(3, 4)), Parameter(torch.ones(3, 4))
    adam = torch.optim.AdamW([theirs], lr=0.1, eps=1e-30)
    theirs.grad = torch.randn(3, 4)
    adam.step()
    optimizer = FactoredAdam([ours], lr=0.1)
    optimizer.load_state_dict(adam.state_dict())
    ours.data.copy_(theirs.data)
    theirs.grad = ours.grad = torch.randn(3, 4)
    adam.step()
    optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_the_state_of_another_kind_of_parameter_is_refused():
    experts, dense = make_experts(), Parameter(make_experts().detach())
    for parameter in (experts, dense):
        parameter.grad = torch.ones_like(parameter)
    factored, adam = FactoredAdam([experts]), FactoredAdam([dense])
    factored.step()
    adam.step()
    with pytest.raises(ValueError, match="column_mean, row_mean, step, but is exp_avg, exp_avg_sq"):
        factored.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="exp_avg_sq, step, but is column_mean.* expert"):
        adam.load_state_dict(factored.state_dict())
    state = factored.state_dict()
    state["state"][0]["row_mean"] = torch.zeros(3, 7)
    with pytest.raises(ValueError, match=r"`row_mean` .* shape \(3, 4\), but was saved as \(3, 7"):
        factored.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "`lr` must be at least 0, but is -0.1"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0, but is -1"),
        ({"betas": (1.0, 0.9)}, "`beta1` must be at least 0 and less than 1, but is 1"),
        ({"betas": (0.9, -0.5)}, "`beta2` must be at least 0 and less than 1, but is -0.5"),
        ({"eps": 0.0}, "`eps` must be greater than 0, but is 0.0"),
        ({"eps": math.nan}, "`eps` must be greater than 0, but is nan"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FactoredAdam([make_experts()], **options)


def test_a_vector_has_no_rows_and_columns():
    optimizer = FactoredAdam([make_experts()])
    group = {"params": [Parameter(torch.zeros(5))], "factored": True}
    with pytest.raises(ValueError, match=r"2 dimensions, but number 0 .* \(5,\)"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="`grad` must be dense"):
        FactoredAdam(embedding.parameters()).step()
