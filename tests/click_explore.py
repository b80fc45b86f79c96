"""Press the buttons of nbs/explore.ipynb in JupyterLab, in a headless Chromium; no part of the test run

python tests/click_explore.py RUN_FOLDER PICTURE.png    # needs chromium on the PATH"""

import re
import sys
import time
from pathlib import Path

from browser import chromium, jupyter, open_in_lab, until

BUTTON = "[...document.querySelectorAll('button.jupyter-button')].find(b => b.textContent.trim() == '{}')"


def drive(browser, host, picture):
    "Run all cells, press each button, wait for what it shows, take a picture"
    run = browser.run
    browser.view(1400, "light")
    open_in_lab(browser, host, "explore")
    run("void jupyterapp.commands.execute('notebook:run-all-cells')")
    until(lambda: run(f"{BUTTON.format('sample')} != null"), "the controls")
    for name, what, n in (("sample", "img", 1), ("read", "table", 2), ("complete", "li", 1)):
        run(f"{BUTTON.format(name)}.click()")
        until(lambda: run(f"document.querySelectorAll('.widget-vbox {what}').length >= {n}"), name)  # noqa: B023
    run("document.querySelector('.widget-vbox').scrollIntoView()")
    time.sleep(1)
    browser.picture(Path(picture))


def main(run, picture):
    with jupyter() as (host, notebooks), chromium() as browser:
        page = notebooks / "explore.ipynb"
        given = f"run: str = '{Path(run).resolve()}'"
        text, n = re.subn(r'run: str = \\"[^"]*\\"', lambda _: given, page.read_text(encoding="utf-8"))
        assert n == 1, "explore.ipynb has no parameter run"
        page.write_text(text, encoding="utf-8")
        drive(browser, host, picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
