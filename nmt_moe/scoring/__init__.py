"""Score translations, read logs and draw figures, without fairseq."""
