"""Report incomplete splits of a data set before the first update."""

from collections.abc import Callable
from typing import Any

from fairseq.data import data_utils
from fairseq.tasks import translation

from nmt_moe.compat._replace import replace


def name_uneven_sides() -> None:
    """Report a data set with different numbers of sentences on its two sides.

    Reason: fairseq-train's assertion does not name the file.
    """
    replace(translation, "load_langpair_dataset", _loading_pair)


def _loading_pair(load: Callable) -> Callable:
    def load_langpair_dataset(data_path: str, split: str, src: str, *args: Any, **kw: Any) -> Any:
        try:
            return load(data_path, split, src, *args, **kw)
        except AssertionError as error:
            if "same number of examples" not in str(error):
                raise
            # Positional arguments as in fairseq: src_dict, then tgt.
            target = kw["tgt"] if "tgt" in kw else args[1]
            raise ValueError(
                f"the two sides of `{data_path}/{split}.{src}-{target}.*` must have the same "
                "number of sentences, but do not. Run fairseq-preprocess on files of the same "
                "length."
            ) from error

    return load_langpair_dataset


def name_missing_target_sides() -> None:
    """Report a training or validation set without a target side.

    Reason: training would fail in the model, and validation only after a whole epoch. Commands that
    translate need no target side; they are recognised by the checkpoint's task in `task_cfg`.
    """
    replace(translation.TranslationTask, "load_dataset", _loading_split)


def _loading_split(load: Callable) -> Callable:
    def load_dataset(task: Any, split: str, *args: Any, **kwargs: Any) -> None:
        load(task, split, *args, **kwargs)
        is_training = split.startswith(("train", "valid")) and "task_cfg" not in kwargs
        if is_training and getattr(task.datasets[split], "tgt", "not a pair") is None:
            files = f"{task.cfg.data}/{split}.{task.cfg.source_lang}-{task.cfg.target_lang}"
            raise FileNotFoundError(
                f"`{files}.{task.cfg.target_lang}.bin` is missing: training and validation need "
                "both sides. Binarise both texts with fairseq-preprocess."
            )

    return load_dataset


def name_folders_without_data() -> None:
    """Report a data folder that contains no binarised language pair.

    Reason: fairseq's message, "could not infer language pair", asks for languages, but specifying
    them does not help.
    """
    replace(data_utils, "infer_language_pair", _inferring)


def _inferring(infer: Callable) -> Callable:
    def infer_language_pair(path: str) -> Any:
        languages = infer(path)
        if None in languages:
            raise ValueError(
                f"`{path}` contains no binarised data, such as train.en-de.en.bin. Name "
                "fairseq-preprocess's --destdir; text must be binarised before it can be used."
            )
        return languages

    return infer_language_pair


def accept_validation_sets_that_are_all_named() -> None:
    """Accept `--valid-subset valid,valid1` if there are no other validation sets.

    Reason: fairseq compares `valid1` with file names such as `valid1.en-de.en`.
    """
    replace(data_utils, "_find_extra_valid_paths", _finding)


def _finding(find: Callable) -> Callable:
    def find_extra_valid_paths(dataset_path: str) -> set[str]:
        return {file.split(".")[0] for file in find(dataset_path)}

    return find_extra_valid_paths


def name_validation_sets_that_are_left_out() -> None:
    """End with one message if a validation set in the folder is not used.

    Reason: fairseq's check prints a traceback.
    """
    replace(data_utils, "raise_if_valid_subsets_unintentionally_ignored", _refusing)


def _refusing(check: Callable) -> Callable:
    def refuse_ignored_sets(cfg: Any) -> None:
        try:
            check(cfg)
        except ValueError as error:
            raise ValueError(f"{error} Or name all of them with --valid-subset.") from error

    return refuse_ignored_sets
