"""The One Billion Word recipe on a tiny archive laid out like the real one, and on bad input."""

import gzip
import hashlib
import io
import random
import re
import tarfile

import pytest
from click.testing import CliRunner

pytest.importorskip("fairseq")

from nmt_moe.scoring import logs
from recipes.lm1b import counts, fetch, sizes
from tests.support.recipes import refusal, run_script

TINY = {
    **{"SLICE": 1, "SHARDS": 2, "SHARD_LINES": 40, "MIN_COUNT": 1, "SAMPLES": 8},
    **{"BATCH_WORDS": 200, "MAX_TOKENS": 100, "EPOCHS": 2, "THREADS": 1, "DEVICE": "cpu"},
}
# An archive that is truncated within its end mark or gzip's checksum still lists all its files.
END_OF_GZIP = 6


def write_archive(folder, texts):
    """Write an archive with the benchmark's layout; return the variables that point to it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{fetch.NAME}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return leading_to(path)


def leading_to(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"LM1B_MIRROR": path.parent.as_uri(), "LM1B_SHA256": digest}


def make_texts():
    chance = random.Random(1)
    names = [
        *(fetch.train_shard(number) for number in range(1, 4)),
        *(fetch.held_out_shard(number) for number in range(3)),
    ]
    texts = {}
    for name in names:
        lines = [
            " ".join(f"w{chance.randrange(12)}" for _ in range(1 + number % 9))
            for number in range(50)
        ]
        texts[name] = "".join(line + "\n" for line in lines).encode()
    return texts


def run(script, folder, *arguments, **variables):
    folders = {"WORK": folder / "work", "ARCHIVE_DIR": folder / "archive"}
    return run_script(f"lm1b/{script}", *arguments, **(TINY | folders | variables))


def test_from_the_archive_to_perplexity(tmp_path):
    texts = make_texts()
    # fairseq splits text at each of these special characters, and the last of them ends its lines.
    # In the benchmark, the last one separates words, but the others occur within words.
    cut = "\u0085 w2\u00a0w3 w4\u2028w5 w6\rw7\n".encode()
    for name in (fetch.train_shard(1), fetch.held_out_shard(0)):
        texts[name] = cut + texts[name]
    archive = write_archive(tmp_path / "mirror", texts)
    # The dictionary has 15 words and fairseq's 4 special symbols. A refused setting does not use up
    # the run's name.
    many = run("train.sh", tmp_path, RUN="tiny", **(archive | {"SAMPLES": 1000}))
    assert "`--sampled-softmax` must be from 0 to 19" in refusal(many)
    assert "vocabulary: 15 words with a count of at least 1, plus <S>" in many.stdout
    done = run("train.sh", tmp_path, RUN="tiny", **archive)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 words per update = " in done.stdout
    assert "MAX_TOKENS x GPUS x NODES x accumulated batches = 100 x 1 x 1 x 2\n" in done.stdout
    # The text has 40 lines from each of two shards.
    first, *train = (tmp_path / "work/text/train").read_text().splitlines()
    assert first == "<U+0085> w2<U+00A0>w3 w4<U+2028>w5 w6 w7"
    shards = [texts[fetch.train_shard(number)].decode().split("\n")[:40] for number in (1, 2)]
    assert train == [*shards[0][1:], *shards[1]]
    test = texts[fetch.held_out_shard(0)].split(b"\n")[:40]
    found = re.search(r"test, tiny: perplexity ([\d.]+) over (\d+) words", done.stdout)
    assert int(found[2]) == sum(len(line.split()) + 1 for line in test)
    assert 1 < float(found[1]) < 40

    assert re.search(r"valid:  num_updates \d+  ppl [\d.]+\n", done.stdout)
    with (tmp_path / "work/tiny/train.log").open() as log:
        assert logs.read_run("tiny", log).curve(["valid.ppl"])[0]

    again = run("evaluate.sh", tmp_path, RUN="tiny", SUBSET="valid", **archive)
    assert re.search(r"valid, tiny: perplexity [\d.]+ over \d+ words", again.stdout)
    other = run("train.sh", tmp_path, RUN="tiny", **(archive | {"LEARNING_RATE": 0.5}))
    assert "was trained with different settings or a different text" in refusal(other)


@pytest.mark.parametrize(
    ("model", "widths"),
    [  # the sizes in Table 7, divided by 8
        ("lstm_lm_2048_512", (64, 256, 128)),
        ("lstm_moe_lm_1_wide", (64, 64, 512)),
        ("lstm_moe_lm_4096h", (64, 64, 128)),
        ("lstm_moe_lm_34m", (128, 128, 256)),
        ("lstm_moe_lm_143m", (128, 512, 1024)),
    ],
)
def test_a_slice_has_an_eighth_of_the_widths_of_its_model(model, widths):
    names = ("model_dim", "lstm_hidden_dim", "hidden_dim")
    assert sizes.narrow_sizes(model, 8) == dict(zip(names, widths, strict=True))
    whole = (8 * width for width in widths)
    assert sizes.narrow_sizes(model, 1) == dict(zip(names, whole, strict=True))


def test_only_sliced_lines_are_read_and_zero_reads_all(tmp_path):
    for name, text in (("one", b"a\nb\nc\n"), ("two", b"d\n")):
        (tmp_path / name).write_bytes(text)
    shards = [tmp_path / "one", tmp_path / "two"]
    fetch.join(shards, tmp_path / "out", 2)
    assert (tmp_path / "out").read_bytes() == b"a\nb\nd\n"
    fetch.join(shards, tmp_path / "out", 0)
    assert (tmp_path / "out").read_bytes() == b"a\nb\nc\nd\n"


def test_each_word_stays_one_word_and_different_words_stay_different():
    words = ["a\u0085b", "a\u00a0b", "a<U+0085>b", "a<U+3000", "<U+0085>\u3000", "\x1c", "a&b"]
    kept = fetch.keep_words(" ".join(words).encode() + b"\n").decode()
    assert kept == (
        "a<U+0085>b a<U+00A0>b a<U+003C>U+0085>b a<U+3000 <U+003C>U+0085><U+3000> <U+001C> a&b\n"
    )
    # split() splits like fairseq.
    assert len(kept.split()) == len(set(kept.split())) == len(words)
    assert fetch.keep_words(b"a\tb\fc\vd\re\r\n") == b"a b c d e\n"
    assert fetch.keep_words(b"a \xff") == b"a \xff\n"
    assert fetch.keep_words(b"\n") == b"\n"


def test_an_altered_archive_is_refused_with_both_digests_and_removed(tmp_path):
    archive = write_archive(tmp_path / "mirror", make_texts())
    wanted = "0" * 64
    error = refusal(run("prepare.sh", tmp_path, **(archive | {"LM1B_SHA256": wanted})))
    assert "does not match the known hash" in error
    assert archive["LM1B_SHA256"] in error
    assert wanted in error
    assert not list((tmp_path / "archive").iterdir())
    assert run("prepare.sh", tmp_path, **archive).returncode == 0


def test_without_a_digest_the_public_digest_is_used(tmp_path):
    archive = write_archive(tmp_path / "mirror", make_texts())
    error = refusal(run("prepare.sh", tmp_path, LM1B_MIRROR=archive["LM1B_MIRROR"]))
    assert fetch.SHA256 in error


@pytest.mark.parametrize("kept", [0.5, -END_OF_GZIP], ids=["half", "checksum"])
def test_a_truncated_archive_is_refused_by_the_recipe(kept, tmp_path):
    write_archive(tmp_path / "mirror", make_texts())
    path = tmp_path / "mirror" / f"{fetch.NAME}.tar.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept > 0 else kept])
    # The digest matches the truncated file, so the truncation itself must be noticed.
    error = refusal(run("prepare.sh", tmp_path, **leading_to(path)))
    assert "archive is not complete" in error


def test_a_damaged_checksum_is_refused(tmp_path):
    write_archive(tmp_path / "mirror", make_texts())
    path = tmp_path / "mirror" / f"{fetch.NAME}.tar.gz"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="archive is not complete.*CRC"):
        fetch.unpack(path, [fetch.train_shard(1)], tmp_path / "out")


def test_a_missing_archive_is_named_with_its_address_and_a_remedy(tmp_path):
    (tmp_path / "mirror").mkdir()
    error = refusal(run("prepare.sh", tmp_path, LM1B_MIRROR=(tmp_path / "mirror").as_uri()))
    assert re.search(rf"file://.*{fetch.NAME}\.tar\.gz: .*No such file", error)


def test_a_missing_shard_is_named(tmp_path):
    texts = make_texts()
    del texts[fetch.held_out_shard(1)]
    error = refusal(run("prepare.sh", tmp_path, **write_archive(tmp_path / "mirror", texts)))
    assert f"has no {fetch.held_out_shard(1)}" in error


def test_a_file_that_is_not_an_archive_is_refused(tmp_path):
    path = tmp_path / "plain.tar.gz"
    path.write_bytes(gzip.compress(b"no archive\n"))
    with pytest.raises(ValueError, match="archive is not complete"):
        fetch.unpack(path, [fetch.train_shard(1)], tmp_path / "out")


def test_a_text_that_is_not_utf8_is_named_with_file_and_line(tmp_path):
    texts = make_texts() | {fetch.train_shard(1): b"w1\nw2 \xff\n"}
    error = refusal(run("prepare.sh", tmp_path, **write_archive(tmp_path / "mirror", texts)))
    assert "text/train`, line 2" in error


def test_words_are_counted_as_in_the_published_counts(tmp_path):
    # Only single-byte white space separates words. The no-break space, the next-line character and
    # the zero-width space do not. Unlike in `wc -w`, a word that consists of a next-line character
    # and a zero-width space counts.
    text = "one two\u00a0three\n\u0085 \u200b four\n\n"
    (tmp_path / "text").write_bytes(text.encode())
    found = counts.count(tmp_path / "text")
    assert found == counts.Counts(sentences=3, words=5)
    assert found.scored == 8


def test_published_training_figures_are_consistent():
    # The benchmark's README counts a mark at each end of a sentence.
    sentences, words = (counts.PUBLISHED["train", what] for what in ("sentences", "words"))
    assert words + 2 * sentences == 829_250_940


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_text_with_different_counts_is_refused(part, tmp_path, monkeypatch):
    texts = {"train": b"a b\nc\n", "valid": b"d\n", "test": b"e f g\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    published = {
        **{("train", "sentences"): 2, ("train", "words"): 3},
        **{("valid", "scored"): 2, ("test", "scored"): 4},
    }
    assert published.keys() == counts.PUBLISHED.keys()
    monkeypatch.setattr(counts, "PUBLISHED", published)
    command = ["--text", str(tmp_path), "--published"]
    assert CliRunner().invoke(counts.main, command).exit_code == 0
    assert (tmp_path / "counts.tsv").read_text() == "train\t2\t3\nvalid\t1\t1\ntest\t1\t3\n"

    with (tmp_path / part).open("ab") as file:
        file.write(b"more\n")
    done = CliRunner().invoke(counts.main, command)
    assert {
        "train": "train must have 2 sentences, but has 3; train must have 3 words, not "
        "counting end marks, but has 4",
        "valid": "valid must have 2 words and end marks, but has 4",
        "test": "test must have 4 words and end marks, but has 6",
    }[part] in done.stderr


def pretend_fetched(work, text, settings):
    """Write the files that the first step of `prepare.sh` makes, with `text` in all parts."""
    (work / "text").mkdir(parents=True)
    for part in ("train", "valid", "test"):
        (work / "text" / part).write_text(text)
    (work / ".steps").mkdir()
    stamp = hashlib.sha256(f"|fetch|{settings}  ".encode()).hexdigest()
    (work / ".steps/fetch").write_text(stamp)


def test_a_text_that_fairseq_cuts_elsewhere_is_refused_before_training(tmp_path):
    pretend_fetched(tmp_path / "work", "w1\u00a0w2\n", "2 40")
    error = refusal(run("train.sh", tmp_path))
    assert (
        "fairseq-preprocess must find '1 sents, 2 tokens' in train, including end marks, as in its "
        "text, but found '1 sents, 3 tokens'"
    ) in error
    assert not (tmp_path / "work/prepared").exists()


def test_the_complete_text_must_have_the_published_counts(tmp_path):
    # These texts replace those of the public archive, but are far too short.
    work = tmp_path / "work"
    pretend_fetched(work, "w1 w2\n", "99 0")
    error = refusal(run("prepare.sh", tmp_path, SLICE=0, SHARDS=99, SHARD_LINES=0, MIN_COUNT=3))
    assert "train must have 30,301,028 sentences, but has 1" in error
    assert "train must have 768,648,884 words, not counting end marks, but has 2" in error
    assert "test must have 159,658 words and end marks, but has 3" in error
    assert not (work / "data-bin").exists()


@pytest.mark.slow
def test_a_line_without_an_end_is_named(tmp_path):
    texts = make_texts() | {fetch.train_shard(1): b"w1 w2 " * 33_000}
    archive = write_archive(tmp_path / "mirror", texts)
    assert "data-bin/train`, line 1: " in refusal(run("train.sh", tmp_path, **archive))


def test_an_empty_text_is_named(tmp_path):
    texts = make_texts() | {fetch.train_shard(number): b"" for number in (1, 2)}
    error = refusal(run("prepare.sh", tmp_path, **write_archive(tmp_path / "mirror", texts)))
    shards = "news.en-00001-of-00100, news.en-00002-of-00100"
    assert f"text/train is empty, because its shards are empty: {shards}" in error


REFUSALS = [
    pytest.param("prepare.sh", {"SHARDS": 100}, "SHARDS must be from 1 to 99, but is 100"),
    pytest.param("prepare.sh", {"SLICE": 2}, "SLICE must be one of 0, 1, but is '2'"),
    pytest.param("prepare.sh", {"SHARD_LINES": "x"}, "SHARD_LINES must be a whole number"),
    pytest.param(
        "train.sh", {"BATCH_WORDS": 0}, "BATCH_WORDS must be a whole number of at least 1"
    ),
    pytest.param("train.sh", {"MODEL": "lstm_moe_lm_33"}, "but is 'lstm_moe_lm_33'"),
    pytest.param("train.sh", {"LEARNING_RATE": "1e"}, "LEARNING_RATE must be a number above 0"),
    pytest.param("train.sh", {"SEED": "x"}, "SEED must be a whole number of at least 0"),
    pytest.param("train.sh", {"EVALUATE": "no"}, "EVALUATE must be one of 0, 1, but is 'no'"),
    pytest.param("evaluate.sh", {"RUN": "none"}, "work/none/checkpoint_last.pt is missing"),
    pytest.param("evaluate.sh", {"SUBSET": "train"}, "SUBSET must be one of test, valid"),
]


@pytest.mark.parametrize(("script", "variables", "message"), REFUSALS)
def test_a_wrong_variable_is_named(script, variables, message, tmp_path):
    done = run(script, tmp_path, **variables)
    assert message in refusal(done)
    assert "fetch" not in done.stdout or script == "prepare.sh"


def test_an_argument_that_is_not_a_flag_is_refused_immediately(tmp_path):
    done = run("train.sh", tmp_path, "bogus")
    assert "takes fairseq-train flags, which begin with -, but was given 'bogus'" in refusal(done)
    assert not done.stdout
