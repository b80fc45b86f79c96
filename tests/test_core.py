"What a notebook cannot show about `core`: crashes, other processes, signals, and bad input that must leave no trace"

import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import pytest
import torch
from torch.testing import assert_close

from ldebm import core, records
from ldebm.core import (
    atomic_write,
    graceful_stop,
    load_tensors,
    make_gen,
    pack_state,
    pick_device,
    progress,
    save_tensors,
    settings_hash,
    unpack_state,
    weights_hash,
)
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
    row_name,
    write_result,
)
from ldebm.settings import check_params, notebook_params

ROOT = Path(__file__).resolve().parents[1]


def python(code, *args, root=ROOT, **env):
    "Start a fresh interpreter on `code`, with the package of the checkout at `root`"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **env},
    )


def snapshot(folder):
    "Names, contents and times of everything below `folder`"
    return {
        p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in Path(folder).rglob("*")
    }


# --- randomness


def test_streams_are_the_same_bits_in_another_process():
    code = "import torch; from ldebm.core import make_gen; print(torch.randn(5, generator=make_gen(7, 'chains', 3)).tolist())"
    outs = [python(code, PYTHONHASHSEED=h).communicate()[0] for h in ("0", "1")]
    assert json.loads(outs[0]) == json.loads(outs[1]) == torch.randn(5, generator=make_gen(7, "chains", 3)).tolist()


def test_streams_are_pinned():
    "A changed hash would silently change every seeded result: these numbers are from the first version"
    assert torch.randint(1000, (4,), generator=make_gen(0, "batches", 1)).tolist() == [983, 373, 694, 431]


def test_streams_do_not_touch_the_global_generator_nor_each_other():
    before = torch.random.get_rng_state()
    a, b = make_gen(0, "a"), make_gen(0, "b")
    torch.randn(10, generator=a)
    want = torch.randn(3, generator=make_gen(0, "b"))
    assert_close(torch.randn(3, generator=b), want, rtol=0, atol=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_thousand_streams_have_different_seeds():
    seeds = {make_gen(s, name, i).initial_seed() for s in range(10) for name in ("x", "y") for i in range(50)}
    assert len(seeds) == 1000


@pytest.mark.parametrize("bad", [(1.0,), (0, 2.5), (True,), (0, None)])
def test_streams_refuse_other_types(bad):
    with pytest.raises(TypeError, match="int or str"):
        make_gen(*bad)


# --- settings


@dataclass(frozen=True)
class Cfg:
    rate: float = 0.1
    steps: int = 3
    mode: Literal["a", "b"] = "a"
    limit: Optional[int] = None
    sizes: tuple[int, ...] = (1, 2)
    flag: bool = False
    name: str = "x"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"stepz": 1}, "'stepz'.*'steps'"),
        ({"qqqqqq": 1}, "'qqqqqq'.*known are rate"),
        ({"rate": "0.1"}, "'rate' = '0.1' .*float"),
        ({"rate": None}, "'rate'"),
        ({"rate": True}, "'rate' = True"),
        ({"steps": 3.0}, "'steps' = 3.0 .*int"),
        ({"mode": "c"}, "'mode' = 'c' .*Literal"),
        ({"limit": "5"}, "'limit'"),
        ({"sizes": [1, "2"]}, "'sizes'"),
        ({"sizes": 3}, "'sizes'"),
        ({"flag": 1}, "'flag' = 1 .*bool"),
        ({"name": 3}, "'name' = 3 .*str"),
    ],
)
def test_bad_parameters_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        check_params(Cfg, values)


def test_good_parameters():
    cfg = check_params(Cfg, dict(rate=1, steps=5, mode="b", limit=4, sizes=[3, 4], flag=True, name="y"))
    assert cfg == Cfg(1.0, 5, "b", 4, (3, 4), True, "y") and type(cfg.rate) is float and type(cfg.sizes) is tuple


