"""`python -m nmt_moe.cli`: run the command without installing it."""

from nmt_moe.cli import main

main(prog_name="nmt-moe")
