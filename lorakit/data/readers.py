"""Readers: a data file as a table whose cells are what the file says.

The `datasets` library's own readers guess types (a string that looks like a date becomes one, 007 becomes 7) and keep what
they read by the file's time. These guess nothing and keep nothing.

JSON and JSON lines: strings are strings, numbers and booleans keep the text that they have in the file. CSV: commas, quoting as
in RFC 4180; TSV: tabs, and no quoting, as GLUE's files. A line that does not fit is an error with its place. Text: lines with
their line breaks. All are UTF-8, with or without a byte order mark, plain or compressed (gz, bz2, xz).
"""

from __future__ import annotations

import bz2
import csv
import gc
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorakit.data.table import DECODER, KEY, Builder, Table, cell_of
from lorakit.errors import RecipeError, RunError

OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What compressed files begin with; zip and zstd are not read.
PACKED = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"PK\x03\x04": ".zip",
    b"\x28\xb5\x2f\xfd": ".zst",
}
PARQUET = b"PAR1\x15"  # a text may well begin with PAR1
BZIP2_BLOCK = b"1AY&SY"  # at byte 4 of a bzip2 file that holds something; a text may well begin with BZh
# Byte order marks of encodings that are not read; UTF-32's begins with UTF-16's.
MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
ESCAPE = "\\u"  # how JSON writes a character by its number
LOOKED_AT = 1000  # lines in which is looked for what the first line holds
SENTENCE = 5  # words
NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?")
CONVERTED = (
    "in Python, pandas.read_csv(FILE, sep=';', dtype=str, keep_default_na=False)"
    ".to_json('NEW.jsonl', orient='records', lines=True) converts a file with semicolons"
)
SEMICOLONS = f"commas between columns; {CONVERTED}"
BLANK = re.compile(r"[ \t\r\n]*")  # what JSON has between values


def data_suffix(path: Path) -> str | None:
    """The suffix that says how a file is read, in small letters and without a compression's; None for no data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in OPENERS
    suffix = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if suffix not in READERS or (packed and suffix == ".parquet"):
        return None
    return suffix


def data_stem(path: Path) -> str:
    """The name of a data file without the suffixes that `data_suffix` reads."""
    name = path.stem if path.suffix.lower() in OPENERS else path.name
    return Path(name).stem


def read_file(path: Path) -> Table:
    """The rows of a data file. Raises RecipeError, with the line, for what the file should not hold; RunError for a file that can
    not be read at all."""
    suffix = data_suffix(path)
    if suffix is None:
        raise RecipeError.at(
            KEY, f"`{path}` is not a data file", f"a file ending in {', '.join(READERS)}, or that and .gz, .bz2, .xz"
        )
    try:
        if path.stat().st_size == 0:
            raise RecipeError.at(KEY, f"the file `{path}` is empty", "at least one row")
        _check_packing(path)
        # The objects of JSON's rows set off Python's collector, which would go through all that was imported again and again: a
        # third of the time.
        gc.freeze()
        try:
            return READERS[suffix](path)
        finally:
            gc.unfreeze()
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        what = f"`{path}` is not a whole compressed file: {error}"
        raise RecipeError.at(KEY, what, "all of the file, as it was compressed: fetch or copy it again") from error
    except OSError as error:
        if path.suffix.lower() == ".bz2":  # whose errors are no other than those of the disk
            raise RecipeError.at(KEY, f"`{path}` can not be read as {path.suffix[1:]}: {error}") from error
        raise RunError(f"`{path}` can not be read: {error.strerror or error}") from error


def first_line_is_data(path: Path) -> bool:
    """True if the first line of a CSV or TSV file looks like one of its rows, and not like the columns' names.

    A name is then a number, or also a cell of its own column, or a sentence. False for what can not be read.
    """
    suffix = data_suffix(path)
    if suffix not in (".csv", ".tsv"):
        return False
    found = _csv_records(path) if suffix == ".csv" else _tsv_records(path)
    try:
        names, *rows = islice((record for _, record in found if record), LOOKED_AT)
    except (RecipeError, OSError, EOFError, ValueError):
        return False
    return any(
        NUMBER.fullmatch(name.strip()) or len(name.split()) >= SENTENCE or any(row[column : column + 1] == [name] for row in rows)
        for column, name in enumerate(names)
    )


def _check_packing(path: Path) -> None:
    """Raises RecipeError where a file is compressed, or Parquet, and its name says otherwise."""
    with path.open("rb") as stream:
        start = stream.read(4 + len(BZIP2_BLOCK))
    if start.startswith(PARQUET) and data_suffix(path) != ".parquet":
        what = f"`{path}` is a Parquet file, though its name does not say so"
        raise RecipeError.at(KEY, what, "the same file with a name that ends in .parquet")
    packed = next((suffix for mark, suffix in PACKED.items() if start.startswith(mark)), None)
    last = path.suffix.lower()
    if last in OPENERS:
        if packed is None:
            what = f"`{path}` is not compressed, though its name ends in {path.suffix}"
            raise RecipeError.at(KEY, what, f"the same file named {path.stem}")
        if packed != last:
            what = f"`{path}` is compressed as {packed[1:]}, though its name ends in {path.suffix}"
            raise RecipeError.at(KEY, what, _named(path.with_suffix(""), packed))
    elif packed is not None and (packed != ".bz2" or start.endswith(BZIP2_BLOCK)):
        raise RecipeError.at(KEY, f"`{path}` is compressed ({packed[1:]})", _named(path, packed))


def _named(path: Path, packed: str) -> str:
    if packed in OPENERS and data_suffix(path) != ".parquet":
        return f"the same file named {path.name}{packed}"
    return "the file that is inside"


# -- lines ---------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its line break) of the file, cut at line feeds alone."""
    with OPENERS.get(path.suffix.lower(), _plain)(path) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                for mark, encoding in MARKS.items():
                    if line.startswith(mark):
                        raise _not_utf8(path, number, f"it is {encoding}", encoding)
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, f"the byte 0x{line[error.start]:02x} at byte {error.start + 1}") from error


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _not_utf8(path: Path, line: int, why: str, encoding: str = "ENCODING") -> RecipeError:
    remedy = f"UTF-8; `iconv -f {encoding} -t UTF-8` converts a file"
    return RecipeError.at(KEY, f"{path}:{line}: not UTF-8: {why}", remedy)


