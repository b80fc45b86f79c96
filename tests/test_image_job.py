"Image jobs: stages killed and resumed to the same bits, bad input that writes nothing, models that come back, records"

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import folders
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ldebm import classifier, image_metrics, langevin, train
from ldebm import image_figures as figures
from ldebm import image_job as ij
from ldebm import image_measure as measure
from ldebm import image_outliers as strange
from ldebm import image_stages as stages
from ldebm import image_uses as uses
from ldebm.classifier import ClassifierTask
from ldebm.core import load_tensors, make_gen, save_tensors
from ldebm.decode import BadImage
from ldebm.generator import Generator
from ldebm.generator_model import GeneratorModel, multiply_adds
from ldebm.generator_parts import GeneratorCfg
from ldebm.image_job import ImageJob, ImageSettings
from ldebm.image_stages import StageTask
from ldebm.images import ImageBatch, image_batches
from ldebm.job import save_figure
from ldebm.prior import DiffusionEBM
from ldebm.records import RENAMED, check_result, metric
from ldebm.settings import notebook_params
from ldebm.top_down import TopDownEnergy

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="signals as on Unix")
TINY = (
    "layers='1x3x16x1 1x2x16x0' enc_blocks=0 limit=300 gen_steps=50 gen_batch=32 steps=50 batch=32 checks=2 "
    "T=2 langevin_steps=2 energy_hidden=8 warmup=5 score_hidden=16 score_blocks=1 score_levels=6 ddpm_share=1 "
    "clf_steps=50 n_samples=60 long=2 tune='1 2' joint_steps=50"
)
MAPS = "layers='1x3x12x1 4x1x8x0'"  # after TINY: a ladder with a map
AT = 45  # steps after which stages are killed: after the checkpoint of step 40, in the second of two passes
SYSTEMS = ["ldebm", "ldebm-coupled", "joint-ebm", "ddpm"]


@pytest.fixture(autouse=True)
def full_size(monkeypatch, tmp_path):
    "Settings as given, one thread, and a working folder in which a stray file would be seen"
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.chdir(tmp_path)
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def job(out, settings="", **kw):
    return ImageJob(
        **{
            **dict(out=str(out), settings=f"{TINY} {settings}", systems=" ".join(SYSTEMS), device="cpu", threads=1),
            **kw,
        }
    )


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


def differ(a, b):
    return any(not torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted job: its place, generator, classifier and priors, each trained when first asked for"
    had, got = os.environ.pop("IN_TEST", None), {}
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    place = ij.open_job(job(tmp_path_factory.mktemp("whole") / "run"))
    got["generator"] = stages.train_generator(place)
    got["classifier"] = stages.train_classifier(place)

    def ask(name):
        if name == "place":
            return place
        if name not in got:
            got[name] = stages.train_prior(place, name, got["generator"][0])
        return got[name]

    yield ask
    torch.set_num_threads(n)
    if had is not None:
        os.environ["IN_TEST"] = had


# -- interruption


class Killed(BaseException):
    "As if the process had ended"


def killed_at(monkeypatch, step, what=StageTask):
    "Every stage ends at a step, as by kill -9: nothing is saved any more"
    real = what.weights

    def weights(self, at, steps):
        if at == step:
            raise Killed
        return real(self, at, steps)

    monkeypatch.setattr(what, "weights", weights)


def interrupted(monkeypatch, run, what=StageTask, first=40):
    "Run a stage, die in it, run it again: the second time it must begin after the first step, and in mid-epoch"
    with monkeypatch.context() as m:
        killed_at(m, AT, what)
        with pytest.raises(Killed):
            run()
    seen, real = [], what.weights
    with monkeypatch.context() as m:
        m.setattr(what, "weights", lambda self, at, steps: (seen.append(at), real(self, at, steps))[1])
        out = run()
    assert seen == list(range(first, 50))
    return out


def log_of(lines):
    return [{k: v for k, v in o.items() if k != "minutes"} for o in lines]


def test_generator_resumes_bit_for_bit(whole, tmp_path, monkeypatch):
    p = ij.open_job(job(tmp_path / "run"))
    g, end, log = interrupted(monkeypatch, lambda: stages.train_generator(p))
    g0, end0, log0 = whole("generator")
    assert_same(weights(g), weights(g0))
    assert log_of(log) == log_of(log0) and (end.step, end.samples) == (end0.step, end0.samples) == (50, 1600)
    assert torch.equal(g.sample(5, gen=make_gen(1)), g0.sample(5, gen=make_gen(1)))
    assert not any(q.requires_grad for q in g.parameters()) and not g.training
    before = p.run.file("generator/checkpoint.safetensors").read_bytes()
    assert_same(weights(stages.train_generator(p)[0]), weights(g))  # finished: nothing is trained again
    assert p.run.file("generator/checkpoint.safetensors").read_bytes() == before


def test_classifier_resumes_bit_for_bit(whole, tmp_path, monkeypatch):
    p = ij.open_job(job(tmp_path / "run"))
    net, acc = interrupted(
        monkeypatch, lambda: stages.train_classifier(p), ClassifierTask, 44
    )  # its passes are short, and end in checkpoints
    assert_same(weights(net), weights(whole("classifier")[0]))
    assert acc == whole("classifier")[1] and p.run.file("classifier.safetensors").exists()


@pytest.mark.parametrize("system", SYSTEMS)
def test_priors_resume_bit_for_bit(system, whole, tmp_path, monkeypatch):
    p = ij.open_job(job(tmp_path / "run"))
    if system == "joint-ebm":
        p = replace(p, settings=replace(p.settings, steps=100))  # it takes half as many steps, of as many evaluations
    g = whole("generator")[0]
    prior, end, log = interrupted(monkeypatch, lambda: stages.train_prior(p, system, g))
    if system == "joint-ebm":
        q = ij.open_job(job(tmp_path / "other"))
        q = replace(q, settings=replace(q.settings, steps=100))
        prior0, end0, log0 = stages.train_prior(q, system, g)
    else:
        prior0, end0, log0 = whole(system)
    assert_same(weights(prior), weights(prior0))
    assert log_of(log) == log_of(log0) and end.step == end0.step == 50
    a, b = (measure.sample_prior(p, o, 6)[0] for o in (prior, prior0))
    assert torch.equal(a, b) and a.isfinite().all()


NETS = (
    "layers='1x3x12x1 4x1x8x0' cells='8x6x1' energy_net=top-down start=data energy_match=.86 score_net=maps "
    "mixed_precision=bf16"
)


@pytest.mark.parametrize("system", ["ldebm", "ldebm-coupled", "ddpm"])
def test_networks_on_maps_resume_and_come_back(system, tmp_path, monkeypatch):
    "Also where scores give way to the likelihood, after 43 steps, beyond the checkpoint"
    p, q = (ij.open_job(job(tmp_path / name, NETS)) for name in ("run", "other"))
    g = stages.train_generator(p)[0]
    prior, _, log = interrupted(monkeypatch, lambda: stages.train_prior(p, system, g))
    prior0, _, log0 = stages.train_prior(q, system, g)
    assert_same(weights(prior), weights(prior0))
    assert log_of(log) == log_of(log0)
    g2, prior2 = stages.load_prior(stages.save_prior(p, system, g, prior))
    assert g2.cfg == g.cfg and type(prior2) is type(prior)
    a, b = (measure.sample_prior(p, o, 6)[0] for o in (prior, prior2))
    assert torch.equal(a, b) and a.isfinite().all()
    if system != "ddpm":
        assert type(prior2.energy) is TopDownEnergy and prior2.energy.nets.half and prior2.cfg.chain_start == "data"


def test_scores_come_first(tmp_path, monkeypatch):
    p = ij.open_job(job(tmp_path / "run", NETS))
    g = stages.train_generator(p)[0]
    seen, real = [], stages.PriorModel.forward

    def forward(self, batch, gen=None, match=False):
        seen.append((self.training, match))
        return real(self, batch, gen, match)

    monkeypatch.setattr(stages.PriorModel, "forward", forward)
    stages.train_prior(p, "ldebm", g)
    trained = [match for training, match in seen if training]
    assert trained == [True] * 43 + [False] * 7
    assert not any(match for training, match in seen if not training)
    with pytest.raises(ValueError, match="energy_match wants objective 'consistent', not 'robust'"):
        ij.resolve(ImageJob(objective="robust", systems="ldebm", settings="energy_match=.5"))


@pytest.mark.slow
def test_fine_tuning(whole, tmp_path, monkeypatch):
    "Generator and energies together: resumable; frozen ones stay, the copies move, prior networks and encoder too"
    p = ij.open_job(job(tmp_path / "run"))
    g0, prior0 = whole("generator")[0], whole("ldebm-coupled")[0]
    before = weights(g0), weights(prior0)
    g, prior, end, log = interrupted(monkeypatch, lambda: stages.fine_tune(p, "ldebm-coupled", g0, prior0))
    assert_same(weights(g0), before[0])
    assert_same(weights(prior0), before[1])
    for part in ("prior.0.weight", "combine.1.weight", "head.weight", "post.1.weight", "stem.weight"):
        assert not torch.equal(g.state_dict()[part], g0.state_dict()[part]), part
    assert (
        differ(weights(prior), before[1])
        and prior.energy.generator is g
        and not any(q.requires_grad for q in g.parameters())
    )
    again = stages.fine_tune(ij.open_job(job(tmp_path / "other")), "ldebm-coupled", g0, prior0)
    assert_same(weights(again[0]), weights(g))
    assert_same(weights(again[1]), weights(prior))
    assert {"nll", "kl", "ebm", "ebm_enc", "cls_t", "norm_main", "norm_ebm"} <= set(log[0])
    g2, prior2 = stages.load_prior(stages.save_prior(p, "ldebm-coupled-joint", g, prior))
    assert_same(weights(g2), weights(g))
    assert torch.equal(
        measure.sample_prior(p, prior2, 4, y=torch.arange(4))[0],
        measure.sample_prior(p, prior, 4, y=torch.arange(4))[0],
    )


def gradients(model, term):
    "Gradient of a term by the name of the parameter, `None` where there is none"
    names, params = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(term.sum(), params, retain_graph=True, allow_unused=True)))


