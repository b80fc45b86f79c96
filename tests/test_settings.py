"What a notebook cannot show about `settings`: every wrong value, and cells that are run again"

import math
from dataclasses import dataclass, replace
from typing import Literal, Optional

import pytest

from ldebm.image_job import ImageJob
from ldebm.image_job import resolve as image_settings
from ldebm.settings import check_params, check_settings, describe, notebook_params, setting, settings_table, unread
from ldebm.text_settings import TextJob, resolve


@dataclass(frozen=True)
class Cfg:
    rate: float = 0.1
    steps: int = 3
    mode: Literal["a", "b"] = "a"
    limit: Optional[int] = None
    sizes: tuple[int, ...] = (1, 2)
    flag: bool = False
    name: str = "x"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"stepz": 1}, "'stepz'.*'steps'"),
        ({"qqqqqq": 1}, "'qqqqqq'.*known are rate"),
        ({"rate": "0.1"}, "'rate' = '0.1' .*float"),
        ({"rate": None}, "'rate'"),
        ({"rate": True}, "'rate' = True"),
        ({"steps": 3.0}, "'steps' = 3.0 .*int"),
        ({"mode": "c"}, "'mode' = 'c' .*Literal"),
        ({"limit": "5"}, "'limit'"),
        ({"sizes": [1, "2"]}, "'sizes'"),
        ({"sizes": 3}, "'sizes'"),
        ({"flag": 1}, "'flag' = 1 .*bool"),
        ({"name": 3}, "'name' = 3 .*str"),
    ],
)
def test_bad_parameters_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        check_params(Cfg, values)


def test_good_parameters():
    cfg = check_params(Cfg, dict(rate=1, steps=5, mode="b", limit=4, sizes=[3, 4], flag=True, name="y"))
    assert cfg == Cfg(1.0, 5, "b", 4, (3, 4), True, "y") and type(cfg.rate) is float and type(cfg.sizes) is tuple


def test_errors_of_the_settings_class_itself_come_through():
    @dataclass(frozen=True)
    class Checked:
        T: int = 6

        def __post_init__(self):
            if self.T < 1:
                raise ValueError(f"T must be at least 1, got {self.T}")

    with pytest.raises(ValueError, match="T must be at least 1"):
        check_params(Checked, {"T": 0})


def test_notebook_parameters_ignore_what_a_session_brings_along():
    ns = {}
    exec(
        "from __future__ import annotations\nimport os, pathlib\nfrom typing import Optional, List\n"
        "from matplotlib import pyplot\nNames = List[str]\ndef f(): pass\n"
        "rate: float = 1\nsteps: int = 2\nmode: str = 'a'\nlimit: Optional[int] = None\n"
        "sizes: tuple = (1,)\nflag: bool = True\nname: str = 'n'",
        ns,
    )
    ns |= {"In": ["x"], "Out": {}, "_": 1, "_i1": "x", "exit": object(), "quit": object(), "get_ipython": lambda: None}
    assert notebook_params(Cfg, ns) == Cfg(1.0, 2, "a", None, (1,), True, "n")
    with pytest.raises(ValueError, match="unknown parameter 'stesp'.*'steps'"):
        notebook_params(Cfg, {**ns, "stesp": 1})
    with pytest.raises(ValueError, match="does not set 'name'"):
        notebook_params(Cfg, {k: v for k, v in ns.items() if k != "name"})


CELL = """\
rate: float = 1.
steps: int = 2
mode: str = 'a'
limit: int = None
sizes: tuple = (1,)
flag: bool = True
name: str = 'n'"""
SETUP = "job = notebook_params(Cfg, globals())\njob.rate"


def session(*cells):
    "What IPython keeps of cells that were run, the last one running now"
    ns = {"In": ["", *cells], "job": 1, "loss": 0.5, "rows": {"a": 1}}  # whatever the page has named
    for c in cells:
        if not c.startswith(("job", "loss", "%", "for")):
            exec(c, {"notebook_params": lambda *a: 1, "Cfg": Cfg}, ns)
    return ns


@pytest.mark.parametrize(
    "cells",
    [
        ("import os", CELL),
        (CELL, "rate = 3.", SETUP, "loss = .5"),
        (CELL, SETUP, "rows = {'a': 1}", CELL),
        ("scratch = 3", CELL),
        (CELL, SETUP, "scratch = 3"),
        (CELL, "# Parameters\nrate = float('nan')"),
        (CELL, "stesp = 1", SETUP, CELL),
        (CELL, SETUP, "%matplotlib inline", "for i in 'ab': x = i", "rate = 2."),
        (CELL + "\njob = notebook_params(Cfg, globals())",),
    ],
)
def test_cells_of_a_session_may_be_run_again(cells):
    ns = session(*cells, SETUP)
    got = notebook_params(Cfg, ns)
    assert got.steps == 2 and (got.rate == ns["rate"] or math.isnan(ns["rate"]))


