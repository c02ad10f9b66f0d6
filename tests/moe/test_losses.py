"""Balance losses, worked out by hand."""

import torch

from nmt_moe.moe import balance_metrics, importance_loss, load_loss, squared_cv


def test_importance_loss_by_hand():
    importance = torch.tensor([2.5, 0.5])
    # The mean is 1.5 and the variance 1.0, so CV^2 = 1 / 2.25.
    torch.testing.assert_close(importance_loss(importance, weight=0.1), torch.tensor(0.1 / 2.25))


def test_load_loss_by_hand():
    load = torch.tensor([1.0, 2.0, 3.0])
    # The mean is 2 and the population variance 2/3, so CV^2 = 1/6.
    torch.testing.assert_close(load_loss(load, weight=0.6), torch.tensor(0.1))


def test_equal_use_costs_nothing():
    assert squared_cv(torch.full((5,), 3.0)) == 0


def test_one_expert_costs_nothing():
    assert squared_cv(torch.tensor([7.0])) == 0


def test_no_tokens_cost_nothing_and_give_a_finite_gradient():
    values = torch.zeros(4, requires_grad=True)
    loss = squared_cv(values)
    loss.backward()
    assert loss == 0
    assert torch.isfinite(values.grad).all()


def test_rows_are_independent_and_unused_experts_get_no_gradient():
    values = torch.tensor([[2.5, 0.5], [0.0, 0.0], [1.0, 3.0]], requires_grad=True)
    torch.testing.assert_close(squared_cv(values), torch.tensor([1 / 2.25, 0.0, 0.25]))
    squared_cv(values).sum().backward()
    for row, grad in zip(values.detach(), values.grad, strict=True):
        alone = row.clone().requires_grad_()
        squared_cv(alone).backward()
        torch.testing.assert_close(grad, alone.grad)
    assert values.grad[1].tolist() == [0.0, 0.0]


def test_gradient_agrees_with_finite_differences():
    values = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_cv, (values,))


def test_metrics_are_the_columns_of_table_6():
    row = balance_metrics(torch.tensor([2.5, 0.5]), torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(row["cv_importance"], torch.tensor(1 / 1.5))
    torch.testing.assert_close(row["cv_load"], torch.tensor(1 / 6).sqrt())
    torch.testing.assert_close(row["max_load"], torch.tensor(1.5))


def test_a_value_that_is_not_a_number_stays_visible():
    assert squared_cv(torch.tensor([1.0, float("nan")])).isnan()
