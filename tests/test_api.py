"What a reader finds of every exported name: a docstring, what each parameter means, an example"

import importlib
import inspect
import re
from functools import lru_cache
from pathlib import Path

import measure
import pytest

from ldebm.api import ApiTable, _exported, _own_doc
from ldebm.schedule import Schedule

ROOT = Path(__file__).resolve().parent.parent
PAGES = {p.module: p for p in measure.pages(ROOT) if p.module}


def exported(module: str) -> dict:
    found = importlib.import_module(f"ldebm.{module}")
    return {name: getattr(found, name) for name in getattr(found, "__all__", ())}


def documented(module: str) -> dict:
    "Functions and classes; a constant has no docstring"
    kinds = {name: symbol for name, symbol in exported(module).items() if not name.isupper()}
    return {name: symbol for name, symbol in kinds.items() if inspect.isclass(symbol) or callable(symbol)}


def has_own_call(symbol) -> bool:
    "Is what it is called with its own? Not where the constructor of PyTorch or of a base class is inherited"
    if not inspect.isclass(symbol):
        return True
    own = vars(symbol)
    return not own.get("_is_protocol") and not {"__init__", "_field_defaults"}.isdisjoint(own)


@pytest.mark.parametrize("module", PAGES)
def test_every_name_says_what_it_is(module):
    assert [name for name, symbol in documented(module).items() if not _own_doc(symbol)] == []


@pytest.mark.parametrize("module", PAGES)
def test_every_parameter_says_what_it_means(module):
    lacking = []
    for name, symbol in documented(module).items():
        if has_own_call(symbol):
            asked = [p for p in inspect.signature(symbol).parameters if not p.startswith("_")]
            rows = {row[0].strip("`"): row[3] for row in ApiTable(symbol).rows()}
            lacking += [f"{name}({parameter})" for parameter in asked if not rows.get(parameter)]
    assert lacking == [], f"{PAGES[module].path}: a comment beside each of these parameters"


NOT_ON_A_PAGE = {"docs.build": "Makefile"}  # What cannot run there, and the file that uses it


@lru_cache(None)
def constants(code: str) -> frozenset:
    return frozenset(re.findall(r"\b[A-Z][A-Z0-9_]+\b", code))


def used_elsewhere(page: measure.Page) -> set:
    "Constants in the code of other pages, tests and measurements"
    cells = [c.code for p in measure.pages(ROOT) if p is not page for c in p.code_cells]
    files = [path.read_text(encoding="utf-8") for part in ("tests", "bench") for path in (ROOT / part).glob("*.py")]
    return set().union(*map(constants, (*cells, *files)))


@pytest.mark.parametrize("module", PAGES)
def test_every_name_has_an_example(module):
    "Functions and classes on their own page; constants there or where they are used"
    page = PAGES[module]
    local = measure.helpers(page)
    used = set().union(*(measure.used_names(cell, local) for cell in page.code_cells if not cell.exported))
    lacking = [n for n in exported(module) if n not in used and f"{module}.{n}" not in NOT_ON_A_PAGE]
    lacking = [n for n in lacking if not n.isupper() or n not in used_elsewhere(page)]
    assert lacking == [], f"no cell of {page.path} uses these"


@pytest.mark.parametrize("name,file", NOT_ON_A_PAGE.items())
def test_what_is_on_no_page_is_used(name, file):
    module, _, function = name.partition(".")
    assert f"from ldebm.{module} import {function}" in (ROOT / file).read_text(encoding="utf-8")


def test_a_class_of_a_page_is_known_by_its_exported_twin():
    "The pages of the site describe classes that they define themselves"
    of_a_page = type("Schedule", (), dict(__module__="__main__"))
    assert _exported(of_a_page) is Schedule
    of_no_module = type("Nowhere", (), dict(__module__="__main__"))
    assert _exported(of_no_module) is of_no_module
