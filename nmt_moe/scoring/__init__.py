"""Scores of translations, the logs they come from, and their drawings. Needs no fairseq."""
