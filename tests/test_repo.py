"The repository itself: what is generated is in step, what is stated is true, the commands that are written down work"

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import measure
import pytest
from stand_in import write_stand_in

from ldebm.pages import SECTIONS, section_of, slug

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
NOTEBOOK = {p.stem: p for p in NOTEBOOKS}
JOBS = [p for p in NOTEBOOKS if p.name.startswith("train_")]
MODULES = sorted(p.stem for p in (ROOT / "ldebm").glob("[a-z]*.py"))
LOCKS = sorted((ROOT / "requirements").glob("lock-py*.txt"))


# A make that runs these tests must not pass its own settings to the makes they run
ITS_OWN = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "NO_VENV")
ENV = {k: v for k, v in os.environ.items() if k not in ITS_OWN}


def name(p):
    return p.name


def text(x):
    return x if isinstance(x, str) else "".join(x)


def cells(p):
    return json.loads(p.read_text(encoding="utf-8"))["cells"]


def outputs(p):
    return [o for c in cells(p) for o in c.get("outputs", [])]


def settings():
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def words(p):
    "Everything a reader could see in a notebook, pictures aside"
    for c in cells(p):
        yield text(c["source"])
        for o in c.get("outputs", []):
            yield text(o.get("text", ""))
            yield "\n".join(map(str, o.get("traceback", [])))
            yield from (text(v) for k, v in o.get("data", {}).items() if k.startswith("text/"))


def targets():
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))


def code_parts(md):
    return re.findall(r"```(?:sh|bash|console)\n(.*?)```", md, flags=re.S) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", md)


# -- generated files --------------------------------------------------------------------------------------------------


def test_readme_in_step():
    from ldebm.docs import readme

    want, images = readme(ROOT)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == want, (
        "README.md is out of step with nbs/index.ipynb: make prepare"
    )
    for path, data in images.items():
        assert (ROOT / path).read_bytes() == data, f"{path} is out of step: make prepare"


@pytest.mark.parametrize("page,least", [("index", 2), ("results", 4)])
def test_tables_show_the_records(page, least, monkeypatch):
    "What a page of results was last executed to is what its cells make of the records that lie there"
    if subprocess.run(["git", "status", "--porcelain", "results"], cwd=ROOT, capture_output=True, text=True).stdout:
        pytest.skip("results/ holds records that are not committed")
    monkeypatch.chdir(ROOT / "nbs")
    monkeypatch.setenv("MPLBACKEND", "agg")
    names, seen = {}, 0
    for c in cells(ROOT / "nbs" / f"{page}.ipynb"):
        if c["cell_type"] != "code":
            continue
        tree, made = ast.parse(text(c["source"])), None
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, page, "exec"), names)
        if last is not None:
            made = eval(compile(ast.Expression(last.value), page, "eval"), names)
        for o in c["outputs"]:
            if "text/markdown" not in o.get("data", {}):
                continue
            assert text(o["data"]["text/markdown"]) == made.data, (
                f"nbs/{page}.ipynb is out of step with results/: execute it\n{text(c['source'])}"
            )
            seen += 1
    assert seen >= least


FRONT, MAP = ROOT / "nbs" / "index.ipynb", ROOT / "nbs" / "map.ipynb"

# What a reader of the front page looks for, and how its definition begins
WHERE = {
    "the backward conditional": (r"def conditional\(\s*self: Levels", "12c_levels"),
    "the noise schedule": (r"class Schedule\b", "10_schedule"),
    "the training step": (r"def step\(\s*self: Loop", "50_train"),
    "wKL": (r"def wkl\(", "41_text_metrics"),
    "where to add a prior": (r"PRIORS\['\w+'\] = ", "own_prior"),
}


def shown(page):
    "Markdown of a notebook, what its cells made included"
    for c in cells(page):
        if c["cell_type"] == "markdown":
            yield text(c["source"])
        yield from (
            text(o["data"]["text/markdown"]) for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})
        )


