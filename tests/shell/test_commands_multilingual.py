"""fairseq's commands train, resume, translate and refuse bad input with the multilingual task."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.commands import PLUGIN, Output, call, run
from tests.support.corpus import SOURCE_WORDS
from tests.support.multilingual import (
    LANGUAGES,
    PAIRS,
    SIZES,
    TASK,
    make_data,
    write_dictionary,
)
from tests.support.ranks import run_ranks
from tests.support.training import TINY_DENSE, TINY_MOE, TRANSLATE, assert_same_bits, load

SAMPLING = ["--sampling-temperature", 2, "--oversampling", "cc-aa=4"]
BLEU = ["--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 10}']


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("multilingual"))


def train(data: Path, folder: Path, epochs: int, *flags: object) -> Output:
    flags = [*TASK, *TINY_MOE, *SAMPLING, "--max-epoch", epochs, "--save-dir", folder, *flags]
    return call("train", data, *flags)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Output]:
    """Train for 20 epochs; after only 12, words of another language may still occur."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--save-interval-updates", 40, "--keep-last-epochs", 2, *BLEU]
    return folder, train(data, folder, 20, *flags)


def records(output: Output) -> list[dict[str, float]]:
    """Return the JSON entries without the logged options, which also contain JSON."""
    lines = [line for line in output.text.splitlines() if '_loss": "' in line]
    return Output(0, "\n".join(lines)).records()


def translate(data: Path, path: Path, source: str, target: str, *flags: object) -> Output:
    direction = ["-s", source, "-t", target]
    return call("generate", data, "--path", path, *TASK, *direction, *TRANSLATE, *flags)


def test_the_table_before_training_gives_the_effective_epochs(trained: tuple[Path, Output]):
    text = trained[1].text
    rows = dict(re.findall(r"^  (\w\w-\w\w) +(\d+ +\d+ +[\d.]+% +[\d.]+ +[\d.]+)$", text, re.M))
    assert list(rows) == PAIRS.split(",")
    # There are 240 sentences in all. The square roots of the shares 0.4, 0.4, 0.1 and 0.1 are in
    # the ratio 2:2:1:1, so an epoch uses 80 sentences from each pair with 96, and 40 from each pair
    # with 24. For cc-aa, the option requires 4 x 24 instead. Each of the 20 epochs thus uses 80 +
    # 80 + 40 + 96 = 296 sentences.
    assert rows["aa-bb"].split() == ["96", "80", "27.0%", "0.83", "16.67"]
    assert rows["aa-cc"].split() == ["24", "40", "13.5%", "1.67", "33.33"]
    assert rows["cc-aa"].split() == ["24", "96", "32.4%", "4.00", "80.00"]
    assert text.index("total passes") < text.index('"epoch": 1')


def test_max_update_also_limits_the_effective_epochs(data: Path, tmp_path: Path):
    output = train(data, tmp_path, 50, "--max-update", 10, "--no-save", "--disable-validation")
    # The 296 sentences form 19 batches of at most 16, so 10 updates are 10 / 19 of an epoch.
    assert "epochs of this run: 0.53" in output.text


def test_validation_logs_every_pair(trained: tuple[Path, Output]):
    last = [row for row in records(trained[1]) if "valid_loss" in row][-1]
    tokens = {}
    for pair in PAIRS.split(","):
        assert last[f"valid_{pair}_ppl"] == pytest.approx(2 ** last[f"valid_{pair}_nll_loss"], 0.01)
        assert 0 <= last[f"valid_{pair}_bleu"] <= 100
        # Sentences have 1, 2, ... 5, 1, ... words, and each ends with an end mark.
        size = next(sizes for name, sizes in SIZES.items() if set(name) == set(pair))["valid"]
        tokens[pair] = sum(2 + number % 5 for number in range(size))
    mean = sum(tokens[pair] * last[f"valid_{pair}_nll_loss"] for pair in tokens)
    assert last["valid_nll_loss"] == pytest.approx(mean / sum(tokens.values()), abs=0.01)


