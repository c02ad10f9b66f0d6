"""Log the metrics of a multilingual task for each pair and for each language."""

import logging
import math
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from fairseq import metrics, utils
from sacrebleu.metrics import BLEU

from nmt_moe.moe import effective_experts
from nmt_moe.tasks._languages import Pair

logger = logging.getLogger(__name__)

# fairseq's counts for BLEU: matches and totals of 1- to 4-grams, and lengths.
BLEU_COUNTS = [f"_bleu_{kind}_{n}" for kind in ("counts", "totals") for n in range(4)]
BLEU_COUNTS += ["_bleu_sys_len", "_bleu_ref_len"]
LAYERS = ("encoder", "decoder")
MOST_SHOWN = 8


def add_pair_columns(log: Dict[str, Any], pair: int, num_pairs: int) -> None:
    """Copy the log of a batch of one pair into the pair's row; other rows are 0.

    All ranks then log the same keys for any pair, and fairseq can sum them.
    """
    values = {
        "_pair_nll": torch.as_tensor(log["nll_loss"]).reshape(1),
        "_pair_ntokens": torch.tensor([log["ntokens"]]),
    }
    if BLEU_COUNTS[0] in log:
        values["_pair_bleu"] = torch.tensor([log[key] for key in BLEU_COUNTS])
    for layer in LAYERS:
        counts = log.get(f"{layer}_moe_load")  # in evaluation: the number of tokens of each expert
        if counts is not None and len(counts) > 1:
            values[f"_pair_{layer}_load"] = counts
    for key, row in values.items():
        rows = torch.zeros(num_pairs, len(row), dtype=torch.float64, device=row.device)
        rows[pair] = row
        log[key] = rows


def reduce_pairs(logging_outputs: List[Dict[str, Any]], pairs: Sequence[Pair]) -> None:
    """Log each pair's loss, perplexity and BLEU, and the number of experts for each language."""
    sums = {
        key: sum(log[key] for log in logging_outputs).cpu()
        for key in logging_outputs[0]
        if key.startswith("_pair_")
    }
    if not sums:
        return
    for number, pair in enumerate(pairs):
        num_tokens = sums["_pair_ntokens"][number].item()
        if num_tokens:
            log_pair(str(pair), {key: rows[number] for key, rows in sums.items()}, num_tokens)
    for layer in LAYERS:
        key = f"_pair_{layer}_load"
        if key not in sums:
            continue
        metrics.log_scalar(key, sums[key].numpy())
        for language, rows in rows_of_languages(layer, pairs).items():
            metrics.log_derived(f"{layer}_{language}_experts", count_experts(key, rows))


def log_pair(pair: str, row: Dict[str, Any], num_tokens: float) -> None:
    """Log the columns of one pair: loss in bits per token, perplexity and BLEU."""
    loss = f"{pair}_nll_loss"
    value = row["_pair_nll"].item() / num_tokens / math.log(2)
    metrics.log_scalar(loss, value, num_tokens, round=3)
    metrics.log_derived(f"{pair}_ppl", lambda meters: utils.get_perplexity(meters[loss].avg))
    if "_pair_bleu" not in row:
        return
    counts = f"_{pair}_bleu"
    metrics.log_scalar(counts, row["_pair_bleu"].numpy())

    def compute_bleu(meters: Any) -> float:
        numbers = np.asarray(meters[counts].sum).astype(int).tolist()
        bleu = BLEU.compute_bleu(
            correct=numbers[:4], total=numbers[4:8], sys_len=numbers[8], ref_len=numbers[9]
        )
        return round(bleu.score, 2)

    metrics.log_derived(f"{pair}_bleu", compute_bleu)


def rows_of_languages(layer: str, pairs: Sequence[Pair]) -> Dict[str, List[int]]:
    """Group pairs by the language that a layer reads (encoder: source; decoder: target).

    Returns:
        Indices into `pairs`, for each language.
    """
    side = "source" if layer == "encoder" else "target"
    languages = dict.fromkeys(getattr(pair, side) for pair in pairs)
    return {
        language: [place for place, pair in enumerate(pairs) if getattr(pair, side) == language]
        for language in languages
    }


def count_experts(key: str, rows: List[int]) -> Any:
    """Return a function that computes the effective number of experts of a language."""

    def count(meters: Any) -> float:
        counts = torch.as_tensor(np.asarray(meters[key].sum))[rows].sum(0)
        return round(effective_experts(counts).item(), 2)

    return count


def log_expert_use(meters: Any, pairs: Sequence[Pair]) -> None:
    """Log which experts the tokens of each language were sent to, most used first."""
    for layer in LAYERS:
        key = f"_pair_{layer}_load"
        if key not in meters:
            continue
        table = torch.as_tensor(np.asarray(meters[key].sum))
        side = "source" if layer == "encoder" else "target"
        lines = [f"expert use of the {layer}, by {side} language (expert: share of the tokens)"]
        for language, rows in rows_of_languages(layer, pairs).items():
            lines.append(describe_use(language, table[rows].sum(0)))
        logger.info("\n".join(lines))


def describe_use(language: str, counts: torch.Tensor) -> str:
    """Return a language's line of the table, given its (E,) counts."""
    shares = counts / counts.sum().clamp_min(1e-9)
    most = shares.sort(descending=True, stable=True).indices[:MOST_SHOWN].tolist()
    use = "  ".join(f"{expert}: {shares[expert]:.1%}" for expert in most)
    return f"  {language:<6}{effective_experts(counts).item():6.1f} effective experts   {use}"