# -- text ----------------------------------------------------------------------------------------------------------------


def _text(path: Path) -> Table:
    builder = Builder()
    numbers = []
    for number, line in _lines(path):
        builder.add({"text": line})
        numbers.append(number)
    return builder.table(str(path), numbers)


# -- separated values ----------------------------------------------------------------------------------------------------


def _csv(path: Path) -> Table:
    return _separated(path, ",", _csv_records(path))


def _tsv(path: Path) -> Table:
    return _separated(path, "\t", _tsv_records(path))


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(the line that it begins in, cells) of every record; [] for a line without a character."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a text may well be longer than the module's 128 kB
    begin = number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for number, line in _lines(path):  # noqa: B007
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        begin = number + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            place = f"{path}:{begin}" if begin >= number else f"{path}:{begin} to {number}"
            why = "a carriage return outside of quotes" if "new-line" in str(error) else error
            raise RecipeError.at(
                KEY, f"{place}: not CSV: {why}", 'quotes around a whole cell, and "" for a quote in it'
            ) from error
        yield begin, record


def _tsv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in _lines(path):
        line = line.removesuffix("\n").removesuffix("\r")
        yield number, line.split("\t") if line else []


def _separated(path: Path, separator: str, records: Iterator[tuple[int, list[str]]]) -> Table:
    names = next((record for _, record in records if record), None)
    if names is None:
        raise RecipeError.at(KEY, f"the file `{path}` is empty", "a line with the columns' names, and at least one row")
    _check_names(path, names, separator)
    builder = Builder()
    numbers: list[int] = []
    blank: list[int] = []
    for number, record in records:
        if not record:
            blank.append(number)
            continue
        for line in blank if len(names) == 1 else ():  # between others, a line of one column is a row with an empty cell
            builder.add_cells(names, [""])
            numbers.append(line)
        blank = []
        if len(record) != len(names):
            what = f"{path}:{number}: {len(record)} cells, where the first line names {len(names)} columns"
            raise RecipeError.at(KEY, what, _remedy(names, record, separator))
        builder.add_cells(names, record)
        numbers.append(number)
    if not numbers:
        raise RecipeError.at(KEY, f"the file `{path}` has the columns' names and no rows", "at least one row")
    return builder.table(str(path), numbers)


