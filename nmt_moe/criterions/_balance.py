"""Add the balance losses of MoE layers to a criterion's loss, and log the layers' balance."""

import functools
from typing import Any, Dict, List

import torch
from fairseq import metrics
from torch import Tensor

from nmt_moe.moe import MoEStats, balance_metrics, gate_entropy, gate_margin

# Statistics that are summed over the tokens of an update, across its batches and ranks.
STATS = ("importance", "load", "tokens_per_expert")
GATE_STATS = {"gate_entropy": gate_entropy, "gate_margin": gate_margin}


def moe_stats(extra: Any) -> Dict[str, MoEStats]:
    """Return the statistics of all MoE layers from a model's second output.

    fairseq's own models may return anything there, such as None, a tensor, or a dictionary without
    statistics.
    """
    return extra.get("moe_stats", {}) if isinstance(extra, dict) else {}


def add_balance(
    loss: Tensor,
    sample_size: int,
    extra: Any,
    logging_output: Dict[str, Any],
    is_training: bool,
) -> Tensor:
    """Log the balance of a batch and, during training, add the balance losses of all MoE layers.

    The trainer divides the summed loss by the summed sample size of all accumulated batches and
    ranks. The balance loss of each batch is therefore multiplied by the batch's sample size. The
    result is the mean balance loss for any batch size, `--update-freq` and number of ranks.

    Args:
        loss: The summed loss of the batch.
        sample_size: Sample size of the batch.
        extra: The model's second output; its `moe_stats` are the statistics of each layer.
        logging_output: The log of the batch; columns are added to it.
        is_training: Whether the model is in training mode.

    Returns:
        The total loss.

    Source: Shazeer et al. 2017, section 4 and Appendix A.
    """
    all_stats = moe_stats(extra)
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


def check_finite(loss: Tensor, sample: Dict[str, Any], extra: Any) -> None:
    """Stop training if the loss is NaN, before the parameters are updated.

    On a GPU, MoE layers do not check whether tokens are finite. If some are not, the loss is NaN,
    and this check finds it. The host reads the loss anyway, so the check does not make it wait.

    Raises:
        FloatingPointError: if the loss is NaN. The message names the first MoE layer with tokens
            that are not finite or, if there is none, the sentences of the batch.
    """
    if torch.isnan(loss.detach()).any():
        for stats in moe_stats(extra).values():
            stats.check_finite()
        sentences = sample["id"].tolist()
        raise FloatingPointError(
            f"The loss is NaN in the batch of sentences {sentences[:8]}"
            f"{'...' if len(sentences) > 8 else ''}. Checkpoints already written are unaffected. "
            "Resume from the last one with a lower `--lr` or `--clip-norm`, or in fp32."
        )


def reduce_balance(logging_outputs: List[Dict[str, Any]]) -> None:
    """Log the columns of Table 6 and the gates' statistics, from the logs of all batches and ranks.

    During training, the columns are means over updates, because the losses improve the balance of
    each update. In evaluation, they are computed over all tokens together, because a mean over
    batches would grow as batches get smaller.
    """
    sample_size = sum(log["sample_size"] for log in logging_outputs)
    is_training = "balance_loss" in logging_outputs[0]
    if is_training:
        total = sum(log["balance_loss"] for log in logging_outputs)
        metrics.log_scalar("balance_loss", total / sample_size, sample_size, round=4)
    suffix = f"_moe_{STATS[0]}"
    layers = [key[: -len(suffix)] for key in logging_outputs[0] if key.endswith(suffix)]
    if not layers:
        return
    sums = {
        f"{layer}_moe_{key}": sum(log[f"{layer}_moe_{key}"] for log in logging_outputs)
        for layer in layers
        for key in (*STATS, *GATE_STATS)
    }
    if is_training:
        for column, value in balance_columns(layers, sums).items():
            metrics.log_scalar(column, value, sample_size, round=3)
        return
    for name, value in sums.items():
        metrics.log_scalar(f"_{name}", value.double().cpu().numpy())
    for column in balance_columns(layers, sums):
        metrics.log_derived(column, functools.partial(_column_of_all, column, layers, list(sums)))


def balance_columns(layers: List[str], sums: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Compute the columns of every layer from sums, and their means over layers (`moe_cv_load`)."""
    rows = {layer: layer_metrics(layer, sums) for layer in layers}
    columns = {f"{layer}_moe_{key}": row[key] for layer, row in rows.items() for key in row}
    for key in rows[layers[0]]:
        columns[f"moe_{key}"] = torch.stack([row[key] for row in rows.values()]).double().mean()
    return columns


def layer_metrics(layer: str, sums: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Compute the columns of one layer from sums over all tokens of an update or an evaluation.

    Returns:
        The columns of `balance_metrics`; `gate_entropy` (in nats) and `gate_margin`, means over
        tokens; `rows_per_expert`, the mean over experts; and `idle_experts`, the number of experts
        without rows.
    """
    importance, load, rows, *gate_sums = (
        sums[f"{layer}_moe_{key}"] for key in (*STATS, *GATE_STATS)
    )
    tokens = importance.sum().clamp_min(1e-9)  # the gates of a token sum to 1
    return {
        **balance_metrics(importance, load),
        **{key: value / tokens for key, value in zip(GATE_STATS, gate_sums, strict=True)},
        "rows_per_expert": rows.double().mean(),
        "idle_experts": (rows == 0).sum(),
    }


def _column_of_all(column: str, layers: List[str], names: List[str], meters: Any) -> float:
    """Compute one column from sums over all batches."""
    sums = {name: torch.as_tensor(meters[f"_{name}"].sum) for name in names}
    return round(balance_columns(layers, sums)[column].item(), 3)
