"""Files of a source: their names, formats and faults; and a data set of the hub, from a server on this machine."""

import base64
import gzip
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from common import data
from common.log import UserError
from common.runtime import sources

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"é {2 * i}\n"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(rows):
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "a.jsonl": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n") + b"\r\n",
    "zipped.jsonl.gz": gzip.compress(LINES),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "lines.json": LINES,  # what the hub often calls .json
    "table.parquet": table(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FORMATS[name])
    assert [row for _, row in sources.rows(tmp_path / name)] == ROWS


FAULTS = {  # {name: (content, the line that is at fault or None, words)}
    "a.json": (json.dumps([*ROWS, 7], indent=1).encode(), 22, "expected an object, got int"),
    "b.json": (json.dumps(ROWS, indent=1).encode()[:-40], 19, "the list does not end"),
    "c.json": (b'[{"a": 1},\n\n{"b": tru}]', 3, "not a JSON record"),
    "d.json": (b'[\n{"a": "\xff"}]', 2, "not a JSON record"),
    "e.json": (b'[\n{"a": "\\ud800"}]', 2, "not a JSON record"),
    "f.jsonl.gz": (gzip.compress(LINES)[:-9], None, "cannot be unpacked"),
    "g.jsonl.gz": (b"no gzip", None, "cannot be unpacked"),
    "h.jsonl.gz": (gzip.compress(LINES + b"[" * (sources.MAX_LINE + 1)), 6, "longer than"),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), 1, "the file is UTF-16: save it as UTF-8"),
    "i.parquet": (table(ROWS)[:-7], None, "not a readable parquet file"),
    "j.parquet": (b"", None, "not a readable parquet file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_file_and_the_line(tmp_path, name):
    content, line, words = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        [*sources.rows(tmp_path / name)]
    place = f"{tmp_path / name}:" if line is None else f"{tmp_path / name}:{line}: "
    assert str(error.value).startswith(place) and words in str(error.value), error.value


def test_without_pyarrow_one_line_asks_for_it(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(FORMATS["table.parquet"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"train\.parquet: reading \.parquet needs pyarrow: pip install pyarrow"):
        [*sources.rows(tmp_path / "train.parquet")]


def test_dates_and_bytes_of_a_table_become_text(tmp_path):
    made = pyarrow.table(
        {"question": ["a"], "day": pyarrow.array([0], pyarrow.date32()), "raw": [b"\x00"], "n": [None]}
    )
    parquet.write_table(made, tmp_path / "train.parquet")
    (row,) = (row for _, row in sources.rows(tmp_path / "train.parquet"))
    assert row == {"question": "a", "day": "1970-01-01", "raw": "b'\\x00'"}  # what has no value has no key


@pytest.mark.parametrize(
    "names, right",
    [
        (["train.jsonl", "val.jsonl", "test.jsonl", "report.json"], {"train": 1, "val": 1, "test": 1}),
        (["train.parquet", "validation.jsonl.gz"], {"train": 1, "val": 1}),
        (["train.json", "dev.json", "test.json"], {"train": 1, "val": 1, "test": 1}),
        (["train.json", "eval.json"], {"train": 1, "val": 1}),
        (["train.jsonl", "train.parquet", "valid.json", "val.json"], {"train": 1, "val": 1}),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"train": 2}),
        (
            ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "data/test-00000-of-00001.parquet"],
            {"train": 1, "test": 1},
        ),
        (["training.jsonl", "train.txt", "train_prefs.jsonl"], {}),
    ],
)
def test_names_of_splits(tmp_path, names, right):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = sources.files(tmp_path)
    assert {split: len(paths) for split, paths in files.items()} == right
    for split, paths in files.items():
        assert all(
            path.is_file() and path.name.startswith(split[:1] if split != "val" else ("v", "dev", "eval"))
            for path in paths
        )
        assert paths == sorted(paths)
    if "train.jsonl" in names and right:
        assert files["train"] == [tmp_path / "train.jsonl"]  # the first of several formats
        assert files["val"] == [tmp_path / ("val.jsonl" if "val.jsonl" in names else "val.json")]


def test_a_file_is_train_and_another_suffix_is_refused(tmp_path):
    for name in ("mine.jsonl", "mine.csv"):
        (tmp_path / name).touch()
    assert sources.files(tmp_path / "mine.jsonl") == {"train": [tmp_path / "mine.jsonl"]}
    with pytest.raises(UserError, match=r"mine\.csv: expected a file of \.jsonl, "):
        sources.files(tmp_path / "mine.csv")
    assert sources.files(tmp_path / "none") == {}


