"The table as one command: checks before work, kill and restart, tuning"

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY, tiny_corpus

from ldebm import image_job, toy_job
from ldebm import table as T
from ldebm.comparison import family_means, quoted, zoo_table
from ldebm.corpora import CORPORA
from ldebm.pages import page_name
from ldebm.rates import plot_rates
from ldebm.records import data_of, group_records, load_results, metric
from ldebm.report import DEFINED, dot_panels, run_panels, run_table, runs_of, scored
from ldebm.text_job import corpus_name, job_name, record_settings
from ldebm.text_score import TUNING
from ldebm.text_settings import TextJob, TextSettings, resolve
from ldebm.zoo import SYSTEMS, TABLE, System

PLACE = Path(__file__).parent.parent


@pytest.fixture
def corpus(tmp_path):
    return tiny_corpus(tmp_path)


def command(corpus, tmp_path, *more):
    return [
        sys.executable,
        "-m",
        "ldebm.table",
        "--corpus",
        str(corpus),
        "--settings",
        TINY,
        "--seeds",
        "0",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "results"),
        *more,
    ]


def environment():
    return {**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PLACE)}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--systems", "vea"], "did you mean 'vae'"),
        (["--systems", "vae", "--settings", "T=3"], "T=3: no effect on any of these systems"),
        (["--systems", "vae", "--settings", "temperature"], "write name=value"),
        (["--corpus", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--module", "/nowhere/mine.py"], "no such module: /nowhere/mine.py"),
        (["--settings", "batch=9000", "--systems", "vae"], "fewer than a batch of 9000"),
        (["--device", "cuda", "--systems", "vae"], "GPUs and this machine offers 0")
        if not torch.cuda.is_available()
        else (["--systems", "vea"], "did you mean 'vae'"),
        (["--systems", "vae", "vae"], "vae-grammar-quick-consistent-s0"),
        (["--systems", "vae-fb", "--objective", "published"], "has no published variant"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(PLACE)
    monkeypatch.setattr("ldebm.sweep.Local.__enter__", None)  # nothing may start
    assert T.main([*argv, "--seeds", "0", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_an_option_of_earlier_versions_is_told_its_name(capsys):
    for given in (["--rows", "vae"], ["--rows=vae"]):
        with pytest.raises(SystemExit):
            T.main(given)
        assert "--rows is now --systems" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        T.main(["--floor", "1"])
    assert "is now" not in capsys.readouterr().err


def test_a_record_with_other_settings_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(PLACE)
    monkeypatch.setattr(T, "sweep", lambda jobs, **kw: pytest.fail("started"))
    job = T.table_jobs(seeds=(0,), systems=("vae",), out=str(tmp_path / "runs"), results=str(tmp_path))[0]
    other = dict(
        system="vae",
        corpus="grammar",
        preset="quick",
        objective="consistent",
        seed=0,
        variant="",
        metrics=dict(bleu=metric(1.0)),
        settings=record_settings(job, resolve(replace(job, settings="steps=7"))),
        provenance=json.loads((PLACE / "results/runs/grammar/quick/ldebm-consistent-s0.json").read_text())[
            "provenance"
        ],
    )
    path = tmp_path / "runs/grammar/quick/vae-consistent-s0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="already records a run with other settings"):
        T.run_jobs([job])


def test_a_run_is_given_the_memory_that_records_say_it_takes():
    seen = set()
    for r in load_results(PLACE / "results"):
        if r["corpus"] not in CORPORA or r["system"] not in SYSTEMS:
            continue
        given = T.sweep_job(
            TextJob(system=r["system"], preset=r["preset"], objective=r["objective"], out="x"), "train_zoo.ipynb"
        ).memory_gb
        assert r["provenance"]["peak_memory_mb"] * 2**20 / 1e9 < given, (
            r["system"],
            r["preset"],
            r["objective"],
            r["seed"],
        )
        seen.add(r["preset"])
    assert {"quick", "small"} <= seen


def test_tables_disclaim_what_records_disclaim():
    known = load_results(PLACE / "results")
    rec = next(
        r
        for r in known
        if r["system"] == "ldebm"
        and r["corpus"] == "grammar"
        and r["objective"] == "consistent"
        and r["seed"] == 0
        and not r["variant"]
    )
    bad = json.loads(json.dumps(rec))
    bad["metrics"]["nll_valid"]["estimator"] += "; NOT valid"
    fine, flawed = (
        zoo_table([r], "grammar", "quick", "consistent", dict(nll_valid=2, bleu=1), systems=("ldebm", "vae"))
        for r in (rec, bad)
    )
    v, b = (f"{rec['metrics'][k]['value']:.{d}f}" for k, d in (("nll_valid", 2), ("bleu", 1)))
    assert f"| {v} | {b} |" in fine and "†" not in fine
    assert f"| {v}† | {b} |" in flawed and flawed.endswith("at some level.") and "| pending | pending |" in flawed


def test_rows_and_families_without_records():
    rec = next(r for r in load_results(PLACE / "results") if r["system"] == "vae" and r["preset"] == "quick")
    out = family_means([rec], "grammar", "quick", rec["objective"], dict(bleu=1))
    assert "| VAE | VAE (of 4) | " in out and "| autoencoder | none (of 2) | – |" in out
    assert "| strange | " in zoo_table(
        [{**rec, "system": "strange"}], "grammar", "quick", "consistent", dict(bleu=1), systems=("strange",)
    )


# -- a row is what was run


@pytest.mark.parametrize("folder", ["results", "results/tuning"])
def test_records_of_this_repository_are_one_row_each(folder):
    "By name and by what was run they fall into the same groups, each with every seed; their scoring is read"
    known = load_results(PLACE / folder)
    names = {}
    for r in known:
        names.setdefault(tuple(r[k] for k in ("system", "variant", "corpus", "preset", "objective")), []).append(r)
    for name, rs in names.items():
        ((how, same),) = group_records(rs, scored)
        assert how == "" and [r["seed"] for r in same] == sorted({r["seed"] for r in rs}) and len(same) == len(rs), name
    for r in known:
        if r["corpus"] != "grammar" or r["variant"] == "control":  # whose samples are judged, not its likelihood
            continue
        said = scored(r)
        assert (said["lm"], said["lm_seeds"], said["n_samples"]) == ("quick", 2, 2000) and said["nll_sentences"] == (
            None if "nll_valid" not in r["metrics"] else 200 if r["settings"].get("split") else 2000
        )
        assert (said["nll_draws"] is None) == (r["system"] in ("ae", "dae", "rnn-lm")) and said["nll_draws"] in (
            None,
            64,
            100,
            256,
        ), r["system"]


def test_a_setting_that_records_lack_does_nothing_at_its_default(monkeypatch):
    "Else a run of today would stand beside those of yesterday as another"
    monkeypatch.delenv("IN_TEST", raising=False)
    old = {
        r["system"]: r
        for r in load_results(PLACE / "results")
        if r["corpus"] == "grammar" and r["preset"] == "quick" and not r["variant"] and r["objective"] == "consistent"
    }
    for system, r in old.items():
        if system not in SYSTEMS:
            continue
        job = TextJob(system=system, seed=r["seed"])
        today = dict(r, settings=record_settings(job, resolve(job)))
        ((how, _),) = group_records([r, {**today, "seed": r["seed"] + 1}], scored)
        assert how == "", (system, how)
    for r in load_results(PLACE / "results"):
        if "shape" not in r["settings"] or r["variant"]:
            continue
        job = image_job.ImageJob(
            dataset="cifar10" if r["corpus"].startswith("cifar10") else r["corpus"],
            preset=r["preset"],
            objective=r["objective"],
            systems="ldebm",
        )
        today = dict(
            r, seed=-1, settings={**vars(image_job.resolve(job)), **r["settings"]}
        )  # presets may change since, as long as what is new is not in them
        ((how, _),) = group_records([r, today])
        assert how == "", (r["system"], r["corpus"], how)


def made(
    seed=0, system="vae", value=1.0, corpus="mine", preset="small", estimator="", n=None, metrics=None, **settings
):
    return dict(
        system=system,
        variant="",
        corpus=corpus,
        preset=preset,
        objective="consistent",
        seed=seed,
        settings={"system": system, **settings},
        metrics=metrics or dict(kl=metric(value, n=n, estimator=estimator)),
        provenance=dict(device="cpu", threads=1, minutes=1.0, finished=f"{seed}"),
    )


def rows_of(table):
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:] if line.startswith("|")]


@pytest.mark.parametrize(
    "system, usual, other, how",
    [
        ("vae", dict(d=32), dict(d=4), "d=4"),
        ("vae", dict(split="valid"), dict(), "no split"),
        ("vae", dict(processes=2), dict(), "no processes"),
        (
            "ldebm",
            dict(layers="1x4x8x0", shape=[3, 8, 8]),
            dict(layers="1x4x8x0", shape=[3, 16, 16]),
            "shape=[3, 16, 16]",
        ),
        ("ldebm-coupled", dict(data="aaaa", energy_hidden=8), dict(data="bbbb", energy_hidden=8), "other data: bbbb"),
        (
            "toy-ebm-long",
            dict(density="pinwheel", sample_steps=10),
            dict(density="pinwheel", sample_steps=20),
            "sample_steps=20",
        ),
        ("strange", dict(module_sha256="aaaa"), dict(module_sha256="bbbb"), "other module: bbbb"),
    ],
)
def test_no_table_mixes_runs(system, usual, other, how):
    "Text, pictures, plane, systems of one's own"
    rs = [made(0, system, 1.0, **usual), made(1, system, 3.0, **usual), made(2, system, 9.0, **other)]
    for table in (
        run_table(rs, "mine", "small", [(system, "consistent")], dict(kl=1)),
        zoo_table(rs, "mine", "small", "consistent", dict(kl=1), systems=(system,)),
    ):
        name = (
            SYSTEMS[system].title
            if system in SYSTEMS and table is not None and f"| {SYSTEMS[system].title} |" in table
            else system
        )
        assert rows_of(table) == [name, f"{name} ({how})"]
        assert "| 2.0\u00a0±\u00a01.4 | 2 |" in table and "| 9.0 | 1 |" in table


@pytest.mark.parametrize(
    "key, first, second",
    [
        ("bleu", (10.0, "x"), None),
        ("nll_valid", (2000, "nats; 64 draws"), (200, "nats; 64 draws")),
        ("nll_valid", (200, "nats; 64 draws"), (200, "nats; 32 draws")),
        (
            "rppl",
            (9, "language model `quick`; by seed 0: 9.26, 1: 9.16"),
            (9, "language model `quick`; by seed 0: 9.26"),
        ),
        ("rppl", (9, "language model `quick`; by seed 0: 9.26"), (9, "language model `small`; by seed 0: 9.26")),
        ("wkl", (2000, "x"), (500, "x")),
    ],
)
def test_runs_that_were_scored_otherwise(key, first, second):
    rs = [
        made(i, metrics={key: metric(1.0, n=int(n), estimator=e)}, prior="normal", embed=8, hidden=8, d=4)
        for i, (n, e) in enumerate([first, second or first])
    ]
    assert len(rows_of(run_table(rs, "mine", "small", [("vae", "consistent")], {key: 1}))) == (
        1 if second is None else 2
    )


def test_one_table_is_about_one_file():
    "Two files of one name: what ran on the other says so in every row, the means and the picture leave it out"

    def metrics(v):
        return {k: metric(v) for k in ("kl", "recon_nll", "rppl")}

    here = dict(corpus_sha256="aaaa")
    rs = [
        *(made(k, metrics=metrics(1.0), **here) for k in (0, 1)),
        made(0, "ldebm", metrics=metrics(2.0), **here),
        *(made(k, "dgm-vae", metrics=metrics(50.0), corpus_sha256="bbbb") for k in (0, 1)),
        made(2, d=4, metrics=metrics(70.0), **here),
    ]
    table = zoo_table(rs, "mine", "small", "consistent", dict(kl=0), systems=("vae", "dgm-vae", "ldebm"))
    assert rows_of(table) == ["VAE", "VAE (d=4)", "DGM-VAE (other data: bbbb)", "LDEBM"]
    means = family_means(rs, "mine", "small", "consistent", dict(kl=0))
    assert (
        "| 1 |" in means
        and "50" not in means
        and "70" not in means
        and means.endswith("Not in it: VAE (d=4); DGM-VAE (other data: bbbb).")
    )
    ax = plot_rates(rs, "mine", "small")
    assert (
        sum(
            len(o.get_offsets())
            for o in ax.collections
            if hasattr(o, "get_offsets") and o.get_array() is not None and o.axes is ax
        )
        == 3
    )
    there = runs_of(rs, "mine", "small", [("vae", "consistent")], dict(corpus_sha256="bbbb"))
    assert [how for how, _ in there["vae", "consistent"]] == ["other data: aaaa", "other data: aaaa, d=4"]


def test_what_a_command_has_run_is_the_table_it_shows(corpus, tmp_path):
    "More runs on another file of that name do not take its place"
    job = T.table_jobs(
        corpus=str(corpus),
        seeds=(0,),
        systems=("vae",),
        settings="steps=6",
        out=str(tmp_path / "runs"),
        results=str(tmp_path / "results"),
    )[0]
    mine = record_settings(job, resolve(job))
    (tmp_path / "results").mkdir()
    for seed, settings, bleu in (
        (0, mine, 5.0),
        (1, dict(mine, corpus_sha256="b" * 64), 7.0),
        (2, dict(mine, corpus_sha256="b" * 64), 7.0),
    ):
        rec = dict(
            made(seed, corpus=corpus_name(job), preset="quick", metrics=dict(bleu=metric(bleu))), settings=settings
        )
        rec["provenance"].update(commit="", versions={}, peak_memory_mb=1.0)
        (tmp_path / "results" / f"{seed}.json").write_text(json.dumps(rec))
    shown = T.outcome([job])
    assert (
        rows_of(shown.split("\n\n", 1)[1]) == ["VAE", "VAE (other data: bbbbbbbb)"]
        and "| 5.0 | 1 |" in shown
        and data_of(mine)["corpus_sha256"] in str(mine)
    )


def test_figures_of_others_stand_beside_ours():
    "The released code on the grammar, with spread and seeds; the paper's, whose NLL is in its estimator's column"
    grammar, ptb = (quoted(PLACE / "data" / "published" / f"{k}.json") for k in ("grammar", "ptb"))
    table = run_table(
        [],
        "grammar",
        "quick",
        [("ldebm", "published"), ("ldebm", "consistent")],
        dict(grammatical=3, bleu=1, mi=2, rppl=1),
        grammar,
    )
    assert (
        "| ldebm | published | released code | 0.216 | 10.1 ± 1.3 | 1.36 ± 0.04 | – | 3 |"
        in table.replace("\u00a0", " ")
        and table.count("released code") == 1
    )
    assert {r for r, o in ptb.items() if o.get("nll_published") is not None} == {
        "svebm",
        "svebm-ib",
        "ldebm-no-gc",
        "ldebm",
    } and ptb["vae"]["nll_valid"] == ptb["vae"]["nll"]
    assert "| ldebm | paper |" in run_table([], "ptb", "paper", [("ldebm", "published")], dict(nll_published=2), ptb)


def test_settings_of_every_job_are_known():
    from ldebm.label_job import LabelSettings
    from ldebm.records import JOB_SETTINGS
    from ldebm.response_task import ResponseSettings

    assert {TextSettings, LabelSettings, ResponseSettings, image_job.ImageSettings, toy_job.ToySettings} <= {
        *JOB_SETTINGS
    }
    for r in load_results(PLACE / "results"):
        cls = max(JOB_SETTINGS, key=lambda c: len(r["settings"].keys() & c.__dataclass_fields__.keys()))
        assert cls is (
            toy_job.ToySettings
            if r["system"].startswith("toy")
            else image_job.ImageSettings
            if "shape" in r["settings"]
            else LabelSettings
            if "n_labels" in r["settings"]
            else ResponseSettings
            if "n_turns" in r["settings"]
            else TextSettings
        )


def test_scores_are_part_of_what_a_job_is():
    job = TextJob(system="vae", out="there")
    a, b, c = (
        T.sweep_job(replace(job, settings=s), "x.ipynb").fingerprint for s in ("", "nll_sentences=300", "steps=10")
    )
    assert len({a, b, c}) == 3
    assert T.sweep_job(replace(job, out="elsewhere", results="r"), "x.ipynb").fingerprint == a


def test_tuning_gives_both_objectives_as_many_configurations():
    jobs = T.tune_jobs(seed=3)
    assert len(jobs) == sum(map(len, TUNING.values())) and len({len(v) for v in TUNING.values()}) == 1
    assert (
        {j.split for j in jobs} == {"valid"}
        and {j.seed for j in jobs} == {3}
        and len({j.out for j in jobs}) == len(jobs)
    )
    for j in jobs:
        resolve(j)


def test_a_new_system_is_a_job(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "mine", System("Mine", "own", dict(prior="normal", terms="kl")))
    assert T.table_jobs(systems=("mine",), seeds=(0,))[0].system == "mine" and len(TABLE) == 16


MINE = """
from ldebm import zoo
class Shifted(zoo.StandardNormal):
    def sample(self, n, *, y=None, gen=None): return super().sample(n, y=y, gen=gen)+1
    def log_weight(self, z, gen=None): return super().log_weight(z-1)
zoo.PRIORS["shifted"] = lambda s, gen: Shifted(s.d)
zoo.SYSTEMS["mine"] = zoo.System("Mine", "own", dict(zoo.PLAIN, prior="shifted", terms="kl"))
"""


@pytest.mark.slow
def test_a_system_of_a_users_own(corpus, tmp_path):
    "It runs in the notebook's process, is part of the run's identity, and its model can be loaded without its file"
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    p = subprocess.run(
        command(corpus, tmp_path, "--systems", "mine", "--module", str(mine)),
        cwd=PLACE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert p.returncode == 0, p.stdout + p.stderr
    (rec,) = load_results(tmp_path / "results")
    assert (
        rec["system"] == "mine"
        and rec["metrics"]["nll_valid"]["value"] > 0
        and len(rec["settings"]["module_sha256"]) == 64
    )
    (line,) = (x for x in p.stdout.splitlines() if x.startswith("| Mine |"))
    assert (
        f" {rec['metrics']['nll_valid']['value']:.2f} " in line and f" {rec['metrics']['bleu']['value']:.1f} " in line
    )  # the command ends with its table
    mine.unlink()
    (folder,) = (tmp_path / "runs").glob("mine-*")
    look = (
        "from ldebm.text_job import load_model; import sys; "
        "m, v = load_model(sys.argv[1]); print(type(m.prior).__name__)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", look, str(folder)], env=environment(), capture_output=True, text=True
        ).stdout.strip()
        == "Shifted"
    )
    for path in (tmp_path / "results").rglob("*.json"):
        path.unlink()
    mine.write_text(MINE)
    p = subprocess.run(
        command(corpus, tmp_path, "--systems", "mine", "--module", str(mine)),
        cwd=PLACE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "**1 skipped**" in p.stdout and len(load_results(tmp_path / "results")) == 1, (
        p.stdout + p.stderr
    )  # a record that was deleted is there again


@pytest.mark.slow
def test_killed_and_started_again(corpus, tmp_path):
    "SIGKILL in the middle; the same command then does exactly what is missing, and a third finds nothing to do"
    systems = ["ae", "dvae", "gm-vae-i"]

    def record(r):
        return tmp_path / "results" / "runs" / "few" / "quick" / f"{r}-consistent-s0.json"

    def start():
        return subprocess.Popen(
            command(corpus, tmp_path, "--systems", *systems),
            cwd=PLACE,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    first = start()
    end = time.monotonic() + 120
    while not any(record(r).exists() for r in systems):
        assert first.poll() is None and time.monotonic() < end, first.stdout.read()
        time.sleep(0.1)
    first.kill()
    first.wait()
    had = {r: record(r).read_bytes() for r in systems if record(r).exists()}
    assert 0 < len(had) < len(systems)
    second = start()
    said, _ = second.communicate(timeout=200)
    assert second.returncode == 0, said
    assert {r["system"] for r in load_results(tmp_path / "results")} == set(systems)
    assert sum(record(r).read_bytes() == b for r, b in had.items()) == len(
        had
    )  # a record carries the time it was written
    third = start()
    said, _ = third.communicate(timeout=100)
    assert third.returncode == 0 and f"**{len(systems)} skipped**" in said
    got = {r["system"]: r["metrics"] for r in load_results(tmp_path / "results")}
    assert (
        "nll_valid" not in got["ae"]
        and {"ckl", "information", "nll_valid"} <= set(got["dvae"])
        and "nll_valid" in got["gm-vae-i"]
    )
    assert not [p for p in (tmp_path / "runs").glob("*/failed.json")]
    assert {p.parent.name for p in (tmp_path / "runs").glob("*/sweep.json")} == {
        job_name(TextJob(system=r, corpus=str(corpus))) for r in systems
    }


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_run_that_raises_is_reported(corpus, tmp_path):
    "Its neighbours go on, and the exit status says so"
    folder = tmp_path / "runs" / "vae-few-quick-consistent-s0"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(dict(system="something else")))  # the folder of another run
    p = subprocess.run(
        command(corpus, tmp_path, "--systems", "vae", "dvae"),
        cwd=PLACE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert p.returncode == 1 and "holds a run with other settings" in p.stdout and "1 done, 1 failed" in p.stdout, (
        p.stdout + p.stderr
    )
    assert [r["system"] for r in load_results(tmp_path / "results")] == ["dvae"]


# -- a table that reads


def test_the_best_stand_in_bold_and_only_what_competes():
    "Not other settings, not figures of others, not a likelihood that is not valid, not in a terminal"
    systems = [("vae", "consistent"), ("dvae", "consistent"), ("ldebm", "consistent"), ("ldebm", "published")]
    values = [("vae", 0, 2.0), ("vae", 1, 4.0), ("dvae", 0, 3.5), ("ldebm", 0, 9.0)]
    rs = [made(seed, system, metrics=dict(wkl=metric(v))) for system, seed, v in values]
    rs += [made(7, "vae", metrics=dict(wkl=metric(0.1)), d=4)]
    paper = dict(ldebm=dict(wkl=0.06))
    lines = run_table(rs, "mine", "small", systems, dict(wkl=1), paper).replace("\u00a0", " ").splitlines()
    bold = [line.split(" | ")[0].removeprefix("| ") for line in lines if "**" in line]
    assert bold == ["vae", "dvae"]  # within the standard deviation of the best
    assert "**" not in run_table(rs, "mine", "small", systems, dict(wkl=1), paper, best=False)
    flawed = metric(1.0, estimator="NOT valid")
    rs = [made(0, s, metrics=dict(nll_valid=m)) for s, m in (("vae", metric(3.0)), ("ldebm", flawed))]
    assert "**" not in run_table(rs, "mine", "small", systems[:3], dict(nll_valid=1))


def test_what_is_too_much_for_a_table_is_folded_below_it():
    rs = [made(0, metrics=dict(wkl=metric(0.5), kl=metric(2.0)))]
    table = run_table(rs, "mine", "small", [("vae", "consistent")], dict(wkl=1), more=dict(kl=0))
    view, fold = table.split("<details>")
    assert view.splitlines()[0] == "| system | wkl, nats\u00a0↓ | seeds |" and "0.5" in view
    assert "More: kl, minutes, machine" in fold and "| vae | 2 | 1 | 1.0 | cpu, 1 threads |" in fold
    assert not [line for line in table.splitlines() if line.startswith(" ")]


def tables_in_view(page):
    "Heads of the tables of a notebook, what is folded or shown as code aside"
    content = json.loads((PLACE / "nbs" / f"{page}.ipynb").read_text(encoding="utf-8"))
    for cell in content["cells"]:
        outputs = [o.get("data", {}) for o in cell.get("outputs", [])]
        texts = ["".join(o.get("text/markdown", "")) for o in outputs]
        for text in [*texts, "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""]:
            lines = re.sub(r"<details.*?</details>|```.*?```", "", text, flags=re.S).splitlines()
            yield from (head for head, rule in zip(lines, lines[1:]) if re.fullmatch(r"\|[\s:|-]+\|", rule))


@pytest.mark.parametrize("page", sorted(p.stem for p in (PLACE / "nbs").glob("*.ipynb")))
def test_tables_in_view_are_narrow(page):
    "At most six columns, what is folded aside"
    wide = [head for head in tables_in_view(page) if len(re.findall(r"(?<!\\)\|", head)) - 1 > 6]
    assert not wide, f"more than six columns: {wide}"


def test_pages_of_results_have_tables_in_view():
    for page in ("map", "howto_text", "howto_check", "results", "benchmarks", "calibration"):
        assert list(tables_in_view(page)), page


def test_heads_of_the_results_lead_to_definitions():
    "Every metric that has one; each link names a symbol that its page exports"
    heads = " ".join([*tables_in_view("results"), *tables_in_view("results_pictures")])
    linked = dict(re.findall(r"\[(\w+)\]\((\w+\.ipynb#\w+)\)", heads))
    assert {"rppl", "bleu", "wkl", "nll_valid", "exact_gap", "prior_hole_auroc", "frechet", "mmd"} <= set(linked)
    for name, target in DEFINED.items():
        page, symbol = target.format(name).split("#")
        module = (PLACE / "ldebm" / f"{page_name(page)}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {symbol}\(", module, flags=re.M), target


def marks(panel):
    return {row: [(dot.value, dot.look) for dot in dots] for row, dots in panel.rows.items()}


def test_a_figure_shows_what_the_table_compares():
    "Means of the runs that compete, the paper's figures beside them, and nothing for what has not been run"
    flawed = metric(4.0, estimator="NOT valid")
    rs = [made(seed, metrics=dict(bleu=metric(1.0 + seed), nll_valid=flawed)) for seed in (0, 2)]
    rs += [made(7, metrics=dict(bleu=metric(90.0)), d=4)]
    rs += [made(0, "ldebm", metrics=dict(bleu=metric(5.0, interval=(4.0, 7.0))))]
    rows = [(system, "consistent") for system in ("vae", "ldebm", "dvae")]
    bleu, nll = run_panels(rs, "mine", "small", rows, ("bleu", "nll_valid"), dict(vae=dict(bleu=9.0)))
    assert marks(bleu) == {
        "vae": [(2.0, "without energies"), (9.0, "the paper")],
        "ldebm": [(5.0, "with energies")],
    }
    assert (bleu.rows["ldebm"][0].low, bleu.rows["ldebm"][0].high) == (4.0, 7.0)
    assert marks(nll) == {"vae": [(4.0, "likelihood not valid")], "ldebm": []} and nll.better == "low"
    axs = dot_panels([bleu, nll])
    assert [t.get_text() for t in axs[0].get_yticklabels()] == ["vae", "ldebm"]
    assert [ax.get_title() for ax in axs] == ["bleu\nbetter →", "nll_valid, nats\n← better"]
