"""Read and write checkpoints of fairseq's format, and the files of experts beside them."""
