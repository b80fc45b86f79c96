"""Run notebooks from top to bottom in JupyterLab, in a headless Chromium, and list the errors; no part of the test run

python tests/run_in_lab.py tour howto_text      # some pages of nbs
python tests/run_in_lab.py                      # all but the jobs that train

Copies run, so that nothing here changes."""

import argparse
import json
import sys
import time
import urllib.request

from browser import ROOT, chromium, jupyter, open_in_lab, until

PAGE = "[...jupyterapp.shell.widgets('main')][0]"
START = "window.ran = null; void jupyterapp.commands.execute('notebook:run-all-cells').finally(() => window.ran = true)"
ERRORS = f"""[...{PAGE}.content.widgets].filter(c => c.model.type == 'code').flatMap(
 (c, i) => c.model.outputs.toJSON().filter(o => o.output_type == 'error').map(
 o => `code cell ${{i + 1}}: ${{o.ename}}: ${{o.evalue}}`))"""


def request(url, method="GET"):
    with urllib.request.urlopen(urllib.request.Request(url, method=method)) as reply:
        return json.loads(reply.read() or "null")


def run_page(browser, host, name, seconds):
    "Errors of a notebook, each with its cell"
    open_in_lab(browser, host, name)
    browser.run(START)
    until(lambda: browser.run("window.ran"), f"the end of {name}", seconds)
    found = browser.run(ERRORS)
    for kernel in request(f"{host}/api/kernels?token=t"):
        request(f"{host}/api/kernels/{kernel['id']}?token=t", "DELETE")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", help="such as `tour`; all but jobs if none is named")
    parser.add_argument("--seconds", type=int, default=600, help="for each page")
    args = parser.parse_args()
    names = args.pages or [p.stem for p in sorted((ROOT / "nbs").glob("*.ipynb")) if not p.stem.startswith("train_")]
    wrong = 0
    with jupyter() as (host, _), chromium() as browser:
        for name in names:
            began = time.monotonic()
            try:
                found = run_page(browser, host, name, args.seconds)
            except TimeoutError as error:
                found = [str(error)]
            wrong += len(found)
            print(f"{name:24}{time.monotonic() - began:5.0f} s  {'; '.join(found) or 'no errors'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
