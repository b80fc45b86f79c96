"The zoo: terms, posteriors and priors against independent computations; systems trained briefly; exact likelihoods"

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, homogeneity_score
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence
from torch.nn import functional as nnf
from torch.testing import assert_close

from ldebm import codes as C
from ldebm import zoo as Z
from ldebm.clusters import cluster_targets
from ldebm.core import load_tensors, make_gen, save_tensors
from ldebm.corpora import load_corpus
from ldebm.latent_metrics import information, kmeans_labels
from ldebm.likelihood import NLLCfg, estimation_interval, nll_importance
from ldebm.posterior import DiagGaussian, Posterior, Prior, StandardNormal
from ldebm.records import SCORING, Run
from ldebm.text import get_batch
from ldebm.text_job import open_job, record_settings
from ldebm.text_measure import evaluate, latent_metrics
from ldebm.text_nll import sentence_log_lik, text_nll
from ldebm.text_score import score
from ldebm.text_settings import LATER, OBJECTIVES, TextJob, TextSettings, resolve, train_cfg, unused
from ldebm.text_task import TextTask, build_model, by_fisher
from ldebm.text_vae import frozen_weights, sample_sentences
from ldebm.train import cyclical, fit, logistic

pytestmark = pytest.mark.usefixtures("in_test")
ROOT = Path(__file__).resolve().parent.parent
NET = dict(
    embed=32,
    hidden=32,
    d=8,
    codes=4,
    energy_hidden=16,
    n_blocks=1,
    langevin_steps=3,
    batch=32,
    lm="''",
    nll_draws=8,
    nll_sentences=6,
    importance_draws=50,
    energy_steps=0,
)
F64 = torch.float64


def G(seed=0):
    return torch.Generator().manual_seed(seed)


def job_for(system, objective="consistent", steps=1, **more):
    "A tiny job of a system: the settings that have an effect on it"
    idle = unused(resolve(TextJob(system=system, objective=objective)))
    own = {k: v for k, v in {**NET, **more}.items() if k not in idle and not (k == "d" and system == "rnn-lm")}
    return TextJob(
        system=system,
        objective=objective,
        steps=steps,
        n_samples=40,
        settings=" ".join(f"{k}={v}" for k, v in own.items()),
        device="cpu",
        threads=1,
    )


def first(split, n):
    return dataclasses.replace(
        split,
        flat=split.flat[: split.offsets[n]],
        offsets=split.offsets[: n + 1],
        labels={k: v[:n] for k, v in split.labels.items()},
    )


@pytest.fixture(scope="module")
def corpus():
    "300 sentences of the grammar to train on, few to look at"
    c = load_corpus("grammar", max_len=24)
    return dataclasses.replace(
        c, splits=dict(train=first(c["train"], 300), valid=first(c["valid"], 40), test=first(c["test"], 60))
    )


def make(corpus, system, objective="consistent", seed=0, **more):
    job = dataclasses.replace(job_for(system, objective, **more), seed=seed)
    return job, TextTask(corpus, resolve(job), seed)


def posterior(kind, B=7, d=4, M=2, k=3, seed=0, dtype=F64, **kw):
    g = G(seed)
    z = [torch.randn(B, d, generator=g, dtype=dtype) for _ in range(2)]
    c = C.Codes(2 * torch.randn(B, M, k, generator=g, dtype=dtype), **kw)
    return dict(
        gaussian=lambda: DiagGaussian(*z),
        codes=lambda: c,
        both=lambda: C.Both(DiagGaussian(*z), c),
        coded=lambda: C.CodedGaussian(*z, c),
    )[kind]()


KINDS = ["gaussian", "codes", "both", "coded"]


def tensors(q):
    for v in vars(q).values():
        if isinstance(v, Posterior):
            yield from tensors(v)
        elif isinstance(v, torch.Tensor):
            yield v


# --- terms

SIZES = [(1, 1, 2), (2, 3, 4), (17, 5, 3), (40, 20, 5)]