@pytest.mark.parametrize(
    "cells",
    [
        (CELL, "stesp = 1"),
        (CELL, "# Parameters\nrate = 2.\nstesp = 1"),
        (CELL.replace("steps", "stesp"),),
        (CELL, SETUP, CELL + "\nstesp: int = 3"),
        (CELL, SETUP, CELL, "stesp = 1"),
        (CELL, SETUP, "loss = .5", "rate = 2.\nstesp = 3"),
        (CELL + "\nprint(rate)", "stesp = float('inf')"),
    ],
)
def test_misspelt_parameters_of_a_session_are_found(cells):
    with pytest.raises(ValueError, match="unknown parameter 'stesp'.*'steps'"):
        notebook_params(Cfg, session(*cells, SETUP))


# --- described fields


@dataclass(frozen=True)
class Described:
    plain: int = 3
    rate: float = setting(0.1, "Speed", group="training", above=0, high=1)
    steps: int = setting(5, "Updates", group="training", low=1)
    mode: str = setting("a", "Way", choices=("a", "b"), systems=("ebm",))
    limit: Optional[int] = setting(None, "Stop early", low=1, operational=True)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(rate=0.0), r"rate=0.0 \(Speed\) must be above 0 and at most 1: change it, or leave it out"),
        (dict(rate=1.5), "rate=1.5.*at most 1"),
        (dict(rate=float("nan")), "rate=nan.*a finite number above 0"),
        (dict(steps=0), r"steps=0 \(Updates\) must be at least 1"),
        (dict(mode="c"), "mode='c'.*one of 'a', 'b'.*leave it out"),
        (dict(limit=0), "limit=0.*at least 1"),
        (dict(rate=-1.0, steps=0), "rate=-1.0.*; setting steps=0"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        check_settings(Described(**values))


def test_values_in_range_pass():
    for values in ({}, dict(rate=1.0, steps=1, mode="b"), dict(limit=1), dict(plain=-5)):
        cfg = Described(**values)
        assert check_settings(cfg) is cfg


def test_what_nobody_reads():
    assert unread(Described(mode="b", steps=9), "normal") == ["mode"]
    assert unread(Described(mode="b"), ("gru", "ebm")) == unread(Described(), "normal") == []


def test_a_preset_is_a_dict_or_an_instance():
    cfg = Described(rate=0.2, steps=7, plain=4)
    assert describe(cfg) == "training: rate=0.2 (0.1), steps=7 (5)\nother: plain=4 (3)"
    assert describe(cfg, dict(rate=0.2, plain=4)) == "training: steps=7 (5)"
    assert describe(cfg, replace(cfg, mode="b")) == "other: mode='a' ('b')"


def test_a_table_shows_every_setting_once():
    cfg = Described(rate=0.2, mode="b")
    shown = settings_table(cfg, dict(mode="a"))._repr_markdown_()
    changed, folded = shown.split("<details>", 1)
    for name in ("rate", "mode"):
        assert changed.count(f"| `{name}` |") == 1 and f"`{name}`" not in folded
    for name in ("plain", "steps", "limit"):
        assert folded.count(f"| `{name}` |") == 1 and f"`{name}`" not in changed
    assert shown.count("<details>") == shown.count("</details>") == 2
    assert shown.count("\n\n</details>") == 2, "Markdown inside a fold needs blank lines around it"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: check_params(TextJob, dict(row="vae")), "unknown parameter 'row' for TextJob: row is now system"),
        (lambda: check_params(ImageJob, dict(rows="ddpm")), "'rows' for ImageJob: rows is now systems"),
        (lambda: resolve(TextJob(settings="floor=.1")), "unknown setting 'floor'; floor is now free_nats[.]$"),
        (lambda: resolve(TextJob(settings="tau=.5")), "tau is now temperature"),
        (lambda: resolve(TextJob(settings="b2=.1")), "b2 is now squared_step"),
        (lambda: image_settings(ImageJob(settings="tau_y=.5")), "tau_y is now symbol_temperature"),
        (lambda: resolve(TextJob(settings="row=vae")), "'system' is a parameter of its own.* `-p system vae`"),
    ],
)
def test_names_of_earlier_versions_are_told_their_new_ones(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
