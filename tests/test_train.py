"Runs killed, stopped, poisoned or fed in halves: what is on disk is good, and resuming ends with the same bits"

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from same import assert_same_state, same_log
from torch import nn

from ldebm import train
from ldebm.core import has_bf16, make_gen
from ldebm.records import Run
from ldebm.text_job import finish, open_job
from ldebm.text_settings import TextJob, train_cfg
from ldebm.train import Interrupted, TrainCfg, fit

pytestmark = pytest.mark.usefixtures("in_test")
posix = pytest.mark.skipif(os.name != "posix", reason="signals as on Unix")
STEPS, EPOCH = 67, 31  # 8,000 training sentences in batches of 256
NET = "embed=16 hidden=16 d=4 energy_hidden=8 n_blocks=1 langevin_steps=2 T=2 n_symbols=4"
TINY = f"{NET} batch=256 dropout=0.1 checkpoint_every=7"


# -- a text model


def text_job(out, objective, **kw):
    return TextJob(
        settings=TINY, steps=STEPS, n_samples=20, objective=objective, threads=1, device="cpu", out=str(out), **kw
    )


def train_text(job):
    run, task, device = open_job(job)
    end = fit(task, run, train_cfg(task.settings), job.seed, device)
    return run, task, end


CHILD = """
import json, os, signal, sys, time
from ldebm import core
from ldebm.text_job import open_job
from ldebm.text_settings import TextJob, train_cfg
from ldebm.train import Interrupted, fit
out, objective, settings, steps, hang, signum = sys.argv[1:]
job = TextJob(settings=settings, steps=int(steps), n_samples=20, objective=objective, threads=1, device='cpu', out=out)
run, task, device = open_job(job)
plain = task.weights
def weights(step, *args):   # asked for once in every step
    if step == int(hang):
        print('there', flush=True)
        if signum == '9': time.sleep(300)
        while not stopping: time.sleep(.01)   # the signal must have come before the step ends
    return plain(step, *args)
task.weights = weights
stopping, old = [], core.graceful_stop._handle
def handle(self, *args): old(self, *args); stopping.append(1)
core.graceful_stop._handle = handle
try: fit(task, run, train_cfg(task.settings), 0, device)
except Interrupted as e: print('interrupted:', e, flush=True); sys.exit(3)
print('end', flush=True)
"""


def stopped(out, objective, at, signum):
    "Train in another process and send it a signal in the middle of step `at`"
    env = {**os.environ, "IN_TEST": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), objective, TINY, str(STEPS), str(at), str(int(signum))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        said = iter(child.stdout.readline, "")  # what will not be computed, before it is there
        assert "there\n" in said, child.stderr.read()
        child.send_signal(signum)
        return child, *child.communicate(timeout=120)
    finally:
        if child.poll() is None:
            child.kill()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Uninterrupted runs, by objective, trained when first asked for"
    got = {}

    def ask(objective):
        if objective not in got:
            got[objective] = train_text(text_job(tmp_path_factory.mktemp("whole") / objective, objective))
        return got[objective]

    return ask


def assert_ends_the_same(a, b):
    (run_a, task_a, end_a), (run_b, task_b, end_b) = a, b
    assert_same_state(dict(task_a.model.state_dict()), dict(task_b.model.state_dict()), "model")
    assert same_log(run_a) == same_log(run_b)
    assert_same_state(run_a.load(), run_b.load())
    assert {**dataclasses.asdict(end_a), "seconds": 0} == {**dataclasses.asdict(end_b), "seconds": 0}
    a, b = ({k: v.tolist() for k, v in t.validate().items()} for t in (task_a, task_b))
    assert a == b and all(map(torch.isfinite, map(torch.tensor, a.values())))


