"""Score translations, read logs, draw figures. Needs no fairseq."""