# ---------------------------------------------------------------- the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub about a data set: its commit, its tree, its files. `server.repos` holds
    {repo: {name: content}}, `server.asked` the paths."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body), "X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        for repo, files in self.server.repos.items():
            if path.startswith(f"/api/datasets/{repo}/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": COMMIT} for name, body in files.items()
                ]
                return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
            if path in (f"/api/datasets/{repo}", f"/api/datasets/{repo}/revision/main"):
                siblings = [{"rfilename": name} for name in files]
                about = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                return self.reply(200, json.dumps(about).encode(), Content_Type="application/json")
            name = path.removeprefix(f"/datasets/{repo}/resolve/{COMMIT}/")
            if name in files:
                digest = hashlib.sha256(files[name]).hexdigest()
                return self.reply(200, files[name], ETag=f'"{digest}"', X_Linked_Size=len(files[name]))
        gated = path.startswith("/api/datasets/some/gated")
        code = "GatedRepo" if gated else "RepoNotFound"
        return self.reply(403 if gated else 404, b"{}", X_Error_Code=code, Content_Type="application/json")

    do_HEAD = do_GET

    def do_POST(self):
        """What it asks to make a repository and to commit files into it, all of them small; see `server.made`."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if self.server.closed:
            return self.answer(401, {"error": "no"})
        if path == "/api/repos/create":
            self.server.made = json.loads(body)
            repo = "/".join(self.server.made[key] for key in ("organization", "name"))
            return self.answer(200, {"url": f"http://127.0.0.1:{self.server.server_port}/{repo}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        assert "/commit/main" in path, path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repos.setdefault(path.split("/commit/")[0], {})[line["value"]["path"]] = content
        repo = path.removeprefix("/api/models/").split("/commit/")[0]
        address = f"http://127.0.0.1:{self.server.server_port}/{repo}/commit/{COMMIT}"
        self.answer(200, {"commitUrl": address, "commitOid": COMMIT, "pullRequestUrl": None})

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.reply(status, body, Content_Type="application/json")
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that huggingface_hub takes for the hub, and an empty cache."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.daemon_threads = True
        server.repos, server.asked, server.made, server.closed = {}, [], None, False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "*")
        sources._hub_files.cache_clear()
        yield server
        sources._hub_files.cache_clear()
        server.shutdown()


def test_a_data_set_of_the_hub(hub, monkeypatch):
    halves = [table(ROWS[:3]), table(ROWS[3:])]
    hub.repos["some/sums"] = {
        "README.md": b"...",
        "main/train-00000-of-00002.parquet": halves[0],
        "main/train-00001-of-00002.parquet": halves[1],
        "main/validation.jsonl": LINES,
        "socratic/train-00000-of-00001.parquet": b"another subset",
    }
    read = data.load_split("hub:some/sums:main", "train")
    assert [(r["prompt"][0]["content"], r["reference"]) for r in read] == [tuple(row.values()) for row in ROWS]
    assert [r["response"] for r in data.load_split("hub:some/sums:main", "val")] == [row["answer"] for row in ROWS]
    asked = [path for path in hub.asked if "/resolve/" in path]
    assert asked and not [path for path in asked if "socratic" in path or "README" in path]
    # offline, what was downloaded is read again
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sources._hub_files.cache_clear()
    hub.asked.clear()
    assert data.load_split("hub:some/sums:main", "train") == read and not hub.asked


def test_subsets_are_named_where_one_is_missing(hub):
    parts = ("train_prefs", "test_prefs", "train_sft")
    hub.repos["some/mixed"] = {f"data/{part}-00000-of-00001.parquet": table(ROWS) for part in parts}
    hub.repos["some/mixed"]["harmless-base/train.jsonl.gz"] = gzip.compress(LINES)
    hub.repos["some/single"] = {"cleaned.json": json.dumps(ROWS).encode(), "README.md": b""}
    hub.repos["some/none"] = {"weights.bin": b""}
    with pytest.raises(
        UserError, match=r"hub:some/mixed has no .* as hub:some/mixed:SUBSET: harmless-base, prefs, sft"
    ):
        sources.files("hub:some/mixed")
    with pytest.raises(UserError, match=r"as hub:some/mixed:SUBSET: harmless-base, prefs, sft"):
        sources.files("hub:some/mixed:other")
    hub.repos["maintainers/mixed"] = hub.repos["some/mixed"]
    with pytest.raises(UserError, match=r"as hub:maintainers/mixed:SUBSET: "):
        sources.files("hub:maintainers/mixed:main")
    assert {split: len(p) for split, p in sources.files("hub:some/mixed:prefs").items()} == {"train": 1, "test": 1}
    assert [p.name for p in sources.files("hub:some/mixed:harmless-base")["train"]] == ["train.jsonl.gz"]
    assert [p.name for p in sources.files("hub:some/single")["train"]] == ["cleaned.json"]
    with pytest.raises(UserError, match=r"hub:some/none has no files named train.* it has weights\.bin"):
        sources.files("hub:some/none")


@pytest.mark.parametrize(
    "address, words",
    [
        ("hub:some", "expected hub:OWNER/NAME or hub:OWNER/NAME:SUBSET"),
        ("hub:some/../../etc", "expected hub:OWNER/NAME"),
        ("hub:some/absent", "check the name"),
        ("hub:some/gated", "accept the licence at https://huggingface.co/datasets/some/gated"),
    ],
)
def test_what_the_hub_refuses(hub, address, words):
    with pytest.raises(UserError, match="dataset_path: ") as error:
        sources.files(address)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_offline_without_a_copy(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load hub:some/sums: the hub cannot be reached .* not in its cache"):
        sources.files("hub:some/sums")