@pytest.mark.parametrize("B,M,k", SIZES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_code_terms(B, M, k, scale):
    log_q = (scale * torch.randn(B, M, k, generator=G(B), dtype=F64)).log_softmax(-1)
    t = C.code_terms(log_q)
    assert all(v.shape == (B,) for v in t.values())
    assert_close(t["ckl"].mean(), (t["aggc"] + t["mi"]).mean(), rtol=1e-10, atol=1e-10)
    u, mean = Categorical(probs=torch.ones(M, k, dtype=F64)), Categorical(probs=log_q.exp().mean(0))
    assert_close(t["ckl"], kl_divergence(Categorical(logits=log_q), u).sum(-1), rtol=1e-9, atol=1e-9)
    assert_close(t["aggc"].mean(), kl_divergence(mean, u).sum(), rtol=1e-9, atol=1e-9)
    assert_close(
        t["mi"].mean(), (mean.entropy() - Categorical(logits=log_q).entropy().mean(0)).sum(), rtol=1e-9, atol=1e-9
    )
    assert t["mi"].mean() >= -1e-12 and t["aggc"].mean() >= -1e-12
    if B == 1:
        assert abs(t["mi"].item()) < 1e-9


def test_code_terms_of_a_class_nobody_uses():
    log_q = torch.tensor([[[0.0, -1e4]]] * 3)
    t = C.code_terms(log_q)
    assert all(v.isfinite().all() for v in t.values()) and t["mi"].abs().max() < 1e-6
    assert_close(t["ckl"], torch.full((3,), math.log(2)))


@pytest.mark.parametrize("B,M,k", SIZES)
@pytest.mark.parametrize("width", [1, 3])
def test_mixture_terms(B, M, k, width):
    P, q = C.MixturePrior(M * width, M, k, G(1)).double(), posterior("coded", B, M * width, M, k, seed=B)
    z = q.rsample(G(2))
    t = P.terms(q, z)
    assert set(t) == {"ckl", "aggc", "mi", "zklE", "zklM", "disp"} and all(v.shape == (B,) for v in t.values())
    assert_close(t["zklE"], t["zklM"] + t["disp"], rtol=1e-9, atol=1e-9)
    assert (t["disp"] > 0).all() and (t["zklM"] >= 0).all()
    w, want = q.code.log_q.exp(), torch.zeros(B, dtype=F64)
    for m in range(M):  # by name, component by component
        at = slice(m * width, (m + 1) * width)
        for j in range(k):
            kl = kl_divergence(
                Normal(q.mean[:, at], (0.5 * q.logvar[:, at]).exp()), Normal(P.mean[m, j], (0.5 * P.logvar[m, j]).exp())
            ).sum(-1)
            want = want + w[:, m, j] * kl
    assert_close(t["zklE"], want)
    law = sum(
        MixtureSameFamily(
            Categorical(torch.ones(k, dtype=F64)), Independent(Normal(P.mean[m], (0.5 * P.logvar[m]).exp()), 1)
        ).log_prob(z[:, m * width : (m + 1) * width])
        for m in range(M)
    )
    assert_close(P.log_weight(z), law)
    P.mean.data[:], P.logvar.data[:] = P.mean.data[:, :1].clone(), P.logvar.data[:, :1].clone()
    same = P.terms(q, z)
    assert same["disp"].abs().max() < 1e-9
    assert_close(same["zklE"], same["zklM"], rtol=1e-9, atol=1e-9)
    assert_close(
        P.log_weight(z), Normal(P.mean[:, 0].flatten(), (0.5 * P.logvar[:, 0].flatten()).exp()).log_prob(z).sum(1)
    )


def test_no_dispersion_where_a_sentence_is_sure():
    P, q = C.MixturePrior(6, 3, 4, G(1)).double(), posterior("coded", 9, 6, 3, 4)
    sure = C.CodedGaussian(q.mean, q.logvar, C.Codes((q.code.mode.view(9, 3, 4) - 1) * 1e4))
    t = P.terms(sure, q.mean)
    assert t["disp"].abs().max() < 1e-9 and P.terms(q, q.mean)["disp"].min() > 1e-3
    c = q.code.logits.argmax(-1)
    own = [P.mean[torch.arange(3), c].flatten(1), P.logvar[torch.arange(3), c].flatten(1)]
    assert_close(t["zklM"], C.gauss_kl(q.mean, q.logvar, *own).sum(1))


def test_natural_parameters():
    m, lv, x = (torch.randn(50, generator=G(i), dtype=F64) for i in range(3))
    e1, e2 = C.natural(m, lv)
    assert_close((-e1 / (2 * e2), -1 / (2 * e2)), (m, lv.exp()))
    assert_close(
        e1 * x + e2 * x * x - C.log_partition(e1, e2) - 0.5 * math.log(2 * math.pi),
        Normal(m, (0.5 * lv).exp()).log_prob(x),
    )
    a, b = torch.randn(2, 50, generator=G(3), dtype=F64)
    assert_close(C.gauss_kl(m, lv, a, b), kl_divergence(Normal(m, (0.5 * lv).exp()), Normal(a, (0.5 * b).exp())))


def test_terms_of_a_product_are_those_of_its_parts():
    P, q = C.BothPrior(StandardNormal(4), C.UniformCodes(2, 3)), posterior("both")
    x = q.rsample(G())
    t = P.terms(q, x)
    assert_close(
        t["zkl0"],
        kl_divergence(Normal(q.z.mean, (0.5 * q.z.logvar).exp()), Normal(torch.zeros(1, dtype=F64), 1.0)).sum(1),
    )
    assert_close({k: t[k] for k in ("ckl", "aggc", "mi")}, C.code_terms(q.c.log_q))
    assert_close(P.log_weight(x), Normal(0.0, 1.0).log_prob(x[:, :4]).sum(1) - 2 * math.log(3))


def test_parse_terms():
    assert Z.parse_terms("") == {} and Z.parse_terms(" a  b=-2 c=1e-3 ") == dict(a=1.0, b=-2.0, c=0.001)
    for bad in ("a=", "a=x", "a=1=2"):
        with pytest.raises(ValueError, match="weight of a must be a number"):
            Z.parse_terms("b " + bad)


# --- Monte Carlo


def agrees(draws, want):  # `draws` (n, B) against `want` (B,), within five standard errors of each
    se = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - want).abs() < 5 * se + 1e-9).all(), (draws.mean(0) - want, se)
    assert se.max() < 0.05


def many(q, P, n=4000):
    "One-draw estimates of KL(q || P) as the base class makes them, `(n, B)`"
    g = G(5)
    return torch.stack([Prior.kl(P, q, q.rsample(g))[0] for _ in range(n)])


def test_kl_of_uniform_codes():
    P, q = C.UniformCodes(2, 3).double(), posterior("codes")
    kl, n = P.kl(q, q.rsample(G()), n=9)
    assert (n == 9).all()
    agrees(many(q, P), kl)


def test_kl_of_a_product():
    P, q = C.BothPrior(StandardNormal(4), C.UniformCodes(2, 3)).double(), posterior("both").map(lambda x: 0.3 * x)
    kl, _ = P.kl(q, q.rsample(G()))
    agrees(many(q, P), kl)
    assert_close(kl, q.z.kl_standard().sum(1) + C.code_terms(q.c.log_q)["ckl"])


def test_kl_of_a_mixture():
    "In one dimension, against quadrature; and never above the mean-field KL"
    P, q = C.MixturePrior(1, 1, 3, G(1)).double(), posterior("coded", 7, 1, 1, 3)
    x = torch.linspace(-30, 30, 60_001, dtype=F64)[:, None]
    log_q, log_p = q.pairwise(x), P.log_weight(x)[:, None]
    want = (log_q.exp() * (log_q - log_p)).sum(0) * 0.001
    g = G(5)
    agrees(torch.stack([P.kl(q, q.rsample(g))[0] for _ in range(4000)]), want)
    t = P.terms(q, q.mean)
    assert (want <= t["ckl"] + t["zklE"] + 1e-9).all()