def moved(grads, name):
    return grads[name] is not None and bool((grads[name] != 0).any())


@pytest.mark.parametrize("objective", list(ij.OBJECTIVES))
def test_joint_terms_reach_the_generator(objective, tmp_path, whole):
    "The energies' contrast moves the generator's prior networks through T, `ebm_enc` its encoder; frozen, neither"
    systems = "ldebm"
    p = ij.open_job(job(tmp_path / "run", "T=2 langevin_steps=2", objective=objective, systems=systems))
    x = p.images["train"].x(torch.arange(24))
    b = ImageBatch(x, p.images["train"].labels[:24], torch.arange(24))
    for joint in (True, False):
        g = stages.train_generator(whole("place"))[0]
        m = stages.build_prior(p, "ldebm", g)
        prior = DiffusionEBM(m.prior.schedule, m.prior.energy, replace(m.prior.cfg, encoder=joint))
        model = stages.PriorModel(m.generator, prior, joint=joint)
        out = model(b, make_gen(0))
        assert {"kl", "nll"} <= set(out) if joint else "nll" not in out

        if not joint:
            assert not any(q.requires_grad for q in g.parameters()) and model.groups()["main"] == []
            continue
        assert model.groups()["main"] == list(g.parameters())

        ebm, enc = (gradients(g, out[k]) for k in ("ebm", "ebm_enc"))
        assert not any(moved(ebm, k) for k in ebm)  # held latents hold the tower
        assert (
            moved(enc, "prior.0.weight")
            and moved(enc, "combine.0.weight")
            and moved(enc, "post.0.weight")
            and moved(enc, "stem.weight")
        )


CHILD = """
import sys, time
from ldebm import core, image_job as ij, image_stages as stages
out, settings, want, hang, kill = sys.argv[1:]
systems = 'ldebm ldebm-coupled joint-ebm ddpm'
place = ij.open_job(ij.ImageJob(out=out, settings=settings, systems=systems, device='cpu', threads=1))
stopping, old = [], core.graceful_stop._handle
def handle(self, *args): old(self, *args); stopping.append(1)
core.graceful_stop._handle = handle
stage, plain = 'generator', stages.StageTask.weights
def weights(self, step, steps):
    if stage == want and step == int(hang):
        print('there', flush=True)
        if kill == '1': time.sleep(300)
        while not stopping: time.sleep(.01)   # the signal must have come before the step ends
    return plain(self, step, steps)
stages.StageTask.weights = weights
try:
    g = stages.train_generator(place)[0]
    stage = 'ldebm-coupled'
    stages.train_prior(place, stage, g)
except KeyboardInterrupt as e: print('interrupted:', e, flush=True); sys.exit(3)
print('end', flush=True)
"""


def child(out, stage, at, signum):
    "A job in another process, which gets a signal in the middle of a step of a stage"
    env = {**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    p = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), f"{TINY} ", stage, str(at), str(int(signum == signal.SIGKILL))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        line = p.stdout.readline()
        assert line == "there\n", line + p.stderr.read()
        p.send_signal(signum)
        return p, *p.communicate(timeout=120)
    finally:
        if p.poll() is None:
            p.kill()


@posix
@pytest.mark.slow
def test_signals_in_two_stages(whole, tmp_path):
    "SIGTERM in the generator saves; the job goes on, is killed in the prior, and ends with the usual bits"
    p, out, err = child(tmp_path / "run", "generator", 33, signal.SIGTERM)
    assert p.returncode == 3 and "interrupted: stopped at step 34 of 50; run the same command again" in out, out + err
    p, out, err = child(tmp_path / "run", "ldebm-coupled", 44, signal.SIGKILL)
    assert p.returncode == -signal.SIGKILL and "end" not in out, out + err
    place = ij.open_job(job(tmp_path / "run"))
    g = stages.train_generator(place)[0]
    assert_same(weights(g), weights(whole("generator")[0]))
    saved = stages.prior_stage(place, "ldebm-coupled", g).load()
    assert saved["progress"]["step"] == 40 and saved["progress"]["batch"] == 15, "not in mid-epoch"
    prior, end, log = stages.train_prior(place, "ldebm-coupled", g)
    assert_same(weights(prior), weights(whole("ldebm-coupled")[0]))
    assert log_of(log) == log_of(whole("ldebm-coupled")[2])
    assert torch.equal(
        measure.sample_prior(place, prior, 9)[0], measure.sample_prior(place, whole("ldebm-coupled")[0], 9)[0]
    )


def test_a_prior_belongs_to_one_generator(whole, tmp_path):
    p = whole("place")
    whole("ldebm")
    other = GeneratorModel(Generator(p.cfg, make_gen(7, "x"))).learned()
    with pytest.raises(ValueError, match="other settings.*generator"):
        stages.train_prior(p, "ldebm", other)


def test_resume_false_starts_afresh(tmp_path):
    short = "gen_steps=4 checks=1"
    p = ij.open_job(job(tmp_path / "run", short))
    a = stages.train_generator(p)
    seen, real = [], StageTask.weights
    q = ij.open_job(job(tmp_path / "run", short, resume=False))
    try:
        StageTask.weights = lambda self, at, steps: (seen.append(at), real(self, at, steps))[1]
        b = stages.train_generator(q)
    finally:
        StageTask.weights = real
    assert seen == [0, 1, 2, 3] and log_of(a[2]) == log_of(b[2])
    assert_same(weights(a[0]), weights(b[0]))
    with pytest.raises(ValueError, match="other settings.*gen_steps: 4 -> 5"):
        ij.open_job(job(tmp_path / "run", short.replace("4", "5")))


# -- bad input