@posix
@pytest.mark.slow
@pytest.mark.parametrize("objective,at", [("consistent", EPOCH + 14), ("published", EPOCH + 25)])
def test_killed_in_mid_epoch_and_resumed_equals_uninterrupted(tmp_path, whole, objective, at):
    "kill -9, then the same job again: weights, log, checkpoint and metrics bit for bit"
    child, out, err = stopped(tmp_path / "run", objective, at, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL and "end" not in out, err
    saved = Run(tmp_path / "run", json.loads((tmp_path / "run" / "settings.json").read_text())).load()
    step = saved["progress"]["step"]
    assert step == at // 7 * 7 and 0 < saved["progress"]["batch"] < EPOCH and saved["progress"]["epoch"] == 1, (
        "not in mid-epoch"
    )
    state = saved["epoch_state"]
    assert state["labels"].shape == (8000,) and set(state["labels"].tolist()) == set(range(4))
    if objective == "published":
        assert (
            state["index"].shape == (8000,) and len(state["index"].unique()) < 8000
        )  # the resampled epoch travels along
    else:
        assert state["weights"].shape == (4,)
    assert_ends_the_same(whole(objective), train_text(text_job(tmp_path / "run", objective)))


@posix
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM])
def test_a_signal_saves_and_leaves_a_resumable_run(tmp_path, whole, signum):
    at = EPOCH + 5  # no step at which a checkpoint is due
    child, out, err = stopped(tmp_path / "run", "consistent", at, signum)
    assert (
        child.returncode == 3 and f"interrupted: stopped at step {at + 1} of {STEPS}; run the same command again" in out
    ), out + err
    run = Run(tmp_path / "run", json.loads((tmp_path / "run" / "settings.json").read_text()))
    assert run.load()["progress"]["step"] == at + 1
    assert_ends_the_same(whole("consistent"), train_text(text_job(tmp_path / "run", "consistent")))


def test_resuming_a_finished_run_changes_nothing(whole):
    run, task, end = whole("consistent")
    before = run.file("log.jsonl").read_bytes(), run.load()
    job = text_job(run.path, "consistent")
    again, task2, device = open_job(job)
    task2.start_epoch = task2.batches = task2.validate = lambda *args: pytest.fail("a finished run trains no further")
    end2 = fit(task2, again, train_cfg(task2.settings), job.seed, device)
    assert_same_state(dict(task.model.state_dict()), dict(task2.model.state_dict()))
    assert [json.loads(o) for o in before[0].splitlines()] == again.log_lines()
    assert_same_state(before[1], again.load())
    assert end2.best_step == end.best_step


def test_other_settings_are_refused_and_change_nothing(whole):
    run, *_ = whole("published")

    def files():
        return {str(p.relative_to(run.path)): p.read_bytes() for p in run.path.rglob("*") if p.is_file()}

    before = files()
    for change in (
        dict(seed=1),
        dict(steps=STEPS + 1),
        dict(settings=TINY + " w_mi=0.2"),
        dict(objective="consistent"),
        dict(system="ldebm-no-gc"),
        dict(resume=False, seed=1),
    ):
        job = dataclasses.replace(text_job(run.path, "published"), **change)
        with pytest.raises(ValueError, match="holds a run with other settings"):
            open_job(job)
        assert files() == before, change


def test_more_steps_are_refused_with_the_way_to_them(whole, tmp_path):
    shutil.copytree(whole("published")[0].path, tmp_path / "run")
    job, changes = text_job(tmp_path / "run", "published"), ""
    for steps in (STEPS + 3, STEPS + 7):
        with pytest.raises(ValueError, match=rf"to go on to {steps} steps, give steps={STEPS} again and") as e:
            open_job(dataclasses.replace(job, steps=steps))
        changes = re.search(r'settings="(changes=\S+)";', str(e.value)).group(1)
        run, *_ = train_text(dataclasses.replace(job, settings=f"{TINY} {changes}"))
        assert run.load()["progress"]["step"] == steps
    assert changes == f"changes={STEPS}:steps={STEPS + 3},{STEPS + 3}:steps={STEPS + 7}"


def test_starting_afresh_forgets_the_old_run(tmp_path):
    job = text_job(tmp_path / "run", "consistent")
    job = dataclasses.replace(job, steps=9, settings=TINY + " cls_start=0")
    first = train_text(job)
    again = train_text(dataclasses.replace(job, resume=False))
    assert_ends_the_same(first, again)


# -- killed anywhere: a task that costs nothing, with a state that travels from epoch to epoch


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(()))

    def forward(self, x, gen):
        return dict(
            nll=(x[:, :3] @ self.w + self.b - x[:, 3] + 0.1 * torch.randn(len(x), generator=gen)) ** 2,
            size=self.w.square().sum().expand(len(x)),
        )

    def groups(self):
        return dict(main=[self.w], ebm=[self.b])


