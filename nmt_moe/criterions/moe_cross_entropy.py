"""The criterion for language models, `--criterion moe_cross_entropy`."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple

from fairseq import metrics, utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from omegaconf import II
from torch import Tensor, nn
from torch.nn import functional as F

from nmt_moe.criterions._balance import add_balance, check_finite, reduce_balance
from nmt_moe.kernels import cross_entropy, has_compiled_loops
from nmt_moe.training import draw_classes, sampled_nll


@dataclass
class MoECrossEntropyConfig(FairseqDataclass):
    """Options of the criterion."""

    sampled_softmax: int = field(
        default=0,
        metadata={
            "help": "number of symbols to draw for each batch to estimate the softmax during "
            "training; 0: compute it in full, as evaluation always does"
        },
    )
    sentence_avg: bool = II("optimization.sentence_avg")


def _check_plain_softmax(model: nn.Module) -> None:
    """Reject a model that does not return logits.

    Raises:
        ValueError: if the model has an adaptive softmax. The message names the options.
    """
    if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None:
        raise ValueError(
            "`--criterion` must be adaptive_loss with `--adaptive-softmax-cutoff`, but is "
            "moe_cross_entropy, which needs the logits of all symbols. Use adaptive_loss, or omit "
            "--adaptive-softmax-cutoff."
        )


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropy(FairseqCriterion):
    """The cross-entropy of all tokens, including end marks, plus the balance losses.

    With --sampled-softmax N, `nll_loss` and `ppl` in the training log are only estimates, which are
    too low on average. An additional column, `sampled_softmax` = N, marks them. In validation, they
    are exact, and the column is absent.
    """

    adds_balance_losses = True

    def __init__(self, task: Any, sentence_avg: bool, sampled_softmax: int) -> None:
        super().__init__(task)
        self.sentence_avg, self.num_draws = sentence_avg, sampled_softmax
        dictionary = task.target_dictionary
        # After the special symbols, fairseq's dictionaries are sorted by decreasing frequency. The
        # last two special symbols, end mark and unknown word, are frequent. The first two, begin
        # mark and padding, are never targets, so they are treated as the rarest symbols.
        self.first_class = dictionary.eos()
        if not 0 <= sampled_softmax <= len(dictionary):
            raise ValueError(
                f"`--sampled-softmax` must be from 0 to {len(dictionary)}, the size of the "
                f"dictionary, but is {sampled_softmax}. Use a smaller number, or 0 for the full "
                "softmax."
            )

    def forward(
        self, model: nn.Module, sample: Dict, reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Tensor]]:
        """Return the loss of a batch, its sample size and its log."""
        _check_plain_softmax(model)
        is_sampled = model.training and self.num_draws > 0
        nll, extra = self._sampled(model, sample) if is_sampled else self._full(model, sample)
        num_sentences, num_tokens = sample["target"].size(0), sample["ntokens"]
        sample_size = num_sentences if self.sentence_avg else num_tokens
        logging_output = {
            "nll_loss": nll.detach().sum(),
            "ntokens": num_tokens,
            "nsentences": num_sentences,
            "sample_size": sample_size,
        }
        if is_sampled:
            # Columns are summed over batches and ranks, so this constant needs a weight.
            logging_output["sampled_softmax"] = self.num_draws * num_tokens
        loss = nll.sum() if reduce else nll
        loss = add_balance(loss, sample_size, extra, logging_output, model.training)
        logging_output["loss"] = loss.data
        check_finite(loss, sample, extra)
        return loss, sample_size, logging_output

    def _full(self, model: nn.Module, sample: Dict) -> Tuple[Tensor, Dict[str, Any]]:
        """Return the negative log-likelihoods of all N targets, and the model's second output."""
        logits, extra = model(**sample["net_input"])
        is_token = sample["target"].ne(self.padding_idx)
        target = sample["target"][is_token]
        if has_compiled_loops(logits):
            flat, padding = logits.flatten(0, -2), self.padding_idx
            return cross_entropy(flat, sample["target"].flatten(), padding)[0][
                is_token.flatten()
            ], extra
        return F.cross_entropy(logits[is_token].float(), target, reduction="none"), extra

    def _sampled(self, model: nn.Module, sample: Dict) -> Tuple[Tensor, Dict[str, Any]]:
        """Estimate the return values of `_full` without computing all logits."""
        output = getattr(model.decoder, "output", None)
        if not isinstance(output, nn.Linear):
            raise ValueError(
                f"`--sampled-softmax` must be 0, but is {self.num_draws}. It cannot be used with "
                "models from fairseq or other plugins, because their softmax layer is unknown."
            )
        features, extra = model(**sample["net_input"], features_only=True)
        weight = output.weight
        is_token = sample["target"].ne(self.padding_idx)
        classes = draw_classes(self.num_draws, len(weight), self.first_class, weight.device)
        return sampled_nll(features[is_token], weight, sample["target"][is_token], classes), extra

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict]) -> None:
        """Log the means over all batches and ranks of one update, with losses in bits."""
        for key, divisor in (("loss", "sample_size"), ("nll_loss", "ntokens")):
            total = sum(log[key] for log in logging_outputs)
            weight = sum(log[divisor] for log in logging_outputs)
            metrics.log_scalar(key, total / weight / math.log(2), weight, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        if "sampled_softmax" in logging_outputs[0]:
            tokens = sum(log["ntokens"] for log in logging_outputs)
            draws = sum(log["sampled_softmax"] for log in logging_outputs) / tokens
            metrics.log_scalar("sampled_softmax", draws, tokens, round=0)
        reduce_balance(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Return True, because all ranks log the same keys."""
        return True
