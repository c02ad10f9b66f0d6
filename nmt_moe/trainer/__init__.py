"""fairseq's trainer, extended: experts spread over processes, and checks before a training starts.

Importing this package puts the trainer in the place of fairseq's own, once.
"""

from nmt_moe.trainer.expert_parallel_trainer import ExpertParallelTrainer
from nmt_moe.trainer.install import install

__all__ = ["ExpertParallelTrainer", "install"]

install()
