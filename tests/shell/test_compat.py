"""Each repair of fairseq has its test here: with fairseq's own models, through its own commands."""

import argparse
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.data import data_utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig
from fairseq.dataclass.configs import CommonConfig, DistributedTrainingConfig
from fairseq.distributed import utils as distributed_utils
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigIndexError, MissingMandatoryValue, ValidationError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from nmt_moe import compat, trainer
from nmt_moe.compat import interactive
from nmt_moe.compat.errors import (
    end_in_one_message,
    explain,
    is_fairseq_command,
    leave_for_torchrun,
)
from nmt_moe.compat.precision import fix_flags
from nmt_moe.compat.processes import TORCHRUN
from tests.support import programs

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = [
    "--arch=lstm",
    "--encoder-embed-dim=8",
    "--encoder-hidden-size=8",
    "--decoder-embed-dim=8",
    "--decoder-hidden-size=8",
    "--decoder-out-embed-dim=8",
]
TRAINING = ["--optimizer=adam", "--lr=0.01", "--max-tokens=100", "--num-workers=0", "--cpu"]
LOG = ["--log-format=json", "--log-interval=1"]


def run_here(monkeypatch, command: str, *arguments: str) -> None:
    """Run a command of fairseq in this process, which saves the seconds of its import."""
    module = importlib.import_module(f"fairseq_cli.{command}")
    monkeypatch.setattr(sys, "argv", [f"fairseq-{command}", *arguments])
    module.cli_main()


