"What is pending: listed in order of value, estimated, worked off within a budget, killed and gone on with"

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import TINY, tiny_corpus

from ldebm import image_job
from ldebm import pending as P
from ldebm import sweep as S
from ldebm.comparison import SHOWN, system_rows
from ldebm.records import load_results, metric, results_root, system_name
from ldebm.sweep import Budget, Outcomes, SweepJob, run_all
from ldebm.table import checked_jobs
from ldebm.text_settings import TextJob, resolve

PLACE = Path(__file__).parent.parent
ENDLESS = TINY.replace("steps=6", "steps=90000") + " checkpoint_every=1000"


@pytest.fixture
def corpus(tmp_path):
    return tiny_corpus(tmp_path)


def table(corpus, systems=("ae", "vae"), seeds=(0,), settings=TINY):
    rows = tuple(system_rows(systems, "consistent"))
    return P.ResultTable("few", "quick", rows, seeds, {"": settings}, reads=str(corpus))


def command(tables, folder, *more):
    "`make pending` with tables of its own"
    own = [(t.rows, t.seeds, t.settings, t.reads) for t in tables]
    make = (
        "import sys, time; started = time.time(); from ldebm import pending as P\n"
        f"P.TABLES = {{str(i): P.ResultTable('few', 'quick', *t[:3], reads=t[3]) for i, t in enumerate({own!r})}}\n"
        "sys.exit(P.main(sys.argv[1:], started))"
    )
    (folder / "results").mkdir(parents=True, exist_ok=True)
    folders = ["--results", str(folder / "results"), "--runs", str(folder / "runs"), "--workers", "1"]
    return [sys.executable, "-c", make, *folders, "--device", "cpu", *more]


def environment():
    return {**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PLACE)}


def run(tables, folder, *more):
    done = command(tables, folder, *more)
    return subprocess.run(done, cwd=PLACE, env=environment(), capture_output=True, text=True, timeout=300)


def record_files(folder):
    return {path.name: path for path in (folder / "results").rglob("*.json")}


# -- the list


