"""Where a data set lies and which rows its files hold: a folder, one file, or `hub:OWNER/NAME[:SUBSET]` of the hub.

A folder holds train, val and test files: .jsonl (or .jsonl.gz), .json (an array, or lines) or .parquet, or their parts
as the hub names them. UTF-8, with or without a byte order mark; lines end with or without a carriage return.
"""

import codecs
import functools
import glob
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from common import log
from common.log import UserError

MAX_LINE = 4 * 2**20  # bytes
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "dev", "eval"), "test": ("test",)}
EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
SHARD = r"(-\d+-of-\d+(-\w+)?)?"  # how the hub names the parts of a split


# ---------------------------------------------------------------- where the files lie


def files(source: Path | str) -> dict[str, list[Path]]:
    """{split: its files} of a source; a file alone is train. Empty if there is no such folder; UserError as it says."""
    if str(source).startswith("hub:"):
        return _hub_files(str(source))
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(EXTENSIONS):
            raise UserError(f"{path}: expected a file of {', '.join(EXTENSIONS)}")
        return {"train": [path]}
    names = [each.relative_to(path).as_posix() for part in (path, path / "data") for each in part.glob("*")]
    return {split: [path / name for name in chosen] for split, chosen in split_files(names, ("", "data")).items()}


def split_files(names: list[str], folders: tuple, suffix: str = "") -> dict[str, list[str]]:
    """{split: names of its files, or of its parts} in the first of the folders that has any; an empty dict if none."""
    for folder in folders:
        chosen = {}
        for split, words in SPLITS.items():
            for word, extension in itertools.product(words, EXTENSIONS):
                pattern = re.escape(f"{folder}/" if folder else "") + word + suffix + SHARD + re.escape(extension)
                matching = sorted(name for name in names if re.fullmatch(pattern, name))
                if matching and split not in chosen:
                    chosen[split] = matching
        if chosen:
            return chosen
    return {}


@functools.cache
def _hub_files(address):
    """As files, of a data set of the hub; asked for once in a process, so that all splits are of one state of it."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from common.runtime import base

    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?::([\w.-]+(?:/[\w.-]+)*))?", address)
    if not match:
        raise UserError(f"dataset_path: expected hub:OWNER/NAME or hub:OWNER/NAME:SUBSET, got {address!r:.80}")
    repo, subset = match.groups()
    try:
        try:
            names = HfApi().list_repo_files(repo, repo_type="dataset")
        except HfHubHTTPError:
            raise
        except Exception:  # offline, or no network: the folder of what was downloaded before
            kept = Path(snapshot_download(repo, repo_type="dataset", local_files_only=True, allow_patterns=["-"]))
            names = [path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()]
        chosen = _of_subset(names, address, subset)
        patterns = [glob.escape(name) for part in chosen.values() for name in part]
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except UserError:
        raise
    except Exception as error:
        todo = base.hub_remedy(error, f"https://huggingface.co/datasets/{repo}")
        raise UserError(f"dataset_path: cannot load {address}: {todo}") from error
    return {split: [folder / name for name in part] for split, part in chosen.items()}


def _of_subset(names, address, subset):
    """The files of a data set's subset: its folder, or files that end with its name, as `train_prefs`."""
    if subset:
        chosen = split_files(names, (subset, f"data/{subset}", f"{subset}/data"))
        chosen = chosen or split_files(names, ("", "data"), f"_{re.escape(subset)}")
    else:
        chosen = split_files(names, ("", "data", "default"))
    if chosen:
        return chosen
    here = [name for name in names if name.rpartition("/")[0] == (subset or "") and name.endswith(EXTENSIONS)]
    if len(here) == 1:
        return {"train": here}
    words = "|".join(word for each in SPLITS.values() for word in each)
    subsets = set()
    for name in names:
        folder, _, last = name.rpartition("/")
        split = re.fullmatch(rf"(?:{words})(?:_(\w+?))?{SHARD}({'|'.join(map(re.escape, EXTENSIONS))})", last)
        if split:
            subsets.add(split[1] or folder.removeprefix("data/"))
    hint = f"name one of its subsets, as {address.rpartition(':')[0] if subset else address}:SUBSET: "
    raise UserError(
        f"dataset_path: {address} has no files named train, val or test with {', '.join(EXTENSIONS)}; "
        + (hint + log.listed(sorted(subsets)) if subsets else f"it has {log.listed(sorted(names)) or 'none'}")
    )


# ---------------------------------------------------------------- rows of a file


def rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place as file:line, row) of a file; every fault is a UserError naming both."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4096)
            if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                yield from _items(start + file.read(), path)
                return
            file.seek(0)
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > MAX_LINE:
                    raise UserError(f"{where}: the line is longer than {MAX_LINE} bytes")
                if number == 1:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise UserError(f"{where}: the file is UTF-16: save it as UTF-8")
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield where, _parsed(line, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked ({error})") from error


def _parsed(line, where):
    try:
        row = json.loads(line.decode("utf-8"))
        _check_text(row, b"\\u" in line)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from error
    return _object(row, where)


def _check_text(row, escaped):
    """ValueError for half of a surrogate pair, which is no text; only an escape can write one."""
    if escaped:
        json.dumps(row, ensure_ascii=False).encode("utf-8")


def _not_json(where, error):
    return UserError(f"{where}: not a JSON record in UTF-8 ({str(error)[:80]})")


def _object(row, where):
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, got {type(row).__name__}")
    return row


def _items(content, path):
    """(place, row) of a JSON array."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_json(f"{path}:{content.count(10, 0, error.start) + 1}", error) from error
    for where, row, escaped in json_rows(text, path):
        try:
            _check_text(row, escaped)
        except (ValueError, RecursionError) as error:
            raise _not_json(where, error) from error
        yield where, row


def json_rows(text: str, name: Path | str) -> Iterator[tuple[str, dict, bool]]:
    """(name:line, object, is there an escape in it) of JSON lines or of a JSON list, one by one: that keeps the line.

    UserError where something is no object.
    """
    position, end = 0, len(text)
    if text.lstrip().startswith("["):
        if not text.rstrip().endswith("]"):
            raise UserError(f"{name}:{text.count(chr(10)) + 1}: the list does not end, the file is cut off")
        position, end = text.index("[") + 1, text.rindex("]")
    decoder, gap, line, start = json.JSONDecoder(), re.compile(r"[\s,]*"), 1, 0
    while (begin := gap.match(text, position).end()) < end:
        line, start = line + text.count("\n", start, begin), begin
        where = f"{name}:{line}"
        try:
            value, position = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            raise _not_json(where, error) from error
        yield where, _object(value, where), text.find("\\u", begin, position) >= 0


def _parquet_rows(path):
    """(place, row) of a parquet file, whose rows are numbered from 1; columns without a value are left out."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in json.loads(json.dumps(batch.to_pylist(), default=str)):  # dates and bytes become text
                    number += 1
                    yield f"{path}:{number}", {key: value for key, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error)[:80]})") from error
