"""What all criterions add to their loss and log: the balance of MoE layers."""

from typing import Any, Dict, List

import torch
from fairseq import metrics
from torch import Tensor

from nmt_moe.moe import MoEStats, balance_metrics, gate_entropy, gate_margin

# Summed over the tokens of an update, and over its batches and ranks.
STATS = ("importance", "load", "tokens_per_expert")
GATE_STATS = {"gate_entropy": gate_entropy, "gate_margin": gate_margin}


def add_balance(
    loss: Tensor,
    sample_size: int,
    extra: Dict[str, Any],
    logging_output: Dict[str, Any],
    is_training: bool,
) -> Tensor:
    """Log the balance of a batch, and in training add the balance losses of all MoE layers.

    The trainer divides the summed loss by the summed sample size of all accumulated batches and
    ranks, so each batch's balance loss is multiplied by its own sample size here: what remains is
    the mean balance loss, whatever the batch size, `--update-freq` or the number of ranks.

    Args:
        loss: Of the batch, summed.
        sample_size: What the trainer will divide by.
        extra: The model's second output; its `moe_stats` hold each layer's statistics.
        logging_output: Where the columns go.
        is_training: Whether the model is.

    Returns:
        The whole loss.

    Source: Shazeer et al. 2017, section 4 and Appendix A.
    """
    all_stats: Dict[str, MoEStats] = extra.get("moe_stats", {})
    for name, stats in all_stats.items():
        for key in STATS:
            logging_output[f"{name}_moe_{key}"] = getattr(stats, key).detach()
        for key, function in GATE_STATS.items():
            logging_output[f"{name}_moe_{key}"] = function(stats.gates.detach()).sum()
    if is_training and all_stats:
        balance_loss = torch.stack([s.balance_loss for s in all_stats.values()]).sum()
        loss = loss + sample_size * balance_loss
        logging_output["balance_loss"] = sample_size * balance_loss.detach()
    return loss


def check_finite(loss: Tensor, sample: Dict[str, Any], extra: Dict[str, Any]) -> None:
    """Stop at a loss that is NaN, before it reaches the parameters.

    On a GPU, MoE layers leave it to this to find tokens that are not finite, which make the loss
    NaN: the host reads the loss anyway.

    Raises:
        FloatingPointError: naming the first MoE layer with such tokens, else the sentences.
    """
    if torch.isnan(loss.detach()).any():
        for stats in extra.get("moe_stats", {}).values():
            stats.check_finite()
        sentences = sample["id"].tolist()
        raise FloatingPointError(
            f"The loss is NaN in the batch of sentences {sentences[:8]}"
            f"{'...' if len(sentences) > 8 else ''}. Checkpoints already written are whole: "
            "go on from the last one with a lower `--lr`, a lower `--clip-norm`, or in fp32."
        )


def reduce_balance(logging_outputs: List[Dict[str, Any]]) -> None:
    """Log the columns of Table 6, and what the gates did, from all outputs of one update.

    Those are the logging outputs of all its batches and ranks.
    """
    sample_size = sum(log["sample_size"] for log in logging_outputs)
    if "balance_loss" in logging_outputs[0]:
        total = sum(log["balance_loss"] for log in logging_outputs)
        metrics.log_scalar("balance_loss", total / sample_size, sample_size, round=4)
    suffix = f"_moe_{STATS[0]}"
    layers = [key[: -len(suffix)] for key in logging_outputs[0] if key.endswith(suffix)]
    if not layers:
        return
    rows = [layer_metrics(layer, logging_outputs) for layer in layers]
    for layer, row in zip(layers, rows, strict=False):
        for key, value in row.items():
            metrics.log_scalar(f"{layer}_moe_{key}", value, sample_size, round=3)
    for key in rows[0]:
        mean = sum(row[key] for row in rows) / len(rows)
        metrics.log_scalar(f"moe_{key}", mean, sample_size, round=3)


def layer_metrics(layer: str, logging_outputs: List[Dict[str, Any]]) -> Dict[str, Tensor]:
    """Compute a layer's columns from the logging outputs of one update.

    Returns:
        Those of `balance_metrics`; the mean `gate_entropy` (nats) and `gate_margin` of a token; the
        mean `rows_per_expert`, and the number of `idle_experts`, which had no row.
    """
    importance, load, rows, *gate_sums = (
        sum(log[f"{layer}_moe_{key}"] for log in logging_outputs) for key in (*STATS, *GATE_STATS)
    )
    tokens = importance.sum().clamp_min(1e-9)  # the gates of a token sum to 1
    return {
        **balance_metrics(importance, load),
        **{key: value / tokens for key, value in zip(GATE_STATS, gate_sums, strict=True)},
        "rows_per_expert": rows.double().mean(),
        "idle_experts": (rows == 0).sum(),
    }
