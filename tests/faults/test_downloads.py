"""S3 to S5: hostile archives and servers, bad rows of the publishers' files and of our own records."""

import gzip
import io
import json
import tarfile
import threading
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest

from common import data
from common.log import UserError
from common.runtime import sources
from tests.publishers import HH_TEST, HH_TRAIN, MTS, MTS_NAMES, from_archive, hh, leftovers, pair, pin, read
from tests.test_data import assistant, record, user, without, write

# ---------------------------------------------------------------- S3: archives


@pytest.fixture
def archive(go, server, script, tmp_path, monkeypatch):
    """Serve a zip in place of CoNaLa's official one; returns the reports of a run without --source."""
    train, test = server.files["/conala/conala-train.json"], server.files["/conala/conala-test.json"]

    def run(extra=(), train=train, test=test, refused=False):
        buffer = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
            warnings.simplefilter("ignore")  # of a name that stands twice
            for name, data in [("conala-corpus/conala-train.json", train), ("conala-corpus/conala-test.json", test)]:
                if data is not None:
                    made.writestr(name, data)
            for info, data in extra:
                made.writestr(info, data)
        server.files["/conala.zip"] = buffer.getvalue()
        from_archive(script, monkeypatch, f"{server.url}/conala.zip")
        return (go.refused if refused else go)("conala", source=None)

    return run


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def test_S3_members_go_by_exact_name_and_nothing_is_extracted(archive, go, server, tmp_path):
    outside = sorted(path for path in tmp_path.parent.iterdir())
    extra = [
        ("../x", b"x"),
        ("/abs", b"x"),
        ("conala-corpus/../../y", b"x"),
        (link("conala-corpus/link"), b"/etc"),
        ("conala-corpus/link/passwd", b"x"),
        ("conala-corpus/conala-mined.jsonl", b"x"),
    ]
    report = archive(extra)["conala"]
    assert report["splits"]["test"]["kept"] == 2
    assert [path for path, _ in server.asked] == ["/conala.zip"]
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == [
        "conala/report.json",
        "conala/test.jsonl",
        "conala/train.jsonl",
        "conala/val.jsonl",
        "raw/conala/conala.zip",
        "raw/conala/sha256.json",
    ]
    assert sorted(tmp_path.parent.iterdir()) == outside and not Path("/abs").exists()
    assert go("conala", source=None)["conala"]["files"]["train"]["hash"] == "as recorded"


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"train": None, "extra": [(link("conala-corpus/conala-train.json"), b"/etc/passwd")]}, "plain file"),
        ({"train": None, "extra": [("x/conala-corpus/conala-train.json", b"[]")]}, "conala-train.json is not in it"),
        ({"extra": [("conala-corpus/conala-train.json", b"[]")]}, "exactly once"),
        ({"train": bytes(3 << 20)}, "unpacks to more than"),
    ],
    ids=["symlink", "other folder", "twice", "bomb"],
)
def test_S3_bad_archives_are_refused(archive, script, monkeypatch, tmp_path, kwargs, says):
    monkeypatch.setattr(script, "MAX_UNPACKED_BYTES", 1 << 20)
    error = archive(**kwargs, refused=True)
    assert says in error and "conala-train.json" in error
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", [0o020666, 0o060666, 0o010666, 0o140666], ids=["device", "disk", "pipe", "socket"])
def test_S3_members_that_are_no_files_are_refused(archive, tmp_path, kind):
    info = zipfile.ZipInfo("conala-corpus/conala-train.json")
    info.external_attr = kind << 16
    error = archive([(info, b"[]")], train=None, refused=True)
    assert "plain file" in error and "conala-train.json" in error and leftovers(tmp_path) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_S3_a_tar_is_no_archive_here(archive, server, script, go, monkeypatch, tmp_path, mode):
    """No tar is ever unpacked, so its links, absolute names and devices can do nothing."""
    outside, buffer = sorted(tmp_path.parent.iterdir()), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as made:
        for name, kind, target in (
            ("../x", tarfile.REGTYPE, ""),
            ("/abs", tarfile.REGTYPE, ""),
            ("link", tarfile.SYMTYPE, "/etc"),
            ("link/x", tarfile.REGTYPE, ""),
            ("hard", tarfile.LNKTYPE, "/etc/passwd"),
            ("null", tarfile.CHRTYPE, ""),
            ("conala-corpus/conala-train.json", tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            made.addfile(info)
    archive()
    server.files["/evil.zip"] = buffer.getvalue()
    from_archive(script, monkeypatch, f"{server.url}/evil.zip")
    assert "cannot be unpacked" in go.refused("conala", source=None)
    assert sorted(tmp_path.parent.iterdir()) == outside and not Path("/abs").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink() or path.name in ("x", "hard", "null")]


def test_S3_five_gigabytes_of_zeros_stop_at_the_default_cap(server, script, go, monkeypatch, tmp_path):
    """5 MB that unpack to 5 GB: cut off at 512 MiB, in memory; nothing of it reaches the disk."""
    size, name = 5 * 10**9, "conala-corpus/conala-train.json"
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = bytes(10**7)
    first = squeeze.compress(block) + squeeze.flush(zlib.Z_FULL_FLUSH)  # behind a full flush it repeats itself
    squeezed = first * (size // len(block)) + squeeze.flush()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr(name, squeezed)
        made.writestr("conala-corpus/conala-test.json", server.files["/conala/conala-test.json"])
        info = made.getinfo(name)
        info.compress_type, info.file_size, info.CRC = zipfile.ZIP_DEFLATED, size, 0
    raw = buffer.getvalue()
    at = raw.index(b"PK\x03\x04")
    local = raw[: at + 8] + (8).to_bytes(2, "little") + raw[at + 10 :]  # the method, in the local header too
    server.files["/conala.zip"] = local
    from_archive(script, monkeypatch, f"{server.url}/conala.zip")
    assert script.MAX_UNPACKED_BYTES == 2**29
    error = go.refused("conala", "train", source=None)
    assert "unpacks to more than" in error and "conala-train.json" in error and leftovers(tmp_path) == []


def test_S3_a_method_without_a_bound_is_refused(archive, tmp_path):
    info = zipfile.ZipInfo("conala-corpus/conala-train.json")
    info.compress_type = zipfile.ZIP_BZIP2
    assert "plain file" in archive([(info, bytes(1 << 20))], train=None, refused=True)


def test_S3_what_is_no_zip_is_one_line(archive, server, script, go, monkeypatch):
    archive()
    server.files["/conala.zip"] = b"<html>moved</html>"
    from_archive(script, monkeypatch, f"{server.url}/moved.zip")
    server.files["/moved.zip"] = b"<html>moved</html>"
    assert "cannot be unpacked" in go.refused("conala", source=None)


def test_S3_a_gzip_bomb_is_cut_off(go, server, script, monkeypatch, tmp_path):
    server.files[HH_TRAIN] = gzip.compress(bytes(8 << 20))
    monkeypatch.setattr(script, "MAX_UNPACKED_BYTES", 1 << 20)
    assert "unpacks to more than 1,048,576 bytes" in go.refused("safety", "train")
    assert leftovers(tmp_path) == []


# ---------------------------------------------------------------- S4: a hostile network


def test_S4_a_flipped_byte_leaves_nothing_and_a_rerun_succeeds(go, server, tmp_path):
    good = server.files[HH_TEST]
    server.files[HH_TEST] = good[:40] + bytes([good[40] ^ 1]) + good[41:]
    assert "sha256" in go.refused("safety", "test")
    assert leftovers(tmp_path) == []
    server.files[HH_TEST] = good
    go("safety", "test")
    assert len(read(tmp_path, "safety", "test")) == 5


def test_S4_a_download_cut_at_half_resumes_with_a_range_on_rerun(go, server, tmp_path, script, monkeypatch):
    data = server.files[HH_TRAIN]
    half = len(data) // 2
    server.tricks[HH_TRAIN] = lambda handler: handler.send_file(data, stop=half)
    monkeypatch.setattr(script, "TRIES", 1)
    assert f"{half:,} of {len(data):,} bytes" in go.refused("safety", "train")
    assert [path.suffix for path in leftovers(tmp_path)] == [".part"]
    server.tricks.clear()
    go("safety", "train")
    assert server.asked[-1] == (HH_TRAIN, f"bytes={half}-")
    assert (tmp_path / "raw/safety/train.jsonl.gz").read_bytes() == data


def test_S4_a_cut_connection_is_retried_within_the_run(go, server, tmp_path):
    data, cuts = server.files[HH_TRAIN], iter([1000])

    def cut_once(handler):
        handler.send_file(data, stop=next(cuts, None))

    server.tricks[HH_TRAIN] = cut_once
    go("safety", "train")
    assert [wanted for path, wanted in server.asked if path == HH_TRAIN] == [None, "bytes=1000-"]


@pytest.mark.parametrize("other", ["ignores Range", "has changed", "is complete", "sends another range"])
def test_S4_a_part_is_never_continued_with_other_bytes(go, server, tmp_path, script, monkeypatch, other):
    data = server.files[HH_TRAIN]
    monkeypatch.setattr(script, "TRIES", 1)
    stop = len(data) // 2
    server.tricks[HH_TRAIN] = lambda handler: handler.send_file(data, stop=stop)
    go.refused("safety", "train")
    monkeypatch.setattr(script, "TRIES", 3)
    server.tricks.clear()
    if other == "ignores Range":
        server.tricks[HH_TRAIN] = lambda handler: handler.send_file(data, ranges=False)
    elif other == "has changed":
        data = server.files[HH_TRAIN] = hh([pair(f"new {i}?", f"No {i}.", f"Yes {i}.") for i in range(300)])
    elif other == "is complete":  # the run died between the last byte and the rename
        (tmp_path / "raw/safety/train.jsonl.gz.part").write_bytes(data)
    else:
        answers = iter(["wrong"])

        def wrong_range(handler):
            if next(answers, None):
                handler.send_response(206)
                handler.send_header("Content-Range", f"bytes 0-9/{len(data)}")
                handler.send_header("Content-Length", "10")
                handler.end_headers()
                return handler.wfile.write(data[:10])
            return handler.send_file(data)

        server.tricks[HH_TRAIN] = wrong_range
    go("safety", "train")
    assert (tmp_path / "raw/safety/train.jsonl.gz").read_bytes() == data


@pytest.mark.parametrize("origin", ["http://elsewhere/train.jsonl.gz\n", ""], ids=["another", "torn"])
def test_S4_a_part_of_one_mirror_is_not_continued_from_another(go, server, tmp_path, script, monkeypatch, origin):
    raw = tmp_path / "raw" / "safety"
    raw.mkdir(parents=True)
    (raw / "train.jsonl.gz.part").write_bytes(b"of another mirror")
    (raw / "train.jsonl.gz.part.origin").write_text(origin)
    go("safety", "train")
    assert server.asked[-1] == (HH_TRAIN, None)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_S4_redirects_to_other_schemes_are_refused(go, server, tmp_path, target):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.tricks[HH_TEST] = redirect
    assert target in go.refused("safety", "test")
    assert leftovers(tmp_path) == []
    assert len(server.asked) == 1


def test_S4_https_may_not_fall_back_to_http(script):
    request = script.urllib.request.Request("https://example.org/a")
    with pytest.raises(script.UserError, match="refused a redirect"):
        script.SafeRedirect().redirect_request(request, None, 302, "", {}, "http://example.org/a")
    request = script.urllib.request.Request("http://example.org/a")
    assert script.SafeRedirect().redirect_request(request, None, 302, "", {}, "https://example.org/a")


@pytest.mark.parametrize("length", [None, "99999999999"])
def test_S4_an_endless_body_is_cut_off(go, server, tmp_path, script, monkeypatch, length):
    def endless(handler):
        handler.send_response(200)
        if length:
            handler.send_header("Content-Length", length)
        handler.send_header("Connection", "close")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(bytes(1 << 16))
        except OSError:
            handler.close_connection = True

    monkeypatch.setattr(script, "MAX_FILE_BYTES", 1 << 20)
    server.tricks[HH_TEST] = endless
    assert "1,048,576 bytes" in go.refused("safety", "test")
    assert leftovers(tmp_path) == []


def test_S4_a_drip_ends_at_the_deadline(go, server, tmp_path, script, monkeypatch):
    pause = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        while not pause.wait(0.05):
            handler.wfile.write(b"x")

    monkeypatch.setattr(script, "MAX_SECONDS", 0.3)
    server.tricks[HH_TEST] = drip
    assert "0.3 s" in go.refused("safety", "test")
    pause.set()


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 4), (429, 4)])
def test_S4_http_errors_are_one_line_and_few_are_retried(go, server, tmp_path, status, requests):
    server.tricks[HH_TEST] = lambda handler: handler.send_error(status)
    assert str(status) in go.refused("safety", "test")
    assert len(server.asked) == requests
    assert leftovers(tmp_path) == []


