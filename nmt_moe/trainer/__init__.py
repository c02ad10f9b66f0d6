"""fairseq's trainer, extended: experts spread over processes, and checks before training.

Importing this package replaces fairseq's trainer, once.
"""

from nmt_moe.trainer.expert_parallel_trainer import ExpertParallelTrainer
from nmt_moe.trainer.install import install

__all__ = ["ExpertParallelTrainer", "install"]

install()