def test_validation_logs_the_experts_of_every_language(trained: tuple[Path, Output]):
    last = [row for row in records(trained[1]) if "valid_loss" in row][-1]
    for layer in ("encoder", "decoder"):
        for language in ("aa", "bb", "cc"):
            assert 1 <= last[f"valid_{layer}_{language}_experts"] <= 4
    lines = re.findall(r"^  (\w\w) +[\d.]+ effective experts   (.*)$", trained[1].text, re.M)
    assert [language for language, _ in lines[:6]] == ["aa", "bb", "cc", "bb", "aa", "cc"]
    for _, shares in lines:
        assert sum(map(float, re.findall(r"([\d.]+)%", shares))) == pytest.approx(100, abs=0.3)


def test_only_the_language_token_decides_the_language(data: Path, trained: tuple[Path, Output]):
    flags = [*TASK, *TRANSLATE, "--path", trained[0] / "checkpoint_last.pt", "-s", "aa"]
    for target in ("bb", "cc"):
        spoken = call("interactive", data, *flags, "-t", target, stdin=b"ba de\nki\nde ba ki\n")
        assert spoken.lines("S")[0] == [f"<2{target}> ba de"]
        words = [word for line in spoken.hypotheses() for word in line.split()]
        known = {LANGUAGES[target](word) for word in SOURCE_WORDS}
        assert len(words) >= 3
        assert sum(word in known for word in words) >= 0.8 * len(words)


def test_a_typed_language_token_is_an_unknown_word(data: Path, trained: tuple[Path, Output]):
    flags = [*TASK, *TRANSLATE, "--path", trained[0] / "checkpoint_last.pt", "-s", "aa", "-t", "bb"]
    spoken = call("interactive", data, *flags, stdin=b"<2bb> ba\nba <2cc>\n\n")
    assert [row[0] for _, row in sorted(spoken.lines("S").items())] == [
        "<2bb> <unk> ba",
        "<2bb> ba <unk>",
        "<2bb>",
    ]
    assert spoken.hypotheses()[2] == ""


def test_generate_translates_the_chosen_direction_in_order(
    data: Path, trained: tuple[Path, Output]
):
    output = translate(data, trained[0] / "checkpoint_last.pt", "cc", "aa")
    targets = [row[-1] for _, row in sorted(output.lines("T").items())]
    assert targets == (data.parent / "test.aa-cc.aa").read_text().splitlines()
    assert all(row[-1].startswith("<2aa> ") for row in output.lines("S").values())


def test_a_direction_not_seen_in_training_is_translated(data: Path, trained: tuple[Path, Output]):
    output = translate(data, trained[0] / "checkpoint_last.pt", "bb", "cc")
    assert "the model was not trained on bb-cc" in output.text
    assert len(output.hypotheses()) == SIZES["bb-cc"]["test"]


def test_validate_repeats_the_losses_of_training(data: Path, trained: tuple[Path, Output]):
    last = [row for row in records(trained[1]) if "valid_loss" in row][-1]
    flags = [*TASK, "--path", trained[0] / "checkpoint_last.pt", "--log-format", "json", "--cpu"]
    done = call("validate", data, *flags, "--batch-size", 16, "--num-workers", 0)
    losses = records(done)[-1]
    for pair in PAIRS.split(","):
        assert losses[f"valid_{pair}_nll_loss"] == last[f"valid_{pair}_nll_loss"]


# Validation has 2 + 2 + 1 batches, so the second of two processes has one fewer than the first.
UNEVEN = ["--lang-pairs", "aa-bb,bb-aa,aa-cc", "--batch-size-valid", 6]


def train_on_two(rank: int, data: Path, folder: Path) -> str:
    ranks = ["--distributed-world-size", 2, "--distributed-no-spawn", "--distributed-rank", rank]
    ranks += ["--distributed-init-method", "tcp://unused"]
    flags = [*TASK, *TINY_MOE, *UNEVEN, *BLEU, "--max-epoch", 2, "--save-dir", folder]
    return call("train", data, *flags, *ranks).text


