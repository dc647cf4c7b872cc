"""A headless Chromium driven over a pair of pipes by its DevTools protocol, and a server of files; no package."""

import base64
import contextlib
import fcntl
import functools
import http.server
import json
import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("google-chrome-stable", "google-chrome", "chromium", "chromium-browser")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--mute-audio",
    # every other name is unknown to it, as where there is no network
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
# a browser that draws and computes in software, on a machine that has much else to do
SECONDS = 600


def binary() -> str | None:
    """Where a Chromium is, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, as `python3 -m http.server` serves them; with `isolated`, allowed to share memory."""

    def __init__(self, *arguments: Any, isolated: bool = False, **options: Any):
        self.isolated = isolated
        super().__init__(*arguments, **options)

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path, isolated: bool = False) -> Iterator[str]:
    """The address of a folder's files."""
    handler = functools.partial(Handler, directory=str(folder), isolated=isolated)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class Browser:
    """One Chromium with one page, all of its messages kept.

    problems: what the page and its workers wrote to the console as errors, or threw. addresses: all that
    they asked for.
    """

    def __init__(self, profile: Path, *flags: str):
        to_child, self.out = os.pipe()
        self.into, from_child = os.pipe()
        flags = (*FLAGS, *flags, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else []))
        # it reads descriptor 3 and writes 4, which may be ours: so from copies that lie above both
        spare = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_child, from_child)]
        actions = [(os.POSIX_SPAWN_DUP2, spare[0], 3), (os.POSIX_SPAWN_DUP2, spare[1], 4)]
        quiet = os.open(os.devnull, os.O_RDWR)
        actions += [(os.POSIX_SPAWN_DUP2, quiet, fd) for fd in (0, 1, 2)]
        command = [binary(), *flags, "about:blank"]
        self.process = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setpgroup=0)
        for fd in (to_child, from_child, quiet, *spare):
            os.close(fd)
        self.number, self.pending, self.replies = 0, b"", {}
        self.problems, self.addresses = [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.listen(self.session)
        self.call("Page.enable")

    def listen(self, session: str) -> None:
        """Hear of everything that a page or a worker does, and of the workers that it starts."""
        for method in ("Runtime.enable", "Log.enable", "Network.enable"):
            self.post(method, session)
        self.post("Target.setAutoAttach", session, autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
        self.post("Runtime.runIfWaitingForDebugger", session)

    def post(self, method: str, session: str | None = None, **params: Any) -> int:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        os.write(self.out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        return self.number

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command's result. Raises RuntimeError where Chromium refuses it, TimeoutError where it does not answer."""
        number, end = self.post(method, session, **params), time.monotonic() + SECONDS
        while number not in self.replies:
            self.read(end - time.monotonic())
        reply = self.replies.pop(number)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.send(method, self.session, **params)

    def read(self, seconds: float) -> None:
        """One piece of what Chromium says."""
        if seconds <= 0 or not select.select([self.into], [], [], seconds)[0]:
            raise TimeoutError(f"Chromium says nothing; problems so far: {self.problems}")
        piece = os.read(self.into, 1 << 20)
        if not piece:
            raise RuntimeError("Chromium has ended")
        *whole, self.pending = (self.pending + piece).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self.replies[message["id"]] = message
            else:
                self.hear(message["method"], message.get("params", {}))

    def hear(self, event: str, said: dict[str, Any]) -> None:
        if event == "Target.attachedToTarget":
            self.listen(said["sessionId"])
        elif event == "Runtime.exceptionThrown":
            detail = said["exceptionDetails"]
            self.problems.append(detail.get("exception", {}).get("description") or detail["text"])
        elif event == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert"):
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in said["args"]))
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.problems.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent":
            self.addresses.append(said["request"]["url"])

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, promises waited for."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description"))
        return done["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        self.until(lambda: self.run(expression), expression)

    def until(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not true():
            if time.monotonic() > end:
                body = self.run("document.body.innerText")
                raise TimeoutError(f"it never came that {what}: {body!r}, {self.problems}")
            time.sleep(0.02)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def size(self, width: int, height: int, scale: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def media(self, **features: str) -> None:
        """Preferences of whoever looks, such as prefers_color_scheme="dark"."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def key(self, name: str, text: str = "") -> None:
        """A key that is pressed and let go: "Tab", "Enter", or a character."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39}
        text = "\r" if name == "Enter" else text or (name if len(name) == 1 else "")
        common = dict(key=name, code=name, windowsVirtualKeyCode=codes.get(name, ord(name[0])))
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose(self, selector: str, path: Path) -> None:
        """A file for a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def picture(self) -> bytes:
        """A PNG of what is to be seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        for fd in (self.out, self.into):
            os.close(fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
