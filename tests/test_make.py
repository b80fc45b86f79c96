"make: every variable reaches the targets that it is for, whatever it holds, and is refused elsewhere"

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in import write_stand_in

ROOT = Path(__file__).resolve().parent.parent
JOB = {"PRESET", "SEED", "NAME", "RUN", "ARGS"}
SWEEP = {"CORPUS", "PRESET", "SEED", "SEEDS", "SETTINGS", "NAME", "RUN", "TABLE_ARGS"}
TAKES = dict(
    train=JOB | {"CORPUS", "OBJECTIVE", "SYSTEM", "SETTINGS"},
    toy2d=JOB,
    digits=JOB | {"OBJECTIVE", "SYSTEM", "SETTINGS"},
    images=JOB | {"DATASET", "OBJECTIVE", "SYSTEM", "SETTINGS"},
    table=SWEEP | {"OBJECTIVE", "SYSTEM"},
    tune=SWEEP,
    pending={"BUDGET", "PENDING_ARGS"},
    bench={"BENCH_ARGS"},
    test={"NBDEV_ARGS", "PYTEST_ARGS"},
    **{"docs-serve": {"PORT"}},
    look={"AXE", "LOOK_ARGS"},
    docs=set(),
    lint=set(),
    clean=set(),
    lab={"LAB_ARGS"},
)
VALUES = dict(
    CORPUS="my corpus.txt",
    DATASET="my pictures",
    PRESET="small",
    OBJECTIVE="published",
    SYSTEM="vae",
    SEED="7",
    SEEDS="7 8",
    SETTINGS="T=2 d=4",
    NAME="my name",
    RUN="else where",
    ARGS="-p steps 9",
    TABLE_ARGS="--retry",
    BUDGET="25m",
    PENDING_ARGS="--device cpu",
    BENCH_ARGS="--tiny",
    NBDEV_ARGS="--path x.ipynb",
    PYTEST_ARGS="-k y",
    PORT="81",
    AXE="my axe.js",
    LOOK_ARGS="--shots x",
    LAB_ARGS="--no-browser",
)
ODD = "my $runs  'é\"#~;*(x)&, <b>"  # what a shell, make or a first line of a script could stumble over
MANY = {"SEEDS", "ARGS", *(k for k in VALUES if k.endswith("_ARGS"))}  # several words


def make(*args, cwd=ROOT, check=None, **env):
    base = {
        k: v
        for k, v in os.environ.items()
        if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "NO_VENV", *VALUES)
    }
    return subprocess.run(
        ["make", *args], cwd=cwd, env={**base, "PYTHON": sys.executable, **env}, capture_output=True, text=True
    )


def dry(target, *given, **env):
    res = make("-n", "NO_VENV=1", target, *given, **env)
    assert res.returncode == 0, res.stderr
    return res.stdout


def written(values):
    return [f"{k}={v}" for k, v in values.items()]


@pytest.fixture
def stand_in(tmp_path):
    "In place of papermill: keeps its arguments, and leaves a notebook"
    kept = str(tmp_path / "args.json")
    return write_stand_in(
        tmp_path,
        f"json.dump(arguments, open({kept!r}, 'w'))",
        "Path(arguments[1]).write_text('whole')",
        "return 0",
    )


# -- what a target takes


@pytest.mark.parametrize("target", TAKES)
def test_what_is_of_use_arrives(target):
    for left_out in ({"NAME", "SEED"}, {"RUN", "SEEDS"}):  # of these, one at a time
        given = {k: VALUES[k] for k in TAKES[target] - left_out}
        words = shlex.split(dry(target, *written(given)).replace("\n", " ; "), comments=False) if given else []
        for k, v in given.items():
            for one in v.split() if k in MANY else [v]:
                assert any(one in w for w in words), f"make {target} drops {k}={v!r}: no {one!r} in {words}"


@pytest.mark.parametrize("target", TAKES)
@pytest.mark.parametrize("how", ["command line", "environment"])
def test_what_is_of_no_use_is_an_error(target, how):
    if how == "environment" and not TAKES[target] & {*JOB, "BENCH_ARGS"}:
        pytest.skip("what an environment holds for other targets does no harm here")
    foreign = set(VALUES) - TAKES[target]
    if how == "environment":
        foreign -= {"NAME", "PORT", "NBDEV_ARGS", "PYTEST_ARGS", "LAB_ARGS", *TAKES["look"]}
    for given in (*({k} for k in sorted(foreign)), foreign):
        values = {k: VALUES[k] for k in given}
        res = make(
            "-n",
            "NO_VENV=1",
            target,
            *(written(values) if how == "command line" else []),
            **(values if how == "environment" else {}),
        )
        assert res.returncode == 2 and res.stdout == "" and f"`make {target}` cannot use" in res.stderr, (
            given,
            res.stdout,
            res.stderr,
        )
        for k in given:
            assert f" {k} (which is for " in res.stderr
        for k in TAKES[target]:
            assert k in res.stderr.partition("it takes")[2].replace(".", " ").split()


