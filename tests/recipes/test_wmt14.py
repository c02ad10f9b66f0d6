"""The WMT14 recipes on a tiny mirror with the same layout, both intact and damaged."""

import errno
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import tarfile
import threading
from functools import partial

import pytest

from recipes.wmt14 import archives, texts
from tests.support.recipes import RECIPES, run_script

COLOURS = {"red": "rouge", "green": "vert", "black": "noir", "white": "blanc", "grey": "gris"}
ANIMALS = {"dog": "chien", "cat": "chat", "bird": "oiseau", "bear": "ours", "fish": "poisson"}
PAIRS = [
    (
        f"A {colour} {animal} reads “News”, and rests.",
        f"Un {animal_fr} {couleur} lit « News »\u00a0!",
    )
    for colour, couleur in COLOURS.items()
    for animal, animal_fr in ANIMALS.items()
]
LONG = ("word " * 300, "mot " * 300)
# These pairs are unusable: one has an empty side, one is not UTF-8, and one is too long.
BAD_PAIRS = [("Nobody answers.", "\t"), ("A broken line.", b"Une ligne \xff."), LONG]


def to_bytes(lines):
    return b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines)


def to_sgm(lines):
    segments = [f'<seg id="{i}">{line}</seg>' for i, line in enumerate(lines, start=1)]
    return to_bytes(['<srcset setid="x" srclang="any">', *segments, "</srcset>"])


def write_archive(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def choose_pairs(part):
    """Choose the sentences of a corpus; training corpora have 25 pairs each.

    Europarl has three additional pairs that must be removed. The last pair of News Commentary
    contains a Unicode line separator, which does not end a line.
    """
    if part["name"] == "europarl-v7":
        return PAIRS + BAD_PAIRS
    if part["name"] == "news-commentary-v9":
        return [*PAIRS[:-1], ("A line\u2028separated.", "Une ligne\u2028séparée.")]
    if part["split"] == "train":
        return PAIRS
    return PAIRS[5:9] if part["name"] == "newstest2014" else PAIRS[:5]


def to_member(name, lines):
    content = to_sgm(lines) if name.endswith(".sgm") else to_bytes(lines)
    return gzip.compress(content) if name.endswith(".gz") else content


def make_mirror(folder):
    """Write miniatures of all archives, and their manifest."""
    manifest = archives.read_manifest(archives.MANIFEST)
    members = {}
    for part in itertools.chain.from_iterable(manifest["parts"].values()):
        pairs = choose_pairs(part)
        part["lines"] = len(pairs)
        for side, name in enumerate((part["source"], part["target"])):
            content = to_member(name, [pair[side] for pair in pairs])
            members.setdefault(part["archive"], {})[name] = content
    for name, entry in manifest["archives"].items():
        path = folder / name
        write_archive(path, members[name])
        content = path.read_bytes()
        entry["mirrors"] = []
        if "bytes" in entry:
            entry["bytes"] = len(content)
        for kind in {"md5", "sha256"} & set(entry):
            entry[kind] = hashlib.new(kind, content).hexdigest()
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest))
    return path


@pytest.fixture
def mirror(tmp_path):
    make_mirror(tmp_path / "mirror")
    return tmp_path / "mirror"


def run(pair, script, *arguments, **variables):
    return run_script(f"wmt14_en_{pair}/{script}", *arguments, **variables)


def settings(mirror, **variables):
    base = mirror.parent
    return {
        "WMT14_MIRROR": mirror.as_uri(),
        "MANIFEST": mirror / "manifest.json",
        "DOWNLOADS": base / "downloads",
        "WORK": base / "work",
        "VOCAB_SIZE": 60,
        "SAMPLE_PAIRS": 40,
        "COVERAGE": 1.0,
        "THREADS": 2,
    } | variables


def read(path):
    return path.read_bytes().decode().split("\n")[:-1]


