"""Fetch the three public data sets, check them, and write one JSONL file a split, each row the same record:

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

from common.log import UserError, command

HH = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/harmless-base/"
MTS = "https://raw.githubusercontent.com/abachaa/MTS-Dialog/main/Main-Dataset/MTS-Dialog-"
CONALA = "https://www.phontron.com/download/conala-corpus-v1.1.zip"  # what conala-corpus.github.io links to
FILES = {  # behind # stands the member of an archive; a mirror holds it as a file of its own
    "safety": {"test": HH + "test.jsonl.gz", "train": HH + "train.jsonl.gz"},
    "clinical": {
        "test": MTS + "TestSet-1-MEDIQA-Chat-2023.csv",
        "val": MTS + "ValidationSet.csv",
        "train": MTS + "TrainingSet.csv",
    },
    "conala": {
        "test": CONALA + "#conala-corpus/conala-test.json",
        "train": CONALA + "#conala-corpus/conala-train.json",
    },
}
MIRROR_FOLDERS = {"safety": "hh-rlhf/harmless-base", "clinical": "mts-dialog", "conala": "conala"}
LICENCES = {"safety": "MIT", "clinical": "CC BY 4.0", "conala": "CC BY-SA 4.0"}
SPLITS = ("test", "val", "train")  # each is kept apart from those before it
PINNED = {  # only of files known to be the publishers' own; other hashes are recorded when the file first arrives
    "test.jsonl.gz": "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    "MTS-Dialog-TrainingSet.csv": "65a28681dd59fc159681ea026e44610f2af7bc64a0e7f892d763eb03d9f503dc",
    "MTS-Dialog-ValidationSet.csv": "227206520c4534381c0d7fba6d3f09319a9af5a6d9603a93c0341af1198e3958",
    "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv": "b4d38dd2c99b2e9860099abcf653f1e0f3e9b69f9fcc45be2a2699b37a4d2f37",
}
MAX_FILE_BYTES, MAX_UNPACKED_BYTES = 256 << 20, 512 << 20  # of one download; of one file after gunzip or unzip
MAX_TEXT_CHARS, MAX_SECONDS = 1_000_000, 3600  # of one text in a row; of all downloads together
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
    came_from, etag = origin.read_text().split("\n") if part.exists() and origin.exists() else ("", "")
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
    """`receive` with a few tries: a cut connection resumes, a 4xx answer is final."""
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
    raise UserError(f"{url}: {problem}; run the same command again to go on, or name a mirror with --source")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def obtain(address, raw, recorded, deadline):
    """Bring a file to the folder `raw` and check its hash; one that is there and right costs no request."""
    name = address.rsplit("/", 1)[1]
    target, part = raw / name, raw / f"{name}.part"
    known = PINNED.get(name) or recorded.get(name)
    if "://" in address and known and target.is_file() and sha256(target) == known:
        return target
    print(f"  fetching {address}", flush=True)
    raw.mkdir(parents=True, exist_ok=True)
    if "://" in address:
        download(address, part, deadline)
    elif Path(address).is_file():
        part.write_bytes(Path(address).read_bytes())
    else:
        raise UserError(f"{address}: no such file; data/README.md shows the layout that --source needs")
    got = sha256(part)
    if known and got != known:
        part.unlink()
        how = "is pinned" if name in PINNED else f"was recorded in {raw / 'sha256.json'} when it first arrived"
        raise UserError(f"{address}: sha256 is {got}, but {known} {how}; nothing was kept")
    os.replace(part, target)
    part.with_name(part.name + ".origin").unlink(missing_ok=True)
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


def json_rows(text, name):
    """(line, object) of JSON lines or of a JSON list, which is read item by item because that keeps the line."""
    position, end = 0, len(text)
    if text.lstrip().startswith("["):
        if not text.rstrip().endswith("]"):
            raise UserError(f"{name}:{text.count(chr(10)) + 1}: the list does not end, the file is cut off")
        position, end = text.index("[") + 1, text.rindex("]")
    decoder, gap, line, start = json.JSONDecoder(), re.compile(r"[\s,]*"), 1, 0
    while (begin := gap.match(text, position).end()) < end:
        line, start = line + text.count("\n", start, begin), begin
        try:
            row, position = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}:{line}: not JSON ({getattr(error, 'msg', error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{name}:{line}: expected an object, found {type(row).__name__}")
        yield line, row


def csv_rows(text, name):
    """(line, dict) of a CSV file with a header; the line is the row's first."""
    reader, line = csv.DictReader(io.StringIO(text, newline=""), strict=True), 2
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{name}:{line}: another number of cells than the header has")
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}:{line}: {error}") from error


