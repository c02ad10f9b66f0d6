"""Tiny checkpoints in fairseq's format, made without fairseq, and bundles exported from them."""

import hashlib
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmt_moe.inference import Description, Pieces, export
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, GNMTDecoder, GNMTEncoder, LSTMLanguageModel, LSTMLMConfig
from nmt_moe.text import pieces
from nmt_moe.text.vocabulary import read_symbols

MOE = MoEConfig(model_dim=16, hidden_dim=24, num_experts=6, top_k=2)
GNMT = GNMTConfig(model_dim=16, lstm_hidden_dim=24, init_range=0.5, moe=MOE)
LM = LSTMLMConfig(model_dim=16, lstm_hidden_dim=24, init_range=0.5, moe=MOE)
WORDS = ["the", "a", "cat", "dog", "house", "tree", "runs", "sees", "big", "red", "under", "with"]


def write_text(path: Path, num_lines: int = 400) -> Path:
    """Write sentences that are easy to split into pieces."""
    chance = random.Random(1)
    lines = [" ".join(chance.choices(WORDS, k=chance.randint(1, 8))) for _ in range(num_lines)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def make_data(folder: Path, *languages: str) -> tuple[Path, Path]:
    """Write dictionaries as fairseq-preprocess does, and the model of their pieces.

    Returns:
        The folder `data`, and the sentencepiece model.
    """
    data, model = folder / "data", folder / "spm.model"
    data.mkdir(parents=True)
    names = [f"dict.{language}.txt" for language in languages] or ["dict.txt"]
    pieces.train([write_text(folder / "text")], model, data / names[0], 30)
    for name in names[1:]:
        (data / name).write_text((data / names[0]).read_text())
    return data, model


def randomise(network: nn.Module, seed: int) -> None:
    """Draw weights that make choices, attention and predictions far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        scale = 2.0 if "gate_weight" in name or "scale" in name else 0.5
        if "threshold" in name:
            parameter.data.uniform_(0.05, 0.3, generator=generator)
        else:
            parameter.data.uniform_(-scale, scale, generator=generator)


def make_networks(
    config: GNMTConfig | LSTMLMConfig, num_symbols: int, seed: int = 1
) -> dict[str, nn.Module]:
    """Build the networks of a checkpoint with random weights, in evaluation mode."""
    dim = config.model_dim
    embeddings = [nn.Embedding(num_symbols, dim) for _ in range(2)]
    if isinstance(config, GNMTConfig):
        modules: dict[str, nn.Module] = {
            "encoder": GNMTEncoder(config, embeddings[0]),
            "decoder": GNMTDecoder(config, embeddings[1]),
        }
    else:
        modules = {"decoder": LSTMLanguageModel(config, embeddings[1])}
    modules["output"] = nn.Linear(dim, num_symbols, bias=False)
    for number, module in enumerate(modules.values()):
        randomise(module.eval(), 10 * seed + number)
    weight: Any = modules["output"].weight.data
    # An MoE layer adds a sigmoid, which is always positive but must not favour any symbol.
    weight -= weight.mean(dim=1, keepdim=True)
    weight *= 2
    return modules


def make_state(
    config: GNMTConfig | LSTMLMConfig,
    networks: dict[str, nn.Module],
    symbols: list[str],
    task: dict[str, Any],
    task_state: dict[str, Any],
) -> dict[str, Any]:
    """Return a checkpoint's contents."""
    model: dict[str, Tensor] = {}
    number = int.from_bytes(
        hashlib.sha256("\n".join(symbols).encode()).digest()[:8], "little", signed=True
    )
    for side in ("encoder", "decoder"):
        if side in networks:
            values = networks[side].state_dict()
            model |= {f"{side}.network.{name}": value for name, value in values.items()}
            model[f"{side}.dictionary_check.digest"] = torch.tensor(number)
    model["decoder.output.weight"] = networks["output"].state_dict()["weight"]
    options = {**asdict(config), **({} if config.moe is None else asdict(config.moe))}
    options["dense"] = options.pop("moe") is None
    name = "lstm_moe_gnmt" if isinstance(config, GNMTConfig) else "lstm_moe_lm"
    return {
        "cfg": {
            "common": {"seed": 7},
            "model": {"_name": name, "share_decoder_input_output_embed": False, **options},
            "task": task,
        },
        "model": model,
        "task_state": task_state,
        "optimizer_history": [{"num_updates": 3}],
    }


def make_checkpoint(
    folder: Path, config: GNMTConfig | LSTMLMConfig = GNMT, seed: int = 1, languages: str = ""
) -> tuple[Path, Path, Path, dict[str, nn.Module]]:
    """Write a checkpoint and its training data.

    Args:
        folder: The folder to write to.
        config: The sizes of the network.
        seed: The seed of the weights.
        languages: The languages of a multilingual model, such as "aa bb".

    Returns:
        The checkpoint, the data, the sentencepiece model, and the networks.
    """
    names = languages.split() or (["aa", "bb"] if isinstance(config, GNMTConfig) else [])
    data, model = make_data(folder, *names)
    symbols = read_symbols(data / (f"dict.{names[0]}.txt" if names else "dict.txt"))
    task_state = {}
    if languages:
        symbols = symbols + [f"<2{name}>" for name in names]
        pairs = [f"{one}-{other}" for one in names for other in names if one != other]
        task_state = {"languages": names, "tokens": [], "symbols": symbols, "pairs": pairs}
    networks = make_networks(config, len(symbols), seed)
    task = {"_name": "translation", "source_lang": "aa", "target_lang": "bb"}
    path = folder / "checkpoint.pt"
    torch.save(make_state(config, networks, symbols, task, task_state), path)
    return path, data, model, networks


def make_bundle(
    folder: Path,
    config: GNMTConfig | LSTMLMConfig = GNMT,
    dtype: str = "float32",
    seed: int = 1,
    languages: str = "",
    description: Description | None = None,
) -> tuple[Path, dict[str, nn.Module]]:
    """Write a checkpoint and export it; return the bundle and the networks."""
    path, data, model, networks = make_checkpoint(folder, config, seed, languages)
    output = folder / f"bundle-{dtype}"
    export(path, data, Pieces(model), output, dtype, description)
    return output, networks