BAD = [
    (dict(systems="ldebm nonsense"), "unknown system 'nonsense'. Known: gaussian"),
    (dict(systems="ldbem"), "unknown system 'ldbem'; did you mean 'ldebm'"),
    (dict(systems=" "), "systems is empty"),
    (dict(preset="huge"), "no preset 'huge' for 'digits'; there is quick"),
    (dict(objective="consitent"), "unknown objective 'consitent'; did you mean 'consistent'"),
    (dict(dataset="digit", preset="small"), "unknown data set 'digit'; did you mean 'digits'"),
    (dict(dataset="digit"), "unknown data set 'digit'; did you mean 'digits'"),
    (dict(settings="langevin_stps=3"), "unknown setting 'langevin_stps'; did you mean 'langevin_steps'"),
    (dict(settings="T"), "settings 'T': write name=value"),
    (dict(settings="T=three"), "setting T='three' must be int"),
    (dict(settings="spectral=yes"), "setting spectral='yes' must be bool"),
    (dict(settings="layers='1x4x96'"), "layers: '1x4x96' is not side x channels x width x blocks"),
    (dict(settings="layers=''"), "layers is empty"),
    (dict(settings="layers='4x2x8x0 1x2x8x0'"), "as large as the one above or a multiple"),
    (dict(settings="layers='3x2x8x0'"), "bottom layer of side 3 does not divide pictures of side 8"),
    (dict(settings="layers='1x2x8x0 1x2x9x0'"), "layers of equal size share their features"),
    (dict(settings="layers='1x0x8x0'"), "channels must be positive"),
    (dict(settings="layer_free_nats='1 2'"), "layer_free_nats has 2 numbers for 3 layers"),
    (dict(settings="layer_free_nats='1 two 3'"), "layer_free_nats='1 two 3' must be numbers"),
    (dict(settings="layer_free_nats='1 -2 3'"), "layer_free_nats must not be negative"),
    (dict(settings="batch=4000"), 'digits has 1257 training pictures, fewer than batch=4000: settings="batch=1024"'),
    (
        dict(settings="limit=50 batch=10"),
        'digits has 50 training pictures, fewer than gen_batch=128: settings="gen_batch=32"',
    ),
    (dict(settings="mixed_precision=fp16"), "mixed_precision 'fp16' needs a GPU; on a CPU use 'bf16' or 'no'"),
    (dict(settings="mixed_precision=fp8"), "setting mixed_precision='fp8' .* must be one of"),
    (
        dict(objective="published", systems="ldebm ddpm"),
        "objective 'published' is one of the diffusion EBM: leave other systems to 'consistent'",
    ),
    (dict(objective="robust", systems="joint-ebm"), "objective 'robust' is one of the diffusion EBM"),
    (dict(settings="schedule=published"), "schedule 'published' does not go with objective 'consistent'"),
    (dict(objective="robust", settings="schedule=cosine"), "schedule 'cosine' does not go with objective 'robust'"),
    (dict(settings="schedule=linear"), "setting schedule='linear' .* must be one of"),
    (dict(settings="T=0"), "setting T=0 .* must be at least 1"),
    (dict(settings="T=500"), "levels T must be an integer from 1 to 250"),
    (dict(steps=-1), "setting steps=-1 .* must be at least 1"),
    (dict(gen_steps=-3), "setting gen_steps=-3 .* must be at least 1"),
    (dict(n_samples=-5), "setting n_samples=-5 .* must be at least 2"),
    (dict(seed=-1), "seed must not be negative"),
    (dict(threads=-1), "threads must not be negative"),
    (dict(settings="w_kl=-.1"), "setting w_kl=-0.1 .* must be at least 0"),
    (dict(settings="tune='1 -1'"), "KL weights must not be negative"),
    (dict(settings="tune=''", systems="gaussian-tuned"), "tune is empty: the system gaussian-tuned"),
    (dict(settings="tune='a'"), "tune='a' must be numbers"),
    (dict(settings="labelled=1.5"), "setting labelled=1.5 .* must be at least 0 and at most 1"),
    (dict(settings="rho=1."), r"rho must lie in \[0, 1\)"),
    (dict(settings="joint_rho=1.5"), r"rho must lie in \[0, 1\), got 1.5"),
    (dict(settings="ema=1."), r"ema must lie in \[0, 1\)"),
    (dict(settings="gen_ema=-.1"), "setting gen_ema=-0.1 .* must be at least 0"),
    (dict(settings="symbol_temperature=0."), "setting symbol_temperature=0.0 .* must be above 0"),
    (dict(settings="energy_hidden=0"), "setting energy_hidden=0 .* must be at least 1"),
    (dict(settings="w_cls=-1."), "setting w_cls=-1.0 .* must be at least 0"),
    (dict(settings="lr=0."), "setting lr=0.0 .* must be above 0"),
    (dict(settings="gen_lr=-1."), "setting gen_lr=-1.0 .* must be above 0"),
    (dict(settings="clip=-1."), "setting clip=-1.0 .*0 for any.* must be at least 0"),
    (dict(settings="score_levels=1"), "setting score_levels=1 .* must be at least 2"),
    (
        dict(settings="clf_preset=huge"),
        "setting clf_preset='huge' .* must be one of 'digits', 'small', 'medium', 'cifar10', 'paper'",
    ),
    (dict(settings="likelihood=poisson"), "setting likelihood='poisson' .* must be one of"),
    (dict(settings="sigma=0."), "setting sigma=0.0 .* must be above 0"),
    (dict(settings="langevin_steps=0"), "setting langevin_steps=0 .* must be at least 1"),
    (dict(settings="checks=0"), "setting checks=0 .* must be at least 1"),
    (dict(settings="size=16"), "digits has pictures of 8 pixels a side, not 16"),
    (dict(settings="levels=300"), "300 cannot be made of them"),
    (dict(settings="weighting=none", objective="robust"), "setting weighting='none' .* must be one of"),
    (dict(settings="objective=published"), "'objective' is a parameter of its own"),
    (dict(attributes="table.csv"), "digits has its own labels; attributes_csv is for pictures in files"),
    (dict(device="tpu"), "unknown device 'tpu'"),
    (dict(on_bad="ignore"), "on_bad must be 'error' or 'skip'"),
    (dict(variant="a b"), "variant"),
]


@pytest.mark.parametrize("bad,says", BAD)
def test_bad_input_writes_nothing(tmp_path, bad, says):
    with pytest.raises(ValueError, match=says):
        ij.open_job(ImageJob(**{**dict(out="run", results="results", device="cpu"), **bad}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train_digits", "train_images"])
def test_parameters_cells_have_the_names_of_the_dataclass(name):
    path = ROOT / "nbs" / f"{name}.ipynb"
    (cell,) = [
        c
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if "parameters" in c["metadata"].get("tags", [])
    ]
    ns = {}
    exec("".join(cell["source"]), ns)
    values = {k: v for k, v in ns.items() if not k.startswith("__")}
    assert notebook_params(ImageJob, values).preset == "quick"
    with pytest.raises(ValueError, match="unknown parameter 'sead'.*'seed'"):
        notebook_params(ImageJob, {**values, "sead": 1})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_digits", "train_images"])
def test_every_cell_of_a_job_runs_shrunk(tmp_path, name):
    "With a coupled prior, which half of the cells are for"
    given = dict(systems="ldebm ldebm-coupled", settings=TINY + " n_samples=70", out=str(tmp_path / "run"))
    args = [word for key, value in given.items() for word in ("-r", key, value)]
    command = [sys.executable, "-m", "papermill", "--cwd", ".", "--kernel", "python3", "--no-progress-bar"]
    res = subprocess.run(
        [*command, str(ROOT / "nbs" / f"{name}.ipynb"), "out.ipynb", *args], capture_output=True, text=True
    )
    assert res.returncode == 0, res.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "ldebm-coupled" / "result.json").read_text())["metrics"]
    assert any(key.startswith("control_") for key in metrics)