@pytest.mark.parametrize("name", ["uniform", "product", "mixture"])
def test_samples_have_the_density(name):
    "E_p[g/p] = 1 for a density g, and the same generator gives the same draws"
    P = Z.PRIORS[name](TextSettings(prior=name, d=2, codes=2, classes=3), G(3)).double()
    x = P.sample(100_000, gen=G(4))
    assert x.shape == (100_000, P.d) and x.dtype == F64 and not x.requires_grad
    assert torch.equal(P.sample(50, gen=G(4)), P.sample(50, gen=G(4)))
    g = dict(
        uniform=lambda: posterior("codes", 1),
        product=lambda: posterior("both", 1, 2).map(lambda x: 0.3 * x - 0.2),
        mixture=lambda: DiagGaussian(*2 * [torch.zeros(1, 2, dtype=F64)]),
    )[name]()
    r = (g.pairwise(x)[:, 0] - P.log_weight(x)).exp().detach()
    assert abs(r.mean() - 1) < 5 * r.std() / len(r) ** 0.5 < 0.1
    with pytest.raises(ValueError, match="no symbols"):
        P.sample(2, y=1)


def test_a_prior_without_its_two_methods():
    class Half(Prior):
        pass

    with pytest.raises(NotImplementedError, match="Half needs `sample"):
        Half(2).sample(1)
    with pytest.raises(NotImplementedError, match="Half needs `log_weight"):
        Half(2).terms(posterior("gaussian", d=2), torch.zeros(7, 2))


def test_mixture_needs_a_multiple():
    with pytest.raises(ValueError, match="multiple of 3, got 8"):
        C.MixturePrior(8, 3, 2)


# --- posteriors


