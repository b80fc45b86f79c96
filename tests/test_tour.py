"The tour runs from the first cell to the last, and so do the answers to its exercises"

import json
import re
from pathlib import Path

import pytest
from test_jobs import papermill

ROOT = Path(__file__).resolve().parent.parent
ANSWER = re.compile(r"<details>\s*<summary>Answer</summary>\s*```python\n(.*?)```.*?</details>", flags=re.S)


def text(source):
    return source if isinstance(source, str) else "".join(source)


def with_answers(nb):
    "The notebook with every folded answer as a cell below its exercise, and how many there are"
    cells, n = [], 0
    for cell in nb["cells"]:
        cells.append(cell)
        for answer in ANSWER.findall(text(cell["source"])) if cell["cell_type"] == "markdown" else ():
            n += 1
            cells.append(
                dict(cell_type="code", id=f"answer{n}", metadata={}, source=answer, outputs=[], execution_count=None)
            )
    return {**nb, "cells": cells}, n


@pytest.mark.slow
def test_the_tour_and_its_answers_run(tmp_path, monkeypatch):
    "A minute: the training has 20 steps in place of hundreds"
    nb, n = with_answers(json.loads((ROOT / "nbs" / "tour.ipynb").read_text(encoding="utf-8")))
    exercises = sum(len(re.findall(r"^\*\*\d\.\*\*", text(c["source"]), flags=re.M)) for c in nb["cells"])
    assert n == exercises == 3
    (tmp_path / "tour.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")  # beside which runs/ appears
    done = tmp_path / "done.ipynb"
    res = papermill(done, "-p", "steps", "20", notebook=tmp_path / "tour.ipynb", PYTHONPATH=str(ROOT))
    assert res.returncode == 0, res.stderr[-2000:]
    cells = {c["id"]: c for c in json.loads(done.read_text(encoding="utf-8"))["cells"]}
    answers = ["".join(text(o["text"]) for o in cells[f"answer{i}"]["outputs"]) for i in (1, 2, 3)]
    obeyed = [float(x) for x in re.findall(r"guidance \d: ([\d.]+)", answers[0])]
    assert obeyed[0] < 0.3 < obeyed[1] < obeyed[2], answers[0]
    grammatical = [int(x) for x in re.findall(r": (\d+) of 500", answers[1])]
    assert len(grammatical) == 4 and grammatical[0] < min(grammatical[2:]), answers[1]
    met = [float(x) for x in re.findall(r"([\d.]+) are read as asked", answers[1])]
    assert len(met) == 4 and met[0] < 0.2 < 0.5 < met[2], answers[1]
    moved = [int(x) for x in re.findall(r": (\d+) of 20", answers[2])]
    assert moved[0] <= 3 < 14 <= moved[-1], answers[2]
    assert (tmp_path / "runs" / "tour" / "model" / "result.json").exists()
