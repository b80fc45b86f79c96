"""Press the buttons of nbs/explore.ipynb in JupyterLab, in a headless Chromium; no part of the test run

python tests/click_explore.py RUN_FOLDER PICTURE.png    # needs chromium on the PATH"""

import base64
import contextlib
import json
import os
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
BUTTON = "[...document.querySelectorAll('button.jupyter-button')].find(b => b.textContent.trim() == '{}')"


def until(ask, what, seconds=180):
    for _ in range(2 * seconds):
        with contextlib.suppress(OSError):  # nobody listens yet
            if found := ask():
                return found
        time.sleep(0.5)
    raise TimeoutError(f"waited {seconds} s for {what}")


def drive(tools, url, picture):
    "Run all cells, press each button, wait for what it shows, take a picture"
    page = next(p for p in until(lambda: json.load(urllib.request.urlopen(tools)), "chromium") if p["type"] == "page")
    devtools = create_connection(page["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)

    def send(method, **params):
        devtools.send(json.dumps(dict(id=1, method=method, params=params)))
        while "id" not in (reply := json.loads(devtools.recv())):
            pass
        return reply["result"]

    def run(js):
        return send("Runtime.evaluate", expression=js)["result"].get("value")

    send("Page.navigate", url=url)
    until(lambda: run(KERNEL), "a kernel")
    run("void jupyterapp.commands.execute('notebook:run-all-cells')")
    until(lambda: run(f"{BUTTON.format('sample')} != null"), "the controls")
    for name, what, n in (("sample", "img", 1), ("read", "table", 2), ("complete", "li", 1)):
        run(f"{BUTTON.format(name)}.click()")
        until(lambda: run(f"document.querySelectorAll('.widget-vbox {what}').length >= {n}"), name)  # noqa: B023
    run("document.querySelector('.widget-vbox').scrollIntoView()")
    time.sleep(1)
    Path(picture).write_bytes(base64.b64decode(send("Page.captureScreenshot")["data"]))


def main(run, picture):
    lab, tools = (socket.create_server(("127.0.0.1", 0)).getsockname()[1] for _ in range(2))  # free ports
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = (ROOT / "nbs" / "explore.ipynb").read_text(encoding="utf-8")
        page = page.replace('run: str = \\"\\"', f"run: str = '{Path(run).resolve()}'")
        Path(folder, "explore.ipynb").write_text(page, encoding="utf-8")
        serve = [sys.executable, "-m", "jupyter", *LAB, f"--port={lab}", f"--ServerApp.root_dir={folder}"]
        look = [*CHROMIUM, f"--user-data-dir={folder}/browser", f"--remote-debugging-port={tools}"]
        started = [subprocess.Popen(serve, env={**os.environ, "PYTHONPATH": str(ROOT)}, **quiet)]
        started.append(subprocess.Popen(look, **quiet))
        try:
            until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{lab}/api?token=t"), "jupyter")
            drive(f"http://127.0.0.1:{tools}/json", f"http://127.0.0.1:{lab}/lab/tree/explore.ipynb?token=t", picture)
        finally:
            for process in started:
                process.terminate()
                process.wait(20)


if __name__ == "__main__":
    main(*sys.argv[1:])
