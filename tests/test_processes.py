"Several processes on one machine take the steps of one with larger batches, stop and fail together, leave one run"

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from same import assert_same_state, same_log
from torch import nn

from ldebm import image_job, toy_job
from ldebm import launch as launching
from ldebm.core import Average, has_bf16, load_tensors, make_gen, save_tensors
from ldebm.grammar_corpus import load_grammar_files
from ldebm.launch import launch
from ldebm.peers import count_processes
from ldebm.posterior import DiagGaussian
from ldebm.records import Run, load_results
from ldebm.spectral import SpectralLinear
from ldebm.text_job import open_job
from ldebm.text_settings import TextJob, train_cfg
from ldebm.train import Interrupted, TrainCfg, fit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
ROOT = Path(__file__).resolve().parent.parent
NET = "embed=16 hidden=16 d=4 energy_hidden=8 n_blocks=1 langevin_steps=2 T=2 n_symbols=4"


@pytest.fixture(autouse=True)
def no_waiting(in_test, deadline):
    "Processes that wait for each other for ever are an error"
    with deadline(120, "processes wait for each other"):
        yield


def steps_of(run):
    return [o for o in run.log_lines() if o["kind"] == "train"]


# -- text models


def text(out, settings, steps, processes=1, before=lambda task: None, log_every=1, **kw):
    "What the notebook does up to the end of training"
    job = TextJob(
        settings=settings, steps=steps, n_samples=20, threads=1, device="cpu", out=str(out), processes=processes, **kw
    )
    run, task, device = open_job(job)
    torch.set_num_threads(1)
    before(task)
    return (
        run,
        task,
        launch(
            task,
            run,
            dataclasses.replace(train_cfg(task.settings), log_every=log_every),
            job.seed,
            device,
            processes=processes,
        ),
    )


def no_validation(task):
    task.validate = lambda: {task.select: torch.tensor(0.0)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "system,one,two",
    [("rnn-lm", "batch=32", "batch=16"), ("vae", "d=4 free_nats=0 batch=32", "d=4 free_nats=0 batch=8 accumulate=2")],
    ids=["rnn-lm", "vae, accumulating"],
)
def test_two_processes_take_the_steps_of_one_with_larger_batches(tmp_path, monkeypatch, system, one, two):
    "Without noise (a posterior draw is its mean) every logged number agrees to 1e-5 over 32 steps"
    monkeypatch.setattr(DiagGaussian, "rsample", lambda self, gen=None: self.mean)
    base = "embed=16 hidden=16 dropout=0 bucket=False max_len=24 "
    (run1, task1, end1), (run2, task2, end2) = (
        text(tmp_path / str(n), base + s, 32, n, no_validation, system=system) for n, s in ((1, one), (2, two))
    )
    a, b = steps_of(run1), steps_of(run2)
    assert len(a) == len(b) == 32 and end1.samples == end2.samples == 32 * 32 and a[-1]["nll"] < 0.9 * a[0]["nll"]
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and {"loss", "nll", "norm_main"} <= x.keys()
        for k in x.keys() - {"kind"}:
            assert x[k] == pytest.approx(y[k], rel=1e-5), f"{k} at step {x['step']}"
    for k, v in task1.model.state_dict().items():
        torch.testing.assert_close(task2.model.state_dict()[k], v, rtol=1e-4, atol=1e-5, msg=k)


@pytest.mark.slow
def test_the_whole_model_with_noise_of_its_own(tmp_path):
    """Posterior draws, dropout and chains differ in the second process. Among six noise streams in one process the mean
    loss had a standard deviation of 0.035 % over the first 20 steps and 0.33 % over the next 20; the difference of two
    runs may be four times its own (0.05 % and 0.47 %). Half the batch differs by 1 % and 6 %"""
    base = f"{NET} dropout=0.1 cls_start=0 lr_ebm=3e-3 batch=32"
    (run1, *_), (run2, *_) = (
        text(tmp_path / str(n), base + s, 40, n, no_validation) for n, s in ((1, " accumulate=2"), (2, ""))
    )
    a, b = steps_of(run1), steps_of(run2)
    assert len(a) == len(b) == 40
    for k in ("nll", "bow", "loss"):
        for half, tol in ((slice(0, 20), 0.002), (slice(20, 40), 0.02)):
            x, y = (sum(o[k] for o in lines[half]) / 20 for lines in (a, b))
            assert x == pytest.approx(y, rel=tol), (k, half)
            assert x != y, f"{k}: the second process has the noise of the first"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A user's file: epochs of nine steps in two processes with batches of 64"
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    path.write_text("".join(" ".join(ws) + "\n" for ws in load_grammar_files()["train"][0][:1400]))
    return str(path)