def links(page):
    "Pages that a notebook leads to"
    found = re.findall(r"\]\((\w+\.ipynb)[#)]", "\n".join(shown(page)))
    return [p for p in (ROOT / "nbs" / target for target in dict.fromkeys(found)) if p.exists()]


def headings(md):
    "Anchors of Markdown"
    return {slug(h) for h in re.findall(r"^#+ (.*)$", md, flags=re.M)}


def defining(page, begins):
    return [
        c for c in cells(page) if c["cell_type"] == "code" and re.search(f"^{begins}", text(c["source"]), flags=re.M)
    ]


@pytest.mark.parametrize("what", WHERE)
def test_the_front_page_leads_to_the_code(what):
    "By at most two links; by one from the map's table that asks for it"
    begins, home = WHERE[what]
    near = links(FRONT)
    assert MAP in near
    near += [page for p in near for page in links(p)]
    assert [p.stem for p in dict.fromkeys(near) if defining(p, begins)] == [home]
    asked = "\n".join(shown(MAP)).partition("## Where is")[2].partition("\n## ")[0]
    (url,) = re.findall(rf"\(({home}\.ipynb[^)]*)\)", asked)
    assert not url.partition("#")[2] or url.partition("#")[2] in headings("\n".join(shown(NOTEBOOK[home])))


def test_every_page_is_on_the_map():
    "Every room is in the table that is in view, every page in the one that is folded, and no link is dead"
    rooms = "\n".join(shown(MAP)).partition("## Rooms")[2].partition("<details>")[0]
    in_view = re.findall(r"\]\((\w+\.ipynb)\)", rooms)
    assert list(dict.fromkeys(section_of(page) for page in in_view)) == list(SECTIONS)
    assert set(links(MAP)) | {FRONT, MAP} == set(NOTEBOOKS)


def test_no_two_notebooks_are_one_page():
    from ldebm.pages import page_name

    pages = [page_name(p) for p in NOTEBOOKS]
    assert len(set(pages)) == len(pages), (
        f"one page of several notebooks: {sorted(p for p in pages if pages.count(p) > 1)}"
    )


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_prose_leads_to_pages_that_are_there(nb):
    prose = "\n".join(text(c["source"]) for c in cells(nb) if c["cell_type"] == "markdown")
    dead = [u for u in re.findall(r"\]\((\w+\.ipynb)[#)]", prose) if not (ROOT / "nbs" / u).exists()]
    assert not dead, f"links to pages that are not there: {dead}"


def without_code(md):
    return re.sub(r"```.*?```", "", md, flags=re.S)


