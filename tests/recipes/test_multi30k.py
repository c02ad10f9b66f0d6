"""The Multi30k recipe on 20 generated sentences, and on bad input."""

import gzip
import hashlib
import http.server
import sys
import threading

import pytest

from recipes.multi30k import fetch
from recipes.multi30k.moses_text import OfficialTokenizer
from tests.support.recipes import run_script

COLOURS = {"red": "roter", "green": "grüner", "black": "schwarzer", "white": "weißer"}
ANIMALS = {"dog": "Hund", "cat": "Kater", "bird": "Vogel", "bear": "Bär", "fish": "Fisch"}
SENTENCES = [
    (f'A {colour} {animal} reads "News", and rests.', f'Ein {farbe} {tier} liest "News" und ruht.')
    for colour, farbe in COLOURS.items()
    for animal, tier in ANIMALS.items()
]
SPLITS = {"train": SENTENCES, "val": SENTENCES[3:12], "test_2016_flickr": SENTENCES[5:10]}


def make_corpus(folder):
    """Write a folder with the corpus's layout and a file of digests; return both."""
    digests = folder.parent / "SHA256SUMS"
    (folder / "tok").mkdir(parents=True)
    for split, pairs in SPLITS.items():
        for side, language in enumerate(("en", "de")):
            tokenize = OfficialTokenizer(language)
            raw = [pair[side] for pair in pairs]
            write(folder / f"{split}.{language}.gz", raw, digests)
            tokenised = [tokenize(line) for line in raw]
            write(folder / "tok" / f"{split}.lc.norm.tok.{language}.gz", tokenised, digests)
    return folder, digests


def write(path, lines, digests):
    text = lines if isinstance(lines, bytes) else "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text))
    with digests.open("a") as file:
        file.write(f"{hashlib.sha256(text).hexdigest()}  {path.name.removesuffix('.gz')}\n")


def run(script, *arguments, **variables):
    return run_script(f"multi30k/{script}", *arguments, **variables)


TINY = {
    "VOCAB_SIZE": 45,
    "MODEL_DIM": 16,
    "LSTM_HIDDEN_DIM": 16,
    "NUM_EXPERTS": 4,
    "EXPERT_HIDDEN_DIM": 16,
    "MAX_TOKENS": 100,
    "UPDATES": 4,
    "WARMUP_UPDATES": 1,
    "SAVE_INTERVAL": 2,
    "AVERAGE": 2,
    "LENPENS": "1.0",
    "BEAM": 2,
    "THREADS": 1,
    "DEVICE": "cpu",
}


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "multi30k")


def test_from_text_to_scores(corpus, tmp_path):
    folder, digests = corpus
    variables = TINY | {"MULTI30K_DIR": folder, "SHA256SUMS": digests, "WORK": tmp_path / "work"}
    done = run("train.sh", "de", "--adam-eps", "1e-9", RUN="tiny", SAMPLES=1, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    work = tmp_path / "work"
    # Each of the 20 sentences is split into pieces once, and once more at random.
    assert len((work / "pieces" / "train.de").read_text(encoding="utf-8").splitlines()) == 40

    scores = (work / "tiny" / "scores.txt").read_text()
    assert scores.count("tok:none") == 2  # val, test
    assert scores.count("BLEU|nrefs:1|case:mixed|eff:no|tok:13a") == 2
    assert scores.count("chrF2|") == 2
    assert "test_2016_flickr, en-de, tiny, beam 2, length penalty 1.0" in scores
    for name, count in (("val.lenpen1.0", 9), ("test_2016_flickr", 5)):
        translation = work / "tiny" / "translations" / name
        assert translation.read_text(encoding="utf-8").count("\n") == count

    other = run("train.sh", "de", RUN="tiny", SAMPLES=1, **(variables | {"MODEL_DIM": 32}))
    assert other.returncode == 1
    assert "was trained with different settings or a different text" in other.stderr
    assert "Choose another RUN" in other.stderr


def write_captions(path, lines):
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode()))
    return path