def test_the_results_page_and_the_list_have_one_source():
    "The pages render every table of `TABLES`, have no rows of their own, and say what the list says"
    pages = [PLACE / "nbs" / f"{name}.ipynb" for name in ("results", "results_pictures")]
    cells = [cell for page in pages for cell in json.loads(page.read_text())["cells"]]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    shown = set(re.findall(r"'([a-z0-9 -]+)'", source))
    for name, of in P.TABLES.items():
        pictures = of.command and of.seeds == (0,)
        assert name in shown or pictures or of.tuning or of.corpus in ("gaussians16", "pinwheel"), name
    assert "for table in TABLES.values() if table.command" in source and "TABLES[f'tuning {objective}']" in source
    assert "'LDEBM'" not in source and "SYSTEMS[s].title, '" not in source
    said = "".join("".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", []))
    assert P.pending_table(P.pending(results_root())) in said


def test_order_of_value():
    "The paper's own with all seeds, one seed of the others, the rest; the tables in their order"
    rows = tuple(system_rows(SHOWN, "consistent"))
    pieces = P.by_value(P.ResultTable("ptb", "small", rows))
    assert len(pieces) == 3 * len(SHOWN)
    first, second, third = pieces[:9], pieces[9 : 9 + len(SHOWN) - 3], pieces[9 + len(SHOWN) - 3 :]
    assert {(p.system, p.seed) for p in first} == {(s, k) for s in P.OWN_SYSTEMS for k in range(3)}
    assert [p.seed for p in first] == sorted(p.seed for p in first)
    assert {p.seed for p in second} == {0} and {p.seed for p in third} == {1, 2}
    assert not {p.system for p in second} & set(P.OWN_SYSTEMS)


def test_pending_is_what_has_no_record(corpus, tmp_path):
    "Each once, although two tables show it; a variant of other settings does not count"
    tables = dict(a=P.TABLES["grammar objectives"], b=P.TABLES["grammar"])
    names = [str(piece.name) for piece in P.pending(tmp_path, tables)]
    assert len(names) == len(set(names)) and names[0] == "ldebm-grammar-quick-consistent-s0"
    assert not P.pending(results_root(), tables)
    record = next(r for r in load_results(results_root()) if system_name(r) == "rnn-lm+converged" and r["seed"] == 0)
    record["settings"]["steps"] = 1250
    path = tmp_path / "runs/grammar/quick/rnn-lm+converged-consistent-s0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    assert [str(piece.name) for piece in P.pending(tmp_path, tables)] == names


def test_records_hold_the_grammars_likelihood_against_the_same_sentences():
    "A paired difference varies less from sentence to sentence than either of its parts"
    found = [r["metrics"] for r in load_results(results_root()) if "exact_gap" in r["metrics"]]
    scored = [m for m in found if m["exact_gap"]["interval"] and "nll_valid" in m]
    assert len(scored) > 40
    for m in scored:
        paired, alone = (end - begin for begin, end in (m[k]["interval"] for k in ("exact_gap", "nll_valid")))
        assert paired < alone, m["exact_gap"]


def test_every_piece_of_text_is_a_job_of_the_table():
    "Of the same folder as `make table` has it, so that nothing is run twice"
    for name, of in P.TABLES.items():
        if not of.command:
            for piece in P.by_value(of)[:3]:
                job = P.job_of(piece)
                resolve(job)
                assert job.out == f"runs/{'tuning' if of.tuning else 'table'}/{piece.name}", name


def test_the_commands_of_pictures_are_targets_with_their_variables():
    for of in P.TABLES.values():
        if of.command:
            for piece in P.by_value(of):
                res = subprocess.run(
                    ["bash", "-c", f"{piece.command} -n NO_VENV=1"], cwd=PLACE, capture_output=True, text=True
                )
                assert res.returncode == 0, (piece.command, res.stderr)
                break


def test_the_commands_of_pictures_ask_for_what_a_job_can_train():
    pieces = [piece for of in P.TABLES.values() if of.command for piece in P.by_value(of)]
    asked = [dict(word.split("=", 1) for word in shlex.split(piece.command)[2:]) for piece in pieces]
    for piece, given in zip(pieces, asked):
        if "SYSTEM" in given:
            about = dict(dataset=piece.table.corpus, preset=piece.table.preset, objective=piece.objective)
            image_job.resolve(image_job.ImageJob(systems=given["SYSTEM"], settings=given.get("SETTINGS", ""), **about))
            assert piece.system in (*given["SYSTEM"].split(), "gaussian"), piece.command


def test_what_cannot_run_here_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    monkeypatch.setattr(P, "find_images", lambda name: None)
    monkeypatch.setattr(P, "check_job", lambda job, texts: (_ for _ in ()).throw(FileNotFoundError("'ptb' not found")))
    found = P.plan(str(tmp_path), tables={k: P.TABLES[k] for k in ("ptb objectives", "ptb paper published", "digits")})
    assert not found.offers and len(found.commands) == len(P.by_value(P.TABLES["digits"]))
    said = str(found)
    assert "wants a GPU" in said and "lacks data: 'ptb' not found" in said


# -- estimates


def made(system="vae", device="here", minutes=10.0, throughput=100.0, seed=0, corpus="mine", objective="consistent"):
    job = TextJob(system=system, objective=objective)
    about = dict(device=device, threads=1, minutes=minutes, throughput=throughput, finished=f"{seed}")
    return dict(
        system=system,
        variant="",
        corpus=corpus,
        preset="quick",
        objective=objective,
        seed=seed,
        settings=vars(resolve(job)),
        metrics=dict(kl=metric(1.0)),
        provenance=about,
    )


def estimated(records, system="vae", here="here"):
    piece = P.Piece(P.ResultTable("mine", "quick", ()), system, "consistent", 7)
    return P.estimate(records, piece, resolve(TextJob(system=system)), "cpu", here)


def test_an_estimate_says_what_it_comes_from():
    same = estimated([made(minutes=10.0), made(minutes=12.0, seed=1), made("dgm-vae", minutes=90.0)])
    assert (
        same.minutes == pytest.approx(11.0 + P.STARTING)
        and same.source == "from vae mine quick consistent s0, 1 on such a machine"
    )
    relative = estimated([made("ldebm", minutes=40.0), made("vae", corpus="other", minutes=7.0)])
    assert relative.minutes == pytest.approx(20.0 + P.STARTING) and "ldebm" in relative.source
    assert "× 0.5 by steps × cost" in relative.source
    faster = [made("ldebm", "old", throughput=50.0), made("ldebm", "here", throughput=100.0), made("vae", "old")]
    found = estimated(faster)
    assert found.minutes == pytest.approx(5.0 + P.STARTING) and "on old, × 0.5 by throughput" in found.source
    assert estimated([]).source == "from its settings, steps × cost" and estimated([]).minutes > P.STARTING


# -- the budget


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("25m", 1500), ("2h", 7200), ("1.5h", 5400), (" 5m ", 300)])
def test_a_budget_is_read(text, seconds):
    assert P.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["25", "0m", "-5m", "an hour", "5 days", "m", "1h30m"])
