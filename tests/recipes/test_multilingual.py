"""The multilingual recipe on generated sentences, and on bad input."""

import gzip
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from recipes.multilingual.table import main, make_tables
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
    "NUM_GROUPS": 0,
    # Two experts have the same number of operations as one LSTM.
    "EXPERT_HIDDEN_DIM": 36,
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
    """Write a folder with the layout of TATOEBA_DIR, with fewer sentences in Spanish.

    The first test sentence has a second translation into French.
    """
    for language in ("fr", "es"):
        folder = tmp_path / "tatoeba" / f"en-{language}"
        folder.mkdir(parents=True)
        for split, rows in SPLITS.items():
            rows = rows[: 8 if language == "es" and split == "train" else None]
            for side in ("en", language):
                text = "".join(f"{row[LANGUAGES[side]]}\n" for row in rows)
                (folder / f"{split}.{side}.gz").write_bytes(gzip.compress(text.encode()))
    rows = "".join(f"{english}\t{french}\n" for english, french, _ in SPLITS["devtest"])
    rows = rows.replace("\n", "\tUne autre phrase.\n", 1)
    references = tmp_path / "tatoeba/en-fr/devtest.refs.en-fr.tsv.gz"
    references.write_bytes(gzip.compress(rows.encode()))
    return tmp_path / "tatoeba"


def run(script: str, *arguments: str, **variables: object) -> subprocess.CompletedProcess:
    return run_script(f"multilingual/{script}", *arguments, **variables)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_from_text_to_the_table(corpus: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
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
    # The first French test sentence has a second reference; the Spanish sentences have none.
    second = (work / "text/test.en-fr.fr.2").read_text()
    assert second == "Une autre phrase.\n" + "\n" * (len(SPLITS["devtest"]) - 1)
    assert [line.split()[-1] == "-" for line in scores] == [False, True, True, True]
    for further in ({"MODEL": "single", "DIRECTION": "es-en"}, {"MODEL": "deep"}):
        done = run("train.sh", **variables, **further)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = (work / "table.md").read_text().splitlines()
    score = r"[\d.]+ \([\d.]+\)"
    row = rf"\| es-en \| 8 \| {score} \| {score} \| {score} \| [-+]\d\.\d\d \| [01]\.\d+ \| [-+]"
    assert any(re.match(row, line) for line in rows), rows
    assert "MoE - dense, deeper" in rows[2]
    figure = tmp_path / "updates.png"
    assert CliRunner().invoke(main, [str(work), "--figure", str(figure)]).exit_code == 0
    assert figure.read_bytes().startswith(b"\x89PNG")

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
        ("train.sh", {"MODEL": "sparse"}, "MODEL must be one of moe, dense, deep, single"),
        ("train.sh", {"MODEL": "single"}, "DIRECTION must be one of en-fr, fr-en, en-es, es-en"),
        (
            "train.sh",
            {"MODEL": "deep", "EXPERT_HIDDEN_DIM": "16"},
            "EXPERT_HIDDEN_DIM is 16 and LSTM",
        ),
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


def write_scores(folder: Path, lines: dict[str, list[str]]) -> None:
    for run_name, columns in lines.items():
        (folder / run_name).mkdir()
        text = "".join(line.replace(" ", "\t", 2) + "\n" for line in columns)
        (folder / run_name / "scores.tsv").write_text(text)


def test_the_tables_by_hand(tmp_path: Path):
    write_scores(
        tmp_path,
        {
            "single-en-fr-seed1": ["single en-fr 9.00 20.00 40.00 25.00"],
            "dense-seed1": ["dense en-fr 8.00 21.50 41.00 26.50", "dense fr-en 6.00 30.00 50.00 -"],
            "moe-seed1": ["moe en-fr 7.00 24.00 43.00 30.00", "moe fr-en 5.00 31.00 51.00 -"],
        },
    )
    first, second = make_tables(tmp_path)
    assert first[0].endswith("| MoE - dense, wider | p | MoE - single |")
    assert first[2:] == [
        "| en-fr | - | 20.00 (9.00) | 21.50 (8.00) | 24.00 (7.00) | +2.50 | - | +4.00 |",
        "| fr-en | - | not trained | 30.00 (6.00) | 31.00 (5.00) | +1.00 | - | - |",
        "| mean |  | - | 25.75 (7.00) | 27.50 (6.00) | +1.75 |  | - |",
    ]
    assert second[2:] == [
        "| en-fr | 40.00 (25.00) | 41.00 (26.50) | 43.00 (30.00) |",
        "| fr-en | not trained | 50.00 | 51.00 |",
    ]


def test_experts_are_compared_with_the_dense_model_that_is_better_on_valid(tmp_path: Path):
    write_scores(
        tmp_path,
        {
            "dense-seed1": ["dense en-fr 8.00 29.00 41.00 -"],
            "deep-seed1": ["deep en-fr 7.50 21.00 41.00 -"],
            "moe-seed1": ["moe en-fr 7.00 24.00 43.00 -"],
        },
    )
    first, _ = make_tables(tmp_path)
    assert "MoE - dense, deeper" in first[0]
    assert first[2].endswith("| +3.00 | - | - |")


def test_the_bootstrap_compares_the_translations(tmp_path: Path):
    write_scores(tmp_path, {name: [f"{name} en-ja 8.00 1.00 1.00 -"] for name in ("dense", "moe")})
    reference = [f"これ は {i} 番 の 文 です" for i in range(60)]
    worse = [line.replace("番", "x") for line in reference]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/test.en-ja.ja").write_text("\n".join(reference) + "\n")
    for name, lines in {"dense": worse, "moe": reference}.items():
        (tmp_path / name / "translations").mkdir()
        (tmp_path / name / "translations/test.en-ja").write_text("\n".join(lines) + "\n")
    assert make_tables(tmp_path)[0][2].endswith("| +0.00 | 0.001 | - |")
    (tmp_path / "dense/translations/test.en-ja").write_text("\n".join(reference) + "\n")
    assert make_tables(tmp_path)[0][2].endswith("| +0.00 | 1.000 | - |")


def test_a_damaged_score_is_named(tmp_path: Path):
    (tmp_path / "moe-seed1").mkdir()
    (tmp_path / "moe-seed1/scores.tsv").write_text("moe\ten-fr\n")
    with pytest.raises(ValueError, match="line 1: must have model, direction"):
        make_tables(tmp_path)
