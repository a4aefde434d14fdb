"""The publishers' files in small, a loopback server that hands them out, and data/download_datasets.py run on it."""

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common import tasks

ROOT = Path(__file__).resolve().parents[1]


HH_TEST, HH_TRAIN = "/hh-rlhf/harmless-base/test.jsonl.gz", "/hh-rlhf/harmless-base/train.jsonl.gz"


MTS = "/mts-dialog/MTS-Dialog-{}.csv"


MTS_NAMES = ("TrainingSet", "ValidationSet", "TestSet-1-MEDIQA-Chat-2023")


def pair(prompt, chosen, rejected):
    front = f"\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": front + chosen, "rejected": front + rejected}


def hh(rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


def mts(rows):
    head = "ID,section_header,section_text,dialogue\r\n"
    return (head + "".join(",".join(f'"{cell}"' for cell in row) + "\r\n" for row in rows)).encode()


def snippets(rows):
    keys = ("intent", "rewritten_intent", "snippet", "question_id")
    return json.dumps([dict(zip(keys, row)) for row in rows], indent=1).encode()


def small_files():
    """Official layout, a few rows each; the test prompts do not occur in train."""
    files = {
        HH_TEST: hh([pair(f"test {i}?", "No.", "Yes.") for i in range(5)]),
        HH_TRAIN: hh([pair(f"train {i}?", f"No {i}.", f"Yes {i}.") for i in range(200)]),
        "/conala/conala-test.json": snippets([("sort x", None, "x.sort()", 1), ("sum x", "add up x", "sum(x)", 2)]),
        "/conala/conala-train.json": snippets([(f"do {i}", f"do the {i}", f"    f({i})\n", i) for i in range(100)]),
    }
    for number, name in enumerate(MTS_NAMES):
        rows = [(i, "GENHX", f"Note {i}.", f"Doctor: {name} {i}?\r\nPatient: Yes.") for i in range(3 + number)]
        files[MTS.format(name)] = mts(rows)
    for split, count in (("train", 100), ("test", 4)):
        answers = [f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1} eggs.\n#### {i + 1}" for i in range(count)]
        rows = [{"question": f"{split}: {i} eggs and one?", "answer": text} for i, text in enumerate(answers)]
        files[f"/gsm8k/{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return files


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.tricks` maps a path to something else to do. Knows Range and ETag."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        trick = self.server.tricks.get(self.path)
        if trick:
            return trick(self)
        self.send_file(self.server.files.get(self.path))

    def send_file(self, data, ranges=True, stop=None):
        if data is None:
            return self.send_error(404)
        etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        start, wanted = 0, self.headers.get("Range")
        if ranges and wanted and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:stop])
        self.close_connection = self.close_connection or stop is not None


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("download_datasets", ROOT / "data" / "download_datasets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(module, "SOCKET_SECONDS", 5)
    monkeypatch.setenv("NO_PROXY", "*")
    return module


def pin(script, monkeypatch, name, served=None):
    """Where the downloader pins a hash, pin that of the file that is served; without served files pin none."""
    task, files = script.TASKS[name], {}
    for split, file in task.files.items():
        path = f"/{task.mirror}/{file.address.rsplit('/', 1)[1]}"
        digest = hashlib.sha256(served[path]).hexdigest() if served and file.sha256 else None
        files[split] = dataclasses.replace(file, sha256=digest)
    monkeypatch.setitem(script.TASKS, name, dataclasses.replace(task, files=files))


def from_archive(script, monkeypatch, address):
    """Let the downloader look for CoNaLa in another archive."""
    files = {split: tasks.File(f"{address}#conala-corpus/conala-{split}.json") for split in ("test", "train")}
    monkeypatch.setitem(script.TASKS, "conala", dataclasses.replace(script.TASKS["conala"], files=files))


@pytest.fixture
def server(script, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.files, server.tricks, server.asked = small_files(), {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        for task in script.TASKS:
            pin(script, monkeypatch, task, server.files)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def go(script, server, tmp_path, capsys):
    """Run the script on the server (or another source); returns its reports."""

    def run(dataset, splits="train,val,test", source=server.url):
        argv = ["--dataset", dataset, "--splits", splits, "--output-dir", str(tmp_path)]
        return script.main(argv + (["--source", str(source)] if source else []))

    def refused(*args, **kwargs):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*args, **kwargs)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.count("\n") == 1 and error.startswith("error: ")
        return error

    run.refused = refused
    return run


def read(folder, task, split):
    return [json.loads(line) for line in (folder / task / f"{split}.jsonl").open(encoding="utf-8")]


def leftovers(folder):
    """Files that should not be there after a failure: any dataset, any temporary."""
    return [path for path in folder.rglob("*") if path.suffix in (".jsonl", ".part", ".tmp")]