@pytest.mark.parametrize("relaxed", [False, True])
def test_gumbel_draws_have_the_probabilities(relaxed):
    n, q = 40_000, posterior("codes", 3, relaxed=relaxed, temperature=0.7)
    row = C.Codes(q.logits[:1].expand(n, -1, -1), relaxed, 0.7)
    x = row.rsample(G(1)).view(n, 2, 3)
    p, hit = (
        q.log_q[0].exp(),
        nnf.one_hot(x.argmax(-1), 3).double().mean(0),
    )  # the largest entry is the class, softened or not
    assert ((hit - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    assert_close(x.sum(-1), torch.ones(n, 2, dtype=F64))
    assert (((x == 0) | (x == 1)).all().item()) is not relaxed
    pair = (
        nnf.one_hot(3 * x[:, 0].argmax(-1) + x[:, 1].argmax(-1), 9).double().mean(0).view(3, 3)
    )  # the variables are independent
    want = p[0][:, None] * p[1]
    assert ((pair - want).abs() < 5 * (want * (1 - want) / n).sqrt()).all()


def test_relaxed_in_training_alone():
    for head in (C.CodesHead(5, 2, 3), C.BothHead(5, 4, 2, 3), C.CodedHead(5, 4, 2, 3)):
        h = torch.randn(6, 5, generator=G())

        def code(q):
            return q if isinstance(q, C.Codes) else getattr(q, "c", None) or q.code

        q = head.train()(h)
        c = code(q)
        assert c.relaxed and q.rsample(G()).shape == (6, head.d)
        w = torch.randn(6, 6, generator=G(1))
        (c.rsample(G()) * w).sum().backward()
        assert (
            head.get_parameter("logits.weight" if isinstance(head, C.CodesHead) else "c.logits.weight").grad.abs().sum()
            > 0
        )
        hard = code(head.eval()(h))
        assert (
            not hard.relaxed
            and not hard.rsample(G()).requires_grad
            and hard.rsample(G()).unique().tolist() == [0.0, 1.0]
        )


@pytest.mark.parametrize("system,terms", [("dvae", ""), ("semi-vae", ""), ("dgm-vae", "aggc")])
def test_gradient_reaches_the_codes(corpus, system, terms):
    "Through the decoder; in mixtures, where it sees no codes, through the terms"
    m = make(corpus, system)[1].model.train()
    t = m(get_batch(corpus["train"], torch.arange(16)), G())
    head = m.encoder.head
    W = (head.logits if system == "dvae" else head.c.logits).weight

    def by(k):
        return torch.autograd.grad(t[k].mean(), W, retain_graph=True, allow_unused=True)[0]

    assert (by("nll") is None) == (system == "dgm-vae")
    if system == "dgm-vae":
        assert (
            all(by(k).abs().sum() > 0 for k in ("aggc", "mi", "zklM", "disp"))
            and torch.autograd.grad(t["disp"].mean(), m.prior.logvar)[0].abs().sum() > 0
        )
    else:
        assert by("nll").abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_round_trips(kind):
    q = posterior(kind, relaxed=True, temperature=0.3)

    def same(a, b):
        assert type(a) is type(b)
        for k, v in vars(a).items():
            w = vars(b)[k]
            if isinstance(v, Posterior):
                same(v, w)
            elif isinstance(v, torch.Tensor):
                assert torch.equal(v, w)
            else:
                assert v == w, k

    assert len(q) == 7 and len(q[:3]) == 3 and len(q[torch.tensor([1, 1, 4, 0])]) == 4
    same(q.map(lambda x: x), q)
    same(Posterior.cat([q[:2], q[2:3], q[3:]]), q)
    same(Posterior.cat([q]), q)
    i = torch.tensor([6, 0, 3])
    same(q[i][torch.tensor([1, 2, 0])], q[torch.tensor([0, 3, 6])])
    same(q[i], Posterior.cat([q[j : j + 1] for j in i.tolist()]))
    same(q.to("cpu"), q)
    assert all(x.device.type == "meta" for x in tensors(q.to("meta"))) and all(x.dtype == F64 for x in tensors(q))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(tensors(q.map(lambda x: x + 0)), tensors(q)))
    x = q.rsample(G())
    assert x.shape == q.mode.shape and len(q.features) == 7 and torch.equal(x, q.rsample(G()))
    assert_close(q[i].log_prob(x[i]), q.log_prob(x)[i])


@pytest.mark.parametrize("kind", KINDS)
def test_pairwise_is_log_prob_row_by_row(kind):
    q = posterior(kind)
    x = q[torch.tensor([0, 2, 5])].rsample(G(1))
    got = q.pairwise(x)
    assert got.shape == (3, 7)
    for i in range(3):
        assert_close(got[i], q.log_prob(x[i : i + 1].expand(7, -1)))


@pytest.mark.parametrize("kind", KINDS)
def test_densities_sum_to_one(kind):
    if kind == "codes":
        q = posterior(kind)
        all_codes = torch.cat(
            [C.one_hot(torch.tensor([[a, b]]), torch.zeros(1, 2, 3, dtype=F64)) for a in range(3) for b in range(3)]
        )
        return assert_close(q.pairwise(all_codes).exp().sum(0), torch.ones(7, dtype=F64))
    q = posterior(kind, d=1, M=1)
    x = torch.linspace(-40, 40, 80_001, dtype=F64)[:, None]
    if kind == "both":
        total = sum(
            q.pairwise(torch.cat([x, torch.eye(3, dtype=F64)[j].expand(len(x), 3)], 1)).exp().sum(0) for j in range(3)
        )
    else:
        total = q.pairwise(x).exp().sum(0)
    assert_close(total * 0.001, torch.ones(7, dtype=F64), rtol=1e-6, atol=1e-6)


# --- schedules


def test_logistic_is_the_released_schedule():
    got = [logistic(t / 100_000, 0.05) for t in (0, 2000, 2500, 4000, 5000)]
    assert got == pytest.approx([1 / (1 + math.exp(-0.0025 * (t - 2500))) for t in (0, 2000, 2500, 4000, 5000)])
    assert got[1] == pytest.approx(0.223, abs=5e-4) and got[2] == 0.5 and got[3] == pytest.approx(0.98, abs=5e-3)
    assert logistic(0.0, 0.0) == 1.0


def test_cyclical_is_the_released_schedule():
    xs = [cyclical((i + 0.5) / 10_000) for i in range(10_000)]
    assert (
        sum(x == 0 for x in xs) == 5000
        and sum(x == 1 for x in xs) == 2500
        and min(xs) == 0
        and sum(b < a for a, b in zip(xs, xs[1:])) == 9
    )
    assert all(a == pytest.approx(b) for a, b in zip(xs, xs[1000:]))


def test_weight_of_the_latent_terms(corpus):
    _, t = make(corpus, "svebm-ib", "published", steps=1000)
    w = [t.weights(i, 1000) for i in range(1000)]
    assert (
        [x["kl"] for x in w] == [x["ebm"] for x in w] == [x["ebm_enc"] for x in w]
        and max(x["kl"] for x in w) == 0.5
        and sum(x["kl"] == 0 for x in w) == pytest.approx(500, abs=11)
    )
    assert all((x.get("mi") == -50) == (x["kl"] > 0) for x in w) and not any(
        k in x for x in w for k in ("cls", "sym", "bow")
    )
    _, t = make(corpus, "dgm-vae", steps=1000)
    w = [t.weights(i, 1000) for i in (0, 150, 999)]
    assert (
        w[0]["aggc"] == pytest.approx(0.002, abs=1e-3)
        and w[1]["zklM"] == 0.5
        and w[2]["disp"] == pytest.approx(0.2, rel=1e-3)
        and all(x["disp"] == pytest.approx(0.2 * x["mi"]) for x in w)
    )
    assert all(
        make(corpus, "di-vae", o)[1].weights(0, 1000)["aggc"] == (1.0 if o == "consistent" else pytest.approx(1.0))
        for o in OBJECTIVES
    )


# --- every system, in both objectives

CASES = [(r, o) for r in Z.TABLE for o in OBJECTIVES]


def test_the_table_has_its_systems():
    assert len(Z.TABLE) == 16 and len(CASES) == 32 and len({r.title for r in Z.SYSTEMS.values()}) == len(Z.SYSTEMS)
    assert all(Z.SYSTEMS[k].published is not None for k in Z.TABLE) and all(r.about for r in Z.SYSTEMS.values())
    with pytest.raises(ValueError, match="no published variant"):
        resolve(TextJob(system="vae-fb", objective="published"))


LEARNING = [pytest.param(r, o, marks=[pytest.mark.slow] if o == "published" else []) for r, o in CASES]


@pytest.mark.parametrize("system,objective", LEARNING)
def test_system_learns(tmp_path, corpus, system, objective):
    "Resolve, build, 50 updates, sentences that end"
    job, task = make(corpus, system, objective, steps=50)
    s, m = task.settings, task.model
    batch = get_batch(corpus["train"], torch.arange(8))
    terms = m.train()(batch, G())
    for step in (0, 1, 25, 49):
        for k, w in task.weights(step, 50).items():
            assert k in terms or k == "cls" and w == s.w_cls > 0, f"{k} is no term"
    assert all(v.shape == (8,) and v.isfinite().all() for v in terms.values())
    before = task.validate()
    nll = "nll" if system == "rnn-lm" else "recon_nll"
    by = task.select or nll  # the last model stands in some published systems
    assert by in before and (task.select is None) == (s.select == "last")
    end = fit(task, Run(tmp_path / "run", record_settings(job, s)), train_cfg(s), 0, "cpu")
    after = task.validate()
    assert end.step == 50 and after[by] < 0.95 * before[by], (by, before, after)
    assert after[nll] < 0.95 * before[nll]
    got = sample_sentences(m, 20, gen=G(), max_len=s.max_len, temperature=1.0 if system == "rnn-lm" else 0.0)
    words = [corpus.vocab.decode(x) for x in got]
    assert len(got) == 20 and all(
        isinstance(x, list) and len(x) <= s.max_len and corpus.vocab.eos not in x for x in got
    )
    assert all(isinstance(w, str) for x in words for w in x) and any(words)


@pytest.mark.parametrize("system", Z.TABLE)
def test_systems_select_by_what_they_say(corpus, system):
    for o in OBJECTIVES:
        s = resolve(job_for(system, o))
        want = {**Z.SYSTEMS[system].settings, **(Z.SYSTEMS[system].published if o == "published" else {})}
        assert all(getattr(s, k) == v for k, v in want.items() if k not in NET), (system, o)


# --- what the released code does differently


def plain_nll(dec, ids, lengths, z):
    "Padded, sentence by sentence, with PyTorch's own layers"
    out = []
    for x, n, zi in zip(ids, lengths.tolist(), z):
        zs, zh = zi[dec.parts["step"]], zi[dec.parts["start"]]
        h0 = dec.start(zh)[None, None] if len(zh) else torch.zeros(1, 1, dec.rnn.hidden_size)
        h, _ = dec.rnn(torch.cat([dec.embed(x[: n - 1]), zs.expand(n - 1, -1)], 1)[None], h0)
        logits = dec.out(h[0]) if hasattr(dec, "out") else h[0] @ dec.embed.weight.T
        out.append(nnf.cross_entropy(logits, x[1:n], reduction="sum"))
    return torch.stack(out)


@pytest.mark.parametrize(
    "system,objective,more",
    [
        ("vae", "published", {}),
        ("ae", "published", {}),
        ("semi-vae", "published", {}),
        ("semi-vae", "consistent", {}),
        ("dvae", "published", {}),
        ("dgm-vae", "published", {}),
        ("semi-vae", "consistent", dict(start="codes", step="none", tied=False)),
        ("semi-vae", "consistent", dict(start="none", step="codes")),
    ],
)
def test_decoder_against_a_plain_one(corpus, system, objective, more):
    _, t = make(corpus, system, objective, **more)
    m, dec = t.model.eval(), t.model.decoder
    b = get_batch(corpus["test"], torch.arange(6))
    with torch.no_grad():
        z = m.encode(b).rsample(G())
        if hasattr(dec, "out"):
            assert dec.out.bias.abs().sum() > 0
        assert_close(dec.nll(b.ids, b.host_lengths, z), plain_nll(dec, b.ids, b.host_lengths, z), rtol=1e-4, atol=1e-4)
        ids, word, live = dec.generate(z, max_len=5), torch.full((6,), dec.bos), torch.ones(6, dtype=torch.bool)
        h = (
            dec.start(z[:, dec.parts["start"]])[None]
            if hasattr(dec, "start")
            else torch.zeros(1, 6, dec.rnn.hidden_size)
        )
        for i in range(ids.shape[1]):  # greedy, step by step
            live = live & (word != dec.eos)
            o, h = dec.rnn(torch.cat([dec.embed(word), z[:, dec.parts["step"]]], 1)[:, None], h)
            word = (dec.out(o[:, 0]) if hasattr(dec, "out") else o[:, 0] @ dec.embed.weight.T).argmax(-1)
            assert torch.equal(ids[:, i], torch.where(live, word, 0))


@pytest.mark.parametrize(
    "system,where,n",
    [
        ("semi-vae", "published", 8),
        ("semi-vae", "consistent", 8 + 20),
        ("dvae", "published", 20),
        ("dgm-vae", "published", 8),
        ("vae", "published", 8),
    ],
)
def test_what_the_decoder_reads_at_a_word(corpus, system, where, n):
    dec = make(corpus, system, where)[1].model.decoder
    assert dec.rnn.input_size - 32 == n
    b = get_batch(corpus["test"], torch.arange(4))
    if system == "semi-vae" and where == "published":  # codes reach the words through the first state alone
        z = torch.randn(4, 28, generator=G())
        other = torch.cat([z[:, :8], z[:, 8:].roll(1, 0)], 1)
        assert torch.equal(dec.part(z, "step"), dec.part(other, "step")) and not torch.equal(
            dec.eval().nll(b.ids, b.host_lengths, z), dec.nll(b.ids, b.host_lengths, other)
        )
        dec.start.weight.data[:, 8:] = 0
        assert_close(dec.nll(b.ids, b.host_lengths, z), dec.nll(b.ids, b.host_lengths, other), rtol=0, atol=0)


TABLES = dict(shared={"ae", "vae", "dae", "dvae", "di-vae", "semi-vae", "semi-vae-i"}, untied={"rnn-lm", "ae", "vae"})


@pytest.mark.parametrize("system", [r for r in Z.TABLE if "ebm" not in r])
def test_tables_and_outputs(corpus, system, tmp_path):
    "Shared embedding: one parameter, once in the optimiser, still one after loading and from a file"
    for objective in OBJECTIVES:
        m = make(corpus, system, objective)[1].model

        def own(m):
            return m.encoder is not None and m.encoder.embed.weight is m.decoder.embed.weight

        published = objective == "published"
        assert own(m) == (published and system in TABLES["shared"]) and hasattr(m.decoder, "out") == (
            published and system in TABLES["untied"]
        )
        params = m.groups()["main"] + m.groups()["ebm"]
        assert len({id(p) for p in params}) == len(params) == len(list(m.parameters()))
        if not own(m):
            continue
        save_tensors(tmp_path / "m.safetensors", m.state_dict())
        other = make(corpus, system, objective, seed=1)[1].model
        assert not torch.equal(other.decoder.embed.weight, m.decoder.embed.weight)
        other.load_state_dict(load_tensors(tmp_path / "m.safetensors")[0])
        assert own(other) and torch.equal(other.encoder.embed.weight, m.decoder.embed.weight)
        with torch.no_grad():
            other.decoder.embed.weight += 1
        assert torch.equal(other.encoder.embed.weight, other.decoder.embed.weight)


@pytest.mark.parametrize("system", ["vae", "semi-vae", "gm-vae"])
def test_draws_are_averaged(corpus, system):
    m = make(corpus, system, "published", dropout=0)[1].model.train()
    assert m.cfg.draws == 20
    b = get_batch(corpus["train"], torch.arange(5))
    got, q = m(b, G(3)), m.encode(b)
    zs = q[torch.arange(5).repeat(20)].rsample(G(3)).view(20, 5, -1)
    assert_close(
        got["nll"], torch.stack([m.decoder.nll(b.ids, b.host_lengths, z) for z in zs]).mean(0), rtol=1e-4, atol=1e-4
    )
    want = m.prior.terms(q, zs[0])
    assert all(torch.allclose(got[k], v, atol=1e-5) for k, v in want.items()) and set(got) == {"nll"} | set(want)
    m.eval()
    assert_close(
        m(b, G(3))["nll"], m.decoder.nll(b.ids, b.host_lengths, m.encode(b).rsample(G(3)))
    )  # one draw for evaluation


def test_noise_of_an_autoencoder(corpus):
    b = get_batch(corpus["train"], torch.arange(5))
    clean, noisy = (make(corpus, "ae", o, dropout=0)[1].model.train() for o in ("consistent", "published"))
    assert torch.equal(clean(b, G(1))["nll"], clean(b, G(2))["nll"]) and not torch.equal(
        noisy(b, G(1))["nll"], noisy(b, G(2))["nll"]
    )
    assert torch.equal(clean.draw(clean.encode(b)), clean.encode(b).mean)


# --- settings


@pytest.mark.parametrize(
    "system,setting",
    [
        ("vae", "codes=4"),
        ("vae", "classes=3"),
        ("vae", "T=3"),
        ("vae", "clamp=False"),
        ("dvae", "d=8"),
        ("dvae", "free_nats=.1"),
        ("dgm-vae", "free_nats=.1"),
        ("ae", "w_kl=.5"),
        ("dae", "anneal=none"),
        ("ae", "kl_warmup=.1"),
        ("rnn-lm", "terms=ckl"),
        ("rnn-lm", "shared=True"),
        ("ldebm", "codes=4"),
        ("ldebm", "squared_step=1"),
        ("svebm", "classes=3"),
        ("semi-vae", "rho=.5"),
    ],
)
def test_settings_without_effect_are_refused(system, setting):
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]} would have no effect on system '{system}'"):
        resolve(TextJob(system=system, settings=setting))