class Task:
    "Regression; each epoch resamples its data from where the last one left them, and from the model"

    select = "nll"

    def __init__(self, size=10):
        self.model, self.size = Line(), size
        x = torch.randn(10 * size, 3, generator=make_gen(0, "x"))
        self.data = torch.cat([x, (x @ torch.tensor([1.0, -2.0, 0.5]) + 0.7)[:, None]], 1)

    def weights(self, step, steps):
        return dict(nll=1.0, size=0.01 * step / steps)

    def start_epoch(self, epoch, state, gen):
        old = torch.arange(len(self.data)) if state is None else state["order"]
        return dict(
            order=old[torch.randint(len(old), (len(old),), generator=gen)], shift=self.model.w.detach().sum().clone()
        )

    def batches(self, state, gen, start):
        order = state["order"][torch.randperm(len(self.data), generator=gen)]
        for i in list(order.split(self.size))[start:]:
            yield self.data[i] + 0.01 * state["shift"], {}

    @torch.no_grad()
    def validate(self):
        return dict(nll=((self.data[:, :3] @ self.model.w + self.model.b - self.data[:, 3]) ** 2).mean())


LINE = TrainCfg(steps=24, lr=0.05, lr_ebm=0.05, clip=5.0, log_every=3, checkpoint_every=4)  # epochs of 10 steps


class Killed(BaseException):
    "Stands for SIGKILL: nothing catches it, nothing runs after it"


def line(path, cfg=LINE, before=lambda event: None, task=None):
    "Train with `before` called ahead of everything that leaves a trace"
    task, run = task or Task(), Run(path, {"task": "line"})

    def wrap(obj, name):
        real = getattr(obj, name)

        def f(*args, **kw):
            before(name)
            out = real(*args, **kw)
            before(f"after {name}")
            return out

        setattr(obj, name, f)

    for name in ("log", "save", "truncate_log"):
        wrap(run, name)
    for name in ("validate", "start_epoch", "weights"):
        wrap(task, name)
    return run, task, fit(task, run, cfg, seed=1)


class Countdown:
    "Kills at the `n`-th event"

    def __init__(self, n):
        self.n, self.last = n, None

    def __call__(self, event):
        self.n -= 1
        self.last = event
        if self.n < 0:
            raise Killed(event)


def events(path, cfg=LINE):
    seen = []
    line(path, cfg, seen.append)
    return seen


@pytest.mark.parametrize(
    "cfg",
    [
        dataclasses.replace(LINE, steps=13),
        dataclasses.replace(LINE, checkpoint_every=5, steps=12),
        dataclasses.replace(LINE, checkpoint_every=100, accumulate=3, steps=7),
    ],
    ids=["plain", "checkpoint at the end of an epoch", "checkpoint at the end of an epoch alone, accumulating"],
)
def test_killed_at_any_point(tmp_path, cfg, monkeypatch):
    "Ahead of and after every step, validation, line of the log and checkpoint: resumed, the end is the same"
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a process dies here, not the machine
    whole = line(tmp_path / "whole", cfg)
    want_log, want = same_log(whole[0]), whole[0].load()
    points, wrong = events(tmp_path / "events", cfg), []
    for i, event in enumerate(points):
        path = tmp_path / str(i)
        with pytest.raises(Killed):
            line(path, cfg, Countdown(i))
        run, task, end = line(path, cfg)
        assert_same_state(dict(task.model.state_dict()), dict(whole[1].model.state_dict()), f"killed at {i}, {event}")
        assert_same_state(run.load(), want, f"killed at {i}, {event}")
        if same_log(run) != want_log:
            wrong.append((i, event, [o["step"] for o in run.log_lines()]))
    assert not wrong, f"the log differs when killed at {wrong}"


def test_killed_again_and_again(tmp_path):
    whole = line(tmp_path / "whole")
    for k in range(200):
        try:
            run, task, _ = line(tmp_path / "run", before=Countdown(13 + k % 5))
        except Killed:
            continue
        break
    assert k > 3
    assert_same_state(dict(task.model.state_dict()), dict(whole[1].model.state_dict()))
    assert same_log(run) == same_log(whole[0])