def test_readme_links_lead_somewhere():
    "To files that are there, and to headings that they have"
    md = without_code((ROOT / "README.md").read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^()\s#]*)#?([^()\s]*)\)", md)
    assert len(found) > 20
    for path, anchor in found:
        if re.match(r"[a-z]+:", path):
            continue
        target = ROOT / (path or "README.md")
        assert target.exists(), f"README.md links to {path}, which is not there"
        there = "\n".join(shown(target)) if target.suffix == ".ipynb" else target.read_text() if anchor else ""
        assert not anchor or anchor in headings(there), f"README.md links to {path}#{anchor}: no such heading"


def prose(md):
    "Markdown without code, tables, formulas, pictures and the targets of links"
    lines = [line for line in without_code(md).splitlines() if not line.startswith(("|", "<!--"))]
    return re.sub(r"!\[[^]]*\]\([^)]*\)|(?<=\])\([^)]*\)|`[^`\n]*`|\$\$[^$]*\$\$|\$[^$]*\$", " ", "\n".join(lines))


def test_readme_is_short():
    words = re.findall(r"\S*\w\S*", prose((ROOT / "README.md").read_text(encoding="utf-8")))
    assert 300 < len(words) <= 900, f"README.md has {len(words)} words, 900 allowed"


STATED = {"3.10", "3.13", "2022", "2024", "95"}  # Versions of Python, years of the papers, level of intervals


def test_figures_of_the_readme_come_from_cells():
    "What cells typed by hand say holds no figure; those in README.md are what executed cells made"
    figure = re.compile(r"(?<![\w.-])\d+(?:[.,]\d+)*")
    typed = "\n".join(text(c["source"]) for c in cells(FRONT) if c["cell_type"] == "markdown")
    assert set(figure.findall(prose(typed))) <= STATED, "figures typed by hand on the front page"
    made = [text(o["data"]["text/markdown"]) for o in outputs(FRONT) if "text/markdown" in o.get("data", {})]
    shown_there = figure.findall(prose((ROOT / "README.md").read_text(encoding="utf-8")))
    computed = figure.findall(prose("\n".join(made)))
    assert len(computed) > 10 and set(computed) <= set(shown_there)
    assert set(shown_there) <= STATED | set(computed)


@pytest.mark.slow
def test_contributing_commands(tmp_path):
    "The three commands of CONTRIBUTING.md run as written, in a copy, and leave a tree that was in step as it was"
    md = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    commands = [c for block in re.findall(r"```sh\n(.*?)```", md, flags=re.S) for c in block.splitlines()]
    assert len(commands) == 3
    copy = tmp_path / "ldebm"
    ignore = shutil.ignore_patterns(
        ".git",
        ".venv",
        "runs",
        "_build",
        "_proc",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
        "*.egg-info",
        ".ipynb_checkpoints",
    )
    shutil.copytree(ROOT, copy, ignore=ignore)

    def state():
        return {str(p.relative_to(copy)): p.read_bytes() for d in ("nbs", "ldebm") for p in (copy / d).glob("*.*")} | {
            "README.md": (copy / "README.md").read_bytes()
        }

    before = state()
    # this environment instead of a new one, one notebook and one test instead of all
    env = {
        **ENV,
        "NO_VENV": "1",
        "PYTHONPATH": str(copy),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{ENV['PATH']}",
        "NBDEV_ARGS": "--path nbs/93_docs.ipynb",
        "PYTEST_ARGS": "tests/test_repo.py -k changelog_and",
    }
    for c in commands:
        res = subprocess.run(["bash", "-c", c], cwd=copy, env=env, capture_output=True, text=True)
        assert res.returncode == 0, f"{c}: {res.stdout[-2000:]}{res.stderr[-2000:]}"
    assert "1 passed" in res.stdout and "skipped for want of data" in res.stdout
    after = state()
    changed = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    assert not changed, f"out of step: {changed}: make prepare"


@pytest.mark.parametrize("doc", ["CONTRIBUTING.md", "README.md", "CHANGELOG.md"])
def test_commands_name_targets(doc):
    md = (ROOT / doc).read_text(encoding="utf-8")
    used = {t for part in code_parts(md) for t in re.findall(r"\bmake +([a-z][a-z0-9-]*)", part)}
    assert used or doc == "CHANGELOG.md"
    assert used <= targets(), f"{doc} names targets that the Makefile does not have: {sorted(used - targets())}"


def test_workflows_name_targets_and_files():
    flows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    runs = [line.split("run: ", 1)[1] for f in flows for line in f.read_text().splitlines() if "run: " in line]
    made = {m for r in runs for m in re.findall(r"\bmake ([a-z-]+)", r)}
    assert {"venv", "test", "docs"} <= made <= targets()
    assert [r for r in runs if not r.startswith("make ")] == [".ci/run"] and os.access(ROOT / ".ci" / "run", os.X_OK)


# -- notebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_notebook_clean(nb):
    for part in words(nb):
        m = re.search(r"(?<![\w.~:/])/(?:root|home|work|tmp|Users)/\w+", part)
        assert not m, f"an absolute path: ...{part[max(0, m.start() - 60) : m.end() + 60]}..."
    for o in outputs(nb):
        assert o["output_type"] != "error", f"an error in the outputs: {o.get('evalue')}"
        assert not any("widget" in k for k in o.get("data", {})), "a widget in the outputs"
        seen = text(o.get("text", "")) + "".join(text(v) for k, v in o.get("data", {}).items() if k.startswith("text/"))
        pictures = any(kind.startswith("image/") for kind in o.get("data", {}))
        assert pictures or seen.strip(), "an output with nothing in it, as a progress bar leaves it"
        assert not re.search(r"\r(?!\n)|\d%\|[ #█▏▎▍▌▋▊▉]|\d(?:it/s|s/it)\b|\x1b\[", seen), (
            f"progress debris in the outputs: {seen[:200]!r}"
        )


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_notebook_size(nb):
    size = len(json.dumps([c.get("outputs", []) for c in cells(nb)]))
    shows_pictures = {nb: 600_000 for nb in JOBS} | {ROOT / "nbs" / "results.ipynb": 300_000}
    limit = shows_pictures.get(nb, 200_000)
    assert size <= limit, f"outputs of {size:,} bytes, {limit:,} allowed"


@pytest.mark.parametrize("nb", [p for p in NOTEBOOKS if p.name[0].isdigit()], ids=name)
def test_component_notebook(nb):
    from ldebm.pages import page_name

    src = [text(c["source"]) for c in cells(nb)]
    exp = [m[1] for s in src for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", s, flags=re.M)]
    assert exp == [page_name(nb)], "the module is named like the notebook, without its number"
    assert (ROOT / "ldebm" / f"{exp[0]}.py").exists()
    assert outputs(nb), "committed without outputs: execute it"
    assert re.match(r"# .+\n> .+", src[0]), "the first cell is a title and one line that begins with >"


def test_jobs_exist():
    assert {p.name for p in JOBS} >= {"train_ptb.ipynb", "train_toy2d.ipynb"}


@pytest.mark.parametrize("nb", JOBS, ids=name)
def test_job_parameters(nb):
    "One cell keeps its tag, holds annotated scalars with comments, and papermill prints a help page of them"
    tagged = [text(c["source"]) for c in cells(nb) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    body = ast.parse(tagged[0]).body
    assert body and all(
        isinstance(n, ast.AnnAssign) and isinstance(n.value, (ast.Constant, ast.UnaryOp)) for n in body
    ), "annotated scalars only"
    lines = tagged[0].splitlines()
    bare = [n.target.id for n in body if "#" not in lines[n.lineno - 1]]
    assert not bare, f"parameters without a comment: {bare}"
    res = subprocess.run(
        [sys.executable, "-m", "papermill", "--help-notebook", str(nb)], capture_output=True, text=True, cwd=ROOT
    )
    missing = [n.target.id for n in body if not re.search(rf"^\s+{n.target.id}: ", res.stdout, flags=re.M)]
    assert res.returncode == 0 and not missing, (
        f"papermill --help-notebook does not list {missing}: {res.stdout}{res.stderr}"
    )


@pytest.mark.parametrize("nb", JOBS, ids=name)
def test_job_keeps_its_parameters(nb):
    "A cell that set one would change the job for whoever runs the set-up once more; what is read is the job's"
    code = [c for c in cells(nb) if c["cell_type"] == "code"]
    tagged = ["parameters" in c["metadata"].get("tags", []) for c in code]
    parameters = measure.names(text(code[tagged.index(True)]["source"]))
    others = [ast.parse(text(c["source"])) for c, is_tagged in zip(code, tagged) if not is_tagged]
    assert parameters and not parameters & {n.id for cell in others for n in ast.walk(cell) if isinstance(n, ast.Name)}


@pytest.mark.parametrize("nb", JOBS, ids=name)
def test_job_defines_nothing(nb):
    src = [text(c["source"]) for c in cells(nb) if c["cell_type"] == "code"]
    assert not any(re.search(r"^#\|\s*(?:default_exp|exports?)\b", s, flags=re.M) for s in src), "a job exports nothing"


# -- the package ------------------------------------------------------------------------------------------------------


def import_alone(*modules):
    cmd = [sys.executable, str(ROOT / "tests" / "import_alone.py"), *modules]
    return subprocess.run(cmd, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_modules_import_alone():
    "Each in a process of its own, with the optional packages hidden; the method brings nothing of the machine room"
    names = [f"ldebm.{m}" for m in MODULES]
    res = import_alone("--loaded", *names)
    assert MODULES and res.returncode == 0, res.stderr[-2000:]
    brought = {line.split()[0]: set(line.split()[1:]) for line in res.stdout.splitlines()}
    assert list(brought) == names
    room, method = set(measure.machine_room(ROOT)), measure.method_modules(ROOT)
    assert len(room) >= 3 and len(method) >= 10
    wrong = {m: sorted(brought[f"ldebm.{m}"] & room) for m in method if brought[f"ldebm.{m}"] & room}
    assert not wrong, wrong


def test_hidden_packages_are_hidden():
    "The test above can fail: a module that needs matplotlib does, and the others are still tried"
    res = import_alone("matplotlib.pyplot", "ldebm.core", "ldebm.nowhere")
    assert res.returncode == 2 and res.stdout == "ok ldebm.core\n"
    assert (
        "matplotlib.pyplot:" in res.stderr
        and "hidden" in res.stderr
        and "No module named 'ldebm.nowhere'" in res.stderr
    )


def test_modules_have_notebooks():
    from ldebm.pages import page_name

    assert set(MODULES) <= {page_name(p) for p in NOTEBOOKS}


# -- statements -------------------------------------------------------------------------------------------------------


def test_changelog_and_versions():
    import ldebm

    version = settings()["version"]
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert ldebm.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_licence():
    assert settings()["license"] == "apache2"
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (
        "Apache License" in licence
        and "Version 2.0, January 2004" in licence
        and "END OF TERMS AND CONDITIONS" in licence
    )
    for f in ("CITATION.cff", "CONTRIBUTING.md", "setup.py"):
        assert "Apache-2.0" in (ROOT / f).read_text(encoding="utf-8"), f
    assert re.search(r"Apache[- ]2\.0|Apache License", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_citation():
    import yaml

    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software" and cff["authors"] and cff["message"]
    assert [(r["year"], len(r["authors"])) for r in cff["references"]] == [(2022, 9), (2024, 2)]


def test_locks_cover_pythons():
    assert [p.name for p in LOCKS] == [f"lock-py{v}.txt" for v in (310, 311, 312, 313)]


@pytest.mark.parametrize("lock", LOCKS, ids=name)
def test_lock(lock):
    "Exact pins and nothing else, which satisfy every requirement in settings.ini"
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [s for s in lock.read_text(encoding="utf-8").splitlines() if s and not s.startswith("#")]
    bad = [s for s in lines if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*", s)]
    assert not bad, f"not a plain pin: {bad}"
    pins = dict(s.split("==") for s in lines)
    assert not [n for n in pins if re.match(r"nvidia-|cuda-|triton", n)], "torch finds its accelerator libraries itself"
    cfg = settings()
    for r in (
        cfg["requirements"]
        + " "
        + cfg["dev_requirements"]
        + " "
        + cfg["text_requirements"]
        + " "
        + cfg["plot_requirements"]
    ).split():
        r = Requirement(r)
        version = pins.get(canonicalize_name(r.name))
        assert version and r.specifier.contains(version), f"{r} is not met by {version}"
    assert {"setuptools", "wheel", "pip"} & pins.keys() >= {"setuptools", "wheel"}


def test_no_machine_paths_in_files():
    for f in (
        "Makefile",
        ".ci/run",
        "setup.py",
        "settings.ini",
        "pyproject.toml",
        "CONTRIBUTING.md",
        "README.md",
        "docs/conf.py",
    ):
        m = re.search(r"(?<![\w.~:/$}])/(?:root|home|work|Users)/\w+", (ROOT / f).read_text(encoding="utf-8"))
        assert not m, f"{f} names {m.group(0)}"


# -- make and the site ------------------------------------------------------------------------------------------------


def test_make_says_what_python_it_needs(tmp_path):
    res = subprocess.run(
        ["make", "venv", "PYTHON=python9.9", f"VENV={tmp_path}/v"], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert res.returncode != 0 and "3.10, 3.11, 3.12 or 3.13" in res.stderr and not (tmp_path / "v").exists()


def test_help_lists_targets():
    res = subprocess.run(["make", "help"], cwd=ROOT, env=ENV, capture_output=True, text=True)
    listed = set(re.findall(r"^  make ([a-z0-9-]+)", res.stdout, flags=re.M))
    assert listed == targets()


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell,ok",
    [
        ("See [the other](02_other.ipynb#there) and $x_t$.", True),
        ("See [nothing](03_none.ipynb).", False),
        ("See [the other](02_other.ipynb#nowhere).", False),
        (r"A formula $\nosuchcommand{x}$.", False),
    ],
)
def test_dead_link_fails_the_build(tmp_path, cell, ok):
    from ldebm.docs import remote_parts, write_pages

    for d in ("nbs", "proc", "ldebm"):
        (tmp_path / d).mkdir()

    def md(s, kind="markdown"):
        return dict(cell_type=kind, metadata={}, source=s)

    for n, body in (("index", "Front"), ("01_one", cell), ("02_other", "## There\n\nText")):
        (tmp_path / "nbs" / f"{n}.ipynb").write_text(json.dumps(dict(cells=[md(f"# {n}"), md(body)])))
        (tmp_path / "proc" / f"{n}.ipynb").write_text(
            json.dumps(dict(cells=[md(f"---\ntitle: {n}\n---", "raw"), md(body)]))
        )
    write_pages(tmp_path / "proc", tmp_path / "nbs", tmp_path / "pages", tmp_path)
    cmd = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-c",
        str(ROOT / "docs"),
        str(tmp_path / "pages"),
        str(tmp_path / "html"),
    ]
    res = subprocess.run(cmd, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (res.returncode == 0) == ok, res.stderr
    if ok:
        assert "<math" in (tmp_path / "html" / "one.html").read_text() and remote_parts(tmp_path / "html") == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=name)
def test_no_placeholder(path):
    "No word that was to be replaced is left on a page"
    prose = (
        path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n".join(text(c["source"]) for c in cells(path))
    )
    assert not re.search(r"\b(DISCUSSION|TODO|TBD|FIXME|XXX|lorem ipsum)\b", prose)


def test_a_run_that_is_refused_leaves_a_finished_notebook_alone(tmp_path):
    "`make train` with a stand-in for papermill"
    run = tmp_path / "a run"
    stand_in = write_stand_in(
        tmp_path,
        "Path(arguments[1]).write_text(os.environ['PASS'])",
        "return int(os.environ['PASS'] == 'refused')",
    )
    run.mkdir()
    shutil.copy(ROOT / "models" / "grammar" / "result.json", run)
    (run / "samples.txt").write_text("\n".join(f"sample {i} ." for i in range(20)))
    bleu = json.loads((run / "result.json").read_text())["metrics"]["bleu"]["value"]

    def make(which):
        return subprocess.run(
            ["make", "train", "NO_VENV=1", stand_in, f"RUN={run}"],
            cwd=ROOT,
            env={**ENV, "PASS": which, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    def names():
        return sorted(p.name for p in run.glob("*.ipynb"))

    res = make("first")
    assert res.returncode == 0 and names() == ["train_ptb.ipynb"], res.stdout + res.stderr
    assert re.search(rf"\nbleu +{bleu:.4g} ", res.stdout) and "\nkl " not in res.stdout
    assert "\nsample 9 .\n" in res.stdout and "sample 10" not in res.stdout
    res = make("refused")
    assert res.returncode != 0 and names() == ["train_ptb.ipynb", "train_ptb.stopped.ipynb"]
    assert (run / "train_ptb.ipynb").read_text() == "first"
    assert "train_ptb.stopped.ipynb shows where" in res.stderr and "goes on from its checkpoint" not in res.stderr
    (run / "checkpoint.safetensors").touch()
    assert "the same command goes on from its checkpoint" in make("refused").stderr
