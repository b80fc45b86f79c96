"How the code and its pages read, in numbers: `python tests/measure.py` prints the table that `test_reading` holds"

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def modules(root: Path = ROOT) -> list:  # Exported modules
    return sorted(p for p in (root / "ldebm").glob("[a-z]*.py"))


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def targets(node) -> int:  # How many names an assignment binds at once from as many expressions
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return 0
    return max((len(t.elts) for t in node.targets if isinstance(t, ast.Tuple)), default=0)


def nested(tree) -> list:  # Conditional expressions inside others
    outer = [n for n in ast.walk(tree) if isinstance(n, ast.IfExp)]
    return [n for n in outer if any(isinstance(k, ast.IfExp) for c in ast.iter_child_nodes(n) for k in ast.walk(c))]


def semicolons(text: str) -> int:  # Statements joined on one line
    import io
    import tokenize

    return sum(t.type == tokenize.OP and t.string == ";" for t in tokenize.generate_tokens(io.StringIO(text).readline))


def of_modules(root: Path = ROOT) -> dict:
    "Counts over the exported modules"
    texts = [p.read_text(encoding="utf-8") for p in modules(root)]
    trees = [ast.parse(t) for t in texts]
    lines = [line for t in texts for line in t.splitlines()]
    return {
        "lines": len(lines),
        "lines over 120": sum(len(line) > 120 for line in lines),
        "semicolons": sum(semicolons(t) for t in texts),
        "assignments of three or more": sum(targets(n) > 2 for t in trees for n in ast.walk(t)),
        "nested conditionals": sum(len(nested(t)) for t in trees),
        "functions over 40 lines": sum(f.end_lineno - f.lineno + 1 > 40 for t in trees for f in functions(t)),
    }


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for k, v in of_modules(root).items():
        print(f"{k:32} {v}")