def test_S4_a_dead_server_is_one_line(go, script, monkeypatch):
    monkeypatch.setattr(script, "TRIES", 2)
    assert "refused" in go.refused("safety", "test", source="http://127.0.0.1:9").lower()


@pytest.mark.parametrize("source", ["file:///tmp", "ftp://127.0.0.1", "/no/such/folder"])
def test_S4_other_sources_are_refused(go, source):
    assert source in go.refused("safety", source=source)


def test_S4_a_recorded_hash_is_checked_ever_after(go, server, tmp_path):
    go("conala")
    (tmp_path / "raw" / "conala" / "conala-train.json").unlink()
    server.files["/conala/conala-train.json"] += b"\n"
    error = go.refused("conala")
    assert "recorded" in error and "sha256.json" in error
    assert not list(tmp_path.rglob("*.part"))
    (tmp_path / "raw" / "conala" / "sha256.json").unlink()  # what the message tells a user to look at
    go("conala")


def test_S4_a_damaged_raw_file_is_fetched_again(go, server, tmp_path):
    go("conala")
    (tmp_path / "raw" / "conala" / "conala-train.json").write_text("[]")
    server.asked.clear()
    go("conala")
    assert server.asked == [("/conala/conala-train.json", None)]


def test_S4_a_damaged_first_download_is_not_recorded(go, server, tmp_path):
    good = server.files[HH_TRAIN]
    server.files[HH_TRAIN] = good[:60] + bytes([good[60] ^ 255]) + good[61:]
    assert "cannot be unpacked" in go.refused("safety", "train")
    assert not (tmp_path / "raw" / "safety" / "sha256.json").exists()
    server.files[HH_TRAIN] = good
    go("safety", "train")


