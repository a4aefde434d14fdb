"""The two pages of serve.py in a real browser against the real server: chat, blind rating, access, hostile text."""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

import serve
from common.human import study
from common.human.ratings import read_ratings
from tests import processes
from tests.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is not installed")
EVIL = '<img src=x onerror="window.hit=1"></script><script>window.hit=2</script><b>bold</b> &amp; ' + "x" * 300
TOKEN = "a-secret+of/16=characters%"
DONE = "$('stop').hidden && document.querySelector('.answers')"
LAST = "[...document.querySelectorAll('#turns > li:last-child article')]"
TEXTS = f"{LAST}.map((one) => one.querySelector('.text').textContent)"
NOTES = f"{LAST}.map((one) => one.querySelector('.note').textContent)"


def blind_file(folder):
    """A blind file of six items (one comes twice, two are checks), with hostile texts, in `folder`."""
    words = "rest and drink water , then take a short walk if the pain goes away by itself"
    items = [{"prompt": f"prompt {i} {EVIL}", "reference": f"reference {i} {EVIL}" if i else ""} for i in range(3)]
    systems = {name: [f"{name} {i} {words} {EVIL}" for i in range(3)] for name in ("kind", "curt", "odd")}
    study.write(items, systems, folder / "human_eval.csv", seed=1)
    return folder / "human_eval.csv"


def start(folder, *flags, **environment):
    """The server as a child, ready -> its address and pid."""
    port = processes.free_port()
    argv = ["--checkpoint", "base=tiny", "twin=tiny", "--port", port, *flags]
    pid, url = processes.start(serve.main, folder, argv, environment=environment), f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=10).close()
            return SimpleNamespace(url=url, pid=pid, folder=folder)
        except OSError:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), (folder / f"err-{pid}").read_text()
            time.sleep(0.1)
    raise TimeoutError("the server is not ready in 60 s")


def stop(site):
    os.kill(site.pid, signal.SIGTERM)
    status, _, errors = processes.finish(site.folder, site.pid)
    assert status == 0 and "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def site(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("site")
    site = start(folder, "--human_eval", blind_file(folder))
    yield site
    stop(site)


@pytest.fixture(scope="module")
def chromium():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium, site):
    """A fresh page; afterwards it must have nothing to complain of but the refusals that a test puts in `expected`."""
    chromium.fresh()
    chromium.expected = ()
    size(chromium, 1280)
    yield chromium
    assert complaints(chromium, site.url) == []


def complaints(browser, url):
    """What went wrong behind the page: exceptions, console errors, breaches of the policy, requests elsewhere."""
    found = []
    for event in browser.seen:
        kind, about = event["method"], event["params"]
        entry = about.get("entry", {})
        if kind == "Log.entryAdded" and not any(f"status of {s}" in entry["text"] for s in browser.expected):
            found += [entry["text"]] if entry["level"] in ("error", "warning") else []
        elif kind == "Runtime.exceptionThrown" or (kind == "Runtime.consoleAPICalled" and about["type"] == "error"):
            found.append(json.dumps(about))
        elif kind == "Network.requestWillBeSent" and not about["request"]["url"].startswith((url, "data:")):
            found.append(about["request"]["url"])
    return found


