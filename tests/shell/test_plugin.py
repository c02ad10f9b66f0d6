"""The registration of the plugin."""

import argparse

from fairseq import utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.optim.lr_scheduler import LR_SCHEDULER_REGISTRY

from nmt_moe import plugin


def test_all_names_are_registered_however_often_register_is_called():
    plugin.register()
    plugin.register()
    assert {"lstm_moe_gnmt", "lstm_gnmt"} <= ARCH_MODEL_REGISTRY.keys()
    assert "moe_label_smoothed_cross_entropy" in CRITERION_REGISTRY
    assert "warmup_hold_inverse_sqrt" in LR_SCHEDULER_REGISTRY


def test_user_dir_is_accepted_after_the_registration(repository):
    plugin.register()
    model = ARCH_MODEL_REGISTRY["lstm_moe_gnmt"]
    utils.import_user_module(argparse.Namespace(user_dir=str(repository / "nmt_moe")))
    assert ARCH_MODEL_REGISTRY["lstm_moe_gnmt"] is model
