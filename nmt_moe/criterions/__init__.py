"""Criterions for fairseq. Importing this package registers them."""

from nmt_moe.criterions.moe_cross_entropy import MoECrossEntropy
from nmt_moe.criterions.moe_label_smoothed_cross_entropy import MoELabelSmoothedCrossEntropy

__all__ = ["MoECrossEntropy", "MoELabelSmoothedCrossEntropy"]
