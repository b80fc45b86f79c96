"Labels that teach symbols, requests, and what they make of a run"

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_jobs import papermill

from ldebm.control_show import accuracy_at, check_control, control_table
from ldebm.core import make_gen
from ldebm.corpora import load_corpus
from ldebm.exact import MixtureEnergy
from ldebm.explorer import explore
from ldebm.label_symbols import LabelSymbols, label_symbols
from ldebm.levels import PriorCfg
from ldebm.prior import DiffusionEBM
from ldebm.records import metric
from ldebm.schedule import consistent_schedule
from ldebm.text_control import changed_latents, latents_by_example, requested_latents
from ldebm.text_job import load_model, load_symbols, open_job, save_model
from ldebm.text_reader import request_metric, requested
from ldebm.text_settings import TextJob, resolve
from ldebm.text_task import TextTask

TINY = (
    "embed=16 hidden=16 d=4 energy_hidden=16 n_blocks=1 langevin_steps=3 T=2 batch=32 energy_steps=8 energy_batch=32 "
)


@pytest.fixture(scope="module")
def grammar():
    return load_corpus("grammar", max_len=24)


@pytest.fixture(scope="module")
def taught(grammar):
    task = TextTask(grammar, resolve(TextJob(steps=20, settings=TINY + "attributes=all")), 0)
    task.model.eval()
    return task


# -- symbols of labels


def test_symbols_are_the_combinations_of_the_grammar(grammar):
    labels = grammar["train"].labels
    symbols = label_symbols(labels, grammar.label_names)
    assert len(symbols) == len(set(zip(*(v.tolist() for v in labels.values()))))
    back = symbols.values[symbols.of(labels)]
    assert torch.equal(back, torch.stack(list(labels.values()), 1))
    for name in grammar.label_names:
        value = labels[name][:50]
        rows = symbols.allowed(name, value)
        assert rows[torch.arange(50), symbols.of(labels)[:50]].all() and not rows.all()


def test_the_corpus_says_how_many_symbols_there_are(grammar, taught):
    assert taught.settings.n_symbols == len(taught.symbols) == taught.model.prior.n_symbols
    assert resolve(TextJob(settings=TINY + "attributes=mood")).n_symbols == 10  # before a corpus is known


def test_labels_are_what_teaches(taught):
    state = taught.start_epoch(0, None, make_gen(0))
    assert set(state) == {"labels"}, "no weights: labels count as often as they occur"
    batch, extra = next(iter(taught.batches(state, make_gen(0))))
    assert torch.equal(
        taught.symbols.values[extra["labels"]],
        torch.stack([v[batch.index] for v in taught.corpus["train"].labels.values()], 1),
    )
    assert taught.weights(0, 20)["cls"] == taught.settings.w_cls, "from the first step on"


@pytest.mark.parametrize(
    "settings,message",
    [
        ("attributes=mood n_symbols=4", "n_symbols would have no effect"),
        ("attributes=mood cls_start=.3", "cls_start would have no effect"),
        ("attributes=mood cluster_by=whitened", "cluster_by would have no effect"),
        ("attributes=mood w_cls=0", "give it a weight"),
    ],
)
def test_settings_without_effect(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve(TextJob(settings=settings))


def test_what_cannot_be_asked(tmp_path, grammar):
    lines = tmp_path / "mine.txt"
    lines.write_text("\n".join(f"line number {i} of a file" for i in range(400)))
    out = tmp_path / "run"
    job = TextJob(corpus=str(lines), steps=2, settings=TINY + "attributes=all", out=str(out))
    with pytest.raises(ValueError, match="corpus mine.txt has no labels; grammar"):
        open_job(job)
    with pytest.raises(ValueError, match="unknown attribute 'moods'; did you mean 'mood'"):
        open_job(replace(job, corpus="grammar", settings=TINY + "attributes=moods"))
    with pytest.raises(ValueError, match="set attributes, as attributes=all in settings"):
        open_job(replace(job, corpus="grammar", settings=TINY), check_control)
    with pytest.raises(ValueError, match="set lm=quick"):
        open_job(replace(job, corpus="grammar", settings=TINY + "attributes=all lm=''"), check_control)
    with pytest.raises(ValueError, match="has no latent to ask"):
        open_job(replace(job, corpus="grammar", system="rnn-lm", settings="embed=16 hidden=16"), check_control)
    assert not out.exists(), "nothing is written before"


def test_a_saved_model_knows_its_symbols(tmp_path):
    job = TextJob(steps=2, settings=TINY + "attributes=mood,tense", out=str(tmp_path / "run"))
    run, task, _ = open_job(job)
    save_model(run, task)
    symbols = load_symbols(run.path)
    assert symbols.names == task.symbols.names and torch.equal(symbols.values, task.symbols.values)
    model, _ = load_model(run.path)
    assert model.prior.n_symbols == len(symbols)


# -- requests


def four_clusters(far=2.0):
    "A task whose energies are perfect for four clusters, two attributes of two values"
    centres = far * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    schedule = consistent_schedule(4)
    prior = DiffusionEBM(schedule, MixtureEnergy(schedule, centres, 0.3, torch.full((4,), 0.25)), PriorCfg(n_steps=40))
    names = dict(right=("yes", "no"), up=("yes", "no"))
    symbols = LabelSymbols(names, torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))
    return SimpleNamespace(device=torch.device("cpu"), symbols=symbols, model=SimpleNamespace(prior=prior))


