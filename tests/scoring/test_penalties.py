"""The grid of alpha and beta over a small n-best list."""

import importlib.util
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from nmt_moe.cli import main
from nmt_moe.scoring import penalties as tool

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None

# For sentence 0, the shorter hypothesis is more probable (-2 against -3 bits), but gives a source
# word an attention of only 0.1. The source has two words and the end mark.
SHORT = [
    "D-0\t-1.0\tone two three four",
    "P-0\t-1.0000 -1.0000",
    "A-0\t0.9,0.05,0.05 0.9,0.05,0.05",
]
LONG = [
    "D-0\t-1.1\tone two three four five",
    "P-0\t-1.0000 -1.0000 -1.0000",
    "A-0\t0.9,0.1,0.0 0.1,0.8,0.1 0.0,0.1,0.9",
]
NBEST = [
    "2026-01-01 00:00:00 | INFO | fairseq_cli.generate | {'_name': None}",
    "S-0\teins zwei",
    "T-0\tone two three four five",
    "H-0\t-1.0\tone two three four",
    *SHORT,
    "H-0\t-1.1\tone two three four five",
    *LONG,
    "2026-01-01 00:00:00 | INFO | fairseq_cli.generate | Translated 1 sentences",
]


def run(*arguments):
    return CliRunner().invoke(main, ["sweep", *map(str, arguments)])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    path = tmp_path / "nbest.txt"
    path.write_text("\n".join(NBEST) + "\n")
    return path


def test_hypotheses_are_read_with_probability_and_coverage():
    short, long = tool.read_nbest(NBEST).hypotheses[0]
    assert (short.text, short.length) == ("one two three four", 2)
    assert short.log_probability == pytest.approx(-2 * math.log(2))
    # The first word received an attention of 1.8, which counts as 1. The second received 0.1.
    assert short.coverage == pytest.approx(math.log(0.1))
    assert long.coverage == pytest.approx(0.0, abs=1e-6)


def test_the_choice_between_hypotheses_by_hand():
    hypotheses = tool.read_nbest(NBEST).hypotheses[0]
    # The scores -2 ln 2 + beta ln 0.1 and -3 ln 2 are equal at beta = 0.301.
    assert tool.choose(hypotheses, 0.0, 0.3).length == 2
    assert tool.choose(hypotheses, 0.0, 0.302).length == 3
    # The scores 2 / (7 / 6)^alpha and 3 / (8 / 6)^alpha are equal at alpha = 3.04.
    assert tool.choose(hypotheses, 3.0, 0.0).length == 2
    assert tool.choose(hypotheses, 3.1, 0.0).length == 3


def test_the_grid_is_printed_with_its_best_point(output: Path):
    printed = run(output, "--alphas", 0, "--betas", 0, 0.4).stdout.splitlines()
    assert printed[0].split() == ["alpha\\beta", "0", "0.4"]
    # With four of five words, all precisions are 1, and the brevity penalty is exp(1 - 5 / 4).
    assert printed[1].split() == ["0", f"{100 * math.exp(-0.25):.2f}", "100.00*"]
    assert printed[2].startswith(
        "sentences: 1, with 2 to 2 hypotheses each; best: alpha 0, beta 0.4"
    )
    assert "nrefs:1" in printed[3]


def test_a_reference_file_replaces_the_printed_one(output: Path, tmp_path: Path):
    reference = tmp_path / "reference"
    reference.write_text("one two three four\n")
    flags = ["--reference", str(reference), "--alphas", "0", "--betas", "0"]
    assert "100.00*" in run(output, *flags).stdout


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_the_grid_is_drawn(output: Path, tmp_path: Path):
    assert run(output, "--plot", tmp_path / "grid.png").exit_code == 0
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no hypotheses"),
        ([line for line in NBEST if line[0] != "A"], "sentence 0 has no attention .* soft"),
        ([line for line in NBEST if line[0] != "P"], "of sentence 0 are damaged"),
        ([*SHORT[:2], "A-0\t0-0 1-1"], "`--print-alignment soft`"),
        ([*SHORT, *(row.replace("-0", "-1", 1) for row in SHORT), *SHORT], "0 is translated twice"),
        ([SHORT[0], "P-0\tnan -0.5", SHORT[2]], "is not a finite number"),
        ([*SHORT[:2], "A-0\t0.9,0.1"], "2 probabilities, but attention for 1 steps"),
    ],
)
def test_incomplete_output_is_refused(lines: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        tool.read_nbest(lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alphas", "-1"], "`--length-penalty-alpha` must be"),
        (["--betas", "nan"], "`--coverage-penalty-beta` must be"),
        (["--reference", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_options_end_in_one_message(output: Path, flags: list[str], message: str):
    done = run(output, *flags)
    assert done.exit_code == 1
    assert message in done.stderr


def test_a_reference_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="sentences without a reference: 1, .* sentence 0"):
        tool.score_grid(tool.read_nbest(NBEST), {}, [0.0], [0.0])


def test_translations_in_pieces_are_refused_with_the_flag_that_joins_them():
    pieces = [line.replace("one two three", "▁one ▁two ▁th ree") for line in NBEST]
    with pytest.raises(ValueError, match=r"are split into pieces.*`--remove-bpe sentencepiece`"):
        tool.read_nbest(pieces)


def test_a_log_of_several_runs_is_recognised(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("D-0\t-0.5\told\nD-0\t-0.6\tother\nD-1\t-0.5\told\nD-0\t-0.1\tnew\n")
    done = CliRunner().invoke(main, ["hypotheses", str(log)])
    assert done.exit_code == 1
    assert "sentence 0 is translated twice: are these several runs?" in done.stderr
    log.write_text("D-1\t-0.5\tb\nD-0\t-0.6\ta\nD-0\t-0.7\tc\n")
    assert CliRunner().invoke(main, ["hypotheses", str(log)]).stdout == "a\nb\n"