def test_killed_between_the_last_step_and_its_validation(tmp_path):
    "The run is not over before its last model was looked at"
    cfg = dataclasses.replace(LINE, checkpoint_every=8)  # a checkpoint at the very last step
    whole = line(tmp_path / "whole", cfg)

    def kill(event):
        if (
            event == "validate"
            and len([o for o in Run(tmp_path / "run", {"task": "line"}).log_lines() if o["kind"] == "valid"]) == 2
        ):
            raise Killed

    with pytest.raises(Killed):
        line(tmp_path / "run", cfg, kill)
    saved = Run(tmp_path / "run", {"task": "line"}).load()
    assert saved["progress"]["step"] == 24 and saved["progress"]["batch"] == 4
    run, task, end = line(tmp_path / "run", cfg)
    assert end.best == whole[2].best and end.best_step == whole[2].best_step and same_log(run) == same_log(whole[0])
    assert_same_state(dict(task.model.state_dict()), dict(whole[1].model.state_dict()))


@pytest.mark.parametrize("how", ["half written", "before the rename"])
def test_killed_while_a_checkpoint_is_written(tmp_path, monkeypatch, how):
    "The old checkpoint stays good, and what was left behind does not matter"
    whole = line(tmp_path / "whole")
    import safetensors.torch as st

    real, n = st.save_file, []

    def save_file(tensors, name, **kw):
        n.append(name)
        if len(n) < 3:
            return real(tensors, name, **kw)
        if how == "before the rename":
            real(tensors, name, **kw)
        else:
            open(name, "wb").write(b"\x10\x00\x00\x00")
        monkeypatch.setattr("pathlib.Path.unlink", lambda *args, **kw: None)  # a killed process tidies nothing
        raise Killed

    monkeypatch.setattr(st, "save_file", save_file)
    with pytest.raises(Killed):
        line(tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setenv("IN_TEST", "1")
    left = [p.name for p in (tmp_path / "run").glob(".*.tmp")]
    saved = Run(tmp_path / "run", {"task": "line"}).load()
    assert len(left) == 1 and saved["progress"]["step"] == 8
    run, task, end = line(tmp_path / "run")
    assert_same_state(dict(task.model.state_dict()), dict(whole[1].model.state_dict()))
    assert same_log(run) == same_log(whole[0])


@posix
@pytest.mark.parametrize("event,step", [("weights", 8), ("validate", 10), ("validate", 24)])
def test_signal_at_any_time(tmp_path, event, step):
    "In a step, in a validation, and in the very last one: saved, and the caller is told"
    whole, seen = line(tmp_path / "whole"), []

    def send(name):
        seen.append(name)
        if name == event and seen.count("after weights") == (step - 1 if event == "weights" else step):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="run the same command again"):
        line(tmp_path / "run", before=send)
    saved = Run(tmp_path / "run", {"task": "line"}).load()
    assert step <= saved["progress"]["step"] <= step + 1
    run, task, end = line(tmp_path / "run")
    assert_same_state(dict(task.model.state_dict()), dict(whole[1].model.state_dict()))
    assert same_log(run) == same_log(whole[0])
    assert issubclass(Interrupted, KeyboardInterrupt)  # so that no `except Exception` takes it for a fault of the run


def test_damaged_and_robbed_checkpoints(tmp_path):
    with pytest.raises(Killed):
        line(tmp_path / "run", before=Countdown(60))
    run = Run(tmp_path / "run", {"task": "line"})
    saved = run.load()
    assert saved["progress"]["best"] is not None
    run.save({**saved, "best": None})
    with pytest.raises(ValueError, match="lost its selected model: delete the folder"):
        line(tmp_path / "run")
    p = run.file("checkpoint.safetensors")
    p.write_bytes(p.read_bytes()[:-9])
    with pytest.raises(ValueError, match="checkpoint.safetensors is damaged"):
        line(tmp_path / "run")


# -- numbers that are not


