"""Register factored Adam as `--optimizer factored_adam`."""

import ast
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Tuple

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

from nmt_moe.training import FactoredAdam


@dataclass
class FactoredAdamConfig(FairseqDataclass):
    """The optimizer's options, with the same names and defaults as in fairseq's adam."""

    adam_betas: Any = field(
        default=(0.9, 0.999), metadata={"help": "betas of Adam; experts use only the second"}
    )
    adam_eps: float = field(default=1e-8, metadata={"help": "epsilon of Adam, greater than 0"})
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled weight decay"})
    lr: List[float] = II("optimization.lr")


@register_optimizer("factored_adam", dataclass=FactoredAdamConfig)
class FairseqFactoredAdam(FairseqOptimizer):
    """Adam that stores the second moment of each expert matrix as one row and one column."""

    def __init__(self, cfg: FactoredAdamConfig, params: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        params = list(params)
        if len(params) == 1 and params[0].dim() == 1:
            raise ValueError(
                "`--optimizer factored_adam` needs the experts' matrices, but `--fp16` joins all "
                "parameters into one vector. Add --fp16-no-flatten-grads, or use "
                "--memory-efficient-fp16 or --bf16."
            )
        self._optimizer = FactoredAdam(params, **self.optimizer_config)
        # When a state is loaded, fairseq would undo the cast that torch's optimizers apply to it,
        # but this optimizer does not cast its state.
        setattr(self._optimizer, "disable_mem_eff_fp16_loading_hack", True)  # noqa: B010

    @property
    def optimizer_config(self) -> Dict[str, Any]:
        """Return the options under the names that `FactoredAdam` uses."""
        return {
            "lr": self.cfg.lr[0],
            "betas": parse_betas(self.cfg.adam_betas),
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """Return True, because half-precision parameters are updated in float32."""
        return True

    @property
    def supports_flat_params(self) -> bool:
        """Return False, because one long vector has no rows and columns."""
        return False

    def load_state_dict(
        self, state_dict: Dict[str, Any], optimizer_overrides: Optional[Dict[str, Any]] = None
    ) -> None:
        """Load the state of this optimizer, and apply --optimizer-overrides to it.

        Raises:
            ValueError: if the state does not match the parameters. The message says how to start
                with a new state.
        """
        try:
            super().load_state_dict(state_dict, optimizer_overrides)
        except ValueError as error:
            raise ValueError(
                f"{error} (To start with a new state, add --reset-optimizer.)"
            ) from error


def parse_betas(betas: Any) -> Tuple[float, float]:
    """Parse a pair such as `(0.9, 0.999)`, given as text or as omegaconf's list.

    Raises:
        ValueError: if `betas` is not a pair of numbers.
    """
    try:
        beta1, beta2 = ast.literal_eval(betas) if isinstance(betas, str) else betas
        return float(beta1), float(beta2)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"`--adam-betas` must be a pair such as '(0.9, 0.999)', but is '{betas}'."
        ) from error
