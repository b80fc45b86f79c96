"One seed gives one run, whatever the threads' timing: no gradient adds up in the order in which threads arrive"

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from same import assert_same_state
from torch.utils._python_dispatch import TorchDispatchMode

from ldebm import image_job, image_stages, toy_job, train
from ldebm.codes import Both, Codes
from ldebm.core import load_tensors, make_gen
from ldebm.energy import EnergyNet
from ldebm.energy_task import fit_energies
from ldebm.exact import QuadraticEnergy
from ldebm.image_job import ImageJob
from ldebm.layers import take_rows
from ldebm.posterior import DiagGaussian
from ldebm.text_job import open_job
from ldebm.text_settings import TextJob, later_stages, train_cfg
from ldebm.zoo import SYSTEMS

SMALL = "embed=16 hidden=16 batch=32"


class Unordered(TorchDispatchMode):
    """Notes every sum of floating-point numbers that a CPU takes by atomic additions: repeated indices in
    `index_put(accumulate=True)` and `put(accumulate=True)`"""

    def __init__(self):
        super().__init__()
        self.seen, self.ops = [], 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        given = {**dict(zip((a.name for a in f._schema.arguments), args)), **(kwargs or {})}
        self.ops += 1
        if given.get("accumulate") and args[0].is_floating_point():
            index = given["indices"] if "indices" in given else [given["index"]]
            at = torch.stack(
                [i.expand(max(len(k) for k in index if k is not None)).flatten() for i in index if i is not None]
            )
            if at.unique(dim=1).shape[1] < at.shape[1]:
                self.seen.append((f._schema.name, tuple(args[0].shape)))
        return f(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch, in_test):
    "Every step of `fit` is looked through"
    mode, step = Unordered(), train.Loop.step

    def look(*args):
        with mode:
            return step(*args)

    monkeypatch.setattr(train.Loop, "step", look)
    yield mode
    assert mode.ops > 100 and not mode.seen, f"sums whose order is that of threads: {mode.seen}"


def test_what_is_looked_for():
    x = torch.zeros(4, 3, requires_grad=True)
    for f, found in (
        (lambda: x[torch.tensor([1, 1])], 1),
        (lambda: x[:, torch.tensor([2, 2])], 1),
        (lambda: x.take(torch.tensor([5, 5])), 1),
        (lambda: x[torch.tensor([1, 0])], 0),
        (lambda: take_rows(x, torch.tensor([1, 1])), 0),
    ):
        with Unordered() as mode:
            f().sum().backward()
        assert len(mode.seen) == found


@pytest.mark.parametrize(
    "system,objective",
    [
        (r, o)
        for r in SYSTEMS
        for o in ("consistent", "published")
        if o == "consistent" or SYSTEMS[r].published is not None
    ],
)
def test_text(system, objective, watched, tmp_path):
    run, task, device = open_job(
        TextJob(
            system=system,
            objective=objective,
            steps=1,
            n_samples=20,
            device="cpu",
            out=str(tmp_path / "run"),
            settings=SMALL,
        )
    )
    task.validate = lambda: {task.select or "nll": torch.tensor(0.0)}
    train.fit(task, run, train_cfg(task.settings), 0, device)
    if "energies" in later_stages(task.settings):
        task.settings = replace(task.settings, energy_steps=1)
        fit_energies(task, run, 0, device)


@pytest.mark.parametrize("layers", ["1x4x16x1 1x2x16x0", "1x3x12x1 4x1x8x0"], ids=["vectors", "with a map"])
@pytest.mark.parametrize("objective", list(image_job.OBJECTIVES))
def test_pictures(layers, objective, watched, tmp_path):
    p = image_job.open_job(
        ImageJob(
            objective=objective,
            systems="ldebm ldebm-coupled",
            device="cpu",
            out=str(tmp_path / "run"),
            settings=f"layers='{layers}' gen_steps=2 steps=2 clf_steps=2 energy_hidden=8",
        )
    )
    g = image_stages.train_generator(p)[0]
    image_stages.train_classifier(p)
    for system in p.job.systems.split():
        image_stages.train_prior(p, system, g)