@pytest.mark.parametrize("objective", list(ij.OBJECTIVES))
def test_every_preset_resolves(objective):
    for dataset, preset in ij.PRESETS:
        s = ij.resolve(ImageJob(dataset="celeba" if dataset == "*" else dataset, preset=preset, objective=objective))
        assert s == replace(
            ImageSettings(), **ij.PRESETS[dataset, preset] | ij.OBJECTIVES[objective] | dict(objective=objective)
        )
    assert (
        ij.resolve(ImageJob(objective=objective, steps=7, gen_steps=8, n_samples=9, settings="steps=11 beta1=.5")).steps
        == 11
    )  # settings have the last word


def test_results_of_other_settings_refused_before_work(tmp_path):
    res = str(tmp_path / "results")
    p = ij.open_job(job(tmp_path / "run", results=res, systems="ldebm"))
    measure.finish(p, "ldebm", dict(a=metric(1.0)), None, 1.0)
    with pytest.raises(ValueError, match="already records a run with other settings.*rho"):
        ij.open_job(job(tmp_path / "other", "rho=.5", results=res, systems="ldebm"))
    assert not (tmp_path / "other").exists()
    ij.open_job(job(tmp_path / "other", "rho=.5", results=res, systems="ldebm", variant="rho5"))


# -- pictures in files


def pictures(path, n=120, classes=True, bad=None):
    "A zip of small pictures, of which one may be cut short"
    import io

    from PIL import Image

    g = make_gen(0, "zip")
    with zipfile.ZipFile(path, "w") as z:
        for i in range(n):
            f = io.BytesIO()
            Image.fromarray(torch.randint(256, (8, 8, 3), generator=g, dtype=torch.uint8).numpy()).save(f, "PNG")
            data = f.getvalue()
            z.writestr(f"{'ab'[i % 2] + '/' if classes else ''}{i:03}.png", data[:40] if i == bad else data)
    return str(path)


SMALL = (
    TINY.replace("limit=300", "limit=0").replace("n_samples=60", "n_samples=100")
    + " likelihood=gaussian gen_batch=16 batch=16 cells='' layer_free_nats=''"
)


def test_a_corrupt_picture_in_a_zip(tmp_path):
    "Named and fatal; or, when asked, named and left out"
    path = pictures(tmp_path / "mine.zip", bad=17)
    kw = dict(dataset=path, preset="small", settings=SMALL)
    with pytest.raises(BadImage, match=r"mine.zip: corrupt picture b/017.png .*on_bad='skip'"):
        ij.open_job(job(tmp_path / "run", **kw))
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="left out 1 corrupt picture: b/017.png"):
        p = ij.open_job(job(tmp_path / "run", on_bad="skip", **kw))
    assert sum(map(len, p.images.values())) == 119 and p.run.path.exists() and ij.corpus_name(p) == "mine"
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="broken.zip is not a zip, or is cut short"):
        ij.open_job(job(tmp_path / "other", **{**kw, "dataset": str(tmp_path / "broken.zip")}))
    with pytest.raises(FileNotFoundError, match="none.zip"):
        ij.open_job(job(tmp_path / "other", **{**kw, "dataset": str(tmp_path / "none.zip")}))
    whole = dict(kw, dataset=pictures(tmp_path / "whole.zip"), settings=SMALL + " size=24 layers='6x1x8x0'")
    with pytest.raises(ValueError, match="energies need maps whose side is a power of two, got 6"):
        ij.open_job(job(tmp_path / "other", **whole))
    assert not (tmp_path / "other").exists()


def test_a_folder_or_zip_is_never_filed_under_the_name_of_a_set(tmp_path):
    "Nor are two that differ filed as one; a set's own name may be written in other ways"

    def opened(path, **kw):
        return ij.open_job(
            job(tmp_path / f"out{path.parent.name}{path.name}", dataset=str(path), preset="small", settings=SMALL, **kw)
        )

    named = {}
    for name in ("digits.zip", "CIFAR-10.zip", "few.v2.zip"):
        for where in ("a", "b"):
            (tmp_path / where).mkdir(exist_ok=True)
            p = opened(Path(pictures(tmp_path / where / name, n=120 if where == "a" else 124)))
            named[where, name] = ij.record_name(p, "ldebm")["corpus"], ij.record_settings(p, "ldebm")["data"]
            assert p.run.settings["dataset"] == named[where, name][0]
    assert [named["a", o][0] for o in ("digits.zip", "CIFAR-10.zip", "few.v2.zip")] == [
        "file-digits",
        "file-CIFAR-10",
        "few.v2",
    ]
    for name in ("digits.zip", "few.v2.zip"):
        assert named["a", name][0] == named["b", name][0] and named["a", name][1] != named["b", name][1]

    def place(dataset, name):
        return ij.ImagePlace(
            None, ImageJob(dataset=dataset), ImageSettings(), None, dict(train=SimpleNamespace(name=name)), None, ""
        )

    assert ij.corpus_name(place("x/cifar-10-batches-bin", "cifar10")) == "cifar-10-batches-bin", (
        "files in that format may hold anything"
    )
    assert (
        ij.corpus_name(place("x/cifar-10-binary.tar.gz", "cifar10")) == "cifar10"
        and ij.corpus_name(place("cifar10", "cifar10-jpeg")) == "cifar10-jpeg"
    )
    a, b = (ij.open_job(job(tmp_path / name, dataset=name)) for name in ("digits", "Digits"))
    assert (
        ij.record_name(a, "ldebm") == ij.record_name(b, "ldebm")
        and ij.record_settings(a, "ldebm") == ij.record_settings(b, "ldebm")
        and "data" not in ij.record_settings(a, "ldebm")
    )


def test_pictures_without_labels(tmp_path):
    "The classifier learns how far a picture is turned; a coupled prior is refused; an uncoupled one is recorded"
    path = pictures(tmp_path / "plain.zip", classes=False)
    kw = dict(dataset=path, preset="small", settings=SMALL + " clf_preset=digits steps=4 gen_steps=4 clf_steps=3")
    with pytest.raises(ValueError, match="plain has no labels to couple to: leave out the system ldebm-coupled"):
        ij.open_job(job(tmp_path / "run", **kw))
    assert not (tmp_path / "run").exists()
    p = ij.open_job(job(tmp_path / "run", **{**kw, "systems": "ldebm"}))
    v = stages.labelled_images(p.images)["train"]
    n = len(p.images["train"])
    assert (
        v.attributes == {"turn": ("0", "90", "180", "270")}
        and len(v) == 4 * n
        and v.labels[:, 0].tolist() == [k for k in range(4) for _ in range(n)]
    )
    assert torch.equal(v.pixels[n + 3], p.images["train"].pixels[3].rot90(1, (1, 2))) and torch.equal(
        v.pixels[2 * n], p.images["train"].pixels[0].flip(1, 2)
    )
    net, acc = stages.train_classifier(p)
    assert list(net.heads.values()) == [4] and list(acc) == ["turn"]
    g = stages.train_generator(p)[0]
    u = measure.sample_prior(p, stages.train_prior(p, "ldebm", g)[0], 4)[0]
    assert measure.decode_all(g, u).shape == (4, 3, 8, 8)
    metrics = measure.gaussian_metrics(p, measure.make_reference(p, g, net))
    assert metrics["frechet"]["value"] is not None
    for k, why in dict(
        class_kl="no labels", frechet_test="6 test pictures", frechet_real="needs 33", prior_hole_test="needs 40"
    ).items():  # six test pictures have no covariance
        assert (
            metrics[k]["value"] is None
            and metrics[k]["estimator"].startswith("absent: ")
            and why in metrics[k]["estimator"]
        )
    digits = ij.open_job(job(tmp_path / "digits")).images
    assert stages.labelled_images(digits) is digits