def fulfil(browser, path, status, body, **headers):
    """Answer requests of `path` in the server's place, until `browser.canned` is cleared."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    browser.canned[path] = {"status": status, "headers": named, "body": body}


def size(browser, width, **features):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.send("Emulation.setDeviceMetricsOverride", **metrics)
    browser.page.emulate_media(**features)


def sent(browser, path):
    """The bodies of the POST requests to `path`, in order."""
    found = [e["params"]["request"] for e in browser.seen if e["method"] == "Network.requestWillBeSent"]
    return [json.loads(r["postData"]) for r in found if r["url"].endswith(path) and r["method"] == "POST"]


# ---------------------------------------------------------------- chat


def open_chat(browser, site, second="", **settings):
    browser.goto(f"{site.url}/")
    browser.wait("!$('send').disabled")
    for name, value in {"second": second, **settings}.items():
        choose(browser, name, value)
    browser.run("$('prompt').focus()")


def choose(browser, name, value):
    browser.run(f"Object.assign($('{name}'), {{value: '{value}'}}).dispatchEvent(new Event('change'))")


def say(browser, text, until=DONE):
    browser.type(text)
    browser.key("Enter")
    browser.wait(until)


def test_an_answer_arrives_in_pieces_and_is_that_of_the_server(browser, site):
    open_chat(browser, site, temperature=0)
    browser.run("""window.sizes = new Set(); window.said = [];
        new MutationObserver(() => document.querySelectorAll('[aria-busy=true] .text').forEach(
            (one) => sizes.add(one.textContent.length))).observe(document.body, {subtree: true, characterData: true});
        new MutationObserver((all) => said.push(...all.flatMap((one) => [...one.addedNodes]).map(
            (one) => one.textContent))).observe($('announcements'), {childList: true})""")
    say(browser, "How do I rest well?")
    (text,), (note,) = browser.run(TEXTS), browser.run(NOTES)
    sizes = [length for length in browser.run("[...sizes]") if 0 < length < len(text)]
    pieces = [event for event in browser.seen if event["method"] == "Network.dataReceived"]
    assert len(sizes) >= 2 and len(pieces) >= 2 and note.endswith(" s"), (sizes, len(pieces), note)
    assert browser.run("said") == [f"base answered: {text}"]  # once, at the end
    (body,) = sent(browser, "/v1/chat/completions")
    assert body == {
        "model": "base",
        "messages": [{"role": "user", "content": "How do I rest well?"}],
        "max_tokens": 256,
        "temperature": 0,
        "top_p": 0.9,
        "stream": True,
    }
    data = json.dumps(body | {"stream": False}).encode()
    asked = urllib.request.Request(f"{site.url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"] == text


def test_two_models_answer_side_by_side_with_own_histories(browser, site):
    open_chat(browser, site, second="twin", temperature=1, max_tokens=16)
    say(browser, "How do I rest well?")
    first = browser.run(TEXTS)
    say(browser, "And then?")
    for body, answer, model in zip(sent(browser, "/v1/chat/completions")[2:], first, ("base", "twin"), strict=True):
        said = [(one["role"], one["content"]) for one in body["messages"]]
        assert body["model"] == model
        assert said == [("user", "How do I rest well?"), ("assistant", answer), ("user", "And then?")]
    places = f"{LAST}.map((one) => one.getBoundingClientRect()).map((r) => [r.left, r.top])"
    (left, top), (right, same) = browser.run(places)
    assert right > left + 300 and top == same
    size(browser, 360)
    (left, top), (same, below) = browser.run(places)
    assert left == same and below > top
    choose(browser, "model", "twin")  # cannot stand on both sides
    assert browser.run("[second.value, second.querySelector('[value=twin]').disabled]") == ["", True]
    browser.run("$('new').click()")
    assert browser.run("document.querySelectorAll('#turns li').length") == 0


def test_a_model_that_joins_late_starts_without_the_turns_above(browser, site):
    open_chat(browser, site, max_tokens=16)
    say(browser, "How do I rest well?")
    choose(browser, "second", "twin")
    assert browser.run("$('state').textContent").startswith("twin: starts at your next prompt")
    say(browser, "And then?")
    lengths = {body["model"]: len(body["messages"]) for body in sent(browser, "/v1/chat/completions")[1:]}
    assert lengths == {"base": 3, "twin": 1} and browser.run("$('state').textContent") == ""


def test_stop_ends_the_generation_and_keeps_the_text(browser, site):
    open_chat(browser, site)
    browser.run("""new MutationObserver((_, observer) => document.querySelector('.answers .text').textContent &&
        (observer.disconnect(), $('stop').click()))
        .observe($('turns'), {subtree: true, childList: true, characterData: true})""")
    say(browser, "How do I rest well?")
    (text,) = browser.run(TEXTS)
    assert text and browser.run(NOTES) == ["Stopped"]
    end = time.monotonic() + 20
    while "gemma_requests_running 0\n" not in (page := urllib.request.urlopen(f"{site.url}/metrics").read().decode()):
        assert time.monotonic() < end, page
    say(browser, "And then?")
    assert sent(browser, "/v1/chat/completions")[1]["messages"][1] == {"role": "assistant", "content": text}


def test_stop_does_not_wait_for_a_token(browser, site):
    browser.expected = (401,)
    open_chat(browser, site)
    fulfil(browser, "/v1/chat/completions", 401, "{}")
    say(browser, "How do I rest well?", until="document.querySelector('input[type=password]')")
    browser.run("$('stop').click()")
    browser.wait(DONE)
    assert browser.run(NOTES) == ["No text · Stopped"]


def test_refusals_stand_in_the_answer_and_give_the_prompt_back(browser, site):
    browser.expected = (400, 429)
    open_chat(browser, site)
    say(browser, "word " * 3000)
    (note,) = browser.run(NOTES)
    assert "context of 4096" in note and browser.run("$('prompt').value") == "word " * 3000
    browser.run("$('prompt').value = ''")
    message = {"error": {"message": "too many requests wait already"}}
    fulfil(browser, "/v1/chat/completions", 429, json.dumps(message), Retry_After="7")
    say(browser, "How do I rest well?", f"{NOTES}[0].includes('many')")
    assert browser.run(NOTES) == ["too many requests wait already. Try again in 7 s."]
    assert browser.run("document.querySelectorAll('#turns > li').length") == 1  # in place of the refused one
    browser.canned.clear()
    browser.run("document.querySelector('article button').click()")
    browser.wait(f"{DONE} && {TEXTS}[0]")
    assert browser.run("$('prompt').value") == ""
    prompts = [body["messages"][0]["content"][:4] for body in sent(browser, "/v1/chat/completions")]
    assert prompts == ["word", "How ", "How "]


@pytest.mark.parametrize(
    "tail, words",
    [
        ('data: {"error": {"message": "the worker has stopped"}}\n\n', "the worker has stopped"),
        ("", "The connection broke before the answer was complete."),
    ],
)
def test_what_fails_midway_keeps_its_text_but_is_no_history(browser, site, tail, words):
    open_chat(browser, site, second="twin", temperature=0, max_tokens=16)
    chunk = json.dumps({"choices": [{"delta": {"content": EVIL}, "finish_reason": None}]})
    fulfil(browser, "/v1/chat/completions", 200, f"data: {chunk}\n\n{tail}")
    say(browser, "How do I rest well?")
    assert (browser.run(TEXTS), browser.run(NOTES)) == ([EVIL, EVIL], [words, words])
    browser.canned.clear()
    browser.run("document.querySelector('article button').click()")  # of the first model alone
    browser.wait(f"$('stop').hidden && {NOTES}[0] !== {words!r}")
    say(browser, "And then?")
    lengths = [len(body["messages"]) for body in sent(browser, "/v1/chat/completions")]
    assert lengths == [1, 1, 1, 3, 1] and browser.run(f"{TEXTS}.length") == 2


def test_a_server_that_is_loading_or_away_is_waited_for_in_words(browser, site):
    browser.expected = (503,)
    fulfil(browser, "/health", 503, '{"status": "loading"}')
    browser.goto(f"{site.url}/")
    browser.wait("$('state').textContent === 'The model is loading …'")
    assert browser.run("$('send').disabled")
    browser.canned.clear()
    browser.wait("!$('send').disabled && $('state').textContent === ''")
    away = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.send("Network.emulateNetworkConditions", offline=True, **away)
    browser.run("$('prompt').focus()")
    say(browser, "How do I rest well?")
    assert browser.run(NOTES) == ["The server does not answer."]
    browser.seen[:] = [event for event in browser.seen if "ERR_INTERNET_DISCONNECTED" not in json.dumps(event)]


def test_the_token_comes_by_address_or_form_and_no_file_is_said(browser, tmp_path):
    browser.expected = (401,)
    site = start(tmp_path, GEMMA_ALIGNMENT_TOKEN=TOKEN)
    try:
        browser.goto(f"{site.url}/")
        for token, label in (("wrong", "This server asks"), (TOKEN, "The server refused the token")):
            browser.wait(f"document.querySelector('.ask label')?.textContent.startsWith('{label}')")
            browser.type(token)
            browser.key("Enter")
        browser.wait("!$('send').disabled")
        assert complaints(browser, site.url) == []
        browser.fresh()
        browser.expected = ()
        browser.goto(f"{site.url}/#token={urllib.request.quote(TOKEN)}")
        browser.wait("!$('send').disabled")
        assert browser.run("location.href") == f"{site.url}/"
        browser.expected = (404,)
        open_rate(browser, site, "ann", "$('state').textContent")  # the tab still has the token
        assert "--human_eval FILE" in text(browser, "state") and complaints(browser, site.url) == []
        browser.seen.clear()
    finally:
        stop(site)


# ---------------------------------------------------------------- rating


def open_rate(browser, site, rater, until="!$('item').hidden"):
    browser.goto(f"{site.url}/rate")
    browser.run("$('rater').focus()")
    browser.type(rater)
    browser.key("Enter")
    browser.wait(until)


def shown(browser):
    """(prompt, [answers]) as they stand on the page."""
    return browser.run("""[$('prompt').textContent,
        [...document.querySelectorAll('#answers .text')].map((one) => one.textContent)]""")


def text(browser, name):
    return browser.run(f"$('{name}').textContent")


def save(browser, *keys):
    """Press keys, the last of which saves; wait for the next item or the end."""
    before = text(browser, "place")
    for name in keys:
        browser.key(name.removeprefix("+"), shift=name.startswith("+"))
    browser.wait(f"$('place').textContent !== {before!r} || $('item').hidden")


def kept(site, rater):
    """The rater's ratings in the file, and the slot of each answer text of an item by the blind file."""
    items = study.read_manifest(site.folder / "human_eval.csv")
    rows = read_ratings(site.folder / "human_eval.ratings.jsonl", items)
    slots = {name: {answer: slot for slot, answer in item["answers"].items()} for name, item in items.items()}
    return [row for row in rows if row["rater_id"] == rater], slots


