"What a notebook cannot show about `records`: crashes, bad input that must leave no trace, and every way to differ"

import dataclasses
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fresh import ROOT, python, snapshot
from torch.testing import assert_close

from ldebm import records
from ldebm.core import make_gen
from ldebm.few_labels import LabelSettings
from ldebm.image_job import ImageSettings
from ldebm.records import (
    DATA_SETS,
    Run,
    data_of,
    group_records,
    identity,
    load_results,
    metric,
    own_name,
    provenance,
    result_path,
    system_name,
    write_result,
)
from ldebm.response_task import ResponseSettings
from ldebm.text_settings import TextJob, TextSettings
from ldebm.toy_job import ToySettings

# --- runs


def test_training_continues_bit_for_bit_from_a_checkpoint(tmp_path):
    def fresh():
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
        for i, p in enumerate(net.parameters()):
            torch.nn.init.normal_(p, generator=make_gen(0, "init", i))
        opt = torch.optim.AdamW(net.parameters(), lr=0.1, amsgrad=True)
        return net, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9), make_gen(0, "data")

    def train(net, opt, sched, gen, n):
        for _ in range(n):
            opt.zero_grad()
            net(torch.randn(16, 4, generator=gen)).square().mean().backward()
            opt.step()
            sched.step()

    whole = fresh()
    train(*whole, 6)
    net, opt, sched, gen = part = fresh()
    train(*part, 3)
    state = {"net": net.state_dict(), "opt": opt.state_dict(), "sched": sched.state_dict(), "gen": gen.get_state()}
    Run(tmp_path / "r", {"a": 1}).save(state)
    net, opt, sched, gen = part = fresh()
    s = Run(tmp_path / "r", {"a": 1}).load()
    (
        net.load_state_dict(s["net"]),
        opt.load_state_dict(s["opt"]),
        sched.load_state_dict(s["sched"]),
        gen.set_state(s["gen"]),
    )
    train(*part, 3)
    assert_close(net.state_dict(), whole[0].state_dict(), rtol=0, atol=0)
    assert sched.get_last_lr() == whole[2].get_last_lr()


def test_other_settings_change_nothing(tmp_path):
    run = Run(tmp_path / "r", {"lr": 0.1, "nested": {"T": 6}})
    run.log({"step": 1})
    run.save({"w": torch.ones(2)})
    (run.path / ".checkpoint.safetensors.1-1.tmp").write_bytes(b"left by a crash")
    os.utime(run.path / ".checkpoint.safetensors.1-1.tmp", (0, 0))
    with open(run.file("log.jsonl"), "a") as f:
        f.write('{"torn')
    before = snapshot(tmp_path)
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"other settings \(lr: 0.1 -> 0.2\)"):
            Run(tmp_path / "r", {"lr": 0.2, "nested": {"T": 6}}, resume=resume)
    with pytest.raises(ValueError, match="nested"):
        Run(tmp_path / "r", {"lr": 0.1, "nested": {"T": 7}})
    with pytest.raises(TypeError):
        Run(tmp_path / "new", {"lr": object()})
    assert snapshot(tmp_path) == before


def test_a_run_of_another_kind_is_told_by_its_first_differences(tmp_path):
    Run(tmp_path / "run", {f"a{i:02}": i for i in range(30)})
    with pytest.raises(
        ValueError, match=r"other settings \(a00: 0 -> absent, .*, a07: 7 -> absent and 52 more\); choose"
    ):
        Run(tmp_path / "run", {f"b{i:02}": i for i in range(30)})


def test_same_settings_continue_and_mend(tmp_path):
    run = Run(tmp_path / "r", {"lr": 0.1})
    for i in range(5):
        run.log({"step": i, "loss": float("nan") if i == 2 else i / 2})
    with open(run.file("log.jsonl"), "a") as f:
        f.write('{"step": 5, "lo')
    leftover = run.path / ".log.jsonl.1-1.tmp"
    leftover.write_bytes(b"")
    os.utime(leftover, (0, 0))
    run = Run(tmp_path / "r", {"lr": 0.1})
    assert (
        not leftover.exists()
        and [o["step"] for o in run.log_lines()] == [0, 1, 2, 3, 4]
        and run.log_lines()[2]["loss"] is None
    )
    run.log({"note": "no step"})
    run.truncate_log(2)
    run.log({"step": 3})
    assert [o.get("step") for o in run.log_lines()] == [0, 1, 2, None, 3]