RESUMED = f"{NET} dropout=0.1 cls_start=0 batch=64 checkpoint_every=7"


@pytest.fixture(scope="module")
def whole(own, tmp_path_factory):
    return text(tmp_path_factory.mktemp("whole") / "run", RESUMED, 22, 2, log_every=3, corpus=own)


def test_a_stopped_run_resumes_bit_for_bit(tmp_path, own, whole):
    "SIGTERM to the second process in mid-epoch: both stop after that step; the same command ends with the same bits"

    def stop(task):
        plain = task.weights

        def weights(step, *args):
            if step == 12 and os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(step, *args)

        task.weights = weights

    with pytest.raises(Interrupted, match="stopped at step 13 of 22; run the same command again"):
        text(tmp_path / "run", RESUMED, 22, 2, stop, log_every=3, corpus=own)
    saved = Run(tmp_path / "run", json.loads((tmp_path / "run" / "settings.json").read_text())).load()
    assert (saved["progress"]["step"], saved["progress"]["batch"], saved["progress"]["epoch"]) == (
        13,
        8,
        1,
    )  # batches of all processes
    assert saved["processes"] == len(saved["gen"]) == 2 and not torch.equal(*saved["gen"])
    assert set(saved["epoch_state"]["labels"].tolist()) == set(range(4))
    run, task, end = text(tmp_path / "run", RESUMED, 22, 2, log_every=3, corpus=own)
    assert_same_state(dict(task.model.state_dict()), dict(whole[1].model.state_dict()), "model")
    assert same_log(run) == same_log(whole[0])
    assert_same_state(run.load(), whole[0].load())
    assert {**dataclasses.asdict(end), "seconds": 0} == {**dataclasses.asdict(whole[2]), "seconds": 0}


def test_the_caller_gets_the_selected_model(whole, monkeypatch):
    "In eval mode, with the score that selected it; and a finished run starts no processes"
    run, task, end = whole
    saved = run.load()
    assert (end.step, end.epoch, end.samples) == (22, 3, 22 * 128) and end.best is not None and end.seconds > 0
    assert_same_state(dict(task.model.state_dict()), dict(saved["best"]))
    assert not task.model.training and task.processes == 2 and task.per_epoch == 9
    assert (
        float(task.validate()[task.select])
        == end.best
        == min(o[task.select] for o in run.log_lines() if o["kind"] == "valid")
    )
    monkeypatch.setattr(launching, "start_processes", lambda *args: pytest.fail("a finished run trains no further"))
    before = run.file("log.jsonl").read_bytes()
    assert launch(task, run, dataclasses.replace(train_cfg(task.settings), log_every=3), 0, "cpu", processes=2) == end
    assert run.file("log.jsonl").read_bytes() == before


def test_another_number_of_processes_is_refused(whole):
    run, task, _ = whole
    before = run.load()
    cfg = train_cfg(task.settings)
    for go in (lambda: fit(task, run, cfg, 0), lambda: launch(task, run, cfg, 0)):
        with pytest.raises(ValueError, match="was trained in 2 processes and cannot continue in 1"):
            go()
    with pytest.raises(ValueError, match="was trained in 2 processes and cannot continue in 3"):
        launch(task, run, cfg, 0, processes=3)
    assert_same_state(run.load(), before)
    job = TextJob(
        **{
            **dict(
                settings=RESUMED,
                steps=22,
                n_samples=20,
                threads=1,
                device="cpu",
                out=str(run.path),
                corpus=str(Path(run.path.parent / "none")),
            ),
            "corpus": "grammar",
        }
    )
    with pytest.raises(ValueError, match="processes: 2 -> absent"):
        open_job(job)  # nor by the job, whose settings name it


