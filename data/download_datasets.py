"""Fetch the tasks' public data sets, check them, and write one JSONL file a split, each row the same record:

    {"id", "prompt": [{"role", "content"}, ...], "response", "rejected" or null, "reference"}

    python data/download_datasets.py --dataset safety --splits train,val,test
    python data/download_datasets.py --dataset all --source MIRROR          # a folder or a URL prefix

Writes D/<task>/*.jsonl and D/<task>/report.json and keeps the publisher's files in D/raw/<task>/, where D is this
folder or --output-dir. Standard library only; a download that was cut off goes on where it stopped.
"""

import argparse
import csv
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import sys
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import tasks
from common.log import UserError, command
from common.runtime import sources
from common.tasks import prompt_hash

TASKS = {name: task for name in tasks.NAMES if (task := tasks.load(name)).files}
SPLITS = ("test", "val", "train")  # each is kept apart from those before it
MAX_FILE_BYTES, MAX_UNPACKED_BYTES = 256 << 20, 512 << 20  # of one download; of one file after gunzip or unzip
MAX_SECONDS = 3600  # of all downloads together
SOCKET_SECONDS, TRIES, BACKOFF_SECONDS = 30, 4, 1.0


class SafeRedirect(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http(s) only, and never from https down to http."""

    def redirect_request(self, req, *rest):
        if not rest[-1].startswith(("https://", req.type + "://")):
            raise UserError(f"{req.full_url}: refused a redirect to {rest[-1][:200]}")
        return super().redirect_request(req, *rest)


def receive(url, part, deadline):
    """One request: append to the file `part` what it lacks, or start it over if the server sends it whole."""
    origin = part.with_name(part.name + ".origin")  # the URL that `part` came from, and its ETag
    came_from, etag = origin.read_text().partition("\n")[::2] if part.exists() and origin.exists() else ("", "")
    have = part.stat().st_size if came_from == url else 0  # one mirror's file never goes on with another's bytes
    headers = {"Range": f"bytes={have}-"} | ({"If-Range": etag} if etag else {}) if have else {}
    request = urllib.request.Request(url, headers={"User-Agent": "download_datasets"} | headers)
    with urllib.request.build_opener(SafeRedirect).open(request, timeout=SOCKET_SECONDS) as reply:
        resumed = reply.status == 206
        if resumed and not (reply.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise OSError("the server sent another range than it was asked for")
        size = have if resumed else 0
        length = reply.headers.get("Content-Length") or ""
        total = size + int(length) if length.isdecimal() else None
        origin.write_text(f"{url}\n{reply.headers.get('ETag') or ''}")
        with open(part, "ab" if size else "wb") as out:
            while chunk := reply.read1(1 << 16):  # read1 hands over what is there, so a drip meets the deadline
                size += len(chunk)
                if max(size, total or 0) > MAX_FILE_BYTES:
                    part.unlink()
                    raise UserError(f"{url}: more than {MAX_FILE_BYTES:,} bytes, refused; nothing was kept")
                if time.monotonic() > deadline:
                    raise UserError(f"{url}: not here after {MAX_SECONDS} s; the same command goes on where it stopped")
                out.write(chunk)
    if total is not None and size != total:
        raise OSError(f"connection closed at {size:,} of {total:,} bytes")


def download(url, part, deadline):
    """`receive` with a few tries: a cut connection resumes, a 4xx answer is final. A mirror may hold NAME.gz."""
    for attempt in range(TRIES):
        time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1) if attempt else 0)
        try:
            return receive(url, part, deadline)
        except (OSError, http.client.HTTPException) as error:
            problem, code = error, getattr(error, "code", 500)
            if code == 416:  # `part` is longer than the file, so it is of another file
                part.unlink(missing_ok=True)
            elif code < 500 and code not in (408, 429):
                break
    if code == 404 and not url.endswith((".gz", ".zip")):
        packed = part.with_suffix(".gz")
        try:
            download(f"{url}.gz", packed, deadline)
        except UserError as error:
            raise UserError(f"{url}: {problem}; {error}") from error
        part.write_bytes(unpack(packed, ""))
        return packed.unlink()
    raise UserError(f"{url}: {problem}; run the same command again to go on, or name a mirror with --source")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def obtain(address, pinned, raw, recorded, deadline):
    """Bring a file to the folder `raw` and check its hash; one that is there and right costs no request.

    A mirror may hold NAME.gz in place of NAME: it is unpacked, and the hash is that of NAME.
    """
    name = address.rsplit("/", 1)[1]
    target, part = raw / name, raw / f"{name}.part"
    known = pinned or recorded.get(name)
    if "://" in address and known and target.is_file() and sha256(target) == known:
        return target
    print(f"  fetching {address}", flush=True)
    raw.mkdir(parents=True, exist_ok=True)
    if "://" in address:
        download(address, part, deadline)
    elif Path(address).is_file():
        part.write_bytes(Path(address).read_bytes())
    elif Path(address + ".gz").is_file():
        part.write_bytes(unpack(Path(address + ".gz"), ""))
    else:
        raise UserError(f"{address}: no such file; data/README.md shows the layout that --source needs")
    got = sha256(part)
    if known and got != known:
        part.unlink()
        how = "is pinned" if pinned else f"was recorded in {raw / 'sha256.json'} when it first arrived"
        raise UserError(f"{address}: sha256 is {got}, but {known} {how}; nothing was kept")
    os.replace(part, target)
    for origin in raw.glob(f"{name}*.origin"):
        origin.unlink()
    return target


def unpack(path, member):
    """A file's bytes, out of .gz or out of one member of a .zip; nothing is extracted to disk, no other member read."""
    try:
        if member:
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if info.filename == member]
                # kind: none or regular; method: stored or deflated, as the others ignore the bound that `read` is given
                plain = [
                    info for info in members if info.external_attr >> 28 in (0, 8) and info.compress_type in (0, 8)
                ]
                if not len(members) == len(plain) == 1:
                    raise UserError(f"{path}: {member} is not in it exactly once as a plain file")
                with archive.open(members[0]) as file:
                    data = file.read(MAX_UNPACKED_BYTES + 1)
        else:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                data = file.read(MAX_UNPACKED_BYTES + 1)
    except (zipfile.BadZipFile, RuntimeError, zlib.error, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); delete it and run again") from error
    if len(data) > MAX_UNPACKED_BYTES:
        raise UserError(f"{path}: {member or 'it'} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
    return data


def csv_rows(text, name):
    """(name:line, dict) of a CSV file with a header; the line is the row's first."""
    reader, line = csv.DictReader(io.StringIO(text, newline=""), strict=True), 2
    try:
        for row in reader:
            where = f"{name}:{line}"
            if None in row or None in row.values():
                raise UserError(f"{where}: another number of cells than the header has")
            yield where, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}:{line}: {error}") from error