def test_starting_over_removes_only_what_the_run_wrote(tmp_path):
    run = Run(tmp_path / "r", {"lr": 0.1})
    run.log({"step": 1})
    run.save({"w": torch.ones(2)})
    run.file("result.json").write_text("{}")
    run.file("notes.txt").write_text("mine")
    run = Run(tmp_path / "r", {"lr": 0.1}, resume=False)
    assert (
        sorted(p.name for p in run.path.iterdir() if p.name != ".run.lock") == ["notes.txt", "settings.json"]
        and run.load() is None
        and run.log_lines() == []
    )


def test_a_folder_with_an_output_notebook_can_become_a_run(tmp_path):
    (tmp_path / "train_ptb.ipynb").write_text("{}")  # papermill writes it before the first cell runs
    assert Run(tmp_path, {"a": 1}).file("settings.json").exists()


@pytest.mark.parametrize("text", ["", '{"lr": 0', "[1, 2]"])
def test_unreadable_settings(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match="settings.json"):
        Run(tmp_path, {"lr": 0})
    assert (tmp_path / "settings.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "r").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        Run(tmp_path / "r", {})


def test_damaged_checkpoint_of_a_run_names_the_file(tmp_path):
    run = Run(tmp_path / "r", {})
    p = run.save({"w": torch.ones(100)})
    p.write_bytes(p.read_bytes()[:-10])
    with pytest.raises(ValueError, match="checkpoint.safetensors is damaged.*delete it"):
        run.load()


# --- records


def record(**changes):
    base = dict(
        system="ldebm",
        corpus="grammar",
        preset="quick",
        objective="consistent",
        seed=0,
        settings={"lr": 0.1},
        metrics={"wkl": metric(0.5, (0.4, 0.6), 10, "x")},
        provenance=provenance(None),
    )
    return {**base, **changes}


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"system": ""}, "'system'"),
        ({"corpus": "path/to/file.txt"}, "'corpus'"),
        ({"preset": None}, "'preset'"),
        ({"objective": "a b"}, "'objective'"),
        ({"seed": "0"}, "'seed'"),
        ({"seed": True}, "'seed'"),
        ({"metrics": {}}, "'metrics'"),
        ({"metrics": {"wkl": 0.5}}, "'metrics.wkl'"),
        ({"metrics": {"wkl": {"value": 1}}}, "'metrics.wkl'"),
        ({"metrics": {"wkl": {**metric(1), "value": float("inf")}}}, "'metrics.wkl'"),
        ({"metrics": {"wkl": {**metric(1), "value": "pending"}}}, "'metrics.wkl'"),
        ({"metrics": {"wkl": {**metric(1), "interval": [2, 1]}}}, "'metrics.wkl'"),
        ({"settings": {"p": Path("x")}}, "'settings'"),
        ({"settings": None}, "'settings'"),
        ({"provenance": {}}, "'provenance.commit'"),
    ],
)
def test_broken_records_are_refused_before_anything_is_written(tmp_path, changes, key):
    run = Run(tmp_path / "r", {})
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=key):
        write_result(run, **record(**changes), results_dir=tmp_path / "results")
    assert snapshot(tmp_path) == before


def test_records(tmp_path):
    run, results = Run(tmp_path / "r", {}), tmp_path / "results"
    p = write_result(run, **record(), results_dir=results)
    assert (
        p == results / "runs/grammar/quick/ldebm-consistent-s0.json"
        and p.read_text() == run.file("result.json").read_text()
    )
    assert (
        write_result(run.path, **record(metrics={"wkl": metric(0.7)}), results_dir=results) == p
    )  # same settings: replaced
    assert load_results(results)[0]["metrics"]["wkl"]["value"] == 0.7
    with pytest.raises(ValueError, match=r"other settings \(lr: 0.1 -> 0.3\).*variant"):
        write_result(run, **record(settings={"lr": 0.3}), results_dir=results)
    assert load_results(results)[0]["settings"] == {"lr": 0.1}
    assert json.loads(run.file("result.json").read_text())["settings"] == {"lr": 0.3}  # the work is not lost
    q = write_result(run, **record(settings={"lr": 0.3}, variant="gc"), results_dir=results)
    assert q == p.with_name("ldebm+gc-consistent-s0.json")
    assert {system_name(r): r["metrics"]["wkl"]["value"] for r in load_results(results)} == {
        "ldebm": 0.7,
        "ldebm+gc": 0.5,
    }


