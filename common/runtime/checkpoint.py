"""Checkpoints that survive a kill at any instant: a folder is complete and verified by SHA-256, or it is not loaded.

All is safetensors and JSON, which cannot run code. Only the process that holds the run folder's lock may write.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from common import log
from common.log import UserError, warn

MANIFEST, VERSION = "MANIFEST.json", 1
MARGIN = 64 * 2**20  # bytes that must be free before a checkpoint is begun, whose size is not known then
TRAINING_ONLY = {"optimizer.safetensors", "critic.safetensors"}  # what a published copy leaves out
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError)


def lock_run(run_dir: Path | str) -> FileLock:
    """Create and lock the run folder, settle what a crash left in it; it holds until release() or the process ends.

    UserError if another process holds it.
    """
    run_dir = Path(run_dir)
    path, lock = run_dir / ".lock", FileLock(run_dir / ".lock", blocking=False)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        with suppress(PermissionError):  # Windows lets nobody write into a locked file
            path.write_text(str(os.getpid()))
        for stray in sorted(run_dir.glob(".tmp-*")):
            _settle(stray)
        return lock
    except Timeout as error:
        try:
            owner = f"pid {path.read_text(errors='replace')}"
        except OSError:
            owner = "another process"
        raise UserError(f"run folder {run_dir} is locked by {owner}: wait for it or use another run name") from error
    except OSError as error:
        raise UserError(f"run folder {run_dir} cannot be locked: {error}") from error


def try_writing(run_dir: Path | str) -> None:
    """Write and remove a folder where the run's is or will be, as a checkpoint is written; UserError if that fails."""
    place = next(path for path in (Path(run_dir), *Path(run_dir).parents) if path.exists())
    trial = place / f".tmp-trial-{os.getpid()}"
    with commit(trial, {}, MARGIN):
        pass
    _settle(trial)


@contextmanager
def new_step(run_dir: Path | str, step: int, state: dict) -> Iterator[Path]:
    """Yield a folder to write into; it becomes run_dir/step-%06d, with state.json in it, whole or not at all.

    state: a dict that JSON can hold, written as it is when the body has ended. UserError if the folder cannot be
    written.
    """
    facts: dict = {"step": step}
    with commit(Path(run_dir) / f"step-{step:06d}", facts, MARGIN) as temp:
        yield temp
        (temp / "state.json").write_bytes(json.dumps(state).encode())
        facts["tensors"] = sorted(name.removesuffix(".safetensors") for name in TRAINING_ONLY if (temp / name).exists())


def load_state(folder: Path | str) -> dict:
    """Verify a step folder and return its state; UserError if it is damaged, or a published copy of one."""
    folder, manifest = Path(folder), verify(folder)
    absent = {"state.json", *(f"{stem}.safetensors" for stem in manifest["tensors"])} - set(manifest["files"])
    if absent:
        raise UserError(f"{folder} holds no {min(absent)}: resume from a step-* folder, not from a published copy")
    try:
        return json.loads((folder / "state.json").read_bytes())
    except UNREADABLE as error:
        raise UserError(f"{folder} cannot be read: {error!r}") from error


def verify(folder: Path | str, optional: bool = False) -> dict | None:
    """The manifest of a complete folder (`optional`: None without one); UserError names what is missing or changed."""
    folder, path = Path(folder), Path(folder) / MANIFEST
    if optional and not path.is_file():
        return None  # not a run's
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} does not exist or is not a folder")
    try:
        manifest = json.loads(_plain_file(folder, MANIFEST).read_bytes())
        if manifest.pop("sha256") != _digest(manifest) or manifest["version"] != VERSION:
            raise ValueError(f"damaged, or not of version {VERSION}")
        if folder.name.startswith("step-") and folder.name != f"step-{manifest['step']:06d}":
            raise ValueError(f"it is that of step {manifest['step']}, the folder was renamed")
        for name, expected in manifest["files"].items():
            path = _plain_file(folder, name)
            if (actual := {"bytes": path.stat().st_size, "sha256": sha256(path)}) != expected:
                raise UserError(f"{path} is damaged: {actual}, but {MANIFEST} says {expected}")
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error!r}") from error
    return manifest


def newest(run_dir: Path | str) -> Path | None:
    """Return the newest step folder that verifies, or None; each newer one that does not is warned about."""
    for folder in reversed(_steps(run_dir)):
        try:
            verify(folder)
            return folder
        except UserError as error:
            warn(f"checkpoint skipped: {error}", sys.stderr)
    return None


def prune(run_dir: Path | str, keep_last: int) -> None:
    """Remove all step folders but the newest `keep_last` (at least one) and the newest that verifies."""
    folders = _steps(run_dir)
    kept = {folder.name for folder in folders[-max(1, keep_last) :]}
    doomed = [folder for folder in folders if folder.name not in kept]
    spared = newest(run_dir) if doomed else None  # all of the kept ones may be damaged
    for folder in doomed:
        trash = folder.with_name(f".tmp-pruned-{folder.name}")  # a kill must not leave half a step folder
        try:
            if folder != spared:
                _settle(trash)
                os.rename(folder, trash)
                _settle(trash)
        except OSError as error:
            warn(f"old checkpoint {folder} cannot be removed: {error}", sys.stderr)