def test_plane(watched, tmp_path):
    toy_job.train_all(
        toy_job.open_job(toy_job.ToyJob(density="gaussians16", device="cpu", steps=8, out=str(tmp_path / "run"))),
        "gaussians16",
    )


def test_energies_with_known_answers():
    e = QuadraticEnergy(torch.eye(2).repeat(3, 1, 1), torch.zeros(3, 2))
    with Unordered() as mode:
        e(torch.randn(9, 2, generator=make_gen(0)), torch.arange(9) % 3).sum().backward()
    assert not mode.seen and torch.equal(e.c.grad.isfinite(), torch.ones(3, 2, dtype=torch.bool))


# -- the kernel


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_rows_are_plain_indexing(shape, dtype, n):
    "The same numbers, the same gradient to the bit (few enough for one thread), and second derivatives"
    gen = make_gen(0, "rows")
    x = torch.randn(shape, generator=gen, dtype=dtype, requires_grad=True)
    i = torch.randint(5, (n,), generator=gen)
    assert torch.equal(take_rows(x, i), x[i]) and take_rows(x, i).shape == x[i].shape
    up = torch.randn(x[i].shape, generator=gen, dtype=dtype)
    assert torch.equal(*(torch.autograd.grad((f * up).sum(), x)[0] for f in (take_rows(x, i), x[i])))
    if dtype == torch.float64 and n:
        assert torch.autograd.gradgradcheck(lambda x: take_rows(x, i) ** 2, x)


def test_some_of_a_posterior():
    gen = make_gen(0, "posterior")
    a, b, c = (torch.randn(4, k, generator=gen) for k in (3, 3, 6))
    q = Both(DiagGaussian(a, b), Codes(c.unflatten(1, (2, 3)), False))
    for i in (torch.tensor([2, 2, 0]), torch.tensor([True, False, True, False]), slice(1, 3)):
        assert torch.equal(q[i].z.mean, a[i]) and torch.equal(q[i].c.logits, q.c.logits[i])


# -- with threads


@pytest.fixture
def two_threads():
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n)


@pytest.mark.slow
def test_gradients_of_an_energy_repeat(two_threads):
    "Enough latents for several threads: plain indexing gave another last digit in one of a few tries"
    gen = make_gen(0, "threads")
    net, z, t = (
        EnergyNet(8, 4, 3, 64, 2, gen=gen),
        torch.randn(2048, 8, generator=gen),
        torch.randint(3, (2048,), generator=gen),
    )

    def grads():
        return torch.autograd.grad(net(z, t).sum(), list(net.parameters()))

    first = grads()
    for _ in range(30):
        for a, b in zip(first, grads()):
            assert torch.equal(a, b)


JOB = """
import sys
from ldebm.core import save_tensors
from ldebm.energy_task import EnergyTask, fit_energies
from ldebm.launch import launch
from ldebm.text_job import open_job
from ldebm.text_settings import TextJob, train_cfg
settings = 'embed=32 hidden=32 cls_start=0 batch=256 energy_steps=8 nll_draws=0'
where = dict(threads=int(sys.argv[2]), device='cpu', out=sys.argv[1])
run, task, device = open_job(TextJob(steps=4, n_samples=20, settings=settings, **where))
task.validate, EnergyTask.validate = lambda: {'base_bound': 0.}, lambda self: {'kl': 0.}
launch(task, run, train_cfg(task.settings), 0, device)
fit_energies(task, run, 0, device)
save_tensors(sys.argv[1]+'/learned', task.model.state_dict())
"""


@pytest.mark.slow
def test_the_promise(tmp_path):
    "One seed on two threads, twice: equal bits, energies as well. On one thread: the same but for last digits"
    for name, threads in (("a", 2), ("b", 2), ("one", 1)):
        env = {**os.environ, "OMP_NUM_THREADS": "2", "IN_TEST": "1"}
        subprocess.run(
            [sys.executable, "-c", JOB, str(tmp_path / name), str(threads)], env=env, check=True, timeout=110
        )
    a, b, one = (load_tensors(tmp_path / name / "learned")[0] for name in ("a", "b", "one"))
    assert_same_state(a, b, "two runs")
    for k in a:
        torch.testing.assert_close(a[k], one[k], rtol=0, atol=1e-4, msg=k)
