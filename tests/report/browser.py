"""A headless chromium driven by its DevTools protocol: clicks, keys and what the page complained of."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0",
           "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Enter": 13}
PATIENCE = 60.0  # seconds: the machine may do much else


class Browser:
    """One tab."""

    def __enter__(self) -> "Browser":
        self._home = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={self._home.name}", "about:blank"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = next(line for line in self._process.stderr if "DevTools listening on" in line)
        port = line.split("127.0.0.1:")[1].split("/")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            target = next(found for found in json.load(answer) if found["type"] == "page")
        self._socket = connect(target["webSocketDebuggerUrl"], max_size=None)
        self._sent, self._events = 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self.size(1280, 800)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._process.stderr.close()
        self._home.cleanup()

    def __call__(self, method: str, **parameters: Any) -> dict:
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE))
            if message.get("id") == self._sent:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._events.append(message)

    def size(self, width: int, height: int) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700)

    def open(self, address: str) -> None:
        """Load it anew (a change after the # alone would not) and wait until it has drawn itself."""
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=address)
        end = time.monotonic() + PATIENCE
        while self.js("document.body?.dataset.ready") != "yes":
            assert time.monotonic() < end, f"{address} did not get ready: {self.problems()}"
            time.sleep(0.02)

    def js(self, expression: str) -> Any:
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    # --- hands

    def mouse(self, x: float, y: float, to: tuple[float, float] | None = None) -> None:
        """Press at a point, move if told, and let go."""
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", clickCount=1)
        x, y = to or (x, y)
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left")
        self("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        self.drag(selector, (0.5, 0.5), (0.5, 0.5))

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """From one place in an element to another, as shares of its width and height."""
        box = self.js(f"(() => {{ const node = document.querySelector({json.dumps(selector)}); "
                      "node.scrollIntoView({block: 'nearest'}); const box = node.getBoundingClientRect(); "
                      "return [box.left, box.top, box.width, box.height]; })()")
        points = [(box[0] + box[2] * x, box[1] + box[3] * y) for x, y in (start, end)]
        self.mouse(*points[0], to=points[1])

    def press(self, key: str) -> None:
        code = KEYS.get(key, ord(key[0]))
        text = {} if key in KEYS else {"text": key}
        self("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self("Input.insertText", text=text)

    # --- eyes

    def screenshot(self) -> bytes:
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return base64.b64decode(self("Page.captureScreenshot")["data"])

    def forget(self) -> None:
        self._events.clear()

    def problems(self) -> list[str]:
        """Errors, console messages, violations of the page's policy and dialogs since `forget`."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
                 "Page.javascriptDialogOpening")
        return [json.dumps(event["params"]) for event in self._events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        sent = [event["params"]["request"]["url"] for event in self._events
                if event.get("method") == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("about:", "data:"))]
