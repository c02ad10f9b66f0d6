"""Names, language tokens and the shared dictionary of a multilingual task."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Set, Tuple

from fairseq.data import Dictionary

LANGUAGE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Pair:
    """One direction of translation."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"


def language_token(language: str) -> str:
    """Return the symbol that requests a target language at the start of the source.

    Source: Johnson et al. 2017, section 3.
    """
    return f"<2{language}>"


def parse_pair(text: str, option: str) -> Pair:
    """Parse a pair such as `en-fr`.

    Raises:
        ValueError: if the pair is malformed; the message names the option and the text.
    """
    languages = text.split("-")
    if len(languages) != 2 or not all(map(LANGUAGE.fullmatch, languages)):
        raise ValueError(
            f"`{option}` must name pairs such as en-fr, separated by commas, but has '{text}'."
        )
    if languages[0] == languages[1]:
        raise ValueError(f"`{option}`: source and target must differ, but are equal in '{text}'.")
    return Pair(*languages)


def parse_pairs(text: str) -> List[Pair]:
    """Parse `--lang-pairs`, such as `en-fr,fr-en`.

    Raises:
        ValueError: if a pair is malformed, repeated or missing; the message names it.
    """
    if not text:
        raise ValueError(
            "`--lang-pairs` must name at least one pair, but is missing. Name the directions to "
            "train, such as --lang-pairs en-fr,fr-en."
        )
    pairs = [parse_pair(word, "--lang-pairs") for word in text.split(",")]
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise ValueError(f"`--lang-pairs` must name each pair once, but has '{pair}' twice.")
    return pairs


def parse_languages(text: str, pairs: Sequence[Pair]) -> List[str]:
    """Parse `--langs`, such as `en,fr`. If it is empty, return the pairs' languages in order.

    Raises:
        ValueError: if a language is malformed, repeated, or missing for a pair; the message names
            it.
    """
    if not text:
        return list(dict.fromkeys(name for pair in pairs for name in (pair.source, pair.target)))
    languages = text.split(",")
    for language in languages:
        if not LANGUAGE.fullmatch(language):
            raise ValueError(
                "`--langs` must name languages such as en, separated by commas, "
                f"but has '{language}'."
            )
        if languages.count(language) > 1:
            raise ValueError(f"`--langs` must name each language once, but has '{language}' twice.")
    for pair in pairs:
        for language in (pair.source, pair.target):
            check_language(language, languages, f"`--lang-pairs`: a language of '{pair}'")
    return languages


def check_language(language: str, languages: Sequence[str], what: str) -> None:
    """Reject a language that the task does not have.

    Raises:
        ValueError: if the language is unknown; the message names it and all languages of the task.
    """
    if language not in languages:
        raise ValueError(f"{what} must be one of {', '.join(languages)}, but is '{language}'.")


def parse_oversampling(text: str, pairs: Sequence[Pair]) -> Dict[str, float]:
    """Parse `--oversampling` (passes per epoch over some pairs), such as `en-ko=8,ko-en=8`.

    Raises:
        ValueError: if a pair is unknown or its value is not a number; the message names the pair.
    """
    passes = {}
    for word in text.split(",") if text else []:
        name, _, number = word.partition("=")
        pair = parse_pair(name, "--oversampling")
        if pair not in pairs:
            raise ValueError(
                "`--oversampling`: a pair must be one of --lang-pairs, "
                f"{', '.join(map(str, pairs))}, but is '{pair}'."
            )
        try:
            passes[str(pair)] = float(number)
        except ValueError as error:
            raise ValueError(
                f"`--oversampling` must give each pair a number, such as {pair}=8, "
                f"but has '{word}'."
            ) from error
        if not 0 < passes[str(pair)] < float("inf"):
            raise ValueError(
                f"`--oversampling` for {pair} must be a finite number greater than 0, but is "
                f"{number}. Leave a pair out of --lang-pairs to train without it."
            )
    return passes


