"""Cells of a job run again, as a reader would in Jupyter.

    python tests/again.py NOTEBOOK 'changed = 1' 'mispselt = 1'

Imports, parameters and set-up run. Then every name that the rest of the page gives is given, and cells are run again in
several orders. IPython alone, without a kernel.
"""

import ast
import json
import os
import sys
import tempfile
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from measure import names

shell = InteractiveShell.instance()


def run(source):
    "The error of a cell, or `None`"
    with capture_output():
        result = shell.run_cell(source, store_history=True)
    return result.error_before_exec or result.error_in_exec


def run_all(*cells):
    "Run cells that must succeed"
    for source in cells:
        error = run(source)
        assert not error, (source, error)


def pretend(page):
    "Leave the names of cells behind as if they had run"
    for source in page:
        for name in names(source):
            shell.user_ns.setdefault(name, 0.5)
        shell.history_manager.store_inputs(shell.execution_count, source)
        shell.execution_count += 1


def values(*first):
    "The cell that papermill would inject"
    return "\n".join([*first, "threads = 1", "device = 'cpu'", f"out = {tempfile.mkdtemp()!r}"])


def check_misspelt(cells, misspelt):
    "The last of the cells, the set-up, says which parameter is not known"
    run_all(*cells[:-1])
    error = run(cells[-1])
    name = misspelt.split(" = ")[0]
    assert isinstance(error, ValueError), error
    assert f"unknown parameter {name!r}" in str(error) and "did you mean" in str(error), error


def main(path, changed, misspelt):
    cells = [c for c in json.loads(Path(path).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    source = ["".join(c["source"]) for c in cells]
    start = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    parameters, setup, page = source[start], source[start + 1], source[start + 2 :]
    assert "notebook_params(" in setup
    first, second = values(), values(changed)
    run_all(*source[:start], parameters, first, setup)
    pretend(page)
    run_all(setup)
    run_all(parameters, first, setup)
    run_all(parameters, second, setup)
    run_all(source[0], setup)
    run_all("scratch = 3", setup)
    run_all(setup, setup)
    name, value = changed.split(" = ")
    assert vars(shell.user_ns["job"])[name] == ast.literal_eval(value), "a changed parameter was not taken"
    check_misspelt((parameters, misspelt, setup), misspelt)
    check_misspelt((parameters + "\n" + misspelt, setup), misspelt)
    run_all(parameters, first, setup)  # mended, and run again
    print("again and again")


if __name__ == "__main__":
    os.environ["IN_TEST"] = "1"
    main(*sys.argv[1:])
