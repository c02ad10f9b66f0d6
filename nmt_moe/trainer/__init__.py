"""Extend fairseq's trainer: spread experts over processes, and check settings before training.

Importing this package replaces fairseq's trainer.
"""

from nmt_moe.trainer.expert_parallel_trainer import ExpertParallelTrainer
from nmt_moe.trainer.install import install

__all__ = ["ExpertParallelTrainer", "install"]

install()
