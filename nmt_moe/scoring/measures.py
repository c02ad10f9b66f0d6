"""Measure translation quality: BLEU under several conventions, chrF and TER, with signatures.

sacrebleu computes all scores. A measure only prepares both texts as its convention prescribes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import sacremoses
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

from nmt_moe.text.parallel import check_parallel, read_good_lines

# Characters such as the non-breaking space, which Python treats as spaces. multi-bleu.perl treats
# them as letters, because it reads bytes.
WIDE_SPACE = re.compile(r"[^\S \t\n\r\f\v]")
# Largest source length, in words, for each row of --src.
LENGTH_ENDS = (10, 20, 30, 40, 50)
# Other codes for languages, and sacrebleu's tokenisers for languages that Moses and 13a cannot
# split.
LANGUAGE_NAMES = {"zho": "zh", "cmn": "zh", "yue": "zh", "jpn": "ja", "kor": "ko", "tha": "th"}
LANGUAGE_NAMES |= {"khm": "km", "lao": "lo", "mya": "my"}
TOKENS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
MECAB = {"ja-mecab": "MeCab", "ko-mecab": "mecab_ko"}
WITHOUT_SPACES = ("zh", "ja", "th", "km", "lo", "my")


@dataclass(frozen=True)
class Measure:
    """One kind of score: how both texts are prepared, and which of sacrebleu's metrics is applied.

    `note` is appended to the metric's signature.
    """

    name: str
    prepare: Callable[[str], str]
    make_metric: Callable[[], Metric]
    note: str = ""

    def prepare_text(self, lines: Sequence[str]) -> list[str]:
        """Return all lines in the prepared form."""
        return [self.prepare(line) for line in lines]

    def describe(self, signature: object) -> str:
        """Return sacrebleu's signature with the note."""
        return "|".join([f"{signature}", *filter(None, [self.note])])


def keep(line: str) -> str:
    """Return a line unchanged."""
    return line


def split_compounds(line: str) -> str:
    """Split the hyphenated compounds of a tokenised line.

    Matches do not overlap, so the second hyphen of a-b-c stays, as in the widely used Perl
    one-liner.
    """
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", line)


def make_tokenizer(language: str | None) -> tuple[Callable[[str], str], str]:
    """Return a function that tokenises a line, and its name for signatures.

    `language` is the language of the texts, or None if they are already tokenised.
    """
    if language is None:
        return _keep_words, "as given"
    moses = sacremoses.MosesTokenizer(lang=language)

    def tokenize(line: str) -> str:
        return _keep_words(moses.tokenize(line, return_str=True))

    return tokenize, f"moses-{language}, sacremoses {sacremoses.__version__}"


def _keep_words(line: str) -> str:
    return WIDE_SPACE.sub(lambda found: chr(0xF0000 + ord(found[0])), line)


def make_measures(language: str | None, tokens: str | None = None) -> list[Measure]:
    """Return the measures for texts in `language`, or only multi-bleu's if it is None (tokenised).

    `tokens` names a sacrebleu tokeniser to use instead of the language's.

    Raises:
        ValueError: if there is no tokeniser for the language; the message names some to choose
            from.
    """
    chosen = choose_tokens(language, tokens)
    plain = [
        *(Measure(f"sacrebleu-{name}", keep, _bleu(name)) for name in chosen),
        Measure("chrf", keep, CHRF),
        Measure("ter", keep, TER),
    ]
    if language in WITHOUT_SPACES:
        return plain  # Moses cannot split these languages
    tokenize, name = make_tokenizer(language)
    note = f"words:{name}"
    measures = [
        Measure("multi-bleu", tokenize, _multi_bleu(), note),
        Measure("multi-bleu-lowercase", tokenize, _multi_bleu(lowercase=True), note),
        Measure(
            "multi-bleu-compound-split",
            lambda line: split_compounds(tokenize(line)),
            _multi_bleu(),
            note + "|compounds:split, not comparable with GNMT's and the MoE paper's",
        ),
    ]
    return measures if language is None else measures + plain


def choose_tokens(language: str | None, tokens: str | None) -> Sequence[str]:
    """Return sacrebleu's tokenisers for a language.

    Raises:
        ValueError: if there is no tokeniser, sacrebleu does not know it, or its package is not
            installed.
    """
    if tokens is None:
        if language in WITHOUT_SPACES and language not in TOKENS:
            raise ValueError(
                f"'{language}' is written without spaces and has no default tokeniser. Choose one "
                "of sacrebleu's: `--tokenize char` or `--tokenize flores200`."
            )
        if language not in TOKENS:
            return ("13a", "intl")
        tokens = TOKENS[language]
    if tokens not in BLEU.TOKENIZERS:
        known = ", ".join(BLEU.TOKENIZERS)
        raise ValueError(f"`--tokenize` must be one of {known}, but is '{tokens}'.")
    package = MECAB.get(tokens)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"sacrebleu's tokeniser {tokens} is not installed. Install it: pip install "
            f"'sacrebleu[{tokens[:2]}]'; or choose another: `--tokenize char`."
        )
    return (tokens,)


def validation_tokens(language: str) -> str:
    """Return a sacrebleu tokeniser for BLEU in validation that needs no further packages.

    `language` is a code such as `ja`, `jpn` or `zh_CN`. Texts in languages without spaces are
    compared character by character.
    """
    name = re.split("[-_]", language.lower())[0]
    name = LANGUAGE_NAMES.get(name, name)
    if name == "zh":
        return "zh"
    return "char" if name in WITHOUT_SPACES else "13a"