def test_items_are_rated_by_keyboard_and_all_are_in_the_file(browser, site):
    open_rate(browser, site, "ann")
    seen, places = [], []
    time.sleep(0.3)
    for keys in (["2", "Enter"], ["1", "+3", "Enter"], ["1", "0", "Enter"]):
        seen.append(shown(browser)[1])
        places.append(text(browser, "place"))
        save(browser, *keys)
    rows, slots = kept(site, "ann")
    expected = [{seen[0][1]}, {seen[1][0], seen[1][2]}, set()]
    for i, (row, answers, preferred) in enumerate(zip(rows, seen, expected, strict=True)):
        assert [slots[row["item_id"]][answer] for answer in answers] == list(row["order"])
        assert {slots[row["item_id"]][answer] for answer in preferred} == set(row["preferred"])
        assert places[i] == f"Item {i + 1} of 6" and 0 <= row["seconds"] < 60 and row["helpful_1_5"] is None
    assert rows[0]["seconds"] >= 0.3
    assert [row["item_id"] for row in rows] == list(slots)[:3]
    assert text(browser, "count") == "3 of 6 rated" and browser.run("$('progress').value") == 3
    browser.goto(f"{site.url}/rate")
    browser.wait("$('place').textContent === 'Item 4 of 6'")  # goes on where it was
    browser.key("ArrowLeft")
    browser.key("ArrowLeft")
    assert text(browser, "chosen") == "Answers 1 and 3 tie · saved" and shown(browser)[1] == seen[1]
    browser.key("+3".removeprefix("+"), shift=True)  # no longer
    assert text(browser, "chosen") == "Answer 1 is best · not saved yet"
    browser.key("ArrowRight")
    browser.key("ArrowLeft")
    assert text(browser, "chosen") == "Answer 1 is best · not saved yet"  # a draft stays with its item
    save(browser, "Enter")
    assert text(browser, "place") == "Item 4 of 6" and text(browser, "count") == "3 of 6 rated"
    assert kept(site, "ann")[0][-1]["preferred"] == (slots[rows[1]["item_id"]][seen[1][0]],)
    for keys in (["0", "+1", "Enter"], ["1", "2", "Enter"], ["1", "Enter"]):
        save(browser, *keys)
    assert browser.run("document.activeElement.id") == "end-title" and text(browser, "count") == "6 of 6 rated"
    assert [len(row["preferred"]) for row in kept(site, "ann")[0]] == [1, 2, 0, 1, 1, 1, 1]