def test_a_finished_run_opened_again_keeps_its_minutes(tmp_path):
    results = tmp_path / "results"
    run = Run(tmp_path / "r", {})
    first = write_result(run, **record(), results_dir=results).read_text()
    longer = record()
    longer["provenance"] = {**longer["provenance"], "minutes": 77.0}
    assert write_result(run, **longer, results_dir=results).read_text() == first
    longer["metrics"] = {"wkl": metric(0.25)}
    assert json.loads(write_result(run, **longer, results_dir=False).read_text())["provenance"]["minutes"] == 77
    for other in ("[half", "null", "[]"):
        (tmp_path / "r" / "result.json").write_text(other)
        assert json.loads(write_result(run, **record(), results_dir=False).read_text())["corpus"]


def test_name_is_checked_before_the_work(tmp_path):
    about = {k: v for k, v in record().items() if k in ("system", "corpus", "preset", "objective", "seed")}
    assert (
        result_path(**about, settings={"lr": 1}, results_dir=tmp_path)
        == tmp_path / "runs/grammar/quick/ldebm-consistent-s0.json"
    )
    write_result(Run(tmp_path / "r", {}), **record(), results_dir=tmp_path)
    with pytest.raises(ValueError, match="lr: 0.1 -> 1"):
        result_path(**about, settings={"lr": 1}, results_dir=tmp_path)
    with pytest.raises(ValueError, match="'corpus'"):
        result_path(**{**about, "corpus": "../x"}, results_dir=tmp_path)


def test_what_the_message_about_a_taken_name_advises(tmp_path):
    "Each of the three remedies, and that settings which change nothing are no other run"
    about = {k: v for k, v in record().items() if k in ("system", "corpus", "preset", "objective", "seed")}
    old = write_result(Run(tmp_path / "r", {}), **record(), results_dir=tmp_path)

    def ask(**more):
        return result_path(**{**about, "settings": {"lr": 1}, "results_dir": tmp_path, **more})

    with pytest.raises(ValueError, match=r"`variant` .*--variant.*another folder of records.*move the old record away"):
        ask()
    assert ask(variant="fast") != old and ask(results_dir=tmp_path / "elsewhere").name == old.name
    assert ask(settings={"lr": 0.1, "checkpoint_every": 7}) == old
    old.rename(tmp_path / "kept.bak")
    assert ask() == old


# -- what a row of a table is


def runs(*settings, **more):
    "Records of as many seeds, in the order of their ends"
    return [
        record(
            seed=i,
            settings={**s, "seed": i},
            provenance={**provenance(None), "finished": f"2026-01-01T00:00:{i:02}"},
            **{"variant": "", **more},
        )
        for i, s in enumerate(settings)
    ]


def groups(records, **kw):
    return [(how, [r["seed"] for r in rs]) for how, rs in group_records(records, **kw)]


BASE = dict(lr=0.1, d=32)


@pytest.mark.parametrize(
    "other, how",
    [
        (dict(BASE, d=4), "d=4"),
        (dict(BASE, d=4, lr=0.2), "d=4, lr=0.2"),
        (dict(BASE, packed=False), "packed=False"),
        (dict(lr=0.1), "no d"),
        (dict(BASE, corpus_sha256="f" * 64), "other data: ffffffff"),
        (dict(BASE, data="0123456789ab"), "other data: 01234567"),
        (dict(BASE, module_sha256="e" * 64), "other module: eeeeeeee"),
        (dict(BASE, d=32.5), "d=32.5"),
        (dict(BASE, lr=None), "lr=None"),
        (dict(BASE, terms="a|b"), r"terms=a\|b"),
        (dict(BASE, d=4, corpus_sha256="ab"), "other data: ab, d=4"),
    ],
)
def test_what_differs_gets_a_row_of_its_own(other, how):
    assert groups(runs(BASE, BASE, other)) == [("", [0, 1]), (how, [2])]
    assert groups(runs(other, BASE, BASE)) == [("", [1, 2]), (how, [0])], "the order of records says nothing"


@pytest.mark.parametrize(
    "change",
    [dict(preset="paper"), dict(objective="published"), dict(corpus="ptb"), dict(variant="x"), dict(system="vae")],
)
def test_names_are_part_of_what_was_run(change):
    one, other = runs(BASE, BASE)
    (first, a), (second, b) = groups([one, {**other, **change}])
    assert (a, b, first) == ([0], [1], "") and second == "=".join(*change.items())


