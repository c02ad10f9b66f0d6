"""Every search option either takes effect or is refused with a message that names it."""

import json
import math
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fairseq.modules import FairseqDropout
from torch import nn

from nmt_moe.generation.checks import (
    check_bleu_options,
    check_evaluation,
    check_generation,
    check_pieces,
    check_retained_dropout,
)
from tests.support.commands import call
from tests.support.training import TINY_MOE, TRANSLATE, without_updates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "`--beam` must be at least 1, but is 0"),
        ({"nbest": -1}, "`--nbest` must be at least 1, but is -1"),
        ({"max_len_b": -1}, "`--max-len-b` must be at least 0"),
        ({"no_repeat_ngram_size": -2}, "`--no-repeat-ngram-size` must be at least 0"),
        ({"lenpen": math.nan}, "`--lenpen` must be a finite number, but is nan"),
        ({"unkpen": math.nan}, "`--unkpen` must be a number"),
        ({"temperature": 0.0}, "`--temperature` must be above 0, but is 0"),
        ({"beam": 5, "diverse_beam_groups": 2}, "multiple of `--diverse-beam-groups` 2, but is 5"),
        ({"beam": 2, "nbest": 9}, "`--nbest` must be at most `--beam` 2, but is 9"),
        ({"min_len": 500}, "`--min-len` must be at most `--max-len-b` 200, but is 500"),
        ({"batch_size": -1}, "`--batch-size` must be at least 1"),
        ({"max_tokens": 0}, "`--max-tokens` must be at least 1"),
        ({"num_workers": -1}, "`--num-workers` must be at least 0"),
        ({"num_shards": 0}, "`--num-shards` must be at least 1"),
        ({"seed": -1}, "`--seed` must be at least 0"),
        ({"seed": 2**32}, r"`--seed` must be below 2\^32"),
        ({"model_overrides": "{"}, "`--model-overrides` must be a dictionary"),
        ({"model_overrides": "[1]"}, "`--model-overrides` must be a dictionary"),
        ({"sampling": True, "sampling_topp": 2}, "`--sampling-topp` must be above 0 and at most 1"),
        ({"sampling": True, "sampling_topk": 0}, "`--sampling-topk` must be above 0"),
        ({"sampling_topk": 4}, "`--sampling-topk` has an effect only with `--sampling`"),
        ({"sampling": True, "beam": 5, "nbest": 1}, "`--nbest` must equal `--beam` 5"),
    ],
)
def test_bad_options_of_a_search_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        check_generation(Namespace(**options))


def test_an_infinite_penalty_for_unknown_words_is_accepted():
    check_generation(Namespace(unkpen=math.inf, sampling=None, beam=1))


