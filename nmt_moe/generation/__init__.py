"""GNMT's beam search under fairseq's commands and tasks, put there by importing this package."""

from nmt_moe.generation.options import add_gnmt_search

__all__ = ["add_gnmt_search"]

add_gnmt_search()