def _check_names(path: Path, names: list[str], separator: str) -> None:
    if re.fullmatch("sep=.?", names[0]) and names[1:] in ([], [""]):
        what = f"{path}:1: `{separator.join(names)}` is for Excel, and not the columns' names"
        remedy = SEMICOLONS if ";" in names[0] else "the columns' names in the first line"
        raise RecipeError.at(KEY, what, f"no such line; {remedy}")
    empty = [i for i, name in enumerate(names, 1) if not name.strip()]
    if empty == [len(names)] and len(names) > 1:
        mark = "comma" if separator == "," else "tab"
        what = f"{path}:1: the line ends in a {mark}: column {len(names)} has no name"
        raise RecipeError.at(KEY, what, f"a name for it, or no {mark} at the ends of all lines")
    if empty:
        what = f"{path}:1: column {empty[0]} has no name"
        raise RecipeError.at(KEY, what, "a name for each column (pandas writes one without a name unless told `index=False`)")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise RecipeError.at(KEY, f"{path}:1: the column `{twice}` is there twice", "names that differ")
    other = next((mark for mark in (";", "\t", ",", "|") if mark in names[0]), None)
    if len(names) == 1 and other is not None:
        kind = "commas (.csv)" if separator == "," else "tabs (.tsv)"
        what = f"{path}:1: one column, named `{names[0]}`"
        if other == ";":
            raise RecipeError.at(KEY, f"{what}: separated by semicolons", SEMICOLONS)
        named = {"\t": "; of tabs, name it .tsv", ",": "; of commas, name it .csv"}.get(other, "")
        raise RecipeError.at(KEY, what, f"columns that are separated by {kind}{named}")


def _remedy(names: list[str], record: list[str], separator: str) -> str:
    """Remedy for a record whose number of cells is not the number of names."""
    if len(names) == 1:
        return f"the columns' names in the first line, which is `{names[0]}`; a quoted cell where it holds the separator"
    if separator == "," and any(";" in name for name in names):
        return f"as many as there are names; do semicolons separate the columns? Then, {CONVERTED}"
    if len(record) == len(names) + 1 and not record[-1]:
        return f"as many as there are names; no {'comma' if separator == ',' else 'tab'} at the end of a line"
    hint = "a quoted cell where it holds a comma" if separator == "," else "no tab in a cell: TSV is not quoted"
    return f"as many as there are names; {hint}"