def test_S4_an_earlier_dataset_survives_a_failing_run(go, server, tmp_path):
    go("conala")
    before = (tmp_path / "conala" / "train.jsonl").read_bytes()
    server.files["/conala/conala-train.json"] = b"[]"
    (tmp_path / "raw" / "conala" / "conala-train.json").unlink()
    go.refused("conala")
    assert (tmp_path / "conala" / "train.jsonl").read_bytes() == before


# ---------------------------------------------------------------- S5: bad rows


GOOD = json.dumps(pair("q", "x", "y")) + "\n"


BAD_HH = {
    "invalid UTF-8": (GOOD.encode() + b'{"chosen": "\xff"}\n', "train.jsonl.gz:2"),
    "NUL": ((GOOD + json.dumps(pair("q", "a\0b", "y"))).encode(), "train.jsonl.gz:2:chosen"),
    "lone surrogate": ((GOOD * 2 + json.dumps(pair("q", "a", "\ud800"))).encode(), "train.jsonl.gz:3:rejected"),
    "10 MB line": ((GOOD + json.dumps(pair("q", "a" * 10_000_000, "y"))).encode(), "train.jsonl.gz:2:chosen"),
    "missing key": ((GOOD + '{"chosen": "x"}').encode(), "train.jsonl.gz:2:rejected"),
    "wrong type": ((GOOD + '{"chosen": 1, "rejected": "x"}').encode(), "train.jsonl.gz:2:chosen"),
    "not an object": ((GOOD + '"x"\n').encode(), "train.jsonl.gz:2"),
    "not JSON": ((GOOD + '{"chosen": \n').encode(), "train.jsonl.gz:2"),
    "deep": ((GOOD + '{"a":' * 100_000).encode(), "train.jsonl.gz:2"),
    "empty": (b"", "train.jsonl.gz"),
    "blank": (b"\n\n", "train.jsonl.gz"),
    "only dirt": (json.dumps(pair("q", "x", "x")).encode(), "train.jsonl.gz"),
}