def test_what_is_one_run_stays_one_row():
    assert groups(runs(BASE, dict(BASE, checkpoint_every=5), dict(reversed(BASE.items())))) == [("", [0, 1, 2])]
    assert group_records([]) == []


def test_many_differences_are_counted_and_told_apart():
    far = [dict(BASE, **{f"k{i}": j for i in range(9)}) for j in (1, 2)]
    (_, first), (a, _), (b, _) = groups(runs(BASE, BASE, *far))
    assert (
        first == [0, 1]
        and a.startswith("k0=1, k1=1, k2=1, k3=1, and 5 more, ")
        and b.startswith("k0=2, ")
        and a.split()[-1] != b.split()[-1]
    )


def test_a_seed_counts_once():
    "A run that was made again: its last record stands, wherever it lies"
    old, new = runs(BASE, BASE)
    new = {**new, "seed": 0}
    assert [rs for _, rs in group_records([new, old])] == [[new]] and [rs for _, rs in group_records([old, new])] == [
        [new]
    ]


def test_a_record_from_before_a_setting_has_its_default(monkeypatch):
    @dataclass
    class Old:
        lr: float = 0.5
        d: int = 8
        rho: float = 0.9

    @dataclass
    class Other:
        steps: int = 1
        lr: float = 3.0

    monkeypatch.setattr(records, "JOB_SETTINGS", [Other, Old])
    assert identity(dict(d=4, lr=0.1, seed=3)) == dict(d=4, lr=0.1, rho=0.9) and identity(
        dict(steps=3, seed=0)
    ) == dict(steps=3, lr=3.0)
    assert groups(runs(BASE, dict(BASE, rho=0.9), dict(BASE, rho=0.8))) == [("", [0, 1]), ("rho=0.8", [2])]


def test_a_table_is_about_one_data_set():
    "Where a row has no run on the table's data, none of its rows goes without saying so"
    mine, yours = (dict(BASE, corpus_sha256=s) for s in ("mine", "yours"))
    assert data_of(mine) == dict(corpus_sha256="mine") and data_of(dict(BASE, module_sha256="m")) == {}
    assert groups(runs(mine, yours, yours), data=data_of(mine)) == [("", [0]), ("other data: yours", [1, 2])]
    assert groups(runs(yours, yours), data=data_of(mine)) == [("other data: yours", [0, 1])]
    assert groups(runs(yours), data={}) == [("other data: yours", [0])] and groups(runs(BASE), data=data_of(mine)) == [
        ("other data: not said", [0])
    ]
    assert groups(runs(BASE, BASE), also=lambda r: dict(n=r["seed"])) == [("", [0]), ("n=1", [1])]


@pytest.mark.parametrize(
    "path",
    [
        "grammar.txt",
        "./ptb/",
        "PTB",
        "x/Digits",
        "digits.zip",
        "CIFAR10",
        "cifar-10",
        "cifar_10.ZIP",
        "a/CelebA",
        "LSUN-Church",
        "lsun.church",
        "ｐｔｂ.txt",
        "ptb\u200b.txt",
        "\u00a0shapes",
        "gaussians 16",
        "Pinwheel",
        "ﬁle/ptb",
        "..ptb",
        "daily dialog.txt",
        "cifar10–jpeg",
    ],
)
def test_user_data_never_takes_the_name_of_a_data_set(path):
    got = own_name(path)
    assert got not in DATA_SETS and got.casefold() not in DATA_SETS
    write = dict(system="vae", preset="quick", objective="consistent", seed=0, results_dir="x")
    assert result_path(**write, corpus=got) == Path("x", "runs", got, "quick", "vae-consistent-s0.json"), (
        "it is a name for files"
    )


def test_names_of_user_data():
    assert [
        own_name(o) for o in ("my lines.txt", "a/b/corpus.v2.txt", "cifar10.v2", "few.zip", "news.de", "news.en")
    ] == ["my-lines", "corpus.v2", "cifar10.v2", "few", "news.de", "news.en"]
    lost = [own_name(o) for o in ("小说.txt", "对话.txt", "été.txt", "ôtô.txt", "☃", "пtb", "рtb")]
    assert len({*lost}) == len(lost) and own_name("小说.txt") == own_name("b/小说.txt") == own_name("小说")
    assert own_name("e\u0301te\u0301") == own_name("été"), "one name, composed or not"
    assert own_name(".") == own_name(Path.cwd()) and own_name("x/../y") == "y"


