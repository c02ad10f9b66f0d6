"""Open the bundles of a server, and find them by the language pairs that they translate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from babel import Locale

from nmt_moe.inference import BundleConfig, Translator, open_bundle
from nmt_moe.serving.errors import RequestError, show

NAMED = re.compile(r"(.+)=([\w-]+):([\w-]+)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Model:
    """One bundle of the server.

    Attributes:
        folder: Folder of the bundle, as the user wrote it.
        translator: Translator that uses the bundle.
        config: Configuration of the bundle.
        sources: Source languages of the bundle.
        targets: Target languages of the bundle.
    """

    folder: str
    translator: Translator
    config: BundleConfig
    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def target_option(self, target: str) -> str | None:
        """Return the translator's `target_lang`, or None if the model is not multilingual."""
        return target if self.config.is_multilingual else None


class Models:
    """All bundles of a server, by language pair.

    Attributes:
        opened: The bundles, in the order of the command line.
        sources: All source languages, sorted.
        targets: All target languages, sorted.
    """

    def __init__(self, opened: Sequence[Model]) -> None:
        self.opened = list(opened)
        self._by_pair: dict[tuple[str, str], Model] = {}
        for model in opened:
            for source in model.sources:
                for target in model.targets:
                    if source != target:
                        self._add(source, target, model)
        self.sources = sorted({source for source, _ in self._by_pair})
        self.targets = sorted({target for _, target in self._by_pair})

    @classmethod
    def open(cls, folders: Sequence[str]) -> Models:
        """Open bundles.

        Args:
            folders: Folders that `nmt-moe export` wrote. `FOLDER=en:de` names the languages of a
                bundle with one direction, overriding its own names if it has any.

        Raises:
            ValueError: if a folder is not a complete bundle, does not name its languages, or
                translates the same pair as another one; the message names it.
        """
        if not folders:
            raise ValueError("`folders` must name at least one bundle, but is empty.")
        return cls([open_model(folder) for folder in folders])

    def _add(self, source: str, target: str, model: Model) -> None:
        other = self._by_pair.setdefault((source, target), model)
        if other is not model:
            raise ValueError(
                f"`{other.folder}` and `{model.folder}` both translate from {source} into "
                f"{target}. Name only one of them."
            )

    def targets_of(self, source: str) -> list[str]:
        """Return the target languages of a source language, sorted."""
        return sorted(target for own, target in self._by_pair if own == source)

    def find(self, source: str, target: str) -> Model:
        """Return the bundle for a pair.

        Raises:
            RequestError: if there is no bundle for it.
        """
        if (source, target) not in self._by_pair:
            known = ", ".join(self.targets_of(source))
            raise RequestError(
                400, f"{source} is not translated into {target}, but into {known}.".strip()
            )
        return self._by_pair[source, target]


def match(field: str, code: str, known: Sequence[str]) -> str:
    """Return the language that a client's code stands for.

    Case and the kind of dash do not matter. A variant such as EN-GB stands for en if only en is
    known.

    Raises:
        RequestError: if there is no such language.
    """
    plain = {_plain(name): name for name in known}
    wanted = _plain(code)
    for one in (wanted, wanted.split("-")[0]):
        if one in plain:
            return plain[one]
    raise RequestError(
        400,
        f"`{field}` must be one of {', '.join(known)}, but is {show(code)}.",
    )


def _plain(code: str) -> str:
    return code.replace("_", "-").lower()


def open_model(folder: str) -> Model:
    """Open one bundle, as described in `Models.open`."""
    named = NAMED.fullmatch(folder)
    path = named[1] if named else folder
    bundle = open_bundle(path, "translation")
    config = bundle.config
    if named and config.is_multilingual:
        raise ValueError(
            f"`{path}` translates {len(config.languages)} languages and names them itself: leave "
            "`=...` out."
        )
    languages = tuple(named.groups()[1:]) if named else config.languages
    if config.is_multilingual:
        return Model(path, Translator([bundle]), config, languages, languages)
    if len(languages) != 2:
        raise ValueError(f"`{path}` does not name its languages. Name them: `{path}=en:de`.")
    if languages[0] == languages[1]:
        raise ValueError(f"`{folder}` must have two languages, but has {languages[0]} twice.")
    return Model(path, Translator([bundle]), config, languages[:1], languages[1:])


def name_of(code: str) -> str:
    """Return a language's English name with its variant, or its code if the name is unknown."""
    base, _, variant = code.replace("-", "_").partition("_")
    name = Locale("en").languages.get(base.lower(), code)
    return f"{name} ({variant})" if variant and name != code else name