@pytest.mark.parametrize(
    "change,wrong",
    [
        (dict(system="vea"), "unknown system 'vea'; did you mean 'vae'"),
        (dict(system="dvae", settings="prior=unifrom"), "unknown prior 'unifrom'; did you mean 'uniform'"),
        (dict(system="dvae", settings="anneal=cyclic"), "unknown anneal 'cyclic'; did you mean 'cyclical'"),
        (dict(system="dvae", settings="terms='ckl=much'"), "weight of ckl must be a number"),
        (dict(system="semi-vae", settings="step=c"), "unknown value of step 'c'"),
        (dict(system="semi-vae", settings="start=code"), "unknown value of start 'code'; did you mean 'codes'"),
        (dict(system="dvae", settings="codes=0"), "codes=0 .* must be at least 1"),
        (dict(system="dvae", settings="classes=0"), "classes=0 .* must be at least 1"),
        (dict(system="vae", settings="draws=0"), "draws=0 .* must be at least 1"),
        (dict(system="dgm-vae", settings="codes=3 d=8"), "d to be a multiple of it, got d=8"),
        (dict(system="dvae", settings="importance_draws=1"), "importance_draws=1 .* must be at least 2"),
        (dict(system="dvae", settings="select=base_bound"), "unknown select 'base_bound'"),
        (dict(system="dae", settings="select=neg_elbo"), "unknown select 'neg_elbo'"),
        (dict(system="vae", settings="noise=False"), "a bound needs draws"),
        (dict(system="vae", settings="prior=none"), "prior=none has no latent, and d="),
    ],
)
def test_unknown_names_are_refused_before_work(tmp_path, change, wrong):
    with pytest.raises(ValueError, match=wrong):
        open_job(TextJob(**change, out=str(tmp_path / "run"), device="cpu"))
    assert not list(tmp_path.iterdir())