def test_half_precision(tmp_path, own):
    "bf16 and accumulation, in two processes"
    base = f"{NET} dropout=0 batch=32 accumulate=2 cls_start=0"
    (half, task, end), (plain, *_) = (
        text(tmp_path / p, f"{base} mixed_precision={p}", 3, 2, no_validation, corpus=own) for p in ("bf16", "no")
    )
    assert end.samples == 3 * 128 and all(
        p.dtype == torch.float32 and p.isfinite().all() for p in task.model.parameters()
    )
    a, b = steps_of(half)[-1]["nll"], steps_of(plain)[-1]["nll"]
    assert abs(a - b) < 0.01 * b
    assert (a != b) == has_bf16()  # where it would be emulated, single precision is used


# -- a task that costs nothing


class Line(nn.Module):
    "Regression, with a spectral norm and an average that are refreshed ahead of every step"

    def __init__(self, noise):
        super().__init__()
        self.w, self.b, self.late, self.noise = (
            nn.Parameter(torch.zeros(3)),
            nn.Parameter(torch.zeros(())),
            nn.Parameter(torch.zeros(())),
            noise,
        )
        self.energy = SpectralLinear(3, 3)
        self.energy.draw(make_gen(0, "energy"))
        self.average = Average(self.energy, 0.9)

    def before_step(self):
        self.energy.power_iterate()
        self.average.update(self.energy)

    def forward(self, x, gen):
        nll = (x[:, :3] @ self.w + self.b - x[:, 3] + self.noise * torch.randn(len(x), generator=gen)) ** 2
        return dict(nll=nll, size=self.energy(x[:, :3]).square().sum(1), late=(self.late - 1).square().expand(len(x)))

    def groups(self):
        return dict(main=[self.w, self.late], ebm=[self.b, *self.energy.parameters()])


class Task:
    "Each epoch is drawn from where the last one left the data, and from the model; batches have 4, 8 and 12 samples"

    select = "nll"

    def __init__(self, noise=0.1, broken=None):
        self.model, self.broken = Line(noise), broken
        x = torch.randn(160, 3, generator=make_gen(0, "x"))
        self.data = torch.cat([x, (x @ torch.tensor([1.0, -2.0, 0.5]) + 0.7)[:, None]], 1)

    def weights(self, step, steps):
        if self.broken:
            self.broken(self, step)
        return dict(nll=1.0, size=0.1, late=float(step in (1, 4)))

    def start_epoch(self, epoch, state, gen):
        old = torch.arange(160) if state is None else state["order"]
        return dict(order=old[torch.randint(160, (160,), generator=gen)], shift=self.model.w.detach().sum().clone())

    def batches(self, state, gen, start):
        order = state["order"][torch.randperm(160, generator=gen)]
        for i in order.split([4, 8, 12, 8] * 5)[start:]:
            yield self.data[i] + 0.01 * state["shift"], {}

    @torch.no_grad()
    def validate(self):
        return dict(nll=((self.data[:, :3] @ self.model.w + self.model.b - self.data[:, 3]) ** 2).mean())


LINE = TrainCfg(
    steps=16, lr=0.05, lr_ebm=0.05, clip=5.0, log_every=1, checkpoint_every=4
)  # epochs of 10 steps in two processes


def line(path, task, cfg=LINE, processes=2):
    return launch(task, Run(path, {"task": "line"}), cfg, 1, processes=processes)