def test_several_targets_take_what_one_of_them_takes():
    assert (
        "ptb" in dry("train", "digits", "CORPUS=ptb")
        and make("-n", "NO_VENV=1", "toy2d", "digits", "CORPUS=ptb").returncode == 2
    )


def test_the_environment_works_as_the_command_line_does():
    assert (
        "'a$b c'" in dry("train", CORPUS="a$b c")
        and "'--settings' 'd=3'" not in dry("table", SETTINGS="")
        and "=d=3" in shlex.join(shlex.split(dry("table", SETTINGS="d=3")))
    )
    assert dry("train", NAME="a-host") == dry("train"), "WSL keeps the name of the machine in NAME"
    assert dry("docs", CORPUS="ptb") == dry("docs")


@pytest.mark.parametrize(
    "wrong,right",
    [
        ("SEDE", "SEED"),
        ("SETTING", "SETTINGS"),
        ("settings", "SETTINGS"),
        ("OBJECTIV", "OBJECTIVE"),
        ("DATSET", "DATASET"),
        ("TABLE_ARG", "TABLE_ARGS"),
    ],
)
def test_a_misspelt_variable_is_noticed(wrong, right):
    res = make("-n", "NO_VENV=1", "train", f"{wrong}=1")
    assert res.returncode == 2 and f"there is no variable {wrong}: did you mean {right}?" in res.stderr
    assert "stands before `make`" in make("-n", "NO_VENV=1", "train", "CUDA_VISIBLE_DEVICES=1").stderr and dry(
        "train", CUDA_VISIBLE_DEVICES="1"
    )


def test_a_variable_of_earlier_versions_is_told_its_name():
    told = "there is no variable ROW: ROW is now SYSTEM"
    assert told in make("-n", "NO_VENV=1", "train", "ROW=vae").stderr
    assert told in make("-n", "NO_VENV=1", "table", ROW="vae").stderr, "from the environment as well"
    assert dry("docs", ROW="vae") == dry("docs")


@pytest.mark.parametrize(
    "target,pair",
    [
        ("train", ("NAME", "RUN")),
        ("images", ("NAME", "RUN")),
        ("table", ("SEED", "SEEDS")),
        ("tune", ("SEED", "SEEDS")),
    ],
)
def test_one_thing_is_said_once(target, pair):
    res = make("-n", "NO_VENV=1", target, *(f"{k}={VALUES[k]}" for k in pair))
    assert res.returncode == 2 and f"give one of {' and '.join(pair)}" in res.stderr


def test_help_says_what_each_target_takes_and_what_that_means():
    lines = make("help").stdout.splitlines()
    for t, names in TAKES.items():
        at = next(i for i, s in enumerate(lines) if s.startswith(f"  make {t} "))
        assert set(lines[at + 1].split()) == names if names else lines[at + 1].startswith("  make")
    about = {
        s.split()[0]: s.split(None, 1)[1]
        for s in lines
        if s.startswith("  ") and s.split()[0].isupper() and len(s.split()) > 3 and s[2] != " "
    }
    assert set(VALUES) | {"VENV", "NO_VENV", "PYTHON", "PIP_ARGS"} == set(about)


# -- what a value may hold


@pytest.mark.parametrize(
    "target,notebook",
    [("train", "train_ptb"), ("toy2d", "train_toy2d"), ("digits", "train_digits"), ("images", "train_images")],
)
@pytest.mark.parametrize("how", ["command line", "environment"])
def test_odd_values_arrive_whole(tmp_path, stand_in, target, notebook, how):
    run, source = tmp_path / ODD / "the run", "-" + ODD + ".txt"
    values = {
        "RUN": str(run),
        **{k: ODD for k in TAKES[target] & {"CORPUS", "DATASET", "SETTINGS", "SYSTEM", "PRESET"}},
    }
    for k in ("CORPUS", "DATASET"):
        if k in values:
            values[k] = source
    res = make(
        "NO_VENV=1",
        target,
        stand_in,
        *(written(values) if how == "command line" else []),
        PYTHONPATH=str(ROOT),
        **(values if how == "environment" else {}),
    )
    assert res.returncode == 0, res.stderr
    got = json.loads((tmp_path / "args.json").read_text())
    passed = {got[i + 1]: got[i + 2] for i, o in enumerate(got) if o in ("-r", "-p")}
    want = dict(
        out=str(run), corpus="./" + source, dataset="./" + source, settings=ODD, system=ODD, systems=ODD, preset=ODD
    )
    assert (
        got[0] == str(ROOT / "nbs" / f"{notebook}.ipynb")
        and Path(got[1]).parent == run
        and (run / f"{notebook}.ipynb").read_text() == "whole"
    )
    assert {k: v for k, v in passed.items() if k in want and v} == {
        k: v for k, v in want.items() if k in passed and passed[k]
    } and len(passed) >= 3