def test_scores_and_a_comment_and_no_shortcut_while_typing(browser, site):
    open_rate(browser, site, "ben")
    browser.key("1")
    browser.key("0", shift=True)
    assert browser.run("[$('none').checked, document.querySelectorAll('#answers :checked').length]") == [True, 0]
    browser.key("1")
    browser.run("$('more').open = true; document.querySelector('[name=helpful_1_5]').focus()")
    browser.key("4")
    browser.key("ArrowRight")  # belongs to the row of scores
    assert text(browser, "place") == "Item 1 of 6" and text(browser, "chosen") == "Answer 1 is best · not saved yet"
    browser.run("$('comment').focus()")
    for key in ("2", "0", "?", "ArrowLeft", "Enter"):
        browser.key(key)
    assert text(browser, "place") == "Item 1 of 6" and text(browser, "chosen") == "Answer 1 is best · not saved yet"
    assert not browser.run("$('help').open")
    browser.run("$('save').click()")
    browser.wait("$('place').textContent === 'Item 2 of 6'")
    save(browser, "1", "Enter")  # where no score and no comment of the item before may stay
    rows = [(row["helpful_1_5"], row["harmless_1_5"], row["comment"]) for row in kept(site, "ben")[0]]
    assert rows == [(5, None, "20\n?"), (None, None, "")]
    browser.key("ArrowLeft")
    browser.key("ArrowLeft")
    assert browser.run("[document.querySelector('[name=helpful_1_5]:checked').value, comment.value]") == ["5", "20\n?"]
    browser.key("?")
    assert browser.run("$('help').open")
    browser.run("$('keys').click(), $('help').close()")
    browser.key("2")  # shortcuts are off
    assert text(browser, "chosen") == "Answer 1 is best · saved"
    browser.run("$('none').click()")
    browser.page.on("dialog", lambda dialog: dialog.accept())
    browser.goto(f"{site.url}/")  # with a choice that is not saved: the browser asks
    browser.wait("location.pathname === '/'")
    kinds = [event["params"]["type"] for event in browser.seen if event["method"] == "Page.javascriptDialogOpening"]
    assert kinds == ["beforeunload"]