def folder(path, names, side=8, mode="RGB"):
    "A folder of pictures, no two alike"
    from PIL import Image

    for i, n in enumerate(names):
        (path / n).parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (side, side), bytes((7 * i + 5 * j) % 256 for j in range(3 * side * side))).convert(
            mode
        ).save(path / n)
    return str(path)


FEW = SMALL + " clf_preset=digits steps=2 gen_steps=2 clf_steps=2 checks=1 batch=8 gen_batch=8"


def test_what_a_late_stage_needs_is_asked_first(tmp_path):
    "Attributes, sides and numbers that would fail after training: left out, or refused with a remedy that works"
    path = folder(tmp_path / "mine", [f"train/{i}.png" for i in range(60)] + [f"test/{i}.png" for i in range(4)])
    (tmp_path / "a.csv").write_text(
        "file,fur,wings,name\n" + "".join(f"train/{i}.png,{'long short'.split()[i % 2]},0,n{i}\n" for i in range(60))
    )
    kw = dict(dataset=path, preset="small", settings=FEW, attributes=str(tmp_path / "a.csv"), systems="ldebm-coupled")
    with pytest.warns(UserWarning) as said:
        p = ij.open_job(job(tmp_path / "run", **kw))
    said = " ".join(str(w.message) for w in said)
    for part in (
        "name (60 different values)",
        "fewer than two values of 1 attributes, which are left out: wings",
        "4 of 64 pictures have no row",
        "frechet_test, frechet_real (4 test pictures",
    ):
        assert part in said
    assert all(list(v.attributes) == ["fur"] and v.labels.shape[1] == 1 for v in p.images.values())
    acc = stages.train_classifier(p)[1]
    said = figures.generator_text(SimpleNamespace(step=3, seconds=1.0), [], acc)
    assert said == "generator: 3 steps, 1 s; classifier (fur): no test picture has a label"  # labels for training only
    (tmp_path / "b.csv").write_text("file,wings\n" + "".join(f"train/{i}.png,0\n" for i in range(60)))
    with (
        pytest.raises(ValueError, match="no labels to couple to: leave out the system ldebm-coupled"),
        pytest.warns(UserWarning, match="left out: wings"),
    ):
        ij.open_job(job(tmp_path / "other", **{**kw, "attributes": str(tmp_path / "b.csv")}))
    with pytest.raises(
        ValueError,
        match="57 training pictures, and a Frechet distance in 64 features needs 65.*clf_preset=digits",
    ):
        ij.open_job(job(tmp_path / "other", **{**kw, "settings": FEW.replace("clf_preset=digits", "clf_preset=small")}))
    assert not (tmp_path / "other").exists()


def test_too_few_pictures_are_told_of_at_once(tmp_path):
    "With settings that work as they stand"
    path = folder(tmp_path / "few", [f"{i}.png" for i in range(40)], side=16)
    kw = dict(dataset=str(path), preset="quick", systems="ldebm", out=str(tmp_path / "run"), device="cpu", threads=1)
    with pytest.raises(ValueError, match="36 training pictures") as error:
        ij.open_job(ImageJob(**kw))
    remedy = re.search('settings="([^"]*)"', str(error.value))[1]
    assert remedy == "clf_preset=digits gen_batch=32 batch=32" and not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="not computed, for want of data"):
        assert ij.open_job(ImageJob(**kw, settings=remedy)).run.path.exists()


@pytest.mark.parametrize("remedy", ["size=32", "layers='2x1x8x0 4x1x8x0'"])
def test_a_side_that_no_layer_divides(tmp_path, remedy):
    path = folder(tmp_path / "mnist", [f"{c}/{i}.png" for c in "01" for i in range(30)], side=28)
    kw = dict(dataset=path, preset="small", systems="ldebm")
    with pytest.raises(
        ValueError,
        match='side 16 does not divide pictures of side 28: settings="size=32" resamples.* last side is 4 or less',
    ):
        ij.open_job(job(tmp_path / "run", **{**kw, "settings": FEW + " layers='4x1x8x0 16x1x8x0'"}))
    assert not (tmp_path / "run").exists()
    p = ij.open_job(job(tmp_path / "run", **{**kw, "settings": FEW + f" layers='4x1x8x0 16x1x8x0' {remedy}"}))
    assert stages.train_generator(p)[1].step == 2
    with pytest.raises(
        ValueError, match="does not divide pictures of side 8: give layers whose last side is 8 or less"
    ):
        ij.open_job(job(tmp_path / "d", "layers='16x1x8x0'"))
    ij.open_job(job(tmp_path / "d", "layers='8x1x8x0'"))


def test_names_that_somebody_gave(tmp_path):
    "Dollars, bars and other alphabets in classes: neither a figure nor a table nor a record minds"
    import matplotlib

    matplotlib.use("Agg")
    path = folder(tmp_path / "odd", [f"{c}/{i}.png" for c in ("$5", "a|b$", "犬") for i in range(20)])
    p = ij.open_job(job(tmp_path / "run", dataset=path, preset="small", settings=FEW, systems="ldebm-coupled"))
    assert p.images["train"].attributes == {"class": ("$5", "a|b$", "犬")}
    save_figure(
        p.run,
        "requests",
        figures.plot_rows([p.images["train"].x()[:3]] * 3, list(p.images["train"].attributes["class"])),
    )
    m = dict(
        control_accuracy=metric(0.5, n=2),
        frechet=measure.absent("2 samples"),
        density=metric(1.0),
        coverage=metric(1.0),
    )
    text = figures.control_table({"not a a|b$": m})
    assert text.splitlines()[-1] == r"| not a a\|b\$ | 0.500 | absent: 2 samples | 1.000 | 1.000 |"
    assert list(uses.request_metrics({"犬": m, "猫": m, "a b": m, "a-b": m}))[:4] == [
        "control_犬",
        "control_猫",
        "control_a_b",
        "control_a_b__2",
    ]


def test_one_snapshot_serves_the_run(tmp_path):
    "Pictures and table may change once the job is open; a later sitting with others is refused, and says why"
    path = folder(tmp_path / "mine", [f"{i}.png" for i in range(60)])
    table = tmp_path / "a.csv"
    text = "".join(f"{i}.png,{i % 2}\n" for i in range(60))
    table.write_text(text)
    kw = dict(dataset=path, preset="small", settings=FEW, attributes=str(table), systems="ldebm-coupled")
    p = ij.open_job(job(tmp_path / "run", **kw))
    whole = weights(stages.train_generator(ij.open_job(job(tmp_path / "undisturbed", **kw)))[0])
    for f in Path(path).iterdir():
        f.unlink()
    table.unlink()
    assert_same(weights(stages.train_generator(p)[0]), whole)
    with pytest.raises(ValueError, match="has no pictures"):
        ij.open_job(job(tmp_path / "run", **kw))
    folder(tmp_path / "mine", [f"{i}.png" for i in range(60)])
    with pytest.raises(FileNotFoundError, match="no such attribute file"):
        ij.open_job(job(tmp_path / "run", **kw))
    for changed in (text.replace("3.png,1", "3.png,0"), text):
        table.write_text(changed)
        if changed == text:
            folder(tmp_path / "mine", ["59.png"])  # another picture under an old name
        with pytest.raises(
            ValueError,
            match=r"have changed since the run in .*run began .* put them back, or start another run with out=",
        ):
            ij.open_job(job(tmp_path / "run", **kw))
        assert ij.open_job(job(tmp_path / f"new{len(list(tmp_path.iterdir()))}", **kw)).run.path.exists()  # the remedy
    folder(tmp_path / "mine", [f"{i}.png" for i in range(60)])
    assert ij.open_job(job(tmp_path / "run", **kw)).data == p.data  # put back


def quick(a, b, gen=None, **kw):
    "In place of a two-sample test that takes a second: the same conditions"
    if min(len(a), len(b)) < 20 or a.shape[1] != b.shape[1]:
        raise ValueError("too few points")
    return metric(0.5, n=len(a) + len(b))


