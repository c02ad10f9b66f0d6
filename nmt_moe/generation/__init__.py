"""GNMT's beam search for fairseq's commands and tasks, installed by importing this package."""

from nmt_moe.generation.options import add_gnmt_search

__all__ = ["add_gnmt_search"]

add_gnmt_search()