def test_errors_of_the_settings_class_itself_come_through():
    @dataclass(frozen=True)
    class Checked:
        T: int = 6

        def __post_init__(self):
            if self.T < 1:
                raise ValueError(f"T must be at least 1, got {self.T}")

    with pytest.raises(ValueError, match="T must be at least 1"):
        check_params(Checked, {"T": 0})


def test_notebook_parameters_ignore_what_a_session_brings_along():
    ns = {}
    exec(
        "from __future__ import annotations\nimport os, pathlib\nfrom typing import Optional, List\n"
        "from matplotlib import pyplot\nNames = List[str]\ndef f(): pass\n"
        "rate: float = 1\nsteps: int = 2\nmode: str = 'a'\nlimit: Optional[int] = None\n"
        "sizes: tuple = (1,)\nflag: bool = True\nname: str = 'n'",
        ns,
    )
    ns |= {"In": ["x"], "Out": {}, "_": 1, "_i1": "x", "exit": object(), "quit": object(), "get_ipython": lambda: None}
    assert notebook_params(Cfg, ns) == Cfg(1.0, 2, "a", None, (1,), True, "n")
    with pytest.raises(ValueError, match="unknown parameter 'stesp'.*'steps'"):
        notebook_params(Cfg, {**ns, "stesp": 1})
    with pytest.raises(ValueError, match="does not set 'name'"):
        notebook_params(Cfg, {k: v for k, v in ns.items() if k != "name"})


CELL = "rate: float = 1.\nsteps: int = 2\nmode: str = 'a'\nlimit: int = None\nsizes: tuple = (1,)\nflag: bool = True\nname: str = 'n'"
SETUP = "job = notebook_params(Cfg, globals())\njob.rate"


def session(*cells):
    "What IPython keeps of cells that were run, the last one running now"
    ns = {"In": ["", *cells], "job": 1, "loss": 0.5, "rows": {"a": 1}}  # whatever the page has named
    for c in cells:
        if not c.startswith(("job", "loss", "%", "for")):
            exec(c, {"notebook_params": lambda *a: 1, "Cfg": Cfg}, ns)
    return ns


@pytest.mark.parametrize(
    "cells",
    [
        ("import os", CELL),
        (CELL, "rate = 3.", SETUP, "loss = .5"),
        (CELL, SETUP, "rows = {'a': 1}", CELL),
        ("scratch = 3", CELL),
        (CELL, SETUP, "scratch = 3"),
        (CELL, "# Parameters\nrate = float('nan')"),
        (CELL, "stesp = 1", SETUP, CELL),
        (CELL, SETUP, "%matplotlib inline", "for i in 'ab': x = i", "rate = 2."),
        (CELL + "\njob = notebook_params(Cfg, globals())",),
    ],
)
def test_cells_of_a_session_may_be_run_again(cells):
    ns = session(*cells, SETUP)
    got = notebook_params(Cfg, ns)
    assert got.steps == 2 and (got.rate == ns["rate"] or math.isnan(ns["rate"]))


@pytest.mark.parametrize(
    "cells",
    [
        (CELL, "stesp = 1"),
        (CELL, "# Parameters\nrate = 2.\nstesp = 1"),
        (CELL.replace("steps", "stesp"),),
        (CELL, SETUP, CELL + "\nstesp: int = 3"),
        (CELL, SETUP, CELL, "stesp = 1"),
        (CELL, SETUP, "loss = .5", "rate = 2.\nstesp = 3"),
        (CELL + "\nprint(rate)", "stesp = float('inf')"),
    ],
)
def test_misspelt_parameters_of_a_session_are_found(cells):
    with pytest.raises(ValueError, match="unknown parameter 'stesp'.*'steps'"):
        notebook_params(Cfg, session(*cells, SETUP))


