"What an error advises is tried here, and works; what may be changed on a run is changed, and its record says so"

import dataclasses
import json
import random
import re

import pytest
import torch
from same import assert_same_state, same_log
from test_train import LINE, Countdown, Killed, Poisoned, line

from ldebm import image_job, image_stages, text_score
from ldebm.energy_task import fit_energies
from ldebm.image_job import ImageJob, ImageSettings
from ldebm.records import OPERATIONAL, SCORING, Run, identity
from ldebm.text_job import finish, open_job
from ldebm.text_measure import evaluate
from ldebm.text_settings import TextJob, TextSettings, resolve, train_cfg
from ldebm.toy_job import ToySettings
from ldebm.train import TrainCfg, fit

pytestmark = pytest.mark.usefixtures("in_test")
NET = (
    "embed=16 hidden=16 d=4 energy_hidden=8 n_blocks=1 langevin_steps=2 T=2 n_symbols=4 "
    "batch=16 energy_steps=8 energy_batch=16 nll_draws=0 lm= n_samples=20"
)


@pytest.fixture
def corpus(tmp_path):
    r, path = random.Random(0), tmp_path / "words.txt"
    path.write_text(
        "\n".join(" ".join(r.choices("one two three four five six".split(), k=r.randint(3, 8))) for _ in range(200))
    )
    return str(path)


def job_of(tmp_path, corpus, settings="", **kw):
    return TextJob(
        **dict(
            corpus=corpus,
            system="ldebm",
            settings=f"{NET} {settings}",
            steps=14,
            threads=1,
            device="cpu",
            out=str(tmp_path / "run"),
        )
        | kw
    )


def spoil(task, at):
    "An energy that is not a number, from a step on"
    real = task.weights

    def weights(step, *args):
        if step == at:
            with torch.no_grad():
                next(task.model.parameters()).fill_(float("nan"))
        return real(step, *args)

    task.weights = weights


def train(job):
    run, task, device = open_job(job)
    return run, task, fit(task, run, train_cfg(task.settings), job.seed, device)


# -- numbers that are not


def test_without_a_checkpoint_none_is_promised(tmp_path, corpus):
    job = job_of(tmp_path, corpus, "checkpoint_every=100")
    run, task, device = open_job(job)
    spoil(task, 3)
    with pytest.raises(
        FloatingPointError,
        match="at step 3 .*; there is no checkpoint yet: train anew in another folder, with a lower lr or lr_ebm",
    ):
        fit(task, run, train_cfg(task.settings), 0, device)
    assert not run.file("checkpoint.safetensors").exists()
    assert (
        train(dataclasses.replace(job, out=str(tmp_path / "another"), settings=job.settings + " lr=1e-4 lr_ebm=1e-4"))[
            2
        ].step
        == 14
    )


def test_what_is_advised_after_a_checkpoint_goes_on_and_is_on_record(tmp_path, corpus):
    job = job_of(tmp_path, corpus, "checkpoint_every=4 clip=1")
    run, task, device = open_job(job)
    spoil(task, 6)
    with pytest.raises(FloatingPointError) as e:
        fit(task, run, train_cfg(task.settings), 0, device)
    found = re.search(
        r"the last checkpoint is intact \(step 4\): to go on .* put (changes=\S+) into the settings", str(e.value)
    )
    assert found[1] == "changes=4:lr=0.0004,4:lr_ebm=0.0003"
    changed = dataclasses.replace(job, settings=f"{job.settings} {found[1]}")
    run, task, end = train(changed)
    assert end.step == 14 and [o["step"] for o in run.log_lines() if o["kind"] == "valid"][-1] == 14
    metrics, art = evaluate(task, 0)
    record = json.loads(finish(run, task, changed, metrics, art, 1.0).read_text())
    assert record["settings"]["changes"] == found[1].partition("=")[2] and record["settings"]["lr"] == 4e-3
    assert identity(record["settings"], scoring=False) != identity({**record["settings"], "changes": ""}, scoring=False)
    whole, _, _ = train(
        dataclasses.replace(changed, out=str(tmp_path / "whole"))
    )  # with the changes from the start: the same run
    assert_same_state({**run.load(), "progress": 0}, {**whole.load(), "progress": 0})
    assert same_log(run) == same_log(whole)


