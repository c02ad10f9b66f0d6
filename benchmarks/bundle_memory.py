"""Show how much of a bundle is in memory after opening it, after one sentence and after many.

    python -m benchmarks.bundle_memory --experts 512 --sentences 3000 --dtype float32

The model has random weights, so a sentence uses far more experts than it would in a trained model
and needs almost as much memory as a sentence can ever need. Each row of the table is measured in a
separate process. It shows the resident size of the whole process and the resident size of the
bundle's mapped files, which the system can drop at any time.
"""

import random
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click
import torch
from torch import nn

from nmt_moe.inference import Pieces, Translator, export
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, GNMTDecoder, GNMTEncoder

WORDS = [f"w{number}" for number in range(4000)]


def write_bundle(folder: Path, config: GNMTConfig, dtype: str) -> Path:
    """Export a model with random weights and a vocabulary of whole words."""
    torch.manual_seed(1)
    data = folder / "data"
    data.mkdir()
    for language in ("aa", "bb"):
        (data / f"dict.{language}.txt").write_text("".join(f"{word} 1\n" for word in WORDS))
    size, dim = len(WORDS) + 4, config.model_dim
    modules: dict[str, nn.Module] = {
        "encoder": GNMTEncoder(config, nn.Embedding(size, dim)),
        "decoder": GNMTDecoder(config, nn.Embedding(size, dim)),
    }
    model = {"decoder.output.weight": torch.randn(size, dim)}
    for side, module in modules.items():
        for name, value in module.state_dict().items():
            drawn = torch.randn_like(value) if "gate_weight" in name else value
            model[f"{side}.network.{name}"] = drawn
    assert config.moe is not None
    options = {"_name": "lstm_moe_gnmt", **asdict(config), **asdict(config.moe), "dense": False}
    task = {"_name": "translation", "source_lang": "aa", "target_lang": "bb"}
    path = folder / "checkpoint.pt"
    torch.save({"cfg": {"model": options, "task": task}, "model": model}, path)
    del model, modules
    export(path, data, Pieces(), folder / "bundle", dtype)
    path.unlink()
    return folder / "bundle"


def resident(folder: Path) -> tuple[float, float]:
    """Return the resident size of this process and of a folder's mapped files, in MB."""
    status = Path("/proc/self/status").read_text().splitlines()
    total = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
    files, is_own = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the first line of a mapping
            is_own = words[-1].startswith(str(folder))
        elif words[0] == "Rss:" and is_own:
            files += int(words[1])
    return total / 1e3, files / 1e3


def measure(folder: Path, num_sentences: int) -> None:
    """Load a bundle, translate `num_sentences` sentences, and print the memory in use."""
    torch.manual_seed(1)
    chance = random.Random(1)
    lines = [" ".join(chance.choices(WORDS, k=chance.randint(8, 16))) for _ in range(num_sentences)]
    translator = Translator.load(folder)
    # Random models do not end sentences by themselves.
    translator.defaults = type(translator.defaults)(beam_size=5, max_len_a=1.0, max_len_b=1)
    if lines:
        translator.translate(lines)
    print(*resident(folder.resolve()))


@click.command(context_settings={"show_default": True})
@click.option("--experts", default=512, help="Experts per layer.")
@click.option("--model-dim", default=256)
@click.option("--hidden-dim", default=1024, help="Hidden width of an expert.")
@click.option("--top-k", default=2)
@click.option("--sentences", default=3000)
@click.option("--dtype", default="float32")
@click.option("--bundle", type=click.Path(path_type=Path), hidden=True)
def main(
    experts: int,
    model_dim: int,
    hidden_dim: int,
    top_k: int,
    sentences: int,
    dtype: str,
    bundle: Path | None,
) -> None:
    """Write a bundle with random weights, and print how much of it is read into memory."""
    if bundle is not None:
        measure(bundle, sentences)
        return
    moe = MoEConfig(model_dim, hidden_dim, experts, top_k)
    config = GNMTConfig(model_dim, model_dim, attention_wiring="parallel", moe=moe)
    with tempfile.TemporaryDirectory() as folder:
        path = write_bundle(Path(folder), config, dtype)
        on_disk = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        print(f"bundle with 2 layers of {experts} experts, {dtype}: {on_disk:.0f} MB of files\n")
        print("| after | resident, MB | resident files, MB | share of the files |")
        print("|---|--:|--:|--:|")
        for name, count in (
            ("opening", 0),
            ("1 sentence", 1),
            (f"{sentences} sentences", sentences),
        ):
            command = [sys.executable, "-m", "benchmarks.bundle_memory", "--bundle", str(path)]
            command += ["--sentences", str(count)]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            total, files = map(float, shown.split())
            share = files / on_disk
            print(f"| {name} | {total:.0f} | {files:.0f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