def test_settings_hash():
    assert settings_hash({"a": 1, "b": {"c": (1, 2)}}) == settings_hash({"b": {"c": [1, 2]}, "a": 1})
    assert len({settings_hash(o) for o in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": True}, {"a": None}, {"b": 1})}) == 6
    with pytest.raises(ValueError):
        settings_hash({"a": float("nan")})
    with pytest.raises(TypeError):
        settings_hash({"a": Path("x")})


def test_weights_hash():
    "Names, values and types count, layout in memory does not; the value is that of weights stored long ago"
    net = torch.nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.arange(6.0).view(2, 3))
        net.bias.zero_()
    assert weights_hash(net) == "ba951af64270acd5"
    net.weight.data = torch.arange(6.0).view(2, 3).T.contiguous().T
    assert not net.weight.is_contiguous() and weights_hash(net) == "ba951af64270acd5"
    moved = torch.nn.Linear(3, 2)
    moved.load_state_dict(net.state_dict())
    with torch.no_grad():
        moved.bias[1] = 1e-30
    seen = {weights_hash(m) for m in (net, moved, torch.nn.Sequential(net), torch.nn.Linear(3, 2, bias=False))}
    assert len(seen) == 4 and weights_hash(net.double()) not in seen


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "CPU", "cpu:0:1"])
def test_unknown_devices(name):
    with pytest.raises(ValueError, match="unknown device"):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_public_function_says_which_devices_there_are(tmp_path):
    "Not torch's own assertion, and before any work: what takes a device and reads, trains or measures"
    from ldebm import classifier, image_job, lm_training, reverse, text_job, train

    words = [["a", "b"]] * 300
    run = Run(tmp_path / "run", {})
    before = sorted(p.name for p in run.path.iterdir())
    save_tensors(tmp_path / "x", {"a": torch.zeros(2)})
    run.save({"a": torch.zeros(2)}, "state")
    (tmp_path / "config.json").write_text("{}")

    class Task:
        model = torch.nn.Linear(1, 1)

    calls = dict(
        load_tensors=lambda d: load_tensors(tmp_path / "x", d),
        run_load=lambda d: run.load("state", d),
        load_model=lambda d: text_job.load_model(tmp_path, d),
        load_prior=lambda d: image_job.load_prior(tmp_path / "x", d),
        load_classifier=lambda d: classifier.load_classifier(tmp_path / "x", d),
        load_lm=lambda d: lm_training.load_lm(tmp_path / "x", d),
        train_lm=lambda d: lm_training.train_lm(words, words, "quick", device=d),
        rppl_floor=lambda d: reverse.rppl_floor(words, words, "quick", device=d),
        reverse_ppl=lambda d: reverse.reverse_ppl(words, words, cfg="quick", device=d),
        fit=lambda d: train.fit(Task(), run, train.TrainCfg(), 0, d),
        launch=lambda d: train.launch(Task(), run, train.TrainCfg(), 0, d),
    )
    for name, call in calls.items():
        for device, says in (
            ("cuda", "device 'cuda' is not available: PyTorch sees 0 CUDA devices; use 'auto' or 'cpu'"),
            (torch.device("cuda:1"), "device 'cuda:1' is not available"),
            ("gpu", "unknown device 'gpu'"),
        ):
            with pytest.raises(ValueError, match=says):
                call(device)
    assert sorted(p.name for p in run.path.iterdir()) == sorted([*before, "state.safetensors"])
    assert torch.equal(load_tensors(tmp_path / "x", "auto")[0]["a"], torch.zeros(2))


# --- files

WRITER = """
import sys, torch
from pathlib import Path
import ldebm.core as core
path, how = Path(sys.argv[1]), sys.argv[2]
big = {'w': torch.full((4_000_000,), 2.)}
if how == 'before-rename':                      # the temporary file is whole, its name is not given yet
    core.os.replace = lambda *a: (print('ready', flush=True), core.time.sleep(60))
print('start', flush=True)
if how == 'before-rename': sys.exit(core.save_tensors(path, big, {'v': 2}))
while True: core.save_tensors(path, big, {'v': 2}); core.save_tensors(path, {'w': torch.ones(10)}, {'v': 1})
"""