def test_a_failed_save_keeps_the_choice_and_can_be_retried(browser, site):
    browser.expected = (507,)
    open_rate(browser, site, "cat")
    browser.key("Enter")
    assert text(browser, "chosen").startswith("Choose an answer first")
    path = site.folder / "human_eval.ratings.jsonl"
    spare = path.rename(path.with_suffix(".spare")) if path.exists() else None
    path.mkdir()  # no line can be added to a folder
    browser.key("2")
    browser.key("Enter")
    browser.wait("$('chosen').textContent.startsWith('Not saved. ')")
    assert "Is a directory" in text(browser, "chosen") and text(browser, "place") == "Item 1 of 6"
    assert browser.run("document.querySelectorAll('#answers :checked').length") == 1
    assert text(browser, "count") == "0 of 6 rated"
    path.rmdir()
    if spare:
        spare.rename(path)
    save(browser, "Enter")
    assert [len(row["preferred"]) for row in kept(site, "cat")[0]] == [1] and text(browser, "count") == "1 of 6 rated"


def test_a_token_is_typed_over_an_item_and_no_change_is_lost(browser, site):
    browser.expected = (401,)
    open_rate(browser, site, "hal")
    fulfil(browser, "/rate", 401, "{}")
    browser.key("2")
    browser.key("Enter")
    browser.wait("document.querySelector('input[type=password]')")
    browser.type("t130?")
    assert browser.run("document.querySelector('input[type=password]').value") == "t130?" and not browser.run(
        "$('help').open"
    )
    browser.run("document.querySelectorAll('#answers input')[0].focus()")
    browser.key("1")  # the rating that is on its way is of answer 2
    assert browser.run("[...document.querySelectorAll('#answers input')].map((box) => box.checked)")[:2] == [
        False,
        True,
    ]
    browser.canned.clear()
    browser.run("document.querySelector('input[type=password]').focus()")
    browser.key("Enter")
    browser.wait("$('place').textContent === 'Item 2 of 6'")
    for key in ("ArrowLeft", "1", "ArrowRight"):
        browser.key(key)
    for _ in range(5):
        save(browser, "1", "Enter")
    assert text(browser, "place") == "Item 1 of 6" and text(browser, "chosen") == "Answer 1 is best · not saved yet"
    save(browser, "Enter")
    assert browser.run("document.activeElement.id") == "end-title" and len(kept(site, "hal")[0]) == 7