def test_preparing_french_runs_all_steps_once(mirror):
    done = run("fr", "prepare.sh", **settings(mirror))
    assert done.returncode == 0, done.stdout + done.stderr
    work = mirror.parent / "work"

    # There are five corpora of 25 pairs. Cleaning removes two of the three bad pairs, and splitting
    # into pieces removes the third.
    assert "train: 126 pairs; 1 left out: empty side; 1 left out: not UTF-8" in done.stdout
    assert "train: 125 pairs; 1 left out: over 250 pieces" in done.stdout
    for language in ("en", "fr"):
        assert len(read(work / "pieces" / f"train.{language}")) == 125
        assert len(read(work / "pieces" / f"valid.{language}")) == 10
        assert len(read(work / "pieces" / f"test.{language}")) == 4
        # The sample contains every 4th of the 126 pairs.
        assert len(read(work / "text" / f"sample.{language}")) == 31
    # Punctuation is normalised in the source and kept in the target, except that the French space
    # becomes a plain space.
    assert read(work / "text" / "test.en")[0].endswith('reads "News," and rests.')
    assert read(work / "text" / "test.fr")[0].endswith("lit « News » !")
    assert (work / "data-bin" / "train.en-fr.fr.bin").stat().st_size > 0
    assert "wmt13/training-parallel-un.tgz" in done.stdout
    assert done.stdout.count("no digest is published: recorded ") == 2

    again = run("fr", "prepare.sh", **settings(mirror))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already done") == 8 + 8 + 7

    changed = run("fr", "prepare.sh", **settings(mirror, MAX_PIECES=60))
    assert changed.returncode == 0, changed.stderr
    assert "learn-pieces: already done" in changed.stdout
    assert "cut-train: already done" not in changed.stdout

    train_and_evaluate(settings(mirror, MAX_PIECES=60, DEVICE="cpu"))


def train_and_evaluate(variables):
    sizes = ["--model-dim", 16, "--lstm-hidden-dim", 16, "--num-experts", 4]
    sizes += ["--expert-hidden-dim", 16]
    training = {"UPDATES": 2, "SAVE_INTERVAL": 1, "MAX_TOKENS": 2000}
    done = run("fr", "train.sh", *sizes, **variables, **training)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1024000 words per update (the paper's 64 GPUs x 16000) =" in done.stdout
    assert "GPUS x MAX_TOKENS x accumulated passes = 1 x 2000 x 512" in done.stdout
    assert "valid:  num_updates 2" in done.stdout

    other = run("fr", "train.sh", *sizes, **variables, **training, DROPOUT=0.1)
    assert other.returncode == 1
    assert "was trained with different settings or a different text" in other.stderr

    done = run("fr", "evaluate.sh", "--max-len-b", 10, **variables, BEAM=2)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = variables["WORK"] / "moe32-seed1" / "translations" / "test.fr.scores.txt"
    lines = scores.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("multi-bleu ")
    assert "words:moses-fr, sacremoses" in lines[1]
    assert "4 sentences" in scores.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        pytest.param(
            {"GPUS": 8, "MODEL": "moe2048", "MAX_TOKENS": 4000},
            [
                "accumulated passes = 8 x 4000 x 32",
                "torchrun --nproc-per-node 8 -m fairseq_cli.train ",
                "--arch lstm_moe_gnmt_2048h --moe-gate strictly_balanced --dropout 0.4 ",
                "--update-freq 32 ",
                "--ddp-backend legacy_ddp",
            ],
            id="one-machine-of-8",
        ),
        pytest.param(
            {"SLURM_NTASKS": 64, "MODEL": "moe512"},
            [
                "accumulated passes = 64 x 16000 x 1",
                "srun fairseq-train ",
                "--arch lstm_moe_gnmt_512h ",
                "--distributed-world-size 64 --distributed-port 29500 --ddp-backend legacy_ddp",
            ],
            id="slurm",
        ),
        pytest.param(
            {},
            [
                "accumulated passes = 1 x 16000 x 64",
                "     fairseq-train ",
                "--arch lstm_moe_gnmt --num-experts 32 --moe-top-k 4 ",
                "--warmup-updates 2000 --hold-updates 8000 --max-tokens 16000 --update-freq 64 ",
            ],
            id="one-gpu",
        ),
    ],
)
def test_training_has_the_papers_batch_on_any_number_of_gpus(tmp_path, variables, parts):
    done = run("fr", "train.sh", "--dry-run", WORK=tmp_path / "work", **variables)
    assert done.returncode == 0, done.stderr
    for part in parts:
        assert part in done.stdout