def test_writer_killed_before_the_rename_leaves_the_old_file(tmp_path):
    p = save_tensors(tmp_path / "c.safetensors", {"w": torch.ones(10)}, {"v": 1})
    old = p.read_bytes()
    child = python(WRITER, p, "before-rename")
    assert child.stdout.readline() == "start\n" and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert p.read_bytes() == old
    assert list(tmp_path.glob(".*.tmp"))  # the file that was being written, beside it
    assert load_tensors(p)[1] == {"v": 1}


def test_writer_killed_at_any_time_leaves_a_whole_file(tmp_path):
    p = save_tensors(tmp_path / "c.safetensors", {"w": torch.ones(10)}, {"v": 1})
    for wait in (0.0, 0.007, 0.013, 0.029, 0.053):
        child = python(WRITER, p, "loop")
        assert child.stdout.readline() == "start\n"
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        tensors, meta = load_tensors(p)
        assert (len(tensors["w"]), tensors["w"][0].item()) == {1: (10, 1.0), 2: (4_000_000, 2.0)}[meta["v"]]


def test_failed_write_leaves_nothing_behind(tmp_path):
    atomic_write(tmp_path / "a.txt", "old")
    with pytest.raises(TypeError):
        atomic_write(tmp_path / "a.txt", 3)
    with pytest.raises(Exception):
        save_tensors(tmp_path / "b.safetensors", {"w": torch.eye(3).to_sparse()})
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_damaged_and_foreign_checkpoints(tmp_path):
    good = save_tensors(tmp_path / "good.safetensors", {"w": torch.randn(50)}, {}).read_bytes()
    for name, data in dict(
        empty=b"", cut=good[:-3], head=good[:20], text=b"hello, world, this is text", long=good + b"x"
    ).items():
        p = atomic_write(tmp_path / f"{name}.safetensors", data)
        with pytest.raises(ValueError, match=f"{name}.safetensors is damaged.*delete"):
            load_tensors(p)
    torch.save({"w": torch.ones(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="pickle.safetensors is damaged"):
        load_tensors(tmp_path / "pickle.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_tensors(tmp_path / "none.safetensors")


def test_shared_and_strided_tensors_are_saved(tmp_path):
    w = torch.arange(12.0).view(3, 4)
    t = {
        "a": w,
        "b": w.t(),
        "c": w[1],
        "d": torch.nn.Parameter(w),
        "e": torch.zeros(0, 3),
        "f": torch.tensor(True),
        "g": w.bfloat16(),
    }
    back, _ = load_tensors(save_tensors(tmp_path / "t.safetensors", t, {}))
    assert all(
        torch.equal(back[k], v.detach()) and back[k].dtype == v.dtype and not back[k].requires_grad
        for k, v in t.items()
    )


def test_pack_state_round_trip_is_exact():
    obj = {
        "a": [1, (2.5, None), {}],
        3: {"x.0": torch.ones(2), "3": -0.0},
        "big": 2**80,
        "t": (),
        "l": [],
        "inf": float("-inf"),
        "flag": True,
        "text": "é",
        "tiny": 5e-324,
        "third": 1 / 3,
    }
    tensors, meta = pack_state(obj)
    back = unpack_state(tensors, json.loads(json.dumps(meta)))
    assert str(back) == str(obj) and back[3]["x.0"] is obj[3]["x.0"]
    nan = unpack_state(*pack_state(float("nan")))
    assert nan != nan
    for bad in ({"a": object()}, {(1, 2): 3}, [{1, 2}], {"a": {1.5: 2}}):
        with pytest.raises(TypeError, match="cannot pack"):
            pack_state(bad)


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


# --- runs


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


# --- signals

LOOP = """
import sys, time
from ldebm.core import graceful_stop
from ldebm.records import Run
run = Run(sys.argv[1], {})
with graceful_stop() as leave:
    i = 0
    while not leave.stop:
        i += 1
        if i == 1: print('ready', flush=True)
        time.sleep(.01)
        if sys.argv[2] == 'deaf': time.sleep(60)
run.save({'step': i})
print('left in good order', flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals as on Unix")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_saves_and_leaves(tmp_path, signum):
    child = python(LOOP, tmp_path, "")
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signum)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and "left in good order" in out, err
    assert Run(tmp_path, {}).load()["step"] >= 1


@pytest.mark.skipif(os.name != "posix", reason="signals as on Unix")
def test_the_second_signal_means_it(tmp_path):
    child = python(LOOP, tmp_path, "deaf")
    assert child.stdout.readline() == "ready\n"
    while child.poll() is None:
        child.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert child.returncode != 0 and "KeyboardInterrupt" in child.stderr.read()


def test_graceful_stop_restores_handlers_also_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError):
        with graceful_stop():
            assert signal.getsignal(signal.SIGINT) != before[0]
            raise RuntimeError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_graceful_stop_nests():
    with graceful_stop() as outer:
        with graceful_stop() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner.stop and not outer.stop
        signal.raise_signal(signal.SIGTERM)
        assert outer.stop


def test_graceful_stop_is_inert_in_a_thread():
    seen = []

    def work():
        with graceful_stop() as leave:
            seen.append((leave.stop, signal.getsignal(signal.SIGINT)))

    t = threading.Thread(target=work)
    t.start()
    t.join()
    assert seen == [(False, signal.getsignal(signal.SIGINT))]


# --- progress


def test_progress_is_silent_without_a_terminal():
    code = (
        "from ldebm.core import progress\nfor i in progress(range(5)): pass\n"
        "b = progress(total=3); b.update(2); b.set_postfix({'a': 1}); b.close()"
    )
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    r = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**env, "PYTHONPATH": str(ROOT)}
    )
    assert (r.returncode, r.stdout, r.stderr) == (0, "", "")


def test_progress_in_a_kernel_leaves_no_debris(monkeypatch):
    import IPython.display

    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(core, "_in_kernel", lambda: True)
    for name in ("IN_TEST", "RANK"):
        monkeypatch.delenv(name, raising=False)
    bar = progress(total=4, desc="epoch", unit="step")
    bar.last = 0.0  # as if time had passed
    bar.set_postfix({"loss": 0.123456})
    bar.update(3)
    assert "epoch" in shown[0] and "3/4" in shown[0] and "loss=0.1235" in shown[0]
    bar.close()
    assert shown[-1] == ""
    with pytest.raises(RuntimeError):  # also when the loop fails
        for _ in (bar := progress(range(3))):
            bar.draw()
            raise RuntimeError
    bar.close()
    assert shown[-1] == ""


# --- records


def record(**changes):
    base = dict(
        row="ldebm",
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
        ({"row": ""}, "'row'"),
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
    assert {row_name(r): r["metrics"]["wkl"]["value"] for r in load_results(results)} == {"ldebm": 0.7, "ldebm+gc": 0.5}


def test_name_is_checked_before_the_work(tmp_path):
    about = {k: v for k, v in record().items() if k in ("row", "corpus", "preset", "objective", "seed")}
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
    about = {k: v for k, v in record().items() if k in ("row", "corpus", "preset", "objective", "seed")}
    old = write_result(Run(tmp_path / "r", {}), **record(), results_dir=tmp_path)

    def ask(**more):
        return result_path(**{**about, "settings": {"lr": 1}, "results_dir": tmp_path, **more})

    with pytest.raises(ValueError, match=r"`variant` name .*another folder of records.*move the old record away"):
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
    [dict(preset="paper"), dict(objective="published"), dict(corpus="ptb"), dict(variant="x"), dict(row="vae")],
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
    write = dict(row="vae", preset="quick", objective="consistent", seed=0, results_dir="x")
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
    from ldebm.data import TOYS
    from ldebm.images import IMAGE_SETS
    from ldebm.text import CORPORA

    assert {*CORPORA, *IMAGE_SETS, *TOYS} <= {*DATA_SETS}


def test_bad_files_among_records_are_named(tmp_path):
    for kind in ("bench", "calibration"):
        (tmp_path / f"{kind}-x.json").write_text("[]")  # they have their own schemas
    assert load_results(tmp_path) == []
    (tmp_path / "x.json").write_text('{"row": "ldebm"}')
    with pytest.raises(ValueError, match="x.json.*'corpus' is missing"):
        load_results(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="x.json is not JSON"):
        load_results(tmp_path)


def test_records_are_found_where_older_versions_put_them(tmp_path):
    "Side by side in the folder; a run's own folder below it, also in one called `runs`, holds no records"
    new = write_result(Run(tmp_path / "runs" / "r", {}), **record(), results_dir=tmp_path)
    (tmp_path / "vae-grammar-quick-consistent-s0.json").write_text(json.dumps(record(row="vae", variant="")))
    (tmp_path / "runs" / "r" / "stage").mkdir()
    (tmp_path / "runs" / "r" / "stage" / "settings.json").write_text("{}")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "chain-x.json").write_text("[]")
    assert {r["row"] for r in load_results(tmp_path)} == {"ldebm", "vae"}
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


CHURN = """
import resource, sys, torch
from ldebm.core import keep_memory
torch.set_num_threads(1)
done, g, held = keep_memory(), torch.Generator().manual_seed(0), []
def churn(n):
    for _ in range(n):
        held.append(torch.empty(int(torch.randint(1, 40, (1,), generator=g))*2**18).fill_(1.))   # up to 40 MB, at most five at a time
        if len(held) > 4: held.pop(int(torch.randint(4, (1,), generator=g)))
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn(50); start = faults(); churn(50)
print(int(done), faults()-start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="GNU's C library alone")
def test_memory_that_is_kept_is_not_zeroed_again():
    "Blocks of any size, freed in any order: hardly a new page, and hardly more memory"

    def run(keep):
        p = subprocess.run(
            [sys.executable, "-c", CHURN],
            env={**os.environ, "PYTHONPATH": str(ROOT), "LDEBM_KEEP_MEMORY": keep},
            capture_output=True,
            text=True,
        )
        assert p.returncode == 0, p.stderr
        return map(int, p.stdout.split())

    off, many, before = run("0")
    for _ in range(
        3
    ):  # a system that takes idle pages back from a process that waits for its turn only adds to the count
        on, few, after = run("1")
        if few < many / 5:
            break
    assert (off, on) == (0, 1) and few < many / 5 and after < 1.5 * before


GAPS = """
import sys, time, torch
from ldebm.core import keep_memory
def resident(): return next(int(x.split()[1])//1024 for x in open("/proc/self/status") if x.startswith("VmRSS"))
done = keep_memory(every=float(sys.argv[1])) and keep_memory(every=1e6)   # the second call changes nothing
blocks = [(torch.ones(2**18), torch.ones(2**8)) for _ in range(200)]   # 1 MB and, after it, 1 KB
full, small = resident(), [b for _, b in blocks]
del blocks; gaps = resident()
for _ in range(40):
    time.sleep(.25); now = resident()
    if now < gaps - 150: break
assert all(bool((b == 1).all()) for b in small)
print(int(done), full, gaps, now)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="GNU's C library alone")
def test_gaps_between_blocks_go_back_to_the_system():
    "What is free but not at the end of the heap is kept for a while only"

    def run(every):
        p = subprocess.run(
            [sys.executable, "-c", GAPS, every],
            env={**os.environ, "PYTHONPATH": str(ROOT), "LDEBM_KEEP_MEMORY": "1"},
            capture_output=True,
            text=True,
        )
        assert p.returncode == 0, p.stderr
        done, *sizes = map(int, p.stdout.split())
        assert done
        return sizes

    full, gaps, later = run("60")
    assert gaps > full - 20 and later > gaps - 20  # MB; kept so far
    full, gaps, later = run("1")
    assert gaps > full - 20 and later < gaps - 150


def test_what_keeps_memory_is_0_or_1(monkeypatch):
    monkeypatch.setenv("LDEBM_KEEP_MEMORY", "yes")
    with pytest.raises(ValueError, match="LDEBM_KEEP_MEMORY must be '0' or '1', got 'yes'"):
        core.keep_memory()