@pytest.mark.parametrize("kind", BAD_HH)
def test_S5_bad_json_lines_name_file_line_and_key(go, server, tmp_path, kind):
    data, where = BAD_HH[kind]
    server.files[HH_TRAIN] = gzip.compress(data, compresslevel=1)
    assert where in go.refused("safety", "train")
    assert leftovers(tmp_path) == []


MTS_ROW = '0,CC,"Line one\r\nline two","Doctor: a\r\nPatient: b"\r\n'


BAD_MTS = {
    "cut off": (MTS_ROW + '1,CC,"no end', ":5"),
    "too few cells": (MTS_ROW + "1,CC,x\r\n", ":5"),
    "too many cells": (MTS_ROW + "1,CC,x,y,z\r\n", ":5"),
    "id twice": (MTS_ROW * 2, ":5:ID"),
    "unknown section": (MTS_ROW + "1,XX,x,y\r\n", ":5:section_header"),
    "NUL": (MTS_ROW + "1,CC,x,a\0b\r\n", ":5:dialogue"),
    "huge cell": (MTS_ROW + f"1,CC,x,{'y' * 10_000_000}\r\n", ":5"),
    "quote inside": (MTS_ROW + '1,CC,"x"y,z\r\n', ":5"),
    "no rows": ("", "empty"),
}


