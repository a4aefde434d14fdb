"""A small driver of Chromium for tests: its DevTools protocol over --remote-debugging-pipe, standard library only."""

import fcntl
import json
import os
import select
import signal
import tempfile
import time

CHROMIUM = "/usr/bin/chromium"
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe about:blank""".split()
DOMAINS = ("Page", "Runtime", "Log", "Network", "Accessibility", "Fetch")  # the last: every request is asked for
KEYS = {"Enter": ("Enter", 13, "\r"), "Tab": ("Tab", 9, ""), "?": ("Slash", 191, "?")}
KEYS |= {"ArrowLeft": ("ArrowLeft", 37, ""), "ArrowRight": ("ArrowRight", 39, "")}
KEYS |= {str(i): (f"Digit{i}", 48 + i, str(i)) for i in range(10)}


class Browser:
    """One page at a time, made by `fresh`. `seen`: its events; `canned`: answers in the server's place, by path."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (there, self.write), (self.read, back) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (there, back)]  # clear of the 3 and 4 to be made
        actions = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4))]
        actions.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))
        argv = [CHROMIUM, f"--user-data-dir={self.folder.name}", *FLAGS]
        self.pid = os.posix_spawn(CHROMIUM, argv, os.environ, file_actions=actions, setsid=True)
        for fd in (there, back, *ends):
            os.close(fd)
        self.buffer, self.last, self.session, self.context = b"", 0, {}, None
        self.answers, self.seen, self.canned = {}, [], {}

    def fresh(self):
        """A new page that shares nothing with the one before."""
        self.session, before = {}, self.context
        self.context = self.send("Target.createBrowserContext")["browserContextId"]
        page = self.send("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        if before:
            self.send("Target.disposeBrowserContext", browserContextId=before)
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]}
        self.seen, self.canned = [], {}
        for domain in DOMAINS:
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source="window.$ = (id) => document.getElementById(id)")

    def post(self, method, **params):
        self.last += 1
        message = {"id": self.last, "method": method, "params": params, **self.session}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        return self.last

    def send(self, method, timeout=30, **params):
        """The result of a command; TimeoutError, or RuntimeError with what the browser said."""
        number, end = self.post(method, **params), time.monotonic() + timeout
        while number not in self.answers:
            if not select.select([self.read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"{method}: no answer in {timeout} s")
            self.listen()
        if "error" in (answer := self.answers.pop(number)):
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def listen(self):
        if not (data := os.read(self.read, 1 << 20)):
            raise RuntimeError("the browser has ended")
        *whole, self.buffer = (self.buffer + data).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self.answers[message["id"]] = message
            elif message["method"] == "Fetch.requestPaused":
                asked = message["params"]
                canned = next((self.canned[path] for path in self.canned if asked["request"]["url"].endswith(path)), {})
                self.post(f"Fetch.{'fulfill' if canned else 'continue'}Request", requestId=asked["requestId"], **canned)
            else:
                self.seen.append(message)

    def run(self, script):
        """The value of a script, awaited; RuntimeError if it throws."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    def wait(self, script, timeout=30):
        end = time.monotonic() + timeout

        def holds():
            try:
                return self.run(f"!!({script})")
            except RuntimeError as error:
                if "navigated" not in str(error) and "context was destroyed" not in str(error):
                    raise
                return False  # asked while one page made way for another

        while not holds():
            if time.monotonic() > end:
                raise TimeoutError(f"not true in {timeout} s: {script}\n{self.run('document.body.innerText')}")
            time.sleep(0.02)

    def goto(self, url):
        self.run("window.left = true")
        self.send("Page.navigate", url=url)
        self.wait("!window.left && document.readyState === 'complete'")

    def key(self, name, shift=False):
        code, number, text = KEYS[name]
        about = {"key": name, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 * shift}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def close(self):
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.write)
        os.close(self.read)
        self.folder.cleanup()
