#!/usr/bin/env python3
"""Generate the demo's corpus: written-out numbers, dates, times and prices in two languages.

    on the second of May nineteen oh-one at half past seven in the evening the lamp cost one pound
    le deux mai mille neuf cent un à dix-neuf heures trente la lampe coûtait une livre

The words for numbers come from num2words; the phrases around them are in this file. Each English
sentence has one translation, which is not word for word: word order and grammatical gender differ,
and English uses the 12-hour clock where the translation uses the 24-hour clock. The same seed gives
the same corpus. No sentence of either language occurs in more than one of train, valid and test.
"""

from __future__ import annotations

import datetime
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import num2words as num2words_package

from nmt_moe.cli import command


@cache
def num2words(value: int, lang: str, to: str = "cardinal") -> str:
    return num2words_package.num2words(value, lang=lang, to=to)


@dataclass(frozen=True)
class Item:
    """The meaning of a sentence in any language; a template uses the parts that it names."""

    template: int
    thing: int
    goods: int
    number: int
    ordinal: int
    date: datetime.date
    times: tuple[int, int]  # minutes after midnight
    has_spoken_quarters: bool  # English only: `a quarter past seven` instead of `seven fifteen`
    currency: int
    price: tuple[int, int]  # whole units and hundredths


class English:
    templates = [
        "{number}",
        "{price}",
        "at {time}",
        "on the {date}",
        "there are {count} {goods} in the museum",
        "{thing} costs {price}",
        "she was born on the {date}",
        "the train leaves at {time}",
        "the shop opens at {time} and closes at {time2}",
        "on the {date} at {time} {thing} cost {price}",
        "we sold {count} {goods} for {price}",
        "the {ordinal} train of the day leaves at {time}",
        "he lives on the {ordinal} floor of house number {number}",
        "the meeting on {weekday}, the {date}, begins at {time}",
    ]
    # fmt: off
    things = [
        "the ticket", "the book", "the coat", "the lamp",
        "the table", "the bicycle", "the watch", "the bread",
    ]
    goods = ["books", "trees", "tickets", "horses", "boats", "pictures", "pens", "armchairs"]
    months = [
        "January", "February", "March", "April", "May", "June",
        "July", "August", "September", "October", "November", "December",
    ]
    weekdays = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    # fmt: on
    currencies = [("euro", "euros", "cent", "cents"), ("dollar", "dollars", "cent", "cents")]
    currencies += [("pound", "pounds", "penny", "pence")]

    def number(self, value: int) -> str:
        return num2words(value, lang="en").replace(",", "")

    count = number

    def ordinal(self, value: int) -> str:
        return num2words(value, lang="en", to="ordinal")

    def date(self, date: datetime.date) -> str:
        year = num2words(date.year, lang="en", to="year")
        return f"{self.ordinal(date.day)} of {self.months[date.month - 1]} {year}"

    def time(self, minutes: int, has_spoken_quarters: bool) -> str:
        hour, minute = divmod(minutes, 60)
        clock = self.clock(hour, minute)
        if has_spoken_quarters and minute in (15, 30):
            clock = f"{'a quarter' if minute == 15 else 'half'} past {self.hour(hour)}"
        if has_spoken_quarters and minute == 45:
            clock = f"a quarter to {self.hour(hour + 1)}"
        return f"{clock} {self.part_of_day(hour)}"

    def hour(self, hour: int) -> str:
        return self.number((hour - 1) % 12 + 1)

    def clock(self, hour: int, minute: int) -> str:
        if minute == 0:
            return f"{self.hour(hour)} o'clock"
        return f"{self.hour(hour)} {'oh ' if minute < 10 else ''}{self.number(minute)}"

    def part_of_day(self, hour: int) -> str:
        # Each part is shorter than twelve hours, so an hour together with its part of the
        # day is unambiguous.
        if hour < 5 or hour >= 22:
            return "at night"
        if hour < 12:
            return "in the morning"
        return "in the afternoon" if hour < 18 else "in the evening"

    def price(self, currency: int, whole: int, hundredths: int) -> str:
        unit, units, part, parts = self.currencies[currency]
        text = f"{self.number(whole)} {unit if whole == 1 else units}"
        if hundredths == 0:
            return text
        return f"{text} and {self.number(hundredths)} {part if hundredths == 1 else parts}"


