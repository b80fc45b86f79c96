"""How the code and its pages read, in numbers that `test_reading` holds

python tests/measure.py [ROOT]              # the table
python tests/measure.py --offenders [ROOT]  # what stands behind it, page by page
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_COLUMNS, MOST_LINES, MOST_CELL, MOST_MODULE, MOST_WORDS = 120, 40, 30, 350, 40
METHOD = range(10, 32)  # pages of the method and the models: no backend, short modules
MACHINE_ROOM = range(80, 90)
SCOPES = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
ASSERTS = re.compile(r"^(test_|assert_|expect_|is_close$|equals$|ExceptionExpected$|raises$)")


class Offence(NamedTuple):
    page: str  # Stem of the notebook
    kind: str  # Name of the measure
    where: str


# -- notebooks


def names(source):
    "What a cell sets, at its own level"
    found = set()
    todo = [ast.parse(source)]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            if not isinstance(node, SCOPES):
                todo.append(node)
    return found


class Cell(NamedTuple):
    id: str
    kind: str  # `code`, `markdown` or `raw`
    source: str
    outputs: list

    @property
    def directives(self) -> list[str]:
        return re.findall(r"^#\|\s*(\w+)", self.source, flags=re.M)

    @property
    def exported(self) -> bool:
        return any(d in ("export", "exports", "exporti") for d in self.directives)

    @property
    def code(self) -> str:
        "Without directives; magics are no Python"
        return re.sub(r"^(#\||%|!).*$", "", self.source, flags=re.M)


class Page(NamedTuple):
    path: Path
    cells: list[Cell]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> int | None:
        found = re.match(r"(\d+)[a-z]?_", self.name)
        return int(found[1]) if found else None

    @property
    def module(self) -> str | None:
        "Name of the module that the page defines"
        sources = (re.search(r"^#\|\s*default_exp\s+(\w+)", c.source, flags=re.M) for c in self.cells)
        return next((m[1] for m in sources if m), None)

    @property
    def code_cells(self) -> list[Cell]:
        return [c for c in self.cells if c.kind == "code"]


def joined(text) -> str:
    return text if isinstance(text, str) else "".join(text)


def read_page(path: Path) -> Page:
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = (
        Cell(c.get("id", str(i)), c["cell_type"], joined(c["source"]), c.get("outputs", []))
        for i, c in enumerate(content["cells"])
    )
    return Page(path, list(cells))


@lru_cache
def pages(root: Path = ROOT) -> list[Page]:
    return [read_page(p) for p in sorted((root / "nbs").glob("*.ipynb"))]


def modules(root: Path = ROOT) -> list[Path]:
    return sorted((root / "ldebm").glob("[a-z]*.py"))


def page_of_module(root: Path = ROOT) -> dict[str, str]:
    return {p.module: p.name for p in pages(root) if p.module}


# -- code


def functions(tree: ast.AST) -> list:
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(function) -> int:
    "Lines from `def` to the last, the signature with its comments included"
    return function.end_lineno - function.lineno + 1


def targets(node: ast.AST) -> int:
    "How many names an assignment binds at once from as many expressions"
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return 0
    return max((len(t.elts) for t in node.targets if isinstance(t, ast.Tuple)), default=0)


def is_list_of_names(node: ast.AST) -> bool:
    "Is this the list of exported names?"
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"


def nested(tree: ast.AST) -> list[ast.IfExp]:
    "Conditional expressions that hold another"
    outer = [n for n in ast.walk(tree) if isinstance(n, ast.IfExp)]
    return [n for n in outer if any(isinstance(k, ast.IfExp) for c in ast.iter_child_nodes(n) for k in ast.walk(c))]


def semicolons(text: str) -> list[int]:
    "Lines that join statements"
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [t.start[0] for t in tokens if t.type == tokenize.OP and t.string == ";"]


def in_module(path: Path) -> Iterator[tuple[str, str]]:
    "Kind and place of what a module has that it should not have"
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    names = next((n for n in tree.body if is_list_of_names(n)), None)  # wrapped by nbdev, a little late
    skipped = range(names.lineno, names.end_lineno + 1) if names else ()
    for i, line in enumerate(text.splitlines(), 1):
        if len(line) > MOST_COLUMNS and i not in skipped:
            yield "lines over 120", f"{path.name}:{i}"
    for i in semicolons(text):
        yield "semicolons", f"{path.name}:{i}"
    for node in ast.walk(tree):
        if targets(node) > 2:
            yield "assignments of three or more", f"{path.name}:{node.lineno}"
    for node in nested(tree):
        yield "nested conditionals", f"{path.name}:{node.lineno}"
    for f in functions(tree):
        if length(f) > MOST_LINES:
            yield "functions over 40 lines", f"{path.name}:{f.lineno} {f.name} {length(f)}"


def module_offences(root: Path = ROOT) -> list[Offence]:
    owner = page_of_module(root)
    return [Offence(owner.get(p.stem, p.stem), kind, at) for p in modules(root) for kind, at in in_module(p)]


# -- cells


def parsed(cell: Cell) -> list[ast.stmt]:
    try:
        return ast.parse(cell.code).body
    except SyntaxError:  # a cell that shows an error, or another language
        return []


def is_patch(node: ast.stmt) -> bool:
    "A method that is defined outside its class"
    names = [d.func if isinstance(d, ast.Call) else d for d in getattr(node, "decorator_list", [])]
    return any(getattr(n, "id", getattr(n, "attr", "")).startswith("patch") for n in names)


def public(name: str) -> bool:
    return not name.startswith("_")


def definitions(body: list[ast.stmt]) -> list[str]:
    "Public functions and classes that statements define, patched methods aside"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n.name for n in body if isinstance(n, kinds) and public(n.name) and not is_patch(n)]


def is_program(body: list[ast.stmt]) -> bool:
    "A cell that holds a text in another language, and nothing else"
    texts = [n for n in body if isinstance(getattr(n, "value", None), ast.Constant) and isinstance(n.value.value, str)]
    return bool(body) and len(texts) == len(body)


def cell_offences(page: Page) -> Iterator[Offence]:
    for cell in page.code_cells:
        body = parsed(cell)
        n = len(cell.source.splitlines())
        machine_program = page.number in MACHINE_ROOM and is_program(body)
        if n > MOST_CELL and not machine_program:
            yield Offence(page.name, "cells over 30 lines", f"cell {cell.id}: {n}")
        found = definitions(body)
        if cell.exported and len(found) > 1:
            yield Offence(page.name, "cells with two public definitions", f"cell {cell.id}: {', '.join(found)}")


# -- what a page shows of what it exports


def loaded(nodes) -> set[str]:
    "Names that code reads, by themselves and as attributes"
    found = [n for node in nodes for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Load)]
    names = {n.id for n in found if isinstance(n, ast.Name)}
    return names | {n.attr for n in found if isinstance(n, ast.Attribute)}


def asserts(body: list[ast.stmt]) -> bool:
    nodes = [n for node in body for n in ast.walk(node)]
    if any(isinstance(n, ast.Assert) for n in nodes):
        return True
    calls = (n.func for n in nodes if isinstance(n, ast.Call))
    return any(ASSERTS.match(getattr(f, "id", getattr(f, "attr", ""))) for f in calls)


def shows(cell: Cell) -> bool:
    "Does the cell have an output, warnings aside?"
    return any(o["output_type"] != "stream" or o.get("name") == "stdout" for o in cell.outputs)


def exported_names(page: Page) -> dict[str, int]:
    "Public functions and classes, and the place of the cell that defines each"
    out = {}
    for i, cell in enumerate(page.cells):
        if cell.kind == "code" and cell.exported:
            out.update({n: i for n in definitions(parsed(cell))})
    return out


def helpers(page: Page) -> dict[str, set[str]]:
    "Functions of cells that are not exported, and what they read: what one of them uses is used where it is called"
    out = {}
    for cell in page.code_cells:
        if not cell.exported:
            for node in parsed(cell):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    out[node.name] = loaded([node])
    return out


def used_names(cell: Cell, local: dict[str, set[str]]) -> set[str]:
    "Names that a cell reads, by itself or through functions of other cells; what it only defines does not run"
    body = parsed(cell)
    names = loaded(n for n in body if not isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    todo = [n for n in names if n in local]
    while todo:
        new = local[todo.pop()] - names
        names |= new
        todo += [n for n in new if n in local]
    return names


def unshown(page: Page) -> list[str]:
    "Exported names that no later cell of the page uses with something shown or asserted"
    names = exported_names(page)
    local = helpers(page)
    seen = set()
    for i, cell in enumerate(page.cells):
        if cell.kind == "code" and not cell.exported and (shows(cell) or asserts(parsed(cell))):
            seen |= {n for n in used_names(cell, local) if names.get(n, i) < i}
    return [n for n in names if n not in seen]


def share_shown(root: Path = ROOT) -> tuple[int, int]:
    "How many exported names are shown, and of how many"
    of = [(len(exported_names(p)), len(unshown(p))) for p in pages(root) if p.module]
    return sum(n - u for n, u in of), sum(n for n, _ in of)


TABLE = re.compile(r"^\s*\|.*\|\s*$\n\s*\|[\s:|-]+\|\s*$", flags=re.M)


def is_picture_or_table(output: dict) -> bool:
    data = output.get("data", {})
    if any(kind.startswith("image/") for kind in data):
        return True
    html, markdown = joined(data.get("text/html", "")), joined(data.get("text/markdown", ""))
    return "<table" in html or "<svg" in html or bool(TABLE.search(markdown))


def has_picture_or_table(page: Page) -> bool:
    in_outputs = any(is_picture_or_table(o) for c in page.code_cells for o in c.outputs)
    in_text = (TABLE.search(c.source) or "![" in c.source for c in page.cells if c.kind == "markdown")
    return in_outputs or any(in_text)


# -- prose


def paragraphs(markdown: str) -> list[str]:
    "Text without code, formulas, tables, pictures, links and marks; a list item is a paragraph, a heading none"
    text = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.S | re.M)
    text = re.sub(r"\$\$.*?\$\$|\\begin\{.*?\\end\{\w+\*?\}", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->|<[^>]*>", "", text, flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`+[^`]*`+|\$[^$]*\$", "X", text)
    text = re.sub(r"^\s*(\|.*|#.*|:::.*|:.*:)$", "", text, flags=re.M)
    text = re.sub(r"^\s*>\s?", "", text, flags=re.M)
    return [item for p in re.split(r"\n\s*\n", text) for item in re.split(r"(?m)^\s*(?:[-*+]|\d+\.)\s", p)]


def sentences(markdown: str) -> list[str]:
    "Sentences end in a full stop, question or exclamation mark before a capital, a digit or a mark"
    ends = r"(?<=[.?!])[\"')\]*_]*\s+(?=[\"'(*_]*[A-Z0-9])"
    flat = (" ".join(p.split()) for p in paragraphs(markdown))
    return [s for p in flat for s in re.split(ends, p) if s]


def words(sentence: str) -> int:
    return len(re.findall(r"\S*\w\S*", sentence))


def prose_offences(page: Page) -> Iterator[Offence]:
    for cell in page.cells:
        if cell.kind == "markdown":
            for s in sentences(cell.source):
                if words(s) > MOST_WORDS:
                    yield Offence(
                        page.name, "sentences over 40 words", f"cell {cell.id}: {words(s)} words: {s[:60]} ..."
                    )


# -- pages of the method


def page_offences(root: Path = ROOT) -> list[Offence]:
    out = []
    for page in pages(root):
        out += [*cell_offences(page), *prose_offences(page)]
        if not has_picture_or_table(page):
            out.append(Offence(page.name, "pages without a picture or table", ""))
        if page.module:
            out += [Offence(page.name, "exported names not shown", n) for n in unshown(page)]
        if page.number in METHOD and page.module:
            n = len((root / "ldebm" / f"{page.module}.py").read_text(encoding="utf-8").splitlines())
            if n > MOST_MODULE:
                out.append(Offence(page.name, "modules of the method over 350 lines", str(n)))
    return out


def method_modules(root: Path = ROOT) -> list[str]:
    return [p.module for p in pages(root) if p.number in METHOD and p.module]


def machine_room(root: Path = ROOT) -> list[str]:
    return [p.module for p in pages(root) if p.number in MACHINE_ROOM and p.module]


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    "Module -> modules of the package that importing it loads, by what stands at the top of files, relative or by name"
    direct = {p.stem: set() for p in modules(root)}
    for path in modules(root):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                base = (node.module or "").removeprefix("ldebm").strip(".").split(".")[0]
                named = [base] if base else [a.name for a in node.names]
                inside = node.level > 0 or (node.module or "").split(".")[0] == "ldebm"
                direct[path.stem] |= {n for n in named if inside and n in direct}
            elif isinstance(node, ast.Import):
                named = (a.name.split(".") for a in node.names)
                direct[path.stem] |= {n[1] for n in named if n[0] == "ldebm" and len(n) > 1 and n[1] in direct}
    return {m: reached(m, direct) for m in direct}


def reached(start: str, direct: dict[str, set[str]]) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        new = direct[todo.pop()] - seen
        seen |= new
        todo += new
    return seen - {start}


def import_offences(root: Path = ROOT) -> list[Offence]:
    owner, loads, room = page_of_module(root), imports(root), set(machine_room(root))
    return [
        Offence(owner[m], "modules of the method that load the machine room", ", ".join(sorted(loads[m] & room)))
        for m in method_modules(root)
        if loads[m] & room
    ]


# -- all of it


def offences(root: Path = ROOT) -> list[Offence]:
    return module_offences(root) + page_offences(root) + import_offences(root)


KINDS = (
    "lines over 120",
    "semicolons",
    "assignments of three or more",
    "nested conditionals",
    "functions over 40 lines",
    "cells over 30 lines",
    "cells with two public definitions",
    "pages without a picture or table",
    "sentences over 40 words",
    "modules of the method over 350 lines",
    "modules of the method that load the machine room",
)


def measured(root: Path = ROOT) -> dict[str, int | str]:
    "Name of a measure -> what it is"
    found = offences(root)
    shown, of = share_shown(root)
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in modules(root))
    counts = {k: sum(o.kind == k for o in found) for k in KINDS}
    return {"lines": lines, **counts, "exported names shown": f"{shown} of {of}, {shown / max(of, 1):.0%}"}


def listed(found: list[Offence]) -> str:
    "Offences by page and kind"
    by_page = defaultdict(lambda: defaultdict(list))
    for o in found:
        by_page[o.page][o.kind].append(o.where)
    out = []
    for page in sorted(by_page):
        out.append(f"== {page}")
        for kind, where in by_page[page].items():
            if kind == "exported names not shown":
                out.append(f"   {len(where)} {kind}: {', '.join(where)}")
            else:
                out += [f"   {len(where)} {kind}", *(f"      {w}" for w in where if w)]
    return "\n".join(out)


def main(*args: str) -> None:
    roots = [Path(a) for a in args if not a.startswith("-")] or [ROOT]
    for root in roots:
        if "--offenders" in args:
            print(listed(offences(root)))
        else:
            print("\n".join(f"{k:50} {v}" for k, v in measured(root).items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
