"""`python -m nmt_moe.cli`: the command, also where it is not installed."""

from nmt_moe.cli import main

main(prog_name="nmt-moe")