def text_of(row, key, where):
    """row[key], if it is a text that can be trained on and written back."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}:{key}: expected text, found {type(value).__name__ if key in row else 'no such key'}")
    if len(value) > MAX_TEXT_CHARS or re.search("[\0\ud800-\udfff]", value):
        raise UserError(f"{where}:{key}: holds a NUL, half a surrogate pair or more than {MAX_TEXT_CHARS:,} characters")
    return value


def split_dialogue(text):
    """Turns of an HH dialogue; whether they alternate, with nothing in front; and the last text."""
    before, *rest = re.split(r"\n\n(Human|Assistant):", text)
    roles = ["user" if speaker == "Human" else "assistant" for speaker in rest[::2]]
    turns = [{"role": role, "content": said.strip()} for role, said in zip(roles, rest[1::2])]
    alternate = bool(turns) and not before.strip() and roles == ["user", "assistant"] * (len(roles) // 2)
    return turns, alternate, turns[-1]["content"] if turns else ""


def read_safety(row, where, index):
    """HH-RLHF harmless-base: two dialogues that should differ in the last answer only."""
    chosen, chosen_alternates, answer = split_dialogue(text_of(row, "chosen", where))
    rejected, rejected_alternates, rejected_answer = split_dialogue(text_of(row, "rejected", where))
    faults = {
        "prompts differ": chosen[:-1] != rejected[:-1],
        "roles do not alternate": not (chosen_alternates and rejected_alternates),
        "chosen answer is empty": not answer,
        "rejected answer is empty": not rejected_answer,
        "answers are equal": answer == rejected_answer,
        "a turn of the prompt is empty": not all(turn["content"] for turn in chosen[:-1]),
    }
    return next(
        (reason for reason, present in faults.items() if present), (index, chosen[:-1], answer, rejected_answer)
    )


SECTIONS = dict(  # the 20 section headers of MTS-Dialog in words
    pair.split("=")
    for pair in (
        "ALLERGY=allergies;ASSESSMENT=assessment;CC=chief complaint;DIAGNOSIS=diagnosis;DISPOSITION=disposition;"
        "EDCOURSE=emergency department course;EXAM=physical examination;FAM/SOCHX=family and social history;"
        "GENHX=history of present illness;GYNHX=gynecologic history;IMAGING=imaging;IMMUNIZATIONS=immunizations;"
        "LABS=laboratory results;MEDICATIONS=medications;OTHER_HISTORY=other history;PLAN=plan;PROCEDURES=procedures;"
        "PASTMEDICALHX=past medical history;PASTSURGICAL=past surgical history;ROS=review of systems"
    ).split(";")
)


def read_clinical(row, where, index):
    """MTS-Dialog: one section of the note from a dialogue. Line ends become \\n; only its training file has \\r\\n."""
    keys = ("ID", "section_header", "section_text", "dialogue")
    number, header, summary, dialogue = (text_of(row, key, where).replace("\r\n", "\n").strip() for key in keys)
    if header not in SECTIONS:
        raise UserError(f"{where}:section_header: unknown section {header!r}")
    if not summary or not dialogue:
        return "section_text or dialogue is empty"
    task = f"Write the {SECTIONS[header]} section of the clinical note for this conversation."
    return number, [{"role": "user", "content": f"{task}\n\n{dialogue}"}], summary, None


def read_conala(row, where, index):
    """CoNaLa: Python for an intent. The snippet stays as it is, indentation too. A question may have several."""
    question = row.get("question_id")
    if type(question) is not int:
        raise UserError(f"{where}:question_id: expected a whole number, found {type(question).__name__}")
    intent = text_of(row, "intent" if row.get("rewritten_intent") is None else "rewritten_intent", where).strip()
    snippet = text_of(row, "snippet", where)
    if not intent or not snippet.strip():
        return "intent or snippet is empty"
    task = "Write Python code for this task. Answer with the code only."
    return f"{question}-{index}", [{"role": "user", "content": f"{task}\n\n{intent}"}], snippet, None


def read_rows(task, split, path, member):
    """The records of one of the publisher's files, and what was dropped."""
    name, data = member or path.name, unpack(path, member)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{data.count(10, 0, error.start) + 1}: byte {error.start} is not UTF-8") from error
    # a reader turns a row into (id, prompt, response, rejected), or names the reason to drop it
    read = {"safety": read_safety, "clinical": read_clinical, "conala": read_conala}[task]
    records, dropped, flagged = {}, {}, []
    for index, (line, row) in enumerate((csv_rows if task == "clinical" else json_rows)(text, name)):
        parsed = read(row, f"{name}:{line}", index)
        stray = task == "safety" and not isinstance(parsed, str) and "Human:" in parsed[2] + parsed[3]
        # a stray label or somebody else's turn: never trained on; kept in test, so that scores compare with others'
        if isinstance(parsed, str) or (stray and split != "test"):
            reason = "'Human:' in an answer" if stray else parsed
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        key, prompt, response, rejected = f"{task}-{split}-{parsed[0]}", *parsed[1:]
        if key in records:
            raise UserError(f"{name}:{line}:ID: {parsed[0]!r} stands twice")
        flagged += [key] * stray
        records[key] = {"id": key, "prompt": prompt, "response": response, "rejected": rejected, "reference": response}
    if not records:
        raise UserError(f"{path}: {member or 'the file'} is empty or has no usable row")
    facts = {"rows": len(records) + sum(dropped.values()), "dropped": dropped, "flagged": flagged}
    return list(records.values()), facts