def test_requests_reach_the_right_clusters():
    "What is asked for is where the samples lie"
    task, y = four_clusters(), torch.arange(4).repeat(100)
    for attribute in task.symbols.names:
        z = requested_latents(task, attribute, y, gen=make_gen(0))
        wanted = task.model.prior.energy.means[y]
        assert ((z * wanted) > 0).float().mean() > 0.97


def test_guidance_insists_on_one_attribute_alone():
    "It pushes latents away from the other value, and leaves the other attribute where weight one has it"
    task, y = four_clusters(0.4), torch.arange(4).repeat(500)
    sign = task.model.prior.energy.means[y].sign()
    plain = (requested_latents(task, "right", y, 1.0, make_gen(0)) * sign).mean(0)
    far = (requested_latents(task, "right", y, 8.0, make_gen(0)) * sign).mean(0)
    assert far[0] > plain[0] + 0.1 and abs(far[1] - plain[1]) < 0.05, (plain, far)


def test_changing_one_attribute_keeps_the_others():
    task = four_clusters()
    centres = task.model.prior.energy.means
    z = centres[torch.arange(200) % 4]
    new = torch.where(z[:, 0] > 0, 1, 0)
    moved = changed_latents(task, z, "right", new, task.model.prior.T, 1.0, make_gen(0))
    assert (moved[:, 0] * z[:, 0] < 0).float().mean() > 0.95
    assert (moved[:, 1] * z[:, 1] > 0).float().mean() > 0.95


def test_no_energies_are_asked_by_example(grammar):
    labels = grammar["train"].labels["mood"]
    asked = torch.arange(600)
    for system, own in (("vae", "d=4"), ("dgm-vae-i", "d=8 codes=2 classes=3")):
        settings = f"embed=16 hidden=16 batch=32 {own}"
        task = TextTask(grammar, resolve(TextJob(system=system, settings=settings)), 0)
        z = latents_by_example(task, labels[asked], asked, labels, make_gen(0))
        again = latents_by_example(task, labels[asked], asked, labels, make_gen(0))
        assert torch.equal(z, again) and z.shape == (600, task.settings.d)
    vae = TextTask(grammar, resolve(TextJob(system="vae", settings="embed=16 hidden=16 batch=32 d=4")), 0)
    q = vae.encode("train")
    values = torch.zeros(20_000, dtype=torch.long)
    z = latents_by_example(vae, values, asked, labels, make_gen(0))
    theirs = q[labels == 0]
    sd = (theirs.mean.var(0) + theirs.logvar.exp().mean(0)).sqrt()
    assert ((z.mean(0) - theirs.mean.mean(0)).abs() < 5 * sd / 20_000**0.5).all()
    assert (z.std(0) / sd - 1).abs().max() < 0.05


# -- equal fluency


def along(*points):
    "A made-up record: `(decoding, perplexity, accuracy)`"
    out = {}
    for how, perplexity, share in points:
        out[request_metric("ppl_forward", "mood", "g4", how)] = metric(perplexity)
        out[request_metric("accuracy", "mood", "g4", how)] = metric(share, [share - 0.1, share + 0.1], 50)
    return out


def test_obedience_is_compared_at_equal_fluency():
    record = along(("greedy", 9.0, 1.0), ("drawn", 400.0, 0.5), ("drawn_0.9", 100.0, 0.7), ("drawn_0.7", 25.0, 0.8))
    at = {ppl: accuracy_at(record, "mood", "g4", ppl) for ppl in (25.0, 50.0, 200.0, 400.0)}
    assert [m["value"] for m in at.values()] == pytest.approx([0.8, 0.75, 0.6, 0.5])
    assert at[200.0]["interval"] == pytest.approx([0.5, 0.7]) and at[200.0]["n"] == 50
    assert accuracy_at(record, "mood", "g4", 401.0)["value"] == 0.5  # all words are more fluent than that
    for outside in (9.0, 24.0):  # greedy words are of another kind
        assert accuracy_at(record, "mood", "g4", outside)["value"] is None
    assert accuracy_at({}, "mood", "g4", 50.0)["value"] is None


# -- the job


@pytest.mark.slow
def test_control_job_shrunk(tmp_path):
    "The notebook from end to end; run again, it trains nothing and keeps its figures"
    settings = TINY + "lm=quick lm_seeds=1"
    args = ("-p", "steps", 20, "-p", "n_samples", 100, "-r", "attributes", "mood", "-r", "settings", settings)
    args = (*args, "-r", "out", tmp_path / "run")
    notebook = "nbs/train_control.ipynb"
    first = papermill(tmp_path / "a.ipynb", *args, notebook=notebook)
    assert first.returncode == 0, first.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["variant"] == "control"
    names = set(record["metrics"])
    assert {"reader_mood", "accuracy_mood_g1", "accuracy_mood_told_drawn", "changed_mood_l2", "bleu"} <= names
    assert "mood, g4" in control_table(record["metrics"])
    cooler = {how for _, request, how in requested(record["metrics"]) if request == "told"}
    assert cooler == {"drawn", "drawn_0.9", "drawn_0.8", "drawn_0.7"}
    again = papermill(tmp_path / "b.ipynb", *args, notebook=notebook)
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"] == record["metrics"]


def test_taught_symbols_have_names_in_the_explorer(tmp_path):
    job = TextJob(steps=2, settings=TINY + "attributes=mood", out=str(tmp_path / "run"))
    run, task, _ = open_job(job)
    save_model(run, task)
    explorer = explore(run.path, 50)
    assert [explorer.label(k) for k in range(3)] == ["0: statement", "1: question", "2: command"]
