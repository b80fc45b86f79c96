"Formulas written out a second time, factor by factor: what a wrong factor, sign, index or normaliser would not survive"

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ldebm import latent_metrics, layers, text_nets, text_vae
from ldebm import likelihood as L
from ldebm import stats as st
from ldebm import two_samples as two
from ldebm.annealing import LogZ, Plan, anneal, model_level
from ldebm.clusters import balance_weights, cluster_targets, published_draw
from ldebm.codes import Codes
from ldebm.conditioning import GuidedEnergy
from ldebm.convergence import ess, split_rhat
from ldebm.core import make_gen
from ldebm.energy import EnergyNet, Frozen, level_table
from ldebm.evidence import trace_evidence
from ldebm.exact import MixtureEnergy, QuadraticEnergy
from ldebm.generator import Generator
from ldebm.generator_model import GeneratorModel
from ldebm.generator_parts import GeneratorCfg
from ldebm.image_metrics import density_coverage, frechet_metric, frechet_moments, inception_features, precision_recall
from ldebm.images import ImageBatch
from ldebm.langevin import Conditional, Point, chain, preconditioned, shorten, unadjusted
from ldebm.layer_control import upper_score
from ldebm.layered import LayeredEnergy, LayerNets
from ldebm.levels import PriorCfg
from ldebm.lm import LM, LMCfg, as_stream, read_text, side_by_side
from ldebm.lm_training import segments, train_lm
from ldebm.paths import fit_proposal
from ldebm.posterior import DiagGaussian, StandardNormal, free_bits
from ldebm.prior import DiffusionEBM
from ldebm.published import nll_ldebm
from ldebm.recovery import gaussian_log_z, symbol_terms
from ldebm.reverse import nats_interval
from ldebm.schedule import (
    consistent_schedule,
    cosine_schedule,
    diffuse,
    diffuse_pair,
    diffuse_path,
    published_schedule,
    stratified_levels,
)
from ldebm.score_prior import ScorePriorCfg, make_score_prior
from ldebm.stacks import Stack
from ldebm.text import Batch
from ldebm.text_nll import exact_gap
from ldebm.train import linear_warmup

F64 = torch.float64
PUBLISHED = {"objective": "published", "reference": "flat", "mala": False}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, g):
    return torch.randn(*shape, generator=g, dtype=F64)


# --- free bits

KL = torch.tensor([[0.0, 4.0, 1.0], [2.0, 0.0, 0.4]], dtype=F64)  # batch means 1, 2, .7


def test_free_bits_are_those_of_the_batch_mean():
    "sum_d max(mean_b KL_bd, floor), for every sentence: not the mean of what single sentences would pay"
    assert free_bits(KL, 1.5).tolist() == [1.5 + 2 + 1.5] * 2
    assert free_bits(KL, 0.0).tolist() == [5.0, pytest.approx(2.4)]
    x = KL.clone().requires_grad_()
    (slope,) = torch.autograd.grad(free_bits(x, 1.5).mean(), x)
    assert slope.tolist() == [[0, 0.5, 0]] * 2  # of the mean, where that is above the floor


def test_masked_free_bits_are_those_of_each_entry():
    "Entries above the threshold whole, the others not at all, each sentence its own"
    assert free_bits(KL, 1.0, clamp=False).tolist() == [4.0, 2.0]


@pytest.mark.parametrize("floor,clamp", [(0.3, True), (0.3, False), (0.0, True)])
def test_the_terms_of_priors_have_these_free_bits(floor, clamp):
    q = DiagGaussian(randn(5, 3, g=gen(1)), 0.5 * randn(5, 3, g=gen(2)))
    kl = 0.5 * (q.mean**2 + q.logvar.exp() - q.logvar - 1)
    want = kl.mean(0).clamp(min=floor).sum().expand(5) if clamp and floor else (kl * (kl > floor)).sum(1)
    p = DiffusionEBM(consistent_schedule(2), energies(2, 1, 3), PriorCfg(free_nats=floor, clamp=clamp, n_steps=0))
    t = p.terms(q, q.rsample(gen(3)), gen(4))
    assert_close(t["kl"], want)
    assert_close(t["kl_base"], kl.sum(1))
    if clamp:
        assert_close(StandardNormal(3, floor).terms(q, q.mean)["kl"], want)


# --- terms of the two objectives, with chains of no step: every number can be written down


def energies(T, K, d, temperature=1.0):
    net = EnergyNet(d, K, T, 8, 1, init=0.7, gen=gen(T + K)).double()
    net.symbol_temperature = temperature
    return net


def F(net, z, t):
    return net.symbol_temperature * torch.logsumexp(net.logits(z, t) / net.symbol_temperature, -1)


def same_slopes(a, b, what):
    slopes = [torch.autograd.grad(f.mean(), what, retain_graph=True, allow_unused=True) for f in (a, b)]
    for x, y in zip(*slopes):
        assert_close(x, y)


def check_symbols(terms, net, clean, positives, labels, weights):
    "`mi`, `sym`, `cls`, `cls_t`, from logits of clean latents `(B, K)` and of positives `(n, B, K)`"
    lp, noisy = ((x / net.symbol_temperature).log_softmax(-1) for x in (clean, positives))
    p, B = lp.exp(), len(clean)
    mean = p.mean(0)
    assert_close(terms["mi"], -(mean * mean.log()).sum() + (p * lp).sum(-1))
    assert_close(terms["sym"], -(p * noisy).sum(-1).mean(0))
    assert_close(terms["cls"], -lp[torch.arange(B), labels] * weights[labels])
    assert_close(terms["cls_t"], -noisy[:, torch.arange(B), labels].mean(0))


@pytest.mark.parametrize("reference", ["gaussian", "flat"])
@pytest.mark.parametrize("T,tau,of_symbols", [(3, 0.7, 1.0), (1, 1.3, 0.5)])
def test_consistent_terms_written_out(reference, T, tau, of_symbols):
    "Negatives are draws of the level's own Gaussian, whose mean carries a latent's gradient through them"
    B, d, K, s = 6, 2, 3, consistent_schedule(T)
    net, z = energies(T, K, d, of_symbols), randn(B, d, g=gen(1)).requires_grad_()
    p = DiffusionEBM(s, net, PriorCfg(reference=reference, levels="all", n_steps=0, temperature=tau))
    labels, weights = torch.tensor([0, 2, 1, 1, 0, 2]), torch.tensor([0.5, 2.0, 1.0], dtype=F64)
    got = p.terms(DiagGaussian(z, torch.zeros_like(z)), z, gen(2), labels, weights)
    g = gen(2)
    e1, e2, e3 = (randn(T * B, d, g=g).view(T, B, d) for _ in range(3))
    contrast, pos_logits = 0.0, []
    for t in range(T):
        lev, last = torch.full((B,), t), t == T - 1
        before, a = s.a[: t + 1].prod().item(), s.a[t + 1].item()
        zt = before * z + math.sqrt(1 - before**2) * e1[t]
        zn = a * zt + math.sqrt(1 - a**2) * e2[t]
        scale, m = (1.0 if last else a, zn) if reference == "flat" else (1.0, a * zn)
        m, v = (0 * zn if last else m), (1.0 if last and reference == "gaussian" else 1 - a**2)
        contrast = contrast + (F(net, m + math.sqrt(v) * e3[t], lev) - F(net, scale * zt, lev)) / tau
        pos_logits.append(net.logits(scale * zt, lev))
    assert_close(got["ebm"], contrast), assert_close(got["ebm_enc"], contrast)
    same_slopes(got["ebm_enc"], contrast, [z])
    same_slopes(got["ebm"], contrast, list(net.parameters()))
    first = s.a[1].item() if reference == "flat" and T > 1 else 1.0
    f0 = net.logits(first * z, torch.zeros(B, dtype=torch.long))
    check_symbols(got, net, f0, torch.stack(pos_logits), labels, weights)
    assert not torch.autograd.grad(got["ebm"].mean(), z, retain_graph=True)[0].any()
    assert torch.autograd.grad(got["ebm_enc"].mean(), net.head.weight, allow_unused=True, retain_graph=True)[0] is None


