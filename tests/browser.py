"""A small driver of Chromium for tests: its DevTools protocol over --remote-debugging-pipe, standard library only."""

import fcntl
import json
import os
import select
import signal
import tempfile
import time
from pathlib import Path

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe""".split()
KEYS = {"Enter": ("Enter", 13, "\r"), "ArrowLeft": ("ArrowLeft", 37, ""), "ArrowRight": ("ArrowRight", 39, "")}
KEYS |= {"?": ("Slash", 191, "?"), **{str(i): (f"Digit{i}", 48 + i, str(i)) for i in range(10)}}


class Browser:
    """One page. `seen` holds every message about console, log, exceptions and requests: see `complaints`."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (there, self.write), (self.read, back) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (there, back)]  # clear of the 3 and 4 to be made
        log = (os.POSIX_SPAWN_OPEN, 2, self.folder.name + "/log", os.O_WRONLY | os.O_CREAT, 0o600)
        actions = [log, *((os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4)))]
        argv = [str(CHROMIUM), *FLAGS, f"--user-data-dir={self.folder.name}/profile", "about:blank"]
        self.pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsid=True)
        for fd in (there, back, *ends):
            os.close(fd)
        self.buffer, self.last, self.session, self.seen, self.answers = b"", 0, None, [], {}
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def send(self, method, timeout=30, **params):
        """The result of a command; TimeoutError or RuntimeError with what the browser said."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while self.last not in self.answers:
            if not select.select([self.read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"{method}: no answer in {timeout} s")
            self.listen()
        answer = self.answers.pop(self.last)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def listen(self):
        """Take in what has come: answers by their id, events into `seen`."""
        if not (data := os.read(self.read, 1 << 20)):
            raise RuntimeError("the browser has ended: " + Path(self.folder.name, "log").read_text()[-2000:])
        *whole, self.buffer = (self.buffer + data).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self.answers[message["id"]] = message
            else:
                self.seen.append(message)

    def run(self, script):
        """The value of a script, awaited; RuntimeError if it throws."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    def wait(self, script, timeout=20):
        """Until a script's value is true."""
        end = time.monotonic() + timeout
        while not self.run(f"!!({script})"):
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
        os.close(self.write), os.close(self.read)
        self.folder.cleanup()
