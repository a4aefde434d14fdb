"""What is costly to make, kept for later runs under a hash of all that decides it, written whole or not at all."""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from common import dist, log
from common.log import UserError, say, warn
from common.runtime.checkpoint import fsync

GZIP = b"\x1f\x8b"  # how such a file begins


def root() -> Path:
    """Where converted bases, the tiny base, pairs and reference log-probs lie."""
    return Path(os.environ.get("GEMMA_ALIGNMENT_CACHE", "~/.cache/gemma-alignment")).expanduser()


def key(value: object, *modules: ModuleType) -> str:
    """SHA-256 of `value` (what JSON can hold) and of the source files of `modules`, whose code decides the result."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    for module in modules:
        digest.update(b"\0" + Path(module.__file__).read_bytes())
    return digest.hexdigest()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target` if it exists, else what build(folder) writes: under a lock, in a temporary folder, then renamed.

    A filled cache may be read-only; UserError if it has to be written and cannot be.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if not target.is_dir():
                _build(target, build)
    except OSError as error:
        todo = "set GEMMA_ALIGNMENT_CACHE to a folder that can"
        raise UserError(f"{target} cannot be written ({error.strerror or error}): {todo}") from error
    return target


def _build(target, build):
    folder = target.parent / f".tmp-{target.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        build(folder)
        for path in (*(path for path in folder.rglob("*") if path.is_file()), folder):
            fsync(path)
        folder.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def records(path: Path, name: str, make: Callable[[], list], needed: bool = False, head: dict | None = None) -> list:
    """The list of records (JSON) that make() returns, from the file `path` where it was left under the same `name`.

    make() runs on all ranks together or on none, and returns the same on each; the main rank writes. A damaged file is
    made anew, and said. Where it cannot be written that is a warning, unless the file is `needed`. head: what the first
    line says beside the name and the hash, for `read`.
    """
    kept = _kept(path, name) if dist.is_main() else None
    if dist.any_rank(kept is not None):
        return dist.gather_rows(kept or [])
    made = make()
    if dist.is_main():
        lines = [{"key": name, "sha256": _digest(made)} | (head or {}), *made]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log.replace_records(path, lines)
        except (OSError, UserError) as error:
            if needed:
                raise
            warn(f"not kept for the next run: {error}")
    return made


def read(path: Path) -> tuple[dict, list]:
    """(head, records) of a file that `records` wrote, packed by gzip or not. UserError where it is none, or damaged."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(GZIP) else content
        head, *rows = [json.loads(line) for line in content.splitlines()]
        if head["sha256"] != _digest(rows):
            raise ValueError("its lines are not those of its first one")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} cannot be read: no whole file of recorded answers ({reason})") from error
    return head, rows


def _kept(path, name):
    """The records of a file that was written under `name`; None where there are none."""
    if not path.is_file():
        return None
    try:
        head, rows = read(path)
    except UserError:
        say(f"{path} is damaged: made anew")
        return None
    return rows if head.get("key") == name else None


def _digest(rows):
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