def whole_job(p):
    "Everything that the page does with an opened job, figures apart. Metrics by system"
    g = stages.train_generator(p)[0]
    net, acc = stages.train_classifier(p)
    ref = measure.make_reference(p, g, net)
    system = p.job.systems
    done = measure.run_system(p, system, ref)
    results = {"gaussian": measure.gaussian_metrics(p, ref), system: done.metrics}
    measure.finish(p, "gaussian", results["gaussian"], None, 0.0)
    measure.add_metrics(p, system, done, strange.ood_metrics(strange.ood(p, done.prior, strange.outliers(p, 8), 8)))
    said = figures.generator_text(SimpleNamespace(step=3, seconds=1.0), [], acc) + figures.systems_table(results)
    if system == "ldebm-coupled":
        asked = uses.control_all(p, ref, done.prior, n=40)
        measure.add_metrics(p, system, done, uses.request_metrics(asked))
        measure.add_metrics(p, system, done, uses.reading_metrics(p, ref))
        attributes = p.images["train"].attributes
        steps, reports = uses.add_one_by_one(p, ref, done.prior, uses.in_turns(p, 20, *range(len(attributes))))
        assert len(steps) == len(reports) + 1 == len(attributes) + 1
        measure.add_metrics(p, system, done, uses.one_by_one_metrics(reports))
        said += (
            figures.control_table(asked)
            + figures.trade_off_table(uses.trade_off(p, ref, done.prior, (0.0, 2.0)))
            + figures.one_by_one_table(reports)
        )
    said.encode()  # no name breaks a page
    return {r: check_result(json.loads((p.run.path / r / "result.json").read_text()))["metrics"] for r in results}


def advised(one, why):
    "The job that a refusal advises, or `None` if it advises another folder or table"
    for layout in ("splits", "flat"):
        if f"layout='{layout}'" in why and one.layout != layout:
            return replace(one, layout=layout)
    if "leave out the system ldebm-coupled" in why:
        return replace(one, systems="ldebm")
    if "on_bad='skip'" in why:
        return replace(one, on_bad="skip")
    size = re.search(r'settings="(size=\d+)"', why)
    return replace(one, settings=f"{one.settings} {size[1]}") if size else None


def opened(one, folder):
    "The job after the advice of every refusal was followed, and the refusals; `None` if there is no advice left"
    said = []
    while one is not None and len(said) < 6:
        try:
            return ij.open_job(one), said
        except (ValueError, FileNotFoundError) as e:
            said.append(str(e))
            assert str(e) and "\n" not in str(e) and not (folder / "run").exists()
            one = advised(one, str(e))
    return None, said


@pytest.mark.slow
def test_any_folder_is_refused_or_ends_in_a_record(monkeypatch):
    "Whatever hypothesis draws: one clear sentence before training, or a complete record"
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.setattr(measure, "two_sample_auroc", quick)
    monkeypatch.setattr(measure, "frechet_metric", lambda a, b, gen=None: metric(image_metrics.frechet(a, b), n=len(a)))
    ended = []

    @settings(max_examples=18, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.data())
    def holds(data):
        with tempfile.TemporaryDirectory() as t, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = folders.write(f"{t}/p", data.draw(folders.trees(least=44, most=3)))
            table = data.draw(folders.tables(made))
            if table is not None:
                Path(t, "t.csv").write_text(table, encoding="utf-8", newline="")
            one = job(
                f"{t}/run",
                dataset=f"{t}/p",
                preset="small",
                settings=FEW
                + " langevin_steps=1 n_samples=40"
                + data.draw(st.sampled_from([" size=8", " size=8", ""])),
                attributes="" if table is None else f"{t}/t.csv",
                systems=data.draw(st.sampled_from(["ldebm", "ldebm-coupled"])),
                layout=data.draw(st.sampled_from(["auto", "auto", "auto", "flat", "splits"])),
                on_bad=data.draw(st.sampled_from(["skip", "skip", "skip", "error"])),
            )
            p, said = opened(one, Path(t))
            if p is None:
                return
            assert len(said) == len(set(said))  # no advice leads back to where it was given
            for metrics in whole_job(p).values():
                assert {
                    "frechet",
                    "frechet_test",
                    "class_kl",
                    "density",
                    "coverage",
                    "prior_hole_auroc",
                    "prior_hole_test",
                    "gap_closed",
                    "mmd_ratio",
                    "sample_seconds",
                } <= set(metrics)
                assert all(m["value"] is not None or m["estimator"].startswith("absent: ") for m in metrics.values())
            ended.append(p.job.systems)

    holds()
    assert ended.count("ldebm") > 1 and ended.count("ldebm-coupled") > 1  # not all refused


# -- labels


def test_hidden_labels_are_those_of_the_same_pictures(tmp_path):
    p = ij.open_job(job(tmp_path / "run", "labelled=.3"))
    hide, again = stages.hide_labels(p), stages.hide_labels(p)
    hidden = {}
    for h, g in (
        (hide, make_gen(1)),
        (hide, make_gen(2)),
        (again, make_gen(3)),
        (stages.hide_labels(ij.open_job(job(tmp_path / "run", "labelled=.3"))), None),
    ):
        for b in image_batches(p.images["train"], 32, gen=g):
            seen = h(b)
            assert torch.equal(seen.x, b.x) and (seen.labels[seen.labels >= 0] == b.labels[seen.labels >= 0]).all()
            for i, y in zip(b.index.tolist(), seen.labels[:, 0].tolist()):
                assert hidden.setdefault(i, y < 0) == (y < 0)
    assert len(hidden) == 300 and 0.6 < sum(hidden.values()) / 300 < 0.8
    other = (
        stages.hide_labels(replace(p, job=replace(p.job, seed=1)))(
            next(iter(image_batches(p.images["train"], 300)))
        ).labels[:, 0]
        < 0
    )
    assert other.tolist() != [hidden[i] for i in range(300)]
    assert stages.hide_labels(ij.open_job(job(tmp_path / "all"))) is None


def test_hidden_labels_train_and_validate(tmp_path, whole):
    "Also with more pictures to validate on than to train on, whose labels are all known"
    p = ij.open_job(job(tmp_path / "run", "labelled=.3 limit=100 steps=4 checks=1", systems="ldebm-coupled"))
    assert len(p.images["valid"]) > len(p.images["train"])
    g, seen = whole("generator")[0], []
    model = stages.build_prior(p, "ldebm-coupled", g)
    real = model.prior.terms
    model.prior.terms = lambda q, u, gen=None, labels=None, **kw: (
        seen.append(labels.clone()),
        real(q, u, gen, labels=labels, **kw),
    )[1]
    StageTask(p.images, model, None, 4, 32, 1, 0, stages.hide_labels(p)).validate()
    assert torch.equal(torch.cat(seen), p.images["valid"].labels[:, 0])
    log = stages.train_prior(p, "ldebm-coupled", g)[2]
    none = stages.train_prior(
        ij.open_job(job(tmp_path / "none", "labelled=0. steps=4 checks=1 limit=100", systems="ldebm-coupled")),
        "ldebm-coupled",
        g,
    )[2]
    a, b = ([o["cls_t"] for o in lines if o["kind"] == "train"] for lines in (log, none))
    assert 0 < a[0] < 2 and b[0] == 0  # a third of ln 10, and nothing


# -- systems