class French:
    templates = [
        "{number}",
        "{price}",
        "à {time}",
        "le {date}",
        "il y a {count} {goods} au musée",
        "{thing} coûte {price}",
        "elle est née le {date}",
        "le train part à {time}",
        "le magasin ouvre à {time} et ferme à {time2}",
        "le {date} à {time} {thing} coûtait {price}",
        "nous avons vendu {count} {goods} pour {price}",
        "le {ordinal} train du jour part à {time}",
        "il habite au {ordinal} étage de la maison numéro {number}",
        "la réunion du {weekday} {date} commence à {time}",
    ]
    # fmt: off
    things = [
        "le billet", "le livre", "le manteau", "la lampe",
        "la table", "le vélo", "la montre", "le pain",
    ]
    # All nouns are masculine, because a feminine noun needs another form of the number before it.
    goods = ["livres", "arbres", "billets", "chevaux", "bateaux", "tableaux", "stylos", "fauteuils"]
    months = [
        "janvier", "février", "mars", "avril", "mai", "juin",
        "juillet", "août", "septembre", "octobre", "novembre", "décembre",
    ]
    weekdays = ["lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"]
    # fmt: on
    currencies = [("euro", "euros", "centime", "centimes"), ("dollar", "dollars", "cent", "cents")]
    currencies += [("livre", "livres", "penny", "pence")]

    def number(self, value: int) -> str:
        return num2words(value, lang="fr")

    count = number

    def feminine_count(self, value: int) -> str:
        return re.sub(r"\bun$", "une", self.number(value))

    def ordinal(self, value: int) -> str:
        return num2words(value, lang="fr", to="ordinal")

    def date(self, date: datetime.date) -> str:
        day = "premier" if date.day == 1 else self.number(date.day)
        return f"{day} {self.months[date.month - 1]} {num2words(date.year, lang='fr', to='year')}"

    def time(self, minutes: int, has_spoken_quarters: bool) -> str:
        hour, minute = divmod(minutes, 60)
        text = f"{self.feminine_count(hour)} {'heures' if hour > 1 else 'heure'}"
        return f"{text} {self.feminine_count(minute)}" if minute else text

    def price(self, currency: int, whole: int, hundredths: int) -> str:
        unit, units, part, parts = self.currencies[currency]
        count = self.feminine_count(whole) if unit == "livre" else self.number(whole)
        text = f"{count} {unit if whole == 1 else units}"
        if hundredths == 0:
            return text
        return f"{text} et {self.number(hundredths)} {part if hundredths == 1 else parts}"


class German:
    templates = [
        "{number}",
        "{price}",
        "um {time}",
        "am {date}",
        "im Museum gibt es {count} {goods}",
        "{thing} kostet {price}",
        "sie wurde am {date} geboren",
        "der Zug fährt um {time} ab",
        "der Laden öffnet um {time} und schließt um {time2}",
        "am {date} um {time} kostete {thing} {price}",
        "wir haben {count} {goods} für {price} verkauft",
        "der {ordinal} Zug des Tages fährt um {time} ab",
        "er wohnt im {ordinal}n Stock von Haus Nummer {number}",
        "die Sitzung am {weekday}, dem {date}, beginnt um {time}",
    ]
    # fmt: off
    things = [
        "die Fahrkarte", "das Buch", "der Mantel", "die Lampe",
        "der Tisch", "das Fahrrad", "die Uhr", "das Brot",
    ]
    goods = ["Bücher", "Bäume", "Fahrkarten", "Pferde", "Boote", "Bilder", "Stifte", "Sessel"]
    months = [
        "Januar", "Februar", "März", "April", "Mai", "Juni",
        "Juli", "August", "September", "Oktober", "November", "Dezember",
    ]
    weekdays = ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"]
    # fmt: on
    currencies = [("Euro", "Cent"), ("Dollar", "Cent"), ("Pfund", "Pence")]

    def number(self, value: int) -> str:
        return num2words(value, lang="de")

    def count(self, value: int) -> str:
        # Before a noun, eins loses its s.
        return re.sub("eins$", "ein", self.number(value))

    def ordinal(self, value: int) -> str:
        return num2words(value, lang="de", to="ordinal")

    def date(self, date: datetime.date) -> str:
        year = num2words(date.year, lang="de", to="year")
        return f"{self.ordinal(date.day)}n {self.months[date.month - 1]} {year}"

    def time(self, minutes: int, has_spoken_quarters: bool) -> str:
        hour, minute = divmod(minutes, 60)
        text = f"{self.count(hour)} Uhr"
        return f"{text} {self.number(minute)}" if minute else text

    def price(self, currency: int, whole: int, hundredths: int) -> str:
        unit, part = self.currencies[currency]
        text = f"{self.count(whole)} {unit}"
        return f"{text} und {self.count(hundredths)} {part}" if hundredths else text


NUM_BARE = 4  # The first 4 templates of each language consist only of the part that they name.
LANGUAGES = {"en": English(), "fr": French(), "de": German()}


