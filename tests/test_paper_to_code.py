"The table of equations names functions that exist, on the pages that define them"

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = json.loads((ROOT / "nbs" / "paper_to_code.ipynb").read_text(encoding="utf-8"))["cells"]
PAPERS = {"TEXT", "PICTURES"}


def joined(text):
    return text if isinstance(text, str) else "".join(text)


def rows():
    "Rows of the page's list, read without running it: paper, quantity, formula, function"
    out = []
    for cell in PAGE:
        if cell["cell_type"] != "code":
            continue
        for node in ast.parse(re.sub(r"^#\|.*$", "", joined(cell["source"]), flags=re.M)).body:
            if isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") == "ROWS":
                for row in node.value.elts:
                    paper, *texts = row.elts
                    out.append((paper.id, *map(ast.literal_eval, texts)))
    return out


def tables():
    "Function -> pages that the committed tables link"
    shown = "".join(
        joined(o["data"]["text/markdown"])
        for cell in PAGE
        for o in cell.get("outputs", [])
        if "text/markdown" in o.get("data", {})
    )
    links = {}
    for where, page in re.findall(r"\[`([\w.]+)`\]\(([\w.]+\.ipynb)\)", shown):
        links.setdefault(where, set()).add(page)
    return links


@pytest.mark.parametrize("where", sorted({row[3] for row in rows()}))
def test_the_linked_page_defines_the_function(where):
    name, *path = where.split(".")
    module = importlib.import_module(f"ldebm.{name}")
    thing = module
    for part in path:
        thing = getattr(thing, part)
    assert callable(thing)
    page = re.search(r"File to edit: \.\./nbs/(\S+\.ipynb)", Path(module.__file__).read_text(encoding="utf-8"))[1]
    assert tables()[where] == {page}
    cells = json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))["cells"]
    code = "\n".join(joined(c["source"]) for c in cells if re.match(r"#\| ?export", joined(c["source"])))
    assert re.search(rf"^\s*(def|class) {path[-1]}\b", code, flags=re.M), f"{page} exports no {path[-1]}"
    if len(path) == 2:
        assert re.search(rf"^class {path[0]}\b", code, flags=re.M), f"{page} exports no class {path[0]}"


def test_rows_are_whole():
    found = rows()
    assert {row[0] for row in found} == PAPERS
    assert all(all(row) for row in found)
    assert len({row[:2] for row in found}) == len(found), "a quantity stands twice"
    assert set(tables()) == {row[3] for row in found}, "execute the page again: its tables are not those of its rows"
    for _, quantity, formula, _ in found:
        assert formula.count("{") == formula.count("}") and "$" not in formula and quantity.count("$") % 2 == 0
