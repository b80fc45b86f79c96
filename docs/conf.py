"Sphinx settings of the site; pages come from `ldebm.docs.build`, which also runs Sphinx"

import re
import sys
from configparser import ConfigParser
from functools import cache
from html import escape
from pathlib import Path

from sphinx.search.en import SearchEnglish

from ldebm.docs import mathml

sys.modules.setdefault("rfc3987_syntax", None)  # Takes five seconds to load, and would check addresses in notebooks
SearchEnglish.stem = cache(SearchEnglish.stem)  # Sphinx forgets the words of a page on the next

_cfg = ConfigParser(delimiters=["="], interpolation=None)
_cfg.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
_cfg = _cfg["DEFAULT"]

project, author, version = _cfg["title"], _cfg["author"], _cfg["version"]
release, copyright, language = version, _cfg["copyright"], "en"
html_title = f"{project} {version}"

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_mime_priority_overrides = [("html", "image/gif", 5)]  # One that moves, rather than the strip of the README
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image", "smartquotes"]
myst_heading_anchors = 5
myst_heading_slug_func = "ldebm.docs.slug"
myst_dmath_double_inline = True
html_theme = "furo"
html_static_path = ["_static"]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
html_math_renderer = "mathml"
smartquotes = False  # That of MyST is faster


def _visit(self, node, display):
    import docutils.nodes
    from sphinx.util import logging

    try:
        self.body.append(mathml(node.astext(), display))
    except ValueError as e:
        logging.getLogger(__name__).warning("%s", e, location=node)
        self.body.append(self.encode(node.astext()))
    raise docutils.nodes.SkipNode


def _visit_block(self, node):
    self.body.append(self.starttag(node, "div", CLASS="math"))
    try:
        _visit(self, node, True)
    finally:
        self.body.append("</div>")


_UNSTYLED = {  # What no style sheet reads, and weighs
    r"<t([dh])([^>]*)><p>((?:(?!</?p>).)*)</p></t\1>": r"<t\1\2>\3</t\1>",
    r'<tr class="row-(?:odd|even)">': "<tr>",
    r'<span class="std std-(?:ref|doc)">([^<]*)</span>': r"\1",
    r'<span class="w">(\s*)</span>': r"\1",
}


@cache
def _contents(builder):
    return builder._get_local_toctree("index", collapse=False, titles_only=True, maxdepth=-1, includehidden=True)


def _same_contents(app, pagename, templatename, context, doctree):
    "One table of contents for all pages, since none is in a folder of its own; Sphinx would make it anew for each"
    context["toctree"] = lambda **settings: _contents(app.builder)


def _marked(contents, pagename):
    "A table of contents that says which page one is on"
    item = f'<li class="toctree-l1"><a class="reference internal" href="{pagename}.html">'
    here = '<li class="toctree-l1 current current-page"><a class="current reference internal" href="#">'
    return contents.replace(item, here)


def _described(app, pagename, templatename, context, doctree):
    "A line for search engines, pictures that open by themselves, and levels that headings of the sidebar lack"
    import docutils.nodes

    first = next(iter(doctree.findall(docutils.nodes.paragraph)), None) if doctree else None
    if first is not None:
        context["metatags"] = (
            context.get("metatags", "") + f'<meta name="description" content="{escape(first.astext())}">'
        )
    picture = r'(?<!">)<img alt="[^"]*" src="(_images/[^"]*)"[^>]*>'
    if "body" in context:
        body = re.sub(picture, r'<a class="zoom" href="\1">\g<0></a>', context["body"])
        for marked, plain in _UNSTYLED.items():
            body = re.sub(marked, plain, body)
        context["body"] = body
    tree = _marked(context.get("furo_navigation_tree", ""), pagename)
    context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app):
    app.connect("html-page-context", _same_contents, priority=400)  # before the theme
    app.connect("html-page-context", _described, priority=900)  # after it
    app.add_html_math_renderer(
        "mathml", inline_renderers=(lambda s, n: _visit(s, n, False), None), block_renderers=(_visit_block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