def test_a_bad_budget_is_one_sentence(text, capsys):
    assert P.main([f"--budget={text}"]) == 2
    error = capsys.readouterr().err
    assert error == f"ValueError: BUDGET={text} is no length of time: write it as 90s, 25m or 2h\n"


def test_nothing_pending_is_one_sentence(capsys, monkeypatch):
    monkeypatch.chdir(PLACE)
    monkeypatch.setattr(P, "TABLES", {"grammar": P.TABLES["grammar"]})
    monkeypatch.setattr(P, "work_off", lambda *a, **k: pytest.fail("started"))
    for more in ([], ["--budget", "25m"]):
        assert P.main(["--results", str(results_root()), *more]) == 0
        assert capsys.readouterr().out == "Nothing is pending: every run of the tables has its record.\n"


def test_nothing_that_can_run_here_is_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(PLACE)
    monkeypatch.setattr(P, "TABLES", {"paper": P.TABLES["ptb paper published"]})
    options = ["--results", str(tmp_path), "--device", "cpu", "--budget", "25m"]
    assert P.main(options) == 2
    assert capsys.readouterr().err.startswith("RuntimeError: nothing of what is pending can run here")


class Clock:
    "Seconds that pass when somebody waits"

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def simulated(monkeypatch, jobs, budget_seconds, lengths):
    "A sweep by a fake clock, two runs at once: what was started and when, what ended, when all was over"
    clock, log, running = Clock(), [], {}

    class Running:
        def __init__(self, pool, threads):
            self.jobs = running

        def submit(self, job, gpus):
            log.append((job.name, clock.seconds))
            running[job.name] = (job, clock.seconds + lengths[job.name])

        def collect(self, seconds):
            clock.seconds += 1
            for name, (job, end) in list(running.items()):
                if end <= clock.seconds:
                    del running[name]
                    return job, job
            return None

    class Places:
        def take(self, job):
            return () if len(running) < 2 else None

    settled = {}
    monkeypatch.setattr(S, "_Running", Running)
    monkeypatch.setattr(S, "_show_counts", lambda *a: None)
    monkeypatch.setattr(S, "_result", lambda future, job, settled: S.outcome(job, "done"))
    monkeypatch.setattr(S, "_cancel", lambda pool, running, settled: log.append(("stop", clock.seconds)))
    run_all(Places(), jobs, settled, 1, S.graceful_stop(), S._NoBar(), lambda text: None, Budget(budget_seconds, clock))
    return log, settled, clock.seconds


def jobs_of(**minutes):
    return [SweepJob(name, "x.ipynb", f"/runs/{name}", minutes=m) for name, m in minutes.items()]


def test_the_budget_is_kept(monkeypatch):
    "In order, two at once; what does not fit and can go on is begun and stopped in time"
    jobs = jobs_of(a=5, b=5, c=30, d=1)
    log, settled, over = simulated(monkeypatch, jobs, 1500, dict(a=300, b=310, c=1800, d=60))
    assert [name for name, _ in log] == ["a", "b", "c", "d", "stop"]
    assert set(settled) == {"a", "b", "d"} and 0.9 * 1500 <= over <= 1500


def test_what_cannot_go_on_is_not_begun_unless_it_fits(monkeypatch):
    first, long, last = jobs_of(first=10, long=20, last=2)
    jobs = [first, replace(long, resumes=False), last]
    log, settled, over = simulated(monkeypatch, jobs, 900, dict(first=600, long=1200, last=120))
    assert {name for name, _ in log} == {"first", "last"} == set(settled) and over <= 900


def test_nothing_is_begun_for_a_few_seconds(monkeypatch):
    log, settled, over = simulated(monkeypatch, jobs_of(a=4, b=4, c=4), 300, dict(a=265, b=266, c=240))
    assert {name for name, _ in log} == {"a", "b"} == set(settled) and over < 300