def test_the_slurm_template_starts_a_task_for_each_gpu():
    variables = {"SLURM_NTASKS": 64, "SLURM_SUBMIT_DIR": RECIPES.parent}
    done = run_script("wmt14/slurm.sbatch", "de", "--dry-run", **variables)
    assert done.returncode == 0, done.stderr
    assert "srun fairseq-train " in done.stdout
    assert "--arch lstm_moe_gnmt_2048h " in done.stdout


def test_gnmts_search_is_passed_on_if_it_is_given(tmp_path):
    values = {"LENGTH_PENALTY_ALPHA": 0.2, "COVERAGE_PENALTY_BETA": 0.2, "BEAM_PRUNE": 3.0}
    done = run("de", "evaluate.sh", "--dry-run", WORK=tmp_path / "work", **values)
    flags = "--length-penalty-alpha 0.2 --coverage-penalty-beta 0.2 --beam-prune 3.0"
    assert flags in done.stdout
    empty = dict.fromkeys(values, "")
    assert "penalty" not in run("de", "evaluate.sh", "--dry-run", **empty).stdout


def test_german_over_http_after_a_step_that_failed(mirror, tmp_path):
    handler = partial(QuietHandler, directory=str(mirror))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        variables = settings(mirror, WMT14_MIRROR=address)
        failed = run("de", "prepare.sh", **(variables | {"VOCAB_SIZE": 9000}))
        assert failed.returncode == 1
        assert "cannot learn `--vocab-size` 9000 pieces" in failed.stderr
        done = run("de", "prepare.sh", **variables)
        server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("already done") == 6 + 6 + 3
    assert len(read(tmp_path / "work" / "pieces" / "train.de")) == 3 * 25


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_dry_run_prints_every_step_and_runs_none(mirror, tmp_path):
    done = run("fr", "prepare.sh", "--dry-run", **settings(mirror))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": would run") == 8 + 8 + 7
    assert f"from {mirror.as_uri()}/wmt10/training-giga-fren.tar" in done.stdout
    assert "nothing published: recorded at the first download" in done.stdout
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "downloads").exists()


def test_the_published_facts_are_the_default():
    manifest = archives.read_manifest(archives.MANIFEST)
    for parts in manifest["parts"].values():
        assert sum(part["lines"] for part in parts if part["split"] == "valid") == 6003
        assert sum(part["lines"] for part in parts if part["split"] == "test") == 3003
        assert {part["archive"] for part in parts} <= set(manifest["archives"])
    assert sum(p["lines"] for p in manifest["parts"]["fr"] if p["split"] == "train") == 40842333


NEWS = "wmt14/training-parallel-nc-v9.tgz"
UN = "wmt13/training-parallel-un.tgz"


def fetch(mirror, name=NEWS):
    manifest = archives.read_manifest(mirror / "manifest.json")
    downloads = mirror.parent / "downloads"
    return archives.fetch(name, manifest["archives"][name], downloads, mirror.as_uri())


def extract(mirror, name, pair="fr"):
    manifest = archives.read_manifest(mirror / "manifest.json")
    part = archives.find_part(manifest, pair, name)
    archive = fetch(mirror, part["archive"])
    return archives.extract(part, pair, archive, mirror.parent / "raw")


def test_a_truncated_archive_is_refused_and_downloaded_again(mirror):
    path = mirror / NEWS
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="does not match the known hash"):
        fetch(mirror)
    assert not list((mirror.parent / "downloads").iterdir())
    path.write_bytes(whole)
    assert fetch(mirror).read_bytes() == whole


def test_a_missing_archive_is_named_with_its_address_and_a_remedy(mirror):
    (mirror / NEWS).unlink()
    with pytest.raises(
        ValueError, match=r"(?s)nc-v9.tgz could not be .* file:///.*mirror that has"
    ):
        fetch(mirror)


