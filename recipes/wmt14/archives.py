#!/usr/bin/env python3
"""Download WMT14's archives, verify them, and take one corpus out of them.

    archives.py list --pair fr                          the archives and corpora of a pair
    archives.py fetch wmt14/training-parallel-nc-v9.tgz --downloads FOLDER
    archives.py extract news-commentary-v9 --pair fr --downloads FOLDER --target FOLDER

What is expected of an archive and of a corpus (size, digest, members, lines) stands in
manifest.json. An archive without a published digest is recorded at its first download, in
recorded.json beside it, and checked against that from then on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import posixpath
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.wmt14.download import BLOCK, addresses_of, download

MANIFEST = Path(__file__).with_name("manifest.json")
SEGMENT = re.compile(rb"<seg[^>]*>(.*?)</seg>", re.IGNORECASE)


def read_manifest(path: Path) -> dict:
    """Raise ValueError if the manifest is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable manifest ({error})") from None


def find_part(manifest: dict, pair: str, name: str) -> dict:
    for part in manifest["parts"][pair]:
        if part["name"] == name:
            return part
    raise ValueError(f"the manifest has no corpus '{name}' of en-{pair}")


def digests_of(path: Path) -> dict:
    """Return size in bytes, md5 and sha256 of a file, read once."""
    digests = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            for digest in digests.values():
                digest.update(block)
    return {"bytes": path.stat().st_size} | {k: d.hexdigest() for k, d in digests.items()}


def reject(path: Path, reason: str, way_out: str = "") -> NoReturn:
    """Move an archive out of the way, to NAME.bad, and raise ValueError with the reason."""
    bad = path.with_name(path.name + ".bad")
    path.rename(bad)
    raise ValueError(
        f"{path}: {reason}. It was moved to {bad.name}: run again to download it anew, or try "
        f"another WMT14_MIRROR{way_out}."
    )


def verify(name: str, entry: dict, path: Path, records: Path) -> str:
    """Compare an archive with the manifest and with the record of its first download.

    Returns:
        What it was checked by. The first time, a record is made; for want of a published digest
        the archive is read to its end before.

    Raises:
        ValueError: it differs, or cannot be read; it is moved out of the way, to NAME.bad.
    """
    found = digests_of(path)
    recorded = json.loads(records.read_text(encoding="utf-8")) if records.exists() else {}
    published = {key: entry[key] for key in ("bytes", "md5", "sha256") if key in entry}
    for origin, expected in (("manifest", published), (str(records), recorded.get(name, {}))):
        for key, value in expected.items():
            if found[key] != value:
                reject(
                    path,
                    f"{key} is {found[key]}, but must be {value} ({origin})",
                    "" if origin == "manifest" else f"; to accept it, edit {records}",
                )
    how = " and ".join(key for key in ("sha256", "md5") if key in published)
    if name in recorded:
        return f"verified by {how or 'the record of its first download'}"
    if not how:
        # Nothing but the archive itself can tell a broken first download from a good one.
        try:
            for _ in read_members(path, set()):
                raise AssertionError
        except ValueError as error:
            reject(path, str(error).partition(": ")[2])
    recorded[name] = found
    part = records.with_name(records.name + ".part")
    part.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    part.rename(records)
    return f"verified by {how}" if how else f"no digest is published: recorded {found['sha256']}"


def fetch(name: str, entry: dict, downloads: Path, mirror: str) -> Path:
    """Return the path of a verified archive, downloaded unless it is there.

    Raises:
        ValueError: see `download` and `verify`.
    """
    # Archives of several years have the same name: the year stays in ours.
    path = downloads / name.replace("/", "-")
    downloads.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        download(name, entry, path, mirror)
    how = verify(name, entry, path, downloads / "recorded.json")
    print(f"{name}: {path.stat().st_size:,} bytes, {how}", flush=True)
    return path