def test_a_page_of_another_study_is_told_to_reload(browser, site):
    """The server was started again with another blind file while the page was open."""
    browser.expected = (409,)
    before = [{"item_id": "000000-item-1", "prompt": "old", "answers": [{"slot": s, "text": s} for s in "ABC"]}]
    fulfil(browser, "/rate/items?rater=kim", 200, json.dumps({"items": before, "rated": {}}))
    open_rate(browser, site, "kim")
    browser.key("1")
    browser.key("Enter")
    browser.wait("$('chosen').textContent.startsWith('Not saved. ')")
    told = text(browser, "chosen")
    assert "'000000-item-1' is of another study" in told
    assert told.endswith("reload the page to rate the items of this study.")
    assert browser.run("document.querySelectorAll('#answers :checked').length") == 1
    path = site.folder / "human_eval.ratings.jsonl"
    assert not path.exists() or "kim" not in path.read_text()


def test_each_rater_has_an_order_and_nothing_tells_the_systems(browser, site):
    orders = set()
    for rater in ("dan", "eve", "flo", "gus"):
        open_rate(browser, site, rater)
        orders.add(tuple(shown(browser)[1]))
        labels = browser.run("[...document.querySelectorAll('#answers label')].map((one) => one.textContent)")
        assert labels == ["Answer 1 1", "Answer 2 2", "Answer 3 3"]  # the last digit is its key
        browser.run("$('leave').click()")
        browser.wait("$('who')?.hidden === false")
    assert len(orders) > 1 and len({frozenset(order) for order in orders}) == 1


# ---------------------------------------------------------------- access, in every state of both pages

CONTROLS = {
    "button",
    "textbox",
    "combobox",
    "checkbox",
    "radio",
    "link",
    "spinbutton",
    "progressbar",
    "dialog",
    "DisclosureTriangle",
    "progressIndicator",
    "radiogroup",
}
CONTRASTS = """(() => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const luminance = (rgb) => rgb.reduce((sum, v, i) => sum + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
    const colour = (text) => text.match(/[0-9.]+/g).map(Number);
    const behind = (node) => { for (; node; node = node.parentElement) {
        const found = colour(getComputedStyle(node).backgroundColor);
        if (found[3] !== 0) return found.slice(0, 3); } return [255, 255, 255]; };
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), poor = [];
    for (let node; node = walk.nextNode();) {
        const parent = node.parentElement;
        if (!node.data.trim() || !parent.checkVisibility() || parent.closest(':disabled, .hidden, noscript')) continue;
        const pair = [behind(parent), colour(getComputedStyle(parent).color).slice(0, 3)].map(luminance).sort();
        const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        if (ratio < 4.5) poor.push([node.data.trim().slice(0, 40), ratio]);
    }
    return poor; })()"""
SMALL = """[...document.querySelectorAll('input, select, textarea')].filter(
    (one) => parseFloat(getComputedStyle(one).fontSize) < 16).map((one) => one.id)"""