def test_the_list_is_the_order_of_the_sweep(monkeypatch, corpus, tmp_path):
    "Estimates and order reach it; they are no part of what a run is"
    monkeypatch.chdir(PLACE)
    found = P.plan(str(tmp_path / "results"), str(tmp_path / "runs"), tables=dict(few=table(corpus, ("vae", "ldebm"))))
    asked = []

    def look(todo, seconds):
        asked.extend(todo)
        return Outcomes(dict(name=job.name, state="left") for job in todo)

    P.work_off(found.offers, 60.0, sweeps=look)
    assert [job.name for job in sorted(asked, key=lambda job: -job.cost)] == [str(o.piece.name) for o in found.offers]
    assert [o.piece.system for o in found.offers] == ["ldebm", "vae"] and all(job.minutes > 0 for job in asked)


def test_several_runs_share_a_gpu(monkeypatch):
    "By the shares and the memory of the table, within one GPU"
    monkeypatch.chdir(PLACE)
    jobs = [P.job_of(piece, "", "runs") for piece in P.by_value(P.TABLES["tuning published"])]
    asked = checked_jobs([replace(job, results="") for job in jobs], "cuda")
    machine = S.Machine(16, 100.0, ["0"])
    assert all(machine.take(job) == ("0",) for job in asked) and 0 < machine.free["0"] < 1
    assert machine.memory_gb == 100 - sum(job.memory_gb for job in asked)


# -- real runs


@pytest.mark.slow
def test_killed_gone_on_with_and_nothing_twice(corpus, tmp_path):
    "SIGKILL in the middle of the second; the next call does what is missing, with the metrics of an undisturbed one"
    longer = TINY.replace("steps=6", "steps=400") + " checkpoint_every=20"
    tables = [table(corpus, ("ae", "vae-fb"), settings=longer)]
    checkpoint = tmp_path / "runs/table/ae-few-quick-consistent-s0/checkpoint.safetensors"
    first = subprocess.Popen(
        command(tables, tmp_path, "--budget", "10m"),
        cwd=PLACE,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 150
    while not checkpoint.exists():
        assert first.poll() is None and time.monotonic() < end, first.stdout.read()
        time.sleep(0.02)
    first.kill()
    first.wait()
    had = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in record_files(tmp_path).items()}
    assert list(had) == ["vae-fb-consistent-s0.json"]
    second = run(tables, tmp_path, "--budget", "10m")
    assert "ae-few-quick-consistent-s0 (begun: step " in second.stdout, second.stdout + second.stderr
    assert second.returncode == 0 and "All that can run here is done" in second.stdout, second.stdout + second.stderr
    files = record_files(tmp_path)
    assert len(files) == 2 and had == {name: (files[name].read_bytes(), files[name].stat().st_mtime_ns) for name in had}
    third = run(tables, tmp_path, "--budget", "10m")
    assert third.stdout == "Nothing is pending: every run of the tables has its record.\n", third.stdout + third.stderr
    other = run(tables, tmp_path / "other", "--budget", "10m")
    assert other.returncode == 0, other.stdout + other.stderr
    undisturbed = {(r["system"], r["seed"]): r["metrics"] for r in load_results(tmp_path / "other" / "results")}
    assert {(r["system"], r["seed"]): r["metrics"] for r in load_results(tmp_path / "results")} == undisturbed


@pytest.mark.slow
def test_a_budget_of_seconds_is_kept_and_gone_on_with(corpus, tmp_path):
    "A run that takes far longer is stopped in time, saves, and goes on at the next call"
    tables = [table(corpus, ("vae-fb",), settings=ENDLESS)]

    def steps():
        (log,) = (tmp_path / "runs").rglob("log.jsonl")
        return max(json.loads(line).get("step", 0) for line in log.read_text().splitlines())

    reached = []
    for seconds in (90, 60):
        start = time.monotonic()
        done = run(tables, tmp_path, "--budget", f"{seconds}s")
        took = time.monotonic() - start
        assert done.returncode == 0 and "1 stopped" in done.stdout, done.stdout + done.stderr
        assert seconds < 90 or 0.9 * seconds <= took <= 1.1 * seconds, took
        reached.append(steps())
        assert list((tmp_path / "runs").rglob("checkpoint.safetensors")) and not record_files(tmp_path)
    assert "begun: step" in done.stdout and reached[1] > reached[0] > 0, reached
