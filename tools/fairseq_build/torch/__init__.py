"""Replace torch, but only while fairseq is being built: see utils/cpp_extension.py."""