def test_an_unknown_term_stops_the_first_update(tmp_path, corpus):
    job, task = make(corpus, "dvae", terms="'ckl zkl0'")
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    with pytest.raises(ValueError, match="no term called zkl0; terms are nll, ckl, aggc, mi"):
        fit(task, Run(tmp_path / "run", {}), train_cfg(task.settings), 0, "cpu")
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
    with pytest.raises(ValueError, match="prior 'uniform' has no term called zkl0; it has ckl, aggc, mi"):
        task.validate()


def test_identity_of_a_run():
    "The settings of the zoo are part of it only where a system sets them"
    job = TextJob(system="ldebm-no-gc")
    got = record_settings(job, resolve(job))
    assert not set(got) & {*LATER, *SCORING}
    assert set(got) == {f.name for f in dataclasses.fields(TextSettings)} - {
        *LATER,
        *SCORING,
        "checkpoint_every",
        "changes",
    } | {"system", "corpus", "preset", "objective", "seed", "variant"}

    def at(system, objective="consistent"):
        job = TextJob(system=system, objective=objective)
        return {k: v for k, v in record_settings(job, resolve(job)).items() if k in LATER}

    assert at("ldebm") == dict(cluster_by="lifts")
    assert at("ldebm-no-gc") == at("ldebm", "published") == at("rnn-lm") == {}
    assert at("dvae") == dict(terms="ckl", anneal="logistic", select="objective", codes=16)
    assert at("dvae", "published") == dict(
        terms="ckl=.25", anneal="logistic", select="objective", codes=16, shared=True
    )
    assert at("vae") == dict(terms="zkl0", anneal="logistic", select="objective") and at("ae") == dict(
        select="objective", noise=False
    )
    assert at("semi-vae", "published")["step"] == "z" and at("svebm", "published") == dict(
        terms="kl ebm ebm_enc", anneal="cyclical", select=Z.PANG["select"], clamp=False
    )


def test_heads_and_parts():
    s = TextSettings(prior="product", d=6, codes=2, classes=5)
    assert Z.latent_parts(s) == dict(all=(0, 16), z=(0, 6), codes=(6, 16), none=(0, 0))
    r = dataclasses.replace
    assert Z.latent_parts(r(s, prior="uniform")) == dict(all=(0, 10), z=(0, 0), codes=(0, 10), none=(0, 0))
    assert (
        Z.latent_parts(r(s, prior="mixture"))
        == Z.latent_parts(r(s, prior="normal"))
        == dict(all=(0, 6), z=(0, 6), codes=(6, 6), none=(0, 0))
    )
    for name in Z.PRIORS:
        x = r(s, prior=name)
        assert Z.HEADS[Z.head_of(x)](7, x).d == Z.PRIORS[name](x, G()).d == Z.latent_parts(x)["all"][1]