@pytest.mark.parametrize("weighting", ["drl", "likelihood"])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("kappa", [0.0, 0.2])
def test_published_terms_written_out(weighting, T, kappa):
    "A random level and the last, weighted; half the squared latent under the last; the entropy where it is above kappa"
    B, d, K, s, b2 = 6, 3, 2, published_schedule(T), 3e-3
    net, (mean, logvar) = energies(T, K, d), (randn(B, d, g=gen(k)).requires_grad_() for k in (1, 2))
    p = DiffusionEBM(s, net, PriorCfg(**PUBLISHED, weighting=weighting, n_steps=0, squared_step=b2, free_nats=kappa))
    labels, weights = torch.tensor([0, 1, 1, 1, 0, 0]), torch.tensor([0.5, 2.0], dtype=F64)
    z = mean + (0.5 * logvar).exp() * randn(B, d, g=gen(3))
    got, g = p.terms(DiagGaussian(mean, logvar), z, gen(4), labels, weights), gen(4)
    low = torch.randint(T - 1, (B,), generator=g) if T > 1 else None
    rows = [low, torch.full((B,), T - 1)] if T > 1 else [torch.full((B,), T - 1)]
    n = len(rows)
    e1, e2 = (randn(n * B, d, g=g).view(n, B, d) for _ in range(2))
    e0, a, total, enc, pos_logits = randn(B, d, g=g), s.a.tolist(), 0.0, 0.0, []
    sigma = [math.sqrt(1 - x**2) for x in a]
    for k, levels in enumerate(rows):

        def col(f, levels=levels):
            return torch.tensor([[f(t)] for t in levels.tolist()], dtype=F64)

        def noised(t):
            return math.sqrt(1 - math.prod(a[: t + 1]) ** 2)

        zt = col(lambda t: math.prod(a[: t + 1])) * z + col(noised) * e1[k]
        zn = col(lambda t: a[t + 1]) * zt + col(lambda t: sigma[t + 1]) * e2[k]
        pos = col(lambda t: 1.0 if t == T - 1 else a[t + 1]) * zt
        w = col(
            lambda t: (
                sigma[1] / sigma[t + 1] if weighting == "drl" else 1 / (b2 * noised(t) / noised(0) * sigma[t + 1] ** 2)
            )
        )[:, 0]
        total = total + w * (F(net, zn, levels) - F(net, pos, levels))  # a chain of no step is at the latent above
        enc = enc - w * F(net, pos, levels)
        pos_logits.append(net.logits(pos, levels))
    assert_close(got["ebm"], total), assert_close(got["ebm_enc"], enc)
    assert_close(got["gauss"], w * (zt**2).sum(1) / 2)
    entropy = [[-(1 + x) / 2 if -(1 + x) / 2 > kappa else 0.0 for x in row] for row in logvar.tolist()]
    assert_close(got["entropy"], torch.tensor(entropy, dtype=F64).sum(1))
    for term, by in (("ebm_enc", enc), ("gauss", w * (zt**2).sum(1) / 2)):
        same_slopes(got[term], by, [mean, logvar])
    same_slopes(got["ebm"], total, list(net.parameters()))
    clean = (a[1] if T > 1 else 1.0) * (a[0] * z + sigma[0] * e0)
    f0 = net.logits(clean, torch.zeros(B, dtype=torch.long))
    check_symbols(got, net, f0, torch.stack(pos_logits), labels, weights)
    assert torch.autograd.grad(got["ebm_enc"].mean(), net.head.weight, allow_unused=True, retain_graph=True)[0] is None


def test_symbols_of_noisy_latents_follow_those_of_clean_ones():
    "`sym` moves what is said of noisy latents alone: its target is held"
    f0, fp = (randn(n, 3, g=gen(n)).requires_grad_() for n in (4, 8))
    t = symbol_terms(energies(2, 3, 2), f0, fp)
    own, other = torch.autograd.grad(t["sym"].mean(), (fp, f0), allow_unused=True, retain_graph=True)
    assert other is None and own.abs().min() > 0
    f = f0.detach().clone().requires_grad_()
    mean = f.softmax(-1).mean(0)
    information = -(mean * mean.log()).sum() + (f.softmax(-1) * f.log_softmax(-1)).sum(-1).mean()
    assert_close(torch.autograd.grad(t["mi"].mean(), f0)[0], torch.autograd.grad(information, f)[0])


# --- convergence of chains


def rhat_by_hand(x):
    "Gelman et al. (2013), eq. 11.3-11.4, of the halves of every chain: variances over n-1, between over m-1"
    n = len(x) // 2
    halves = [list(c) for chain in x.T.tolist() for c in (chain[:n], chain[-n:])]
    means = [sum(c) / n for c in halves]
    W = sum(sum((v - m) ** 2 for v in c) / (n - 1) for c, m in zip(halves, means)) / len(halves)
    B = n * sum((m - sum(means) / len(means)) ** 2 for m in means) / (len(means) - 1)
    return math.sqrt(((n - 1) / n * W + B / n) / W)


@pytest.mark.parametrize("n", [4, 5, 8, 31])
def test_split_rhat_by_hand(n):
    x = randn(n, 3, g=gen(n)).cumsum(0) + torch.arange(3.0)
    assert split_rhat(x) == pytest.approx(rhat_by_hand(x), rel=1e-12)
    assert split_rhat(x[:, :1]) == pytest.approx(rhat_by_hand(x[:, :1]), rel=1e-12)


def test_rhat_of_few_updates_that_agree_is_below_one():
    "Halves with equal means: what is left is sqrt((n-1)/n)"
    assert split_rhat(torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])) == pytest.approx(math.sqrt(1 / 2))
    assert split_rhat(torch.tensor([1.0, -1.0] * 8)[:, None]) == pytest.approx(math.sqrt(7 / 8))


def ess_by_hand(x):
    "Vehtari et al. (2021), sums written out: Geyer's pairs as long as they are positive, never rising"
    n, c = x.shape
    mean = x.mean(0)

    def lagged(k):
        return np.mean([sum((x[i, j] - mean[j]) * (x[i + k, j] - mean[j]) for i in range(n - k)) / n for j in range(c)])

    W = np.mean([((x[:, j] - mean[j]) ** 2).sum() / (n - 1) for j in range(c)])
    var = (n - 1) / n * W + (mean.var(ddof=1) if c > 1 else 0.0)
    rho = [1.0] + [1 - (W - lagged(k)) / var for k in range(1, n)]
    total, least = 0.0, math.inf
    for k in range(0, n - 1, 2):
        pair = rho[k] + rho[k + 1]
        if pair <= 0:
            break
        least = min(least, pair)
        total += least
    return n * c / max(2 * total - 1, 1 / math.log10(n * c))


@pytest.mark.parametrize(
    "n,c,phi", [(12, 1, 0.0), (25, 3, 0.6), (40, 2, -0.5), (9, 4, 0.9), (28, 3, 0.3), (58, 2, 0.6)]
)
def test_ess_by_hand(n, c, phi):
    x = randn(n, c, g=gen(n))
    for i in range(1, n):
        x[i] += phi * x[i - 1]
    for y in (x, x + torch.arange(float(c))):
        assert ess(y) == pytest.approx(ess_by_hand(y.numpy()), rel=1e-9)


