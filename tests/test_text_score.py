"`text_score`: likelihoods that go on where they were killed, stages, the distance to the truth, convergence"

import dataclasses
import json
import math
import os

import pytest
import torch

from ldebm import evidence, text_nll
from ldebm import text_score as S
from ldebm.annealing import AISCfg, LogZ, Plan
from ldebm.core import load_tensors, make_gen, unpack_state
from ldebm.corpora import load_corpus
from ldebm.grammar_corpus import load_grammar
from ldebm.job import kept_metrics
from ldebm.likelihood import NLLCfg, estimation_interval
from ldebm.paths import Proposal
from ldebm.records import RENAMED, metric, result_path
from ldebm.text import get_batch
from ldebm.text_job import load_model, record_name
from ldebm.text_settings import TextJob, resolve
from ldebm.text_task import TextTask
from ldebm.text_vae import frozen_weights

pytestmark = pytest.mark.usefixtures("in_test")
TINY = "embed=16 hidden=16 d=3 energy_hidden=8 n_blocks=1 T=2 langevin_steps=8 nll_draws=8 nll_sentences=6 lm=''"
CFG = NLLCfg(draws=8, chains=4, fit=32, rich=4, top=64, n_z=8, paths=2, ais=AISCfg(chains=2, long=4, pilot=16))


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("grammar", max_len=24)


def make(corpus, system="ldebm", objective="consistent", seed=0, settings=TINY):
    job = TextJob(system=system, objective=objective, seed=seed, steps=1, n_samples=10, settings=settings)
    return job, TextTask(corpus, resolve(job), seed)


@pytest.fixture
def task(corpus):
    return make(corpus)[1]


class Killed(Exception):
    pass


def count_chunks(task, most, monkeypatch):
    inner, seen = task.model.encode, []

    def encode(batch):
        if len(seen) == most:
            raise Killed
        seen.append(len(batch.ids))
        return inner(batch)

    monkeypatch.setattr(task.model, "encode", encode)
    return seen


# --- likelihood


def test_frozen_weights_come_back(task):
    m = task.model.train()
    next(m.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in m.parameters()]
    assert not all(before) and any(before)
    with pytest.raises(Killed):
        with frozen_weights(m) as inside:
            assert inside is m and not m.training and not any(p.requires_grad for p in m.parameters())
            raise Killed
    assert m.training and [p.requires_grad for p in m.parameters()] == before
    m.eval()
    with frozen_weights(m):
        pass
    assert not m.training


def test_sentence_log_lik_is_the_decoders(task):
    index = torch.tensor([5, 0, 3])
    b = get_batch(task.corpus["test"], index)
    z = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with frozen_weights(task.model):
        f = text_nll.sentence_log_lik(task, "test", index)
        got = f(z, torch.arange(3))
        torch.testing.assert_close(got, -task.model.decoder.nll(b.ids, b.host_lengths, z))
        torch.testing.assert_close(f(z[[2, 2]], torch.tensor([1, 2]))[1], f(z, torch.arange(3))[2])
        assert torch.autograd.grad(got.sum(), z)[0].abs().sum() > 0


@pytest.mark.parametrize("system", ["ldebm", "vae"])
def test_killed_and_resumed_equals_uninterrupted(corpus, system, tmp_path, monkeypatch):
    settings = TINY if system == "ldebm" else "embed=16 hidden=16 d=3 nll_draws=8 lm=''"
    task = make(corpus, system, settings=settings)[1]
    want = text_nll.text_nll(task, "test", 9, CFG, chunk=3)
    task.model.train()
    folder = tmp_path / "new"

    def go():
        return text_nll.text_nll(task, "test", 9, CFG, folder=folder, chunk=3)

    def kept():
        return unpack_state(*load_tensors(folder / "likelihood-test.safetensors"))

    with monkeypatch.context() as mp:
        seen = count_chunks(task, 1, mp)
        with pytest.raises(Killed):
            go()
        assert seen == [3] and (len(kept()["own"]), len(kept()["done"])) == (1, 0)  # a chunk's own posteriors
    assert task.model.training and all(p.requires_grad for p in task.model.parameters())
    with monkeypatch.context() as mp:
        seen, estimate, done = count_chunks(task, 9, mp), text_nll.SentenceBounds.estimate, []

        def killed_at_the_second(bounds):
            if done:
                raise Killed
            done.append(bounds)
            return estimate(bounds)

        mp.setattr(text_nll.SentenceBounds, "estimate", killed_at_the_second)
        with pytest.raises(Killed):
            go()
        assert seen == [3, 3] and (len(kept()["own"]), len(kept()["done"])) == (3, 1)
    with monkeypatch.context() as mp:
        seen = count_chunks(task, 9, mp)
        got, again = go(), go()  # the second finds all there
        assert seen == []
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) and torch.equal(again[k], want[k]) for k in want)
    assert want["nll"].shape == (9,) and want["nll"].isfinite().all() and want["index"].unique().numel() == 9