def test_every_data_set_is_known():
    from ldebm.corpora import CORPORA
    from ldebm.image_sets import IMAGE_SETS
    from ldebm.toys import TOYS

    assert {*CORPORA, *IMAGE_SETS, *TOYS} <= {*DATA_SETS}


def test_bad_files_among_records_are_named(tmp_path):
    for kind in ("bench", "calibration"):
        (tmp_path / f"{kind}-x.json").write_text("[]")  # they have their own schemas
    assert load_results(tmp_path) == []
    (tmp_path / "x.json").write_text('{"system": "ldebm"}')
    with pytest.raises(ValueError, match="x.json.*'corpus' is missing"):
        load_results(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="x.json is not JSON"):
        load_results(tmp_path)


def test_records_are_found_where_older_versions_put_them(tmp_path):
    "Side by side in the folder; a run's own folder below it, also in one called `runs`, holds no records"
    new = write_result(Run(tmp_path / "runs" / "r", {}), **record(), results_dir=tmp_path)
    (tmp_path / "vae-grammar-quick-consistent-s0.json").write_text(json.dumps(record(system="vae", variant="")))
    (tmp_path / "runs" / "r" / "stage").mkdir()
    (tmp_path / "runs" / "r" / "stage" / "settings.json").write_text("{}")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "chain-x.json").write_text("[]")
    assert {r["system"] for r in load_results(tmp_path)} == {"ldebm", "vae"}
    new.write_text("{")
    with pytest.raises(ValueError, match="ldebm-consistent-s0.json is not JSON"):
        load_results(tmp_path)


def test_a_setting_with_a_new_name_is_found_in_old_files(tmp_path, monkeypatch):
    "One line in `RENAMED`: a run goes on, its record is replaced, and both names stand in one row"
    run = Run(tmp_path / "r", {"lr": 0.1, "old": 3})
    old = write_result(run, **record(settings={"lr": 0.1, "old": 3}), results_dir=tmp_path / "results")
    path = run.path
    del run
    monkeypatch.setitem(records.RENAMED, "old", "new")
    run = Run(path, {"lr": 0.1, "new": 3})
    with pytest.raises(ValueError, match=r"other settings \(new: 3 -> 4\)"):
        Run(path, {"lr": 0.1, "new": 4})
    (rec,) = load_results(tmp_path / "results")
    assert rec["settings"] == {"lr": 0.1, "new": 3}
    assert groups(runs(BASE | {"old": 3}, BASE | {"new": 3})) == [("", [0, 1])]
    assert write_result(run, **record(settings={"lr": 0.1, "new": 3}), results_dir=tmp_path / "results") == old
    assert json.loads(old.read_text())["settings"] == {"lr": 0.1, "new": 3}
    with pytest.raises(ValueError, match=r"other settings \(new: 3 -> 4\)"):
        write_result(run, **record(settings={"lr": 0.1, "new": 4}), results_dir=tmp_path / "results")


OLD = {new: old for old, new in records.RENAMED.items()}


def in_old_words(settings):
    return {OLD.get(k, k): v for k, v in settings.items()}


@pytest.mark.parametrize("folder", ["results", "results/tuning"])
def test_every_record_of_this_repository_is_read_in_the_words_of_today(folder):
    "Each key is known, and what one run was called before and is called now is one run"
    more = {"corpus_sha256", "processes", "split", "module_sha256", "n_train", "shape", "data"}
    more |= {"density", "scale", "sample_steps"}
    more |= {"n_labels"}
    jobs = (TextSettings, TextJob, ImageSettings, ToySettings, LabelSettings, ResponseSettings)
    known = more | {f.name for job in jobs for f in dataclasses.fields(job)}
    found = load_results(ROOT / folder)
    assert found
    for r in found:
        settings = r["settings"]
        assert not {*r, *settings} & {*records.RENAMED} and set(settings) <= known, set(settings) - known
        assert settings.get("system", r["system"]) == r["system"]
        old = in_old_words(settings)
        assert old != settings or "sample_steps" in settings
        assert records.identity(old) == records.identity(settings)
        ((how, runs),) = group_records([{**r, "settings": records.renamed(old)}, {**r, "seed": -1}])
        assert (how, len(runs)) == ("", 2)