def draw_time(generator: random.Random) -> int:
    """Draw minutes after midnight, often on a quarter hour, for which English has special names."""
    if generator.random() < 0.4:
        return generator.randrange(24 * 4) * 15
    return generator.randrange(24 * 60)


def draw_item(generator: random.Random) -> Item:
    """Draw the meaning of a sentence; numbers of all lengths are equally likely."""
    first_day = datetime.date(1800, 1, 1)
    # Half the sentences are just a number, price, time or date. They contain so few different
    # words that the model learns attention in a fraction of the updates that it would need with
    # only whole sentences.
    is_bare = generator.random() < 0.5
    return Item(
        template=generator.randrange(NUM_BARE)
        if is_bare
        else generator.randrange(NUM_BARE, len(English.templates)),
        thing=generator.randrange(len(English.things)),
        goods=generator.randrange(len(English.goods)),
        number=generator.randrange(2, 10 ** generator.randint(2, 6)),
        # num2words' French ordinals are correct below eighty (its 80th is `quatre-vingtsième`).
        ordinal=generator.randrange(2, 80),
        date=first_day + datetime.timedelta(days=generator.randrange(366 * 220)),
        times=(draw_time(generator), draw_time(generator)),
        has_spoken_quarters=generator.random() < 0.5,
        currency=generator.randrange(len(English.currencies)),
        price=(
            generator.randrange(1, 10 ** generator.randint(1, 4)),
            generator.choice([0, generator.randrange(1, 100)]),
        ),
    )


def say(item: Item, language: str) -> str:
    """Return the sentence for `item` in one language."""
    speaker = LANGUAGES[language]
    return speaker.templates[item.template].format(
        number=speaker.number(item.number),
        count=speaker.count(item.number),
        ordinal=speaker.ordinal(item.ordinal),
        date=speaker.date(item.date),
        weekday=speaker.weekdays[item.date.weekday()],
        time=speaker.time(item.times[0], item.has_spoken_quarters),
        time2=speaker.time(item.times[1], item.has_spoken_quarters),
        price=speaker.price(item.currency, *item.price),
        thing=speaker.things[item.thing],
        goods=speaker.goods[item.goods],
    )


def make_pairs(count: int, language: str, seed: int) -> list[tuple[str, str]]:
    """Return `count` pairs, with no repeated English sentence or translation."""
    generator = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    seen_sources: set[str] = set()
    seen_targets: set[str] = set()
    while len(pairs) < count:
        item = draw_item(generator)
        source, target = say(item, "en"), say(item, language)
        if source in seen_sources or target in seen_targets:
            continue
        seen_sources.add(source)
        seen_targets.add(target)
        pairs.append((source, target))
    return pairs


def split_pairs(
    pairs: list[tuple[str, str]], sizes: dict[str, int]
) -> dict[str, list[tuple[str, str]]]:
    """Divide the pairs into parts of the given sizes, which share no sentence on either side."""
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = pairs[start : start + size]
        start += size
    for side in (0, 1):
        sentences = [{pair[side] for pair in part} for part in parts.values()]
        assert sum(map(len, sentences)) == len(set.union(*sentences)), "two parts share a sentence"
    return parts


def write_corpus(folder: Path, language: str, sizes: dict[str, int], seed: int) -> None:
    """Write {train,valid,test}.{en,language} into `folder`."""
    parts = split_pairs(make_pairs(sum(sizes.values()), language, seed), sizes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in parts.items():
        for side, ending in enumerate(("en", language)):
            text = "".join(pair[side] + "\n" for pair in pairs)
            (folder / f"{name}.{ending}").write_text(text, encoding="utf-8", newline="\n")


PAIRS = click.IntRange(min=1)


@command(
    "make_corpus.py", "make_corpus.py corpus --target-lang de --train-size 12000 --test-size 500"
)
@click.argument("folder", type=Path)
@click.option("--target-lang", type=click.Choice(["de", "fr"]), default="fr", show_default=True)
@click.option(
    "--train-size",
    type=PAIRS,
    default=12000,
    show_default=True,
    help="Sentence pairs for training.",
)
@click.option("--valid-size", type=PAIRS, default=300, show_default=True)
@click.option("--test-size", type=PAIRS, default=500, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
def main(
    folder: Path, target_lang: str, train_size: int, valid_size: int, test_size: int, seed: int
) -> None:
    """Write a parallel corpus of English and French or German into FOLDER, as six files."""
    sizes = {"train": train_size, "valid": valid_size, "test": test_size}
    write_corpus(folder, target_lang, sizes, seed)
    click.echo(f"{sum(sizes.values())} different pairs in {folder}: {sizes}")


if __name__ == "__main__":
    main()
