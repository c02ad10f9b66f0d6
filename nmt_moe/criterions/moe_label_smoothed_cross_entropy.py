"""`--criterion moe_label_smoothed_cross_entropy`."""

from typing import Dict, List, Tuple

import torch
from fairseq import metrics
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from torch import Tensor, nn

from nmt_moe.moe import MoEStats, balance_metrics

STATS = ("importance", "load")


@register_criterion(
    "moe_label_smoothed_cross_entropy", dataclass=LabelSmoothedCrossEntropyCriterionConfig
)
class MoELabelSmoothedCrossEntropy(LabelSmoothedCrossEntropyCriterion):
    """fairseq's label-smoothed cross-entropy, plus the balance losses of all MoE layers.

    The trainer divides the summed loss by the summed sample size of all accumulated batches and
    ranks, so each batch's balance loss is multiplied by its own sample size here: what remains is
    the mean balance loss, whatever the batch size, `--update-freq` or the number of ranks.

    Source: Shazeer et al. 2017, section 4 and Appendix A.
    """

    def forward(
        self, model: nn.Module, sample: Dict, reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Tensor]]:
        """Compute the loss of a batch, its sample size and what to log."""
        net_output = model(**sample["net_input"])
        loss, nll_loss = self.compute_loss(model, net_output, sample, reduce=reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "nll_loss": nll_loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if self.report_accuracy:
            n_correct, total = self.compute_accuracy(model, net_output, sample)
            logging_output["n_correct"], logging_output["total"] = n_correct.data, total.data
        all_stats: Dict[str, MoEStats] = net_output[1].get("moe_stats", {})
        for name, stats in all_stats.items():
            for key in STATS:
                logging_output[f"{name}_moe_{key}"] = getattr(stats, key).detach()
        if model.training and all_stats:
            balance_loss = torch.stack([s.balance_loss for s in all_stats.values()]).sum()
            loss = loss + sample_size * balance_loss
            logging_output["balance_loss"] = sample_size * balance_loss.detach()
        logging_output["loss"] = loss.data
        self._check_finite(loss, sample)
        return loss, sample_size, logging_output

    @staticmethod
    def _check_finite(loss: Tensor, sample: Dict) -> None:
        """Stop at a loss that is NaN, before it reaches the parameters."""
        if torch.isnan(loss.detach()).any():
            sentences = sample["id"].tolist()
            raise FloatingPointError(
                f"The loss is NaN in the batch of sentences {sentences[:8]}"
                f"{'...' if len(sentences) > 8 else ''}. Checkpoints already written are whole: "
                "go on from the last one with a lower `--lr`, a lower `--clip-norm`, or in fp32."
            )

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict]) -> None:
        """Log the summed outputs of all batches and ranks of one update."""
        super().reduce_metrics(logging_outputs)
        sample_size = sum(log["sample_size"] for log in logging_outputs)
        if "balance_loss" in logging_outputs[0]:
            total = sum(log["balance_loss"] for log in logging_outputs)
            metrics.log_scalar("balance_loss", total / sample_size, sample_size, round=4)
        suffix = f"_moe_{STATS[0]}"
        layers = [key[: -len(suffix)] for key in logging_outputs[0] if key.endswith(suffix)]
        if not layers:
            return
        rows = [
            balance_metrics(
                *(sum(log[f"{layer}_moe_{key}"] for log in logging_outputs) for key in STATS)
            )
            for layer in layers
        ]
        for layer, row in zip(layers, rows, strict=False):
            for key, value in row.items():
                metrics.log_scalar(f"{layer}_moe_{key}", value, sample_size, round=3)
        for key in rows[0]:
            mean = sum(row[key] for row in rows) / len(rows)
            metrics.log_scalar(f"moe_{key}", mean, sample_size, round=3)
