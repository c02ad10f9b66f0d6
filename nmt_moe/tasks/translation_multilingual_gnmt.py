"""`--task translation_multilingual_gnmt`: one model for many directions."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import sacrebleu
import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask, register_task, translation
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II

from nmt_moe.checks import check_range
from nmt_moe.compat._replace import replace
from nmt_moe.scoring.measures import validation_tokens
from nmt_moe.tasks._languages import (
    Pair,
    check_languages,
    describe_languages,
    language_token,
    load_shared_dictionary,
    parse_languages,
    parse_oversampling,
    parse_pairs,
    read_direction,
)
from nmt_moe.tasks._pair_metrics import add_pair_columns, log_expert_use, reduce_pairs
from nmt_moe.tasks._pairs import PairsDataset, describe_sampling
from nmt_moe.training import passes_per_epoch

logger = logging.getLogger(__name__)


@dataclass
class MultilingualGNMTConfig(TranslationConfig):
    """Options of the task, in addition to those of fairseq's `translation`."""

    lang_pairs: str = field(
        default="",
        metadata={"help": "directions to train, such as en-fr,fr-en,en-de,de-en"},
    )
    langs: str = field(
        default="",
        metadata={
            "help": "languages in the order of their tokens in the dictionary; default: the order "
            "of their first mention in --lang-pairs. When translating, use the training order"
        },
    )
    sampling_temperature: float = field(
        default=1.0,
        metadata={
            "help": "1: an epoch uses every sentence once; above 1: it uses rare pairs more often "
            "and frequent pairs less often, in proportion to size^(1/T)"
        },
    )
    oversampling: str = field(
        default="",
        metadata={
            "help": "number of passes per epoch over some pairs, such as en-ko=8,ko-en=8, instead "
            "of the number that the temperature implies"
        },
    )
    seed: int = II("common.seed")
    max_epoch: int = II("optimization.max_epoch")
    max_update: int = II("optimization.max_update")
    update_freq: List[int] = II("optimization.update_freq")


