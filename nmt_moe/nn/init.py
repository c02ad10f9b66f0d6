"""Initialise the weights of the networks."""

from torch import nn

from nmt_moe.parallel import is_expert


def init_weights(module: nn.Module, init_range: float) -> None:
    """Initialise the weights of a network.

    Matrices are drawn uniformly from [-init_range, init_range]. Biases start at 0, except for the
    biases of forget gates, which start at 1. Experts, gates, and vectors other than biases keep the
    values that their modules gave them.

    Source: Wu et al. 2016, section 8 (range); Shazeer et al. 2017, Appendix A (gates start at 0).
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 and ".gate." not in name and not is_expert(parameter):
            nn.init.uniform_(parameter, -init_range, init_range)
        elif "bias" in name:
            nn.init.zeros_(parameter)
            if "bias_ih" in name:
                forget = slice(len(parameter) // 4, len(parameter) // 2)
                nn.init.ones_(parameter.data[forget])