def publish(
    source_folder: Path | str, run_dir: Path | str, name: str, texts: Mapping[str, str] = MappingProxyType({})
) -> Path:
    """Copy a step folder without TRAINING_ONLY to run_dir/name, in place of an older copy, and return that path.

    texts: {name: content} of files to add.
    UserError if the source does not verify or the copy cannot be written. A kill between the two renames of a
    replacement leaves the old copy as .tmp-old-NAME, and the next lock_run puts it back.
    """
    source, final, manifest = Path(source_folder), Path(run_dir) / name, verify(source_folder)
    sizes = {file: facts["bytes"] for file, facts in manifest["files"].items() if file not in TRAINING_ONLY}
    with commit(final, {"step": manifest["step"], "tensors": manifest["tensors"]}, sum(sizes.values())) as temp:
        for file in sizes:
            (temp / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, temp / file)
        for file, content in texts.items():
            (temp / file).write_text(content, encoding="utf-8", newline="\n")
    return final


def truncate_log(path: Path | str, step: int) -> None:
    """Cut a JSONL log back to its whole records with record['step'] <= step; UserError if it cannot be rewritten."""
    path, kept = Path(path), []
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # torn
            if json.loads(line)["step"] <= step:
                kept.append(line.decode() + "\n")
    log.replace(path, "".join(kept))


def sha256(path: Path | str) -> str:
    """Return the hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def commit(final: Path, facts: dict, needed: int) -> Iterator[Path]:
    """Yield a temporary folder that is sealed and becomes `final` when the body ends well, and vanishes when not."""
    temp, old = final.with_name(f".tmp-{final.name}-{os.getpid()}"), final.with_name(f".tmp-old-{final.name}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(final.parent).free < needed:
            raise OSError("the disk is too full")
        _settle(temp)
        _settle(old)
        temp.mkdir()
        yield temp
        _seal(temp, facts)
        if os.path.lexists(final):  # a folder cannot be renamed over another: the old one steps aside
            os.rename(final, old)
        os.rename(temp, final)
        fsync(final.parent)
        _settle(old)
    except BaseException as error:
        free = shutil.disk_usage(next(path for path in final.parents if path.exists())).free  # as the failure left it
        shutil.rmtree(temp, ignore_errors=True)
        with suppress(OSError):
            _settle(old)
        # safetensors and tokenizers raise classes of their own for a system error, but Rust ends them all alike
        if isinstance(error, OSError) or "(os error " in str(error):
            raise UserError(f"cannot save {final}: {error} ({needed} bytes needed, {free} free)") from error
        raise


@contextmanager
def files_beside(target: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary folder whose files move beside `target` when the body ends well, `target` itself last, and
    that vanishes when not: where `target` is, the others are whole too."""
    trash = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    with commit(trash, {}, needed) as temp:
        yield temp
    try:
        names = [path.name for path in trash.iterdir() if path.name not in (MANIFEST, target.name)]
        for name in (*names, target.name):
            os.replace(trash / name, target.parent / name)
        fsync(target.parent)
    finally:
        _settle(trash)


def _seal(folder, facts):
    """Sync every file, then write the manifest last: its presence says that the rest is on the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        _plain_file(folder, name).chmod(folder.stat().st_mode & 0o666)  # safetensors' 0600 would lock out a server
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        fsync(path)
    manifest = {"version": VERSION, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1), encoding="utf-8")
    for path in (folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync(path)


def _settle(stray):
    """Put back an old copy whose successor never came; remove any other temporary entry, of a symlink the link."""
    home = stray.with_name(stray.name.removeprefix(".tmp-old-"))
    if home != stray and os.path.lexists(stray) and not os.path.lexists(home):
        os.rename(stray, home)
    elif stray.is_dir() and not stray.is_symlink():
        shutil.rmtree(stray)
    else:
        stray.unlink(missing_ok=True)


def _steps(run_dir):
    """The step folders by number, oldest first: plain folders named exactly as new_step names them."""
    named = [path for path in Path(run_dir).glob("step-*") if re.fullmatch("step-[0-9]{6,}", path.name)]
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=lambda p: int(p.name[5:]))


def _plain_file(folder, name):
    """Return folder/name if it is a plain file in it, reached through no symlink and no '..'; UserError otherwise."""
    path = folder / name
    if os.path.isfile(path) and not name.startswith(".."):
        if os.path.relpath(os.path.realpath(path), os.path.realpath(folder)) == name:
            return path
    raise UserError(f"{folder} is incomplete: {name!r} is missing or no plain file inside it")


def _digest(manifest):
    """The manifest's own SHA-256: a flipped bit in its `step` would pass every other check."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fsync(path: Path | str) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    windows = os.name == "nt"  # it opens no folder, and syncs only what it may write
    if windows and os.path.isdir(path):
        return
    fd = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        log.fsync(fd)
    finally:
        os.close(fd)