def test_energies_have_a_way_out_of_their_own(tmp_path, corpus):
    job = job_of(tmp_path, corpus, "checkpoint_every=2")
    run, task, end = train(job)
    good = {k: v.clone() for k, v in task.model.state_dict().items()}
    real, seen = task.model.prior.terms, []

    def terms(*args, **kw):
        seen.append(1)
        return {k: v * (float("nan") if len(seen) == 6 else 1) for k, v in real(*args, **kw).items()}

    task.model.prior.terms = terms
    with pytest.raises(FloatingPointError, match=r"put changes=4:energy_lr=0.0002 into the settings") as e:
        fit_energies(task, run, 0)
    task.model.prior.terms = real
    changes = re.search(r"changes=\S+", str(e.value))[0]
    run, task, _ = train(dataclasses.replace(job, settings=f"{job.settings} {changes}"))
    assert all(torch.equal(v, good[k]) for k, v in task.model.state_dict().items()), "the first stage is as it was"
    fit_energies(task, run, 0)
    part = Run(run.path / "energies", json.loads((run.path / "energies" / "settings.json").read_text()))
    assert part.load()["changes"] == [[4, "lr_ebm", 2e-4]] and part.load()["progress"]["step"] == 8


def test_energies_of_an_encoder_that_was_trained_further_are_made_anew(tmp_path, corpus):
    job = job_of(tmp_path, corpus)
    run, task, _ = train(job)
    fit_energies(task, run, 0)
    old = json.loads((run.path / "energies" / "settings.json").read_text())["encoder"]
    run, task, end = train(dataclasses.replace(job, settings=job.settings + " changes=14:steps=20"))
    assert end.step == 20
    fit_energies(task, run, 0)
    assert json.loads((run.path / "energies" / "settings.json").read_text())["encoder"] != old


@pytest.mark.parametrize("systems,name", [("ldebm", "gen_lr")])
def test_a_stage_of_pictures_names_its_rate(tmp_path, systems, name):
    job = ImageJob(
        systems=systems, device="cpu", threads=1, out=str(tmp_path / "run"), settings="gen_lr=1e30 gen_clip=1e30"
    )
    with pytest.raises(FloatingPointError, match=f"train anew in another folder, with a lower {name}"):
        image_stages.train_generator(image_job.open_job(job))
    again = dataclasses.replace(job, out=str(tmp_path / "another"), settings="gen_lr=1e-4 gen_clip=10")
    assert image_stages.train_generator(image_job.open_job(again))[1].step == 12


# -- changes on purpose

CHANGED = dataclasses.replace(LINE, steps=14, changes=((6, "lr", 0.01), (9, "clip", 0.5), (14, "steps", 24)))


def test_changes_at_any_time_end_with_the_same_bits(tmp_path):
    "From the start, given when they are due, and killed anywhere"
    whole, task, end = line(tmp_path / "whole", CHANGED)
    assert end.step == 24 and [o["step"] for o in whole.log_lines() if o["kind"] == "valid"] == [10, 14, 24]
    with pytest.raises(Killed):
        line(tmp_path / "late", dataclasses.replace(CHANGED, changes=()), Countdown(20))
    line(
        tmp_path / "late", dataclasses.replace(CHANGED, changes=CHANGED.changes[:2])
    )  # to its end, which is then not the end
    runs = [line(tmp_path / "late", CHANGED)]
    for n in (5, 16, 24, 31, 38, 45, 52):
        with pytest.raises(Killed):
            line(tmp_path / str(n), CHANGED, Countdown(n))
        runs.append(line(tmp_path / str(n), CHANGED))
    for run, other, at in runs:
        assert_same_state(dict(other.model.state_dict()), dict(task.model.state_dict()))
        assert same_log(run) == same_log(whole) and dataclasses.replace(at, seconds=0) == dataclasses.replace(
            end, seconds=0
        )
    plain = line(tmp_path / "plain", dataclasses.replace(LINE, steps=24))[1]
    assert not torch.equal(plain.model.w, task.model.w)


def test_at_the_very_end_a_new_run_is_what_is_left(tmp_path):
    "A change there would ask for more steps"
    cfg = dataclasses.replace(LINE, steps=12)
    task = Poisoned(99, "validation")
    task.rates = dict(lr="lr")
    real, seen = task.validate, []
    task.validate = lambda: {
        k: v if len(seen) == 2 else torch.tensor(1.0) for k, v in real().items() if seen.append(1) is None
    }
    with pytest.raises(
        FloatingPointError,
        match=r"intact \(step 12\), but of weights that led here: train anew in another folder, with a lower lr",
    ):
        line(tmp_path / "run", cfg, task=task)