def run_apart(folder: Path, *arguments: str, stdin: bytes = b"") -> SimpleNamespace:
    """Run `python -m ARGUMENTS` in the folder, with a plugin that does nothing but repair."""
    plugin = folder / "repairs"
    plugin.mkdir(exist_ok=True)
    (plugin / "__init__.py").write_text("import nmt_moe.compat, nmt_moe.trainer\n")
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    environment.update(PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")
    environment["PYTHON_EXEC"] = str(programs.python())  # with which torchrun starts ranks
    result = subprocess.run(
        [programs.python(), "-m", *arguments, "--user-dir", "repairs"],
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
    )
    return SimpleNamespace(
        returncode=result.returncode, stdout=result.stdout.decode(), stderr=result.stderr.decode()
    )


def training(folder: Path, save_dir: str, updates: int, *arguments: str) -> list[str]:
    """Return the arguments of a training of so many updates in all."""
    places = [str(folder / "bin"), "-s", "aa", "-t", "bb", f"--save-dir={folder / save_dir}"]
    return [*places, *MODEL, *TRAINING, f"--max-update={updates}", *arguments]


def count_updates(folder: Path, save_dir: str) -> int:
    state = checkpoint_utils.load_checkpoint_to_cpu(str(folder / save_dir / "checkpoint_last.pt"))
    return state["optimizer_history"][-1]["num_updates"]


def write_data(monkeypatch, folder: Path, name: str, count: int = 30) -> None:
    """Preprocess a corpus whose second side is the first in capitals."""
    text = folder / f"text-{name}"
    text.mkdir()
    for split, length in [("train", count), ("valid", 6)]:
        lines = [" ".join("abcdef"[: 2 + i % 5]) for i in range(length)]
        (text / f"{split}.aa").write_text("\n".join(lines) + "\n")
        (text / f"{split}.bb").write_text("\n".join(lines).upper() + "\n")
    arguments = ["-s", "aa", "-t", "bb", f"--trainpref={text}/train", f"--validpref={text}/valid"]
    run_here(monkeypatch, "preprocess", *arguments, f"--destdir={folder / name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a binarised corpus and a model of two updates."""
    folder = tmp_path_factory.mktemp("compat")
    with pytest.MonkeyPatch.context() as monkeypatch:
        write_data(monkeypatch, folder, "bin")
        run_here(monkeypatch, "train", *training(folder, "models", 2))
    return folder


def make_task(data: Path) -> tasks.FairseqTask:
    names = {"source_lang": "aa", "target_lang": "bb", "dataset_impl": "mmap"}
    return tasks.setup_task(argparse.Namespace(task="translation", data=str(data), **names))


def load_with_fairseq(folder: Path, name: str, data: str = "bin") -> None:
    """Build the model of a checkpoint as fairseq-generate does."""
    task = make_task(folder / data)
    checkpoint_utils.load_model_ensemble_and_task([str(folder / name)], task=task)


# All


def host() -> dict[tuple[str, ...], int]:
    """Return the identity of each name in fairseq's modules and classes, and of Python's hook."""
    names: dict[tuple[str, ...], int] = {("hook",): id(sys.excepthook)}
    for module in [m for name, m in sys.modules.items() if name.startswith("fairseq")]:
        for name, value in vars(module).items():
            names[module.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__ == module.__name__:
                names |= {(module.__name__, name, k): id(v) for k, v in vars(value).items()}
    return names


REPAIRS = [*compat.REPAIRS, trainer.install]


@pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: repair.__name__)
def test_repairing_twice_repairs_once(repair):
    before, types = host(), set(torch.serialization.get_safe_globals())
    repair()
    assert host() == before
    assert set(torch.serialization.get_safe_globals()) == types


# Checkpoints


def test_a_checkpoint_of_fairseq_loads_under_the_safe_loader(folder):
    load_with_fairseq(folder, "models/checkpoint_last.pt")


def damage(folder: Path, kind: str) -> str:
    """Write a damaged checkpoint; return its name."""
    whole = (folder / "models/checkpoint_last.pt").read_bytes()
    middle = len(whole) // 2
    contents = {
        "truncated": whole[:middle],
        "changed": whole[:middle] + b"changed" * 9 + whole[middle + 63 :],
        "empty": b"",
        "text": b"not a checkpoint\n",
    }
    (folder / f"{kind}.pt").write_bytes(contents[kind])
    return f"{kind}.pt"


@pytest.mark.parametrize("kind", ["truncated", "changed", "empty", "text"])
def test_a_damaged_checkpoint_is_named(folder, kind):
    name = damage(folder, kind)
    with pytest.raises(ValueError, match=rf"{name}` \(\d+ bytes\) is not a whole fairseq checkp"):
        load_with_fairseq(folder, name)


def test_a_torch_file_that_is_no_checkpoint_is_named(folder):
    torch.save({"weights": torch.ones(3)}, folder / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: has no `model`"):
        load_with_fairseq(folder, "other.pt")


def test_a_checkpoint_that_would_run_code_is_refused(folder):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "sprung"),)

    torch.save({"cfg": Trap()}, folder / "trap.pt")
    with pytest.raises(ValueError, match=r"trap\.pt` holds a Python object .* could run code"):
        load_with_fairseq(folder, "trap.pt")
    assert not (folder / "sprung").exists()


def test_a_missing_checkpoint_keeps_its_own_message(folder):
    with pytest.raises(OSError, match=r"none\.pt: no such file|Model file not found: .*none\.pt"):
        load_with_fairseq(folder, "none.pt")


def test_a_checkpoint_of_an_unknown_model_asks_for_its_plugin(folder):
    state = torch.load(folder / "models/checkpoint_last.pt", weights_only=False)
    state["cfg"]["model"] = {"_name": "of_another_plugin"}
    torch.save(state, folder / "unknown.pt")
    with pytest.raises(ValueError, match=r"the model `of_another_plugin`, .*Add the --user-dir"):
        load_with_fairseq(folder, "unknown.pt")


def test_a_dictionary_that_does_not_fit_is_named_as_the_reason(folder):
    words = (folder / "bin/dict.aa.txt").read_text().splitlines(keepends=True)
    few = folder / "few"
    few.mkdir()
    (few / "dict.aa.txt").write_text("".join(words[:2]))
    (few / "dict.bb.txt").write_text("".join(words))
    message = r"encoder\.embed_tokens\.weight is \(\d+, 8\), not \(\d+, 8\).* other dictionaries"
    with pytest.raises(ValueError, match=message):
        load_with_fairseq(folder, "models/checkpoint_last.pt", data="few")


# One message instead of a traceback


def test_resuming_from_a_truncated_checkpoint_ends_in_one_message(folder):
    name = damage(folder, "truncated")
    arguments = training(folder, "resumed", 3, f"--restore-file={name}")
    result = run_apart(folder, "fairseq_cli.train", *arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"fairseq-train: error: `{name}`" in result.stderr
    assert not list((folder / "resumed").glob("*.pt"))


def raised(error: Exception, module: str) -> Exception:
    """Return the error as one that a function of `module` raised."""
    try:
        exec("raise error", {"__name__": module, "error": error})
    except Exception as caught:
        return caught
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "module", "message"),
    [
        (ValueError("k > n"), "nmt_moe.moe.config", "k > n"),
        (ValueError("a bug"), "fairseq.trainer", None),
        (FloatingPointError("loss is NaN"), "nmt_moe.criterions", "loss is NaN"),
        (OSError("no such file"), "fairseq.data", "no such file"),
        (
            FileExistsError("bin/dict.txt"),
            "fairseq_cli.preprocess",
            "`bin/dict.txt` is there already. Remove it, or name another folder.",
        ),
        (
            FileExistsError(17, "File exists", "bin"),
            "fairseq_cli.preprocess",
            "[Errno 17] File exists: 'bin'",
        ),
        (Exception("Sample #3 is invalid"), "fairseq.tasks", "Sample #3 is invalid"),
        (Exception("a bug"), "somewhere", None),
        (
            RuntimeError("sendBytes failed: Broken pipe"),
            "torch.distributed",
            "another process of this training has ended; its own message says why",
        ),
        (AssertionError("ours"), "nmt_moe.moe", None),
        (ValueError(), "nmt_moe.moe", None),
    ],
)
def test_errors_of_the_user_are_explained_and_others_are_not(error, module, message):
    assert explain(raised(error, module)) == message