def prompt_hash(row):
    """Equal for prompts that differ in case or white space only."""
    text = "\n".join(f"{turn['role']}: {' '.join(turn['content'].lower().split())}" for turn in row["prompt"])
    return hashlib.sha256(text.encode()).hexdigest()


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
    for split in dict.fromkeys(split if split in FILES[task] else "train" for split in asked):
        address, _, member = FILES[task][split].partition("#")
        if source:
            address = f"{source.rstrip('/')}/{MIRROR_FOLDERS[task]}/{(member or address).rsplit('/', 1)[1]}"
            member = ""
        path = obtain(address, raw, hashes, deadline)
        status = "pinned" if path.name in PINNED else "as recorded" if path.name in recorded else "recorded now"
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
    folder, raw = output / task, output / "raw" / task
    print(f"{task}: licence {LICENCES[task]}, to {folder}", flush=True)
    rows, files, hashes = gather(task, splits, source, raw, deadline)
    for facts in files.values():
        print(f"  {facts['source']}: {facts['rows']:,} rows, sha256 {facts['sha256'][:12]}... {facts['hash']}")
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items()) or "none"
        if facts["dropped"] or facts["flagged"]:
            print(f"    dropped: {dropped}; kept in spite of a 'Human:' in an answer: {len(facts['flagged'])}")
    old, done, contents = read_json(folder / "report.json"), {}, {}
    for split in splits:
        kept, facts = clean_split(rows[split], {name: rows[name] for name in SPLITS[: SPLITS.index(split)]})
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        contents[folder / f"{split}.jsonl"] = text
        done[split] = facts | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
        shared = [f", {overlap['rows']:,} whose prompt is in {name}" for name, overlap in facts["also_in"].items()]
        print(f"  {split}: {len(kept):,} kept; dropped {facts['duplicates']:,} duplicates{''.join(shared)}")
    files, done = old.get("files", {}) | files, old.get("splits", {}) | done
    report = {"task": task, "licence": LICENCES[task], "files": files, "splits": done}
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
    parser.add_argument("--dataset", required=True, choices=[*FILES, "all"])
    parser.add_argument("--splits", default="train,val,test", help="comma-separated, of train, val and test")
    parser.add_argument("--source", help="mirror in place of the publishers: a folder or an http(s) URL prefix")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args(argv)
    splits = args.splits.split(",")
    if set(splits) - set(SPLITS):
        raise UserError(f"--splits {args.splits}: expected some of train,val,test")
    if args.source and not re.match("https?://", args.source) and not Path(args.source).is_dir():
        raise UserError(f"--source {args.source}: expected a folder, or an address with http:// or https:// in front")
    deadline, tasks = time.monotonic() + MAX_SECONDS, [*FILES] if args.dataset == "all" else [args.dataset]
    try:
        return {task: prepare(task, splits, args.source, args.output_dir, deadline) for task in tasks}
    except OSError as error:  # a full disk, a folder that cannot be written
        raise UserError(str(error)) from error


if __name__ == "__main__":
    main()