# --- text

IDS = torch.tensor([[2, 7, 5, 9, 3], [2, 6, 3, 0, 0], [2, 8, 8, 3, 0]])  # `<s>` is 2, `</s>` 3, padding 0
LENGTHS = torch.tensor([5, 3, 4])


def text_model(seed=0, d=4, **cfg):
    c = text_nets.TextCfg(embed=6, hidden=6, d=d, init=0.6, **cfg)
    return text_vae.TextModel(10, c, StandardNormal(d), bos=2, eos=3, gen=gen(seed)).double()


def sentence_nll(decoder, words, z):
    "One sentence alone, word by word, the end mark with them, each given those before it and the latent"
    weight, bias = decoder.output()
    h, total = decoder.start(z)[None], 0.0
    for word, after in zip(words, words[1:]):
        x = torch.cat([decoder.embed.weight[word], z])[None]
        h = decoder.rnn(x[None], h[None])[0][0]
        logits = h[0] @ weight.T + (0.0 if bias is None else bias)
        total = total - (logits[after] - torch.logsumexp(logits, 0))
    return total


def all_nll(decoder, z):
    rows = zip(IDS.tolist(), LENGTHS.tolist(), z)
    return torch.stack([sentence_nll(decoder, ids[:n], e) for ids, n, e in rows])


@pytest.mark.parametrize("tied", [True, False])
def test_likelihood_of_a_sentence_word_by_word(tied):
    m, z = text_model(tied=tied).eval(), randn(3, 4, g=gen(1))
    assert_close(m.decoder.nll(IDS, LENGTHS, z), all_nll(m.decoder, z))


def test_encoder_reads_each_sentence_alone_and_both_ways():
    m = text_model().eval()
    q = m.encoder(IDS, LENGTHS)
    for i, n in enumerate(LENGTHS.tolist()):
        _, h = m.encoder.rnn(m.encoder.embed.weight[IDS[i, :n]][None])
        summary = torch.where(h > 0, h, 0.01 * h).flatten()
        assert_close(q.mean[i], m.encoder.head.mean(summary)), assert_close(q.logvar[i], m.encoder.head.logvar(summary))


def test_several_draws_of_a_sentence_are_averaged():
    "The reconstruction is the mean over draws of the same sentence; the terms of the prior see the first of them"
    m, batch = text_model(draws=3, dropout=0.0, bow=True).train(), Batch(IDS, LENGTHS, {}, torch.arange(3))
    t, q = m(batch, gen(5)), m.encode(batch)
    zs = q.mean + (0.5 * q.logvar).exp() * randn(9, 4, g=gen(5)).view(3, 3, 4)
    assert_close(t["nll"], torch.stack([all_nll(m.decoder, z) for z in zs]).mean(0))
    assert_close(t["bow"], text_vae.bag_of_words(m.bow(zs[0]), IDS, LENGTHS))


def test_bag_of_words_counts_words_and_no_tags():
    logits = randn(3, 10, g=gen())
    lp = logits - logits.logsumexp(1, keepdim=True)
    want = -torch.stack([lp[0, 7] + lp[0, 5] + lp[0, 9], lp[1, 6], 2 * lp[2, 8]])
    assert_close(text_vae.bag_of_words(logits, IDS, LENGTHS), want)


def test_weighted_terms_are_means_over_the_batch():
    t = {"nll": torch.tensor([1.0, 3.0]), "kl": torch.tensor([4.0, 0.0]), "mi": torch.tensor([1.0, 0.0])}
    assert text_vae.objective(t, {"nll": 1.0, "kl": 0.5, "mi": -2.0}) == 2 + 1 - 1


