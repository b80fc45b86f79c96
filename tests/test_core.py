"What a notebook cannot show about `core`: other processes, crashes, signals, and bad input"

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fresh import ROOT, python
from torch.testing import assert_close

from ldebm import core
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
    Run,
)

# --- randomness


def test_streams_are_the_same_bits_in_another_process():
    code = """
import torch
from ldebm.core import make_gen
print(torch.randn(5, generator=make_gen(7, 'chains', 3)).tolist())
"""
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


# --- fingerprints and devices


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
    from ldebm import classifier, image_stages, launch, lm_training, reverse, text_job, train

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
        load_prior=lambda d: image_stages.load_prior(tmp_path / "x", d),
        load_classifier=lambda d: classifier.load_classifier(tmp_path / "x", d),
        load_lm=lambda d: lm_training.load_lm(tmp_path / "x", d),
        train_lm=lambda d: lm_training.train_lm(words, words, "quick", device=d),
        rppl_floor=lambda d: reverse.rppl_floor(words, words, "quick", device=d),
        reverse_ppl=lambda d: reverse.reverse_ppl(words, words, cfg="quick", device=d),
        fit=lambda d: train.fit(Task(), run, train.TrainCfg(), 0, d),
        launch=lambda d: launch.launch(Task(), run, train.TrainCfg(), 0, d),
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


# --- memory

CHURN = """
import resource, sys, torch
from ldebm.core import keep_memory
torch.set_num_threads(1)
done, g, held = keep_memory(), torch.Generator().manual_seed(0), []
def churn(n):
    for _ in range(n):
        size = int(torch.randint(1, 40, (1,), generator=g))*2**18   # up to 40 MB, at most five at a time
        held.append(torch.empty(size).fill_(1.))
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


@pytest.mark.slow
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
