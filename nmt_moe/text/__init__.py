"""Read lines of text, and split them into sentence pieces, without torch or fairseq."""
