"Toy jobs: bad input, scores that can fail, equal evaluations, interruption, records, and what records claim"

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ldebm import toy_job as tj
from ldebm import toy_measure as measure
from ldebm.core import make_gen
from ldebm.records import Run, check_result, load_results
from ldebm.settings import notebook_params
from ldebm.toys import TOYS
from ldebm.train import fit

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(T=2, steps=12, hidden=16, n_blocks=1, n_steps=4, batch=32, n_points=100, repeats=2, epochs=3, long=2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setitem(tj.PRESETS, "tiny", TINY)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad,says",
    [
        (dict(preset="huge"), "unknown preset 'huge'. Known: small, quick"),
        (dict(density="ring"), "unknown density 'ring'"),
        (dict(steps=-1), "steps must not be negative"),
        (dict(seed=-1), "seed must not be negative"),
        (dict(threads=-2), "threads must not be negative"),
        (dict(steps=2), "steps must be at least 6"),
        (dict(device="tpu"), "unknown device 'tpu'"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, bad, says):
    with pytest.raises(ValueError, match=says):
        tj.open_job(tj.ToyJob(out=str(tmp_path / "run"), **bad))
    assert not (tmp_path / "run").exists()


def test_unknown_parameter():
    values = {k: getattr(tj.ToyJob(), k) for k in tj.ToyJob.__dataclass_fields__}
    assert notebook_params(tj.ToyJob, values) == tj.ToyJob()
    with pytest.raises(ValueError, match="unknown parameter 'densty'.*'density'"):
        notebook_params(tj.ToyJob, {**values, "densty": "pinwheel"})


def test_other_settings_refused(tmp_path, tiny):
    job = tj.ToyJob(preset="tiny", out=str(tmp_path / "run"))
    tj.open_job(job)
    with pytest.raises(ValueError, match="other settings.*steps: 12 -> 13"):
        tj.open_job(replace(job, steps=13))


def test_parameters_cell_is_the_dataclass():
    "Names and defaults of the notebook's parameters are those of `ToyJob`"
    nb = json.loads((ROOT / "nbs" / "train_toy2d.ipynb").read_text(encoding="utf-8"))
    (cell,) = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    ns = {}
    exec("".join(cell["source"]), ns)
    assert notebook_params(tj.ToyJob, {k: v for k, v in ns.items() if not k.startswith("__")}) == tj.ToyJob()


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", list(TOYS))
@pytest.mark.parametrize("preset", ["small", "quick"])
def test_equal_evaluations(preset, density, monkeypatch):
    "Training and samples cost the same with and without diffusion, to within first gradients and rounding"
    monkeypatch.delenv("IN_TEST", raising=False)
    s = tj.resolve(tj.ToyJob(preset=preset))
    a, b = (tj.evaluations(tj.settings_for(s, density, diffusion)) for diffusion in (True, False))
    for k in a:
        assert 0.9 < b[k] / a[k] <= 1


def test_in_test_is_small(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    assert tj.resolve(tj.ToyJob()).steps <= 40
    monkeypatch.delenv("IN_TEST")
    assert tj.resolve(tj.ToyJob()).steps == tj.ToySettings().steps and tj.resolve(tj.ToyJob(steps=77)).steps == 77


def test_pinwheel_arms():
    "Arms by a rule of thumb agree with the arm each point was drawn from"
    n, gen = 4000, make_gen(1)
    noise = torch.randn(n, 2, generator=gen) * torch.tensor([0.3, 0.1])
    r, t = noise[:, 0] + 1, noise[:, 1]
    arm = torch.randint(10, (n,), generator=gen)
    a = 2 * torch.pi / 10 * arm + 0.25 * r.exp()
    x = 2 * torch.stack([r * a.cos() + t * a.sin(), t * a.cos() - r * a.sin()], 1)
    k, K = measure.modes("pinwheel", x)
    assert K == 10 and (k == arm).float().mean() > 0.97


@pytest.mark.parametrize("density", list(TOYS))
def test_scores_can_fail(density):
    "Fresh samples pass every score; a lost third, a blur and a collapse each fail the score made for it"
    n = 1500
    x = TOYS[density].sample(4 * n, make_gen(3))
    k, K = measure.modes(density, x)

    def rate(v):
        return {m: o["value"] for m, o in measure.score(density, [v], 0, 2).items()}

    good = rate(x[:n])
    assert (
        good["mmd_ratio"] < 1.6
        and good["modes_covered"] == 1
        and good["stray"] < 0.025
        and abs(good["log_density"] - good["log_density_true"]) < 0.15
    )
    lost = rate(x[k >= K // 3][:n])
    assert lost["modes_covered"] == pytest.approx(1 - (K // 3) / K) and lost["mode_tv"] > 0.25 and lost["mmd_ratio"] > 2
    blur = rate(x[:n] + 0.4 * torch.randn(n, 2, generator=make_gen(4)))
    assert blur["stray"] > 0.08 and blur["log_density"] < good["log_density"] - 0.3
    point = rate(x[:1].expand(n, 2).clone())
    assert point["modes_covered"] == 1 / K and point["mmd_ratio"] > 10


def test_energy_density_of_zero_energy():
    "With F = 0 the implied density is that of scaled standard normal points"
    p = tj.build_prior(replace(tj.ToySettings(), hidden=8, n_blocks=1), 0)
    for q in p.energy.head.parameters():
        torch.nn.init.zeros_(q)
    u = torch.linspace(-5, 5, 120)
    want = torch.exp(-0.5 * torch.cartesian_prod(u, u).square().sum(-1) / 0.8**2) / (2 * torch.pi * 0.8**2)
    assert_close(measure.energy_density(p, 0.8, n=120), want.reshape(120, 120), atol=1e-4, rtol=1e-3)


def test_average_follows_weights():
    m = tj.ToyModel(replace(tj.ToySettings(), hidden=8, n_blocks=1, ema=0.9), 0)
    start = [p.clone() for p in m.average.parameters()]
    with torch.no_grad():
        for p in m.prior.energy.parameters():
            p.add_(1)
    for _ in range(200):
        m.before_step()
    for a, s in zip(m.average.parameters(), start):
        assert_close(a, s + 1, atol=1e-4, rtol=1e-4)
    assert all(not p.requires_grad for p in m.average.parameters())
    assert m.learned().energy is m.average.net


# -- jobs -------------------------------------------------------------------------------------------------------------


def run_job(job):
    place = tj.open_job(job)
    out = []
    for d in tj.densities(job):
        models = tj.train_all(place, d)
        samples, seconds = tj.sample_all(place, d, models)
        for system in tj.SYSTEMS:
            kind = "diffusion" if system == "toy-diffusion-ebm" else "single"
            mix = measure.mixing(models[kind][0], tj.SCALES[d], d, make_gen(0), n_steps=8, n_cond=2, n_chains=4)
            out.append(
                measure.finish(
                    place,
                    d,
                    system,
                    measure.score(d, samples[system], 0, place.settings.repeats),
                    mix,
                    models[kind][1],
                    seconds[system],
                )
            )
    return out


def test_job_records(tmp_path, tiny):
    "A valid record for each density and system; nothing leaves the run folder unless asked; numbers repeat"
    job = tj.ToyJob(preset="tiny", out=str(tmp_path / "run"))
    first = run_job(job)
    assert len(first) == 6 and all(tmp_path / "run" in p.parents for p in first)
    recs = [check_result(json.loads(p.read_text())) for p in first]
    assert {(r["system"], r["corpus"]) for r in recs} == {(system, d) for system in tj.SYSTEMS for d in TOYS}
    by = {r["system"]: r["metrics"]["sample_evaluations"]["value"] for r in recs}
    assert by["toy-ebm-short"] <= by["toy-diffusion-ebm"] < by["toy-ebm-long"]
    copies = run_job(replace(job, results=str(tmp_path / "results")))
    assert {p.parents[3] for p in copies} == {tmp_path / "results"} and (
        tmp_path / "results" / "runs" / "pinwheel" / "tiny" / "toy-ebm-long-consistent-s0.json"
    ).exists()
    for p, r in zip(copies, recs):
        assert json.loads(p.read_text())["metrics"] == r["metrics"]


def test_results_of_other_settings_refused_before_work(tmp_path, tiny):
    job = tj.ToyJob(preset="tiny", density="pinwheel", out=str(tmp_path / "a"), results=str(tmp_path / "results"))
    run_job(job)
    with pytest.raises(ValueError, match="other settings"):
        tj.open_job(replace(job, steps=20, out=str(tmp_path / "b")))
    assert not (tmp_path / "b").exists()


KILLED = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from ldebm import toy_job as tj
from ldebm import toy_measure as measure
from ldebm.records import Run
from ldebm.train import fit
s = replace(tj.ToySettings(), **{tiny!r}, )
task = tj.ToyTask('gaussians16', s, 0)
cfg = replace(tj.train_cfg(s), checkpoint_every=2, log_every=1)
fit(task, Run(sys.argv[1], {{}}), cfg, 0, on_epoch=lambda line: print(line['step'], flush=True))
"""


@pytest.mark.slow
def test_kill_and_resume_bitwise(tmp_path):
    "Killed without warning after its first epoch, a run ends in the weights of an undisturbed one"
    tiny = {**TINY, "steps": 300, "epochs": 10}
    s = replace(tj.ToySettings(), **tiny)
    cfg = replace(tj.train_cfg(s), checkpoint_every=2, log_every=1)
    whole = tj.ToyTask("gaussians16", s, 0)
    fit(whole, Run(tmp_path / "whole", {}), cfg, 0)
    p = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(root=str(ROOT), tiny=tiny), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "IN_TEST": "1", "OMP_NUM_THREADS": "1"},
    )
    assert p.stdout.readline().strip() == "30"
    time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    at = Run(tmp_path / "killed", {}).load()["progress"]["step"]
    assert 30 <= at < 300, "killed in mid-run"
    again = tj.ToyTask("gaussians16", s, 0)
    torch.set_num_threads(1)
    fit(again, Run(tmp_path / "killed", {}), cfg, 0)
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()):
        assert_close(a, b, rtol=0, atol=0)


# -- what was measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", list(TOYS))
def test_committed_records(density):
    "Three seeds: the diffusion model's samples are at most twice as far from the truth as a fresh sample"
    recs = [r for r in load_results(ROOT / "results") if r["corpus"] == density and r["preset"] == "small"]
    for system in tj.SYSTEMS:
        mine = [r for r in recs if r["system"] == system]
        assert {r["seed"] for r in mine} >= {0, 1, 2}, system
        for r in mine:
            assert r["settings"] == json.loads(json.dumps(tj.record_settings(tj.ToySettings(), density, system))), (
                "recorded with other settings than the preset's"
            )
            assert r["metrics"]["mmd"]["n"] >= 4000
            if system == "toy-diffusion-ebm":
                assert r["metrics"]["mmd_ratio"]["value"] <= 2
