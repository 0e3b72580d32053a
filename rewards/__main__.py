"""`python -m rewards [NAME ...] [--wide] [--json]`: prints the list of rewards (rewards.listing)."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rewards.listing import Entry, cells, named

WIDTH = 100  # columns of the table without --wide
NARROW = ("reward", "reads", "scope", "range", "channels", "gradient", "memory")
NOTES = """\
"of parts": as the rewards that it is made of; "as set": by its arguments. Other values are those of the default arguments.
reads: beside prompts and metadata. gradient: to what it reads. memory: of its weights on a GPU: cpu none, S less than 2 GB, M 2
to 8, L 8 to 20, XL more, or a server's. With a NAME: all columns of one reward, licence and checkpoint among them."""


def command(arguments: Sequence[str]) -> int:
    """Prints the rewards. Exit code 0. ValueError for an unknown name or option."""
    parser = argparse.ArgumentParser(
        prog="rewards", description=__doc__, exit_on_error=False, allow_abbrev=False, add_help=False
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--json", action="store_true")
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise ValueError(f"got {' '.join(unknown)}; expected [NAME ...] [--wide] [--json]")
    found = named(given.names)
    if given.json:
        print(json.dumps([asdict(entry) for entry in found], indent=1, ensure_ascii=False))
    elif given.names and not given.wide:
        print("\n\n".join(record(entry) for entry in found))
    else:
        print("\n".join(table(found, wide=given.wide)))
    return 0


def record(entry: Entry) -> str:
    """All columns of one reward, a line each."""
    lines = {"": f"rewards.{entry.name}: {entry.about}", "kind": entry.kind, **cells(entry)}
    del lines["reward"]
    return "\n".join(
        textwrap.fill(text, WIDTH, initial_indent=f"  {name:12}" if name else "", subsequent_indent=" " * 14)
        for name, text in lines.items()
    )


def table(found: Sequence[Entry], *, wide: bool) -> Iterator[str]:
    """The lines of a table, kind by kind; wide: with checkpoints, licences and all names of channels."""
    rows = [cells(entry) for entry in found]
    if not wide:
        rows = [
            {**{key: row[key] for key in NARROW}, "channels": _count(entry.channels)}
            for entry, row in zip(found, rows, strict=True)
        ]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    yield _line({key: key for key in widths}, widths)
    kind = ""
    for entry, row in zip(found, rows, strict=True):
        if entry.kind != kind:
            kind = entry.kind
            yield f"\n{kind}"
        yield _line(row, widths)
    yield f"\n{textwrap.fill(NOTES, WIDTH)}"


def _count(channels: tuple[str, ...] | str) -> str:
    return channels if isinstance(channels, str) else str(max(1, len(channels)))


def _line(row: dict[str, str], widths: dict[str, int]) -> str:
    return "  ".join(f"{row[key]:{width}}" for key, width in widths.items()).rstrip()


def main(arguments: Sequence[str]) -> int:
    """The exit code of `python -m rewards`: 2 for an unknown name or option."""
    try:
        return command(arguments)
    except (ValueError, argparse.ArgumentError) as error:
        print(f"python -m rewards: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