def test_changes_that_come_too_late_or_are_left_out(tmp_path):
    line(tmp_path / "run", CHANGED)
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match=r"went on under changes=6:lr=0.01,9:clip=0.5,14:steps=24: begin `changes` with these"
    ):
        line(tmp_path / "run", LINE)
    with pytest.raises(
        ValueError, match=r"is at step 24, and changes=20:lr=0.1 would have come before: give step 24 or a later one"
    ):
        line(tmp_path / "run", dataclasses.replace(CHANGED, changes=(*CHANGED.changes, (20, "lr", 0.1))))
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before
    assert (
        line(
            tmp_path / "run",
            dataclasses.replace(CHANGED, changes=(*CHANGED.changes, (24, "lr", 0.1), (24, "steps", 26))),
        )[2].step
        == 26
    )


@pytest.mark.parametrize(
    "changes,wrong",
    [
        ("lr=1", "'lr=1' must be step:name=value"),
        ("4:lr", "must be step:name=value"),
        ("4:lrr=1", "unknown setting to change 'lrr'; did you mean 'lr'"),
        ("4:steps=7.5", "must be a whole number"),
        ("4:lr=-1", "lr must be positive"),
        ("40:lr=1", "steps must rise, from 0 to the last, which is 14"),
        ("8:lr=1e-3,4:lr=1e-4", "steps must rise"),
        ("9:steps=5", "more steps than that, got steps=5"),
        ("4:w_kl=1", "unknown setting to change 'w_kl'"),
        ("9:energy_lr=1", "from 0 to the last, which is 8"),
    ],
)
def test_impossible_changes_stop_before_any_work(tmp_path, corpus, changes, wrong):
    with pytest.raises(ValueError, match=wrong):
        open_job(job_of(tmp_path, corpus, f"changes={changes}"))
    assert not (tmp_path / "run").exists()


def test_a_change_of_what_a_system_has_not(tmp_path, corpus):
    for system, changes in (("vae", "4:lr_ebm=1e-4"), ("ldebm", "4:energy_lr=1e-4")):
        job = job_of(
            tmp_path,
            corpus,
            system=system,
            settings=f"embed=16 hidden=16 d=4 {'energy_steps=0' if system == 'ldebm' else ''} changes={changes}",
        )
        with pytest.raises(ValueError, match="would have no effect"):
            resolve(job)


# -- what makes a run another run, and what does not


def test_every_name_belongs_to_a_setting():
    from dataclasses import fields

    known = {f.name for c in (TextSettings, TextJob, ImageSettings, ImageJob, ToySettings, TrainCfg) for f in fields(c)}
    assert OPERATIONAL | SCORING <= known and not OPERATIONAL & SCORING and set(image_job.MEASURING) <= SCORING


def test_half_a_run_goes_on_with_other_checkpoints_threads_and_name(tmp_path, corpus):
    job = job_of(tmp_path, corpus, "checkpoint_every=4")
    run, task, device = open_job(job)
    spoil(task, 6)
    with pytest.raises(FloatingPointError):
        fit(task, run, train_cfg(task.settings), 0, device)
    run, task, end = train(
        dataclasses.replace(
            job,
            threads=2,
            variant="x",
            settings=job.settings + " n_samples=30 checkpoint_every=5 nll_draws=4 lm=quick lm_seeds=1 nll_sentences=3",
        )
    )
    whole = train(dataclasses.replace(job, out=str(tmp_path / "whole")))
    assert end.step == 14 and all(
        torch.allclose(v, whole[1].model.state_dict()[k]) for k, v in task.model.state_dict().items()
    )
    with pytest.raises(ValueError, match=r"other settings \(w_kl: 1.0 -> 0.5\)"):
        open_job(dataclasses.replace(job, settings=job.settings + " w_kl=.5"))


