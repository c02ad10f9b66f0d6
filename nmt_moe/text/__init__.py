"""Read lines of text, and split them into pieces, without torch or fairseq."""