def test_a_dollar_may_be_written_twice_as_make_has_it():
    assert "'a$b'" in dry("train", "SETTINGS=a$$b") and "'a$b'" in dry("train", "SETTINGS=a$b")


def test_home_is_written_out(tmp_path):
    for k in ("RUN", "CORPUS"):
        assert f"'{tmp_path}/a b'" in dry("train", f"{k}=~/a b", HOME=str(tmp_path))
    assert (
        f"PATH='{tmp_path}/v/bin" not in dry("docs")
        and f"{tmp_path}/v" in make("-n", "venv", "VENV=~/v", HOME=str(tmp_path)).stdout
    )


def test_odd_values_of_the_table():
    args = shlex.split(dry("table", f"RUN=-{ODD}", f"CORPUS=-{ODD}", f"SETTINGS={ODD}", "SYSTEM=vae 'x", "SEEDS=3 4"))
    assert f"--out=./-{ODD}" in args and f"--corpus=./-{ODD}" in args and f"--settings={ODD}" in args
    assert args[args.index("--systems") + 1 : args.index("--systems") + 3] == ["vae", "'x"] and args[
        args.index("--seeds") + 1 : args.index("--seeds") + 3
    ] == ["3", "4"]


def test_folders_do_not_share_a_name():
    "A slash at the end, and what makes a run another"

    def folder(*given):
        return next(word for word in shlex.split(dry("images", *given)) if word.startswith("--out="))

    assert folder("DATASET=a/cats/") == folder("DATASET=b/cats") != folder("DATASET=a/dogs/")
    assert (
        len({folder(), folder("OBJECTIVE=published"), folder("SEED=1"), folder("PRESET=small"), folder("NAME=x")}) == 5
    )