@pytest.mark.parametrize(
    ("bpe", "removed", "is_good"),
    [
        ("sentencepiece", "sentencepiece", False),
        ("characters", "letter", False),
        ("sentencepiece", None, True),
        (None, "sentencepiece", True),
        ("subword_nmt", "@@ ", True),
    ],
)
def test_pieces_are_joined_once(bpe: str | None, removed: str | None, is_good: bool):
    args = Namespace(bpe=bpe, post_process=removed)
    if is_good:
        check_pieces(args)
        return
    with pytest.raises(
        ValueError, match=f"`--remove-bpe {removed}` joins pieces that `--bpe {bpe}"
    ):
        check_pieces(args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"post_process": "sentencpiece"}, "`--remove-bpe` must be one of 'sentencepiece', .* but"),
        (
            {"post_process": "sentencepiece", "context_window": 0},
            "`--remove-bpe` must be one of 'subword_nmt', '@@ ', but is 'sentencepiece'",
        ),
    ],
)
def test_pieces_of_an_unknown_kind_are_refused(args: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        check_pieces(Namespace(**args))


@pytest.mark.parametrize(
    ("window", "path", "message"),
    [
        (64, "a.pt", "`--context-window` must be from 0 to 63, but is 64"),
        (-1, "a.pt", "`--context-window` must be from 0 to 63, but is -1"),
        (0, "a.pt:b.pt", "`--path` must name one checkpoint, but is a.pt:b.pt"),
        (63, "a.pt", None),
    ],
)
def test_options_that_only_eval_lm_has_are_checked(window: int, path: str, message: str | None):
    args = Namespace(context_window=window, tokens_per_sample=64, path=path)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_evaluation(args)
    check_evaluation(Namespace(path=path))  # other commands accept ensembles


class Block(nn.Module):
    """A model that contains one of fairseq's dropout modules, named `Block`."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = FairseqDropout(0.1, "Block")


@pytest.mark.parametrize(
    ("model", "retain", "modules", "message"),
    [
        (nn.Dropout(0.1), True, None, r"in a Dropout \(there are none\), but asks for all"),
        (Block(), True, ["Typo"], r"in a Block \(Block\), but asks for Typo"),
        (Block(), False, ["Block"], "`--retain-dropout-modules` has an effect only with"),
        (Block(), True, ["Block"], None),
        (Block(), True, None, None),
        (nn.Dropout(0.1), False, None, None),
    ],
)
def test_dropout_that_cannot_be_retained_is_refused(model, retain, modules, message):
    options = Namespace(retain_dropout=retain, retain_dropout_modules=modules)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_retained_dropout(lambda *_: None)(model, Namespace(generation=options))


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("eval_bleu_args", "{beam:5}", r"`--eval-bleu-args` must be a JSON object.*\{beam:5\}"),
        ("eval_bleu_args", "[5]", "must be a JSON object"),
        ("eval_bleu_args", '{"beam": "5"}', "'beam' must be of type int, but is '5'"),
        ("eval_bleu_args", '{"beam": true}', "'beam' must be of type int, but is True"),
        ("eval_bleu_args", '{"bean": 5}', "no search option 'bean'. Did you mean 'beam'"),
        ("eval_bleu_args", '{"beam_prune": "x"}', "'beam_prune' must be of type float"),
        ("eval_bleu_remove_bpe", "bpe", "`--eval-bleu-remove-bpe` must be one of .* but is 'bpe'"),
        ("eval_bleu_detok_args", "moses", "`--eval-bleu-detok-args` must be a JSON object"),
    ],
)
def test_bad_json_for_bleu_is_refused(option: str, text: str, message: str):
    cfg = Namespace(eval_bleu=True, eval_bleu_args="{}", eval_bleu_detok_args="{}")
    cfg.eval_bleu_remove_bpe = None
    setattr(cfg, option, text)
    with pytest.raises(ValueError, match=message):
        check_bleu_options(lambda task: None)(Namespace(cfg=cfg))


def test_training_with_bad_bleu_options_ends_before_the_first_update(data: Path, tmp_path: Path):
    flags = [*TINY_MOE, "--max-epoch", 1, "--save-dir", tmp_path, "--eval-bleu"]
    for options, message in (("{beam:5}", "JSON object"), ('{"beam": 0}', "`--beam` must be at")):
        with without_updates(), pytest.raises(ValueError, match=message):
            call("train", data, *flags, "--eval-bleu-args", options)
    good = {"beam": 2, "length_penalty_alpha": 0.2, "max_len_b": 8}
    done = call("train", data, *flags, "--eval-bleu-args", json.dumps(good))
    assert "valid_bleu" in done.text


def generate(data: Path, path: Path, *flags: object) -> list[str]:
    return call(
        "generate", data, "--path", path, *TRANSLATE, "--batch-size", 2, *flags
    ).hypotheses()


def test_the_shards_together_are_the_whole_text(data: Path, checkpoint: Path):
    whole = generate(data, checkpoint)
    parts = [generate(data, checkpoint, "--num-shards", 3, "--shard-id", n) for n in range(3)]
    assert sorted(sum(parts, [])) == sorted(whole)
    assert all(0 < len(part) < len(whole) for part in parts)
    with pytest.raises(ValueError, match="`--shard-id` must be from 0 to 2, but is 3"):
        generate(data, checkpoint, "--num-shards", 3, "--shard-id", 3)


def test_shards_are_refused_if_nothing_is_divided(data: Path, checkpoint: Path, tmp_path: Path):
    shards = ["--num-shards", 3, "--shard-id", 1]
    commands = [
        ("interactive", data, "--path", checkpoint, *TRANSLATE, *shards),
        ("train", data, *TINY_MOE, "--save-dir", tmp_path, *shards),
    ]
    for command in commands:
        with pytest.raises(ValueError, match="`--num-shards` applies only to fairseq-generate"):
            call(*command)


def test_diverse_beams_translate_every_batch(data: Path, checkpoint: Path):
    flags = ["--beam", 4, "--diverse-beam-groups", 4, "--diverse-beam-strength", 0.5]
    assert len(generate(data, checkpoint, *flags)) == 8
    # With one group, the search is a plain beam search. Each sentence must get its own result.
    one = generate(data, checkpoint, "--beam", 4, "--diverse-beam-groups", 1)
    whole = call(
        "generate",
        data,
        "--path",
        checkpoint,
        *TRANSLATE,
        "--beam",
        4,
        "--batch-size",
        8,
        "--diverse-beam-groups",
        1,
    )
    assert one == whole.hypotheses()