def test_unequal_batches_and_terms_that_come_and_go(tmp_path):
    "Each sentence weighs the same whichever process has it; parameters without a gradient stay as they are"
    one, two, three = Task(0.0), Task(0.0), Task(0.0)
    end1 = line(tmp_path / "1", one, dataclasses.replace(LINE, accumulate=6, steps=6), 1)
    end2 = line(tmp_path / "2", two, dataclasses.replace(LINE, accumulate=3, steps=6), 2)
    end3 = line(tmp_path / "3", three, dataclasses.replace(LINE, accumulate=2, steps=6), 3)
    for task, end in ((two, end2), (three, end3)):
        for k, v in one.model.state_dict().items():
            torch.testing.assert_close(task.model.state_dict()[k], v, rtol=1e-5, atol=1e-6, msg=k)
        assert {**dataclasses.asdict(end), "seconds": 0, "best": 0} == {
            **dataclasses.asdict(end1),
            "seconds": 0,
            "best": 0,
        }
        assert end.best == pytest.approx(end1.best, rel=1e-5)
    logs = [steps_of(Run(tmp_path / str(n), {"task": "line"})) for n in (1, 2, 3)]
    assert [o["late"] for o in logs[0]] == pytest.approx(
        [1.0, 1.0, 0.9025, 0.9025, 0.9025, logs[0][5]["late"]]
    ) and logs[0][5]["late"] < 0.9
    for a, *rest in zip(*logs):
        for b in rest:
            assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-5) for k in a.keys() - {"kind"})


def test_same_weights_everywhere(tmp_path):
    "Spectral norms, averages, weights, the state of the epoch, ahead of every forward pass; and noise of its own"

    def record(task, step):
        save_tensors(tmp_path / f"{os.environ['RANK']}-{step}", {**task.model.state_dict()})

    line(tmp_path / "run", Task(broken=record))
    for step in range(16):
        a, b = (load_tensors(tmp_path / f"{r}-{step}")[0] for r in (0, 1))
        assert_same_state(a, b, f"step {step}")
    assert a["average.count"] == 16 and a["late"] != 0


def kill(signum, at=5, whom=os.getpid):
    def broken(task, step):
        if step == at and os.environ.get("RANK") == "1":
            os.kill(whom(), signum)

    return broken


def test_a_signal_to_the_caller_stops_all(tmp_path):
    "The caller passes it on; a second one, from a launcher, is not taken for impatience"

    def broken(task, step):
        if step == 5:
            if os.environ["RANK"] == "1":
                os.kill(os.getppid(), signal.SIGINT)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a script starts in the background
    with pytest.raises(Interrupted, match="run the same command again"):
        line(tmp_path / "run", Task(broken=broken))
    assert Run(tmp_path / "run", {"task": "line"}).load()["progress"]["step"] == 6
    assert (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    line(tmp_path / "whole", whole := Task())
    line(tmp_path / "run", again := Task())
    assert_same_state(dict(again.model.state_dict()), dict(whole.model.state_dict()))


def test_a_killed_process_ends_the_others(tmp_path):
    "kill -9: an error at once, the last checkpoint is good"
    started = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"a training process was killed \(SIGKILL\); the last checkpoint in .*run is intact"
    ):
        line(tmp_path / "run", Task(broken=kill(signal.SIGKILL)))
    assert time.monotonic() - started < 20 and Run(tmp_path / "run", {"task": "line"}).load()["progress"]["step"] == 4
    line(tmp_path / "whole", whole := Task())
    line(tmp_path / "run", again := Task())
    assert_same_state(dict(again.model.state_dict()), dict(whole.model.state_dict()))


@pytest.mark.parametrize(
    "what,error,wrong",
    [
        ("term", FloatingPointError, r"nll is nan at step 5 \(epoch 0, seed 1\); the last checkpoint is intact"),
        ("chain", FloatingPointError, r"non-finite energy at Langevin step 3; met at step 5 \(epoch 0, seed 1\)"),
        ("other", RuntimeError, r"MemoryError in process 1: no memory left"),
        ("main", RuntimeError, r"OSError in process 0: disk full"),
    ],
)
def test_an_error_in_one_process_is_raised_in_all(tmp_path, what, error, wrong):
    "And so in the caller, rather than after a wait"

    def broken(task, step):
        if step != 5 or os.environ["RANK"] != "1":
            return
        real = task.model.forward

        def forward(*args, **kw):
            if what == "chain":
                raise FloatingPointError("non-finite energy at Langevin step 3")
            if what == "other":
                raise MemoryError("no memory left")
            out = real(*args, **kw)
            return {**out, "nll": out["nll"] * float("nan")} if what == "term" else out

        task.model.forward = forward

    task, run = Task(broken=broken), Run(tmp_path / "run", {"task": "line"})

    def full(o):
        raise OSError("disk full")

    if what == "main":
        task.broken = None
    with pytest.raises(error, match=wrong):
        launch(task, run, LINE, 1, on_epoch=full, processes=2)
    saved = run.load()
    assert saved["progress"]["step"] == (8 if what == "main" else 4) and all(
        v.isfinite().all() for v in saved["model"].values()
    )


