"""The input of `edge-slm batch`: JSONL, CSV, TSV or plain lines, in any encoding."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO

import edge_slm
from edge_slm_runtime.errors import DataError, EdgeSlmError
from edge_slm_runtime.files import copy_lines, read_lines

LONGEST_ROW = 256 << 10  # bytes in UTF-8; a group of rows is held in memory
SETTINGS = tuple(one.name for one in fields(edge_slm.Request))  # `request` among them
_ENDINGS = {
    ".csv": "csv",
    ".ndjson": "jsonl",
    ".tab": "tsv",
    ".tsv": "tsv",
    ".txt": "lines",
}
_DEEPEST = 64  # levels of JSON; json itself fails at some hundreds
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class InputLine:
    """One row of the input: a request, or its error.

    line: number of the line where the row begins, from 1. fields: name → value, as given.
    repeats: the line that had the same id before. request, n: once they were checked.
    """

    line: int
    fields: dict[str, Any] = field(default_factory=dict)
    error: EdgeSlmError | None = None
    repeats: int | None = None
    request: edge_slm.Request | None = None
    n: int = 1

    @property
    def id(self) -> str | int | None:
        """The row's own name; None when it has none, or none that can be used."""
        name = self.fields.get("id")
        return name if isinstance(name, str | int) and not _half_character(name) else None

    @property
    def others(self) -> dict[str, Any]:
        """The fields that are neither the id nor a setting of the request."""
        return {k: v for k, v in self.fields.items() if k not in ("id", "n", *SETTINGS)}


def format_of(source: Path) -> str:
    """A format by the ending of a file's name, `.gz` left out; JSONL for any other."""
    name = source.with_suffix("") if source.suffix.lower() == ".gz" else source
    return _ENDINGS.get(name.suffix.lower(), "jsonl")


@contextmanager
def open_input(source: Path, copy_to: Path | None) -> Iterator[BinaryIO]:
    """The input. For a resumable output a copy of it, which has no name, in the folder
    `copy_to`: what is computed must be what was hashed, whoever changes the file meanwhile."""
    with ExitStack() as stack:
        if str(source) == "-":
            stream: BinaryIO = sys.stdin.buffer
        else:
            try:
                stream = stack.enter_context(source.open("rb"))
            except OSError as error:
                raise DataError(f"cannot read {source}: {error.strerror}") from None
        if copy_to is not None:
            copy_to.mkdir(parents=True, exist_ok=True)
            copy = stack.enter_context(tempfile.TemporaryFile(dir=copy_to))
            copy_lines(stream, copy)
            copy.seek(0)
            stream = copy
        yield stream


def read_input(stream: BinaryIO, form: str, encoding: str | None) -> Iterator[InputLine]:
    """The rows of an input that are not blank, those with errors too.

    form: jsonl, csv, tsv or lines. encoding: None looks for a byte order mark and the zeros of
    UTF-16; without them it is UTF-8. Raises DataError when the input as a whole cannot be read.
    """
    seen: dict[bytes, int] = {}
    try:
        for row in _READERS[form](_in_utf8(_decompressed(_peekable(stream)), encoding)):
            yield _numbered(row, seen)
    except UnicodeError as error:  # that of a single line is its own error
        raise DataError(f"the input cannot be decoded: {error}", "see --encoding") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"the compressed input is cut or damaged: {error}") from None


def _numbered(row: InputLine, seen: dict[bytes, int]) -> InputLine:
    """The row with the line that had its id before, if one had."""
    if row.id is None:
        return row
    key = hashlib.blake2b(repr(row.id).encode(), digest_size=16).digest()  # ids may be long
    first = seen.setdefault(key, row.line)
    return row if first == row.line else replace(row, repeats=first)


def _peekable(stream: IO[bytes]) -> Any:
    """The stream with a method that shows its first bytes: those of files and of stdin have it."""
    return stream if hasattr(stream, "peek") else io.BufferedReader(stream)


def _decompressed(stream: Any) -> Any:
    return gzip.GzipFile(fileobj=stream) if stream.peek(2).startswith(_GZIP) else stream


def _in_utf8(stream: Any, encoding: str | None) -> IO[bytes]:
    """What is UTF-8 already is left as it is, so that a bad byte spoils its line alone."""
    encoding = encoding or json.detect_encoding(stream.peek(4)[:4])
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        return stream  # type: ignore[no-any-return]
    return io.BufferedReader(_Recoded(stream, encoding))