def _bleu(tokens: str) -> Callable[[], Metric]:
    return lambda: BLEU(tokenize=tokens)


def _multi_bleu(lowercase: bool = False) -> Callable[[], Metric]:
    # `force` suppresses sacrebleu's warning about tokenised text, which is intended.
    return lambda: BLEU(tokenize="none", smooth_method="none", lowercase=lowercase, force=True)


def score(measure: Measure, hypotheses: list[str], references: list[list[str]]) -> dict:
    """Return a measure's name, its score in percent, details and signature.

    `references` contains one or more texts, each with as many lines as `hypotheses`. For BLEU, the
    details are the precisions, the brevity penalty and the lengths in words.
    """
    metric = measure.make_metric()
    result = metric.corpus_score(
        measure.prepare_text(hypotheses), [measure.prepare_text(text) for text in references]
    )
    return {
        "name": measure.name,
        "score": float(result.score),
        "details": getattr(result, "_verbose", ""),
        "signature": measure.describe(metric.get_signature()),
    }


def compare(
    measure: Measure,
    hypotheses: list[str],
    others: list[str],
    references: list[list[str]],
    num_samples: int,
) -> dict:
    """Test whether two translations differ, by paired bootstrap (Koehn 2004, as in sacrebleu).

    Returns:
        Both scores, each with the mean and the half-width of its 95% interval over the resamples;
        and p, the probability of a difference of this size between equally good translations.
    """
    systems: list[tuple[str, Sequence[str]]] = [
        (name, measure.prepare_text(lines))
        for name, lines in (("other", others), ("this", hypotheses))
    ]
    prepared = [measure.prepare_text(text) for text in references]
    test = PairedTest(
        systems, {"metric": measure.make_metric()}, prepared, test_type="bs", n_samples=num_samples
    )
    signatures, scores = test()
    (key,) = signatures
    other, this = cast(Any, scores[key])  # results, without the names
    # sacrebleu counts resamples that exceed the difference. There are none if all are equal.
    is_same = systems[0][1] == systems[1][1]
    # float(), because JSON does not accept numpy's numbers.
    return {
        "name": measure.name,
        "score": float(this.score),
        "mean": float(this.mean),
        "interval": float(this.ci),
        "other_score": float(other.score),
        "other_mean": float(other.mean),
        "other_interval": float(other.ci),
        "p": 1.0 if is_same else float(this.p_value),
        "signature": measure.describe(signatures[key]),
    }


def score_by_source(
    measure: Measure, hypotheses: list[str], references: list[list[str]], sources: list[str]
) -> dict:
    """Score by source length in words, and count translations that copy their source."""
    rows = []
    start = 1
    for end in (*LENGTH_ENDS, None):
        chosen = [
            i
            for i, line in enumerate(sources)
            if max(len(line.split()), 1) >= start and (end is None or len(line.split()) <= end)
        ]
        if chosen:
            result = score(
                measure,
                [hypotheses[i] for i in chosen],
                [[text[i] for i in chosen] for text in references],
            )
            words = f"{start}-{end}" if end else f"{start}-"
            rows.append({"words": words, "sentences": len(chosen), "score": result["score"]})
        start = (end or 0) + 1
    copies = sum(hyp.strip() == src.strip() for hyp, src in zip(hypotheses, sources, strict=True))
    return {"measure": measure.name, "rows": rows, "copies": copies}


def read_texts(paths: Sequence[Path]) -> list[list[str]]:
    """Read files with the same number of lines; empty lines are allowed.

    Raises:
        ValueError: if a line cannot be read, the files have different numbers of lines, or a file
            has no text or is the output of fairseq-generate.
        OSError: if a file cannot be opened.
    """
    texts = [list(read_good_lines(path, allow_empty=True)) for path in paths]
    for path, text in zip(paths, texts, strict=True):
        if any(re.match(r"[DHS]-\d+\t", line) for line in text):
            raise ValueError(
                f"`{path}` is the output of fairseq-generate, not a translation. Extract the D- "
                f"lines in the text's order: nmt-moe hypotheses {path} > translation.txt"
            )
    check_parallel(paths, allow_empty=True)
    for path, text in zip(paths, texts, strict=True):
        if not any(line.strip() for line in text):
            raise ValueError(
                f"`{path}`: all lines ({len(text)}) are empty, so there is nothing to score"
            )
    return texts


def choose_language(name: str | None, reference: Path, is_tokenized: bool) -> str | None:
    """Return the texts' two-letter language code: `name`, or else the reference's extension.

    Raises:
        ValueError: if the result is not a language code, or if `name` is set for tokenised texts.
    """
    if is_tokenized:
        if name is not None:
            raise ValueError(f"`--lang {name}` has no effect with `--tokenized`: leave one out.")
        return None
    is_given = name is not None
    name = name or reference.name.removesuffix(".gz").rpartition(".")[2]
    language = re.split("[-_]", name)[0].lower()
    language = LANGUAGE_NAMES.get(language, language)
    if not re.fullmatch(r"[a-z]{2}", language):
        raise ValueError(
            f"`--lang` must be a two-letter language code, but is '{name}'."
            if is_given
            else f"the language of `{reference}` is unknown, because its extension is not a "
            "two-letter code. Name the language, for example --lang de."
        )
    return language