@register_task("translation_multilingual_gnmt", dataclass=MultilingualGNMTConfig)
class MultilingualGNMTTask(TranslationTask):
    """Translation in many directions with one model, one dictionary and one softmax.

    A token at the start of the source names the target language, so the model can translate between
    any two of the languages, even a pair that was not seen in training (zero-shot).
    --source-lang and --target-lang choose the direction when translating.

    Attributes:
        pairs: Directions to train.
        languages: The languages, in the order of their tokens.
        direction: The direction to translate; None during training.

    Source: Johnson et al. 2017; Shazeer et al. 2017, section 5.4.
    """

    def __init__(
        self,
        cfg: MultilingualGNMTConfig,
        dictionary: Dictionary,
        languages: Sequence[str],
        pairs: Sequence[Pair],
        direction: Optional[Pair] = None,
    ) -> None:
        super().__init__(cfg, dictionary, dictionary)
        self.languages, self.pairs, self.direction = list(languages), list(pairs), direction
        check_range("--sampling-temperature", cfg.sampling_temperature, 1.0)
        self.oversampling = parse_oversampling(cfg.oversampling, self.pairs)
        self.has_shown_sampling = False

    @classmethod
    def setup_task(cls, cfg: MultilingualGNMTConfig, **_: Any) -> "MultilingualGNMTTask":
        """Read languages and pairs, and load their dictionary.

        Raises:
            ValueError: if a language or pair is malformed or unknown; the message names it.
            FileNotFoundError: if a language has no dictionary; the message names it.
        """
        pairs = [] if cfg.langs and not cfg.lang_pairs else parse_pairs(cfg.lang_pairs)
        languages = parse_languages(cfg.langs, pairs)
        direction = read_direction(cfg.source_lang, cfg.target_lang, languages)
        folder = utils.split_paths(cfg.data)[0]
        dictionary = load_shared_dictionary(folder, languages)
        logger.info("%d languages (%s)", len(languages), ", ".join(languages))
        logger.info("shared dictionary: %d symbols, including language tokens", len(dictionary))
        return cls(cfg, dictionary, languages, pairs, direction)

    def state_dict(self) -> Dict[str, Any]:
        """Return the task's state for checkpoints: languages, tokens, symbols and pairs."""
        state = describe_languages(self.languages, self.src_dict)
        return {**state, "pairs": [str(pair) for pair in self.pairs]}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Compare a checkpoint's languages, tokens and symbols with this task's.

        Raises:
            ValueError: if they differ; the message names the first difference.
        """
        check_languages(state_dict, self.languages, self.src_dict)
        if self.direction is not None and str(self.direction) not in state_dict["pairs"]:
            logger.info(
                "the model was not trained on %s: this is zero-shot translation", self.direction
            )

    @property
    def evaluated_pairs(self) -> List[Pair]:
        """Return the directions to validate: the chosen one, or else all training directions."""
        return self.pairs if self.direction is None else [self.direction]

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **_: Any) -> None:
        """Load a split of every pair, or of the direction that the options name.

        Raises:
            FileNotFoundError: if a pair has no such split; the message names it.
            ValueError: if a pair's texts are empty or differ in length, or an option does not apply
                to training; the message names the pair or the option.
        """
        is_training = split == self.cfg.train_subset
        if is_training and self.direction is not None:
            raise ValueError(
                "`--source-lang` and `--target-lang` must be left out during training, but name "
                f"'{self.direction}'. To train only that pair, use --lang-pairs {self.direction}."
            )
        if not self.evaluated_pairs and self.cfg.langs:
            raise ValueError(
                "`--source-lang` and `--target-lang` must name the direction to translate, such as "
                f"-s {self.languages[0]} -t {self.languages[-1]}, but are missing. To train, name "
                "the directions with --lang-pairs."
            )
        if not self.evaluated_pairs:
            parse_pairs("")  # raises the error that names the option
        folders = utils.split_paths(self.cfg.data)
        folder = folders[(epoch - 1) % len(folders)] if is_training else folders[0]
        parts = {
            str(pair): self._load_pair(folder, split, pair, combine)
            for pair in self.evaluated_pairs
        }
        passes = None
        if is_training:
            sizes = {pair: len(part) for pair, part in parts.items()}
            passes = passes_per_epoch(sizes, self.cfg.sampling_temperature, self.oversampling)
        self.datasets[split] = PairsDataset(
            parts,
            self.src_dict,
            passes,
            self.cfg.seed,
            len(folders),
            left_pad_source=self.cfg.left_pad_source,
            left_pad_target=self.cfg.left_pad_target,
            shuffle=split != "test",
            num_buckets=self.cfg.num_batch_buckets,
            pad_to_multiple=self.cfg.required_seq_len_multiple,
        )

    def _load_pair(self, folder: str, split: str, pair: Pair, combine: bool) -> Any:
        """Load one pair's split, with the target language's token before every source."""
        try:
            part = translation.load_langpair_dataset(
                folder,
                split,
                pair.source,
                self.src_dict,
                pair.target,
                self.tgt_dict,
                combine=combine,
                dataset_impl=self.cfg.dataset_impl,
                upsample_primary=self.cfg.upsample_primary,
                left_pad_source=self.cfg.left_pad_source,
                left_pad_target=self.cfg.left_pad_target,
                max_source_positions=self.cfg.max_source_positions,
                max_target_positions=self.cfg.max_target_positions,
                truncate_source=self.cfg.truncate_source,
                prepend_bos_src=self._token_of(pair.target),
            )
        except FileNotFoundError as error:
            if "Dataset not found" not in str(error):
                raise
            path = os.path.join(folder, f"{split}.{pair}.{pair.source}.bin")
            raise FileNotFoundError(
                f"the pair '{pair}' has no {split} text: neither `{path}` nor its "
                f"{pair.target}-{pair.source} counterpart exists. Binarise it with "
                "fairseq-preprocess, or specify another pair."
            ) from error
        except ValueError as error:  # an empty text, or sides of different lengths
            raise ValueError(f"the pair '{pair}' cannot be used: {error}") from error
        if part.tgt is None and self.direction is None:
            raise FileNotFoundError(f"the {split} text of '{pair}' has no '{pair.target}' side")
        return part

    def _token_of(self, language: str) -> int:
        return self.src_dict.index(language_token(language))

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the batches. Before the first training epoch, log how often pairs are used."""
        iterator = super().get_batch_iterator(dataset, *args, **kwargs)
        if getattr(dataset, "passes", None) is not None and not self.has_shown_sampling:
            self.has_shown_sampling = True
            logger.info(describe_sampling(dataset, self._count_epochs(len(iterator))))
        return iterator

    def _count_epochs(self, num_batches: int) -> float:
        """Return the number of epochs that the options allow, or infinity if there is no limit."""
        updates = math.ceil(num_batches / self.cfg.update_freq[-1])
        limits = [
            self.cfg.max_epoch or math.inf,
            self.cfg.max_update / updates if self.cfg.max_update else math.inf,
        ]
        return min(limits)

    def build_generator(self, models: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """Build the generator for the chosen direction.

        Raises:
            ValueError: if no direction was chosen.
        """
        if self.direction is None and not self.cfg.eval_bleu:
            raise ValueError(
                "`--source-lang` and `--target-lang` must name the direction to translate, but are "
                f"missing. Name two of {', '.join(self.languages)}, such as -s "
                f"{self.languages[0]} -t {self.languages[-1]}."
            )
        return super().build_generator(models, args, *rest, **kwargs)

    def get_interactive_tokens_and_lengths(
        self, lines: List[str], encode_fn: Any
    ) -> Tuple[List[torch.Tensor], List[int]]:
        """Encode lines, and put the target language's token before each of them."""
        tokens, _ = super().get_interactive_tokens_and_lengths(lines, encode_fn)
        tokens = [self._ask_for_target(line) for line in tokens]
        return tokens, [len(line) for line in tokens]

    def build_dataset_for_inference(
        self, src_tokens: List[torch.Tensor], src_lengths: List[int], constraints: Any = None
    ) -> Any:
        """Build a data set of encoded sentences, which may lack the target language's token."""
        tokens = [self._ask_for_target(torch.as_tensor(line)) for line in src_tokens]
        lengths = [len(line) for line in tokens]
        return super().build_dataset_for_inference(tokens, lengths, constraints)

    def _ask_for_target(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.direction is not None, "build_generator rejects this"
        token = self._token_of(self.direction.target)
        if len(tokens) and tokens[0] == token:
            return tokens
        return torch.cat([tokens.new_tensor([token]), tokens])

    def valid_step(self, sample: Dict, model: Any, criterion: Any) -> Tuple[Any, Any, Dict]:
        """Evaluate a batch of one pair, and also log the results under the pair's name."""
        loss, sample_size, log = super().valid_step(sample, model, criterion)
        add_pair_columns(log, sample["pair"], len(self.evaluated_pairs))
        return loss, sample_size, log

    def reduce_metrics(self, logging_outputs: List[Dict], criterion: Any) -> None:
        """Log fairseq's columns, and each pair's loss, perplexity and BLEU."""
        super().reduce_metrics(logging_outputs, criterion)
        reduce_pairs(logging_outputs, self.evaluated_pairs)

    def post_validate(self, model: Any, stats: Dict, meters: Any) -> None:
        """Log a table of expert use at the end of validation."""
        log_expert_use(meters, self.evaluated_pairs)

    def _inference_with_bleu(self, generator: Any, sample: Dict, model: Any) -> Any:
        """Compute a batch's BLEU counts, with a tokeniser that suits its target language."""
        found = self.inference_step(generator, [model], sample, prefix_tokens=None)
        pad = self.tgt_dict.pad()
        hypotheses = [self._decode(best[0]["tokens"], "UNKNOWNTOKENINHYP") for best in found]
        references = [
            self._decode(utils.strip_pad(target, pad), "UNKNOWNTOKENINREF")
            for target in sample["target"]
        ]
        language = self.evaluated_pairs[sample["pair"]].target
        tokenize = validation_tokens(language)
        if self.cfg.eval_tokenized_bleu:
            tokenize = "none"
        return sacrebleu.corpus_bleu(hypotheses, [references], tokenize=tokenize)

    def _decode(self, tokens: torch.Tensor, unknown: str) -> str:
        text = self.tgt_dict.string(
            tokens.int().cpu(), self.cfg.eval_bleu_remove_bpe, unk_string=unknown
        )
        return self.tokenizer.decode(text) if self.tokenizer else text


def _refusing_languages(load: Callable) -> Callable:
    def load_state_dict(task: FairseqTask, state_dict: Dict[str, Any]) -> None:
        if not isinstance(task, MultilingualGNMTTask) and "languages" in state_dict:
            raise ValueError(
                "the checkpoint is from a multilingual model. Add --task "
                f"translation_multilingual_gnmt --langs {','.join(state_dict['languages'])}, and "
                "name the direction with --source-lang and --target-lang."
            )
        load(task, state_dict)

    return load_state_dict


# With another task, the dictionary lacks the language tokens and seems to be a different one.
replace(FairseqTask, "load_state_dict", _refusing_languages)
