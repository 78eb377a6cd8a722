"""A headless Chromium, driven by the DevTools protocol over two pipes. Nothing but stdlib.

Chromium reads commands from file descriptor 3 and writes replies and events to 4, each a JSON
object followed by a NUL (--remote-debugging-pipe). https://chromedevtools.github.io/devtools-protocol
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
CODES = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
PATIENCE = 120  # seconds for one reply: the machine may be busy
FLAGS = (
    "--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --disable-dev-shm-usage "
    "--hide-scrollbars --no-first-run --no-default-browser-check --disable-background-networking "
    "--disable-sync --disable-component-update --disable-extensions --password-store=basic"
)
# Chromium's wrapper may be a shell script: the two descriptors are put in place before it starts.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
    "os.execv(sys.argv[3], sys.argv[3:])"
)


def find():
    """The path of a Chromium on this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab of a browser of its own; a context manager. `events` are all events so far."""

    def __init__(self, width=1280, height=900):
        self.folder = tempfile.mkdtemp()
        theirs, self.to = high(os.pipe())
        self.back, theirs_too = high(os.pipe())
        words = [*FLAGS.split(), f"--user-data-dir={self.folder}", "about:blank"]
        launch = [sys.executable, "-c", LAUNCH, str(theirs), str(theirs_too), find(), *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(launch, pass_fds=(theirs, theirs_too), **quiet)
        os.close(theirs)
        os.close(theirs_too)
        self.count, self.session, self.rest, self.events = 0, None, b"", []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.to)  # Chromium ends when its pipe does
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.back)
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, method, **params):
        """Send a command and wait for its reply. Returns its result; raises RuntimeError."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data) :]
        while True:
            reply = self.receive(time.monotonic() + PATIENCE)
            if reply.get("id") == self.count:
                break
            self.events.append(reply)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def receive(self, until):
        """The next message of the browser."""
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.back], [], [], max(0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer from Chromium in {PATIENCE} s")
            data = os.read(self.back, 1 << 20)
            if not data:
                raise RuntimeError(f"Chromium ended with status {self.process.wait(PATIENCE)}")
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, url):
        """Go to a URL and wait until the page has loaded and its scripts have run."""
        seen = len(self.events)
        self.send("Page.navigate", url=url)
        until = time.monotonic() + PATIENCE
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events[seen:]):
            self.events.append(self.receive(until))

    def run(self, script):
        """The value of an expression of JavaScript in the page. Raises RuntimeError."""
        how = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        found = self.send("Runtime.evaluate", expression=script, **how)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def settle(self):
        """Wait until the page has drawn two frames: what it does later is done then."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(() => done(1)))"
        self.run(f"new Promise((done) => {frames})")

    def press(self, *keys):
        """Press keys, as a user does. A key is a character or a name such as ArrowLeft."""
        for key in keys:
            more = {"windowsVirtualKeyCode": CODES.get(key, 0)}
            if len(key) == 1:
                more["text"] = key
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **more)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def mouse(self, x, y, *kinds):
        """mouseMoved, mousePressed, mouseReleased, ... at a point of the window."""
        for kind in kinds:
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click(self, script):
        """Click with the mouse on the element that an expression of JavaScript gives."""
        x, y = self.place(script)
        self.mouse(x, y, "mouseMoved", "mousePressed", "mouseReleased")

    def place(self, script, across=0.5):
        """A point of an element, scrolled into view: in the middle of its first line box."""
        self.run(f"{script}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        self.settle()  # the page hears of the scrolling in the next frame
        found = self.run(f"{script}.getClientRects()[0].toJSON()")
        return found["x"] + across * found["width"], found["y"] + found["height"] / 2

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def colours(self, scheme):
        """prefers-color-scheme: "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def complaints(self):
        """What went wrong in the page so far: exceptions, and errors and warnings it logged."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            level = params.get("entry", {}).get("level") or params.get("type")
            logs = method in ("Log.entryAdded", "Runtime.consoleAPICalled")
            if method == "Runtime.exceptionThrown" or (logs and level in ("error", "warning")):
                found.append(params)
        return found

    def requests(self):
        """The URLs that the page asked for."""
        named = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in named]


def high(pair):
    """Copies of two descriptors that are above 4, which are not inherited; closes the two."""
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pair]
    for fd in pair:
        os.close(fd)
    return copies