def test_after_arithmetic_in_several_threads(tmp_path):
    "A fork of a thread that has used OpenMP waits for ever where it uses it; and the caller's threads are divided"
    torch.set_num_threads(4)
    x = torch.randn(1000, 1000)
    (x @ x).exp().sum()

    def broken(task, step):
        assert torch.get_num_threads() == 2
        (x @ x).exp().sum()

    end = line(tmp_path / "run", Task(broken=broken))
    assert end.step == 16


# -- numbers of processes that cannot be


@pytest.mark.parametrize(
    "kw,wrong",
    [
        (dict(processes=0), "processes must be a whole number, at least 1, got 0"),
        (dict(processes=-2), "at least 1, got -2"),
        (
            dict(processes=200, settings="batch=64"),
            r"125 batches of 64 an epoch, fewer than accumulate=1 times processes=200",
        ),
    ],
)
def test_impossible_jobs_leave_nothing(tmp_path, kw, wrong):
    with pytest.raises(ValueError, match=wrong):
        open_job(TextJob(**{"device": "cpu", "out": str(tmp_path / "run"), **kw}))
    assert not list(tmp_path.iterdir())


def test_numbers_of_processes(monkeypatch):
    assert count_processes(1, "cuda:1") == 1 and count_processes(3, "cpu") == 3
    for n, device, wrong in (
        (True, "cpu", "whole number"),
        (1.5, "cpu", "whole number"),
        (2, "mps", "not on mps"),
        (2, "cuda:1", "give device 'cuda', not 'cuda:1'"),
        (
            torch.cuda.device_count() + 1 if torch.cuda.device_count() else 2,
            "cuda",
            "need a GPU each, and PyTorch sees",
        ),
    ):
        with pytest.raises(ValueError, match=wrong):
            count_processes(n, device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_processes(2, "cpu") == 2
    with pytest.raises(ValueError, match="2 processes were launched, and processes=1: give processes=2"):
        count_processes(1, "cpu")


# -- under a launcher


@pytest.mark.slow
def test_a_notebook_under_a_launcher(tmp_path, own):
    "Every process runs it; one writes it, evaluates and leaves one record"
    out, results = tmp_path / "run", tmp_path / "results"
    out.mkdir()
    env = {
        **os.environ,
        "IN_TEST": "1",
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "MPLBACKEND": "agg",
        "TMPDIR": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    res = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
            "-m",
            "ldebm.launch",
            str(ROOT / "nbs" / "train_ptb.ipynb"),
            str(out / "train_ptb.ipynb"),
            "--kernel",
            "python3",
            "-r",
            "corpus",
            own,
            "-p",
            "settings",
            f"{NET} batch=32 cls_start=0 nll_draws=0 energy_steps=10",
            "-p",
            "steps",
            "20",
            "-p",
            "n_samples",
            "20",
            "-p",
            "device",
            "cpu",
            "-p",
            "threads",
            "1",
            "-p",
            "out",
            str(out),
            "-p",
            "results",
            str(results),
        ],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=110,
    )
    assert res.returncode == 0, res.stdout[-3000:] + res.stderr[-3000:]
    (record,) = load_results(results)
    assert (
        record["settings"]["processes"] == 2
        and record["metrics"]["recon_nll"]["n"] == 70
        and json.loads((out / "result.json").read_text()) == record
    )
    lines = Run(out, json.loads((out / "settings.json").read_text())).log_lines()
    assert [(o["kind"], o["step"]) for o in lines] == [("valid", 19), ("train", 20), ("valid", 20)]
    cells = [c for c in json.loads((out / "train_ptb.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert all(c["execution_count"] for c in cells if "".join(c["source"]).strip()) and not [
        o for c in cells for o in c["outputs"] if o["output_type"] == "error"
    ]
    assert sorted(p.name for p in tmp_path.glob("*") if p.suffix == ".ipynb") == [] and not list(
        tmp_path.glob("*/copy.ipynb")
    )


WAYS = f"""
import os, sys
from ldebm.core import save_tensors
from ldebm.energy_task import fit_alone
from ldebm.launch import launch
from ldebm.text_job import open_job
from ldebm.text_settings import TextJob, later_stages, train_cfg
settings = "{NET} batch=32 cls_start=0 energy_steps=8 energy_batch=32 refit_steps=4"
where = dict(threads=2, processes=2, device="cpu", out=sys.argv[1])
run, task, device = open_job(TextJob(corpus=sys.argv[2], steps=6, settings=settings, **where))
launch(task, run, train_cfg(task.settings), 0, device, processes=2, more=bool(later_stages(task.settings)))
took = fit_alone(task, run, 0, device)
import torch
learned = dict(task.model.state_dict(), threads=torch.tensor(torch.get_num_threads()))
said = dict(took=took, training=task.model.training)
save_tensors(sys.argv[1]+"/learned-"+os.environ.get("RANK", "0"), learned, said)
"""


@pytest.mark.slow
def test_every_way_to_start_gives_one_run(tmp_path, own):
    "Forked, by torchrun, by Accelerate: equal bits in every process, the same checkpoints, two threads divided"
    (tmp_path / "job.py").write_text(WAYS)
    python = [sys.executable, "-m"]
    ways = dict(
        processes=[sys.executable],
        torchrun=[*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        accelerate=[
            *python,
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ],
    )
    for name, way in ways.items():
        res = subprocess.run(
            [*way, str(tmp_path / "job.py"), str(tmp_path / name), own],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=100,
        )
        assert res.returncode == 0, f"{name}: {res.stderr[-2000:]}"
    want, meta = load_tensors(tmp_path / "processes" / "learned-0")
    assert want["threads"] == 2
    for name in ("torchrun", "accelerate"):
        for rank in (0, 1):
            got, said = load_tensors(tmp_path / name / f"learned-{rank}")
            assert_same_state(got, want, f"{name}, process {rank}")
            assert said["took"] > 0 and not said["training"]
        for part in ("", "encoder", "energies"):
            a, b = (
                Run(tmp_path / n / part, json.loads((tmp_path / n / part / "settings.json").read_text()))
                for n in (name, "processes")
            )
            assert same_log(a) == same_log(b)
            a, b = a.load(), b.load()
            assert a.pop("progress") | {"seconds": 0} == b.pop("progress") | {"seconds": 0}
            assert_same_state(a, b, f"{name} {part}")


@pytest.mark.parametrize(
    "open_it",
    [
        lambda out: image_job.open_job(image_job.ImageJob(device="cpu", out=out)),
        lambda out: toy_job.open_job(toy_job.ToyJob(out=out)),
        lambda out: open_job(TextJob(device="cpu", out=out)),
    ],
    ids=["pictures", "plane", "text, processes=1"],
)
def test_jobs_of_one_process_refuse_a_launcher(open_it, tmp_path, monkeypatch):
    "Each of two would train with half of the steps, and both would write"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched.*without a launcher"):
        open_it(str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv,world,wrong",
    [
        ([], 2, "usage: accelerate launch"),
        (["a.ipynb", "-p"], 2, "usage"),
        (["train_ptb.ipynb", "out.ipynb"], 1, "a single process was launched: use papermill itself"),
        (["train_toy2d.ipynb", "out.ipynb"], 2, "train_toy2d.ipynb has no parameter `processes`"),
    ],
)
def test_the_launchers_entry_refuses(tmp_path, monkeypatch, argv, world, wrong):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=wrong):
        launching.run_notebook(
            [str(ROOT / "nbs" / a) if i == 0 and a.startswith("train") else a for i, a in enumerate(argv)]
        )
    assert not list(tmp_path.iterdir())
