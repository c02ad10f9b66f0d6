"""Imports in the server that forks the processes of `ranks.py`, so that the forks start fast."""

import importlib
import importlib.util

importlib.import_module("nmt_moe.moe")
if importlib.util.find_spec("fairseq") is not None:
    importlib.import_module("nmt_moe.plugin").register()
