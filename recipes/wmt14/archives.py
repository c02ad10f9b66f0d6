#!/usr/bin/env python3
"""Download WMT14's archives, verify them, and extract a corpus from them.

    archives.py list --pair fr                          the archives and corpora of a pair
    archives.py fetch wmt14/training-parallel-nc-v9.tgz --downloads FOLDER
    archives.py extract news-commentary-v9 --pair fr --downloads FOLDER --target FOLDER

The expected properties of archives and corpora (size, digest, members, lines) are in manifest.json.
If no digest of an archive is published, its digest is recorded at the first download, in
recorded.json in the same folder, and checked from then on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import BinaryIO

from recipes.downloads import BLOCK, bounded, damage_named, download, read_members

ADDRESS = "https://www.statmt.org"
MANIFEST = Path(__file__).with_name("manifest.json")
# Upper limit for the average length of a line; real lines have about 130 bytes on average.
MAX_LINE_BYTES = 1000
SEGMENT = re.compile(rb"<seg[^>]*>(.*?)</seg>", re.IGNORECASE)


def read_manifest(path: Path) -> dict:
    """Read the manifest; raise ValueError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable manifest ({error})") from None


def find_part(manifest: dict, pair: str, name: str) -> dict:
    for part in manifest["parts"][pair]:
        if part["name"] == name:
            return part
    raise ValueError(f"the manifest has no corpus '{name}' of en-{pair}")


def addresses_of(name: str, entry: dict, mirror: str) -> list[str]:
    """Return the addresses of an archive, in order; a mirror replaces all others."""
    if mirror:
        return [f"{mirror.rstrip('/')}/{name}"]
    return [f"{ADDRESS}/{name}", *entry.get("mirrors", [])]


def read_records(path: Path) -> dict[str, str]:
    """Return the SHA-256 hash that was recorded for each archive at its first download.

    Raises:
        ValueError: if the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        records = None
    if not isinstance(records, dict):
        raise ValueError(f"{path}: not a JSON object of archives and digests. Remove it.")
    return records


def fetch(name: str, entry: dict, downloads: Path, mirror: str) -> Path:
    """Return the path of a verified archive, downloading it if necessary.

    If no digest is published, the first download is read to the end and its digest is recorded.

    Raises:
        ValueError: if no address has a file that matches the published or recorded digest.
    """
    # Archives from different years share names, so the local names keep the year.
    path = downloads / name.replace("/", "-")
    records = read_records(downloads / "recorded.json")
    kind = next((kind for kind in ("sha256", "md5") if kind in entry), None)
    digest = entry[kind] if kind else records.get(name)
    if kind is None and digest is not None and not isinstance(digest, str):
        digest = digest["sha256"]  # older records also have size and md5
    try:
        download(
            path,
            addresses_of(name, entry, mirror),
            f"{kind or 'sha256'}:{digest}" if digest else None,
            entry.get("bytes"),
        )
    except ValueError as error:
        if kind is None and digest is not None:
            records_file = downloads / "recorded.json"
            raise ValueError(f"{error} To accept another file, edit {records_file}.") from None
        raise
    how = f"verified by {kind or 'the record of its first download'}"
    if digest is None:
        record(name, path, downloads / "recorded.json", records)
        how = "no digest is published: recorded its sha256"
    print(f"{name}: {path.stat().st_size:,} bytes, {how}", flush=True)
    return path


def record(name: str, path: Path, file: Path, records: dict[str, str]) -> None:
    """Record an archive's digest if the archive can be read to its end; otherwise remove it.

    Raises:
        ValueError: if the archive cannot be read.
    """
    # Reading the archive is the only way to tell a broken first download from a good one.
    try:
        for _ in read_members(path, ()):
            raise AssertionError
    except ValueError as error:
        path.unlink()
        raise ValueError(
            f"{error}. The file was removed. Run again to repeat the download."
        ) from None
    digest = hashlib.sha256()
    with path.open("rb") as archive:
        while block := archive.read(BLOCK):
            digest.update(block)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(records | {name: digest.hexdigest()}, indent=1) + "\n")
    part.rename(file)


def write_text(name: str, stream: BinaryIO, path: Path, max_bytes: int) -> int:
    """Write a member as plain text, one sentence per line, and return the number of lines.

    Segments of .sgm files are written as sacrebleu writes them, with runs of white space replaced
    by one space and entities unchanged. Only a line feed ends a line.
    """
    lines = 0
    if name.endswith(".gz"):
        stream = gzip.open(stream)  # noqa: SIM115 - its stream closes with the archive
    with path.open("wb") as file:
        last = b"\n"
        for block in bounded(stream, max_bytes, name):
            file.write(block)
            lines += block.count(b"\n")
            last = block[-1:]
        if last != b"\n":
            file.write(b"\n")
            lines += 1
    if name.endswith(".sgm"):
        segments = SEGMENT.findall(path.read_bytes())
        path.write_bytes(b"".join(b" ".join(segment.split()) + b"\n" for segment in segments))
        return len(segments)
    return lines


def extract(part: dict, pair: str, archive: Path, target: Path) -> int:
    """Write a corpus as NAME.en and NAME.PAIR, and return its number of lines.

    Raises:
        ValueError: as in `read_members`, or if the two sides differ in their number of
            lines, or do not have the number that the manifest gives.
    """
    target.mkdir(parents=True, exist_ok=True)
    languages = {part["source"]: "en", part["target"]: pair}
    max_bytes = (1 << 20) + MAX_LINE_BYTES * part["lines"]
    lines = {}
    for name, stream in read_members(archive, languages):
        path = target / f"{part['name']}.{languages[name]}.part"
        with damage_named(archive):
            lines[name] = write_text(name, stream, path, max_bytes)
    counts = ", ".join(f"{name} has {lines[name]:,}" for name in languages)
    if len(set(lines.values())) > 1:
        raise ValueError(f"{archive}: both sides must have the same number of lines, but {counts}")
    (count,) = set(lines.values())
    if count != part["lines"]:
        raise ValueError(f"{archive}: each side must have {part['lines']:,} lines, but {counts}")
    for language in languages.values():
        path = target / f"{part['name']}.{language}"
        path.with_name(path.name + ".part").rename(path)
    return count


def list_pair(manifest: dict, pair: str, mirror: str) -> None:
    """Print the archives and corpora of a pair, separated by tabs, with the settings last."""
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
        command.add_argument("--mirror", default="", help="address to use instead of statmt.org")
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
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
