"""The recipe for one language model: a run on a tiny text, its figures, and errors."""

import re

import pytest
from click.testing import CliRunner

pytest.importorskip("fairseq")

from recipes.captions import score
from tests.support.lm_text import write_text
from tests.support.recipes import refusal, run_script

TINY = {
    **{"VOCAB_SIZE": 28, "VALID_LINES": 20, "MODEL_DIM": 8, "NUM_EXPERTS": 5, "TOP_K": 2},
    **{"EXPERT_HIDDEN_DIM": 8, "SAMPLES": 10, "MAX_TOKENS": 100, "UPDATES": 4},
    **{"WARMUP_UPDATES": 1, "SAVE_INTERVAL": 2, "AVERAGE": 2, "DEVICE": "cpu"},
}
NUMBER = r"\d+\.\d+"


def run(script, *arguments, **variables):
    return run_script(f"captions/{script}", *arguments, **(TINY | variables))


def test_from_text_to_perplexity(tmp_path):
    work = tmp_path / "work"
    variables = {"TEXT_DIR": write_text(tmp_path / "text"), "WORK": work}
    done = run("train.sh", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, valid, test, exported = done.stdout.splitlines()
    scores = [valid, test]
    assert exported.endswith(f"exported: {work}/moe-seed1/bundle")
    assert (work / "moe-seed1/scores.txt").read_text().splitlines() == scores
    for subset, line in zip(("valid", "test"), scores, strict=True):
        text = (work / "text" / subset).read_text()
        pieces = (work / "pieces" / subset).read_text()
        found = re.fullmatch(
            rf"{subset}, moe-seed1: perplexity ({NUMBER}) per piece \((\d+) with end marks\)"
            rf", {NUMBER} per word \((\d+)\), {NUMBER} bits per character \(([\d,]+)\)",
            line,
        )
        assert found, line
        # The barely trained model predicts 26 pieces, </s> and <unk>.
        assert 10 < float(found[1]) < 40
        counts = [int(number.replace(",", "")) for number in found.groups()[1:]]
        assert counts == [len(pieces.split()) + 20, 20 * 5, len(text) - 20]
    # A different width requires a new run.
    other = run("train.sh", **variables, MODEL_DIM=16)
    assert "was trained with different settings or a different text" in refusal(other)


@pytest.mark.slow
def test_the_dense_model_costs_as_much_as_the_chosen_experts(tmp_path):
    variables = {"TEXT_DIR": write_text(tmp_path / "text"), "WORK": tmp_path / "work"}
    variables["MODEL"] = "dense"
    done = run("train.sh", **variables, EVALUATE=0)
    assert done.returncode == 0, done.stdout + done.stderr
    settings = (tmp_path / "work/dense-seed1/settings").read_text()
    assert "--num-experts 1 --moe-top-k 1 --expert-hidden-dim 16" in settings
    assert (tmp_path / "work/dense-seed1/average.pt").is_file()
    assert "perplexity" not in done.stdout
    # The second start skips preparation and training, and does the missing evaluation.
    again = run("train.sh", **variables)
    assert again.stdout.count("already done") == 4
    assert "test, dense-seed1: perplexity" in again.stdout


def test_one_loss_is_spread_over_pieces_words_and_characters(tmp_path):
    # 6 pieces and 2 end marks of 3 bits each make 24 bits. This gives a perplexity of 2 ** (24 / 4)
    # per word for 4 words, and 24 / 15 bits per character for 15 characters.
    (tmp_path / "pieces").write_text("▁ab ▁c dé\n▁new ▁word s\n")
    (tmp_path / "text").write_text("ab cdé\nnew words\n")
    files = [f"--{name}={tmp_path / name}" for name in ("pieces", "text")]
    done = CliRunner().invoke(score.main, ["--bits=3.0", "--scored=8", *files])
    assert done.stdout == (
        "perplexity 8.00 per piece (8 with end marks), 64.00 per word (4), "
        f"{24 / 15:.4f} bits per character (15)\n"
    )
    # This loss belongs to another text.
    done = CliRunner().invoke(score.main, ["--bits=3.0", "--scored=1008", *files])
    assert "`--scored` must be 8, the pieces and end" in done.stderr


def test_an_empty_text_is_named(tmp_path):
    folder = write_text(tmp_path / "text")
    (folder / "train.en").touch()  # before train.en.gz
    error = refusal(run("train.sh", TEXT_DIR=folder, WORK=tmp_path / "work"))
    assert f"error: {folder}/train.en: the text is empty" in error


REFUSALS = [
    pytest.param("train.sh", {"TEXT_DIR": ""}, "TEXT_DIR must name the folder", id="no-folder"),
    pytest.param(
        "train.sh", {"TEXT_DIR": "/missing"}, "TEXT_DIR=/missing is not a folder", id="missing"
    ),
    pytest.param("train.sh", {"MODEL": "big"}, "MODEL must be one of moe, dense", id="model"),
    pytest.param("train.sh", {"UPDATES": "x"}, "UPDATES must be a whole number", id="updates"),
    pytest.param(
        "train.sh", {"UPDATES": 5}, "must be a multiple of SAVE_INTERVAL = 2", id="interval"
    ),
    pytest.param(
        "train.sh", {"AVERAGE": 3}, "AVERAGE x SAVE_INTERVAL = 6 must not exceed", id="average"
    ),
    pytest.param(
        "train.sh",
        {"DROPOUT": 1},
        "DROPOUT must be at least 0 and below 1, but is '1'",
        id="dropout",
    ),
    pytest.param("train.sh", {"SEED": "x"}, "SEED must be a whole number of at least 0", id="seed"),
    pytest.param("train.sh", {"EVALUATE": "no"}, "EVALUATE must be one of 0, 1", id="evaluate"),
    pytest.param(
        "train.sh", {"LEARNING_RATE": 0}, "LEARNING_RATE must be a number above 0", id="rate"
    ),
    pytest.param("evaluate.sh", {"RUN": "none"}, "work/none/average.pt is missing", id="no-model"),
]


@pytest.mark.parametrize(("script", "variables", "message"), REFUSALS)
def test_a_wrong_variable_is_named(script, variables, message, tmp_path):
    done = run(script, **({"TEXT_DIR": tmp_path, "WORK": tmp_path / "work"} | variables))
    assert message in refusal(done)


def test_arguments_of_the_scripts_are_refused():
    for script in ("prepare.sh", "evaluate.sh"):
        assert f"{script} takes no arguments except --help, but was given 'x'" in refusal(
            run(script, "x")
        )
    assert "train.sh takes fairseq-train flags" in refusal(run("train.sh", "x"))