class Poisoned(Task):
    "Spoils a term, a gradient or a validation"

    def __init__(self, at, what):
        super().__init__()
        self.at, self.what, real = at, what, self.model.forward

        def forward(x, gen):
            terms = real(x, gen)
            if self.step == at and what in terms:
                terms[what] = terms[what] * torch.where(torch.arange(len(x)) == 3, float("nan"), 1.0)
            if self.step == at and what == "gradient":
                terms["nll"] = terms["nll"] + (self.model.w.sum() * 0).sqrt()  # 0, with an infinite slope
            return terms

        self.model.forward = forward

    def weights(self, step, *args):
        self.step = step
        return super().weights(step, *args)

    def validate(self):
        out = super().validate()
        return {k: v * float("inf") if self.what == "validation" else v for k, v in out.items()}


@pytest.mark.parametrize("at", [5, 7, 13])  # in mid-epoch, in a step that ends in a checkpoint, in the second epoch
@pytest.mark.parametrize("what", ["nll", "size"])
def test_non_finite_term_is_named_and_the_checkpoint_good(tmp_path, at, what):
    with pytest.raises(
        FloatingPointError,
        match=rf"{what} is nan at step {at} \(epoch {at // 10}, seed 1\); the last checkpoint is intact",
    ):
        line(tmp_path / "run", task=Poisoned(at, what))
    saved = Run(tmp_path / "run", {"task": "line"}).load()
    assert saved["progress"]["step"] == max(s for s in (4, 8, 10, 12) if s <= at)
    assert all(v.isfinite().all() for v in saved["model"].values())
    whole, (run, task, _) = line(tmp_path / "whole"), line(tmp_path / "run")  # without the poison it goes on
    assert_same_state(dict(task.model.state_dict()), dict(whole[1].model.state_dict()))
    assert same_log(run) == same_log(whole[0])


@pytest.mark.parametrize("at", [5, 7])
def test_non_finite_gradient_never_reaches_a_checkpoint(tmp_path, at):
    "The loss is finite and its slope is not: noticed ahead of the optimiser"
    with pytest.raises(FloatingPointError, match=rf"norm_main is (nan|inf) at step {at} \(epoch 0, seed 1\)"):
        line(tmp_path / "run", task=Poisoned(at, "gradient"))
    saved = Run(tmp_path / "run", {"task": "line"}).load()
    assert saved["progress"]["step"] == 4 and all(v.isfinite().all() for v in saved["model"].values())


def test_a_term_that_begins_between_two_lines_of_the_log(tmp_path):
    "As clustering does: each term is averaged over the steps that had it"
    task, shown = Task(), []
    real = task.model.forward

    def forward(x, gen):
        terms = real(x, gen)
        shown.append(len(shown))
        return {**terms, "late": torch.full((len(x),), float(shown[-1]))} if shown[-1] >= 4 else terms

    task.model.forward = forward
    run, *_ = line(tmp_path / "run", LINE, task=task)
    lines = [o for o in run.log_lines() if o["kind"] == "train"]
    assert "late" not in lines[0] and [o["late"] for o in lines[1:4]] == [
        4.5,
        7.0,
        10.0,
    ]  # steps 4 and 5; 6 to 8; 9 to 11


def test_non_finite_validation(tmp_path):
    with pytest.raises(FloatingPointError, match=r"nll is inf at step 10 \(epoch 0, seed 1\)"):
        line(tmp_path / "run", task=Poisoned(99, "validation"))
    assert Run(tmp_path / "run", {"task": "line"}).load()["progress"]["step"] == 8


@pytest.mark.parametrize("objective", ["consistent", "published"])
def test_non_finite_parameter_of_a_text_model(tmp_path, objective):
    "A broken energy is noticed in the step that meets it"
    job = text_job(tmp_path / "run", objective)
    run, task, device = open_job(job)
    real = task.weights

    def weights(step, *args):
        if step == 9:
            with torch.no_grad():
                task.model.prior.energy.head.bias[0] = float("nan")
        return real(step, *args)

    task.weights = weights
    with pytest.raises(FloatingPointError, match=r"at step 9 \(epoch 0, seed 0\)"):
        fit(task, run, train_cfg(task.settings), job.seed, device)
    saved = run.load()
    assert saved["progress"]["step"] == 7 and all(
        v.isfinite().all() for v in saved["model"].values() if v.is_floating_point()
    )


