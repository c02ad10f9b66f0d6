"""Write the model card of a bundle."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nmt_moe import __version__
from nmt_moe.inference.bundle import BundleConfig
from nmt_moe.text.digests import compute_sha256
from nmt_moe.text.vocabulary import Vocabulary

# Groups of a checkpoint's configuration that hold the options of one registered class, with the
# option that names the class.
CLASSES = {
    "task": "task",
    "model": "arch",
    "criterion": "criterion",
    "optimizer": "optimizer",
    "lr_scheduler": "lr-scheduler",
}
# Other options that affect training. Only these options of tasks are shown, because the
# others include flags that turn off a default, which a list of values cannot express.
GENERAL = {
    "task": (
        "source_lang",
        "target_lang",
        "lang_pairs",
        "langs",
        "sampling_temperature",
        "oversampling",
        "sample_break_mode",
        "tokens_per_sample",
    ),
    "common": ("seed", "fp16", "bf16"),
    "dataset": ("max_tokens", "batch_size"),
    "optimization": ("max_epoch", "max_update", "clip_norm", "update_freq", "lr"),
}


@dataclass(frozen=True)
class Origin:
    """The checkpoint, data and scores that a bundle is made from.

    Attributes:
        checkpoint: Path of the checkpoint.
        data: Folder of binarised data.
        state: Contents of the checkpoint.
        scores: Text about the model's quality, such as sacrebleu's output with signatures.
    """

    checkpoint: Path
    data: Path
    state: Mapping[str, Any]
    scores: str


def write_card(config: BundleConfig, origin: Origin, vocabularies: Mapping[str, Vocabulary]) -> str:
    """Return the text of `README.md`."""
    rows = [
        ("architecture", f"`{config.architecture}`"),
        ("weights", config.dtype),
        ("languages", ", ".join(config.languages) or "not named"),
        ("trained directions", ", ".join(config.directions)),
        ("symbols", ", ".join(f"{side} {len(own)}" for side, own in vocabularies.items())),
        ("updates", str(_count_updates(origin.state))),
        ("seed", str(_option(origin.state, "common", "seed"))),
        ("checkpoint", f"`{origin.checkpoint.name}`, sha256 `{compute_sha256(origin.checkpoint)}`"),
        (
            "exported with",
            f"nmt_moe {__version__}{_commit()}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
        ),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    data = "\n".join(f"| `{name}` | {size} | `{digest}` |" for name, size, digest in _files(origin))
    network = json.dumps(asdict(config.network), indent=2)
    title = " to ".join(config.languages) if not config.directions else ", ".join(config.languages)
    command = (
        "nmt-moe translate FOLDER < text.in > text.out"
        if config.kind == "translation"
        else "from nmt_moe import LanguageModel; LanguageModel.load('FOLDER').score('A line.')"
    )
    return f"""# {config.kind.replace("_", " ").capitalize()}{": " if title else ""}{title}

A model with mixture-of-experts layers, trained with nmt_moe
(Shazeer et al. 2017, [arXiv 1701.06538](https://arxiv.org/abs/1701.06538)).

```
{command}
```

| | |
|---|---|
{table}

## Scores

{origin.scores.strip() or "No scores were given with `nmt-moe export --scores`."}

## Data

Files of the folder `{origin.data.resolve().name}`:

| file | bytes | sha256 |
|---|--:|---|
{data}

## Training command

From the configuration in the checkpoint:

```bash
{_command(origin)}
```

## Network

```json
{network}
```
"""


def _count_updates(state: Mapping[str, Any]) -> Any:
    history = state.get("optimizer_history") or [{}]
    return history[-1].get("num_updates", "unknown")


def _group(state: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    cfg = state.get("cfg")
    options = cfg.get(group) if isinstance(cfg, Mapping) else None
    if options is None or isinstance(options, Mapping):
        return options or {}
    return vars(options)


def _option(state: Mapping[str, Any], group: str, name: str) -> Any:
    return _group(state, group).get(name, "unknown")


def _files(origin: Origin) -> list[tuple[str, int, str]]:
    paths = sorted(path for path in origin.data.iterdir() if path.suffix in (".txt", ".bin"))
    return [(path.name, path.stat().st_size, compute_sha256(path)) for path in paths]


def _command(origin: Origin) -> str:
    words = ["fairseq-train", origin.data.resolve().name, "--user-dir", "nmt_moe"]
    for group, option in CLASSES.items():
        options = _group(origin.state, group)
        if options.get("_name"):
            words += [f"--{option}", str(options["_name"])]
        hidden = {"_name", "data", "seed", "max_epoch", "max_update", "update_freq", "lr"}
        if group != "task":
            words += _flags({name: v for name, v in options.items() if name not in hidden})
    for group, names in GENERAL.items():
        options = _group(origin.state, group)
        words += _flags({name: options[name] for name in names if name in options})
    return shlex.join(words)


def _flags(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            if value:
                words += [flag, ",".join(map(str, value))]
        elif isinstance(value, str | int | float) and value is not False and value != "":
            words += [flag, str(value)]
    return words


def _commit() -> str:
    """Return the commit of the code if it runs from a git clone."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", commit {found.stdout.strip()}"
