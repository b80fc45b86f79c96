"The text job from its command to its record: what a run leaves behind, and what stops it before it starts"

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldebm.core import load_tensors
from ldebm.corpora import CORPORA, load_corpus
from ldebm.encoder_task import fit_encoder
from ldebm.energy_task import EnergyTask, fit_energies
from ldebm.grammar_corpus import load_grammar_files
from ldebm.posterior import DiagGaussian
from ldebm.records import check_result, load_results
from ldebm.text import batches
from ldebm.text_job import corpus_name, finish, job_name, load_model, open_job, record_settings, scores
from ldebm.text_measure import evaluate
from ldebm.text_settings import TextJob, resolve, train_cfg
from ldebm.text_show import plot_latents, samples_by_symbol
from ldebm.text_task import TextTask, check_corpus
from ldebm.text_vae import interpolate, sample_sentences
from ldebm.train import fit

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "train_ptb.ipynb"
NET = "embed=16 hidden=16 d=4 energy_hidden=8 n_blocks=1 langevin_steps=2 T=2 n_symbols=4"
TINY = f"{NET} batch=64 checkpoint_every=10"


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    "No progress bars, one thread, and a working folder in which a stray file would be seen"
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.chdir(tmp_path)
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def sentences():
    return [" ".join(ws) for ws in load_grammar_files()["train"][0][:400]]


@pytest.fixture
def own(tmp_path, sentences):
    "A user's file"
    path = tmp_path / "my lines.txt"
    path.write_text("\n".join(sentences) + "\n")
    return path


def tiny(tmp_path, **kw):
    kw = dict(settings=TINY, steps=12, n_samples=30, device="cpu", threads=1, out=str(tmp_path / "run")) | kw
    return TextJob(**{k: str(v) if isinstance(v, Path) else v for k, v in kw.items()})


def train(job):
    "What the notebook does, without its pictures"
    run, task, device = open_job(job)
    end = fit(task, run, train_cfg(task.settings), job.seed, device)
    metrics, found = evaluate(task, job.seed)
    return run, task, found, finish(run, task, job, metrics, found, end.seconds, end.samples / max(end.seconds, 1e-9))


def papermill(*args, notebook=NOTEBOOK, **env):
    env = {
        **os.environ,
        "IN_TEST": "1",
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "MPLBACKEND": "agg",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **env,
    }
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "--kernel",
            "python3",
            "--no-progress-bar",
            "--log-output",
            str(notebook),
            *map(str, args),
        ],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )


def values(record):
    return {k: (m["value"], m["interval"], m["n"]) for k, m in record["metrics"].items()}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- the command