def test_an_option_that_its_group_needs_is_named():
    config = OmegaConf.structured(SentencepieceConfig())
    with pytest.raises(MissingMandatoryValue) as caught:
        config.sentencepiece_model  # noqa: B018
    assert explain(caught.value) == "`--sentencepiece-model` must be given."
    with pytest.raises(ValidationError) as caught:
        config.sentencepiece_alpha = "x"
    with pytest.raises(ConfigIndexError) as index:
        OmegaConf.create({"lr": []}).lr[0]  # noqa: B018
    assert "option `lr[0]` cannot be used: list index out of range" in explain(index.value)
    error = ConfigCompositionException("Error merging override bpe.sentencepiece_alpha=x")
    error.__cause__ = caught.value
    assert "sentencepiece_alpha=x: Value 'x' of type 'str' could not" in explain(error)


def test_torchruns_report_ends_with_the_message(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    leave_for_torchrun("`--lr` must be a number")
    failure = ProcessFailure(0, 7, 1, str(tmp_path / "error.json"))
    report = ChildFailedError("train", {0: failure}).format_msg()
    assert "traceback : `--lr` must be a number" in report


def test_a_misspelt_override_is_warned_of(caplog):
    cfg = OmegaConf.create({"model": {"_name": "lstm", "dropout": 0.1}})
    compat.checkpoints._warn_of_unknown_settings(cfg, {"dropout": 0.2, "dorpout": 0.2})
    assert [record.args for record in caplog.records] == [("dorpout",)]


def test_only_commands_of_fairseq_lose_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/some-program"])
    hook = sys.excepthook
    end_in_one_message()
    assert sys.excepthook is hook
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fairseq-train"])
    assert is_fairseq_command()


# Corpora


def test_sides_of_different_length_are_named(folder, monkeypatch):
    write_data(monkeypatch, folder, "uneven")
    write_data(monkeypatch, folder, "shorter", count=28)
    for file in (folder / "shorter").glob("train.aa-bb.bb.*"):
        shutil.copy(file, folder / "uneven")
    task = make_task(folder / "uneven")
    with pytest.raises(ValueError, match=r"uneven/train\.aa-bb\.\*` must have the same number"):
        task.load_dataset("train")


@pytest.mark.parametrize("count", [1, 7, 8, 20])
@pytest.mark.parametrize("limit", [{"max_sentences": 4}, {"max_tokens": 100}])
def test_the_last_batch_is_not_dropped(count, limit):
    batches = data_utils.batch_by_size(
        np.arange(count), lambda _: 5, required_batch_size_multiple=8, **limit
    )
    assert np.concatenate(batches).tolist() == list(range(count))
    assert all(len(batch) <= 4 for batch in batches) or "max_tokens" in limit


# Precision


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_half_precision_trains_and_resumes_on_cpu(folder, monkeypatch, flag):
    save_dir = f"half{flag}"
    run_here(monkeypatch, "train", *training(folder, save_dir, 2, flag))
    assert count_updates(folder, save_dir) == 2
    run_here(monkeypatch, "train", *training(folder, save_dir, 4, flag))
    assert count_updates(folder, save_dir) == 4


def test_fp16_and_bf16_together_are_refused(folder, monkeypatch):
    with pytest.raises(ValueError, match="`--fp16` and `--bf16` .* exclude each other"):
        run_here(monkeypatch, "train", *training(folder, "both", 2, "--fp16", "--bf16"))


def test_bf16_is_no_tpu_unless_there_is_xla(monkeypatch):
    args = argparse.Namespace(bf16=True, tpu=True)
    monkeypatch.setattr(distributed_utils, "xm", object())
    fix_flags(args)
    assert args.tpu
    monkeypatch.setattr(distributed_utils, "xm", None)
    fix_flags(args)
    assert not args.tpu


# Processes


def make_config(world_size: int = 1, **fields):
    """Return the part of fairseq's configuration that says which processes there are."""
    plan = DistributedTrainingConfig(distributed_world_size=world_size, **fields)
    parts = {"common": CommonConfig(cpu=True), "distributed_training": plan}
    return OmegaConf.create({name: OmegaConf.structured(part) for name, part in parts.items()})


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def alone(monkeypatch, no_gpu):
    for name in [*TORCHRUN, "SLURM_JOB_ID"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def under_torchrun(monkeypatch, no_gpu):
    for name, value in zip(TORCHRUN, ["localhost", "29500", "2", "1"], strict=True):
        monkeypatch.setenv(name, value)


def fix(cfg):
    """Return a configuration as commands get it."""
    distributed_utils.call_main(cfg, lambda cfg: None)
    return cfg


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("init_method", [None, "tcp://localhost:12345"])
def test_processes_that_would_never_start_are_refused(init_method):
    with pytest.raises(ValueError, match="nothing would be trained.*torchrun --nproc-per-node 2"):
        fix(make_config(2, distributed_init_method=init_method))


@pytest.mark.usefixtures("alone")
def test_one_process_is_left_alone():
    assert fix(make_config()) == make_config()


@pytest.mark.usefixtures("alone")
def test_processes_started_by_hand_get_what_works_on_cpu(monkeypatch):
    monkeypatch.setattr(distributed_utils, "distributed_main", lambda *_: None)
    address = "tcp://localhost:12345"
    cfg = fix(make_config(2, distributed_no_spawn=True, distributed_init_method=address))
    assert cfg.distributed_training.distributed_backend == "gloo"
    assert cfg.distributed_training.ddp_backend == "legacy_ddp"


@pytest.mark.usefixtures("under_torchrun")
def test_the_world_size_of_torchrun_is_taken(monkeypatch):
    monkeypatch.setattr(distributed_utils, "distributed_main", lambda *_: None)
    assert fix(make_config()).distributed_training.distributed_world_size == 2


@pytest.mark.usefixtures("under_torchrun")
def test_the_rank_of_torchrun_needs_no_device():
    plan = make_config(2).distributed_training
    distributed_utils._infer_torch_distributed_launch_init(plan)
    assert (plan.distributed_rank, plan.distributed_world_size, plan.device_id) == (1, 2, 0)
    assert plan.distributed_no_spawn


def test_two_processes_of_torchrun_resume_one_model(folder):
    shutil.copytree(folder / "models", folder / "two")
    runner = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = training(folder, "two", 3, *LOG)
    result = run_apart(folder, *runner, "fairseq_cli.train", *arguments)
    assert result.returncode == 0, result.stderr
    assert "training on 2 devices" in result.stdout
    assert "@ 2 updates)" in result.stdout
    # Two runs of one process each would both log the update; two ranks of one run log it once.
    lines = [line for line in result.stdout.splitlines() if "| train_inner |" in line]
    assert [json.loads(line.split(" | ")[-1])["num_updates"] for line in lines] == ["3"]


# fairseq-interactive


def test_a_bad_line_gets_a_message_and_all_others_their_translation(folder):
    lines = [b"a b c", b"", b"d \xff e", b"a " * 5000, "a \u00e9".encode(), b"f f"]
    result = run_apart(
        folder,
        "fairseq_cli.interactive",
        *["bin", "-s", "aa", "-t", "bb", "--path=models/checkpoint_last.pt", "--cpu"],
        *["--buffer-size=4", "--batch-size=2"],
        stdin=b"\n".join(lines) + b"\n",
    )
    assert result.returncode == 0, result.stderr
    output = [line.split("\t") for line in result.stdout.splitlines()]
    assert [fields[0] for fields in output if fields[0][:2] == "H-"] == ["H-0", "H-1", "H-4", "H-5"]
    sources = {fields[0]: fields[1] for fields in output if fields[0][:2] == "S-"}
    assert sources == {"S-0": "a b c", "S-1": "", "S-4": "a <unk>", "S-5": "f f"}
    for message in [
        "line 2 is empty, and so is its translation",
        "line 3 is not valid UTF-8 (byte 0xff at position 3): not translated",
        "line 4 has 5001 tokens, more than the 1024 allowed: not translated",
        "line 5 has tokens that are not in the dictionary: 1 of 3",
    ]:
        assert f"fairseq-interactive: {message}" in result.stderr


def test_lines_are_read_in_buffers_that_know_their_numbers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\r\nb\n\xe9\nd")))
    buffers = list(interactive.buffered_read("-", 2))
    assert buffers == [["a", "b"], [None, "d"]]
    assert [buffer.first_number for buffer in buffers] == [1, 3]
    assert "line 3 is not valid UTF-8 (byte 0xe9 at position 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("max_positions", "max_tokens", "longest"),
    [
        pytest.param((1024, 512), None, 1024, id="of-the-pair-the-source"),
        pytest.param((1024, 512), 100, 100, id="no-batch-would-hold-it"),
        pytest.param({"a-b": (64, 32), "b-c": (128, 8)}, None, 64, id="the-strictest-pair"),
        pytest.param(None, None, float("inf"), id="no-limit"),
    ],
)
def test_the_longest_line_is_what_model_and_batch_take(max_positions, max_tokens, longest):
    assert interactive.longest_source(max_positions, max_tokens) == longest