def test_a_finished_run_is_scored_again_and_its_record_says_how(tmp_path, corpus, monkeypatch):
    job = job_of(tmp_path, corpus)
    monkeypatch.setattr(text_score, "score", lambda *args, **more: {})
    first = text_score.run_job(job)
    assert first["settings"]["n_samples"] == 20 and text_score.run_job(job) == first
    other = dataclasses.replace(job, settings=job.settings + " n_samples=33 nll_sentences=7 checkpoint_every=3")
    with monkeypatch.context() as m:

        def fails(*args):
            raise RuntimeError("no power")

        m.setattr(text_score, "evaluate", fails)
        with pytest.raises(RuntimeError, match="no power"):
            text_score.run_job(other)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == first, (
        "the old result stays until the new one is there"
    )
    again = text_score.run_job(other)
    assert (again["settings"]["n_samples"], again["settings"]["nll_sentences"]) == (33, 7) and again["metrics"][
        "mean_length"
    ]["n"] == 33
    assert (
        identity(again["settings"], scoring=False) == identity(first["settings"], scoring=False)
        and len((tmp_path / "run" / "samples.txt").read_text().splitlines()) == 33
    )


def test_a_finished_run_is_scored_on_another_device(tmp_path):
    "Half a run is not: its random numbers are the device's"
    run, task, _ = line(tmp_path / "run")
    saved = run.load()
    run.save({**saved, "device": "cuda"})
    again = line(tmp_path / "run")
    assert_same_state(dict(again[1].model.state_dict()), dict(task.model.state_dict()))
    with pytest.raises(
        ValueError, match="was trained on cuda and cannot continue on cpu.*pass device='cuda' or another folder"
    ):
        line(tmp_path / "run", dataclasses.replace(LINE, changes=((24, "steps", 30),)))
    run.save(saved)
    assert line(tmp_path / "run", dataclasses.replace(LINE, changes=((24, "steps", 30),)))[2].step == 30


def test_pictures_are_measured_by_another_classifier(tmp_path):
    job = ImageJob(systems="ldebm", device="cpu", threads=1, out=str(tmp_path / "run"))
    image_stages.train_classifier(image_job.open_job(job))
    other = dataclasses.replace(job, n_samples=90, settings="clf_steps=6 long=3 tune='1 2'")
    place = image_job.open_job(other)
    image_stages.train_classifier(place)
    assert sorted(p.name for p in place.run.path.glob("classifier*")) == [
        "classifier",
        "classifier-digits-6",
        "classifier.safetensors",
    ]
    with pytest.raises(ValueError, match="other settings .w_kl"):
        image_job.open_job(dataclasses.replace(job, settings="w_kl=9"))


# -- other ways out


def test_a_taken_record_name(tmp_path, corpus):
    "`variant`, also of a run in its old folder; another folder of records; or the old record moved away"

    def record(job):
        run, task, _ = train(job)
        metrics, art = evaluate(task, 0)
        return finish(run, task, job, metrics, art, 1.0)

    results = tmp_path / "results"
    job = job_of(tmp_path, corpus, results=str(results))
    path = record(job)
    longer = dataclasses.replace(job, settings=job.settings + " changes=14:steps=18")
    with pytest.raises(
        ValueError,
        match=r"changes: '' -> '14:steps=18'\); give this one a `variant` \(a table takes --variant\), "
        r"or another folder of records \(`results`\), or move the old record away",
    ):
        open_job(longer)
    assert (
        record(dataclasses.replace(longer, variant="longer")).name == path.name.replace("ldebm", "ldebm+longer")
        and path.exists()
    )
    assert record(dataclasses.replace(longer, results=str(tmp_path / "elsewhere"))).name == path.name and path.exists()
    path.rename(tmp_path / "moved.json")
    assert record(longer) == path