@pytest.mark.timeout(280)
def test_two_processes_validate_every_pair_like_one(data: Path, tmp_path: Path):
    first, _ = run_ranks(train_on_two, 2, data, tmp_path)
    last = [row for row in records(Output(0, first)) if "valid_loss" in row][-1]
    flags = [*TASK, *UNEVEN, "--path", tmp_path / "checkpoint_last.pt", "--log-format", "json"]
    flags += ["--cpu", "--num-workers", 0, "--batch-size", 6]
    losses = records(call("validate", data, *flags))[-1]
    for pair in ("aa-bb", "bb-aa", "aa-cc"):
        assert losses[f"valid_{pair}_nll_loss"] == last[f"valid_{pair}_nll_loss"]
        assert 0 <= last[f"valid_{pair}_bleu"] <= 100
    for language in ("aa", "bb"):
        key = f"valid_encoder_{language}_experts"
        assert losses[key] == last[key]


def test_resumed_training_gives_the_same_bits_as_uninterrupted_training(
    data: Path, trained: tuple[Path, Output], tmp_path: Path
):
    # Epochs have 19 updates, so update 160 is within epoch 9.
    shutil.copy(trained[0] / "checkpoint_9_160.pt", tmp_path / "checkpoint_last.pt")
    train(data, tmp_path, 20, *BLEU)
    one, two = (load(folder / "checkpoint_last.pt") for folder in (trained[0], tmp_path))
    for part in ("model", "last_optimizer_state", "task_state"):
        assert_same_bits(one[part], two[part], part)


def test_the_checkpoint_keeps_languages_tokens_and_symbols(trained: tuple[Path, Output]):
    state = load(trained[0] / "checkpoint_last.pt")["task_state"]
    assert state["languages"] == ["aa", "bb", "cc"]
    assert state["tokens"] == ["<2aa>", "<2bb>", "<2cc>"]
    assert state["symbols"][-3:] == state["tokens"]
    assert ",".join(state["pairs"]) == PAIRS


def test_a_dense_model_learns_too(data: Path, tmp_path: Path):
    flags = [*TASK, *TINY_DENSE, "--max-epoch", 1, "--no-save", "--save-dir", tmp_path]
    rows = call("train", data, *flags).records()
    assert any("valid_aa-cc_ppl" in row for row in rows)
    assert not any("experts" in key for row in rows for key in row)


# Refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lang-pairs", "aa-bb,aa-dd"], "no text of the language 'dd'"),
        (
            ["--lang-pairs", "aa-bb,bb-cc", "--oversampling", ""],
            "'bb-cc' has no valid text",
        ),
        (["--langs", "aa,bb"], "a language of 'aa-cc' must be one of aa, bb, but is 'cc'"),
        (["--oversampling", "bb-cc=2"], "but is 'bb-cc'"),
        (["--sampling-temperature", 0.5], "`--sampling-temperature` must be at least 1.0"),
        (["-s", "aa", "-t", "bb"], "must be left out during training, but name 'aa-bb'"),
    ],
)
def test_impossible_training_options_are_refused_by_name(
    flags: list[object], message: str, data: Path, tmp_path: Path
):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(data, tmp_path, 1, *flags)
    assert not list(tmp_path.glob("*.pt"))


