"""Cells of a job run again, as a reader would in Jupyter: `python tests/again.py NOTEBOOK 'changed = 1' 'mispselt = 1'`

Imports, parameters and set-up run; then every name that the rest of the page gives is given, and cells are run again in
several orders. IPython alone, without a kernel."""

import ast
import json
import os
import sys
import tempfile
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

shell = InteractiveShell.instance()


def run(source):
    with capture_output():
        res = shell.run_cell(source, store_history=True)
    return res.error_before_exec or res.error_in_exec


def names(source):
    "What a cell names, at its own level"
    found, todo = set(), [ast.parse(source)]
    while todo:
        for n in ast.iter_child_nodes(todo.pop()):
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                found.add(n.id)
            if not isinstance(
                n, (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
            ):
                todo.append(n)
    return found


def main(path, changed, misspelt):
    cells = [c for c in json.loads(Path(path).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    source = ["".join(c["source"]) for c in cells]
    at = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    page, parameters, setup = source[at + 2 :], source[at], source[at + 1]
    assert "notebook_params(" in setup
    first = f"out = {tempfile.mkdtemp()!r}\nthreads = 1\ndevice = 'cpu'"
    second = f"{changed}\nthreads = 1\ndevice = 'cpu'\nout = {tempfile.mkdtemp()!r}"
    for s in (*source[:at], parameters, first, setup):
        assert not (e := run(s)), e
    own, whole = names(parameters), set().union(*map(names, page))
    assert not own & whole, f"cells of the page overwrite parameters: {own & whole}"
    for s in page:  # as if they had run
        for k in names(s):
            shell.user_ns[k] = 0.5 if k not in shell.user_ns else shell.user_ns[k]
        shell.history_manager.store_inputs(shell.execution_count, s)
        shell.execution_count += 1
    for order in (
        (setup,),
        (parameters, first, setup),
        (parameters, second, setup),
        (source[0], setup),
        ("scratch = 3", setup),
        (setup, setup),
    ):
        for s in order:
            assert not (e := run(s)), (order, e)
    k, v = changed.split(" = ")
    assert shell.user_ns["job"].__dict__[k] == ast.literal_eval(v), "a changed parameter was not taken"
    for order in ((parameters, misspelt, setup), (parameters + "\n" + misspelt, setup)):
        *before, last = order
        for s in before:
            assert not run(s)
        e = run(last)
        assert (
            isinstance(e, ValueError)
            and f"unknown parameter {misspelt.split(' = ')[0]!r}" in str(e)
            and "did you mean" in str(e)
        ), e
    assert not run(parameters) and not run(first) and not run(setup), "mended, and run again"
    print("again and again")


if __name__ == "__main__":
    os.environ["IN_TEST"] = "1"
    main(*sys.argv[1:])