def test_kept_chunks_are_of_the_same_question(corpus, tmp_path, monkeypatch):
    task = make(corpus, "vae", settings="embed=16 hidden=16 d=3 lm=''")[1]

    def run(**kw):
        return text_nll.text_nll(task, "test", **{**dict(n=4, cfg=CFG, folder=tmp_path, chunk=2), **kw})

    first = run()
    seen = count_chunks(task, 99, monkeypatch)
    other = run(seed=1)
    assert seen == [2, 2] and not torch.equal(other["index"], first["index"])
    run(seed=1, n=2)
    run(seed=1, n=2, cfg=dataclasses.replace(CFG, draws=9))
    run(chunk=4)
    run(chunk=4, fit_on=3)
    assert seen[2:] == [2, 2, 4, 4]


def test_no_number_means_all(corpus):
    test = corpus["test"]
    few = dataclasses.replace(
        corpus,
        splits={
            **corpus.splits,
            "test": dataclasses.replace(test, flat=test.flat[: test.offsets[5]], offsets=test.offsets[:6]),
        },
    )
    task = make(few, "vae", settings="embed=16 hidden=16 d=3 lm=''")[1]
    for n in (0, 5, 99):
        got = text_nll.text_nll(task, "test", n, CFG, chunk=2)
        assert got["index"].sort().values.tolist() == [0, 1, 2, 3, 4] and all(len(v) == 5 for v in got.values())


def test_terms_are_in_the_order_of_the_split(corpus):
    "Batches are sorted by length, what is measured on them is not: pairs of the same sentences depend on it"
    task = make(corpus, "rnn-lm", settings="embed=16 hidden=16 lm=''")[1]
    got = task.likelihood_terms("test", torch.Generator().manual_seed(0))["nll"]
    for k in (0, 7, len(got) - 1):
        b = get_batch(corpus["test"], torch.tensor([k]))
        assert got[k].item() == pytest.approx(task.model.decoder.nll(b.ids, b.host_lengths, None).item(), rel=1e-5)


def test_some_sentences_speak_for_all(corpus, tmp_path):
    "What `score` records from a quarter of the sentences, against the mean over all of them"
    test = corpus["test"]
    few = dataclasses.replace(
        corpus,
        splits={
            **corpus.splits,
            "test": dataclasses.replace(test, flat=test.flat[: test.offsets[80]], offsets=test.offsets[:81]),
        },
    )
    _, task = made = make(few, "vae", settings="embed=16 hidden=16 d=3 nll_draws=16 lm=''")
    every = text_nll.text_nll(task, "test", 0, NLLCfg(draws=16))
    truth = every["nll"].mean().item()
    miss = {"plain": [], "recorded": []}
    for seed in range(6):
        job, t = make(few, "vae", settings="embed=16 hidden=16 d=3 nll_draws=16 nll_sentences=20 lm=''")
        t.model.load_state_dict(made[1].model.state_dict())
        got = S.score(t, dataclasses.replace(job, seed=seed), [])["nll_valid"]
        part = text_nll.text_nll(t, "test", 20, NLLCfg(draws=16), seed)["nll"]
        miss["plain"].append(abs(part.mean().item() - truth))
        miss["recorded"].append(abs(got["value"] - truth))
        assert got["n"] == 20 and "regression on the bound of all 80" in got["estimator"]
    assert sum(miss["recorded"]) < 0.2 * sum(miss["plain"])