@pytest.mark.parametrize("extra", ["", MAPS])
@pytest.mark.parametrize("system", SYSTEMS)
def test_models_come_back(system, extra, whole, tmp_path):
    "From the file alone: the same weights, the same samples, the same pictures"
    if not extra:
        p, g, prior = whole("place"), whole("generator")[0], whole(system)[0]
    else:
        # with a temperature of the symbols
        own = dict(objective="robust", systems=system) if system.startswith("ldebm") else {}
        p = ij.open_job(job(tmp_path / "run", f"{extra} steps=3 gen_steps=2 checks=1", **own))
        g = stages.train_generator(p)[0]
        prior = stages.train_prior(p, system, g)[0]
    g2, prior2 = stages.load_prior(stages.save_prior(p, system, g, prior))
    assert_same(weights(g2), weights(g))
    assert (
        g2.cfg == g.cfg
        and not g2.training
        and not prior2.training
        and not any(q.requires_grad for q in g2.parameters())
    )
    asks = [dict()] + ([dict(y=torch.arange(5))] if system == "ldebm-coupled" else [])
    for kw in asks:
        a, b = (measure.sample_prior(p, o, 5, **kw)[0] for o in (prior, prior2))
        assert torch.equal(a, b) and torch.equal(measure.decode_all(g, a), measure.decode_all(g2, b))
    if isinstance(prior, DiffusionEBM):
        t = torch.zeros(5, dtype=torch.long)
        assert torch.equal(prior.energy(a, t), prior2.energy(a, t)) and prior2.energy.symbol_temperature == (
            0.1 if extra and system == "ldebm-coupled" else 1.0
        )
        assert (
            prior2.cfg == prior.cfg
            and prior2.T == (1 if system == "joint-ebm" else 2)
            and prior2.energy.generator is g2
        )
    assert prior2.n_symbols == {"ldebm-coupled": 10, "ddpm": 0}.get(system, 1)


def test_a_model_and_a_run_in_old_words_come_back(whole, tmp_path):
    "Files as earlier versions wrote them"
    names = {new: old for old, new in RENAMED.items()}

    def in_old_words(about):
        return {names.get(k, k): v for k, v in about.items()}

    p, g, prior = whole("place"), whole("generator")[0], whole("ldebm")[0]
    tensors, about = load_tensors(stages.save_prior(p, "ldebm", g, prior))
    old = in_old_words(about) | dict(settings=in_old_words(about["settings"]))
    assert old["row"] == "ldebm" and {"b2", "tau_y", "floors"} <= set(old["settings"])
    g2, prior2 = stages.load_prior(save_tensors(tmp_path / "model.safetensors", tensors, old))
    assert prior2.cfg == prior.cfg
    assert_same(weights(g2), weights(g))
    assert_same(weights(prior2), weights(prior))
    place = ij.open_job(job(tmp_path / "run"))
    text = json.dumps(in_old_words(place.run.settings))
    place.run.file("settings.json").write_text(text)
    assert ij.open_job(job(tmp_path / "run")).run.hash == place.run.hash
    assert place.run.file("settings.json").read_text() == text
    with pytest.raises(ValueError, match="other settings .*squared_step: 0.0002 -> 0.1"):
        ij.open_job(job(tmp_path / "run", "squared_step=.1", objective="robust", systems="ldebm"))


