"""Imports for the server that forks the processes of `ranks.py`, which makes them start quickly."""

import importlib
import importlib.util

importlib.import_module("nmt_moe.moe")
if importlib.util.find_spec("fairseq") is not None:
    importlib.import_module("nmt_moe.plugin").register()