def read_rows(task, split, path, member):
    """The records of one of the publisher's files, and what was dropped."""
    name, data = member or path.name, unpack(path, member)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{data.count(10, 0, error.start) + 1}: byte {error.start} is not UTF-8") from error
    records, dropped, flagged = {}, {}, {}
    rows = csv_rows(text, name) if task.rows == "csv" else sources.json_rows(text, name)
    for index, (where, row, *_) in enumerate(rows):
        parsed = task.read(row, where, index)
        reason = parsed if isinstance(parsed, str) else parsed.flag
        # a flagged row is never trained on; it is kept in test, so that scores compare with others'
        if isinstance(parsed, str) or (reason and split != "test"):
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        key = f"{task.name}-{split}-{parsed.id}"
        if key in records:
            raise UserError(f"{where}:ID: {parsed.id!r} stands twice")
        if reason:
            flagged[key] = reason
        records[key] = {"id": key, "prompt": parsed.prompt, "response": parsed.response, "rejected": parsed.rejected}
        records[key]["reference"] = parsed.response if parsed.reference is None else parsed.reference
    if not records:
        raise UserError(f"{path}: {member or 'the file'} is empty or has no usable row")
    facts = {"rows": len(records) + sum(dropped.values()), "dropped": dropped, "flagged": [*flagged]}
    return list(records.values()), facts


def clean_split(rows, before):
    """Drop exact duplicates, and rows whose prompt stands in one of the splits `before`, {name: rows}."""
    taken = {prompt_hash(row): name for name, others in reversed(before.items()) for row in others}
    overlap, kept = {name: [] for name in before}, {}
    for row in rows:
        digest = prompt_hash(row)
        if digest in taken:
            overlap[taken[digest]].append(digest)
        else:
            kept.setdefault(json.dumps([row["prompt"], row["response"], row["rejected"]]), row)
    counts = {name: {"rows": len(digests), "prompts": len(set(digests))} for name, digests in overlap.items()}
    duplicates = len(rows) - len(kept) - sum(map(len, overlap.values()))
    return [*kept.values()], {"rows": len(rows), "duplicates": duplicates, "also_in": counts, "kept": len(kept)}


