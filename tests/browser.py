"""Chromium for tests, driven by playwright: a page, what happens behind it, answers in the place of the server."""

import time

from playwright.sync_api import Error, sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--disable-quic", "--disable-dev-shm-usage"]
SEEN = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
SEEN += ("Network.requestWillBeSent", "Network.dataReceived")


class Browser:
    """One page at a time, made by `fresh`. `seen`: its events; `canned`: answers in the server's place, by path."""

    def __init__(self):
        self.playwright = sync_playwright().start()
        self.chromium = self.playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False, args=FLAGS)
        self.context = None

    def fresh(self):
        """A new page that shares nothing with the one before."""
        if self.context:
            self.context.close()
        self.seen, self.canned = [], {}
        self.context = self.chromium.new_context(no_viewport=True)
        self.page = self.context.new_page()
        self.page.route("**/*", self.answer)
        self.protocol = self.context.new_cdp_session(self.page)
        for method in SEEN:
            self.protocol.on(
                method, lambda params, method=method: self.seen.append({"method": method, "params": params})
            )
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")
        self.page.add_init_script("window.$ = (id) => document.getElementById(id)")

    def answer(self, route):
        canned = next((self.canned[path] for path in self.canned if route.request.url.endswith(path)), None)
        route.fulfill(**canned) if canned else route.continue_()

    def send(self, method, **params):
        """The result of a command of the DevTools protocol."""
        return self.protocol.send(method, params)

    def run(self, script):
        """The value of a script, awaited; Error if it throws. By the protocol: the page's policy forbids eval."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise Error(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    def wait(self, script, timeout=30):
        end = time.monotonic() + timeout

        def holds():
            try:
                return self.run(f"!!({script})")
            except Error as error:
                if "navigated" not in str(error) and "context was destroyed" not in str(error):
                    raise
                return False  # asked while one page made way for another

        while not holds():
            if time.monotonic() > end:
                raise TimeoutError(f"not true in {timeout} s: {script}\n{self.run('document.body.innerText')}")
            self.page.wait_for_timeout(20)

    def goto(self, url):
        self.page.goto(url, wait_until="load")

    def type(self, text):
        self.page.keyboard.insert_text(text)

    def key(self, name, shift=False):
        self.page.keyboard.press(f"Shift+{name}" if shift else name)

    def close(self):
        self.chromium.close()
        self.playwright.stop()