class _Recoded(io.RawIOBase):
    """A stream in another encoding, as UTF-8."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = None
        while not self._ready and piece != b"":
            piece = self._stream.read1(1 << 16)
            self._ready = self._decoder.decode(piece, final=not piece).encode()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _text(line: bytes) -> str:
    """Raises DataError."""
    if len(line) > LONGEST_ROW:
        raise DataError(f"longer than {LONGEST_ROW >> 10} KiB")
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not valid UTF-8 at byte {error.start}",
            "save it as UTF-8, or give its --encoding, such as cp1252",
        ) from None


def _per_line(read: Callable[[str], dict[str, Any]]) -> Callable[[IO[bytes]], Iterator[InputLine]]:
    """A reader of formats in which each line is a row."""

    def rows(stream: IO[bytes]) -> Iterator[InputLine]:
        for number, line in enumerate(read_lines(stream), 1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                try:
                    yield InputLine(number, read(_text(line)))
                except DataError as error:
                    yield InputLine(number, error=error)

    return rows


def _json_fields(line: str) -> dict[str, Any]:
    """Raises DataError."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a line of JSON: {error}") from None
    if not isinstance(data, dict):
        raise DataError("not a JSON object")
    level: list[Any] = [data]
    for _ in range(_DEEPEST):
        level = [value for one in level for value in _values(one)]
    if level:
        raise DataError(f"nested more than {_DEEPEST} levels deep")
    return data


def _values(data: Any) -> Any:
    return data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()


class _TableLines(Iterator[str]):
    """The lines that `csv.reader` asks for: `number` of them so far, and the `size` of the row."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines = read_lines(stream)
        self.number = self.size = 0

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.size += len(line)
        if self.size > LONGEST_ROW:
            raise DataError(f"longer than {LONGEST_ROW >> 10} KiB")
        return _text(line) + "\n"


def _table(delimiters: str) -> Callable[[IO[bytes]], Iterator[InputLine]]:
    """A reader of rows under a header, whose commonest of `delimiters` is that of the table."""

    def rows(stream: IO[bytes]) -> Iterator[InputLine]:
        lines = _TableLines(stream)
        header = next(filter(str.strip, lines), "")
        if header.lower().startswith("sep="):  # how spreadsheets note the delimiter
            header = next(lines, "")
        delimiter = max(delimiters, key=header.count)
        reader = csv.reader(
            chain([header], lines), delimiter=delimiter, skipinitialspace=True, strict=True
        )
        try:
            names = _column_names(next(reader, []))
        except csv.Error as error:
            raise DataError(f"the line of column names cannot be read: {error}") from None
        while True:
            first, lines.size = lines.number + 1, 0
            try:
                cells = next(reader)
                if any(cell.strip() for cell in cells):
                    yield InputLine(first, _cell_fields(names, cells))
            except StopIteration:
                return
            except csv.Error as error:
                open_quote = "is a quote left open?" if lines.number > first else ""
                yield InputLine(first, error=DataError(f"not a row: {error}", open_quote))
            except DataError as error:
                yield InputLine(first, error=error)

    return rows


def _column_names(header: list[str]) -> list[str]:
    """Those of settings in small letters, as a rule capitals in spreadsheets. Raises DataError."""
    names = [name.strip() for name in header]
    names = [low if (low := name.lower()) in ("id", "n", *SETTINGS) else name for name in names]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise DataError(f"two columns have the name {twice[0]!r}")
    if names and "request" not in names:
        raise DataError(
            f"no column is called 'request'; there are {', '.join(names)[:200]}",
            "the first line must name the columns; for a request per line give --format lines",
        )
    return names


def _cell_fields(names: list[str], cells: list[str]) -> dict[str, Any]:
    """Name → value of the cells that are not empty. Raises DataError."""
    if any(cells[len(names) :]):
        raise DataError(f"{len(cells)} cells for {len(names)} columns", "quote a cell with commas")
    pairs = zip(names, cells, strict=False)
    return {name: _value(name, cell) for name, cell in pairs if cell.strip() and name}


def _value(name: str, cell: str) -> Any:
    """A cell as the setting of that name; as it is when it cannot be, for the check to say so."""
    with suppress(ValueError, OverflowError, KeyError):
        return _KINDS[name](cell.strip())
    return cell


def _whole(cell: str) -> int:
    """Also 24.0: what programs write of a column of whole numbers with gaps."""
    with suppress(ValueError):
        return int(cell)
    number = float(cell)
    if not number.is_integer():
        raise ValueError
    return int(number)


_YES_NO = {"true": True, "false": False}
_KINDS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("words", "relevance", "top_k", "no_repeat_ngram_size", "seed"), _whole),
    **dict.fromkeys(("max_new_tokens", "n", "best_of"), _whole),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), float),
    **dict.fromkeys(("task", "syntax", "adapter"), str),  # without the spaces around it
    **dict.fromkeys(("ban", "keep", "choices"), lambda cell: [*map(str.strip, cell.split("|"))]),
    **dict.fromkeys(
        ("keep_length", "known_words", "logprobs", "no_repeat_words", "restate"),
        lambda cell: _YES_NO[cell.lower()],
    ),
}
_READERS: dict[str, Callable[[IO[bytes]], Iterator[InputLine]]] = {
    "jsonl": _per_line(_json_fields),
    "csv": _table(",;"),
    "tsv": _table("\t"),
    "lines": _per_line(lambda line: {"request": line}),
}
FORMATS = tuple(_READERS)


def _half_character(text: str | int) -> bool:
    return isinstance(text, str) and any("\ud800" <= char <= "\udfff" for char in text)
