"""Text: its lines and its pieces. Needs neither torch nor fairseq."""
