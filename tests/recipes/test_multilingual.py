"""The multilingual recipe on generated sentences, and on bad input."""

import gzip
import re
import subprocess
from pathlib import Path

import pytest

from recipes.multilingual.table import make_table
from tests.support.recipes import run_script

COLOURS = {"red": ("rouge", "rojo"), "green": ("verte", "verde"), "black": ("noire", "negro")}
THINGS = {"table": ("table", "mesa"), "door": ("porte", "puerta"), "flower": ("fleur", "flor")}
SENTENCES = [
    (f"The {thing} is {colour}.", f"La {nom} est {couleur}.", f"La {nombre} es {color}.")
    for colour, (couleur, color) in COLOURS.items()
    for thing, (nom, nombre) in THINGS.items()
]
LANGUAGES = {"en": 0, "fr": 1, "es": 2}
SPLITS = {"train": SENTENCES * 2, "dev": SENTENCES[:5], "devtest": SENTENCES[5:]}

TINY = {
    "LANGUAGES": "fr es",
    "VOCAB_SIZE": 40,
    "MODEL_DIM": 16,
    "LSTM_HIDDEN_DIM": 16,
    "NUM_EXPERTS": 4,
    "EXPERT_HIDDEN_DIM": 16,
    # With one sentence per batch, no checkpoint is due at the end of an epoch, where fairseq would
    # skip it.
    "MAX_TOKENS": 30,
    "UPDATES": 4,
    "WARMUP_UPDATES": 1,
    "SAVE_INTERVAL": 2,
    "AVERAGE": 2,
    "BEAM": 2,
    "THREADS": 1,
    "DEVICE": "cpu",
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write a folder with the layout of TATOEBA_DIR, with fewer sentences in Spanish."""
    for language in ("fr", "es"):
        folder = tmp_path / "tatoeba" / f"en-{language}"
        folder.mkdir(parents=True)
        for split, rows in SPLITS.items():
            rows = rows[: 8 if language == "es" and split == "train" else None]
            for side in ("en", language):
                text = "".join(f"{row[LANGUAGES[side]]}\n" for row in rows)
                (folder / f"{split}.{side}.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path / "tatoeba"


def run(script: str, *arguments: str, **variables: object) -> subprocess.CompletedProcess:
    return run_script(f"multilingual/{script}", *arguments, **variables)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_from_text_to_the_table(corpus: Path, tmp_path: Path):
    work = tmp_path / "work"
    variables = TINY | {"TATOEBA_DIR": corpus, "WORK": work, "OVERSAMPLING": "en-es=2"}
    done = run("train.sh", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    # French has 18 sentences, and Spanish has 8.
    assert re.search(r"en-es +8 +16 .* 2\.00 ", done.stdout)
    assert re.search(r"es-en +8 +8 .* 1\.00 ", done.stdout)
    scores = (work / "moe-seed1" / "scores.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in scores] == ["en-fr", "fr-en", "en-es", "es-en"]
    for direction in ("en-fr", "es-en"):
        translation = work / "moe-seed1/translations" / f"test.{direction}"
        assert translation.read_text().count("\n") == len(SPLITS["devtest"])
    done = run("train.sh", **variables, MODEL="single", DIRECTION="es-en")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (work / "table.md").read_text().splitlines()
    assert re.match(r"\| es-en \| 8 \| [\d.]+ \([\d.]+\) \| not trained \| [\d.]+ \(", rows[-1])

    other = run("train.sh", **variables | {"MODEL_DIM": 32})
    assert other.returncode == 1
    assert "was trained with different settings or a different text" in other.stderr


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("prepare.sh", {"TATOEBA_DIR": ""}, "TATOEBA_DIR must name the folder"),
        ("prepare.sh", {"TATOEBA_DIR": "/nowhere"}, "TATOEBA_DIR=/nowhere is not a folder"),
        ("prepare.sh", {"LANGUAGES": "fr xx"}, "LANGUAGES has 'xx', but tatoeba has only: fr de"),
        ("prepare.sh", {"LANGUAGES": "fr ko"}, "en-ko/train.en.gz is missing"),
        ("prepare.sh", {"CORPUS": "wmt"}, "CORPUS must be one of tatoeba, multi30k"),
        ("train.sh", {"MODEL": "sparse"}, "MODEL must be one of moe, dense, single"),
        ("train.sh", {"MODEL": "single"}, "DIRECTION must be one of en-fr, fr-en, en-es, es-en"),
        ("train.sh", {"DIRECTION": "en-fr"}, "DIRECTION=en-fr is for MODEL=single"),
        ("evaluate.sh", {}, "average.pt is missing: train it"),
    ],
)
def test_an_impossible_variable_is_named(
    script: str, variables: dict[str, str], message: str, corpus: Path, tmp_path: Path
):
    given = TINY | {"TATOEBA_DIR": corpus, "WORK": tmp_path / "work"} | variables
    done = run(script, **given)
    assert done.returncode == 1
    assert message in done.stderr


def test_an_argument_that_is_not_a_flag_is_refused_immediately(corpus: Path, tmp_path: Path):
    given = TINY | {"TATOEBA_DIR": corpus, "WORK": tmp_path / "work"}
    done = run("train.sh", "moe", **given)
    assert done.returncode == 1
    assert "takes fairseq-train flags, which begin with -, but was given 'moe'" in done.stderr
    assert not (tmp_path / "work").exists()


def test_the_table_by_hand(tmp_path: Path):
    for run_name, line in {
        "single-en-fr-seed1": "single\ten-fr\t9.00\t20.00 40.00",
        "dense-seed1": "dense\ten-fr\t8.00\t21.50 41.00",
        "moe-seed1": "moe\ten-fr\t7.00\t24.00 43.00",
    }.items():
        (tmp_path / run_name).mkdir()
        (tmp_path / run_name / "scores.tsv").write_text(f"{line}\n")
    row = "| en-fr | - | 20.00 (9.00) | 21.50 (8.00) | 24.00 (7.00) | +2.50 | +4.00 |"
    assert make_table(tmp_path)[-1] == row


def test_a_damaged_score_is_named(tmp_path: Path):
    (tmp_path / "moe-seed1").mkdir()
    (tmp_path / "moe-seed1/scores.tsv").write_text("moe\ten-fr\n")
    with pytest.raises(ValueError, match="line 1: must have model, direction"):
        make_table(tmp_path)