def read_members(archive: Path, names: set[str]) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the named members of an archive; nothing is written, whatever the archive says.

    Raises:
        ValueError: the archive is damaged, holds a member that leaves its folder or is a device, or
            lacks a name.
    """
    missing = set(names)
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                tarfile.data_filter(member, str(archive.parent))
                name = posixpath.normpath(member.name)
                if name in missing and member.isreg():
                    missing.remove(name)
                    yield name, tar.extractfile(member)
                    if not missing:
                        return
    except tarfile.FilterError as error:
        raise ValueError(f"{archive}: an unsafe archive: {error}") from None
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive}: not a complete archive ({error})") from None
    if missing:
        raise ValueError(f"{archive}: has no {', '.join(sorted(missing))}")


def write_text(name: str, stream: BinaryIO, path: Path) -> int:
    """Write a member as plain text, one sentence a line, and return the number of lines.

    Of .sgm files the segments are written as sacrebleu writes them: white space joined, entities
    as they are. A line feed alone ends a line.
    """
    lines = 0
    if name.endswith(".gz"):
        stream = gzip.open(stream)  # noqa: SIM115 - its stream closes with the archive
    with path.open("wb") as file:
        if name.endswith(".sgm"):
            for segment in SEGMENT.findall(stream.read()):
                file.write(b" ".join(segment.split()) + b"\n")
                lines += 1
        else:
            for line in stream:
                file.write(line.removesuffix(b"\n") + b"\n")
                lines += 1
    return lines


def extract(part: dict, pair: str, archive: Path, target: Path) -> int:
    """Write a corpus as NAME.en and NAME.PAIR, and return its number of lines.

    Raises:
        ValueError: see `read_members`; or the sides differ in length, or from the manifest.
    """
    target.mkdir(parents=True, exist_ok=True)
    languages = {part["source"]: "en", part["target"]: pair}
    lines = {}
    for name, stream in read_members(archive, set(languages)):
        path = target / f"{part['name']}.{languages[name]}.part"
        try:
            lines[name] = write_text(name, stream, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{archive}: not a complete archive: {name}: {error}") from None
    counts = ", ".join(f"{name} has {lines[name]:,}" for name in languages)
    if len(set(lines.values())) > 1:
        raise ValueError(f"{archive}: the sides must have equally many lines, but {counts}")
    (count,) = set(lines.values())
    if count != part.get("lines", count):
        raise ValueError(f"{archive}: must have {part['lines']:,} lines a side, but {counts}")
    for language in languages.values():
        path = target / f"{part['name']}.{language}"
        path.with_name(path.name + ".part").rename(path)
    return count


def list_pair(manifest: dict, pair: str, mirror: str) -> None:
    """Print the archives and the corpora of a pair, tab-separated, the settings of a step last."""
    for name in dict.fromkeys(part["archive"] for part in manifest["parts"][pair]):
        entry = manifest["archives"][name]
        digests = [f"{key} {entry[key]}" for key in ("bytes", "sha256", "md5") if key in entry]
        about = ", ".join(digests) or "nothing published: recorded at the first download"
        print("archive", name, about, " or ".join(addresses_of(name, entry, mirror)), sep="\t")
    for part in manifest["parts"][pair]:
        print("part", part["name"], part["split"], json.dumps(part, sort_keys=True), sep="\t")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("list", None), ("fetch", "archive"), ("extract", "corpus")):
        command = commands.add_parser(name)
        command.add_argument("--manifest", type=Path, default=MANIFEST)
        command.add_argument("--mirror", default="", help="in the place of statmt.org")
        if what is not None:
            command.add_argument("name", help=f"the {what}, as in the manifest")
            command.add_argument("--downloads", type=Path, required=True)
        if what != "archive":
            command.add_argument("--pair", choices=["de", "fr"], required=True)
        if what == "corpus":
            command.add_argument("--target", type=Path, required=True)
    return parser


def run(arguments: argparse.Namespace) -> None:
    manifest = read_manifest(arguments.manifest)
    if arguments.command == "list":
        list_pair(manifest, arguments.pair, arguments.mirror)
        return
    part = None
    if arguments.command == "extract":
        part = find_part(manifest, arguments.pair, arguments.name)
    name = arguments.name if part is None else part["archive"]
    if name not in manifest["archives"]:
        raise ValueError(f"{arguments.manifest} has no archive '{name}'")
    archive = fetch(name, manifest["archives"][name], arguments.downloads, arguments.mirror)
    if part is not None:
        count = extract(part, arguments.pair, archive, arguments.target)
        print(f"{part['name']}: {count:,} lines on each side")


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        run(arguments)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