# -- settings of the loop


def gradients(monkeypatch, path, settings):
    "Gradients of every step, before clipping, of a plain language model without dropout"
    job = TextJob(
        settings=f"embed=16 hidden=16 dropout=0 bucket=False max_len=24 {settings}",
        system="rnn-lm",
        steps=3,
        threads=1,
        device="cpu",
        out=str(path),
    )
    run, task, device = open_job(job)
    got, real = [], train.Accelerator.clip_grad_norm_

    def clip(self, params, *args, **kw):
        got.append([p.grad.clone() for p in params])
        return real(self, params, *args, **kw)

    task.validate = lambda: dict(nll=torch.tensor(0.0))
    monkeypatch.setattr(train.Accelerator, "clip_grad_norm_", clip)
    end = fit(task, run, dataclasses.replace(train_cfg(task.settings), log_every=1), 0, device)
    monkeypatch.undo()
    return got, [o["nll"] for o in run.log_lines() if o["kind"] == "train"], end


def test_two_halves_make_one_batch(tmp_path, monkeypatch):
    "accumulate=2 with batches of 32 takes the steps of batches of 64"
    (a, nll_a, end_a), (b, nll_b, end_b) = (
        gradients(monkeypatch, tmp_path / k, k) for k in ("batch=64 accumulate=1", "batch=32 accumulate=2")
    )
    assert len(a) == len(b) == 3 and end_a.samples == end_b.samples == 192 and (end_a.step, end_b.step) == (3, 3)
    for x, y in zip(a[0], b[0]):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6 * float(torch.cat([g.flatten() for g in a[0]]).norm()))
    assert max(abs(x - y) for x, y in zip(nll_a, nll_b)) < 1e-4 * nll_a[0]
    c, *_ = gradients(monkeypatch, tmp_path / "c", "batch=32 accumulate=1")
    assert any((x - y).abs().max() > 1e-3 for x, y in zip(a[0], c[0]))  # half of it is another gradient


def test_more_accumulation_than_an_epoch_has(tmp_path):
    with pytest.raises(ValueError, match="an epoch has fewer than 11 batches"):
        line(tmp_path / "run", dataclasses.replace(LINE, accumulate=11))