def test_plans_survive_the_file():
    def t(*s):
        return torch.randn(*s, generator=torch.Generator().manual_seed(0))

    plans = {
        "top": LogZ(t(1), t(1), t(1), 0.5, 9, False, t(1)),
        0: Plan([0.5, 1.0], [0.1, 0.2], True),
        ("fit", 0): Proposal(t(2), t(2, 2), t(2, 2)),
        "better": {1: Proposal(t(2), t(2, 2), t(2, 2))},
        "posterior": Plan([1.0], [0.3], False),
        "hard": [0, 2],
    }
    from ldebm.core import pack_state

    tensors, form = pack_state(dict(x=text_nll._plans_to_lists(plans)))
    back = text_nll._plans_from_lists(unpack_state(tensors, form)["x"])
    away = text_nll._plans_from_lists(
        unpack_state({k: v.to("meta") for k, v in tensors.items()}, form)["x"]
    )  # where the file was loaded to
    assert all(
        x.device.type == "meta" for x in (*away["top"][:3], away["top"].variance, *away[("fit", 0)], *away["better"][1])
    )
    assert (
        set(back) == set(plans)
        and back[0] == plans[0]
        and back["hard"] == [0, 2]
        and isinstance(back["better"][1], Proposal)
    )
    torch.testing.assert_close(
        [*back["top"][:3], *back[("fit", 0)]], [*plans["top"][:3], *plans[("fit", 0)]], rtol=0, atol=0
    )


def test_text_likelihood_against_an_integral(corpus):
    "A text model with one latent and N(0, 1): the integral over z on a grid"
    task = make(corpus, "vae", seed=1, settings="embed=16 hidden=16 d=1 lm=''")[1]
    got = text_nll.text_nll(task, "test", 6, NLLCfg(draws=400, chains=8), chunk=6)
    grid = torch.linspace(-7, 7, 701)[:, None]
    with frozen_weights(task.model), torch.no_grad():
        f = text_nll.sentence_log_lik(task, "test", got["index"])
        exact = torch.stack(
            [
                -(
                    f(grid, torch.full((701,), k)).double()
                    - 0.5 * grid[:, 0].double() ** 2
                    - 0.5 * math.log(2 * math.pi)
                ).logsumexp(0)
                - math.log(0.02)
                for k in range(6)
            ]
        )
    lo, mid, hi = estimation_interval(got)
    assert lo - 1e-3 < exact.mean() < hi + 1e-3 and hi - lo < 0.2
    assert ((got["nll"] - exact).abs() < 5 * got["variance"].sqrt() + 1e-3).all()


# --- the distance to the truth


def test_exact_gap():
    nll = torch.tensor([3.0, 5.0, 4.0])
    got = text_nll.exact_gap(nll, ["a", "b", "c"], dict(a=-2.0, b=-4.5, c=-4.0).get)
    assert got["value"] == pytest.approx(0.5) and got["interval"][0] < 0.5 < got["interval"][1] and got["n"] == 3
    with pytest.raises(ValueError, match="'b' has probability 0"):
        text_nll.exact_gap(nll, ["a", "b", "c"], dict(a=-2.0, b=-math.inf, c=-1.0).get)


def test_a_sentence_the_grammar_cannot_produce():
    with pytest.raises(ValueError, match="probability 0"):
        text_nll.exact_gap(torch.ones(1), [["no", "such", "sentence"]], load_grammar().log_prob)


# --- convergence


def test_evidence_of_chains(task):
    got = evidence.sampler_evidence(task.model.prior, make_gen(0, "e"), n=60, longer=2, cpu_gen=make_gen(0, "f"))
    assert set(got) == {"rhat", "rhat_0", "rhat_1", "long_auroc"} and got["rhat"]["value"] == max(
        got["rhat_0"]["value"], got["rhat_1"]["value"]
    )
    assert "8 against 16 updates" in got["long_auroc"]["estimator"]


def test_trace_evidence():
    g = torch.Generator().manual_seed(0)
    anew = torch.randn(2, 64, 4, 6, generator=g)
    stuck = torch.randn(2, 1, 4, 6, generator=g) + 0.05 * anew
    (ks, r, w), (_, r2, w2) = evidence.trace_evidence(anew), evidence.trace_evidence(stuck)
    assert ks == sorted(set(ks)) and ks[0] == 8 and ks[-1] == 64 and r.shape == w.shape == (2, len(ks))
    assert (r[:, -1] < 1.1).all() and (r2 > 2).all() and (w[:, -1] > 0.5).all() and (w2[:, -1] < 0.2).all()
    with pytest.raises(ValueError, match="at least 8"):
        evidence.trace_evidence(anew[:, :7])