@pytest.mark.parametrize("kind", BAD_MTS)
def test_S5_bad_csv_rows_name_file_line_and_key(go, server, script, monkeypatch, tmp_path, kind):
    text, where = BAD_MTS[kind]
    pin(script, monkeypatch, "clinical")
    server.files[MTS.format(MTS_NAMES[2])] = b"ID,section_header,section_text,dialogue\r\n" + text.encode()
    error = go.refused("clinical", "test")
    assert where in error and "MTS-Dialog-TestSet-1" in error
    assert leftovers(tmp_path) == []


def test_S5_another_csv_header_is_refused(go, server, script, monkeypatch):
    pin(script, monkeypatch, "clinical")
    server.files[MTS.format(MTS_NAMES[2])] = b"ID,section_header,note,dialogue\r\n0,CC,x,y\r\n"
    assert ":2:section_text: expected text, found no such key" in go.refused("clinical", "test")


CONALA_ROW = '{"intent": "a", "rewritten_intent": null, "snippet": "x", "question_id": 1}'


BAD_CONALA = {
    "cut off": (f"[\n{CONALA_ROW},\n{CONALA_ROW}", "conala-test.json:3"),
    "cut in a row": (f"[\n{CONALA_ROW},\n" + '{"intent": "a]', "conala-test.json:3"),
    "wrong type": (
        f"[\n{CONALA_ROW},\n" + CONALA_ROW.replace(": 1}", ': "1"}') + "]",
        "conala-test.json:3:question_id",
    ),
    "no snippet": (f"[\n{CONALA_ROW},\n" + '{"intent": "a", "question_id": 1}]', "conala-test.json:3:snippet"),
    "list": (f"[\n{CONALA_ROW},\n[]]", "conala-test.json:3"),
    "empty list": ("[]", "empty"),
}


@pytest.mark.parametrize("kind", BAD_CONALA)
def test_S5_bad_rows_of_a_json_list_name_file_line_and_key(go, server, tmp_path, kind):
    text, where = BAD_CONALA[kind]
    server.files["/conala/conala-test.json"] = text.encode()
    assert where in go.refused("conala", "test")
    assert leftovers(tmp_path) == []


