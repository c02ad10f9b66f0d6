"""GNMT's search through fairseq's commands."""

import math
from pathlib import Path
from typing import Any

import pytest

from nmt_moe.scoring.penalties import choose, read_nbest
from nmt_moe.search import COVERAGE_FLOOR, length_penalty
from tests.support.commands import PLUGIN, Output, call, run
from tests.support.training import TINY_MOE, TRANSLATE

GNMT = ["--length-penalty-alpha", 0.2, "--coverage-penalty-beta", 0.2]


def generate(data: Path, path: object, *flags: object) -> Output:
    return call("generate", data, "--path", path, *TRANSLATE, *flags)


def rows(done: Output, kind: str) -> list[list[str]]:
    """Return the columns of all lines of a kind, for all hypotheses in the n-best lists."""
    return [line.split("\t") for line in done.text.splitlines() if line.startswith(f"{kind}-")]


def scores_by_hand(done: Output, alpha: float, beta: float) -> list[float]:
    """Compute each hypothesis's score (in bits) from its printed probabilities and attention."""
    scores = []
    for (_, probabilities), (_, matrix) in zip(rows(done, "P"), rows(done, "A"), strict=True):
        log_probs = [float(one) for one in probabilities.split()]
        steps = [[float(one) for one in row.split(",")] for row in matrix.split()]
        received = [sum(column) for column in zip(*steps, strict=True)][:-1]  # no end mark
        coverage = sum(math.log2(min(max(one, COVERAGE_FLOOR), 1.0)) for one in received)
        scores.append(sum(log_probs) / length_penalty(len(log_probs), alpha) + beta * coverage)
    return scores


def test_scores_follow_from_what_is_printed(data: Path, checkpoint: Path):
    flags = ["--beam", 4, "--nbest", 4, "--batch-size", 8, "--print-alignment", "soft"]
    done = generate(data, checkpoint, *flags, *GNMT)
    printed = [float(row[1]) for row in rows(done, "H")]
    assert len(printed) == 4 * 8
    assert printed == pytest.approx(scores_by_hand(done, 0.2, 0.2), abs=2e-3)
    for start in range(0, len(printed), 4):
        assert printed[start : start + 4] == sorted(printed[start : start + 4], reverse=True)


def test_a_point_of_the_sweep_is_what_the_search_finds(data: Path, checkpoint: Path):
    flags = ["--beam", 6, "--print-alignment", "soft"]
    nbest = read_nbest(generate(data, checkpoint, *flags, "--nbest", 6).text.splitlines())
    for alpha, beta in [(0.2, 0.2), (1.0, 2.0)]:
        penalties = ["--length-penalty-alpha", alpha, "--coverage-penalty-beta", beta]
        searched = generate(data, checkpoint, *flags, *penalties)
        chosen = [choose(one, alpha, beta).text for _, one in sorted(nbest.hypotheses.items())]
        assert chosen == searched.hypotheses()


def test_zero_turns_an_option_off(data: Path, checkpoint: Path):
    off = ["--length-penalty-alpha", 0, "--coverage-penalty-beta", 0, "--beam-prune", 0]
    flags = ["--nbest", 3]
    plain, explicit = generate(data, checkpoint, *flags), generate(data, checkpoint, *flags, *off)
    for kind in "HP":
        assert rows(explicit, kind) == rows(plain, kind)


def test_pruning_shortens_nbest_lists_but_keeps_the_best(data: Path, checkpoint: Path):
    flags = ["--beam", 4, "--nbest", 4, "--print-alignment", *GNMT]
    whole = generate(data, checkpoint, *flags)
    pruned = generate(data, checkpoint, *flags, "--beam-prune", 2.0)
    assert 8 <= len(rows(pruned, "H")) < len(rows(whole, "H")) == 32
    assert len(rows(pruned, "A")) == len(rows(pruned, "H"))
    best: dict[str, float] = {}
    for name, score, _ in rows(pruned, "H"):
        best.setdefault(name, float(score))
        assert float(score) >= best[name] - 2.0 / math.log(2) - 1e-4


def test_interactive_and_ensembles_search_in_the_same_way(
    data: Path, checkpoint: Path, corpus: Path
):
    flags = [*GNMT, "--beam-prune", 3.0, "--batch-size", 8]
    written = generate(data, checkpoint, *flags)
    text = (corpus / "test.aa").read_bytes()
    options = ["--path", checkpoint, *TRANSLATE, "--buffer-size", 8, *flags]
    spoken = call("interactive", data, *options, stdin=text)
    twice = generate(data, f"{checkpoint}:{checkpoint}", *flags)
    assert spoken.hypotheses() == written.hypotheses() == twice.hypotheses()
    expected = [float(row[1]) for row in rows(written, "H")]
    assert [float(row[1]) for row in rows(twice, "H")] == pytest.approx(expected, abs=1e-3)


def test_a_prefix_and_constraints_are_kept(data: Path, checkpoint: Path, corpus: Path):
    done = generate(data, checkpoint, "--prefix-size", 1, *GNMT, "--beam-prune", 3.0)
    for number, row in done.lines("H").items():
        assert row[-1].split()[0] == done.lines("T")[number][0].split()[0]
    wanted = (corpus / "test.bb").read_text().split()[0]
    line = f"{(corpus / 'test.aa').read_text().splitlines()[3]}\t{wanted}\n".encode()
    options = ["--path", checkpoint, *TRANSLATE, "--constraints", "unordered", *GNMT]
    constrained = call("interactive", data, *options, stdin=line)
    assert wanted in constrained.hypotheses()[0].split()


def test_fairseqs_own_models_are_searched_in_the_same_way(data: Path, tmp_path: Path):
    start = TINY_MOE.index("--criterion")
    sizes = ["--encoder-embed-dim", 16, "--encoder-hidden-size", 16, "--decoder-embed-dim", 16]
    sizes += ["--decoder-hidden-size", 16, "--decoder-out-embed-dim", 16]
    training: list[Any] = ["--arch", "lstm", *sizes, *TINY_MOE[start:]]
    training[training.index("moe_label_smoothed_cross_entropy")] = "label_smoothed_cross_entropy"
    call("train", data, *training, "--max-epoch", 1, "--save-dir", tmp_path)
    model = tmp_path / "checkpoint_last.pt"
    # Without --print-alignment, this decoder would not return its attention.
    plain = generate(data, model, *GNMT)
    aligned = generate(data, model, *GNMT, "--print-alignment", "soft")
    assert rows(plain, "H") == rows(aligned, "H")
    printed = [float(row[1]) for row in rows(aligned, "H")]
    assert printed == pytest.approx(scores_by_hand(aligned, 0.2, 0.2), abs=2e-3)


def test_bad_values_end_the_command_in_one_message(data: Path, checkpoint: Path, tmp_path: Path):
    flags = ["--user-dir", PLUGIN, "--path", checkpoint, *TRANSLATE]
    done = run("generate", data, *flags, "--beam-prune", "nan", cwd=tmp_path)
    assert done.status == 1
    assert "`--beam-prune` must be a finite number of at least 0, but is nan" in done.text
    assert "Traceback" not in done.text
    good = run("generate", data, *flags, *GNMT, "--beam-prune", 3, cwd=tmp_path)
    assert good.status == 0
    assert len(good.hypotheses()) == 8
    for value in ("-0.2", "inf"):
        with pytest.raises(ValueError, match="`--length-penalty-alpha` must be a finite number"):
            generate(data, checkpoint, f"--length-penalty-alpha={value}")