def test_plot_says_what_it_shows(task, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    p = task.model.prior
    axs = evidence.plot_evidence(p, make_gen(0, "p"), n=4, longer=3)
    assert (
        axs.shape == (3, 2)
        and [a.get_title()[:7] for a in axs[0]] == ["level 1", "level 0"]
        and "R-hat" in axs[0, 0].figure._suptitle.get_text()
    )
    traces = {8: torch.zeros(2, 8, 4, 4) + 3, 24: torch.randn(2, 24, 4, 4, generator=torch.Generator().manual_seed(1))}

    class Prior:
        T, cfg = 2, p.cfg

    monkeypatch.setattr(evidence, "energy_traces", lambda prior, n, gen=None, n_steps=8: traces[n_steps])
    apart = evidence.plot_evidence(Prior, n=4, longer=3)
    assert "end elsewhere than long ones at levels 0, 1" in apart[0, 0].figure._suptitle.get_text()
    plt.close("all")


# --- stages


def test_stage_is_done_once_for_its_key(tmp_path):
    calls = []

    def f():
        calls.append(1)
        return dict(x=metric(float(len(calls))))

    assert (
        kept_metrics(tmp_path / "s", "a", dict(n=1), f) == kept_metrics(tmp_path / "s", "a", dict(n=1), f)
        and len(calls) == 1
    )
    assert (
        kept_metrics(tmp_path / "s", "a", dict(n=2), f)["x"]["value"] == 2
        and kept_metrics(tmp_path / "s", "a", dict(n=1), f)["x"]["value"] == 3
    )
    assert json.loads((tmp_path / "s" / "a.json").read_text())["key"] == dict(n=1)
    assert (
        kept_metrics(None, "a", dict(n=1), f)["x"]["value"] == 4
        and kept_metrics(None, "a", dict(n=1), f)["x"]["value"] == 5
    )


def test_failed_stage_leaves_nothing(tmp_path):
    def f():
        raise Killed

    with pytest.raises(Killed):
        kept_metrics(tmp_path, "a", {}, f)
    assert not list(tmp_path.iterdir())


def test_scoring_that_went_on_equals_scoring_that_did_not(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(S, "nll_cfg", lambda task: CFG)
    monkeypatch.setattr(
        evidence, "two_sample_auroc", lambda a, b, gen: metric(float((a.sum() - b.sum()).abs()))
    )  # the draws, not the classifier
    monkeypatch.setattr(S, "prior_hole", lambda a, b, gen: dict(prior_hole_auroc=metric(float(a.sum() + b.sum()))))
    job, task = make(corpus)
    words = [["a"]] * 10
    want = S.score(task, job, words)
    assert {
        "nll_valid",
        "nll_error",
        "nll_gap",
        "exact_gap",
        "prior_hole_auroc",
        "prior_hole_floor",
        "hidden_nll",
        "rhat",
        "long_auroc",
    } <= set(want)
    whole = S.score(task, job, words, tmp_path / "whole")
    assert whole == want and sorted(p.name for p in (tmp_path / "whole" / "score").iterdir()) == [
        "completion.json",
        "likelihood-test.json",
        "likelihood-test.safetensors",
        "prior-hole.json",
        "sampler.json",
    ]
    with monkeypatch.context() as mp:

        def dies(*a, **k):
            raise Killed

        mp.setattr(S, "prior_hole", dies)
        with pytest.raises(Killed):
            S.score(task, job, words, tmp_path / "cut")
    assert S.score(task, job, words, tmp_path / "cut") == want


# --- from a job to its record

QUICK = "embed=16 hidden=16 d=3 batch=64 nll_draws=0 lm=''"  # a VAE


def record_of(tmp_path, name="run", **kw):
    job = TextJob(
        **{
            **dict(
                system="vae", steps=12, n_samples=20, threads=1, device="cpu", settings=QUICK, out=str(tmp_path / name)
            ),
            **kw,
        }
    )
    return job, S.run_job(job)


@pytest.fixture
def no_classifiers(monkeypatch):
    monkeypatch.setattr(S, "prior_hole", lambda a, b, gen: dict(prior_hole_auroc=metric(0.5)))
    monkeypatch.setattr(evidence, "two_sample_auroc", lambda a, b, gen: metric(0.5))


def test_finished_job_is_copied_where_its_record_is_wanted(tmp_path, no_classifiers, monkeypatch):
    _, first = record_of(tmp_path)

    def dies(*a, **k):
        raise Killed

    for name in ("launch", "evaluate", "score"):
        monkeypatch.setattr(S, name, dies)
    own = (tmp_path / "run" / "result.json").read_bytes()
    assert record_of(tmp_path)[1] == first and not (tmp_path / "results").exists()
    job, again = record_of(tmp_path, results=str(tmp_path / "results"))
    (copy,) = (tmp_path / "results").rglob("*.json")
    assert (
        again == first
        and copy == result_path(**record_name(job), results_dir=tmp_path / "results")
        and copy.read_bytes() == own == (tmp_path / "run" / "result.json").read_bytes()
    )
    copy.unlink()
    assert (
        record_of(tmp_path, results=str(tmp_path / "results"))[1] == first and copy.read_bytes() == own
    )  # tidied away, and there again
    with pytest.raises(Killed):
        record_of(
            tmp_path, results=str(tmp_path / "results"), settings=QUICK + " nll_sentences=5"
        )  # another scoring is not this one's


def in_old_words(path, *parts):
    "A file of a run as earlier versions wrote it"
    names = {new: old for old, new in RENAMED.items()}
    content = json.loads(path.read_text())
    for part in (content, *(content[part] for part in parts)):
        for name in [name for name in part if name in names]:
            part[names[name]] = part.pop(name)
    path.write_text(json.dumps(content))
    return content


def test_a_folder_in_old_words_is_read_and_goes_on(tmp_path, no_classifiers, monkeypatch):
    "Model, record and training"
    settings = (
        "embed=16 hidden=16 d=3 batch=64 nll_draws=0 lm='' free_nats=.2 temperature=.9 energy_hidden=8 n_blocks=1 "
        "T=2 langevin_steps=2 n_symbols=4 energy_steps=4 energy_batch=32 checkpoint_every=4"
    )
    asked = dict(system="ldebm", settings=settings)
    _, first = record_of(tmp_path, **asked)
    run = tmp_path / "run"
    model = load_model(run)[0].state_dict()
    assert {"row", "floor", "tau", "b2"} <= set(in_old_words(run / "settings.json"))
    assert in_old_words(run / "config.json", "settings")["settings"]["floor"] == 0.2
    assert in_old_words(run / "result.json", "settings")["row"] == "ldebm"
    in_old_words(run / "scored.json")
    in_old_words(run / "energies" / "settings.json")
    again = load_model(run)[0].state_dict()
    assert all(torch.equal(again[k], model[k]) for k in model)
    with monkeypatch.context() as m:
        m.setattr(S, "launch", lambda *a, **k: pytest.fail("it is done"))
        assert record_of(tmp_path, **asked)[1] == first
    (run / "result.json").unlink()
    steps = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    _, later = record_of(tmp_path, **asked)
    assert later["metrics"].keys() == first["metrics"].keys() and later["settings"] == first["settings"]
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1]) == steps, "nothing was trained again"
    assert json.loads((run / "settings.json").read_text())["row"] == "ldebm", "what is the same is not written again"
    with pytest.raises(ValueError, match="other settings .temperature: 0.9 -> 0.8."):
        record_of(tmp_path, **{**asked, "settings": settings.replace("temperature=.9", "temperature=.8")})