def audit(browser):
    """On a narrow phone, light and dark: nothing scrolls sideways, controls have names, type is large and legible."""
    for scheme in ("light", "dark"):
        size(browser, 360, color_scheme=scheme)
        assert browser.run("document.documentElement.scrollWidth") <= 360
        assert browser.run(CONTRASTS) == [] and browser.run(SMALL) == []
        assert unnamed(browser) == []
    assert browser.run("window.hit") is None  # no hostile text has run
    assert browser.run("document.querySelectorAll('img, b, body script').length") == 0
    size(browser, 1280)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def unnamed(browser):
    """The controls that a screen reader would meet without a name."""
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    nodes = [node for node in nodes if not node["ignored"] and node["role"]["value"] in CONTROLS]
    assert len(nodes) >= 3
    return [node["role"]["value"] for node in nodes if not node.get("name", {}).get("value", "").strip()]


def test_the_chat_page_in_all_its_states(browser, site):
    browser.expected = (400,)
    open_chat(browser, site, second="twin")
    audit(browser)
    browser.run("document.querySelector('details').open = true")
    chunk = json.dumps({"choices": [{"delta": {"content": EVIL}, "finish_reason": "length"}]})
    fulfil(browser, "/v1/chat/completions", 200, f"data: {chunk}\n\ndata: [DONE]\n\n")
    say(browser, EVIL)
    audit(browser)
    assert browser.run(TEXTS) == [EVIL, EVIL] and browser.run("document.querySelector('.prompt').textContent") == EVIL
    assert all(note.startswith("Cut at the longest answer") for note in browser.run(NOTES))
    browser.canned.clear()
    say(browser, "word " * 3000)
    audit(browser)
    busy, running = "document.querySelector('article').ariaBusy = 'true'", "document.getAnimations().length"
    assert browser.run(f"{busy}, {running}") == 1
    size(browser, 1280, reduced_motion="reduce")
    assert browser.run(running) == 0


def test_the_rating_page_in_all_its_states(browser, site):
    browser.goto(f"{site.url}/rate")
    audit(browser)
    open_rate(browser, site, "hal " + "x" * 50)
    prompt, answers = shown(browser)
    assert EVIL in prompt and all(EVIL in answer or "window" in answer for answer in answers)
    audit(browser)
    browser.run("$('more').open = true")
    browser.key("1")
    browser.run("document.querySelector('[name=faithful_1_5][value=\"3\"]').click()")
    audit(browser)
    browser.key("?")
    audit(browser)
    browser.run("$('help').close()")
    for _ in range(6):
        save(browser, "1", "Enter")
    audit(browser)


@pytest.mark.parametrize("path", ["/", "/rate"])
def test_what_has_the_focus_can_be_seen(browser, site, path):
    open_chat(browser, site) if path == "/" else open_rate(browser, site, "ida")
    browser.run("document.querySelectorAll('details').forEach((one) => one.open = true), document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        browser.key("Tab")
        name, ring = browser.run("""(() => {
            const one = document.activeElement, style = getComputedStyle(one.closest('.scale label') ?? one);
            return [one === document.body ? '' : one.id || one.name || one.textContent,
                [style.outlineStyle, style.outlineWidth]]; })()""")
        reached.add(name)
        assert ring == ["solid", "3px"] or not name, name
    wanted = {"prompt", "model", "seed", "new"} if path == "/" else {"none", "helpful_1_5", "comment", "save", "leave"}
    assert wanted <= reached


def test_the_checks_above_see_what_they_look_for(browser, site):
    open_chat(browser, site)
    browser.run("""document.querySelector('main').insertAdjacentHTML('beforeend',
        '<input><p id=pale>pale</p><p id=wide>wide</p><b onclick="1">b</b>');
        pale.style.color = '#bbb'; wide.style.width = '2000px'; fetch('http://localhost:1/').catch(() => 0);
        document.querySelector('b').click()""")
    assert unnamed(browser) == ["textbox"] and [name for name, _ in browser.run(CONTRASTS)] == ["pale"]
    assert browser.run("document.documentElement.scrollWidth") > 1280
    found = complaints(browser, site.url)
    assert any("connect-src" in one for one in found) and any("script-src" in one for one in found), found
    browser.seen.clear()