def test_an_archive_without_a_digest_must_match_its_first_download(mirror):
    path = fetch(mirror, UN)
    assert fetch(mirror, UN) == path
    path.unlink()
    write_archive(mirror / UN, {"un/undoc.2000.fr-en.en": b"other\n"})
    with pytest.raises(ValueError, match=r"(?s)known hash.*accept another file, edit .*recorded"):
        fetch(mirror, UN)
    (path.parent / "recorded.json").write_text("[]")
    with pytest.raises(ValueError, match="recorded.json: not a JSON object"):
        fetch(mirror, UN)


def test_an_archive_of_another_size_is_refused(mirror):
    giga = "wmt10/training-giga-fren.tar"
    with (mirror / giga).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="bytes, but must have"):
        fetch(mirror, giga)


def test_a_damaged_end_of_an_archive_without_digest_is_refused(mirror):
    path = mirror / UN
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # this byte is in the checksum, after all members
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match="archive is not complete.*The file was removed. Run again"
    ):
        fetch(mirror, UN)


def test_a_text_that_is_too_large_for_its_lines_is_refused(mirror):
    bomb = gzip.compress(b"0" * (3 << 20))
    members = {f"giga-fren.release2.fixed.{language}.gz": bomb for language in ("en", "fr")}
    write_archive(mirror / "x.tar", members)
    part = archives.find_part(archives.read_manifest(mirror / "manifest.json"), "fr", "giga-fren")
    with pytest.raises(ValueError, match="has more than 1,073,576 bytes"):
        archives.extract(part, "fr", mirror / "x.tar", mirror.parent / "raw")


def test_a_disk_that_was_full_while_extracting_does_not_block_the_next_run(mirror, monkeypatch):
    def fill_disk(stream, limit, name):
        yield stream.read(5)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(archives, "bounded", fill_disk)
        with pytest.raises(OSError, match="No space left"):
            extract(mirror, "news-commentary-v9")
    assert not list(mirror.parent.glob("raw/*.fr"))
    extract(mirror, "news-commentary-v9")
    assert len((mirror.parent / "raw/news-commentary-v9.fr").read_bytes().splitlines()) == 25


def test_prepare_stops_at_a_bad_archive_and_resumes_there(mirror):
    path = mirror / UN
    whole = path.read_bytes()
    path.write_bytes(b"no archive at all")
    done = run("fr", "prepare.sh", **settings(mirror))
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "wmt13-training-parallel-un.tgz: the archive is not complete" in done.stderr
    assert "Run again to repeat the download" in done.stderr
    path.write_bytes(whole)
    done = run("fr", "prepare.sh", "--dry-run", **settings(mirror))
    assert done.returncode == 0, done.stderr
    # Two archives precede the bad one. No corpus is extracted until all archives are complete.
    assert done.stdout.count("already done") == 2


def respond(mirror, content, pair="fr", **changes):
    """Replace News Commentary in the mirror, and its size in the manifest."""
    path = mirror / NEWS
    if isinstance(content, dict):
        write_archive(path, content)
    else:
        path.write_bytes(content)
    manifest = archives.read_manifest(mirror / "manifest.json")
    manifest["archives"][NEWS] = {}
    archives.find_part(manifest, pair, "news-commentary-v9").update(changes)
    (mirror / "manifest.json").write_text(json.dumps(manifest))


EN, FR = ("training/news-commentary-v9.fr-en." + language for language in ("en", "fr"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        pytest.param(
            {EN: b"a\n", FR: b"a\nb\n"}, "number of lines, but .*has 1,.*has 2", id="sides"
        ),
        pytest.param({EN: b"a\n", FR: b"b\n"}, "must have 25 lines, but ", id="count"),
        pytest.param({EN: b"a\n"}, f"has no {FR}", id="no-member"),
        pytest.param({"../evil": b"x", EN: b"", FR: b""}, "archive is unsafe: .*evil", id="unsafe"),
    ],
)
def test_an_archive_with_other_contents_is_refused(mirror, members, message):
    respond(mirror, members)
    with pytest.raises(ValueError, match=message):
        extract(mirror, "news-commentary-v9")
    assert not (mirror.parent / "evil").exists()
    assert not list(mirror.parent.glob("raw/*.fr"))


