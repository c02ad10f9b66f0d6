"""fairseq's own LSTM, and commands that apply only the repairs, to test the repairs alone."""

import argparse
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

from fairseq import checkpoint_utils, tasks

from nmt_moe.compat.processes import TORCHRUN
from tests.support import programs
from tests.support.commands import REPOSITORY, call

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


def run_apart(folder: Path, *arguments: str, stdin: bytes = b"") -> SimpleNamespace:
    """Run `python -m ARGUMENTS` in the folder, with a plugin that only applies the repairs."""
    plugin = folder / "repairs"
    plugin.mkdir(exist_ok=True)
    (plugin / "__init__.py").write_text("import nmt_moe.compat, nmt_moe.trainer\n")
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    environment.update(PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")
    environment["PYTHON_EXEC"] = str(programs.python())  # torchrun starts ranks with this program
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
    """Return the arguments of a training run with the given total number of updates."""
    folders = [str(folder / "bin"), "-s", "aa", "-t", "bb", f"--save-dir={folder / save_dir}"]
    return [*folders, *MODEL, *TRAINING, f"--max-update={updates}", *arguments]


def count_updates(folder: Path, save_dir: str) -> int:
    state = checkpoint_utils.load_checkpoint_to_cpu(str(folder / save_dir / "checkpoint_last.pt"))
    return state["optimizer_history"][-1]["num_updates"]


def write_data(folder: Path, name: str, count: int = 30) -> None:
    """Preprocess a corpus whose target sentences are the source sentences in capitals."""
    text = folder / f"text-{name}"
    text.mkdir()
    for split, length in [("train", count), ("valid", 6)]:
        lines = [" ".join("abcdef"[: 2 + i % 5]) for i in range(length)]
        (text / f"{split}.aa").write_text("\n".join(lines) + "\n")
        (text / f"{split}.bb").write_text("\n".join(lines).upper() + "\n")
    arguments = ["-s", "aa", "-t", "bb", f"--trainpref={text}/train", f"--validpref={text}/valid"]
    call("preprocess", *arguments, f"--destdir={folder / name}")


def make_task(data: Path) -> tasks.FairseqTask:
    names = {"source_lang": "aa", "target_lang": "bb", "dataset_impl": "mmap"}
    return tasks.setup_task(argparse.Namespace(task="translation", data=str(data), **names))


def load_with_fairseq(folder: Path, name: str, data: str = "bin") -> None:
    """Build the model of a checkpoint as fairseq-generate does."""
    task = make_task(folder / data)
    checkpoint_utils.load_model_ensemble_and_task([str(folder / name)], task=task)


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