@pytest.mark.slow
def test_notebook_from_command_to_record(tmp_path):
    "One command gives notebook, model, record, samples, figures; the model gives the samples again; again: no change"
    out, results = tmp_path / "run", tmp_path / "results"
    out.mkdir()
    command = [
        out / "train_ptb.ipynb",
        "-p",
        "settings",
        f"{NET} batch=256 checkpoint_every=10 nll_draws=0 energy_steps=20",
        "-p",
        "steps",
        36,
        "-p",
        "n_samples",
        40,
        "-p",
        "out",
        out,
        "-p",
        "results",
        results,
        "-p",
        "device",
        "cpu",
        "-p",
        "threads",
        1,
        "-p",
        "seed",
        3,
    ]
    res = papermill(*command)
    assert res.returncode == 0, res.stdout[-3000:] + res.stderr[-3000:]
    assert f"run folder: {out}" in res.stdout + res.stderr
    made = set(files(out))
    assert made == {
        "train_ptb.ipynb",
        "model.safetensors",
        "config.json",
        "result.json",
        "samples.txt",
        "reconstructions.txt",
        "drawn.txt",
        "settings.json",
        "corpus.json",
        "log.jsonl",
        "checkpoint.safetensors",
        "figures/curves.png",
        "figures/latents.png",
        "figures/energy.png",
        "score/prior-hole.json",
        "score/sampler.json",
        "energies/settings.json",
        "energies/log.jsonl",
        "energies/checkpoint.safetensors",
    }
    assert all(
        (out / "figures" / f"{k}.png").read_bytes().startswith(b"\x89PNG") for k in ("curves", "latents", "energy")
    )
    cells = [c for c in json.loads((out / "train_ptb.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert all(c["execution_count"] for c in cells if "".join(c["source"]).strip())
    assert not [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    record = json.loads((out / "result.json").read_text())
    assert [(r["system"], r["corpus"], r["preset"], r["objective"], r["seed"]) for r in load_results(results)] == [
        ("ldebm", "grammar", "quick", "consistent", 3)
    ]
    assert [*files(results)] == ["runs/grammar/quick/ldebm-consistent-s3.json"] and load_results(results) == [record]
    assert {
        "bleu",
        "wkl",
        "recon_nll",
        "kl",
        "neg_elbo",
        "mi",
        "distinct_2",
        "grammatical",
        "exact_nll",
        "memorised",
        "ami_topic",
        "homogeneity_topic",
    } <= set(record["metrics"])
    assert (
        record["settings"]["steps"] == 36
        and record["provenance"]["minutes"] > 0
        and record["provenance"]["throughput"] > 0
    )
    samples = (out / "samples.txt").read_text()
    assert samples.count("\n") == 40

    # the model of the folder, in another process, is the model that was evaluated
    job = TextJob(
        settings=f"{NET} batch=256 checkpoint_every=10 nll_draws=0 energy_steps=20",
        steps=36,
        n_samples=40,
        seed=3,
        device="cpu",
        threads=1,
    )
    task = TextTask(load_corpus("grammar", max_len=resolve(job).max_len), resolve(job), job.seed)
    task.model, vocab = load_model(out)
    assert not task.model.training and vocab.itos == task.corpus.vocab.itos
    metrics, found = evaluate(task, job.seed)
    assert "".join(" ".join(x) + "\n" for x in found["samples"]) == samples
    again, first = values(dict(metrics=json.loads(json.dumps(metrics)))), values(record)
    assert again == {k: first[k] for k in again} and {"prior_hole_auroc", "prior_hole_mmd", "long_auroc"} <= set(
        first
    ) - set(again)
    assert record["metrics"]["rppl"]["value"] is None and "fewer than the 100" in record["metrics"]["rppl"]["estimator"]

    log, model = (out / "log.jsonl").read_text(), load_tensors(out / "model.safetensors")[0]
    res = papermill(*command)
    assert res.returncode == 0, res.stdout[-3000:] + res.stderr[-3000:]
    assert set(files(out)) == made and (out / "log.jsonl").read_text() == log
    again = load_tensors(out / "model.safetensors")[0]
    assert again.keys() == model.keys() and all(torch.equal(again[k], model[k]) for k in model)
    assert (
        values(json.loads((out / "result.json").read_text())) == values(record)
        and (out / "samples.txt").read_text() == samples
    )


@pytest.mark.slow
def test_unknown_parameter_stops_the_notebook(tmp_path):
    "papermill itself only warns"
    res = papermill(
        tmp_path / "out.ipynb",
        "-p",
        "presett",
        "quick",
        "-p",
        "out",
        tmp_path / "run",
        "-p",
        "results",
        tmp_path / "results",
    )
    assert (
        res.returncode != 0
        and "unknown parameter 'presett' for TextJob: did you mean 'preset'?" in res.stdout + res.stderr
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb"]


def test_parameters_cell_is_the_job():
    "Names, types, defaults and order"
    (cell,) = (
        "".join(c["source"])
        for c in json.loads(NOTEBOOK.read_text())["cells"]
        if "parameters" in c["metadata"].get("tags", [])
    )
    body = ast.parse(cell).body
    got = [(n.target.id, n.annotation.id, ast.literal_eval(n.value)) for n in body]
    assert got == [
        (f.name, f.type.__name__ if isinstance(f.type, type) else f.type, f.default)
        for f in dataclasses.fields(TextJob)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,changed",
    [
        ("train_ptb", "n_samples = 30"),
        ("train_zoo", "n_samples = 30"),
        ("train_dailydialog", "n_samples = 30"),
        ("train_control", "n_samples = 30"),
        ("train_response", "steps = 30"),
        ("train_toy2d", "density = 'pinwheel'"),
        ("train_digits", "systems = 'ldebm'"),
        ("train_images", "systems = 'ldebm'"),
    ],
)
def test_cells_may_be_run_again(name, changed):
    "And with other parameters; a misspelt one is still found, whichever cell sets it"
    res = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "again.py"), f"{name}.ipynb", changed, "sede = 1"],
        cwd=ROOT / "nbs",
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert res.returncode == 0 and "again and again" in res.stdout, res.stdout[-2000:] + res.stderr[-2000:]


# -- systems and corpora


@pytest.mark.parametrize(
    "system,objective",
    [
        ("ldebm", "consistent"),
        ("ldebm", "published"),
        ("ldebm-no-gc", "consistent"),
        ("ldebm-no-gc", "published"),
        ("vae", "consistent"),
        ("rnn-lm", "consistent"),
    ],
)
def test_every_system_on_a_users_file(tmp_path, own, system, objective):
    text = "embed=16 hidden=16 batch=64 checkpoint_every=10"
    settings = {"rnn-lm": text, "vae": text + " d=4"}.get(system, TINY)
    job = tiny(tmp_path, corpus=own, system=system, objective=objective, settings=settings)
    run, task, found, path = train(job)
    assert path == run.file("result.json") and not (tmp_path / "results").exists(), "a copy without `results`"
    record = json.loads(path.read_text())
    assert (record["system"], record["corpus"], record["objective"]) == (
        system,
        "my-lines",
        objective,
    ) and check_result(record)
    m = set(record["metrics"])
    assert {"wkl", "distinct_2", "unique", "memorised", "mean_length"} <= m and "grammatical" not in m
    assert ({"bleu", "recon_nll", "kl_base", "active_units"} <= m) == (system != "rnn-lm")
    assert (
        ("mi" in m) == system.startswith("ldebm")
        and ("neg_elbo" in m) == (system != "rnn-lm" and objective == "consistent")
        and ("nll_valid" in m) == (system == "rnn-lm")
    )
    assert ("cls" in run.load()["progress"]["sums"]) == (system == "ldebm")
    assert len((run.path / "samples.txt").read_text().splitlines()) == 30
    model, vocab = load_model(run.path)
    a, b = (sample_sentences(x, 10, gen=torch.Generator().manual_seed(0), temperature=1.0) for x in (model, task.model))
    assert a == b and vocab.itos == task.corpus.vocab.itos
    if system.startswith("ldebm"):
        assert [y for y, _ in samples_by_symbol(task, 2)] == list("00112233")


def test_a_changed_file_is_another_corpus(tmp_path, own):
    run, *_ = train(tiny(tmp_path, corpus=own))
    before = files(run.path)
    own.write_text(own.read_text() + "one more line\n")
    with pytest.raises(ValueError, match="other settings .corpus_sha256"):
        open_job(tiny(tmp_path, corpus=own))
    assert files(run.path) == before


def test_smallest_corpus(tmp_path, sentences):
    "Two sentences for the test are enough to finish, pictures included"
    path = tmp_path / "few.txt"
    path.write_text("\n".join(sentences[:40]) + "\n")
    run, task, found, _ = train(tiny(tmp_path, corpus=path, settings=f"{NET} batch=8", steps=5))
    assert run.file("result.json").exists()
    plot_latents(found["means"], {"symbol": found["logits"].argmax(-1)})
    import matplotlib.pyplot as plt

    plt.close("all")
    assert len(interpolate(task.model, next(iter(batches(task.corpus["test"], 2))), 4)) == 4


def test_a_file_is_never_taken_for_a_corpus_of_that_name(tmp_path, sentences, monkeypatch):
    "Not in records, and not by what scores samples of the grammar with the grammar"
    monkeypatch.chdir(tmp_path)
    names = {
        "grammar": "file-grammar",
        "PTB": "file-PTB",
        "ptb.txt": "file-ptb",
        "digits.txt": "file-digits",
        "dailydialog.v2": "dailydialog.v2",
    }
    for name in names:
        Path(name).write_text("\n".join(sentences[:40]) + "\n")
    got = {o: (corpus_name(TextJob(corpus=f"./{o}")), load_corpus(f"./{o}").name) for o in names}
    assert (
        {o: a for o, (a, _) in got.items()} == names
        and got["grammar"][1] == "file-grammar"
        and not {b for _, b in got.values()} & {*CORPORA}
    )
    job = tiny(tmp_path, corpus="./grammar")
    assert job_name(job) == "ldebm-file-grammar-quick-consistent-s0" and "corpus_sha256" in record_settings(
        job, resolve(job)
    )


@pytest.mark.data
def test_ptb_from_its_files(tmp_path, ldebm_data):
    run, task, device = open_job(
        tiny(tmp_path, corpus="ptb", settings=f"{NET} batch=256", steps=2, objective="published")
    )
    task.validate = lambda: dict(recon_nll=torch.tensor(1.0))  # the whole set would take a while
    end = fit(task, run, train_cfg(task.settings), 0, device)
    assert end.samples == 512 and len(task.corpus["test"]) == 3761 and run.settings["corpus"] == "ptb"


# -- records


def test_records_are_copied_when_asked_and_never_mixed(tmp_path, own):
    results = tmp_path / "results"
    run, *_, path = train(tiny(tmp_path, corpus=own, results=results))
    assert (
        path == results / "runs" / "my-lines" / "quick" / "ldebm-consistent-s0.json"
        and path.read_bytes() == run.file("result.json").read_bytes()
    )
    before = files(results)
    other = tiny(tmp_path, corpus=own, results=results, settings=TINY + " w_mi=0.2", out=tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"already records a run with other settings \(w_mi: .* -> 0.2\); give this one a `variant`"
    ):
        open_job(other)
    assert files(results) == before and not (tmp_path / "other").exists(), "a clash is seen before the work"
    run2, *_, path2 = train(dataclasses.replace(other, variant="mi"))
    assert (
        path2 == path.with_name("ldebm+mi-consistent-s0.json")
        and {k: v for k, v in files(results).items() if k in before} == before
    )
    assert len(load_results(results)) == 2
    again = train(tiny(tmp_path, corpus=own, results=results))[-1]  # the same settings replace their own record
    assert values(json.loads(again.read_text())) == values(json.loads(before[str(path.relative_to(results))]))


def test_folder_of_its_own_by_default(tmp_path, own):
    run, _, _ = open_job(tiny(tmp_path, corpus=own, out="", variant="x", seed=5))
    assert str(run.path) == "runs/ldebm+x-my-lines-quick-consistent-s5" and run.path.is_dir()


def test_model_of_an_unfinished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist: .* is not the folder of a finished run"):
        load_model(tmp_path)


# -- what stops a job before it starts

BAD = [
    (dict(preset="quik"), "unknown preset 'quik'; did you mean 'quick'. Known: quick, small, paper"),
    (dict(objective="publshed"), "unknown objective 'publshed'; did you mean 'published'"),
    (dict(system="gan"), "unknown system 'gan'.* Known: rnn-lm, ae, vae, .*ldebm"),
    (dict(system="vae-fb", objective="published"), "system 'vae-fb' has no published variant"),
    (dict(corpus="gramar"), "unknown corpus 'gramar'; did you mean 'grammar'"),
    (dict(settings="T=0"), "setting T=0 .* must be at least 1"),
    (dict(settings="T=-3"), "setting T=-3 .* must be at least 1"),
    (dict(settings="T=2.5"), "setting T='2.5' must be int"),
    (dict(settings="t=3"), "unknown setting 't'"),
    (dict(settings="w_kl"), "write name=value"),
    (dict(settings="mala=yes"), "setting mala='yes' must be bool"),
    (dict(settings="schedule=cosin"), "unknown schedule 'cosin'; did you mean 'cosine'"),
    (dict(settings="T=300"), "T must be an integer from 1 to 250"),
    (dict(settings="schedule=published"), "belongs to objective 'published' alone"),
    (dict(settings="d=0"), "d=0 leaves the prior ebm no latent"),
    (dict(settings="d=-1"), "setting d=-1 .* must be at least 0"),
    (dict(settings="embed=16 hidden=32"), r"hidden \(32\) must equal embed \(16\)"),
    (dict(settings="n_symbols=0"), "setting n_symbols=0 .* must be at least 1"),
    (dict(settings="batch=1"), "setting batch=1 .* must be at least 2"),
    (dict(settings="dropout=1.0"), r"dropout must lie in \[0, 1\)"),
    (dict(settings="lr=0"), "setting lr=0.0 .* must be above 0"),
    (dict(settings="lr=nan"), "setting lr=nan .* must be a finite number above 0"),
    (dict(settings="rho=1"), r"rho must lie in \[0, 1\)"),
    (dict(settings="temperature=0"), "setting temperature=0.0 .* must be above 0"),
    (dict(settings="langevin_steps=-1"), "setting langevin_steps=-1 .* must be at least 0"),
    (dict(settings="reference=gauss"), "reference must be one of"),
    (dict(settings="mixed_precision=half"), "setting mixed_precision='half' .* must be one of 'no', 'bf16', 'fp16'"),
    (dict(settings="mixed_precision=fp16"), "fp16"),
    (dict(settings="max_len=2"), "setting max_len=2 .* must be at least 3"),
    (dict(settings="vocab_size=2"), "setting vocab_size=2 .* must be at least 4"),
    (dict(settings="prior=gaussian"), "unknown prior 'gaussian'.* Known: ebm, none, normal"),
    (dict(settings="energy_hidden=0"), "setting energy_hidden=0 .* must be at least 1"),
    (dict(settings="batch=9000"), "8000 training sentences, fewer than a batch of 9000"),
    (dict(settings="batch=4000 accumulate=3"), "accumulate"),
    (dict(settings="cluster_dims=0"), "setting cluster_dims=0 .* must be at least 1"),
    (dict(seed=-1), "seed must not be negative, got -1"),
    (dict(steps=-5), "setting steps=-5 .* must be at least 1"),
    (dict(settings="energy_steps=-1"), "setting energy_steps=-1 .* must be at least 0"),
    (dict(settings="energy_batch=1"), "setting energy_batch=1 .* must be at least 2"),
    (dict(settings="energy_lr=0"), "setting energy_lr=0.0 .* must be above 0"),
    (dict(settings="energy_steps=5", objective="published"), "energy_steps would have no effect"),
    (dict(split="train"), "unknown split 'train'"),
    (dict(n_samples=-1), "setting n_samples=-1 .* must be at least 2"),
    (dict(threads=-1), "threads must be 0 or more, got -1"),
    (dict(device="gpu"), "unknown device 'gpu'"),
    (dict(device="cuda:77"), "device 'cuda:77' is not available"),
    (dict(variant="two words"), "'variant' must be a name"),
    (dict(variant="../up"), "'variant' must be a name"),
]


@pytest.mark.parametrize("change,wrong", BAD, ids=[" ".join(f"{k}={v}" for k, v in c.items()) for c, _ in BAD])
def test_impossible_jobs_leave_nothing(tmp_path, change, wrong):
    job = TextJob(**{**dict(device="cpu", out=str(tmp_path / "run")), **change})
    with pytest.raises(ValueError, match=wrong):
        open_job(job)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=wrong):
        open_job(dataclasses.replace(job, out="", results=str(tmp_path / "results")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content,wrong",
    [
        (b"", "mine.txt is empty"),
        (b"\x00\x01\x02" * 100, "mine.txt is a binary file"),
        (b"\xff\xfe oh\n", "mine.txt is not UTF-8"),
        (b"only one line here\n", "mine.txt has 1 sentence; at least 40 are needed"),
        (b"a few words\n" * 39, "has 39 sentences; at least 40 are needed"),
        (b"a few words\n" * 40, "36 training sentences, fewer than a batch of 64: lower batch"),
        (None, "no such file: .*mine.txt"),
    ],
)
def test_bad_files_leave_nothing(tmp_path, content, wrong):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=wrong):
        open_job(tiny(tmp_path, corpus=path, results=tmp_path / "results"))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"] * (content is not None)


def test_the_remedy_for_few_sentences_works(tmp_path, sentences):
    path, job = tmp_path / "few.txt", TextJob(settings="n_symbols=4")
    path.write_text("\n".join(sentences[:40]) + "\n")
    corpus = load_corpus(str(path), max_len=24)
    with pytest.raises(ValueError, match="36 training sentences, fewer than a batch of 64: .*batch=9"):
        check_corpus(corpus, resolve(job))
    check_corpus(corpus, resolve(dataclasses.replace(job, settings="n_symbols=4 batch=9")))


def test_fewer_sentences_than_symbols(tmp_path, sentences):
    path = tmp_path / "few.txt"
    path.write_text("\n".join(sentences[:40]) + "\n")
    with pytest.raises(ValueError, match=r"36 training sentences, fewer than the 40 symbols"):
        open_job(tiny(tmp_path, corpus=path, settings=f"{NET} batch=8 n_symbols=40".replace("n_symbols=4 ", "")))
    assert not (tmp_path / "run").exists()


def test_missing_and_altered_data(tmp_path, monkeypatch):
    "Says where it looked and how to get it; a file that is not the real one is named, with both checksums"
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv("LDEBM_DATA", str(data))
    monkeypatch.setenv("LDEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LDEBM_DOWNLOAD", raising=False)
    for corpus in ("ptb", "dailydialog"):
        with pytest.raises(FileNotFoundError, match=f"data set '{corpus}' not found. Looked in") as e:
            open_job(tiny(tmp_path, corpus=corpus))
        assert str(data / corpus) in str(e.value) and "LDEBM_DATA" in str(e.value)
    (data / "ptb").mkdir()
    for k in ("train", "valid", "test"):
        (data / "ptb" / f"ptb.{k}.txt").write_text(" the <unk> said \n" * 500)
    with pytest.raises(ValueError, match=r"ptb\.train\.txt: wrong checksum"):
        open_job(tiny(tmp_path, corpus="ptb"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


@pytest.mark.data
def test_one_altered_byte_of_ptb(tmp_path, monkeypatch, ldebm_data):
    data = tmp_path / "data" / "ptb"
    data.mkdir(parents=True)
    for p in (ldebm_data / "ptb").glob("ptb.*.txt"):
        (data / p.name).write_bytes(p.read_bytes())
    text = bytearray((data / "ptb.valid.txt").read_bytes())
    text[1000] ^= 1
    (data / "ptb.valid.txt").write_bytes(text)
    monkeypatch.setenv("LDEBM_DATA", str(data.parent))
    with pytest.raises(ValueError, match=r"ptb\.valid\.txt: wrong checksum"):
        open_job(tiny(tmp_path, corpus="ptb"))
    assert not (tmp_path / "run").exists()


def test_encoder_alone(tmp_path):
    "Without free nats its bound is tighter; all else stays to the bit, and a run that was stopped ends the same"

    def prepared(name, more="refit_steps=24 refit_lr=.01"):
        settings = f"{NET} batch=64 checkpoint_every=5 energy_steps=0 cls_start=0 free_nats=3 {more}"
        run, task, device = open_job(tiny(tmp_path, settings=settings, out=tmp_path / name))
        fit(task, run, train_cfg(task.settings), 0, device)
        return run, task, device

    run, task, device = prepared("a")
    before, lines = {k: v.clone() for k, v in task.model.state_dict().items()}, []
    needed = [p.requires_grad for p in task.model.parameters()]
    first = task.validate()["base_bound"].item()
    assert fit_encoder(task, run, 0, device, lines.append) > 0
    after = {k: v.clone() for k, v in task.model.state_dict().items()}
    moved = {k for k, v in before.items() if not torch.equal(after[k], v)}
    assert moved == {k for k in before if k.startswith("encoder.")}
    assert [p.requires_grad for p in task.model.parameters()] == needed and not task.model.training
    assert lines[-1]["step"] == 24 and min(line["base_bound"] for line in lines) < first
    assert task.validate()["base_bound"].item() == pytest.approx(min(line["base_bound"] for line in lines), abs=1e-4)

    def stop(line):
        raise InterruptedError

    run, task, device = prepared("b")
    with pytest.raises(InterruptedError):
        fit_encoder(task, run, 0, device, stop)
    run, task, device = prepared("b")
    fit_encoder(task, run, 0, device)
    assert all(torch.equal(v, after[k]) for k, v in task.model.state_dict().items())

    run, task, device = prepared("c", "shared=True refit_steps=6")
    words = task.model.encoder.embed.weight.clone()
    assert fit_encoder(task, run, 0, device) > 0
    assert torch.equal(task.model.decoder.embed.weight, words), "an embedding that both share is the decoder's"

    run, task, device = prepared("d", "refit_steps=24 refit_lr=.01 refit_nats=8")
    held = []
    fit_encoder(task, run, 0, device, held.append)
    assert held[-1]["objective"] == pytest.approx(held[-1]["recon_nll"] + max(held[-1]["kl_base"], 8), abs=1e-3)
    assert held[-1]["kl_base"] > lines[-1]["kl_base"] + 1, "free nats are kept"

    run, task, device = prepared("e", "")
    assert fit_encoder(task, run, 0, device) == 0 and not (run.path / "encoder").exists()


@pytest.mark.parametrize("system,objective", [("rnn-lm", "consistent"), ("ae", "consistent"), ("ldebm", "published")])
def test_an_encoder_is_refitted_only_under_a_bound(tmp_path, system, objective):
    for own in ("refit_steps=5", "changes=2:refit_lr=1e-4"):
        with pytest.raises(ValueError, match="refit_.* would have no effect"):
            resolve(TextJob(system=system, objective=objective, settings=own))
    with pytest.raises(ValueError, match="refit_nats would have no effect"):
        resolve(TextJob(settings="reference=flat refit_nats=3"))  # its bound at zero energy is another


def test_energies_alone(tmp_path):
    "They lower the latent's cost, leave encoder and decoder as they are, and a run that was stopped ends the same"

    def prepared(name):
        job = tiny(
            tmp_path,
            settings=f"{NET} batch=64 checkpoint_every=10 energy_steps=60 energy_batch=64 energy_lr=.02 cls_start=0",
            out=tmp_path / name,
        )
        run, task, device = open_job(job)
        fit(task, run, train_cfg(task.settings), job.seed, device)
        sides = 2.0 * torch.randint(2, (400, 1), generator=torch.Generator().manual_seed(0)) - 1
        task.encode = lambda split: DiagGaussian(
            2 * sides.expand(400, task.settings.d), torch.full((400, task.settings.d), -2.0)
        )  # latents that no Gaussian prior fits
        return job, run, task, device

    job, run, task, device = prepared("a")
    before, lines = {k: v.clone() for k, v in task.model.state_dict().items()}, []
    assert fit_energies(task, run, job.seed, device, lines.append) > 0
    after = task.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if not k.startswith("prior.")) and not torch.equal(
        after["prior.energy.head.weight"], before["prior.energy.head.weight"]
    )
    assert (
        len(lines) == 4
        and lines[-1]["step"] == 60
        and lines[-1]["kl"] < 0.9 * lines[0]["kl_base"] == 0.9 * lines[-1]["kl_base"]
    )

    job, run, task, device = prepared("b")

    class Stop(Exception):
        pass

    def stop(line):
        if line["step"] == 30:
            raise Stop

    with pytest.raises(Stop):
        fit_energies(task, run, job.seed, device, stop)
    job, run, task, device = prepared("b")
    fit_energies(task, run, job.seed, device)
    assert all(torch.equal(v, after[k]) for k, v in task.model.state_dict().items())

    quiet = tiny(tmp_path, settings=f"{NET} batch=64 energy_steps=0", out=tmp_path / "c")
    run, task, device = open_job(quiet)
    assert fit_energies(task, run, 0, device) == 0 and not (run.path / "energies").exists()


@pytest.mark.parametrize("system,w_mi,kept", [("svebm-ib", 1, True), ("svebm-ib", 0, False), ("ldebm-no-gc", 1, True)])
def test_symbols_of_the_bottleneck_stay_in_the_last_stage(tmp_path, system, w_mi, kept):
    "As those of clusters do: without a term of their own they would collapse there"
    _, task, _ = open_job(tiny(tmp_path, system=system, settings=f"{NET} batch=64 energy_steps=20 w_mi={w_mi}"))
    energies = EnergyTask(task)
    assert (energies.labels is not None) == ("cls" in energies.weights(0, 20)) == kept
    if kept:
        own = task.model.prior.symbol_logits(energies.data["train"].mean).argmax(-1)
        assert torch.equal(energies.labels, own)


def test_a_terminal_says_when_a_likelihood_is_not_valid(tmp_path):
    def show(estimator):
        m = dict(
            nll_valid=dict(value=161.13, interval=[125.0, 197.1], n=15, estimator=estimator),
            rppl=dict(value=None, interval=None, n=15, estimator="too few"),
            bleu=dict(value=5.0, interval=None, n=15, estimator=""),
        )
        (tmp_path / "result.json").write_text(json.dumps(dict(metrics=m)))
        return [" ".join(line.split()) for line in scores(tmp_path).splitlines()]

    assert show("upper bound; valid: largest mean gap of a level 0.02 nats") == [
        "nll_valid 161.1 (125 to 197.1) nats a sentence; lower is better",
        "bleu 5 sentences decoded again, at most 100",
        "rppl: too few",
    ]
    assert show("upper bound; NOT valid: largest mean gap of a level 0.2 nats") == [
        "nll_valid 161.1 (125 to 197.1) not valid, see nll_gap in result.json",
        "bleu 5 sentences decoded again, at most 100",
        "rppl: too few",
    ]