def test_weights_come_from_the_generator(corpus):
    "Same seed, same weights, whatever the global generator does; another seed, others"
    for system in ("dgm-vae", "dvae", "semi-vae"):
        s = resolve(job_for(system))
        torch.manual_seed(1)
        a = build_model(s, corpus.vocab, 0).state_dict()
        torch.manual_seed(2)
        b = build_model(s, corpus.vocab, 0).state_dict()
        c = build_model(s, corpus.vocab, 1).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a) and not any(
            torch.equal(a[k], c[k]) for k in a if a[k].numel() > 3 and not k.endswith("loc")
        )


def test_validation_noise_is_given(corpus):
    "Also where a prior's terms draw"
    seen = []

    class Drawing(StandardNormal):
        def terms(self, q, z, gen=None, labels=None, label_weights=None):
            seen.append(gen)
            return super().terms(q, z, gen)

    _, task = make(corpus, "vae")
    task.model.prior = Drawing(8)
    task.validate()
    assert seen and all(isinstance(g, torch.Generator) for g in seen)


# --- information and likelihood


@pytest.mark.parametrize("kind", KINDS)
def test_information_has_bounds(kind):
    n = 32
    q = posterior(kind, n, d=6, M=6, k=4)
    m = information(q, G())
    assert -0.05 < m["value"] <= math.log(n) + 1e-9 and m["n"] == n
    alike = information(q[torch.zeros(n, dtype=torch.long)], G())
    assert abs(alike["value"]) < 1e-9
    apart = q.map(lambda x: 100 * x) if kind == "codes" else q.map(lambda x: x.clone())
    if kind == "codes":
        assert information(apart, G())["value"] <= math.log(n) + 1e-9  # draws that coincide tell less
    else:
        g = apart if kind != "both" else apart.z
        g.mean, g.logvar = 50 * torch.arange(n, dtype=F64)[:, None].expand(n, 6), torch.zeros(n, 6, dtype=F64)
        assert information(apart, G())["value"] == pytest.approx(math.log(n))