def test_dropout_keeps_the_mean_and_words_their_first():
    x, p, n = torch.ones(40_000, dtype=F64), 0.3, 40_000
    y = layers.dropout(x, p, gen())
    assert (
        y.unique().tolist() == pytest.approx([0, 1 / 0.7])
        and abs((y == 0).double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    )
    ids, first = torch.full((n,), 7), torch.arange(n) % 4 == 0
    kept = text_nets.drop_words(ids, first, p, gen())
    assert (kept[first] == 7).all() and abs((kept[~first] == 0).double().mean() - p) < 5 * (
        p * (1 - p) / (0.75 * n)
    ) ** 0.5


def test_nucleus_is_the_smallest_set_that_reaches_its_mass():
    "With the word by which it is reached, and the others' odds as they were"
    p, n = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=F64), 20_000
    for top_p, words in ((0.4, {1}), (0.6, {1, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        got = text_nets.pick_word(p.log().expand(n, 4), top_p, gen(1)).bincount(minlength=4) / n
        want = torch.tensor([p[k].item() * (k in words) for k in range(4)])
        want = want / want.sum()
        assert ((got - want).abs() <= 5 * (want * (1 - want) / n).sqrt()).all(), (top_p, got)


def test_words_are_drawn_at_the_temperature(monkeypatch):
    "Logits over the temperature, once"
    m, z, seen = text_model().eval().decoder, randn(3, 4, g=gen(1)), []
    monkeypatch.setattr(text_nets, "pick_word", lambda logits, top_p, g: seen.append(logits) or logits.argmax(-1))
    m.generate(z, max_len=1, temperature=0.25, gen=gen())
    h, _ = m.rnn(torch.cat([m.embed.weight[2].expand(3, -1), z], 1)[:, None], m.start(z)[None])
    assert_close(seen[0], h[:, 0] @ m.embed.weight.T / 0.25)


def test_end_marks():
    assert text_nets.cut_after(torch.tensor([[5, 3, 7, 3], [6, 6, 3, 8]]), 3).tolist() == [[5, 3, 0], [6, 6, 3]]
    assert text_vae.strip(torch.tensor([[5, 3, 0], [6, 6, 3]]), 3) == [[5], [6, 6]]


def test_interpolation_goes_from_the_first_sentence_to_the_second():
    m = text_model().eval()
    batch = Batch(IDS[:2], LENGTHS[:2], {}, torch.arange(2))
    a, b = m.encode(batch).mode
    seen = []
    m.decoder.generate = lambda z, max_len: seen.append(z)
    text_vae.interpolate(m, batch, 5)
    assert_close(seen[0], torch.stack([a + k / 4 * (b - a) for k in range(5)]))


# --- levels


def amplitudes(T):
    "Yu et al. (2022) as released: a thousand linear betas, read at T levels over the first half and at the end"
    kept, product = [], 1.0
    for k in range(1000):
        product *= math.sqrt(1 - (1e-4 + (2e-2 - 1e-4) * k / 999))
        kept.append(product)
    stride = 1000 // (2 * (T - 1)) if T > 1 else 0
    return [kept[i * stride] for i in range(T)] + [kept[999]]


@pytest.mark.parametrize("T", [1, 2, 6])
def test_levels_by_hand(T):
    "Products, noise, and what the next level is scaled by, from each schedule's own definition"
    cosine = [math.cos(math.pi / 2 * t / (T + 0.1)) for t in range(T + 1)]
    for s, abar in ((published_schedule(T), amplitudes(T)), (cosine_schedule(T), cosine)):
        assert s.abar.tolist() == pytest.approx(abar, rel=1e-9)
        a = [abar[0]] + [y / x for x, y in zip(abar, abar[1:])]
        assert s.a.tolist() == pytest.approx(a, rel=1e-9)
        assert s.sigma.tolist() == pytest.approx([math.sqrt(1 - x * x) for x in a], abs=1e-8)
        assert s.sbar.tolist() == pytest.approx([math.sqrt(1 - x * x) for x in abar], abs=1e-8)
        assert s.a_up.tolist() == pytest.approx(a[:-1] + [1.0])
    assert consistent_schedule(T).a.tolist() == pytest.approx([1.0] + published_schedule(T).a[1:].tolist())


def test_diffusion_by_hand():
    "One latent to any level, to two neighbours, and along a path, with the noise that the generator gives"
    s, z, t = published_schedule(3), randn(4, 2, g=gen(1)), torch.tensor([0, 1, 2, 1])
    a, abar = s.a.tolist(), [math.prod(s.a[: k + 1].tolist()) for k in range(4)]
    e = [randn(4, 2, g=g) for g in [gen(2)] for _ in range(4)]
    at = torch.stack([abar[k] * z[i] + math.sqrt(1 - abar[k] ** 2) * e[0][i] for i, k in enumerate(t.tolist())])
    assert_close(diffuse(s, z, t, gen(2)), at)
    up = torch.stack([a[k + 1] * at[i] + math.sqrt(1 - a[k + 1] ** 2) * e[1][i] for i, k in enumerate(t.tolist())])
    assert_close(diffuse_pair(s, z, t, gen(2)), (at, up))
    path, x = [], z
    for k in range(4):
        path.append(x := a[k] * x + math.sqrt(1 - a[k] ** 2) * e[k])
    assert_close(diffuse_path(s, z, gen(2)), torch.stack(path))


@pytest.mark.parametrize("H", [6, 7])
def test_embedding_of_levels(H):
    "Vaswani et al. (2017): sine and cosine of t/10000^(2i/H), level 0 first"
    want = [[(math.sin, math.cos)[j % 2](t / 10_000 ** (2 * (j // 2) / H)) for j in range(H)] for t in range(5)]
    assert_close(level_table(5, H), torch.tensor(want), atol=1e-6, rtol=1e-5)


def test_levels_are_drawn_evenly():
    "Each comes up as often as the others, or once more; each place has every level"
    for B, T in ((12, 4), (7, 3), (3, 5)):
        draws = torch.stack([stratified_levels(B, T, g) for g in [gen(1)] for _ in range(3000)])
        counts = torch.stack([(draws == t).sum(1) for t in range(T)], 1)
        assert counts.min() >= B // T and counts.max() <= -(-B // T)
        p = 1 / T
        first, last = ((draws[:, i, None] == torch.arange(T)).double().mean(0) for i in (0, B - 1))
        for share in (counts.double().mean(0) / B, first, last):
            assert (share - p).abs().max() < 5 * math.sqrt(p * (1 - p) / 3000)


# --- energies


def test_network_layer_by_layer():
    "Two layers of the latent, two of the level, their merge, residual blocks, and the head on an activation"
    net = EnergyNet(2, 3, 4, 6, 2, spectral=False, gen=gen()).double()
    z, t, act = randn(5, 2, g=gen(1)), torch.tensor([0, 3, 1, 2, 3]), lambda x: torch.where(x > 0, x, 0.2 * x)

    def lin(m, x):
        return x @ m.weight.T + m.bias

    latent, level = act(lin(net.z2, act(lin(net.z1, z)))), act(lin(net.t2, act(lin(net.t1, net.table[t]))))
    h = lin(net.merge, torch.cat([latent, level], 1))
    for b in net.blocks:
        h = h + lin(b, act(h))
    assert_close(net.logits(z, t), lin(net.head, act(h)))


def test_guidance_counts_in_the_units_of_the_density():
    "What is added is `guidance` times log p(y | z), times what divides F where it is used"
    net, z, t = energies(2, 3, 2, 0.5), randn(4, 2, g=gen(1)), torch.tensor([0, 1, 1, 0])
    f, y = net.logits(z, t) / 0.5, torch.tensor([2, 0, 1, 1])
    log_p = f[torch.arange(4), y] - torch.logsumexp(f, 1)
    heat = torch.tensor([0.1, 3.0, 3.0, 0.1], dtype=F64)
    got = GuidedEnergy(net, 1.7, lambda t, z: torch.where(t == 0, 0.1, 3.0).to(z))(z, t, y)
    assert_close(got, 0.5 * torch.logsumexp(f, 1) + 1.7 * log_p * heat)


@pytest.mark.parametrize("level", [0, 2])
def test_energies_of_a_mixture_turn_the_reference_into_the_noised_mixture(level):
    means, sd, probs = randn(3, 2, g=gen(1)), 0.3, torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    s, z = consistent_schedule(3), randn(5, 2, g=gen(2))
    got = MixtureEnergy(s, means, sd, probs).logits(z, torch.full((5,), level))
    a = math.prod(s.a[: level + 1].tolist())

    def normal(mean, var):
        return -0.5 * (((z[:, None] - mean) ** 2) / var + math.log(2 * math.pi * var)).sum(2)

    want = probs.log() + normal(a * means, (a * sd) ** 2 + 1 - a * a) - normal(torch.zeros(1, 2, dtype=F64), 1.0)
    assert_close(got, want)


# --- one step, and the test of a step


def test_single_steps_by_hand():
    y, g, m, e = (randn(4, 3, g=gen(k)) for k in range(4))
    v, rho = torch.tensor([[0.5], [1.0], [2.0], [0.1]], dtype=F64), 0.6
    s2, tau = (torch.full((4, 1), x, dtype=F64) for x in (0.3, 0.7))
    here, level = Point(y, torch.zeros(4, dtype=F64), g), Conditional(None, torch.zeros(4).long(), m, v, tau)
    one, other = unadjusted(level, s2).move(here, e), preconditioned(level, rho).move(here, e)
    for i in range(4):
        for j in range(3):
            force = g[i, j] / 0.7 - (y[i, j] - m[i, j]) / v[i, 0]
            assert_close(one[i, j], y[i, j] + 0.15 * force + math.sqrt(0.3) * e[i, j])
            want = (
                m[i, j]
                + rho * (y[i, j] - m[i, j])
                + (1 - rho) * v[i, 0] * g[i, j] / 0.7
                + torch.sqrt(v[i, 0] * (1 - rho * rho)) * e[i, j]
            )
            assert_close(other[i, j], want)


def test_drifts_are_cut_at_so_many_lengths_of_noise():
    "The noise of d coordinates of deviation sd is sd sqrt(d) long"
    move, sd = randn(50, 9, g=gen(1)), 0.2 + torch.rand(50, 1, generator=gen(2), dtype=F64)
    got = shorten(move, 1.5, sd)
    most, long = 1.5 * sd[:, 0] * 3, move.norm(dim=1)
    assert_close(got.norm(dim=1), torch.minimum(long, most))
    assert 0 < (long > most).sum() < 50
    assert_close(got / got.norm(dim=1, keepdim=True), move / long[:, None])
    assert shorten(move, math.inf, sd) is move


@pytest.mark.parametrize("drift", [math.inf, 0.6])
def test_metropolis_chain_by_hand(drift):
    "Roberts and Tweedie (1996): target and proposal both ways, at a temperature; what is reported are probabilities"
    B, d, n, rho, tau = 5, 2, 6, 0.4, 0.6
    q = QuadraticEnergy(0.8 * torch.eye(d, dtype=F64)[None], randn(1, d, g=gen(1)))
    z, m, v = randn(B, d, g=gen(2)), randn(B, d, g=gen(3)), torch.linspace(0.5, 2, B, dtype=F64)[:, None]
    seen, t = [], torch.zeros(B, dtype=torch.long)

    def keep(i, z, accept, **more):
        seen.append((z, accept))

    level = Conditional(Frozen(q), t, m, v, torch.full_like(v, tau))
    end, share = chain(level, preconditioned(level, rho, drift), z, n, gen=gen(4), on_step=keep)
    A, c, g, total = 0.8, q.c[0].detach(), gen(4), 0.0

    def log_normal(x, mean, var):
        return -0.5 * ((x - mean) ** 2 / var).sum(1)

    def target(x):
        return -0.5 * A * ((x - c) ** 2).sum(1) / tau + log_normal(x, m, v)

    sd = torch.sqrt(v * (1 - rho**2))

    def middle(x):
        move = -(1 - rho) * v * A * (x - c) / tau
        return (
            m + rho * (x - m) + move * torch.clamp(drift * sd * math.sqrt(d) / move.norm(dim=1, keepdim=True), max=1.0)
        )

    y = z
    for i in range(n):
        e, u = randn(B, d, g=g), torch.rand(B, generator=g, dtype=F64)
        x = middle(y) + sd * e
        a = torch.exp(target(x) - target(y) + log_normal(y, middle(x), sd**2) - log_normal(x, middle(y), sd**2)).clamp(
            max=1.0
        )
        y, total = torch.where((u < a)[:, None], x, y), total + a
        assert_close(seen[i], (y, a))
    assert_close(end, y), assert_close(share, total / n)
    assert 0 < share.min() < 0.99


# --- normalisers of one level, and the bound


def test_log_z_and_the_bound_by_hand():
    "log mean exp of F/tau; minus F/tau along the path, plus those, plus the KL at zero energy"
    T, d, B, n, tau = 2, 2, 3, 5, 0.6
    net, s = energies(T, 2, d), consistent_schedule(T)
    p = DiffusionEBM(s, net, PriorCfg(temperature=tau))
    z, q = randn(B, d, g=gen(1)), DiagGaussian(randn(B, d, g=gen(2)), randn(B, d, g=gen(3)))
    g, a = gen(4), s.a[1].item()

    def log_z(up, t):
        e, m, v = randn(n, B, d, g=g), (a * up if t == 0 else 0 * up), (1 - a * a if t == 0 else 1.0)
        f = torch.stack([F(net, m + math.sqrt(v) * x, torch.full((B,), t)) for x in e]) / tau
        w = f.exp()
        return w.mean(0).log(), w.sum(0) ** 2 / (w**2).sum(0)

    one = log_z(z, 0)
    got = p.log_z(z, torch.zeros(B, dtype=torch.long), n, gen(4))
    assert_close(got[0], one[0].detach()), assert_close(got[1], one[1].detach())
    g = gen(4)
    zs, x = [], z
    for k in range(T + 1):
        zs.append(x := s.a[k] * x + torch.sqrt(1 - s.a[k] ** 2) * randn(B, d, g=g))
    want, least = 0.5 * (q.mean**2 + q.logvar.exp() - q.logvar - 1).sum(1), torch.full((B,), float(n), dtype=F64)
    for t in range(T):
        lz, eff = log_z(zs[t + 1], t)
        want, least = want - F(net, zs[t], torch.full((B,), t)) / tau + lz, torch.minimum(least, eff)
    got = p.kl(q, z, gen(4), n)
    assert_close(got, (want.detach(), least.detach()))


@pytest.mark.parametrize("reference", ["gaussian", "flat"])
def test_symbols_of_a_clean_latent_at_a_level(reference):
    "Where the level's latents lie: scaled by what is left of it, and to the unknown of that level"
    net, s, z = energies(3, 2, 2), consistent_schedule(3), randn(4, 2, g=gen(1))
    p = DiffusionEBM(s, net, PriorCfg(reference=reference))
    for t in range(3):
        factor = math.prod(s.a[: t + 1].tolist()) * (s.a[t + 1].item() if reference == "flat" and t < 2 else 1.0)
        assert_close(p.symbol_logits(z, t), net.logits(factor * z, torch.full((4,), t)))


# --- clusters


def test_balanced_clusters_weigh_the_same():
    "N/(clusters in use x size): the weights of the data have mean 1; an empty cluster has none"
    labels = torch.tensor([0, 0, 0, 2, 2, 3])
    w = balance_weights(labels, 5)
    assert w.tolist() == pytest.approx([6 / (3 * 3), 0, 6 / (3 * 2), 6 / 3, 0]) and w[
        labels
    ].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("sizes", [(5, 3, 2), (9, 1), (4, 4, 4)])
def test_an_epoch_of_the_released_code_has_as_many_sentences_as_the_data(sizes):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    got = published_draw(labels, gen(1))
    assert len(got) == len(labels) and 0 <= got.min() and got.max() < len(labels)


def test_clusters_are_of_directions_in_whitened_space():
    "Four directions of one plane, of any length, one axis a hundredth of the other"
    way = torch.arange(400) % 4
    angle = math.pi / 2 * way + 0.05 * randn(400, g=gen(1))
    r = torch.exp(1.5 * randn(100, g=gen(2))).repeat_interleave(4)
    x = torch.stack([100 * r * angle.cos(), r * angle.sin()], 1)
    labels = cluster_targets(x, 4, dims=2, n_init=5, gen=gen(3))
    for k in range(4):
        assert len(labels[way == k].unique()) == 1
    assert len(labels.unique()) == 4


# --- score prior


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_simple_loss_written_out(predict):
    "Squares averaged over dimensions and over a latent's own draws; levels from 1 to T"
    cfg = ScorePriorCfg(n_levels=7, predict=predict, draws=2, hidden=6, n_blocks=1, drop=0.0, ema=0.0)
    net = make_score_prior(3, cfg, gen=gen()).double()
    net.net.out.weight.data.normal_(generator=gen(1))
    z, g, s = randn(5, 3, g=gen(2)) * torch.arange(1, 6)[:, None], gen(3), cfg.levels()
    levels = stratified_levels(10, 7, g) + 1
    e, total = randn(10, 3, g=g), [0.0] * 5
    for i, t in enumerate(levels.tolist()):
        a = math.prod(s.a[: t + 1].tolist())
        b, x = math.sqrt(1 - a * a), z[i % 5]
        want = e[i] if predict == "eps" else a * e[i] - b * x
        error = (net.net((a * x + b * e[i])[None], torch.tensor([t]))[0] - want).tolist()
        total[i % 5] += sum(v * v for v in error) / 3 / 2
    assert net.terms(None, z, gen(3))["score"].tolist() == pytest.approx(total)


def test_weights_are_averaged_slowly_only_once_there_is_a_past():
    "After n steps the past counts n/(n+9), at most `ema`"
    p = make_score_prior(2, ScorePriorCfg(n_levels=2, hidden=2, n_blocks=0, ema=0.75), gen=gen())
    w, average = p.net.inp.weight, p.average.inp.weight.detach().clone().double()
    for n in range(1, 40):
        w.data.normal_(generator=gen(n))
        p.before_step()
        past = min(0.75, n / (n + 9))
        average = past * average + (1 - past) * w.detach().double()
    assert_close(p.average.inp.weight.double(), average, rtol=1e-5, atol=1e-6)


# --- pictures


def test_free_nats_are_those_of_the_batch_mean():
    "A layer whose pictures lie on both sides of its allowance pays the mean, if that is above"
    g = Generator(GeneratorCfg(), gen())
    for m in g.post:
        m.weight.data.mul_(3.0)
    x = torch.rand(6, 1, 8, 8, generator=gen(1)) * torch.linspace(0, 3, 6)[:, None, None, None]
    kls = g.encode(x, gen(2))[0].kl_standard().split(g.cfg.dims, 1)
    kls = [k.sum(1).detach() for k in kls]
    layer_free_nats = tuple(float(k.mean()) * f for k, f in zip(kls, (0.99, 1.01, 0.0)))
    batch = ImageBatch(x, None, None)
    got = GeneratorModel(g, layer_free_nats)(batch, gen(2))["kl"]
    assert all((k < f).any() and (k > f).any() for k, f in zip(kls[:2], layer_free_nats))
    assert_close(got, kls[0].mean() + layer_free_nats[1] + kls[2])


def test_encoder_sees_pictures_around_zero():
    "From [0, 1] to [-1, 1]"
    g, seen = Generator(GeneratorCfg(), gen()), []
    g.stem.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    x = torch.rand(3, 1, 8, 8, generator=gen(1))
    g.encode(x, gen(2))
    assert_close(seen[0], 2 * (x - 0.5))


def test_eight_bits_are_the_nearest_of_256():
    "k/255 is grey level k; halves go to the even one"
    seen = []
    net = torch.nn.Flatten()
    net.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    x = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 100 / 255, 254.4 / 255, 1.0])[:, None, None, None]
    inception_features(x, net)
    assert seen[0][:, 0, 0, 0].tolist() == [0, 0, 1, 100, 254, 255] and seen[0].shape == (6, 3, 1, 1)


def test_points_on_the_edge_of_a_ball():
    "Density and coverage count what is nearer than the k-th neighbour; precision and recall what is no farther"
    real = torch.tensor([[0.0], [1.0], [3.0]])  # radii 1, 1, 2 for k = 1
    fake = torch.tensor([[2.0], [5.0]])  # at the edge of the ball around 1, in that around 3; at the edge of the latter
    dc, pr = density_coverage(real, fake, 1), precision_recall(real, fake, 1)
    assert dc["density"]["value"] == 0.5 and dc["coverage"]["value"] == pytest.approx(1 / 3)
    assert pr["precision"]["value"] == 1.0
    assert pr["recall"]["value"] == 1.0  # 0, 1 and 3 are within 3 of a sample


def test_bootstrap_of_a_frechet_distance_resamples_unbiased_covariances():
    a, b, n = randn(12, 2, g=gen(1)), 2 * randn(15, 2, g=gen(2)), 20
    g, values = gen(3), []
    for _ in range(n):
        x, y = (f[torch.randint(len(f), (len(f),), generator=g)] for f in (a, b))
        values.append(frechet_moments(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()))
    m = frechet_metric(a, b, gen(3), n)
    assert m["interval"][1] == pytest.approx(m["value"] + 1.96 * np.std(values, ddof=1))


# --- statistics


def test_share_of_clusters_by_hand():
    "Ratio estimator: variance of the residuals of n items over n-1, as so many trials of Wilson's interval"
    h, t = [3, 0, 1, 4, 2], [5, 4, 3, 4, 6]
    N, n, p = sum(t), 5, sum(h) / sum(t)
    v = sum((a - p * b) ** 2 for a, b in zip(h, t)) / (n - 1) * n / N**2
    m = st.clustered_share(h, t, "x")
    trials = p * (1 - p) / v
    assert trials < N and m["interval"] == pytest.approx(st.wilson_interval(p * trials, trials))


def test_mean_by_regression_by_hand():
    "Cochran (1977), section 7.3: slope by least squares, residuals over n-2, and what the cheap value varies over all"
    x, c = [3.0, 1.0, 4.0, 1.5, 5.0], [2.0, 1.0, 3.0, 1.0, 3.5]
    every = [*c, 0.0, 2.5, 4.0, 4.5]
    n, N, mx, mc, me = 5, 9, sum(x) / 5, sum(c) / 5, sum(every) / 9
    b = sum((u - mx) * (v - mc) for u, v in zip(x, c)) / sum((v - mc) ** 2 for v in c)
    s2 = sum((u - mx - b * (v - mc)) ** 2 for u, v in zip(x, c)) / (n - 2)
    spread = sum((v - me) ** 2 for v in every) / N
    got = st.regression_mean(x, c, every)
    assert got == pytest.approx((mx + b * (me - mc), 1.959964 * math.sqrt(s2 / n + b * b * spread / N)))


@pytest.mark.parametrize("a,n,m", [(0.7, 4, 9), (0.95, 30, 5)])
def test_interval_of_an_auroc_by_hand(a, n, m):
    "Newcombe (2006), method 5: the ends are as far from the value as so many of their own standard errors"
    size = (n + m) / 2
    for t in st.auroc_interval(a, n, m):
        variance = t * (1 - t) / (m * n) * (1 + (size - 1) * ((1 - t) / (2 - t) + t / (1 + t)))
        assert abs(t - a) == pytest.approx(1.959964 * math.sqrt(variance), abs=1e-9)


def test_a_permutation_test_counts_the_sample_itself():
    "No p-value is below 1/(permutations + 1)"
    x = torch.arange(8.0)[:, None] / 8
    assert two.mmd_test(x, x + 100, gen(), n_perm=9)[1] == pytest.approx(1 / 10)


# --- likelihood


@pytest.mark.parametrize("back", [False, True])
def test_acceptance_of_annealing_is_a_mean_over_its_moves(back):
    "Without a tilt every move is accepted"

    def flat(z, t, y=None, context=None):
        return 0 * z.sum(1)

    z, v = randn(4, 2, g=gen(1)), torch.ones(4, 1, dtype=F64)
    level = Conditional(flat, torch.zeros(4, dtype=torch.long), 0 * z, v, v)
    plan = Plan([0.2, 0.7, 1.0], [0.5, 0.5, 0.5], False)
    w, _, share = anneal(level, level.evaluate(z), plan, back=back, gen=gen(2))
    assert_close(share, torch.ones(4, dtype=F64)), assert_close(w, torch.zeros(4, dtype=F64))


@pytest.mark.parametrize("T", [1, 3])
def test_estimate_of_the_released_code_written_out(T):
    "Every level noised on its own; log Z over the draws of a chunk; the last level without the latent above"
    B, d, chunk, draws, s = 2, 2, 3, 6, published_schedule(T)
    net = energies(T, 2, d)
    p = DiffusionEBM(s, net, PriorCfg(**PUBLISHED))
    q = DiagGaussian(randn(B, d, g=gen(1)), -1 + 0.3 * randn(B, d, g=gen(2)))

    def log_lik(z, i):
        return -((z - 1) ** 2).sum(1) * (1 + i)

    got, g = nll_ldebm(p, q, log_lik, draws, chunk, gen(3)), gen(3)
    a, abar = s.a.tolist(), [math.prod(s.a[: k + 1].tolist()) for k in range(T + 1)]

    def log_normal(x, m, v):
        return sum(-((float(u) - float(w)) ** 2) / (2 * v) - 0.5 * math.log(2 * math.pi * v) for u, w in zip(x, m))

    def noise():
        return randn(chunk * B, d, g=g)

    def quad(up, x, here, above, v):
        return float(((up * x - here * above) ** 2).sum()) / (2 * v)

    weights = [[] for _ in range(B)]
    for _ in range(draws // chunk):
        z = q.mean.repeat(chunk, 1) + (0.5 * q.logvar.repeat(chunk, 1)).exp() * noise()
        noised = [abar[k] * z + math.sqrt(1 - abar[k] ** 2) * noise() for k in range(T + 1)]
        above = [a[k + 1] * noised[k] + math.sqrt(1 - a[k + 1] ** 2) * noise() for k in range(T)]
        for b in range(B):
            rows, log_z, parts = range(b, chunk * B, B), [], []
            for k in range(T):
                v, up, here = 1 - a[k + 1] ** 2, (1.0 if k == T - 1 else a[k + 1]), (0.0 if k == T - 1 else 1.0)
                f = [F(net, (up * noised[k][r])[None], torch.tensor([k])).item() for r in rows]
                drawn = [log_normal(noised[k][r], abar[k] * z[r], 1 - abar[k] ** 2) for r in rows]
                under = [f[j] - quad(up, noised[k][r], here, above[k][r], v) - drawn[j] for j, r in enumerate(rows)]
                log_z.append(math.log(sum(math.exp(x) for x in under) / chunk))
                drawn = [log_normal(above[k][r], a[k + 1] * noised[k][r], v) for r in rows]
                parts.append(
                    [f[j] - quad(up, noised[k][r], here, noised[k + 1][r], v) - drawn[j] for j, r in enumerate(rows)]
                )
            for j, r in enumerate(rows):
                prior = sum(o[j] for o in parts) - sum(log_z) + log_normal(noised[T][r], [0.0] * d, 1.0)
                own = sum(log_normal([z[r, c]], [q.mean[b, c]], float(q.logvar[b, c].exp())) for c in range(d))
                weights[b].append(float(log_lik(z[r][None], b)) + prior - own)
    assert got.tolist() == pytest.approx([-math.log(sum(math.exp(x) for x in w) / draws) for w in weights])


def test_importance_weighted_likelihood_by_hand():
    "Burda et al. (2016), eq. 8, with the variance that its effective number of draws leaves"
    q, n = DiagGaussian(randn(3, 2, g=gen(1)), randn(3, 2, g=gen(2))), 4

    def log_lik(z, i):
        return -(z**2).sum(1) * (1 + i)

    got = L.nll_importance(StandardNormal(2), q, log_lik, n, gen=gen(3))
    z = q.mean + (0.5 * q.logvar).exp() * randn(n * 3, 2, g=gen(3)).view(n, 3, 2)
    own, prior = torch.distributions.Normal(q.mean, (0.5 * q.logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    lw = -(z**2).sum(-1) * torch.tensor([1, 2, 3]) + prior.log_prob(z).sum(-1) - own.log_prob(z).sum(-1)
    w = lw.exp()
    assert_close(got["nll"], -w.mean(0).log())
    assert_close(got["ess"], w.sum(0) ** 2 / (w**2).sum(0))
    assert_close(got["variance"], (w**2).sum(0) / w.sum(0) ** 2 - 1 / n)


def test_interval_of_a_mean_likelihood_adds_errors_in_squares():
    "Of sentences and of estimation; the worst level says whether it is valid"
    numbers = {
        "nll": [10.0, 12.0, 17.0],
        "gap": [0.3] * 3,
        "variance": [0.09, 0.18, 0.27],
        "ess": [1.0] * 3,
        "annealed": [0.0] * 3,
        "gap_0": [0.02] * 3,
        "gap_1": [0.12] * 3,
    }
    m = L.nll_metric({k: torch.tensor(v) for k, v in numbers.items()})
    sentences, se = 1.96 * np.std([10, 12, 17], ddof=1) / 3**0.5, math.sqrt(0.54) / 3
    down, up = 0.3 + 0.5 * 0.18 + 1.96 * se, 1.96 * se
    want = 13 - math.hypot(sentences, down), 13 + math.hypot(sentences, up)
    assert m["nll_valid"]["interval"] == pytest.approx(want, abs=2e-4) and "NOT valid" in m["nll_valid"]["estimator"]
    assert m["nll_error"]["value"] == pytest.approx(down + up) and m["nll_gap"]["value"] == pytest.approx(0.12)


def test_what_divides_an_energy_in_a_density():
    "`published`: nothing, or the squared step where asked for; `consistent`: tau; and its slope is divided alike"
    s, z, b2 = published_schedule(2), randn(3, 2, g=gen(1)), 0.01
    net = energies(2, 2, 2)
    p = DiffusionEBM(s, net, PriorCfg(**PUBLISHED, squared_step=b2))
    for t in range(2):
        step = b2 * (s.sbar[t] / s.sbar[0] * (1 - s.a[t + 1] ** 2)).item()
        assert model_level(p, z, t).temperature.tolist() == [[1.0]] * 3
        assert model_level(p, z, t, as_sampled=True).temperature.flatten().tolist() == pytest.approx([step] * 3)
        draws = p.log_z(z, torch.full((3,), t), 16, gen(2))[0]
        drawn = gaussian_log_z(model_level(p, z, t), 16, gen(2))[0]
        assert_close(draws, drawn)
    p = DiffusionEBM(consistent_schedule(2), net, PriorCfg(temperature=0.4))
    level = model_level(p, z, 1)
    assert level.temperature.flatten().tolist() == pytest.approx([0.4] * 3)
    y = z.clone().requires_grad_()
    want, here = F(net, y, torch.ones(3, dtype=torch.long)) / 0.4, level.evaluate(z)
    (slope,) = torch.autograd.grad(want.sum(), y)
    assert_close(level.tilt(here.F), want.detach()), assert_close(here.slope / level.temperature, slope)
    step = preconditioned(level, 0.3)
    assert_close(step.centre(here), 0.3 * z + 0.7 * (level.mean + level.variance * slope))


def test_fitted_proposal_by_hand():
    "Least squares, shrunk by one mean square; residuals and d rows of variance v, over all of these; widened"
    x, y, v, R, d = randn(6, 1, g=gen(1)).numpy(), randn(6, 2, g=gen(2)).numpy(), 0.7, 6, 2
    one = np.c_[x, np.ones(R)]
    beta = np.linalg.solve(one.T @ one + np.eye(2) * (one**2).mean(), one.T @ y)
    left = y - one @ beta
    C = 1.3 * (left.T @ left + d * v * np.eye(d)) / (R + d)
    got = fit_proposal(torch.from_numpy(x), torch.from_numpy(y), v, 1.3)
    assert_close(got.b.numpy(), beta[1]), assert_close(got.G.numpy(), beta[:1])
    assert_close((got.L @ got.L.T).numpy(), C)
    assert_close(
        fit_proposal(torch.from_numpy(x), torch.from_numpy(y), v).L.numpy() * (1.3 / 1.1) ** 0.5, got.L.numpy()
    )


def test_normaliser_of_the_last_level_enters_by_its_upper_bound():
    "And the distance of its lower one is part of the interval"
    q = DiagGaussian(randn(4, 2, g=gen(1)), randn(4, 2, g=gen(2)))
    p = DiffusionEBM(consistent_schedule(1), energies(1, 1, 2), PriorCfg())

    def bounds(low, high):
        def number(x):
            return torch.tensor([x], dtype=F64)

        top = LogZ(number(low), number(high), number(9.0), 1.0, 1, False, number(0.01))

        def log_lik(z, i):
            return -(z**2).sum(1)

        cfg = L.NLLCfg(draws=8, few=0.0)
        return L.nll_bounds(p, q, log_lik, cfg, gen(3), top, {"better": {}})

    one, two = bounds(-0.2, 0.3), bounds(-0.2, 1.0)
    assert_close(two["nll"] - one["nll"], torch.full((4,), 0.7, dtype=F64))
    for o, gap in ((one, 0.5), (two, 1.2)):
        assert_close(o["gap"], torch.full((4,), gap, dtype=F64))


# --- metrics of text


def test_active_units_have_an_unbiased_variance():
    "Of the set, and of every resampled one"
    x = 0.105 * torch.tensor([[-1.0, 2.0, 0.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=F64)
    x[:, 0] *= 0.95
    assert x.var(0, correction=0)[0] < 0.01 < x.var(0)[0] and latent_metrics.active_units(x)["value"] == int(
        (x.var(0) > 0.01).sum()
    )
    m, counts = latent_metrics.active_units(x, 0.01, gen(1), n_boot=60), []
    for row in st.resample_counts(4, 60, gen(1)).astype(int):
        counts.append(int((x[np.repeat(np.arange(4), row)].var(0) > 0.01).sum()))
    assert m["interval"] == pytest.approx(np.percentile(counts, [2.5, 97.5]))


@pytest.mark.parametrize("rows", [2, 512])
def test_information_is_against_all_sentences(rows):
    "log q(z|x) less the log of its mean over every sentence, at one draw of each; drawn on in parts or at once"
    q, n = DiagGaussian(3 * randn(5, 2, g=gen(1)), randn(5, 2, g=gen(2))), 5
    z = q.mean + (0.5 * q.logvar).exp() * randn(5, 2, g=gen(3))
    p = torch.stack([torch.distributions.Normal(q.mean, (0.5 * q.logvar).exp()).log_prob(x).sum(1).exp() for x in z])
    want = sum(math.log(p[i, i] / p[i].mean()) for i in range(n)) / n
    assert latent_metrics.information(q, gen(3), rows)["value"] == pytest.approx(want)


def test_effective_symbols_are_those_of_the_mean():
    "exp(H(mean p)): sentences that are sure, but not of the same symbol, use several"
    p = torch.tensor([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.9, 0.05, 0.05]], dtype=F64)
    mean = [sum(col) / 3 for col in p.T.tolist()]
    assert latent_metrics.effective_symbols(p, probs=True)["value"] == pytest.approx(
        math.exp(-sum(x * math.log(x) for x in mean))
    )


def test_perplexity_interval_by_hand():
    "Blocks of neighbours, which go on at the front; the variance of the mean over seeds beside that of the text"
    S, n, n_boot, b = 3, 47, 200, 2
    nats, tokens = 3 + randn(S, n, g=gen(1)) ** 2, torch.randint(1, 9, (n,), generator=gen(2))
    value, (lo, hi) = nats_interval(nats, tokens, gen(3), n_boot)
    each = [float(v.sum() / tokens.sum()) for v in nats]
    starts = torch.randint(n, (n_boot, -(-n // b)), generator=gen(3)).tolist()
    means = []
    for row in starts:
        at = [(s + k) % n for s in row for k in range(b)]
        means.append(float(nats.mean(0)[at].sum() / tokens[at].sum()))
    half = 1.959964 * math.sqrt(np.var(means, ddof=1) + np.var(each, ddof=1) / S)
    mid = sum(each) / S
    assert (value, lo, hi) == pytest.approx((math.exp(mid), math.exp(mid - half), math.exp(mid + half)))


def test_language_model_word_by_word():
    "Embedding, one LSTM, and a softmax over the same table, whose last column is the bias"
    cfg = LMCfg(layers=1, embed=5, hidden=5, batch=2, optimizer="adam", lr=1e-3)
    lm = LM(list("abcd"), [], cfg, gen(1)).double().eval()
    lm.table.data[:, -1] = randn(4, g=gen(2))
    ids = torch.randint(4, (7, 2), generator=gen(3))
    rnn = torch.nn.LSTM(5, 5, dtype=F64)
    for p, w in zip(rnn.parameters(), lm.rnn[0]):
        p.data.copy_(w.data)
    h = rnn(lm.table[ids[:-1], :-1])[0]
    logits = h @ lm.table[:, :-1].T + lm.table[:, -1]
    want = logits.logsumexp(-1) - logits.gather(-1, ids[1:, :, None])[..., 0]
    assert_close(read_text(lm, ids, rows=6), want.detach())


def test_training_loss_of_a_language_model_is_a_mean_over_words():
    "Not over segments, of which some are shorter"
    names = "dropout dropout_between dropout_input dropout_embed weight_drop ar tar weight_decay"
    off = dict.fromkeys(names.split(), 0.0)
    still = LMCfg(layers=1, embed=6, hidden=6, optimizer="adam", lr=1e-30, bptt=12, batch=2, epochs=1, **off)
    text = [[chr(97 + k) for k in torch.randint(8, (9,), generator=gen(i)).tolist()] for i in range(30)]
    lm = train_lm(text, text[:8], still, seed=3)
    streams = side_by_side(as_stream(lm.ids, text), 2)
    read = [n for _, n, _ in segments(len(streams), 12, make_gen(3, "segments", 0))]
    assert len(set(read)) > 1
    assert lm.history[0]["train"] == pytest.approx(float(read_text(lm, streams)[: sum(read)].mean()), rel=1e-6)


# --- the rest


def test_weights_of_terms_rise_linearly():
    assert [linear_warmup(x, 0.4, 0.2) for x in (0.0, 0.1, 0.2, 0.4, 0.9)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0])


def test_codes_are_mixed_with_even_ones():
    q = Codes(randn(3, 2, 4, g=gen(1)))
    assert_close(q.wider(0.2).log_q.exp(), 0.8 * q.log_q.exp() + 0.2 / 4)
    assert_close(q.wider(0.2).logits.logsumexp(-1), torch.zeros(3, 2, dtype=F64))


def test_softened_codes_by_hand():
    "Jang et al. (2017), eq. 2: Gumbel noise on log-probabilities, over the temperature"
    logits = randn(3, 2, 4, g=gen(1))
    u = torch.rand(3, 2, 4, generator=gen(2), dtype=F64)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    w = (p / -u.log()) ** (1 / 0.4)
    assert_close(Codes(logits, relaxed=True, temperature=0.4).rsample(gen(2)), (w / w.sum(-1, keepdim=True)).flatten(1))


def test_exact_gap_is_the_mean_log_ratio():
    "What the model needs more than the truth: its NLL plus the true log-probability"
    got = exact_gap(torch.tensor([3.0, 5.0]), ["a", "b"], {"a": -2.5, "b": -3.0}.get)
    assert got["value"] == pytest.approx((0.5 + 2.0) / 2)


def test_updates_are_worth_their_effective_share():
    "R-hat and effective draws of the second half of the first k updates, over all draws in it"
    tr = randn(1, 16, 2, 3, g=gen(1)).float()
    ks, rhat, worth = trace_evidence(tr, 2)
    assert ks == [8, 16]
    for j, k in enumerate(ks):
        parts = [tr[0, k // 2 : k, :, i] for i in range(3)]
        assert worth[0, j].item() == pytest.approx(sorted(ess(x) / (k // 2 * 2) for x in parts)[1])
        assert rhat[0, j].item() == pytest.approx(sorted(split_rhat(x) for x in parts)[1])


@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_first_weights_keep_the_scale_of_what_they_read(gain):
    "Variance gain^2 over the number of inputs"
    w = Stack(3, (40, 10, 3, 3), norm=False, gain=gain, gen=gen(1)).weight.flatten()
    want = gain / math.sqrt(90)
    assert abs(w.std() - want) < 5 * want / math.sqrt(2 * len(w)) and abs(w.mean()) < 5 * want / math.sqrt(len(w))


def test_score_of_upper_layers_at_a_temperature():
    "F over the temperature, and half of the squares of the layers that count"
    g = Generator(GeneratorCfg(channels=(3, 2, 2)), gen()).double()
    e = LayeredEnergy(g, LayerNets((1, 1, 1), (3, 2, 2), n_levels=2, hidden=6, gen=gen(1)).double(), 2)
    u, t = randn(4, 7, g=gen(2)), torch.zeros(4, dtype=torch.long)
    layers = e.by_layer(u, t)
    assert_close(e(u, t), layers.sum(0)[:, 0])  # one logit: F itself
    for k, d in ((0, 7), (1, 5), (2, 3)):
        assert_close(
            upper_score(e, u, k, temperature=0.3), layers[: 3 - k].sum(0)[:, 0] / 0.3 - 0.5 * (u[:, :d] ** 2).sum(1)
        )
