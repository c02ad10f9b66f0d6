"""Serve translations through the APIs of LibreTranslate and DeepL, our own API, and a web page.

This package needs the dependencies in the extra `serve`.
"""

from nmt_moe.serving.app import make_app
from nmt_moe.serving.keys import read_keys
from nmt_moe.serving.models import Models
from nmt_moe.serving.server import serve
from nmt_moe.serving.service import Service
from nmt_moe.serving.settings import ServerSettings

__all__ = ["Models", "ServerSettings", "Service", "make_app", "read_keys", "serve"]
