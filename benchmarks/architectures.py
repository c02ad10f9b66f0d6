"""Build fairseq-train's configuration from an architecture's name and flags."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig

from nmt_moe import plugin

plugin.register()


def parse_training(arch: str, flags: Sequence[str], data: str = "unused") -> DictConfig:
    """Parse `fairseq-train DATA --arch ARCH FLAG...`."""
    line = [data, "--task", "translation", "--source-lang", "src", "--target-lang", "tgt"]
    line += ["--arch", arch, *flags]
    with quiet():
        return convert_namespace_to_omegaconf(
            options.parse_args_and_arch(options.get_training_parser(), line)
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and messages, because fairseq's use of hydra causes a dozen of them."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def make_dictionary(vocab_size: int) -> Dictionary:
    """Make a dictionary of `vocab_size` symbols, including fairseq's four special ones."""
    dictionary = Dictionary()
    for at in range(vocab_size - len(dictionary)):
        dictionary.add_symbol(f"w{at}")
    return dictionary
