"""The criterion for translation models, `--criterion moe_label_smoothed_cross_entropy`."""

from typing import Any, Dict, List, Tuple

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.models import FairseqDecoder, FairseqEncoderDecoderModel
from torch import Tensor, nn

from nmt_moe.criterions._balance import add_balance, check_finite, reduce_balance
from nmt_moe.kernels import cross_entropy, has_compiled_loops


def has_plain_softmax(model: Any, logits: Tensor) -> bool:
    """Return whether compiled loops can compute the model's probabilities from these logits.

    They can if these probabilities are the plain softmax of the logits.
    """
    while isinstance(getattr(model, "module", None), nn.Module):  # unwrap distributed models
        model = model.module
    own = type(model).get_normalized_probs, type(model.decoder).get_normalized_probs
    stock = FairseqEncoderDecoderModel.get_normalized_probs, FairseqDecoder.get_normalized_probs
    is_adaptive = getattr(model.decoder, "adaptive_softmax", None) is not None
    return own == stock and not is_adaptive and has_compiled_loops(logits)


@register_criterion(
    "moe_label_smoothed_cross_entropy", dataclass=LabelSmoothedCrossEntropyCriterionConfig
)
class MoELabelSmoothedCrossEntropy(LabelSmoothedCrossEntropyCriterion):
    """fairseq's label-smoothed cross-entropy, plus the balance losses of all MoE layers."""

    adds_balance_losses = True

    def forward(
        self, model: nn.Module, sample: Dict, reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Tensor]]:
        """Return the loss of a batch, its sample size and its log."""
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
        loss = add_balance(loss, sample_size, net_output[1], logging_output, model.training)
        logging_output["loss"] = loss.data
        check_finite(loss, sample, net_output[1])
        return loss, sample_size, logging_output

    def compute_loss(
        self, model: Any, net_output: Tuple, sample: Dict, reduce: bool = True
    ) -> Tuple[Tensor, Tensor]:
        """Compute fairseq's loss and negative log-likelihood.

        On the CPU, compiled loops do so without creating a tensor of log-probabilities.

        Source: fairseq's `label_smoothed_nll_loss`.
        """
        logits = net_output[0]
        if self.ignore_prefix_size > 0 or not has_plain_softmax(model, logits):
            return super().compute_loss(model, net_output, sample, reduce)
        target = model.get_targets(sample, net_output)
        sums = cross_entropy(logits.flatten(0, -2), target.flatten(), self.padding_idx)
        nll, smooth = (part.sum() if reduce else part.unsqueeze(1) for part in sums)
        share = self.eps / (logits.shape[-1] - 1)
        return (1.0 - self.eps - share) * nll + share * smooth, nll

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict]) -> None:
        """Log the means over all batches and ranks of one update."""
        super().reduce_metrics(logging_outputs)
        reduce_balance(logging_outputs)