def test_S5_duplicates_and_leaks_are_dropped_and_counted(go, server, tmp_path):
    rows = [pair(f"train {i}?", "No.", "Yes.") for i in range(50)]
    server.files[HH_TRAIN] = hh([*rows, rows[0], pair("TEST  1?", "Never.", "Sure."), pair("test 1?", "a", "b")])
    report = go("safety")["safety"]["splits"]
    assert report["train"]["duplicates"] + report["val"]["duplicates"] == 1
    leaks = [report[split]["also_in"]["test"] for split in ("train", "val")]
    assert {"rows": 2, "prompts": 1} in leaks  # found in spite of case and spaces
    prompts = [row["prompt"][0]["content"].lower() for s in ("train", "val") for row in read(tmp_path, "safety", s)]
    assert not any(prompt.startswith("test") for prompt in prompts) and len(prompts) == 50


# ---------------------------------------------------------------- S5: records


BAD = {
    "invalid UTF-8": (b'{"id": "\xff"}', "not a JSON record in UTF-8"),
    "half a surrogate pair": (r'{"id": "a", "prompt": [], "response": "\ud800"}', "not a JSON record in UTF-8"),
    "NUL": (b'{"id": "a\x00b"}', "not a JSON record"),
    "cut": ('{"id": "a", "prompt": [', "not a JSON record"),
    "deep": ("[" * 100_000, "not a JSON record"),
    "a list": ("[1]", "expected an object, got list"),
    "a number as id": (record(id=3), "id: expected text"),
    "no response": (
        without("response"),
        "rows before have prompt+response; keys found: id, prompt, reference, rejected",
    ),
    "null response": (record(response=None), "response: expected text"),
    "rejected": (record(rejected=["x"]), "rejected: expected text or null"),
    "reference": (record(reference=1), "reference: expected text or null"),
    "margin as text": (record(margin="1"), "margin: expected a number"),
    "margin below zero": (record(margin=-1), "margin: expected a number"),
    "margin true": (record(margin=True), "margin: expected a number"),
    "infinite margin": ('{"id": "a", "prompt": "q", "response": "", "margin": 1e400}', "margin: expected a number"),
    "no prompt": (without("prompt"), "no known shape; keys found: id, reference, rejected, response; known: prompt+re"),
    "a number as prompt": (record() | {"prompt": 5}, "prompt: expected a list"),
    "the assistant speaks last": (record(prompt=[user("a"), assistant("b")]), "ends with a turn of the assistant"),
    "it only greets": (record(prompt=[assistant("hello")]), "ends with a turn of the assistant"),
    "nothing is asked after it": (
        record(prompt=[user("a"), assistant("b"), user(" ")]),
        "ends with a turn of the assi",
    ),
    "empty prompt": (record(prompt=[]), "prompt: expected a list"),
    "a role": (record(prompt=[{"role": "narrator", "content": "x"}]), "prompt: the role of a turn is"),
    "no content": (record(prompt=[{"role": "user"}]), "prompt: the content of a turn is"),
    "too long": (record(response="x" * (sources.MAX_LINE + 1)), "longer than"),
}


@pytest.mark.parametrize("name", BAD)
def test_S5_a_bad_row_is_named_by_file_line_and_key(tmp_path, name):
    row, message = BAD[name]
    folder = write(tmp_path, "", row)  # an empty line counts as a line
    with pytest.raises(UserError) as error:
        data.load_split(folder, "train")
    assert str(error.value).startswith(f"{folder}/train.jsonl:3: ") and message in str(error.value)
    assert len(str(error.value)) < len(str(folder)) + 250  # a long value is not repeated in full


def test_S5_duplicate_ids_name_both_lines(tmp_path):
    with pytest.raises(UserError, match=r"train.jsonl:4: id 'r1' was used in line 2"):
        data.load_split(write(tmp_path, record(1), record(2), record(1)), "train")


def test_S5_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match=r"test\.jsonl: no such file; run `python data/download_datasets\.py`.*--debug"):
        data.load_split(write(tmp_path), "test")
    with pytest.raises(UserError, match=r"train\.jsonl: no such file"):
        data.load_split(tmp_path / "none", "train")
    (tmp_path / "test.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=r"test\.jsonl: no records"):
        data.load_split(tmp_path, "test")
