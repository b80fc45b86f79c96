"""A headless Chromium and a JupyterLab, for scripts that look at pages and notebooks; no part of the test run"""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from websocket import create_connection

ROOT = Path(__file__).resolve().parent.parent
LAB = "lab --no-browser --allow-root --expose-app-in-browser --IdentityProvider.token=t".split()
CHROMIUM = """chromium --headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking
 --disable-component-update --disable-sync --window-size=1400,1700 about:blank""".split()
KERNEL = "[...window.jupyterapp?.shell.widgets('main') ?? []][0]?.sessionContext?.session?.kernel?.status == 'idle'"
READY = "document.readyState == 'complete' && [...document.images].every(i => i.complete)"
BESIDE = ("results", "data", "models", "docs", "bench", "tests", "requirements", "settings.ini", "README.md")


def until(ask, what, seconds=180):
    for _ in range(2 * seconds):
        with contextlib.suppress(OSError):  # nobody listens yet
            if found := ask():
                return found
        time.sleep(0.5)
    raise TimeoutError(f"waited {seconds} s for {what}")


class Browser:
    "A page of Chromium, through its DevTools"

    def __init__(self, tools):
        found = until(lambda: json.load(urllib.request.urlopen(tools)), "chromium")
        url = next(page for page in found if page["type"] == "page")["webSocketDebuggerUrl"]
        self.socket = create_connection(url, suppress_origin=True, timeout=120)
        self.events, self.calls = [], 0
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        self.calls += 1
        self.socket.send(json.dumps(dict(id=self.calls, method=method, params=params)))
        while True:
            reply = json.loads(self.socket.recv())
            if reply.get("id") == self.calls:
                return reply["result"] if "result" in reply else sys.exit(f"chromium: {reply['error']}")
            self.events.append(reply)

    def run(self, js):
        made = self.send("Runtime.evaluate", expression=js, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in made:
            raise RuntimeError(made["exceptionDetails"]["exception"]["description"])
        return made["result"].get("value")

    def view(self, width, scheme):
        size = dict(width=width, height=1000, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])

    def open(self, url):
        self.events.clear()
        self.send("Page.navigate", url=url)
        until(lambda: self.run("location.href") == url and self.run(READY), url, seconds=60)

    def complaints(self):
        "Errors on the console since the page was opened"
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                yield params["exceptionDetails"]["text"]
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                yield f"{params['entry']['text']} {params['entry'].get('url', '')}"
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] == "error":
                yield str([arg.get("value") for arg in params["args"]])

    def picture(self, path, tallest=5000):
        height = min(self.run("document.documentElement.scrollHeight"), tallest)
        clip = dict(x=0, y=0, width=self.run("innerWidth"), height=height, scale=1)
        shot = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def chromium():
    "Browser of its own profile while this lasts"
    if shutil.which(CHROMIUM[0]) is None:
        sys.exit(f"{CHROMIUM[0]} is not on the PATH: install it")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [*CHROMIUM, f"--user-data-dir={profile}", f"--remote-debugging-port={port}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Browser(f"http://127.0.0.1:{port}/json")
        finally:
            process.terminate()
            process.wait(20)


@contextlib.contextmanager
def jupyter():
    "Address of JupyterLab over copies of the notebooks, beside what they read, and their folder, while this lasts"
    port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in ("nbs", "ldebm"):  # pages end with an export
            left_out = shutil.ignore_patterns("runs", ".ipynb_checkpoints", "__pycache__")
            shutil.copytree(ROOT / name, Path(folder, name), ignore=left_out)
        for name in BESIDE:
            Path(folder, name).symlink_to(ROOT / name)
        serve = [sys.executable, "-m", "jupyter", *LAB, f"--port={port}", f"--ServerApp.root_dir={folder}"]
        env = {**os.environ, "PYTHONPATH": folder}
        process = subprocess.Popen(serve, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t"), "jupyter")
            yield f"http://127.0.0.1:{port}", Path(folder, "nbs")
        finally:
            process.terminate()
            process.wait(20)


def open_in_lab(browser, host, name):
    "Show a notebook, and wait for its kernel"
    browser.send("Page.navigate", url=f"{host}/lab/workspaces/{name}/tree/nbs/{name}.ipynb?token=t&reset")
    until(lambda: browser.run(KERNEL), f"a kernel of {name}")
