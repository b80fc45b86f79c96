"""Look at every page of the built site in a headless Chromium and list what is wrong; no part of the test run

make docs && make look AXE=/path/to/axe.min.js
python tests/look_at_site.py --axe axe.min.js --shots /tmp/shots index results    # some pages, with screenshots

`pip download --no-deps axe-playwright-python` brings axe.min.js, which a wheel (a zip file) holds."""

import argparse
import contextlib
import functools
import http.server
import json
import re
import sys
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urldefrag, urlsplit

from browser import ROOT, chromium
from websocket import WebSocketTimeoutException

MOST_BYTES = 400_000  # of a page: its HTML and its images
VIEWS = [(1400, "light"), (1400, "dark"), (390, "light"), (390, "dark")]  # Width, and colour scheme
IMPACTS = ("serious", "critical")  # of axe's findings

WIDE = """[...document.querySelectorAll('article *')].filter(e => e.scrollWidth > e.clientWidth + 2 &&
 e.clientWidth && /auto|scroll|hidden/.test(getComputedStyle(e).overflowX) && !e.closest('details:not([open]) > *'))
 .map(e => `${e.scrollWidth - e.clientWidth} px cut off: ` +
   (e.querySelector('table') ? 'table' : e.querySelector('math') ? 'formula' : 'code') + ' ' +
   JSON.stringify(e.innerText.trim().slice(0, 60)))"""
PICTURES = """[...document.querySelectorAll('article img')]
 .filter(e => e.offsetWidth > e.closest('div').clientWidth + 2)
 .map(e => 'picture wider than its box: ' + e.alt.slice(0, 60))"""
OVERFLOW = "Math.max(0, document.documentElement.scrollWidth - innerWidth)"
LESS = """document.querySelectorAll('details:not([open]) > :not(summary)').forEach(e => e.remove());
 const seen = new Set();
 for (const code of document.querySelectorAll('.highlight')) {
   const kinds = [...code.querySelectorAll('span')].map(e => e.className).filter(k => !seen.has(k));
   if (!kinds.length) code.querySelectorAll('span').forEach(e => e.replaceWith(e.textContent));
   kinds.forEach(k => seen.add(k));
 } 0"""  # Colours of code are looked at once each: the contrast of every word would take minutes
AXE = """axe.run(document, {resultTypes: ['violations'], runOnly: %s})
 .then(r => r.violations.map(v => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 160)]))"""
RULES = {  # Tags of axe where the page is seen first; then the rules that depend on width or colours
    (1400, "light"): ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"],
    (1400, "dark"): ["color-contrast"],
    (390, "light"): ["scrollable-region-focusable", "target-size"],
}


class Finding(NamedTuple):
    page: str
    kind: str
    what: str


class Page(HTMLParser):
    "What a page links to, shows and can be linked at"

    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.anchors, self.unsaid = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("img", "script") and attrs.get("src"):
            self.images += [attrs["src"]] if tag == "img" else []
            self.links.append(attrs["src"])
        if tag == "img" and not (attrs.get("alt") or "").strip():
            self.unsaid.append(attrs.get("src", ""))


def read_pages(site):
    return {path.name: Page(path.read_text(encoding="utf-8")) for path in sorted(site.glob("*.html"))}


def on_disk(site, pages, name):
    "Findings that need no browser: dead links and images, images without a text, weight"
    page = pages[name]
    for link in dict.fromkeys(page.links):
        path, anchor = urlsplit(link).path, urldefrag(unquote(link)).fragment
        path = unquote(path)
        if re.match(r"[a-z]+:", link):
            continue
        if path and not (site / path).exists():
            yield "dead link", link
        elif anchor and (path or name) in pages and anchor not in pages[path or name].anchors:
            yield "dead link", link
    for image in page.unsaid:
        yield "picture without a text", image
    files = {site / name, *(site / unquote(image) for image in page.images if not image.startswith("data:"))}
    size = sum(path.stat().st_size for path in files if path.exists())
    if size > MOST_BYTES:
        yield "weight", f"{size / 1000:.0f} kB, {MOST_BYTES / 1000:.0f} kB allowed"


def in_browser(browser, url, axe, shots):
    "Findings of one page: at every width and colour scheme"
    stem = url.rpartition("/")[2].removesuffix(".html")
    browser.view(*VIEWS[0])
    browser.open(url)
    yield from (("console", text) for text in browser.complaints())
    for width, scheme in VIEWS:
        browser.view(width, scheme)
        beyond = browser.run(OVERFLOW)
        if beyond and scheme == "light":
            yield "overflow", f"{beyond} px beyond the window at {width} px"
        if (width, scheme) == VIEWS[0]:
            yield from (("cut", text) for text in browser.run(WIDE) + browser.run(PICTURES))
            if axe:
                browser.run(f"{axe}; {LESS}")
        if axe and (width, scheme) in RULES:
            for impact, rule, n, example in browser.run(AXE % json.dumps(RULES[width, scheme])):
                if impact in IMPACTS:
                    yield "axe", f"{rule} ({impact}, {width} px, {scheme}): {n}, such as {example}"
        if shots:
            browser.picture(shots / f"{stem}-{width}-{scheme}.png")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(site):
    "Address at which the site is served while this lasts"
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def look(site, names, axe, shots):
    pages = read_pages(site)
    unknown = [name for name in names if f"{name}.html" not in pages]
    if unknown or not pages:
        sys.exit(f"{site} has no page {', '.join(unknown)}: `make docs` builds the site")
    with served(site) as host, chromium() as browser:
        for name in [f"{name}.html" for name in names] or pages:
            found = [Finding(name, *f) for f in on_disk(site, pages, name)]
            try:
                found += [Finding(name, *f) for f in in_browser(browser, f"{host}/{name}", axe, shots)]
            except (WebSocketTimeoutException, TimeoutError) as error:
                found.append(Finding(name, "no answer", str(error)))
            for finding in found:
                print(f"{name:24}{finding.kind:24}{finding.what}", flush=True)
            yield from found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", help="such as `results`; all if none is named")
    parser.add_argument("--site", type=Path, default=ROOT / "docs" / "_build" / "html")
    parser.add_argument("--axe", type=Path, help="axe.min.js; without it accessibility is not checked")
    parser.add_argument("--shots", type=Path, help="folder for screenshots of every width and colour scheme")
    args = parser.parse_args()
    if args.axe and not args.axe.is_file():
        sys.exit(
            f"{args.axe} is not there. The wheel of axe-playwright-python holds axe.min.js: "
            "`pip download --no-deps axe-playwright-python`, then unzip it"
        )
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    axe = args.axe.read_text(encoding="utf-8") if args.axe else ""
    found = list(look(args.site.resolve(), args.pages, axe, args.shots))
    counts = Counter(finding.kind for finding in found)
    print("\n" + (", ".join(f"{n} {kind}" for kind, n in counts.most_common()) or "nothing found"))
    if not axe:
        print("Accessibility was not checked: name axe.min.js with --axe")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
