"""A real browser, driven by the DevTools protocol over a pipe (chromedevtools.github.io/devtools-protocol)."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT = 60  # seconds that the browser may take to answer


class Browser:
    """A page in Chromium. Use it in a `with`. events has everything that the browser reported about it."""

    def __init__(self, url, *arguments):
        self.events, self._answers, self._numbers = [], {}, itertools.count(1)
        self._changed = threading.Condition()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", *arguments, "about:blank"]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]  # not 3 or 4, where they have to be
        self._process = subprocess.Popen(["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", *command],
                                         pass_fds=ends, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for end in (read, write, *ends):
            os.close(end)
        threading.Thread(target=self._read, daemon=True).start()
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.open(url)

    def _read(self):
        with open(self._in, "rb", closefd=False) as pipe:
            rest = b""
            while data := pipe.read1(1 << 20):
                *messages, rest = (rest + data).split(b"\0")
                with self._changed:
                    for message in map(json.loads, messages):
                        if "id" in message:
                            self._answers[message["id"]] = message
                        else:
                            self.events.append(message)
                    self._changed.notify_all()

    def call(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        with self._changed:
            assert self._changed.wait_for(lambda: number in self._answers, TIMEOUT), f"no answer to {method}"
            answer = self._answers.pop(number)
        assert "result" in answer, answer
        return answer["result"]

    def open(self, url):
        """Go to an address, like a person who types it."""
        self.call("Page.navigate", url=url)

    def evaluate(self, script):
        """Return the value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def picture(self, path, width, height, scheme, mobile=False):
        """Take a picture of the page, in pixels, in a light or a dark colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def _of(self, method):
        with self._changed:
            return [event["params"] for event in self.events if event["method"] == method]

    def requested(self):
        """Return the addresses of everything that the page has requested."""
        return {request["request"]["url"] for request in self._of("Network.requestWillBeSent")} - {"about:blank"}

    def complaints(self):
        """Return what the console of the page shows."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for method in methods for event in self._of(method)]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        self._profile.cleanup()
