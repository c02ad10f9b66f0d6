"""Lines of text and sentence pieces. Needs neither torch nor fairseq."""