@pytest.mark.slow
def test_a_checkout_may_lie_anywhere(tmp_path):
    "The environment is made and the package found from it, offline: nothing to install but the package itself"
    here = tmp_path / ("-" + ODD)
    shutil.copytree(
        ROOT,
        here,
        ignore=shutil.ignore_patterns(
            ".git",
            ".venv",
            "runs",
            "results",
            "_build",
            "_proc",
            "__pycache__",
            ".*_cache",
            ".hypothesis",
            "*.egg-info",
        ),
    )
    for p in (here / "requirements").iterdir():
        p.write_text("")

    def files():
        return {p for p in here.rglob("*") if ".venv" not in p.parts}

    before = files()
    site = next(p for p in sys.path if p.endswith("site-packages"))
    for given in ([], [f"VENV={tmp_path / ('env ' + ODD)}"], ["VENV=env $b é"]):
        res = make("venv", "PIP_ARGS=--no-index", *given, cwd=here, PYTHONPATH=site)
        assert res.returncode == 0 and "Ready" in res.stdout, res.stdout + res.stderr
        venv = here / (given[0][5:] if given else ".venv")
        out = subprocess.run(
            [
                venv / "bin" / "python",
                "-c",
                "import ldebm, importlib.metadata as m; print(ldebm.__file__); "
                "entries = [e.value for e in m.entry_points(group='nbdev') if e.name == 'ldebm']; "
                "print(m.version('ldebm'), entries)",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": site},
            capture_output=True,
            text=True,
        )
        assert out.stdout.splitlines() == [
            str(here / "ldebm" / "__init__.py"),
            f"{__import__('ldebm').__version__} ['ldebm._modidx:d']",
        ], out.stderr
        assert make("-n", "venv", *given, cwd=here).stdout.strip() in ("", "make: Nothing to be done for 'venv'.")
        assert json.loads((venv / "share/jupyter/kernels/python3/kernel.json").read_text())["argv"][0] == str(
            venv / "bin" / "python"
        )
        assert files() - before <= set((here / "env $b é").rglob("*")) | {here / "env $b é"}, (
            "a checkout that cannot be written would do"
        )


@pytest.mark.parametrize(
    "target,given,named",
    [
        ("train", "RUN=/proc/none/x", "name another folder with RUN"),
        ("digits", "RUN=/proc/none", "name another folder with RUN"),
    ],
)
def test_a_folder_that_cannot_be_made_names_its_variable(stand_in, target, given, named):
    res = make("NO_VENV=1", target, given, stand_in)
    assert res.returncode != 0 and named in res.stderr and "The run stopped" not in res.stderr


def test_a_job_that_refuses_names_settings_as_make_does(tmp_path):
    refusal = """PapermillExecutionError(1, 1, '', 'ValueError', 'give settings="size=16"', [])"""
    stand_in = write_stand_in(tmp_path, "from papermill.exceptions import PapermillExecutionError", f"raise {refusal}")
    res = make("NO_VENV=1", "toy2d", f"RUN={tmp_path / 'run'}", stand_in)
    assert res.returncode != 0 and 'ValueError: give SETTINGS="size=16"' in res.stderr


def test_an_environment_that_cannot_be_made_names_its_variable():
    res = make("venv", "VENV=/proc/none/v")
    assert res.returncode != 0 and "VENV=" in res.stderr and "NO_VENV=1" in res.stderr and "proxy" not in res.stderr


@pytest.mark.slow
def test_table_and_bench_name_the_option_for_their_folders(tmp_path):
    (tmp_path / "file").touch()
    bad, env = f"{tmp_path}/file/x", {**os.environ, "PYTHONPATH": str(ROOT)}

    def refused(*args):
        return subprocess.run(
            [sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100
        )

    for option, other in (("--results", "--out"), ("--out", "--results")):
        given = ["--systems", "vae", "--seeds", "0", option, bad, other, str(tmp_path)]
        code = (
            f"import os, sys; os.chdir({str(ROOT)!r}); from ldebm import table; "
            f"table.run_jobs = lambda *a, **k: sys.exit('ran'); sys.exit(table.main({given!r}))"
        )
        res = refused("-c", code)
        assert res.returncode == 2 and f"{bad} cannot be written: name another folder with {option}" in res.stderr, (
            res.stderr
        )
    res = refused(str(ROOT / "bench" / "bench.py"), "--tiny", "--only", "matmul", "--out", bad)
    assert (
        res.returncode != 0
        and f"{bad}/bench cannot be written: name another folder with --out" in res.stderr
        and "..." not in res.stdout
    )


# -- two at once, and Ctrl-C


def test_a_second_run_that_is_refused_leaves_the_first_its_notebook(tmp_path):
    run, go = tmp_path / "run", tmp_path / "go"
    stand_in = write_stand_in(
        tmp_path,
        "Path(arguments[1]).write_text(os.environ['PASS'])",
        "if os.environ['PASS'] == 'refused': return 1",
        f"while not os.path.exists({str(go)!r}): time.sleep(0.05)",
        "return 0",
    )
    args = ["make", "toy2d", "NO_VENV=1", stand_in, f"RUN={run}"]
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    env["PYTHONPATH"] = str(ROOT)
    first = subprocess.Popen(
        args, cwd=ROOT, env={**env, "PASS": "first"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not list(run.glob("*.running.*")):
        time.sleep(0.05)
    (run / "train_toy2d.running.999999999.ipynb").touch()  # of a process that was killed
    second = subprocess.run(args, cwd=ROOT, env={**env, "PASS": "refused"}, capture_output=True, text=True)
    assert (
        second.returncode != 0
        and "train_toy2d.stopped.ipynb shows where" in second.stderr
        and len(list(run.glob("*.running.*"))) == 1
    )
    go.touch()
    assert first.wait(timeout=30) == 0, first.stderr.read()
    assert {p.name: p.read_text() for p in run.iterdir()} == {"train_toy2d.ipynb": "first", "settings.json": "{}"}


CELL = """
import time
from ldebm.core import graceful_stop
with graceful_stop() as halt:
    open('ready', 'w')
    while not halt.stop: time.sleep(.05)
time.sleep(4) # longer than papermill would wait
open('saved', 'w')
raise KeyboardInterrupt('run the same command again')
"""


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_notebook_that_is_stopped_has_the_time_to_save(tmp_path, sig):
    import nbformat

    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CELL)],
        metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")),
    )
    nbformat.write(nb, tmp_path / "a.ipynb")
    with open(tmp_path / "log", "w") as log:
        p = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ldebm.sweep",
                "--cwd",
                str(tmp_path),
                "--log-output",
                "--no-progress-bar",
                str(tmp_path / "a.ipynb"),
                str(tmp_path / "b.ipynb"),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.1)
        os.killpg(p.pid, sig)
        code = p.wait(timeout=60)
    said = (tmp_path / "log").read_text()
    assert (
        code == 130
        and (tmp_path / "saved").exists()
        and said.endswith("KeyboardInterrupt: run the same command again (cell [1])\n")
    ), said
    assert "Traceback" not in said and "ZMQ" not in said and "Aborted" not in said
    assert "run the same command again" in (tmp_path / "b.ipynb").read_text()


def test_a_target_that_there_is_not_is_told_its_neighbour():
    done = subprocess.run(["make", "-C", ROOT, "tran"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no target tran: did you mean train?" in done.stderr