def test_record_of_other_settings_is_not_overwritten(tmp_path, no_classifiers):
    record_of(tmp_path, "a")
    record_of(tmp_path, "b", results=str(tmp_path / "results"), steps=10)
    (there,) = (tmp_path / "results").rglob("*.json")
    before = there.read_bytes()
    with pytest.raises(ValueError, match="already records a run with other settings .steps: 10 -> 12."):
        record_of(tmp_path, "a", results=str(tmp_path / "results"))
    assert there.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_job_in_two_processes(tmp_path, no_classifiers, deadline):
    "Each trains on its share of an epoch, one evaluates; energies follow in that one"
    with deadline(120, "processes wait for each other"):
        settings = (
            "embed=16 hidden=16 d=3 batch=32 energy_hidden=8 n_blocks=1 T=2 langevin_steps=8 n_symbols=4 "
            "cls_start=0 energy_steps=8 energy_batch=32 nll_draws=0 lm=''"
        )
        job, rec = record_of(tmp_path, system="ldebm", processes=2, settings=settings)
        again = S.run_job(job)
    saved = {k: unpack_state(*load_tensors(tmp_path / "run" / k / "checkpoint.safetensors")) for k in ("", "energies")}
    assert {k: (v["processes"], v["progress"]["step"], v["progress"]["samples"]) for k, v in saved.items()} == {
        "": (2, 12, 12 * 32 * 2),
        "energies": (1, 8, 8 * 32),
    }
    assert (
        rec["settings"]["processes"] == 2
        and again == rec
        and {"recon_nll", "kl", "rhat", "prior_hole_auroc"} <= set(rec["metrics"])
    )