def test_records_in_old_words_are_found_and_replaced(tmp_path):
    about = dict(system="ldebm", corpus="grammar", preset="quick", objective="consistent", seed=0)
    path = result_path(**about, results_dir=tmp_path)
    path.parent.mkdir(parents=True)
    settings = {"system": "ldebm", "temperature": 0.5, "free_nats": 0.1}
    path.write_text(json.dumps(in_old_words(record(settings=in_old_words(settings), variant=""))))
    assert {"row", "tau", "floor"} <= {*json.loads(path.read_text()), *json.loads(path.read_text())["settings"]}
    (rec,) = load_results(tmp_path)
    assert rec["system"] == "ldebm" and rec["settings"] == settings
    assert result_path(**about, settings=settings, results_dir=tmp_path) == path
    with pytest.raises(ValueError, match=r"other settings \(temperature: 0.5 -> 0.7\)"):
        result_path(**about, settings=settings | {"temperature": 0.7}, results_dir=tmp_path)


def git(*args):
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)


def test_every_record_of_this_repository_is_kept_where_its_name_says():
    "Tracked by git, so that none is lost to `.gitignore`; and filed under what it is about"
    if git("rev-parse", "--show-toplevel").stdout.strip() != str(ROOT):
        pytest.skip("not in a checkout")
    results = ROOT / "results"
    files = {p.relative_to(ROOT).as_posix() for p in results.rglob("*.json")}
    assert files and files <= {*git("ls-files", "results").stdout.splitlines()}
    for folder in (results, results / "tuning"):
        found = load_results(folder)
        names = {f.name for f in dataclasses.fields(records.RecordName)}
        want = {folder / records.RecordName(**{k: r[k] for k in names}).file for r in found}
        assert want == {*folder.glob("runs/*/*/*.json")} and len(want) == len(found) > 0
    assert (
        git("check-ignore", "-q", "runs/x").returncode == 0 and git("check-ignore", "-q", "results/runs/x").returncode
    )


def test_results_root_is_found_from_below(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("")
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    monkeypatch.delenv("LDEBM_RESULTS", raising=False)
    assert records.results_root() == tmp_path / "results"
    monkeypatch.setenv("LDEBM_RESULTS", str(tmp_path / "other"))
    assert records.results_root() == tmp_path / "other"


@pytest.mark.parametrize(
    "bad",
    [
        dict(value=float("nan")),
        dict(value="1"),
        dict(value=True),
        dict(value=1, interval=(1,)),
        dict(value=1, interval=(2, 1)),
        dict(value=1, interval=(0, float("inf"))),
        dict(value=1, n=-1),
        dict(value=1, n=1.5),
        dict(value=1, estimator=3),
    ],
)
def test_bad_metrics(bad):
    with pytest.raises(ValueError):
        metric(**bad)


# --- provenance


@pytest.mark.slow
def test_commit_is_the_checkout_of_the_package_and_says_when_dirty(tmp_path, monkeypatch):
    pkg = tmp_path / "ldebm"
    pkg.mkdir()
    for name in ("__init__.py", "core.py", "records.py"):
        (pkg / name).write_text((ROOT / "ldebm" / name).read_text())

    def git(*args):
        cmd = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *args]
        return subprocess.run(cmd, check=True, capture_output=True, text=True).stdout.strip()

    def commit():
        code = "import ldebm.records as c; print(c.__file__); print(c.env_report()['commit'])"
        out, err = python(code, root=tmp_path).communicate()
        assert not err, err
        file, found = out.split()
        assert Path(file) == pkg / "records.py"
        return found

    git("init", "-q")
    assert commit() == "unknown"  # inside a checkout that does not hold it, as in a virtual environment
    monkeypatch.setenv("LDEBM_COMMIT", "abc")
    assert commit() == "abc"  # a copy without history says where it is from
    git("add", "."), git("commit", "-qm", "x", "--no-gpg-sign")
    (tmp_path / "notes.txt").write_text("untracked, and not the package")
    assert commit() == git("rev-parse", "HEAD")
    (pkg / "core.py").write_text((pkg / "core.py").read_text() + "\n")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_provenance_is_plain_json():
    p = provenance(time.time() - 60, throughput=12.5)
    assert json.loads(json.dumps(p)) == p and 1 <= p["minutes"] < 1.1 and p["throughput"] == 12.5 and p["threads"] >= 1
    assert {"python", "torch", "ldebm"} <= set(p["versions"]) and (
        p["peak_memory_mb"] is None or p["peak_memory_mb"] > 10
    )
