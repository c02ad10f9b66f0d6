"""Gates: which experts a token goes to, and with what weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmt_moe.moe.config import MoEConfig

# Added to the noise's standard deviation, so that the load estimate divides by at least this. The
# paper's eq. 4 has none; the authors' later code has this value.
NOISE_FLOOR = 1e-2


class NoisyTopKGate(nn.Module):
    """Keep the k largest of the noisy gate logits, and softmax over what is kept.

    Logits, noise, softmax and load are computed in float32 (or float64 for float64 tokens),
    whatever autocast says. Both weights start at zero, so that noise alone balances the first
    batches (Appendix A).

    Source: Shazeer et al. 2017, eqs. 3-5 and 8-10.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        shape = config.model_dim, config.num_experts
        self.gate_weight = nn.Parameter(torch.zeros(shape))
        self.noise_weight = nn.Parameter(torch.zeros(shape))

    def forward(
        self, x: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose the experts of each token.

        Args:
            x: (N, D).
            noise: (N, E) standard normal; drawn when None. Used in training only.

        Returns:
            gates: (N, K) float32 or wider, each row sums to 1, largest first.
            expert_ids: (N, K) int64. Equal logits: the lowest id first (in evaluation).
            importance: (E,).
            load: (E,).
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            clean = x @ self.gate_weight.to(dtype)
            if self.training:
                scale = F.softplus(x @ self.noise_weight.to(dtype)) + NOISE_FLOOR
                noise = torch.randn_like(clean) if noise is None else noise.to(dtype)
                noisy = clean + noise * scale
                top, top_ids = noisy.topk(min(self.top_k + 1, clean.shape[1]), dim=1)
            else:
                # topk leaves open which of equal logits wins; a stable sort does not.
                top, top_ids = clean.sort(dim=1, descending=True, stable=True)
            expert_ids = top_ids[:, : self.top_k]
            gates = top[:, : self.top_k].softmax(dim=1)
            # Indices of one row differ, so this scatter and the sum are deterministic.
            importance = torch.zeros_like(clean).scatter(1, expert_ids, gates).sum(0)
            if self.training and self.top_k < clean.shape[1]:
                load = prob_in_top_k(clean, noisy, scale, top, self.top_k).sum(0)
            else:
                chosen = torch.ones_like(gates)
                load = torch.zeros_like(clean).scatter(1, expert_ids, chosen).sum(0)
        return gates, expert_ids, importance, load


def prob_in_top_k(clean: Tensor, noisy: Tensor, scale: Tensor, top: Tensor, top_k: int) -> Tensor:
    """Compute the chance that an expert is in the top k when its own noise is drawn anew.

    The expert must beat the k-th largest of the *others*: the (k+1)-th of all where it is in now,
    the k-th where it is out. Gradients pass through that threshold too.

    Args:
        clean: (N, E). Logits without noise.
        noisy: (N, E). Logits with noise.
        scale: (N, E). Standard deviation of the noise, above 0.
        top: (N, at least K + 1). The largest noisy logits, falling.
        top_k: K, less than E.

    Returns:
        (N, E), each in [0, 1].

    Source: Shazeer et al. 2017, eqs. 8-9.
    """
    threshold_if_in, threshold_if_out = top[:, top_k, None], top[:, top_k - 1, None]
    threshold = torch.where(noisy > threshold_if_in, threshold_if_in, threshold_if_out)
    return torch.special.ndtr((clean - threshold) / scale)
