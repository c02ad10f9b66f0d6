"""A bundle gives the same results as fairseq with the checkpoint that was exported."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from nmt_moe import LanguageModel, Translator
from nmt_moe.inference import Description, Pieces, SearchDefaults, Translation, export
from tests.support.commands import Output, call
from tests.support.language_model import EVALUATE, TINY_LM, preprocess_flags, write_text
from tests.support.multilingual import SIZES, TASK, make_data
from tests.support.training import TINY_MOE, TRANSLATE

# fairseq prints scores in bits, with 4 decimal places.
PRINTED = 6e-5
DESCRIPTION = Description(search=SearchDefaults(max_len_b=20))  # as in TRANSLATE

SEARCHES: dict[str, tuple[list[object], dict[str, Any]]] = {
    "plain": ([], {}),
    "greedy": (["--beam", 1], {"beam_size": 1}),
    "nbest": (["--beam", 7, "--nbest", 4], {"beam_size": 7, "num_hypotheses": 4}),
    "penalties": (
        ["--length-penalty-alpha", 0.3, "--coverage-penalty-beta", 0.2],
        {"length_penalty_alpha": 0.3, "coverage_penalty_beta": 0.2},
    ),
    "pruning": (["--beam-prune", 2.0], {"beam_prune": 2.0}),
    "all": (
        [
            *["--length-penalty-alpha", 0.2, "--coverage-penalty-beta", 0.2, "--beam-prune", 3.0],
            *["--nbest", 3],
        ],
        {
            "length_penalty_alpha": 0.2,
            "coverage_penalty_beta": 0.2,
            "beam_prune": 3.0,
            "num_hypotheses": 3,
        },
    ),
}


def hypotheses_of(done: Output) -> dict[int, list[tuple[str, float]]]:
    """Return the text and the score (in nats) of each hypothesis, by sentence."""
    found: dict[int, list[tuple[str, float]]] = {}
    for line in done.text.splitlines():
        if line.startswith("H-"):
            name, score, text = line.split("\t")
            found.setdefault(int(name[2:]), []).append((text, float(score) * math.log(2)))
    return found


def assert_same(done: Output, results: list[Translation]) -> None:
    wanted = hypotheses_of(done)
    assert len(wanted) == len(results)
    for number, result in enumerate(results):
        [sentence] = result.sentences
        texts = [text for text, _ in wanted[number]]
        assert [one.text for one in sentence.hypotheses][: len(texts)] == texts
        scores = [score for _, score in wanted[number]]
        found = [one.score for one in sentence.hypotheses][: len(texts)]
        assert found == pytest.approx(scores, abs=PRINTED)


@pytest.fixture(scope="module")
def translator(
    data: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Translator:
    folder = tmp_path_factory.mktemp("bundle") / "aa-bb"
    export(checkpoint, data, Pieces(), folder, description=DESCRIPTION)
    return Translator.load(folder)


@pytest.mark.parametrize(("flags", "options"), SEARCHES.values(), ids=SEARCHES)
def test_a_bundle_translates_like_fairseq_generate(
    data: Path,
    checkpoint: Path,
    corpus: Path,
    translator: Translator,
    flags: list[object],
    options: dict[str, Any],
):
    done = call("generate", data, "--path", checkpoint, *TRANSLATE, *flags)
    lines = (corpus / "test.aa").read_text().splitlines()
    results = translator.translate(lines, **options)
    assert_same(done, results)
    assert len({one.text for one in results}) > 2


@pytest.fixture(scope="module")
def many_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("many"))


@pytest.fixture(scope="module")
def many_checkpoint(many_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many-checkpoint")
    flags = ["--max-epoch", 4, "--no-epoch-checkpoints", "--save-dir", folder]
    call("train", many_data, *TASK, *TINY_MOE, *flags)
    return folder / "checkpoint_last.pt"


def test_a_multilingual_bundle_translates_like_fairseq_generate(
    many_data: Path, many_checkpoint: Path, tmp_path: Path
):
    export(many_checkpoint, many_data, Pieces(), tmp_path / "many", description=DESCRIPTION)
    translator = Translator.load(tmp_path / "many")
    assert sorted(translator.languages) == ["aa", "bb", "cc"]
    flags, options = SEARCHES["all"]
    # The model was not trained on bb-cc.
    for source, target in (("aa", "bb"), ("cc", "aa"), ("bb", "cc")):
        direction = ["-s", source, "-t", target]
        path = ["--path", many_checkpoint, *TASK, *direction, *TRANSLATE, *flags]
        done = call("generate", many_data, *path)
        pair = "-".join(sorted([source, target]))
        lines = (many_data.parent / f"test.{pair}.{source}").read_text().splitlines()
        assert len(lines) == SIZES[pair]["test"]
        assert_same(done, translator.translate(lines, target, **options))


def test_a_bundle_of_a_language_model_scores_like_fairseq_eval_lm(tmp_path: Path):
    text = write_text(tmp_path / "text")
    call("preprocess", *preprocess_flags(text, tmp_path / "data"))
    flags = ["--max-epoch", 2, "--no-epoch-checkpoints", "--save-dir", tmp_path]
    call("train", tmp_path / "data", *TINY_LM, *flags)
    checkpoint = tmp_path / "checkpoint_last.pt"
    done = call(
        "eval_lm",
        *[tmp_path / "data", *EVALUATE, "--path", checkpoint, "--gen-subset", "test"],
        *["--sample-break-mode", "eos", "--batch-size", 4, "--output-word-probs"],
    )
    export(checkpoint, tmp_path / "data", Pieces(), tmp_path / "bundle")
    scores = LanguageModel.load(tmp_path / "bundle").score((text / "test").read_text().splitlines())
    log_probs = [value for one in scores for value in one.log_probs]
    [loss, perplexity] = re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", done.text)[
        0
    ]
    mean = -sum(log_probs) / len(log_probs)
    assert mean / math.log(2) == pytest.approx(float(loss), abs=1e-4)
    assert math.exp(mean) == pytest.approx(float(perplexity), abs=6e-3)