def test_damage(tmp_path):
    with pytest.raises(Killed):
        line(tmp_path / "run", before=Countdown(60))
    whole, task, _ = line(tmp_path / "whole")
    p = tmp_path / "run" / "checkpoint.safetensors"
    p.write_bytes(p.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged.*; delete it, then train again"):
        line(tmp_path / "run")
    p.unlink()
    run, again, _ = line(tmp_path / "run")
    assert_same_state(dict(again.model.state_dict()), dict(task.model.state_dict()))
    assert same_log(run) == same_log(whole)


def test_unreadable_settings_of_a_folder(tmp_path):
    import shutil

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("[")
    with pytest.raises(ValueError, match="choose another folder with --out, or delete this one"):
        line(tmp_path / "run")
    line(tmp_path / "another", dataclasses.replace(LINE, steps=3))
    shutil.rmtree(tmp_path / "run")
    line(tmp_path / "run", dataclasses.replace(LINE, steps=3))


LITTLE = "embed=16 hidden=16 d=4 energy_hidden=8 n_blocks=1 langevin_steps=2 T=2 n_symbols=4 "
REMEDIES = [  # A job, what it is told, and the same with what it was told
    (
        dict(system="vae-fb", objective="published", settings=""),
        "leave objective at 'consistent'",
        dict(objective="consistent"),
    ),
    (
        dict(settings=LITTLE + "mixed_precision=fp16 batch=16"),
        "on a CPU use 'bf16' or 'no'",
        dict(settings=LITTLE + "mixed_precision=bf16 batch=16"),
    ),
    (
        dict(settings=LITTLE + "batch=16 seed=3"),
        "set it beside them, in batch with `-p seed 3`",
        dict(seed=3, settings=LITTLE + "batch=16"),
    ),
    (dict(settings=LITTLE + "batch=999"), r'lower batch \(settings="(?P<settings>batch=\d+)"\)', {}),
    (
        dict(settings=LITTLE + "batch=16 accumulate=99"),
        "lower one of them",
        dict(settings=LITTLE + "batch=16 accumulate=2"),
    ),
    (
        dict(settings=LITTLE.replace("n_symbols=4", "n_symbols=190") + "batch=16"),
        "lower n_symbols",
        dict(settings=LITTLE + "batch=16"),
    ),
    (
        dict(settings="embed=16 hidden=32 batch=16"),
        r"hidden \(32\) must equal embed \(16\)",
        dict(settings="embed=32 hidden=32 batch=16"),
    ),
    (
        dict(settings=LITTLE + "batch=16 nll_draws=1"),
        "nll_draws must be 0 or at least 2",
        dict(settings=LITTLE + "batch=16 nll_draws=2"),
    ),
    (dict(device="cuda:99", settings=LITTLE + "batch=16"), "use 'auto' or 'cpu'", dict(device="cpu")),
    (dict(processes=0, settings=LITTLE + "batch=16"), "at least 1", dict(processes=1)),
    (
        dict(system="vae", settings="embed=16 hidden=16 d=4 batch=16 noise=False"),
        "leave noise=True",
        dict(settings="embed=16 hidden=16 d=4 batch=16"),
    ),
]


@pytest.mark.parametrize("job,told,remedy", REMEDIES, ids=[r[1][:30] for r in REMEDIES])
def test_what_a_text_job_is_told(tmp_path, corpus, job, told, remedy):
    job = TextJob(**dict(corpus=corpus, threads=1, device="cpu", out=str(tmp_path / "run")) | job)
    with pytest.raises(ValueError) as e:
        open_job(job)
    found = re.search(told, str(e.value))
    assert found, str(e.value)
    more = {k: f"{LITTLE} {v}" for k, v in found.groupdict().items()}
    open_job(dataclasses.replace(job, **remedy, **more))


PICTURES = [
    (dict(systems="ldebm ldebm-joint"), 'settings="(joint_steps=300)"', dict(settings="joint_steps=300")),
    (dict(systems="ldebm-joint", settings="joint_steps=3"), "name both", dict(systems="ldebm ldebm-joint")),
    (dict(objective="robust", systems="ddpm"), "leave other systems to 'consistent'", dict(objective="consistent")),
    (
        dict(settings="layer_free_nats='1 2'"),
        "layer_free_nats has 2 numbers for 3 layers",
        dict(settings="layer_free_nats='1 2 3'"),
    ),
    (dict(n_samples=20), ": give n_samples", dict(n_samples=100)),
    (dict(settings="schedule=published"), "'consistent' takes consistent or cosine", dict(settings="schedule=cosine")),
    (dict(settings="mixed_precision=fp16"), "on a CPU use 'bf16' or 'no'", dict(settings="mixed_precision=no")),
]


@pytest.mark.parametrize("job,told,remedy", PICTURES, ids=[p[1][:30] for p in PICTURES])
def test_what_a_job_of_pictures_is_told(tmp_path, job, told, remedy):
    job = ImageJob(**dict(systems="ldebm", device="cpu", threads=1, out=str(tmp_path / "run")) | job)
    with pytest.raises(ValueError, match=told):
        image_job.open_job(job)
    image_job.open_job(dataclasses.replace(job, **remedy))
