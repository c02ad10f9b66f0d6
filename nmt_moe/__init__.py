"""Sparsely gated mixture-of-experts translation as a fairseq plugin.

`models`, `tasks`, `criterions`, `optim`, `compat`, `trainer` and `generation` form the shell, which
imports fairseq. All other packages can be imported without fairseq, so
`from nmt_moe.moe import MoELayer` needs only torch.

In every file, these letters stand for sizes in the shapes of tensors:
    B sentences, S source positions, T target positions, N tokens after flattening, D model dim,
    H hidden dim of an expert, E experts, L experts on this rank, K experts per token,
    R rows = (token, expert) pairs, G groups of a hierarchy, P ranks, V vocabulary, W beam size.
The tensors of LSTMs are time-first: (S, B, D).
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import `Translator` and `LanguageModel` only on first use, because they need torch."""
    if name in ("Translator", "LanguageModel"):
        from nmt_moe import inference

        return getattr(inference, name)
    raise AttributeError(f"module `nmt_moe` has no attribute `{name}`")