# -- JSON ----------------------------------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Table:
    builder = Builder()
    numbers: list[int] = []
    for number, line in _lines(path):
        line = line.rstrip(" \t\r\n")
        start = _skip(line, 0)
        if start == len(line):
            continue
        try:
            row, end = DECODER.raw_decode(line, start)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, _skip(line, end))
        except json.JSONDecodeError as error:
            if not numbers and line.lstrip().startswith("["):
                raise _list_of_rows(path, number) from error
            raise RecipeError.at(
                KEY, f"{path}:{number}:{error.colno}: not JSON: {error.msg}", "one JSON object a line"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RecipeError.at(KEY, f"{path}:{number}: {_reason(error)}", "one JSON object a line") from error
        if not numbers and isinstance(row, list):
            raise _list_of_rows(path, number)
        if not isinstance(row, dict):
            raise RecipeError.at(KEY, f"{path}:{number}: a row must be a JSON object", "one JSON object a line")
        _add(builder, row, path, number, ESCAPE in line)
        numbers.append(number)
    return builder.table(str(path), numbers)


def _list_of_rows(path: Path, line: int) -> RecipeError:
    expected = "one JSON object a line; a list of rows is named .json"
    return RecipeError.at(KEY, f"{path}:{line}: a list, and not a row", expected)


def _add(builder: Builder, row: dict[str, Any], path: Path, line: int | None, escaped: bool) -> None:
    """Add a row of JSON. escaped: whether its source has escapes, without which there is no half of a surrogate pair."""
    if "" in row:
        raise RecipeError.at(KEY, f"{_place(path, line)}: a column without a name", "a name for each column")
    if escaped:
        try:
            for name, value in row.items():
                name.encode("utf-8")
                cell_of(value)[1].encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"{_place(path, line)}: a text has half of a surrogate pair (\\ud800 to \\udfff), which is no character"
            raise RecipeError.at(KEY, what, "both halves, or the character itself") from error
    builder.add(row)


def _place(path: Path, line: int | None) -> str:
    return str(path) if line is None else f"{path}:{line}"


def _json(path: Path) -> Table:
    """A list of rows; rows one after another; or one object around a list of rows, or around columns."""
    text = "".join(line for _, line in _lines(path))
    start, escaped = _skip(text, 0), ESCAPE in text
    builder = Builder()
    numbers: list[int] = []
    if start < len(text) and text[start] == "[":
        rows = _items(path, text, start)
    else:
        rows = _sequence(path, text, start)
        first = next(rows, None)
        if first is None:
            raise RecipeError.at(KEY, f"the file `{path}` is empty", "at least one row")
        if _skip(text, first[2]) == len(text):
            return _inside(path, first[1], text)
        rows = _again(first, rows)
    line, seen = 1, 0
    for place, row, _ in rows:
        line += text.count("\n", seen, place)
        seen = place
        if not isinstance(row, dict):
            raise RecipeError.at(KEY, f"{path}:{line}: a row must be a JSON object", "a list of objects, or an object a line")
        _add(builder, row, path, line, escaped)
        numbers.append(line)
    return builder.table(str(path), numbers)


def _inside(path: Path, whole: Any, text: str) -> Table:
    """The rows of a file that is one object: its one list of objects, or its lists of one length as columns."""
    expected = "a list of objects, one object a line, or one object with a single list of objects inside"
    if not isinstance(whole, dict):
        raise RecipeError.at(KEY, f"`{path}` holds no rows", expected)
    lists = {name: value for name, value in _below(whole) if _is_rows(value)}
    builder = Builder()
    if len(lists) == 1:
        for row in next(iter(lists.values())):
            _add(builder, row, path, None, ESCAPE in text)
        return builder.table(str(path))
    if lists:
        what = f"`{path}` holds {len(lists)} lists of rows: {', '.join(f'`{name}`' for name in lists)}"
        raise RecipeError.at(KEY, what, "one list a file; a folder with train.json and validation.json holds the splits of a set")
    columns = [value for value in whole.values() if isinstance(value, list)]
    if columns and len(columns) == len(whole) and len({len(column) for column in columns}) == 1 and columns[0]:
        for row in zip(*columns, strict=True):
            _add(builder, dict(zip(whole, row, strict=True)), path, None, ESCAPE in text)
        return builder.table(str(path))
    raise RecipeError.at(KEY, f"`{path}` is one object, and no list of rows is in it", expected)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _below(whole: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(its name, value) of what is inside an object, and inside objects in it, but not in lists."""
    for name, value in whole.items():
        yield name, value
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", item) for inner, item in _below(value))


def _items(path: Path, text: str, start: int) -> Iterator[tuple[int, Any, int]]:
    """(where it begins, value, where it ends) of the items of the list at `start`."""
    place = _skip(text, start + 1)
    if text[place : place + 1] != "]":
        while True:
            value, end = _value_at(path, text, place)
            yield place, value, end
            place = _skip(text, end)
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise _broken(path, text, place, "Expecting ',' delimiter")
            place = _skip(text, place + 1)
    place = _skip(text, place + 1)
    if place < len(text):
        raise _broken(path, text, place, "Extra data")


def _sequence(path: Path, text: str, place: int) -> Iterator[tuple[int, Any, int]]:
    """(where it begins, value, where it ends) of values that follow one another."""
    while place < len(text):
        value, end = _value_at(path, text, place)
        yield place, value, end
        place = _skip(text, end)


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _value_at(path: Path, text: str, place: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        raise _broken(path, text, error.pos, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError.at(KEY, f"{path}:{text.count(chr(10), 0, place) + 1}: {_reason(error)}", "rows as JSON") from error


def _broken(path: Path, text: str, place: int, why: str) -> RecipeError:
    found = json.JSONDecodeError(why, text, place)
    return RecipeError.at(KEY, f"{path}:{found.lineno}:{found.colno}: not JSON: {why}", "rows as JSON")


def _skip(text: str, place: int) -> int:
    found = BLANK.match(text, place)
    assert found is not None
    return found.end()


def _reason(error: Exception) -> str:
    return "lists and objects are nested too deeply" if isinstance(error, RecursionError) else str(error)


# -- Parquet -------------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Table:
    try:
        found = pq.ParquetFile(path).read()
    except (pa.ArrowException, ValueError) as error:
        raise RecipeError.at(KEY, f"{path}: {str(error).splitlines()[0]}", "rows as parquet") from error
    twice = next((name for i, name in enumerate(found.column_names) if name in found.column_names[:i]), None)
    if twice is not None:
        raise RecipeError.at(KEY, f"{path}: the column `{twice}` is there twice", "names that differ")
    return Table.from_arrow(found, str(path), _class_names(found.schema))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """{column of class numbers: names of its classes}, which the library `datasets` writes beside the columns of Parquet."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {name: about["names"] for name, about in features.items() if about.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # of somebody else, or none
        return {}
    return {name: names for name, names in named.items() if name in schema.names and pa.types.is_integer(schema.field(name).type)}


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text,
}