def test_an_empty_pair_is_refused_by_name(data: Path, tmp_path: Path):
    folder = shutil.copytree(data, tmp_path / "data")
    for language in ("aa", "cc"):
        (folder / f"train.aa-cc.{language}.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="the pair 'aa-cc' cannot be used: .* no sentence"):
        train(folder, tmp_path / "model", 1)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ([], "`--source-lang` and `--target-lang` must name the direction"),
        (["-s", "aa"], "`--target-lang` must be one of aa, bb, cc, but is missing"),
        (["-s", "aa", "-t", "dd"], "`--target-lang` must be one of aa, bb, cc, but is 'dd'"),
        (["-s", "dd", "-t", "aa"], "`--source-lang` must be one of aa, bb, cc, but is 'dd'"),
        (["-s", "aa", "-t", "aa"], "must differ, but are both 'aa'"),
        (["-s", "cc", "-t", "bb", "--gen-subset", "valid"], "the pair 'cc-bb' has no valid text"),
        (["-s", "aa", "-t", "bb", "--langs", "bb,aa,cc"], "same order, aa,bb,cc, but name bb,aa"),
        (["-s", "aa", "-t", "bb", "--lang-pairs", "aa-bb"], "aa,bb,cc, but name aa,bb"),
    ],
)
def test_impossible_translation_options_are_refused_by_name(
    direction: list[str], message: str, data: Path, trained: tuple[Path, Output]
):
    flags = [*TASK, *direction, *TRANSLATE, "--path", trained[0] / "checkpoint_last.pt"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call("generate", data, *flags)


def test_a_task_or_direction_that_is_missing_is_named(data: Path, trained: tuple[Path, Output]):
    flags = ["--path", trained[0] / "checkpoint_last.pt", *TRANSLATE, "--batch-size", 8]
    with pytest.raises(ValueError, match="Add --task translation_multilingual_gnmt --langs aa,bb"):
        call("generate", data, *flags, "-s", "aa", "-t", "bb")
    task = ["--task", "translation_multilingual_gnmt", "--langs", "aa,bb,cc"]
    with pytest.raises(ValueError, match="`--source-lang` and `--target-lang` must name the dire"):
        call("generate", data, *flags, *task)


def test_another_dictionary_is_refused_with_the_first_symbol_that_differs(
    data: Path, trained: tuple[Path, Output], tmp_path: Path
):
    folder = shutil.copytree(data, tmp_path / "data")
    for language in ("aa", "bb", "cc"):
        write_dictionary(folder / f"dict.{language}.txt", "bb aa cc")
    with pytest.raises(ValueError, match="symbol 4 is 'ab', not 'ba'"):
        translate(folder, trained[0] / "checkpoint_last.pt", "aa", "bb")


def test_a_checkpoint_of_one_pair_is_refused(data: Path, tmp_path: Path):
    single = ["--task", "translation", "-s", "aa", "-t", "bb", "--max-epoch", 1]
    call("train", data, *single, *TINY_MOE, "--save-dir", tmp_path, "--no-epoch-checkpoints")
    with pytest.raises(ValueError, match="not from a multilingual task"):
        translate(data, tmp_path / "checkpoint_last.pt", "aa", "bb")


def test_a_refusal_is_a_single_message(data: Path, tmp_path: Path):
    flags = ["--user-dir", PLUGIN, *TASK, *TINY_MOE, "--lang-pairs", "aa-bb,aa_cc"]
    done = run("train", data, *flags, cwd=tmp_path)
    assert done.status == 1
    assert "fairseq-train: error: `--lang-pairs` must name pairs such as en-fr" in done.text
    assert "Traceback" not in done.text


def test_batches_of_training_mix_pairs_and_those_of_validation_do_not(data: Path):
    from nmt_moe.tasks.translation_multilingual_gnmt import (
        MultilingualGNMTConfig,
        MultilingualGNMTTask,
    )

    config = MultilingualGNMTConfig(data=str(data), lang_pairs=PAIRS, train_subset="train", seed=1)
    config.required_seq_len_multiple, config.dataset_impl = 1, None
    config.max_epoch, config.max_update, config.update_freq = 1, 0, [1]
    task = MultilingualGNMTTask.setup_task(config)
    for split, mixes in (("train", True), ("valid", False)):
        task.load_dataset(split)
        dataset = task.dataset(split)
        iterator = task.get_batch_iterator(dataset, max_sentences=16)
        batches = [dataset.pair_of(batch) for batch in iterator.frozen_batches]
        assert any(len(set(batch.tolist())) > 1 for batch in batches) == mixes
        assert sum(map(len, batches)) == len(dataset)
        for sample in iterator.next_epoch_itr(shuffle=False):
            first = sample["net_input"]["src_tokens"]
            starts = first.masked_fill(first == 1, 10**6).ne(10**6).float().argmax(1)
            tokens = first[torch.arange(len(first)), starts].tolist()
            targets = [dataset.pairs[i].split("-")[1] for i in dataset.pair_of(sample["id"])]
            assert tokens == [task._token_of(language) for language in targets]