class LanguagesDictionary(Dictionary):
    """A dictionary with a token for each language. These tokens never stand for text.

    Attributes:
        language_marks: The tokens. In a text, the same characters are an unknown word.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.language_marks: Set[str] = set()

    def add_language(self, language: str, path: str) -> None:
        """Add a language's token.

        Args:
            language: Name of the language.
            path: Path of the dictionary, for error messages.

        Raises:
            ValueError: if the token is a word of the texts.
        """
        token = language_token(language)
        if token in self:
            raise ValueError(
                f"the dictionary `{path}` has the word `{token}`, which stands for the language "
                f"'{language}' and cannot be a word of the texts. Remove it from the texts, "
                "and binarise them again."
            )
        self.add_symbol(token)
        self.language_marks.add(token)


def load_shared_dictionary(folder: str, languages: Sequence[str]) -> LanguagesDictionary:
    """Load the dictionary that all languages share, and add their tokens in order.

    Raises:
        FileNotFoundError: if a language has no dictionary; the message names it.
        ValueError: if two dictionaries differ, or a language's token is a word of the texts; the
            message names the languages.
    """
    dictionaries: Dict[str, LanguagesDictionary] = {}
    for language in languages:
        path = os.path.join(folder, f"dict.{language}.txt")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"`{path}` is missing: {folder} has no text of the language '{language}'. Binarise "
                "each pair with fairseq-preprocess into that folder, or specify other languages."
            )
        dictionaries[language] = LanguagesDictionary.load(path)
    first = languages[0]
    for language, dictionary in dictionaries.items():
        if dictionary.symbols != dictionaries[first].symbols:
            raise ValueError(
                f"all languages must share one dictionary, but `dict.{first}.txt` and "
                f"`dict.{language}.txt` in {folder} differ. Run fairseq-preprocess with the same "
                "--srcdict and --tgtdict for every pair."
            )
    shared = dictionaries[first]
    for language in languages:
        shared.add_language(language, os.path.join(folder, f"dict.{first}.txt"))
    return shared


def describe_languages(languages: Sequence[str], dictionary: Dictionary) -> Dict[str, Any]:
    """Return the task's state for checkpoints, in types that torch's safe loader accepts."""
    return {
        "languages": list(languages),
        "tokens": [language_token(language) for language in languages],
        "symbols": list(dictionary.symbols),
    }


def check_languages(
    saved: Dict[str, Any], languages: Sequence[str], dictionary: Dictionary
) -> None:
    """Reject languages, tokens or symbols that differ from the checkpoint's.

    Raises:
        ValueError: if they differ; the message names the first difference.
    """
    if "languages" not in saved:
        raise ValueError(
            "the checkpoint is not from a multilingual task: it stores no languages. Use one that "
            "was trained with --task translation_multilingual_gnmt, or translate with its own "
            "task."
        )
    here = describe_languages(languages, dictionary)
    for key, what in (("languages", "`--langs` (or `--lang-pairs`)"), ("tokens", "tokens")):
        if saved[key] != here[key]:
            raise ValueError(
                f"{what} must name the checkpoint's languages in the same order, "
                f"{','.join(saved[key])}, but name {','.join(here[key])}. Add --langs "
                f"{','.join(saved['languages'])}."
            )
    if saved["symbols"] != here["symbols"]:
        index, old, new = first_difference(saved["symbols"], here["symbols"])
        raise ValueError(
            f"the dictionary must be the checkpoint's, but symbol {index} is {new}, not {old}. "
            "Name the data folder that was used for training."
        )


def first_difference(old: Sequence[str], new: Sequence[str]) -> Tuple[int, str, str]:
    """Return the index of the first difference between two unequal lists, and both symbols."""
    same = (one == other for one, other in zip(old, new, strict=False))
    index = next((i for i, equal in enumerate(same) if not equal), min(len(old), len(new)))
    shown = [f"'{symbols[index]}'" if index < len(symbols) else "missing" for symbols in (old, new)]
    return index, shown[0], shown[1]


def read_direction(
    source: Optional[str], target: Optional[str], languages: Sequence[str]
) -> Optional[Pair]:
    """Read --source-lang and --target-lang; return None if neither is given.

    Raises:
        ValueError: if one language is missing or unknown, or both are equal; the message names it.
    """
    options = {"--source-lang": source, "--target-lang": target}
    if not any(options.values()):
        return None
    for option, language in options.items():
        if not language:
            raise ValueError(
                f"`{option}` must be one of {', '.join(languages)}, but is missing. Both languages "
                "of a direction must be named."
            )
        check_language(language, languages, f"`{option}`")
    if source == target:
        raise ValueError(
            f"`--source-lang` and `--target-lang` must differ, but are both '{source}'."
        )
    return Pair(str(source), str(target))