def read_json(path):
    """An object that an earlier run wrote, {} if there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not what this script wrote; delete it, the next run writes it anew") from error


def gather(task, splits, source, raw, deadline):
    """Records by split, facts by file, all hashes. What a split holds never depends on which others were asked for."""
    files, rows, recorded = {}, {}, read_json(raw / "sha256.json")
    hashes = dict(recorded)
    # every split is kept apart from those before it, so their files are needed too
    asked = SPLITS[: 1 + max(SPLITS.index(split) for split in splits)]
    for split in dict.fromkeys(split if split in task.files else "train" for split in asked):
        pinned = task.files[split].sha256
        address, _, member = task.files[split].address.partition("#")
        if source:
            address = f"{source.rstrip('/')}/{task.mirror}/{(member or address).rsplit('/', 1)[1]}"
            member = ""
        path = obtain(address, pinned, raw, hashes, deadline)
        status = "pinned" if pinned else "as recorded" if path.name in recorded else "recorded now"
        hashes[path.name] = sha256(path)
        rows[split], facts = read_rows(task, split, path, member)
        files[split] = {"source": address, "sha256": hashes[path.name], "hash": status} | facts
    if "val" in asked and "val" not in rows:  # cut about 5 %, by the prompt alone: rows of one prompt stay together
        held_out = {row["id"] for row in rows["train"] if int(prompt_hash(row)[:8], 16) % 20 == 0}
        rows["val"] = [row for row in rows["train"] if row["id"] in held_out]
        rows["train"] = [row for row in rows["train"] if row["id"] not in held_out]
    return rows, files, hashes


def prepare(task, splits, source, output, deadline):
    """One task from the publisher's files to ours; returns its report, which keeps what it said of other splits."""
    folder, raw = output / task.name, output / "raw" / task.name
    print(f"{task.name}: licence {task.licence}, to {folder}", flush=True)
    rows, files, hashes = gather(task, splits, source, raw, deadline)
    for facts in files.values():
        print(f"  {facts['source']}: {facts['rows']:,} rows, sha256 {facts['sha256'][:12]}... {facts['hash']}")
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items()) or "none"
        if facts["dropped"] or facts["flagged"]:
            print(f"    dropped: {dropped}; kept in test though others are dropped for it: {len(facts['flagged'])}")
    old, done, contents = read_json(folder / "report.json"), {}, {}
    for split in splits:
        kept, facts = clean_split(rows[split], {name: rows[name] for name in SPLITS[: SPLITS.index(split)]})
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        contents[folder / f"{split}.jsonl"] = text
        done[split] = facts | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
        shared = [f", {overlap['rows']:,} whose prompt is in {name}" for name, overlap in facts["also_in"].items()]
        print(f"  {split}: {len(kept):,} kept; dropped {facts['duplicates']:,} duplicates{''.join(shared)}")
    files, done = old.get("files", {}) | files, old.get("splits", {}) | done
    report = {"task": task.name, "licence": task.licence, "files": files, "splits": done}
    contents[folder / "report.json"] = json.dumps(report, indent=2) + "\n"
    contents[raw / "sha256.json"] = json.dumps(hashes, indent=2) + "\n"
    for path, text in contents.items():  # all in full beside their places before any is renamed
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".tmp").write_text(text, encoding="utf-8", newline="\n")
    for path in contents:
        os.replace(path.with_name(path.name + ".tmp"), path)
    return report


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=[*TASKS, "all"])
    parser.add_argument("--splits", default="train,val,test", help="comma-separated, of train, val and test")
    parser.add_argument("--source", help="mirror in place of the publishers: a folder or an http(s) URL prefix")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args(argv)
    output = args.output_dir.expanduser()  # `~` in quotes too
    splits, source = args.splits.split(","), os.path.expanduser(args.source or "")
    if set(splits) - set(SPLITS):
        raise UserError(f"--splits {args.splits}: expected some of train,val,test")
    if source and not re.match("https?://", source) and not Path(source).is_dir():
        raise UserError(f"--source {args.source}: expected a folder, or an address with http:// or https:// in front")
    deadline, names = time.monotonic() + MAX_SECONDS, [*TASKS] if args.dataset == "all" else [args.dataset]
    return {name: prepare(TASKS[name], splits, source, output, deadline) for name in names}


if __name__ == "__main__":
    main()
