"""Adam with one row and one column of state for each expert matrix instead of two matrices."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from nmt_moe.checks import check_range
from nmt_moe.kernels import factored_adam
from nmt_moe.parallel import is_expert


class FactoredAdam(torch.optim.Optimizer):
    """Adam that, for experts, has no first moment and a factored second moment.

    For each expert matrix (the last two dimensions of a parameter), it keeps the running means of
    the squared gradient over each row and each column. The second moment is approximated by
    outer(row_mean, column_mean) / mean(row_mean), which is exact if squared gradients have rank 1.
    All other parameters are trained by ordinary Adam. Means are kept in float32 (float64 for
    float64) for every parameter dtype, even across `load_state_dict`.

    If t is the number of updates, each step is

        weight -= lr * weight_decay * weight
        weight -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * first / (sqrt(second) + eps)

    where `first` is the gradient itself and beta1 is 0 for experts. Weight decay is decoupled, and
    eps is placed as in fairseq's Adam. An expert without tokens has a gradient of 0: its means
    decay by beta2, and its weights only by weight decay. t counts updates of the whole tensor.

    Args:
        params: Parameters, or groups of them. A group's `factored` says whether its parameters are
            treated as experts. With None, the default, only parameters marked by `mark_expert`
            (which `MoELayer` calls) are treated as experts.
        lr: Learning rate.
        betas: Shares of the old first and second moments in the new ones.
        eps: Number added to the root of the second moment; greater than 0.
        weight_decay: Weight decay per unit of learning rate.
        factored: The value of `factored` for groups that do not set it.

    Raises:
        ValueError: if an option is out of range, or a factored parameter is not a matrix.

    Source: Shazeer et al. 2017, Appendix D; Kingma and Ba 2015, end of section 2 (for the place of
    eps).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        factored: bool | None = None,
    ) -> None:
        options = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "factored": factored}
        super().__init__(params, {"lr": lr, **options})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # missing from plain Adam's checkpoints
            group.setdefault("factored", None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check the options and parameters of a group, and add it."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: Function that computes the loss again, with its gradients.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Each list shares one call of Adam; a parameter that must be copied gets its own.
            batches: dict[tuple, list[Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                _check_dense(parameter.grad)
                state = self._state(parameter, group["factored"])
                state["step"] += 1
                if "row_mean" in state:
                    self._step_experts(parameter, parameter.grad, group)
                else:
                    key = (state["step"], parameter.device, parameter.dtype)
                    alone = id(parameter) if _needs_copy(parameter) else 0
                    batches[*key, alone].append(parameter)
            for batch in batches.values():
                self._step_dense(batch, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state that `state_dict` returned.

        Args:
            state_dict: State to load; it may come from torch's or fairseq's Adam if no parameter is
                factored.

        Raises:
            ValueError: if the state does not fit these parameters.
        """
        loaded = []
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            pairs = zip(saved_group["params"], group["params"], strict=False)
            for number, (index, parameter) in enumerate(pairs):
                saved = state_dict["state"].get(index)
                if saved:
                    factored = _is_factored(parameter, saved_group.get("factored"))
                    _check_state(number, parameter, factored, saved)
                    loaded.append((parameter, saved))
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype, but the means must keep theirs.
        for parameter, saved in loaded:
            state = {name: _like_means(saved[name], parameter) for name in saved if name != "step"}
            self.state[parameter] = {"step": int(saved["step"]), **state}

    def _state(self, parameter: Parameter, factored: bool | None) -> dict[str, Any]:
        """Return a parameter's state, created at its first update."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            shapes = _state_shapes(parameter, _is_factored(parameter, factored))
            for name, shape in shapes.items():
                dtype = _means_dtype(parameter)
                state[name] = torch.zeros(shape, dtype=dtype, device=parameter.device)
        return state

    def _step_experts(self, parameter: Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state, (rows, columns) = self.state[parameter], parameter.shape[-2:]
        factored_adam(
            parameter.view(-1, rows, columns),
            grad.reshape(-1, rows, columns),
            state["row_mean"].view(-1, rows),
            state["column_mean"].view(-1, columns),
            step=state["step"],
            lr=group["lr"],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _step_dense(self, parameters: list[Parameter], group: dict[str, Any]) -> None:
        """Run torch's fused Adam on parameters with the same update number, device and dtype."""
        states = [self.state[parameter] for parameter in parameters]
        dtype = _means_dtype(parameters[0])
        weights = [p.detach().to(dtype).contiguous() for p in parameters]
        grads = [p.grad.to(dtype).contiguous() for p in parameters if p.grad is not None]
        step, (beta1, beta2) = states[0]["step"], group["betas"]
        counts = weights[0].new_full((len(weights),), step - 1, dtype=torch.float32)
        adamw(
            weights,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(counts.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            # torch adds eps to the root of the corrected second moment.
            eps=group["eps"] / math.sqrt(1 - beta2**step),
            maximize=False,
        )
        for parameter, weight in zip(parameters, weights, strict=True):
            if _needs_copy(parameter):
                parameter.copy_(weight)


def _needs_copy(parameter: Parameter) -> bool:
    """Return whether torch's Adam, which requires one dtype and whole rows, needs a copy."""
    return parameter.dtype != _means_dtype(parameter) or not parameter.is_contiguous()


def _means_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _like_means(value: Tensor, parameter: Parameter) -> Tensor:
    """Copy a saved mean to the parameter's device."""
    return value.detach().to(parameter.device, _means_dtype(parameter), copy=True).contiguous()


def _is_factored(parameter: Parameter, factored: bool | None) -> bool:
    return is_expert(parameter) if factored is None else factored


def _state_shapes(parameter: Parameter, factored: bool) -> dict[str, torch.Size]:
    shape = parameter.shape
    if factored:
        return {"row_mean": shape[:-1], "column_mean": shape[:-2] + shape[-1:]}
    return {"exp_avg": shape, "exp_avg_sq": shape}


def _check_dense(grad: Tensor) -> None:
    if grad.is_sparse:
        raise ValueError(
            "`grad` must be dense for FactoredAdam, but is sparse. Build the embedding with "
            "sparse=False."
        )


def _check_group(group: dict[str, Any]) -> None:
    check_range("lr", group["lr"], 0)
    check_range("weight_decay", group["weight_decay"], 0)
    for name, beta in zip(("beta1", "beta2"), group["betas"], strict=True):
        if not 0 <= beta < 1:
            raise ValueError(f"`{name}` must be at least 0 and less than 1, but is {beta}.")
    if not group["eps"] > 0:
        raise ValueError(
            f"`eps` must be greater than 0, but is {group['eps']}: it is the whole divisor as "
            "long as all gradients have been 0. Use 1e-8."
        )
    for number, parameter in enumerate(group["params"]):
        factored = _is_factored(parameter, group["factored"])
        if factored and (parameter.dim() < 2 or not parameter.is_contiguous()):
            raise ValueError(
                "a factored parameter must be contiguous and have at least 2 dimensions, but "
                f"number {number} of its group has the shape {tuple(parameter.shape)} and strides "
                f"{parameter.stride()}. Put it into a group with factored=False."
            )


def _check_state(number: int, parameter: Parameter, factored: bool, saved: dict[str, Any]) -> None:
    wanted = _state_shapes(parameter, factored)
    if sorted(saved) != sorted(["step", *wanted]):
        raise ValueError(
            f"the saved state of parameter {number} {tuple(parameter.shape)} must be "
            f"{', '.join(sorted(['step', *wanted]))}, but is {', '.join(sorted(saved))}: it was "
            "saved by another optimizer, or as "
            f"{'a dense' if factored else 'an expert'} parameter. Load the file with that "
            "optimizer, or start with a new state."
        )
    for name, shape in wanted.items():
        if saved[name].shape != shape:
            raise ValueError(
                f"`{name}` of parameter {number} must have the shape {tuple(shape)}, but was saved "
                f"as {tuple(saved[name].shape)}. Load the state of a model of the same size."
            )
