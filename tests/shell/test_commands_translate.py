"""fairseq-generate and fairseq-interactive with common options."""

from pathlib import Path

import pytest

from nmt_moe.checkpoints.average import average_checkpoints
from tests.support.commands import Output, call
from tests.support.training import TINY_MOE, TRANSLATE, load


def generate(data: Path, path: object, *flags: object) -> Output:
    return call("generate", data, "--path", path, *TRANSLATE, *flags)


@pytest.fixture(scope="module")
def other_checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    seed = ["--seed", 8, "--max-epoch", 2, "--no-epoch-checkpoints"]
    call("train", data, *TINY_MOE, *seed, "--save-dir", folder)
    return folder / "checkpoint_last.pt"


def scores(done: Output) -> dict[int, float]:
    return {number: float(row[0]) for number, row in done.lines("H").items()}


def test_a_batch_is_translated_like_its_sentences_one_by_one(data: Path, checkpoint: Path):
    together = generate(data, checkpoint, "--batch-size", 8)
    alone = generate(data, checkpoint, "--batch-size", 1)
    assert together.hypotheses() == alone.hypotheses()
    assert scores(together) == pytest.approx(scores(alone), abs=1e-4)
    assert len(set(together.hypotheses())) > 2


def test_alignments_point_at_the_same_source_words_in_a_batch_and_alone(
    data: Path, checkpoint: Path
):
    # Shorter sentences in a batch are padded on the left.
    together = generate(data, checkpoint, "--batch-size", 8, "--print-alignment")
    alone = generate(data, checkpoint, "--batch-size", 1, "--print-alignment")
    assert together.lines("A") == alone.lines("A")
    assert len(together.lines("A")) == 8
    for number, (pairs,) in together.lines("A").items():
        source_length = len(together.lines("S")[number][0].split())
        places = [int(pair.split("-")[0]) for pair in pairs.split()]
        assert all(0 <= place <= source_length for place in places)  # the last is the end mark


def test_an_ensemble_averages_its_models(data: Path, checkpoint: Path, other_checkpoint: Path):
    twice = generate(data, f"{checkpoint}:{checkpoint}")
    assert scores(twice) == pytest.approx(scores(generate(data, checkpoint)), abs=1e-4)
    both = generate(data, f"{checkpoint}:{other_checkpoint}", "--score-reference")
    each = [generate(data, path, "--score-reference") for path in (checkpoint, other_checkpoint)]
    # At each word, log((p + q) / 2) >= (log p + log q) / 2. The inequality therefore also holds for
    # the mean over the sentence.
    for number, score in scores(both).items():
        mean = sum(scores(one)[number] for one in each) / 2
        assert mean - 1e-4 <= score < mean + 1.0
    assert scores(both) != pytest.approx(scores(each[0]), abs=1e-4)


def test_an_average_of_checkpoints_translates(
    data: Path, checkpoint: Path, other_checkpoint: Path, tmp_path: Path
):
    output = tmp_path / "average.pt"
    average_checkpoints([checkpoint, other_checkpoint], output)
    one, other, mean = (load(path)["model"] for path in (checkpoint, other_checkpoint, output))
    name = "decoder.output.weight"
    assert mean[name].allclose((one[name] + other[name]) / 2)
    assert len(generate(data, output).hypotheses()) == 8


def test_nbest_lists_the_requested_number_of_hypotheses_best_first(data: Path, checkpoint: Path):
    done = generate(data, checkpoint, "--beam", 4, "--nbest", 3)
    rows = [line.split("\t") for line in done.text.splitlines() if line.startswith("H-0\t")]
    values = [float(row[1]) for row in rows]
    assert len(values) == 3
    assert values == sorted(values, reverse=True)
    assert len({row[2] for row in rows}) == 3


def test_a_prefix_is_kept(data: Path, checkpoint: Path):
    done = generate(data, checkpoint, "--prefix-size", 1)
    for number, row in done.lines("H").items():
        assert row[-1].split()[0] == done.lines("T")[number][0].split()[0]


def test_sampling_follows_its_seed(data: Path, checkpoint: Path):
    flags = ["--sampling", "--beam", 1]
    one, same, other = (generate(data, checkpoint, *flags, "--seed", s) for s in (5, 5, 6))
    assert one.hypotheses() == same.hypotheses()
    assert one.hypotheses() != other.hypotheses()


def test_interactive_aligns_and_translates_like_generate(
    data: Path, checkpoint: Path, corpus: Path
):
    flags = ["--path", checkpoint, *TRANSLATE, "--print-alignment", "--buffer-size", 8]
    text = (corpus / "test.aa").read_bytes()
    spoken = call("interactive", data, *flags, "--batch-size", 8, stdin=text)
    written = generate(data, checkpoint, "--print-alignment")
    assert spoken.hypotheses() == written.hypotheses()
    assert spoken.lines("A") == written.lines("A")