@pytest.mark.parametrize(
    "values,wrong",
    [
        (dict(mixed_precision="fp8"), "mixed_precision must be 'no', 'bf16' or 'fp16', got 'fp8'"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(accumulate=0), "accumulate must be at least 1"),
        (dict(checkpoint_every=0), "checkpoint_every must be at least 1"),
        (dict(log_every=-1), "log_every must be"),
        (dict(lr=0.0), "lr must be positive, got 0.0"),
        (dict(lr_ebm=float("nan")), "lr_ebm must be positive, got nan"),
        (dict(clip=-1.0), "clip must be positive"),
        (dict(warmdown=1.5), r"warmdown must lie in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_settings_of_the_loop(values, wrong):
    with pytest.raises(ValueError, match=wrong):
        TrainCfg(**values)


@pytest.mark.skipif(not has_bf16(), reason="this processor does not multiply in bfloat16")
@pytest.mark.parametrize("objective", ["consistent", "published"])
def test_bf16_trains_on_a_cpu(tmp_path, objective):
    settings = TINY + " cls_start=0"
    job = dataclasses.replace(
        text_job(tmp_path / "run", objective), settings=settings + " mixed_precision=bf16", steps=4
    )
    run, task, end = train_text(job)
    assert end.step == 4 and all(p.dtype == torch.float32 and p.isfinite().all() for p in task.model.parameters())
    plain = train_text(dataclasses.replace(job, out=str(tmp_path / "plain"), settings=settings))[0].log_lines()[-1]
    half = run.log_lines()[-1]
    assert 0 < abs(half["recon_nll"] - plain["recon_nll"]) < 0.01 * plain["recon_nll"], (
        "no other precision, or another model"
    )


def test_a_weight_without_its_term(tmp_path):
    task = Task()
    task.weights = lambda *args: dict(nll=1.0, kll=1.0)
    with pytest.raises(ValueError, match="no term called kll; terms are nll, size"):
        line(tmp_path / "run", task=task)


def test_rates_fall_at_the_end(tmp_path, monkeypatch):
    "Both groups, over the last share of the steps, to the last step's 1/(share) of the way"
    rates, real = [], torch.optim.Adam.step

    def step(self, *args, **kw):
        rates.append(tuple(g["lr"] for g in self.param_groups))
        return real(self, *args, **kw)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    line(tmp_path / "run", dataclasses.replace(LINE, lr=0.1, lr_ebm=0.02, warmdown=0.5))
    assert rates[:13] == [(0.1, 0.02)] * 13 and len(rates) == 24
    want = [(1 - i / 24) / 0.5 for i in range(13, 24)]
    torch.testing.assert_close(torch.tensor(rates[13:]), torch.tensor([(0.1 * r, 0.02 * r) for r in want]))


def test_finished_run_folder_is_written_whole_or_not(tmp_path, whole, monkeypatch):
    "A record with a number that is not one is refused, and leaves no result behind"
    run, task, end = whole("consistent")
    bad = dict(nll={"value": float("nan"), "interval": None, "n": 1, "estimator": "broken"})
    with pytest.raises(ValueError, match="metrics.nll"):
        finish(run, task, text_job(run.path, "consistent"), bad, dict(samples=[["a"]]), 1.0)
    assert not run.file("result.json").exists()


def test_checkpoints_take_their_share_of_the_time():
    now, written = [0.0], []
    rare, always = train.CheckpointBudget(0.05, lambda: now[0]), train.CheckpointBudget(1.0, lambda: now[0])
    for _ in range(400):  # four seconds of steps, of which half a second each where a checkpoint is written
        now[0] += 0.01
        assert always.due()
        if rare.due():
            with rare:
                now[0] += 0.5
            written.append(now[0])
    assert written[0] == pytest.approx(0.51) and len(written) == 1, "the next one comes after nineteen times as long"
    now[0] = written[0] + 9.5 + 1e-9
    assert rare.due()


# -- trackers


def test_a_tracker_gets_the_lines_of_the_log(tmp_path, monkeypatch):
    from accelerate import tracking

    told = []

    class Memory(tracking.GeneralTracker):
        name, requires_logging_directory = "memory", True

        def __init__(self, project, folder, **more):
            super().__init__()
            told.append((project, str(folder)))

        tracker = property(lambda self: told)

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step=None, **more):
            told.append((step, values))

        def finish(self):
            told.append("end")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "memory", Memory)
    monkeypatch.setenv("LDEBM_TRACK", "memory")
    run, _, _ = train_text(text_job(tmp_path / "run", "consistent"))
    place, config, *lines, end = told
    assert place == ("ldebm", str(tmp_path / "run" / "trackers")) and end == "end"
    assert config["seed"] == 0 and config["batch"] == 256
    want = [
        (line["step"], {f"{line['kind']}/{k}": v for k, v in line.items() if k not in ("step", "kind")})
        for line in run.log_lines()
    ]
    assert lines == want and any("valid/neg_elbo" in values for _, values in lines)
    told.clear()
    train_text(text_job(tmp_path / "run", "consistent"))
    assert told == [], "nothing is left to train"
    monkeypatch.delenv("LDEBM_TRACK")
    plain, _, _ = train_text(text_job(tmp_path / "plain", "consistent"))
    assert same_log(plain) == same_log(run) and not (plain.path / "trackers").exists()


@pytest.mark.parametrize(
    "name,error,remedy",
    [("wandbb", ValueError, "did you mean 'wandb'"), ("wandb", ImportError, "pip install wandb")],
)
def test_a_tracker_that_is_not_there(tmp_path, monkeypatch, name, error, remedy):
    from accelerate import tracking

    monkeypatch.setattr(train, "get_available_trackers", lambda: [])
    monkeypatch.setenv("LDEBM_TRACK", f"{name}")
    run, task, device = open_job(text_job(tmp_path / "run", "consistent"))
    with pytest.raises(error, match=remedy):
        fit(task, run, train_cfg(task.settings), 0, device)
    assert not run.log_lines() and not run.file("checkpoint.safetensors").exists()
    assert name == "wandbb" or name in tracking.LOGGER_TYPE_TO_CLASS
