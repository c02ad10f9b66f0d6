"""The probabilities that a language model gives to lines, and the lines that it samples."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from nmt_moe import LanguageModel
from nmt_moe.inference import LineScore, Pieces, export, total_score
from tests.support.bundles import LM, make_checkpoint

LINES = [
    "the big dog sees a red tree",
    "",
    "cat",
    "the cat sees ☃ and 猫 under a house",
    " a  dog ",
]


@pytest.fixture(scope="module")
def opened(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[LanguageModel, dict[str, nn.Module]]:
    folder = tmp_path_factory.mktemp("lm")
    path, data, pieces, networks = make_checkpoint(folder, LM)
    export(path, data, Pieces(pieces), folder / "bundle")
    return LanguageModel.load(folder / "bundle"), networks


@pytest.fixture(scope="module")
def model(opened: tuple[LanguageModel, Any]) -> LanguageModel:
    return opened[0]


def expected(model: LanguageModel, networks: dict[str, Any], pieces: list[str]) -> list[float]:
    """Compute log-probabilities with the network used in training."""
    symbols = model._vocabulary.symbols
    tokens = [symbols.index(piece) if piece in symbols else 3 for piece in pieces]
    with torch.no_grad():
        out = networks["decoder"](torch.tensor([[2, *tokens]]))
        log_probs = networks["output"](out.features).log_softmax(dim=2)[0]
    return [float(log_probs[step, token]) for step, token in enumerate([*tokens, 2])]


@pytest.mark.parametrize("batch_tokens", [1, 25, 10**9])
def test_log_probs_are_those_of_the_training_network(
    opened: tuple[LanguageModel, dict[str, nn.Module]], batch_tokens: int
):
    model, networks = opened
    for line, score in zip(LINES, model.score(LINES, batch_tokens=batch_tokens), strict=True):
        assert "".join(score.pieces).replace("▁", " ").split() == line.split()
        assert len(score.log_probs) == len(score.pieces) + 1
        wanted = expected(model, networks, score.pieces)
        assert score.log_probs == pytest.approx(wanted, abs=2e-5)
        assert score.log_prob == pytest.approx(sum(wanted), abs=1e-4)


def test_words_characters_and_unknown_pieces_are_counted(model: LanguageModel):
    scores = model.score(LINES)
    assert [one.num_words for one in scores] == [7, 0, 1, 9, 2]
    assert [one.num_characters for one in scores] == [len(line) for line in LINES]
    assert [one.num_unknown for one in scores] == [0, 0, 0, 2, 0]


def test_perplexities_by_hand():
    # The line has 2 pieces, one word and 3 characters. With its end mark, its probability is
    # 1/2 * 1/4 * 1/2 = 2^-4.
    log_probs = [-math.log(2), -math.log(4), -math.log(2)]
    one = LineScore(sum(log_probs), ["▁c", "at"], log_probs, 1, 3, 0)
    assert one.perplexity_per_piece == pytest.approx(2 ** (4 / 3))
    assert one.perplexity_per_word == pytest.approx(2 ** (4 / 2))
    assert one.perplexity_per_character == pytest.approx(2 ** (4 / 4))
    assert one.bits_per_character == pytest.approx(1.0)
    # Three copies of the line have the same perplexities as one.
    total = total_score([one] * 3)
    assert total.log_prob == pytest.approx(3 * one.log_prob)
    assert total.pieces == ["▁c", "at"] * 3
    for name in ("piece", "word", "character"):
        wanted = getattr(one, f"perplexity_per_{name}")
        assert getattr(total, f"perplexity_per_{name}") == pytest.approx(wanted)
    assert LineScore(-1e9, [], [-1e9], 0, 0, 0).perplexity_per_piece == math.inf


def test_a_total_over_no_lines_is_refused():
    with pytest.raises(ValueError, match="`scores` must have at least one line"):
        total_score([])


def test_one_string_is_one_line_and_no_lines_give_no_scores(model: LanguageModel):
    assert model.score("cat") == model.score(["cat"])
    assert model.score([]) == []


def test_samples_follow_their_seed(model: LanguageModel):
    one, same = (model.sample(5, seed=3, max_pieces=12) for _ in range(2))
    assert one == same
    assert len(one) == 5
    assert one != model.sample(5, seed=4, max_pieces=12)
    assert len(set(one)) > 1
    assert not any(mark in line for line in one for mark in ("<unk>", "<s>", "</s>", "<pad>"))


def test_each_line_begins_with_the_prefix(model: LanguageModel):
    for prefix in ("the cat", "a ☃"):
        assert all(line.startswith(prefix) for line in model.sample(4, prefix, max_pieces=5))
    # The first piece after the prefix is drawn from the model's prediction.
    drawn = model.sample(400, "the cat", max_pieces=1, seed=9)
    shares = {line: drawn.count(line) / len(drawn) for line in set(drawn)}
    likely = max(shares, key=lambda line: shares[line])
    pieces = model.score("the cat")[0].pieces
    after = {}
    for symbol in [*model._vocabulary.symbols[4:], None]:
        tokens = [*pieces, *([] if symbol is None else [symbol])]
        text = "".join(tokens).replace("▁", " ").strip()
        numbers = model._vocabulary.numbers(tokens)
        row = model._score([numbers])[0]
        after[text] = after.get(text, 0.0) + math.exp(row[len(pieces)])
    total = sum(after.values())  # marks are never drawn
    assert shares[likely] == pytest.approx(after[likely] / total, abs=0.1)


def test_a_low_temperature_draws_the_most_probable_pieces(model: LanguageModel):
    cold = model.sample(6, temperature=1e-3, max_pieces=10)
    assert len(set(cold)) == 1
    hot = model.sample(6, temperature=1e3, max_pieces=10)
    assert len(set(hot)) == 6


OPTIONS: dict[str, tuple[Any, ...]] = {
    "num_samples": (0, -1, 1.5, True, "5", None),
    "max_pieces": (0, -1, 1.5, True, "5", None, 10**9),
    "temperature": (0, -1, float("nan"), float("inf"), True, "1", None),
    "seed": (-1, 1.5, True, "5", None, 2**64),
}


@pytest.mark.parametrize(("name", "values"), OPTIONS.items(), ids=OPTIONS)
def test_options_out_of_range_are_named(model: LanguageModel, name: str, values: tuple[Any, ...]):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be .* but is "):
            model.sample(**{name: value})


def test_input_that_is_not_a_line_is_named(model: LanguageModel):
    for line, fault in {
        "a\nb": "contains a line feed",
        "a\0b": r"contains the control character U\+0000",
        "\ud800": r"contains half of a surrogate pair, U\+D800",
        "a\rb": r"contains the control character U\+000D",
    }.items():
        with pytest.raises(ValueError, match=f"^line 2 {fault}"):
            model.score(["cat", line])
        with pytest.raises(ValueError, match=f"^`prefix` {fault}"):
            model.sample(1, line)
    for value in (5, None, b"cat"):
        with pytest.raises(ValueError, match="`lines` must be a list of strings, but is "):
            model.score(value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="line 1 must be a string, but is "):
            model.score([value])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="`prefix` must be a string, but is "):
            model.sample(1, value)  # type: ignore[arg-type]
    for value in (0, -1, 1.5, True, "5", float("nan")):
        with pytest.raises(ValueError, match="`batch_tokens` must be"):
            model.score("cat", batch_tokens=value)  # type: ignore[arg-type]