def test_information_of_sure_codes():
    "Each of 9 codes for equally many sentences: log 9"
    logits = torch.zeros(36, 2, 3, dtype=F64)
    logits[torch.arange(36), 0, torch.arange(36) % 3] = logits[torch.arange(36), 1, torch.arange(36) // 3 % 3] = 1e4
    assert information(C.Codes(logits), G())["value"] == pytest.approx(math.log(9))


def all_codes(M, k):  # Every one-hot latent, shape `(k**M, M k)`
    return C.one_hot(torch.cartesian_prod(*M * [torch.arange(k)]).view(-1, M), torch.zeros(k**M, M, k))


@pytest.mark.parametrize("M,k", [(1, 4), (2, 3), (3, 2)])
def test_importance_against_enumeration(M, k):
    P, q, codes = (
        C.UniformCodes(M, k),
        posterior("codes", 12, M=M, k=k, dtype=torch.float32).map(lambda x: 0.3 * x),
        all_codes(M, k),
    )
    assert len(codes.unique(dim=0)) == k**M
    table = 1.5 * torch.randn(12, k**M, generator=G(1))

    def log_lik(z, i):
        return (z @ codes.T == M).float().mul(table[i]).sum(1)

    exact = -(table + P.log_weight(codes)).logsumexp(1)
    got = nll_importance(P, q, log_lik, 4000, 1000, G(2))
    p, w = q.pairwise(codes).T.exp(), table + P.log_weight(codes) - q.pairwise(codes).T
    variance = (
        (p * (2 * w).exp()).sum(1) / (p * w.exp()).sum(1) ** 2 - 1
    ) / 4000  # of the logarithm of the mean, to first order
    assert ((got["nll"] - exact).abs() < 5 * variance.sqrt() + 1e-3).all() and variance.max() < 0.01
    assert (got["variance"] > 0.3 * variance).all()  # what is reported is no less
    runs = torch.stack(
        [nll_importance(P, q, log_lik, 3, gen=G(i))["nll"] for i in range(300)]
    )  # few draws: above it on average
    assert (runs.mean(0) - exact > -5 * runs.std(0) / 300**0.5).all() and (runs.mean() - exact.mean()) > 0
    with pytest.raises(ValueError, match="at least 2 draws"):
        nll_importance(P, q, log_lik, 1)


def exact_nll(task, index, z, log_w):
    "Minus log of the sum over `z` of p(x|z) times `exp(log_w)`, for each sentence"
    with frozen_weights(task.model), torch.no_grad():
        f = sentence_log_lik(task, "test", index)
        return torch.stack(
            [-(f(z, torch.full((len(z),), k)).double() + log_w.double()).logsumexp(0) for k in range(len(index))]
        )


def sharpen(task):
    "Weights with which the latent matters: an untrained decoder hardly looks at it"
    with torch.no_grad():
        for n, p in task.model.decoder.named_parameters():
            p.mul_(3.0) if n != "embed.weight" else p.mul_(4.0)
    return task


def check_against(got, exact):
    lo, _, hi = estimation_interval(got)
    assert lo - 2e-3 < exact.mean() < hi + 2e-3 and hi - lo < 0.3
    assert ((got["nll"] - exact).abs() < 5 * got["variance"].sqrt() + 2e-3).all(), (
        got["nll"] - exact,
        got["variance"].sqrt(),
    )


def test_likelihood_of_codes(corpus):
    task = sharpen(make(corpus, "dvae", codes=2, classes=3, importance_draws=2000)[1])
    got, codes = text_nll(task, "test", 6), all_codes(2, 3)
    with torch.no_grad():
        exact = exact_nll(task, got["index"], codes, task.model.prior.log_weight(codes))
        spread = exact_nll(task, got["index"], codes[:1], torch.zeros(1)) - exact_nll(
            task, got["index"], codes[-1:], torch.zeros(1)
        )
    assert spread.abs().max() > 0.1, "the codes do not matter"
    check_against(got, exact)


def test_likelihood_of_a_mixture(corpus):
    task = sharpen(make(corpus, "dgm-vae", d=1, codes=1, classes=3)[1])
    got = text_nll(task, "test", 6, NLLCfg(draws=400, chains=8))
    grid = torch.linspace(-20, 20, 1601)[:, None]
    with torch.no_grad():
        w = task.model.prior.log_weight(grid) + math.log(0.025)
    assert w.logsumexp(0).abs() < 1e-3
    check_against(got, exact_nll(task, got["index"], grid, w))


def test_likelihood_of_both(corpus):
    task = sharpen(make(corpus, "semi-vae", d=1, codes=1, classes=3, importance_draws=2000)[1])
    got = text_nll(task, "test", 6)
    z = torch.linspace(-7, 7, 401)[:, None]
    grid = torch.cat([torch.cat([z, torch.eye(3)[j].expand(401, 3)], 1) for j in range(3)])
    check_against(got, exact_nll(task, got["index"], grid, task.model.prior.log_weight(grid) + math.log(0.035)))


# --- a job from end to end


@pytest.mark.parametrize("system", ["dvae", "semi-vae", "gm-vae", "ae", "dae"])
def test_evaluate_and_score(corpus, system):
    job, task = make(corpus, system)
    metrics, found = evaluate(task, 0)
    assert len(found["samples"]) == 40 and len(found["reconstructions"]) == 60 and len(found["means"]) == 60
    metrics.update(score(task, job, found["samples"]))
    assert all(m["value"] is None or math.isfinite(m["value"]) for m in metrics.values())
    assert {"prior_hole_auroc", "prior_hole_mmd", "bleu", "recon_nll", "objective", "wkl", "grammatical"} <= set(
        metrics
    ) and not set(metrics) & {"rppl", "rhat", "nll_published"}
    bound = system not in ("ae", "dae")
    assert (
        all((k in metrics) == bound for k in ("nll_valid", "neg_elbo", "kl", "exact_gap"))
        and ("information" in metrics) == bound
    )
    assert all((k in metrics) == (system != "ae") for k in ("ckl", "aggc", "mi_codes"))
    v = {k: m["value"] for k, m in metrics.items()}
    if system != "ae":
        assert v["ckl"] == pytest.approx(v["aggc"] + v["mi_codes"], abs=1e-4)
    if not bound:
        assert v["objective"] == pytest.approx(v["recon_nll"])
    if system == "dvae":
        assert v["objective"] == pytest.approx(v["recon_nll"] + v["ckl"], rel=1e-5) and v["objective"] == pytest.approx(
            v["neg_elbo"], rel=1e-5
        )


@pytest.mark.parametrize("shape,number", [("codes=1 classes=5", 5), ("codes=2 classes=2", 4), ("codes=4 classes=5", 0)])
def test_codes_are_held_against_labels(corpus, shape, number):
    "Each combination is a symbol, where sixty sentences can fill them"
    sizes = dict(part.split("=") for part in shape.split())
    _, task = make(corpus, "dgm-vae-i", **sizes)
    posterior, gen = task.encode("test"), G()
    found = latent_metrics(task, posterior, gen, 0)
    assert ("ami_topic" in found) == (number > 0)
    k_means = found["ami_topic_kmeans"]["estimator"]
    assert "not computed" not in k_means
    if number:
        own = [tuple(code) for code in posterior.code.logits.argmax(-1).tolist()]
        symbols = [sorted(set(own)).index(code) for code in own]
        labels = corpus["test"].labels["topic"].tolist()
        assert found["ami_topic"]["value"] == pytest.approx(adjusted_mutual_info_score(labels, symbols))
        assert found["homogeneity_topic"]["value"] == pytest.approx(homogeneity_score(labels, symbols))
        assert f"of {number} symbols" in found["ami_topic_ceiling"]["estimator"]


def test_clusters_in_the_metric_of_words(corpus):
    "In training, and of finished latents beside it"
    _, task = make(corpus, "ldebm", cluster_by="fisher", n_symbols=4)
    posterior = task.encode("train")
    x = by_fisher(posterior.mean, task.model.bow)
    labels = task.clusters(posterior.mean, G())
    assert labels.equal(cluster_targets(x, 4, dims=0, n_init=5, gen=G()))
    assert labels.equal(task.clusters(posterior.mean, G(1), labels)), "those of the epoch before are where it starts"
    assert task.start_epoch(1000, None, G())["labels"].equal(labels)
    found = latent_metrics(task, task.encode("test"), G(), 0)
    own = kmeans_labels(by_fisher(task.encode("test").mean, task.model.bow), 4, make_gen(0, "evaluate", "fisher"))
    topics = corpus["test"].labels["topic"].tolist()
    assert found["ami_topic_fisher"]["value"] == pytest.approx(adjusted_mutual_info_score(topics, own.tolist()))


@pytest.mark.parametrize("system,objective", [("dvae", "published"), ("gm-vae", "consistent")])
def test_a_run_goes_on_where_it_was_stopped(tmp_path, corpus, system, objective):
    "With a shared table, a learned prior and relaxed codes"

    def run(folder, killed_at=None):
        _, task = make(corpus, system, objective, checkpoint_every=4)
        inner, calls = task.model.forward, []

        def forward(*a, **kw):
            calls.append(1)
            if len(calls) == killed_at:
                raise RuntimeError("killed")
            return inner(*a, **kw)

        task.model.forward = forward
        assert (
            fit(
                task, Run(tmp_path / folder, {}), dataclasses.replace(train_cfg(task.settings), steps=12), 0, "cpu"
            ).step
            == 12
        )
        return task.model.state_dict(), len(calls)

    whole, n = run("a")
    with pytest.raises(RuntimeError, match="killed"):
        run("b", 7)
    again, rest = run("b")
    assert (n, rest) == (12, 8) and all(torch.equal(v, again[k]) for k, v in whole.items())


def test_a_prior_of_your_own_takes_as_many_lines_as_its_page_says():
    "Imports, classes, entries and the run"
    cells = json.loads((ROOT / "nbs" / "own_prior.ipynb").read_text())["cells"]
    lines = [
        x
        for c in cells
        if "new" in c["metadata"].get("tags", [])
        for x in "".join(c["source"]).splitlines()
        if x.strip() and not x.startswith("#|")
    ]
    assert 40 < len(lines) <= 50 and "in fifty lines" in "".join(cells[0]["source"])
    assert not [c for c in cells if "".join(c["source"]).startswith("#| export")]