def test_what_is_no_model(whole, tmp_path):
    with pytest.raises(ValueError, match="holds no image prior: it wants the model.safetensors of a system"):
        stages.load_prior(whole("place").run.file("classifier.safetensors"))
    path = stages.save_prior(whole("place"), "ldebm", whole("generator")[0], whole("ldebm")[0])
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="cut.safetensors"):
        stages.load_prior(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("objective", list(ij.OBJECTIVES))
def test_gradients_that_the_optimiser_sees(objective, tmp_path, monkeypatch):
    "`published` clips nothing: Adam's first moment is (1 - beta1) times the gradient; the others keep the norm at 10"
    p = ij.open_job(
        job(
            tmp_path / "run",
            "steps=1 gen_steps=3 checks=1 joint_steps=0 warmup=0",
            objective=objective,
            systems="ldebm",
        )
    )
    g, found, clip = stages.train_generator(p)[0], {}, train.Accelerator.clip_grad_norm_

    def look(self, params, most, *args):
        params = list(params)
        for q in params:
            q.grad.mul_(1e5)
        found["raw"] = torch.cat([q.grad.flatten() for q in params]).double()
        norm = clip(self, params, most, *args)
        found["seen"] = torch.cat([q.grad.flatten() for q in params]).double()
        return norm

    monkeypatch.setattr(train.Accelerator, "clip_grad_norm_", look)
    _, _, log = stages.train_prior(p, "ldebm", g)
    assert found["raw"].norm() > 100 and [o["norm_ebm"] for o in log if o["kind"] == "train"] == pytest.approx(
        [found["raw"].norm().item()], rel=1e-4
    )
    if objective == "published":
        assert torch.equal(found["seen"], found["raw"])
    else:
        assert found["seen"].norm().item() == pytest.approx(10, rel=1e-4)
    state = p.run.path / "ldebm" / "checkpoint.safetensors"
    moments = torch.cat(
        [v.flatten() for k, v in load_tensors(state)[0].items() if ".optimizer." in k and k.endswith("exp_avg")]
    ).double()
    wd = p.settings.decay  # torch's L2 decay joins the gradient
    assert (moments.norm() / found["seen"].norm()).item() == pytest.approx(
        1 - p.settings.beta1, rel=1e-2 if wd else 1e-4
    )


@pytest.mark.parametrize("objective", list(ij.OBJECTIVES))
@pytest.mark.parametrize("extra", ["", MAPS])
def test_objectives_train(objective, extra, tmp_path):
    "A few steps of each, coupled, on vectors and maps: finite terms, and the constants of the objective in force"
    p = ij.open_job(
        job(
            tmp_path / "run",
            f"{extra} steps=4 gen_steps=3 checks=2 joint_steps=0",
            objective=objective,
            systems="ldebm-coupled",
        )
    )
    g = stages.train_generator(p)[0]
    before = stages.generator_hash(g)
    prior, end, log = stages.train_prior(p, "ldebm-coupled", g)
    assert end.step == 4 and stages.generator_hash(g) == before, "frozen"
    terms = {k for o in log for k in o}
    assert (
        {"ebm", "cls_t", "sym", "mi", "loss", "norm_ebm"} <= terms
        and ("accept" in terms) == (objective == "consistent")
        and "nll" not in terms
    )
    assert all(torch.tensor(v).isfinite() for o in log for k, v in o.items() if isinstance(v, float))
    assert (
        prior.published == (objective != "consistent")
        and prior.energy.nets.contexts == ((0, 16) if not extra else (0, 8) if extra else ())
        if objective == "consistent"
        else not any(prior.energy.nets.contexts)
    )
    if objective == "published":
        assert (prior.cfg.squared_step, prior.cfg.weighting, prior.energy.symbol_temperature) == (
            3e-5,
            "likelihood",
            0.1,
        ) and p.settings.ema == 0
    assert measure.sample_prior(p, prior, 4, y=torch.arange(4))[0].isfinite().all()


def test_tune_gaussian_keeps_the_best(tmp_path, whole, monkeypatch):
    "The smallest distance to validation pictures, wherever it stands; distances are of the generators' own samples"
    p, net = ij.open_job(job(tmp_path / "run", "gen_steps=6 checks=1 tune='.1 1 4'")), whole("classifier")[0]
    g, w, dist, end = measure.tune_gaussian(p, net)
    assert list(dist) == [0.1, 1.0, 4.0] and dist[w] == min(dist.values()) and end.step == 6
    fv = classifier.features_of(net, p.images["valid"])
    for k in dist:
        gk = stages.train_generator(p, k)[0]
        assert dist[k] == pytest.approx(
            image_metrics.frechet(classifier.features_of(net, gk.sample(60, gen=make_gen(0, "tune"))), fv)
        )
        assert (stages.generator_hash(gk) == stages.generator_hash(g)) == (k == w)
    for made, best in (([3.0, 1.0, 2.0], 1.0), ([1.0, 2.0, 3.0], 0.1), ([3.0, 2.0, 1.0], 4.0)):
        monkeypatch.setattr(measure, "frechet", lambda a, b, made=iter(made): next(made))
        g, w, *_ = measure.tune_gaussian(p, net)
        assert w == best and stages.generator_hash(g) == stages.generator_hash(stages.train_generator(p, best)[0])


@pytest.fixture(scope="module")
def reference(whole):
    return measure.make_reference(whole("place"), whole("generator")[0], whole("classifier")[0])


@pytest.mark.slow
def test_records(whole, reference, tmp_path):
    "One valid record for each system, under its name in the run and, when asked, in the folder of results"
    p = whole("place")
    assert reference.u.shape == (60, 5) and reference.u_test.shape == (360, 5)
    done = {r: measure.run_system(p, r, reference) for r in ("ldebm", "ddpm")}
    again = measure.score(p, reference, done["ldebm"].u)
    assert again == {k: done["ldebm"].metrics[k] for k in again}, "the same numbers from the same seed"
    for r in ("ldebm-coupled", "joint-ebm"):
        stages.save_prior(p, r, whole("generator")[0], whole(r)[0])
        measure.finish(
            p,
            r,
            {**again, **measure.cost(p, r, whole(r)[1], 1.0, 60), **measure.chain_health(p, reference, whole(r)[0])},
            whole(r)[1],
            1.0,
        )
    for r in SYSTEMS:
        rec = check_result(json.loads((p.run.path / r / "result.json").read_text()))
        assert (rec["system"], rec["corpus"], rec["preset"], rec["objective"], rec["seed"]) == (
            r,
            "digits",
            "quick",
            "consistent",
            0,
        )
        m = rec["metrics"]
        assert {
            "frechet",
            "frechet_recon",
            "frechet_gaussian",
            "density",
            "coverage",
            "prior_hole_auroc",
            "prior_hole_auroc_1",
            "mmd",
            "spread",
            "sample_evaluations",
            "train_seconds",
        } <= set(m)
        assert ("spread_long" in m) == (r != "ddpm") and (p.run.path / r / "model.safetensors").exists()
        assert m["sample_evaluations"]["value"] == {"joint-ebm": 2 * 2 + 1, "ddpm": 6}.get(r, 2 * (2 + 1))
        assert rec["settings"]["langevin_steps"] == 2 and rec["settings"]["n_train"] == 300
    table = figures.systems_table({r: d.metrics for r, d in done.items()})
    assert table.count("\n") == 3 and all(ij.SYSTEMS[r] in table for r in done)
    q = replace(p, job=replace(p.job, results=str(tmp_path / "results"), variant="tiny"))
    path = measure.add_metrics(q, "ldebm", done["ldebm"], dict(more=metric(0.5)))
    assert (
        path == tmp_path / "results" / "runs" / "digits" / "quick" / "ldebm+tiny-consistent-s0.json"
        and json.loads(path.read_text())["metrics"]["more"]["value"] == 0.5
    )
    assert measure.finish(p, "gaussian", again, None, 0.0).parent == p.run.path / "gaussian"
    with pytest.raises(ValueError, match="metrics.bad"):
        measure.finish(q, "ddpm", dict(bad=dict(value=float("nan"), interval=None, n=1, estimator="")), None, 1.0)
    assert [o for o in (tmp_path / "results").rglob("*.json")] == [path]


def test_evaluations_are_counted(whole, monkeypatch):
    "Gradients of the energy for one sample, as recorded"
    n, real = [], langevin.energy_grad
    monkeypatch.setattr(langevin, "energy_grad", lambda *a, **kw: (n.append(1), real(*a, **kw))[1])
    for system in ("ldebm", "joint-ebm"):
        prior = whole(system)[0]
        n.clear()
        measure.sample_prior(whole("place"), prior, 3)
        assert len(n) == measure.evaluations(whole("place"), system)


def test_same_seed_same_numbers(whole, reference):
    p = whole("place")
    u = measure.sample_prior(p, whole("ldebm")[0], 60)[0]
    assert torch.equal(measure.sample_prior(p, whole("ldebm")[0], 60)[0], u)
    again = measure.make_reference(p, whole("generator")[0], whole("classifier")[0])
    assert torch.equal(again.u, reference.u) and (again.recon, again.gaussian) == (reference.recon, reference.gaussian)
    other = measure.sample_prior(replace(p, job=replace(p.job, seed=1)), whole("ldebm")[0], 60)[0]
    assert not torch.equal(other, u)


def test_control_and_outliers(whole, reference):
    p, prior = whole("place"), whole("ldebm-coupled")[0]
    y = uses.in_turns(p, 25, 0)
    assert y.shape == (25, 1) and y[:, 0].tolist() == [i % 10 for i in range(25)]
    m, x = uses.control(p, reference, prior, uses.in_turns(p, 40, 0), 2.0)
    assert x.shape == (40, 1, 8, 8) and 0 <= m["control_accuracy"]["value"] <= 1 and m["control_accuracy"]["n"] == 40
    curve = uses.trade_off(p, reference, prior, (0.0, 1.0), 40)
    assert list(curve) == [0.0, 1.0] and {"control_accuracy_g0", "coverage_g1"} <= set(uses.control_metrics(curve))
    assert set(uses.requests(p, 20)) == {"class", "not a class"}
    no = uses.requests(p, 20)["not a class"]
    assert no.shape == (20, 10) and (~no).sum(1).tolist() == [1] * 20


def test_outliers_are_scored_and_the_choice_is_made_elsewhere(whole):
    p, prior, ddpm = whole("place"), whole("ldebm-coupled")[0], whole("ddpm")[0]
    known, sets = strange.known_outliers(p, 12), strange.outliers(p, 12)
    assert not set(known) & set(sets), "a score is chosen on other kinds than it is tested on"
    chosen = strange.choose_score(strange.ood(p, prior, known, 12, "valid"))
    res = strange.ood(p, prior, {k: sets[k] for k in ("permuted", "noise")}, 12, ddpm=ddpm)
    got = strange.ood_metrics(res, chosen)
    by_layer = {f"{s}_{k}_{i}" for s in strange.SCHEMES for k in ("permuted", "noise") for i in range(2)}
    by_layer -= {"ratio_permuted_0", "ratio_noise_0"}
    once = {f"{s}_{k}" for s in ("bound", "size", "corrected", "ddpm", "chosen") for k in ("permuted", "noise")}
    assert set(got) == {f"ood_{name}" for name in by_layer | once}
    for k in ("permuted", "noise"):
        assert got[f"ood_chosen_{k}"]["value"] == got[f"ood_{chosen[0]}_{k}_{chosen[1]}"]["value"]
    assert "ood_ddpm_noise" not in strange.ood_metrics(strange.ood(p, prior, {"noise": sets["noise"]}, 12))
    assert all(0 <= v["value"] <= 1 for v in got.values())


def test_small_preset_is_small():
    s = ij.resolve(ij.ImageJob(dataset="cifar10", preset="small"))
    cfg = GeneratorCfg(
        shape=(3, 32, 32),
        **ij.parse_layers(s.layers),
        cells=ij.parse_cells(s.cells),
        enc_blocks=s.enc_blocks,
        likelihood=s.likelihood,
        levels=256,
        mixtures=s.mixtures,
    )
    cost = multiply_adds(Generator(cfg))
    assert len(set(cfg.sizes)) == 4 and s.limit == 0
    assert cost["tower"] <= 10_000_000 and sum(cost.values()) <= 30_000_000
    assert s.T * (s.langevin_steps + 1) <= 110  # a sample's evaluations, about those of its DDPM
    paper = ij.parse_layers(ij.resolve(ij.ImageJob(dataset="cifar10", preset="paper")).layers)
    assert len(paper["sizes"]) >= 9


@pytest.mark.parametrize(
    ("curve", "when"), [([200, 90, 80, 140], 3), ([200, 90, 80, 84], None), ([200], None), ([], None)]
)
def test_a_generator_that_learns_pictures_by_heart_says_so(curve, when):
    log = [dict(kind="valid", step=step, nll=float(nll)) for step, nll in enumerate(curve, 1)]
    said = figures.generator_text(SimpleNamespace(step=len(curve), seconds=1.0), log, {})
    assert ("by heart" in said, f"gen_steps={when}" in said) == (when is not None, when is not None)