def test_translated_captions_are_trained_on_together_with_the_corpus(corpus, tmp_path):
    folder, digests = corpus
    # In each text, one caption equals a sentence of val except for its case and full stop.
    english, german = (side.upper().removesuffix(".") for side in SPLITS["val"][0])
    sources = write_captions(tmp_path / "captions.en.gz", ["A Red DOG rests.", english])
    lines = ["Ein roter Hund ruht.", german, "", "Ein schwarzer Kater ruht."]
    targets = write_captions(tmp_path / "captions.de.gz", lines)
    work, both = tmp_path / "work", tmp_path / "work-extra"
    variables = TINY | {"MULTI30K_DIR": folder, "SHA256SUMS": digests, "WORK": work}
    teacher = run("train.sh", "de", RUN="teacher", **variables)
    assert teacher.returncode == 0, teacher.stdout + teacher.stderr

    variables |= {"SOURCE_TEXT": sources, "TARGET_TEXT": targets, "TEACHER": "teacher"}
    variables |= {"REVERSE_UPDATES": 4, "COPIES": 2, "RUN": "both"}
    done = run("monolingual.sh", "de", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    translated = read(work / "forward.de")
    assert len(translated) == 1
    assert read(work / "back.de") == lines[::3]
    # The model reads English in lower case, so added English text is written in the same way.
    assert read(work / "extra.en") == ["a red dog rests.", *read(work / "back.en")]
    assert read(work / "extra.de") == [*translated, *lines[::3]]
    assert len(read(both / "pieces" / "train.de")) == 2 * len(SENTENCES) + 3
    assert "test_2016_flickr, en-de, both" in (both / "both" / "scores.txt").read_text()

    again = run("monolingual.sh", "de", **variables)
    assert again.returncode == 0, again.stdout + again.stderr
    for step in ("forward-translate", "reverse", "back-translate", "cut"):
        assert f"{step}: already done" in again.stdout

    # A model may write nothing for a line; such a pair teaches nothing, and the rest is used.
    (work / "forward.de").write_text("\n")
    # The batch of the last step is not that of the reverse model, which goes on.
    variables |= {"RUN": "fewer", "EVALUATE": 0, "MAX_TOKENS": 50, "REVERSE_UPDATES": 6}
    fewer = run("monolingual.sh", "de", **variables)
    assert fewer.returncode == 0, fewer.stdout + fewer.stderr
    assert "num_updates: 6 >= max_update: 6" in (work / "reverse" / "train.log").read_text()
    assert read(work / "extra.en") == read(work / "back.en")
    assert read(work / "extra.de") == lines[::3]


def read(path):
    return path.read_text(encoding="utf-8").splitlines()


def prepare(corpus, tmp_path, **variables):
    folder, digests = corpus
    variables = {"SHA256SUMS": digests, "MULTI30K_DIR": folder, "VOCAB_SIZE": 45} | variables
    return run("prepare.sh", "de", WORK=tmp_path / "work", **variables)


def test_a_missing_file_is_named(corpus, tmp_path):
    (corpus[0] / "val.de.gz").unlink()
    done = prepare(corpus, tmp_path)
    assert done.returncode == 1
    assert f"error: {corpus[0]} has neither val.de nor val.de.gz" in done.stderr


def test_a_wrong_digest_is_refused_with_both(corpus, tmp_path):
    (corpus[0] / "val.de.gz").write_bytes(gzip.compress(b"Etwas anderes.\n"))
    done = prepare(corpus, tmp_path)
    assert done.returncode == 1
    assert "val.de.gz: the sha256 of its text is " in done.stderr
    assert hashlib.sha256(b"Etwas anderes.\n").hexdigest() in done.stderr


def test_a_truncated_file_is_named(corpus, tmp_path):
    path = corpus[0] / "train.en.gz"
    path.write_bytes(path.read_bytes()[:-20])
    done = prepare(corpus, tmp_path)
    assert done.returncode == 1
    assert "train.en.gz: the archive is not complete" in done.stderr


BAD_TEXTS = [
    pytest.param(
        b"Ein Hund.\nEin \xffBus.\n" * 10, "train.de`, line 2 is not valid UTF-8", id="no-utf-8"
    ),
    pytest.param(b"Ein Hund.\n" * 19, "train.de` has 19: line 20 is the first", id="shorter"),
    pytest.param(b"Ein Hund.\n\n" * 10, "train.de`, line 2 is empty", id="empty-line"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS)
def test_a_bad_text_is_named_with_its_line(corpus, tmp_path, text, message):
    write(corpus[0] / "train.de.gz", text, corpus[1])
    done = prepare(corpus, tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


REFUSALS = [
    pytest.param("prepare.sh", ["es"], {}, "PAIR must be de or fr, but is 'es'", id="pair"),
    pytest.param("prepare.sh", [], {"CASE": "upper"}, "CASE must be one of", id="case"),
    pytest.param(
        "prepare.sh", ["de"], {"MULTI30K_DIR": "/absent"}, "MULTI30K_DIR=/absent", id="dir"
    ),
    pytest.param("train.sh", [], {"WORK": "x"}, "WORK is for one language", id="one-work"),
    pytest.param("train.sh", ["de"], {"SEED": "x"}, "SEED must be a whole number", id="seed"),
    pytest.param("train.sh", ["de"], {"LEARNING_RATE": "0"}, "a number above 0", id="rate"),
    pytest.param("train.sh", ["de"], {"MODEL": "dens"}, "MODEL must be one of moe", id="model"),
    pytest.param(
        "train.sh", ["de"], {"UPDATES": "400"}, "must not exceed UPDATES = 400", id="average"
    ),
    pytest.param("train.sh", ["de"], {"UPDATES": "1100"}, "must be a multiple of", id="updates"),
    pytest.param("prepare.sh", ["de"], {"EXTRA": "/absent"}, "/absent.en is missing", id="extra"),
    pytest.param("prepare.sh", ["de"], {"COPIES": "0"}, "COPIES must be a whole", id="copies"),
    pytest.param("monolingual.sh", [], {}, "takes one PAIR", id="text-pairs"),
    pytest.param("monolingual.sh", ["de"], {}, "SOURCE_TEXT or TARGET_TEXT must", id="no-text"),
    pytest.param(
        "monolingual.sh", ["de"], {"TARGET_TEXT": "/absent"}, "TARGET_TEXT=/absent", id="text"
    ),
    pytest.param("monolingual.sh", ["de"], {"SOURCE_TEXT": __file__}, "set TEACHER", id="teacher"),
    pytest.param("evaluate.sh", ["de"], {"LENPENS": "1 x"}, "LENPENS must be numbers", id="lenpen"),
    pytest.param(
        "evaluate.sh", ["de"], {"RUN": "absent"}, "absent/average.pt is missing", id="run"
    ),
]


@pytest.mark.parametrize(("script", "arguments", "variables", "message"), REFUSALS)
def test_a_wrong_setting_is_refused_at_once(tmp_path, script, arguments, variables, message):
    if arguments == ["de"]:
        variables = {"WORK": tmp_path} | variables
    done = run(script, *arguments, **variables)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("script", ["prepare.sh", "train.sh", "evaluate.sh", "monolingual.sh"])
def test_help_lists_the_variables(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"{script} " in done.stdout
    assert "PAIR" in done.stdout


def test_official_form_by_hand():
    tokenize = OfficialTokenizer("fr")
    # Text is lower-cased. The apostrophe stays with its article and is escaped, and the full stop
    # is split off.
    assert tokenize("L'homme lit «Le Monde».") == "l&apos; homme lit &quot; le monde &quot; ."


class Handler(http.server.BaseHTTPRequestHandler):
    """A server that gives its answers in order, and then repeats the last one."""

    answers: list = []

    def do_GET(self):  # noqa: N802
        self.wfile.write(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])

    def log_message(self, *_):
        pass


def answer(body, status="200 OK", length=None):
    length = len(body) if length is None else length
    return f"HTTP/1.0 {status}\r\nContent-Length: {length}\r\n\r\n".encode() + body


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


NAME, TEXT = "val.lc.norm.tok.en", b"line\n" * 1000
BAD_ANSWERS = [
    pytest.param(answer(b"<html>Log in</html>"), "sha256 of its text is", id="login-page"),
    pytest.param(answer(TEXT[:300], length=5000), "could not be downloaded", id="cut"),
    pytest.param(answer(b"", "416 Range Not Satisfiable"), "416", id="status-416"),
    pytest.param(answer(b"", "503 Busy"), "503", id="busy"),
    pytest.param(b"garbage\r\n\r\n", "could not be downloaded", id="garbage"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nab", "could not", id="chunk"
    ),
    pytest.param(answer(b"0" * (1 << 25)), "has more than 16,777,216 bytes", id="endless"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ANSWERS)
def test_a_bad_download_is_named_discarded_and_repeated(server, tmp_path, bad, message):
    Handler.answers = [bad, answer(TEXT)]
    digest = hashlib.sha256(TEXT).hexdigest()
    with pytest.raises(ValueError, match=message):
        fetch.fetch(NAME, digest, tmp_path, None, server)
    assert list(tmp_path.iterdir()) == []
    fetch.fetch(NAME, digest, tmp_path, None, server)
    assert (tmp_path / NAME).read_bytes() == TEXT
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_an_unreachable_address_is_named_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="(?s)http://127.0.0.1:9/.*name a folder or mirror"):
        fetch.fetch(NAME, "0" * 64, tmp_path, None, "http://127.0.0.1:9")


def test_a_target_that_is_a_folder_is_named(tmp_path):
    (tmp_path / f"download.{NAME}").mkdir()
    with pytest.raises((ValueError, OSError), match="download.val"):
        fetch.fetch(NAME, "0" * 64, tmp_path, None, "http://127.0.0.1:9")


@pytest.mark.parametrize("which", ["val", "test"])
def test_an_evaluation_whose_scorer_fails_ends_with_its_message(tmp_path, which):
    """Check that a failure of sacrebleu, at the first score or in the last report, is reported."""
    commands = tmp_path / "bin"
    commands.mkdir()
    programs = {
        "fairseq-generate": "printf 'D-0\\t-1\\tein Hund\\n'",
        "fairseq-train": "",
        "sacrebleu": """case "$*" in
            *FAIL*) echo no memory >&2; exit 3 ;;
            *--score-only*) echo 1 ;;
        esac""",
        "python": f'exec {sys.executable} "$@"',
    }
    programs["sacrebleu"] = programs["sacrebleu"].replace(
        "FAIL", "--score-only" if which == "val" else "translations/test_2016_flickr*"
    )
    for name, body in programs.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    work = tmp_path / "work"
    (work / "text").mkdir(parents=True)
    for name in ("val.de", "test_2016_flickr.de"):
        (work / "text" / name).write_text("ein Hund\n")
    (work / "x.pt").touch()
    variables = {"NMT_MOE_PYTHON": commands / "python", "LENPENS": "1.0", "DEVICE": "cpu"}
    done = run("evaluate.sh", "de", WORK=work, CHECKPOINT=work / "x.pt", **variables)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no memory\nerror: 'sacrebleu' failed" in done.stderr
    assert "BLEU \n" not in done.stdout