def test_a_link_in_an_archive_is_not_followed(mirror):
    path = mirror / NEWS
    with tarfile.open(path, "w:gz") as tar:
        for name in (EN, FR):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    respond(mirror, path.read_bytes())
    with pytest.raises(ValueError, match="archive is unsafe"):
        extract(mirror, "news-commentary-v9")


def test_an_incomplete_archive_is_refused(mirror):
    noise = os.urandom(5000).hex().encode() + b"\n"
    write_archive(mirror / NEWS, {EN: noise, FR: noise})
    respond(mirror, (mirror / NEWS).read_bytes()[:3000])
    with pytest.raises(ValueError, match="archive is not complete"):
        extract(mirror, "news-commentary-v9")


def test_segments_of_sgm_by_hand(tmp_path):
    sgm = b'<doc>\n<seg id="1"> One  &amp; two </seg>\n<hl><seg id="2">Three</seg></hl>\n</doc>\n'
    assert archives.write_text("x.sgm", io.BytesIO(sgm), tmp_path / "x", 1000) == 2
    assert (tmp_path / "x").read_bytes() == b"One &amp; two\nThree\n"


def test_cleaning_by_hand():
    clean = texts.Cleaner("fr", "source")
    pair = ("A “quote”,\tand\u0007 more…", "Une «\u00a0citation\u00a0»\u00a0: voilà")
    assert clean(pair) == ('A "quote," and more...', "Une « citation » : voilà")
    assert clean(("x", " \x07 ")) == "empty side"
    assert texts.Cleaner("fr", "both")(pair)[1] == 'Une "citation": voilà'


@pytest.mark.parametrize("script", ["prepare.sh", "train.sh", "evaluate.sh"])
def test_help_is_the_manual(script):
    done = run("de", script, "--help")
    assert done.returncode == 0
    assert f": {script} " in done.stdout


REFUSALS = [
    pytest.param(
        "prepare.sh",
        ["--fast"],
        {},
        "takes no flags except --help and --dry-run, but was given '--fast'",
        id="flag",
    ),
    pytest.param("prepare.sh", [], {"NORMALIZE": "all"}, "NORMALIZE must be one of", id="choice"),
    pytest.param("prepare.sh", [], {"VOCAB_SIZE": "x"}, "VOCAB_SIZE must be a whole", id="number"),
    pytest.param("prepare.sh", [], {"MAX_RATIO": "0.5"}, "MAX_RATIO must be a number", id="ratio"),
    pytest.param(
        "prepare.sh", [], {"WMT14_MIRROR": "/data"}, "must begin with file:///", id="mirror"
    ),
    pytest.param(
        "prepare.sh", [], {"MANIFEST": "/absent"}, "MANIFEST=/absent: the file is", id="manifest"
    ),
    pytest.param("train.sh", [], {"MODEL": "moe4"}, "MODEL must be one of moe32", id="model"),
    pytest.param("train.sh", [], {"SEED": "x"}, "SEED must be a whole number", id="seed"),
    pytest.param("train.sh", [], {"LEARNING_RATE": "0"}, "must be a number above 0", id="rate"),
    pytest.param("train.sh", [], {"GPUS": "7"}, "GPUS and MAX_TOKENS", id="gpus"),
    pytest.param("train.sh", [], {"GPUS": "2", "LAUNCH": "plain"}, "LAUNCH=plain", id="launch"),
    pytest.param("evaluate.sh", [], {"RUN": "x"}, "x/checkpoint_best.pt is missing", id="run"),
    pytest.param("evaluate.sh", [], {"BEAM_PRUNE": "a"}, "BEAM_PRUNE must be a nu", id="prune"),
    pytest.param("evaluate.sh", [], {"SUBSET": "train"}, "SUBSET must be one of", id="subset"),
]


@pytest.mark.parametrize(("script", "arguments", "variables", "message"), REFUSALS)
def test_a_wrong_setting_is_refused_at_once(tmp_path, script, arguments, variables, message):
    done = run("de", script, *arguments, WORK=tmp_path / "work", **variables)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "work").exists()
