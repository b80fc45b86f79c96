"The sampler's law: what finite chains draw, level by level, is what algebra says, under all objectives and references"

import copy
import math
from functools import partial

import pytest
import torch
from chains import with_runners
from torch import nn
from torch.testing import assert_close

from ldebm import graphs
from ldebm.convergence import split_rhat
from ldebm.diagnostics import plot_energy_traces, trace_rhat
from ldebm.energy import Energy, EnergyNet, Frozen
from ldebm.exact import QuadraticEnergy
from ldebm.graphs import Gathered, Pending, RecordedGrad, has_recorded_chain, record_chain, recorded_terms, recording
from ldebm.langevin import Conditional, chain, linear_chain_moments, preconditioned, unadjusted, updates
from ldebm.levels import PriorCfg
from ldebm.posterior import DiagGaussian
from ldebm.prior import DiffusionEBM, Known, consistent_terms, published_terms
from ldebm.recovery import encoder_bound
from ldebm.registry import RUNNERS
from ldebm.schedule import (
    consistent_schedule,
    cosine_schedule,
    diffuse_pair,
    diffuse_path,
    flat_variances,
    make_schedule,
    published_schedule,
)
from ldebm.text_nets import Decoder, TextCfg
from ldebm.text_settings import TextJob, resolve

F64 = torch.float64
SE = 5  # standard errors allowed


def gen(seed):
    return torch.Generator().manual_seed(seed)


def zero(T, d):
    return QuadraticEnergy(torch.zeros(T, d, d, dtype=F64), torch.zeros(T, d, dtype=F64))


def quadratic(T, d, seed, lo=0.1, hi=1.0, centre=1.0):
    "Symmetric positive matrices with eigenvalues in [lo, hi] and any axes, and centres"
    g = gen(seed)
    Q = torch.linalg.qr(torch.randn(T, d, d, generator=g, dtype=F64))[0]
    A = Q @ torch.diag_embed(lo + (hi - lo) * torch.rand(T, d, generator=g, dtype=F64)) @ Q.mT
    return QuadraticEnergy((A + A.mT) / 2, centre * torch.randn(T, d, generator=g, dtype=F64))


def check_moments(x, mean, cov, what=""):
    "Sample mean and every entry of the covariance, against theirs"
    n = len(x)
    z = (x.mean(0) - mean).abs() / (cov.diagonal() / n).sqrt()
    assert z.max() < SE, f"{what}: mean {x.mean(0).tolist()} is {z.max():.1f} standard errors from {mean.tolist()}"
    se = ((torch.outer(cov.diagonal(), cov.diagonal()) + cov**2) / n).sqrt()
    z = (x.T.cov().reshape(cov.shape) - cov).abs() / se
    assert z.max() < SE, f"{what}: covariance {x.T.cov().tolist()} is {z.max():.1f} standard errors from {cov.tolist()}"


def check_gaussian(x, what=""):
    "Third and fourth moments of standardised coordinates"
    u = (x - x.mean(0)) / x.std(0)
    for power, want, var in (
        (3, 0.0, 6.0),
        (4, 3.0, 24.0),
    ):  # large-sample variances of skewness and kurtosis of a Gaussian
        z = ((u**power).mean(0) - want).abs() / (var / len(x)) ** 0.5
        assert z.max() < SE, (
            f"{what}: moment {power} of the standardised sample is {z.max():.1f} standard errors from a Gaussian's"
        )


def recursion(M, b, kappa2, mean, cov, n):
    "Moments after `n` steps of `y <- M y + b + sqrt(kappa2) eps`, iterated rather than summed"
    for _ in range(n):
        mean, cov = M @ mean + b, M @ cov @ M.T + kappa2 * torch.eye(len(b), dtype=F64)
    return mean, cov


def model(energy, objective="consistent", reference="gaussian", **kw):
    T = energy.n_levels
    if objective == "published":
        return DiffusionEBM(
            published_schedule(T), energy, PriorCfg(objective="published", reference="flat", mala=False, **kw)
        )
    return DiffusionEBM(consistent_schedule(T), energy, PriorCfg(reference=reference, **kw))


# -- one level, a finite number of steps


@pytest.mark.parametrize("T,d,K", [(6, 3, 50), (2, 2, 9), (1, 4, 50)])
def test_published_chain_at_each_level(T, d, K):
    n, qe = 12_000, quadratic(T, d, 10 * T + d)
    p = model(qe, "published", n_steps=K)
    z = torch.randn(T, d, generator=gen(1), dtype=F64)
    t = torch.arange(T).repeat_interleave(n)
    y = p.conditional(z[t], t).sample(gen=gen(2))[0]
    s, eye = p.schedule, torch.eye(d, dtype=F64)
    for lev in range(T):
        sigma2 = (1 - s.a[lev + 1] ** 2).item()
        s2 = 2e-3 * sigma2 * (1 - s.a[: lev + 1].prod() ** 2).sqrt().item() / (1 - s.a[0] ** 2).sqrt().item()
        A, c, m = qe.A[lev].detach(), qe.c[lev].detach(), torch.zeros(d, dtype=F64) if lev == T - 1 else z[lev]
        # y + s^2/2 (grad F/s^2 - (y-m)/sigma^2) + s eps: the temperature of the published chain is its own squared step
        M, b = eye - 0.5 * A - 0.5 * s2 / sigma2 * eye, 0.5 * A @ c + 0.5 * s2 / sigma2 * m
        check_moments(y[t == lev], *recursion(M, b, s2, z[lev], torch.zeros(d, d, dtype=F64), K), f"level {lev} of {T}")


@pytest.mark.parametrize("K", [1, 3, 50])
def test_published_chain_against_the_geometric_sum(K):
    "One dimension, so that the closed form of a linear chain applies as it stands"
    T, n, A, c, z = 6, 12_000, 0.3, -0.8, 1.3
    qe = QuadraticEnergy(torch.full((T, 1, 1), A, dtype=F64), torch.full((T, 1), c, dtype=F64))
    p = model(qe, "published", n_steps=K)
    t = torch.arange(T).repeat_interleave(n)
    y = p.conditional(torch.full((len(t), 1), z, dtype=F64), t).sample(gen=gen(K))[0]
    for lev in range(T):
        v = (p.schedule.sigma[lev + 1] ** 2).item()
        s2 = (p.schedule.sbar[lev] / p.schedule.sbar[0]).item() * 2e-3 * v
        m = 0.0 if lev == T - 1 else z
        mean, var = linear_chain_moments(1 - 0.5 * A - 0.5 * s2 / v, 0.5 * A * c + 0.5 * s2 * m / v, s2**0.5, z, 0.0, K)
        check_moments(y[t == lev], torch.tensor([mean], dtype=F64), torch.tensor([[var]], dtype=F64), f"level {lev}")


@pytest.mark.parametrize("reference", ["gaussian", "flat"])
@pytest.mark.parametrize("T,K,rho,tau", [(6, 5, 0.8, 1.0), (2, 1, 0.0, 0.7), (1, 12, 0.9, 1.4)])
def test_unadjusted_consistent_chain_at_each_level(reference, T, K, rho, tau):
    n, d = 12_000, 3
    qe = quadratic(T, d, 7 * T + K)
    p = model(qe, reference=reference, n_steps=K, rho=rho, temperature=tau)
    z = torch.randn(T, d, generator=gen(3), dtype=F64)
    t = torch.arange(T).repeat_interleave(n)
    y = p.conditional(z[t], t, mala=False).sample(gen=gen(4))[0]
    eye = torch.eye(d, dtype=F64)
    for lev in range(T):
        a, last = p.schedule.a[lev + 1].item(), lev == T - 1
        v = 1.0 if last and reference == "gaussian" else 1 - a**2
        m = torch.zeros(d, dtype=F64) if last else z[lev] * (a if reference == "gaussian" else 1)
        A, c = qe.A[lev].detach(), qe.c[lev].detach()
        M, b = rho * eye - (1 - rho) * v / tau * A, (1 - rho) * (m + v / tau * A @ c)
        check_moments(
            y[t == lev], *recursion(M, b, v * (1 - rho**2), m, v * eye, K), f"{reference}, level {lev} of {T}"
        )


def test_steps_have_the_moments_of_a_longer_chain_only_when_they_should():
    "The comparison can fail: K steps are told from K+2 by the same test"
    qe = quadratic(1, 2, 0)
    p = model(qe, "published", n_steps=6)
    z = torch.full((12_000, 2), 2.0, dtype=F64)
    y = p.conditional(z, torch.zeros(12_000, dtype=torch.long)).sample(gen=gen(0))[0]
    A, c, s2 = qe.A[0].detach(), qe.c[0].detach(), 2e-3 * (p.schedule.sigma[1] ** 2).item()
    M, b = torch.eye(2, dtype=F64) * (1 - 1e-3) - 0.5 * A, 0.5 * A @ c

    def moments(k):
        return recursion(M, b, s2, z[0], torch.zeros(2, 2, dtype=F64), k)

    check_moments(y, *moments(6))
    with pytest.raises(AssertionError):
        check_moments(y, *moments(8))


# -- no energy


@pytest.mark.parametrize("mala", [False, True])
@pytest.mark.parametrize("n_steps", [0, 1, 7])
@pytest.mark.parametrize("make", [consistent_schedule, cosine_schedule])
def test_zero_energy_is_standard_normal_at_every_level(make, n_steps, mala):
    "Any number of steps, with or without a Metropolis test; neighbours are as correlated as the diffusion makes them"
    n, d = 12_000, 3
    for T in (1, 2, 6):
        s = make(T)
        zs = DiffusionEBM(s, zero(T, d), PriorCfg()).sample(
            n, gen=gen(T + 100 * n_steps + mala), n_steps=n_steps, mala=mala, path=True
        )
        assert zs.shape == (T + 1, n, d)
        for lev, x in enumerate(zs):
            check_moments(x, torch.zeros(d, dtype=F64), torch.eye(d, dtype=F64), f"level {lev} of {T}")
            check_gaussian(x, f"level {lev} of {T}")
        for lev in range(T):  # the top level does not look at what lies above it
            a = 0.0 if lev == T - 1 else s.a[lev + 1].item()
            both = torch.stack([zs[lev][:, 0], zs[lev + 1][:, 0]], 1)
            check_moments(
                both,
                torch.zeros(2, dtype=F64),
                torch.tensor([[1.0, a], [a, 1.0]], dtype=F64),
                f"levels {lev} and {lev + 1} of {T}",
            )


@pytest.mark.parametrize("T", [1, 2, 6])
def test_zero_energy_under_the_flat_reference(T):
    n, d, s = 12_000, 2, consistent_schedule(T)
    want = [1 - s.a[-1].item() ** 2]
    for t in reversed(range(T - 1)):
        want.insert(0, (want[0] + 1 - s.a[t + 1].item() ** 2) / s.a[t + 1].item() ** 2)
    assert_close(flat_variances(s), torch.tensor(want, dtype=F64))
    if T == 6:
        assert abs(want[0] - 24.7) < 0.05
    for n_steps, mala in ((0, False), (7, False), (7, True)):
        zs = model(zero(T, d), reference="flat").sample(
            n, gen=gen(T + n_steps + mala), n_steps=n_steps, mala=mala, path=True
        )
        for lev in range(T):
            check_moments(
                zs[lev], torch.zeros(d, dtype=F64), want[lev] * torch.eye(d, dtype=F64), f"level {lev} of {T}"
            )


@pytest.mark.parametrize("T", [1, 2, 6])
def test_zero_energy_in_the_published_sampler(T):
    "Its short chains start where the level above left them: the law is that of the finite chain, not of the level"
    n, d, K = 12_000, 2, 50
    p = model(zero(T, d), "published", n_steps=K)
    zs, s = p.sample(n, gen=gen(T), path=True), p.schedule
    var = 1.0
    for lev in reversed(range(T)):
        v = (s.sigma[lev + 1] ** 2).item()
        s2 = (s.sbar[lev] / s.sbar[0]).item() * 2e-3 * v
        alpha = 1 - 0.5 * s2 / v
        noise = s2 * (1 - alpha ** (2 * K)) / (1 - alpha**2)
        var = alpha ** (2 * K) * var + noise if lev == T - 1 else (var + noise) / s.a[lev + 1].item() ** 2
        check_moments(zs[lev], torch.zeros(d, dtype=F64), var * torch.eye(d, dtype=F64), f"level {lev} of {T}")


# -- quadratic energies, all levels in a row


@pytest.mark.parametrize("reference", ["gaussian", "flat"])
@pytest.mark.parametrize("T,tau", [(1, 1.0), (2, 1.6), (6, 1.0)])
def test_every_level_with_a_metropolis_test(reference, T, tau):
    n, d = 12_000, 2
    qe = quadratic(T, d, T + 3, lo=0.3, hi=1.5)
    p = model(qe, reference=reference, rho=0.4, temperature=tau)
    zs = p.sample(n, gen=gen(T), n_steps=30, mala=True, path=True)
    mean, cov, eye = torch.zeros(d, dtype=F64), torch.eye(d, dtype=F64), torch.eye(d, dtype=F64)
    for lev in reversed(range(T)):
        a, last = p.schedule.a[lev + 1].item(), lev == T - 1
        v = 1.0 if last and reference == "gaussian" else 1 - a**2
        slope = 0.0 if last else a if reference == "gaussian" else 1.0
        scale = a if reference == "flat" and not last else 1.0
        A, c = qe.A[lev].detach() / tau, qe.c[lev].detach()
        S = torch.linalg.inv(A + eye / v)
        mean, cov = S @ (A @ c + slope / v * mean) / scale, (S + (slope / v) ** 2 * S @ cov @ S) / scale**2
        check_moments(zs[lev], mean, cov, f"{reference}, level {lev} of {T}")


# -- the gradient that trains


@pytest.mark.parametrize(
    "reference,T,tau",
    [("gaussian", 3, 1.0), ("flat", 3, 1.0), ("gaussian", 1, 1.0), ("flat", 2, 1.7), ("gaussian", 6, 0.8)],
)
def test_surrogate_gradient_is_the_exact_one(reference, T, tau):
    "Encoder: of -F/tau + log Z by autograd through the closed form; energy: the same sum's derivative in A and c"
    n, d = 6000, 2
    qe = quadratic(T, d, 20 + T, lo=0.2, hi=1.0)
    p = model(qe, reference=reference, n_steps=30, rho=0.4, temperature=tau, levels="all")
    z = torch.randn(n, d, generator=gen(5), dtype=F64).requires_grad_()
    q = DiagGaussian(z.detach(), torch.zeros(n, d, dtype=F64))
    terms = p.terms(q, z, gen(6))
    (got,) = torch.autograd.grad(terms["ebm_enc"].sum(), z, retain_graph=True)
    t = torch.arange(T).repeat_interleave(n)
    zt, zn = diffuse_pair(p.schedule, z.repeat(T, 1), t, gen(6))  # the very pairs the terms drew
    exact = 0.0
    for lev in range(T):
        rows = t == lev
        a, last = p.schedule.a[lev + 1].item(), lev == T - 1
        v = 1.0 if last and reference == "gaussian" else 1 - a**2
        m = zn[rows] * (0.0 if last else a if reference == "gaussian" else 1.0)
        pos = zt[rows] * (a if reference == "flat" and not last else 1.0)
        A, c = (qe.A[lev] + qe.A[lev].T) / 2 / tau, qe.c[lev]
        P, h = A + torch.eye(d, dtype=F64) / v, m / v + A @ c
        log_z = (
            0.5 * (h * torch.linalg.solve(P, h.T).T).sum(-1)
            - 0.5 * (m**2).sum(-1) / v
            - 0.5 * c @ A @ c
            - 0.5 * torch.logdet(v * P)
        )
        exact = exact + log_z + 0.5 * ((pos - c) @ A * (pos - c)).sum(-1)
    (want,) = torch.autograd.grad(exact.sum(), z, retain_graph=True)
    gap = got - want
    noise = gap.std(0) / n**0.5
    assert (gap.mean(0).abs() < SE * noise + 1e-12).all() and want.mean(0).abs().max() > 5 * noise.max(), (
        gap.mean(0),
        noise,
    )
    weighted = gap * z.detach()  # not on average alone: also along the latent itself
    assert (weighted.mean(0).abs() < SE * weighted.std(0) / n**0.5 + 1e-12).all()

    def slopes(x):
        return torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(part.mean(), [qe.A, qe.c], retain_graph=True)])
                for part in x.split(n // 20)
            ]
        )

    gap = slopes(terms["ebm"]) - slopes(exact)  # twenty independent parts give the standard error
    assert (gap.mean(0).abs() < SE * gap.std(0) / 20**0.5).all(), (gap.mean(0), gap.std(0) / 20**0.5)


def test_an_encoder_feels_the_energies_through_a_bound():
    "`kl` is then the rate, no lower than the cost at zero energy less log n a level; only the encoder feels it"
    T, d, n = 3, 2, 8
    net = EnergyNet(d, 4, T, hidden=8, n_blocks=1, gen=gen(0))
    for p in net.parameters():
        p.data.mul_(20)  # far too steep for any chain
    prior = DiffusionEBM(consistent_schedule(T), net, PriorCfg(n_steps=2, levels="all", encoder_draws=n))
    z = torch.randn(50, d, generator=gen(1)).requires_grad_()
    q = DiagGaussian(z, torch.zeros_like(z))
    terms = prior.terms(q, z, gen(2))
    assert_close(terms["kl"], terms["rate"])
    assert (terms["rate"] >= terms["kl_base"] - T * math.log(n) - 1e-4).all() and "ebm_enc" not in terms
    assert torch.autograd.grad(terms["kl"].sum(), z, retain_graph=True)[0].abs().sum() > 0
    slopes = torch.autograd.grad(terms["kl"].sum(), list(net.parameters()), allow_unused=True)
    assert all(g is None for g in slopes)
    held = prior.terms(DiagGaussian(z.detach(), torch.zeros_like(z)), z.detach(), gen(2))
    assert_close(held["kl"], held["kl_base"])  # where the encoder has ended, nobody is to feel them
    for name in ("encoder_draws", "energy_draws"):
        with pytest.raises(ValueError, match=f"{name} must be 0 or at least 2, got 1"):
            PriorCfg(**{name: 1})
    with pytest.raises(ValueError, match="two ways for an encoder to feel energies"):
        resolve(TextJob(settings="encoder_draws=8 enc_share=.5"))


def test_energies_learn_by_a_bound():
    "The term is the one that the encoder feels, its gradient that of the weights, and no chain is run"
    T, d, n = 3, 2, 8
    net = EnergyNet(d, 4, T, hidden=8, n_blocks=1, gen=gen(0)).double()
    cfg = PriorCfg(levels="all", energy_draws=n, encoder=False, temperature=1.7)
    prior = DiffusionEBM(consistent_schedule(T), net, cfg)
    z = torch.randn(50, d, generator=gen(1), dtype=F64)
    q = DiagGaussian(z, torch.zeros_like(z))
    terms = prior.terms(q, z, gen(2))
    assert "accept" not in terms and "ebm_enc" not in terms
    assert (terms["ebm"] >= -T * math.log(n)).all()
    t = torch.arange(T).repeat_interleave(len(z))
    g = gen(2)
    z_t, z_next = diffuse_pair(prior.schedule, z.repeat(T, 1), t, g)
    level = prior.conditional(z_next, t)
    bound = encoder_bound(level, net, z_t, n, g).view(T, -1).sum(0)
    assert_close(terms["ebm"], bound)
    assert all(p is not None for p in torch.autograd.grad(terms["ebm"].sum(), net.head.parameters()))


def test_matched_scores_are_those_of_the_mixture():
    "By least squares over all quadratic energies: the Gaussian with the moments of diffused posteriors"
    T, d, n = 2, 2, 40_000
    g = gen(0)
    q = DiagGaussian(torch.randn(n, d, generator=g, dtype=F64) * 0.8, torch.full((n, d), math.log(0.3), dtype=F64))
    schedule = consistent_schedule(T)
    qe = QuadraticEnergy(torch.zeros(T, d, d, dtype=F64), torch.zeros(T, d, dtype=F64))
    prior = DiffusionEBM(schedule, qe)
    optimizer = torch.optim.LBFGS([qe.A], lr=0.5, max_iter=30)

    def error():
        optimizer.zero_grad()
        loss = prior.score_terms(q, gen(1))["score"].mean()
        loss.backward()
        return loss

    optimizer.step(error)
    variance = schedule.abar[:T].to(F64) ** 2 * (0.64 + 0.3) + schedule.sbar[:T].to(F64) ** 2
    assert_close(qe.A.diagonal(dim1=1, dim2=2), (1 / variance - 1)[:, None].expand(T, d), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="scores are matched against N"):
        model(zero(4, 2), reference="flat").score_terms(q, gen(1))


def test_matched_scores_of_a_draw_whose_coordinates_depend_on_each_other():
    "Second coordinates around the first's draw: noise is added to the draw, not to the means that belong to it"
    T, n = 3, 60_000
    g = gen(0)
    first, own = torch.randn(2, n, 1, generator=g, dtype=F64)
    spread = 0.2  # of both posteriors
    mean = torch.randn(n, 1, generator=g, dtype=F64) * math.sqrt(1 - spread**2)
    top = mean + spread * first
    q = DiagGaussian(torch.cat([mean, 0.8 * top], 1), torch.full((n, 2), 2 * math.log(spread), dtype=F64))
    z = torch.cat([top, 0.8 * top + spread * own], 1)
    schedule = consistent_schedule(T)
    qe = QuadraticEnergy(torch.zeros(T, 2, 2, dtype=F64), torch.zeros(T, 2, dtype=F64))
    prior = DiffusionEBM(schedule, qe)
    optimizer = torch.optim.LBFGS([qe.A], lr=0.5, max_iter=40)

    def error():
        optimizer.zero_grad()
        loss = prior.score_terms(q, gen(1), z=z)["score"].mean()
        loss.backward()
        return loss

    optimizer.step(error)
    covariance = torch.tensor([[1.0, 0.8], [0.8, 0.64 + spread**2]], dtype=F64)
    for t in range(1, T):  # level 0 leaves out how the second posterior moves with the first draw
        a, s = schedule.abar[t].to(F64), schedule.sbar[t].to(F64)
        noisy = a**2 * covariance + s**2 * torch.eye(2, dtype=F64)
        assert_close((qe.A[t] + qe.A[t].T) / 2, noisy.inverse() - torch.eye(2, dtype=F64), rtol=0, atol=0.03)


def test_chains_that_start_at_the_data():
    "Refused chains have no contrast; those of the right model have none on average; the rest of the terms is as before"
    T, d, n = 3, 2, 4000
    z = torch.randn(n, d, generator=gen(1), dtype=F64)
    q = DiagGaussian(z, torch.zeros_like(z))
    net = EnergyNet(d, 1, T, hidden=8, n_blocks=1, gen=gen(0)).double()
    still = DiffusionEBM(consistent_schedule(T), net, PriorCfg(n_steps=0, chain_start="data", encoder=False))
    assert_close(still.terms(q, z, gen(2))["ebm"], torch.zeros(n, dtype=F64))
    moving = DiffusionEBM(consistent_schedule(T), net, PriorCfg(n_steps=0, encoder=False))
    assert moving.terms(q, z, gen(2))["ebm"].abs().mean() > 0.01
    v = torch.tensor([0.25, 0.49], dtype=F64)
    schedule = consistent_schedule(T)
    noisy = schedule.abar[:T, None].to(F64) ** 2 * v + schedule.sbar[:T, None].to(F64) ** 2
    right = QuadraticEnergy(torch.diag_embed(1 / noisy - 1), torch.zeros(T, d, dtype=F64))
    for n_steps in (1, 4):
        cfg = PriorCfg(n_steps=n_steps, rho=0.5, chain_start="data", encoder=False, levels="all")
        contrast = DiffusionEBM(schedule, right, cfg).terms(q, z * v.sqrt(), gen(3))["ebm"]
        assert contrast.mean().abs() < 4 * contrast.std() / math.sqrt(n)
    with pytest.raises(ValueError, match="chain_start must be one of gaussian, data; got 'noise'"):
        PriorCfg(chain_start="noise")


@pytest.mark.parametrize("reference", ["gaussian", "flat"])
def test_no_energy_no_gradient_noise(reference):
    z = torch.randn(50, 2, generator=gen(0), dtype=F64).requires_grad_()
    terms = model(zero(4, 2), reference=reference).terms(DiagGaussian(z, torch.zeros_like(z)), z, gen(1))
    assert (torch.autograd.grad(terms["ebm_enc"].sum(), z)[0] == 0).all()


@pytest.mark.parametrize("objective", ["consistent", "published"])
def test_one_level_a_sample_is_unbiased(objective):
    "A random level times T has the mean of all levels; `published`, which does not claim it, takes one and the last"
    if objective == "published":
        net = EnergyNet(2, 3, 4, 8, 1, gen=gen(0))
        seen = spy(p := model(net, "published", n_steps=1))
        p.terms(DiagGaussian(torch.zeros(200, 2), torch.zeros(200, 2)), torch.zeros(200, 2), gen(0))
        levels = seen[0]["t"]
        assert set(levels[:200].tolist()) == {0, 1, 2} and set(levels[200:].tolist()) == {3}
        return
    qe, n = quadratic(4, 2, 9), 8000
    z = torch.randn(n, 2, generator=gen(1), dtype=F64)
    q = DiagGaussian(z, torch.zeros_like(z))
    one, every = (model(qe, levels=k, n_steps=10, rho=0.4).terms(q, z, gen(2))["ebm"].detach() for k in ("one", "all"))
    assert (one.mean() - every.mean()).abs() < SE * ((one.var() + every.var()) / n) ** 0.5


# -- interface


def spy(p):
    "Record what conditionals are asked for"
    seen, real = [], p.conditional

    def conditional(z_next, t, **kw):
        seen.append(dict(t=t, y=kw.get("y")))
        return real(z_next, t, **kw)

    p.conditional = conditional
    return seen


def small(objective, T, **kw):
    return model(EnergyNet(3, 4, T, 16, 2, gen=gen(T)), objective, n_steps=5, **kw)


@pytest.mark.parametrize("objective", ["consistent", "published"])
def test_one_level_only(objective):
    "T = 1 is level 0 and the last level at once: a marginal energy model that looks at nothing above it"
    p = small(objective, 1)
    seen = spy(p)
    z = torch.randn(30, 3, generator=gen(0)).requires_grad_()
    labels = torch.arange(30) % 4
    terms = p.terms(DiagGaussian(z, torch.zeros_like(z)), z, gen(1), labels)
    assert {k: tuple(v.shape) for k, v in terms.items()} == dict.fromkeys(terms, (30,)) and all(
        v.isfinite().all() for v in terms.values()
    )
    sum(v.mean() for v in terms.values()).backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in p.energy.parameters())
    assert [o["t"].tolist() for o in seen] == [[0] * 30]
    x = p.sample(40, gen=gen(2))
    assert x.shape == (40, 3) and x.isfinite().all() and len(seen) == 2
    assert p.sample(5, y=3, gen=gen(2)).isfinite().all()
    top = torch.full((6, 3), 50.0)
    m, v = p.tilted_gaussian(top, torch.zeros(6, dtype=torch.long))
    assert (m == 0).all()
    if objective == "consistent":
        assert p.kl(DiagGaussian(z, torch.zeros_like(z)), z, gen(3))[0].isfinite().all()


@pytest.mark.parametrize("objective", ["consistent", "published"])
@pytest.mark.parametrize("kw", [{}, {"init": 0.1}, {"free_head": True}], ids=["layers", "published init", "free head"])
def test_sampling_straight_after_construction(objective, kw):
    "In evaluation mode, before any step of training, at published size"
    p = model(EnergyNet(40, 20, 6, gen=gen(0), **kw), objective, n_steps=3).eval()
    z = p.sample(20, gen=gen(1))
    assert z.isfinite().all() and z.std() > 0.1
    assert p.sample(20, y=7, gen=gen(1)).isfinite().all() and p.symbol_logits(z).isfinite().all()


@pytest.mark.parametrize("objective", ["consistent", "published"])
def test_same_generator_same_bits(objective):
    p = small(objective, 3)
    torch.manual_seed(0)
    a = p.sample(50, gen=gen(7))
    torch.manual_seed(1)
    b = p.sample(50, gen=gen(7))
    assert torch.equal(a, b) and not torch.equal(a, p.sample(50, gen=gen(8)))
    state = torch.get_rng_state()
    p.sample(50, gen=gen(7))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    z = torch.randn(20, 3, generator=gen(0))
    q = DiagGaussian(z, torch.zeros_like(z))
    x, y = p.terms(q, z, gen(9)), p.terms(q, z, gen(9))
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("y", [4, -1, torch.tensor([0, 1, 4]), torch.tensor([0, -2, 3])])
@pytest.mark.parametrize("objective", ["consistent", "published"])
def test_symbols_out_of_range(objective, y):
    p = small(objective, 2)
    seen = spy(p)
    with pytest.raises(ValueError, match=r"symbols must lie in 0\.\.3, got"):
        p.sample(3, y=y, gen=gen(0))
    assert not seen


def test_where_a_symbol_acts():
    "At every level in `consistent`, at level 0 alone in `published`"
    y = torch.tensor([0, 3, 1])
    for objective in ("consistent", "published"):
        p = small(objective, 4)
        seen = spy(p)
        p.sample(3, y=y, gen=gen(0))
        assert [int(o["t"][0]) for o in seen] == [3, 2, 1, 0]
        given = [o["y"] is not None and torch.equal(o["y"], y) for o in seen]
        assert given == ([True] * 4 if objective == "consistent" else [False] * 3 + [True])
        assert all(o["y"] is None for o, g in zip(seen, given) if not g)
    p = small("published", 4)
    top = p.sample(20, gen=gen(1), path=True)[1:]
    assert torch.equal(top, p.sample(20, y=2, gen=gen(1), path=True)[1:])


def test_published_sampler_has_no_metropolis_test():
    with pytest.raises(ValueError, match="no fixed target to correct to"):
        small("published", 2).sample(3, mala=True, gen=gen(0))
    with pytest.raises(ValueError, match="has no KL"):
        small("published", 2).kl(DiagGaussian(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2, 3))


# -- the bound


def log_normal(x, mean, var):
    return (-0.5 * (x - mean) ** 2 / var - 0.5 * math.log(2 * math.pi * var)).sum(-1)


@pytest.mark.parametrize("reference", ["gaussian", "flat"])
@pytest.mark.parametrize("T,d", [(6, 40), (2, 3), (1, 5)])
def test_base_kl_against_densities_along_paths(reference, T, d):
    "Zero energy, every factor of the path written out; `flat` carries a Jacobian, -51 nats at published size"
    n = 2000
    p = model(zero(T, d), reference=reference)
    a, mean, logvar = (
        p.schedule.a,
        torch.randn(d, generator=gen(0), dtype=F64),
        torch.randn(d, generator=gen(1), dtype=F64) - 1,
    )
    q = DiagGaussian(mean.expand(n, d), logvar.expand(n, d))
    z = q.rsample(gen(2))
    zs = diffuse_path(p.schedule, z, gen(3))
    draw, jacobian = q.log_prob(z), 0.0
    for t in range(T - 1):
        v = 1 - a[t + 1].item() ** 2
        draw = draw + log_normal(zs[t + 1], a[t + 1] * zs[t], v)
        if reference == "flat":
            jacobian += d * a[t + 1].log().item()
            draw = draw - log_normal(a[t + 1] * zs[t], zs[t + 1], v) - d * a[t + 1].log().item()
        else:
            draw = draw - log_normal(zs[t], a[t + 1] * zs[t + 1], v)
    draw = draw - log_normal(zs[T - 1], 0.0, 1 - a[-1].item() ** 2 if reference == "flat" else 1.0)
    want = p.base_kl(q).sum(-1)[0]
    assert (draw.mean() - want).abs() < SE * draw.std() / n**0.5 + 1e-9, (draw.mean(), want)
    if reference == "flat" and T == 6:
        assert abs(jacobian + 51) < 0.1 and 51 > 5 * draw.std() / n**0.5  # leaving it out could not go unseen
    got, ess = p.kl(q, z, gen(4), n=4)  # zero energy: log Z is 0 for any number of draws
    assert_close(got, want.expand(n))
    assert (ess > 3.99).all()


# -- convergence


def test_rhat_of_traces():
    "For each level and condition that of the second half; a window is a slice"
    x = torch.randn(2, 21, 4, 3, generator=gen(0))
    x[1, 10:, :, 2] += 4 * torch.arange(4.0)  # chains apart in the second half
    x[0, :10, :, 0] += 4 * torch.arange(4.0)  # and in the first
    got = trace_rhat(x)
    assert got.shape == (2, 3) and got[1, 2] > 3 and got.flatten()[:5].max() < 1.5
    for t in range(2):
        for k in range(3):
            assert got[t, k].item() == pytest.approx(split_rhat(x[t, 10:, :, k]))
    assert_close(trace_rhat(x[:, :9])[0, 1].item(), split_rhat(x[0, 4:9, :, 1]), rtol=1e-6, atol=0)
    assert_close(trace_rhat(x.double()), got)
    with pytest.raises(ValueError, match="chains of 7 updates say nothing of their convergence: at least 8 are needed"):
        trace_rhat(x[:, :7])


def test_titles_of_energy_traces():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = torch.randn(2, 20, 4, 5, generator=gen(1))
    x[1] += 3 * torch.arange(4.0)[:, None]
    want = trace_rhat(x).median(1).values
    assert [a.get_title() for a in plot_energy_traces(x)] == [
        f"level {t}, R-hat {want[t]:.2f}" for t in (1, 0)
    ] and want[1] > 2 > want[0]
    assert [a.get_title() for a in plot_energy_traces(x[:, :7])] == ["level 1", "level 0"]
    plt.close("all")


# -- what goes wrong is named


class Poisoned(Energy):
    "An energy that is NaN from its `k`-th evaluation on"

    n_symbols, n_levels, d = 1, 3, 2

    def __init__(self, k):
        super().__init__()
        self.w, self.k, self.n = nn.Parameter(torch.ones(())), k, 0

    def forward(self, z, t, y=None, context=None, weights=None):
        self.n += 1
        return -(z**2).sum(-1) * (self.w if self.n <= self.k else float("nan"))


@pytest.mark.parametrize("objective,mala", [("consistent", False), ("consistent", True), ("published", False)])
@pytest.mark.parametrize("k", [0, 4, 12])
def test_non_finite_energy_names_step_level_and_seed(objective, mala, k):
    p = model(Poisoned(k), objective, n_steps=10)
    each = 11 if mala else 10  # evaluations a level: a Metropolis test needs one at the start
    where = f"Langevin step {k % each} of 10 \\(level {2 - k // each}\\), generator seed 77"
    with pytest.raises(FloatingPointError, match=where):
        p.sample(4, mala=mala, gen=gen(77))


def test_refused_settings_of_a_chain():
    x, v = torch.zeros(3, 2, dtype=F64), torch.ones(3, 1, dtype=F64)
    level = Conditional(Frozen(zero(1, 2)), torch.zeros(3, dtype=torch.long), x, v, v)
    for settings, wrong in (
        (dict(rho=1.0), r"rho must lie in \(-1, 1\), got 1.0"),
        (dict(rho=-1.0), r"rho must lie in \(-1, 1\), got -1.0"),
        (dict(longest=0.0), "drift must be positive, got 0.0"),
        (dict(longest=math.nan), "drift must be positive, got nan"),
    ):
        with pytest.raises(ValueError, match=wrong):
            preconditioned(level, **settings)
    with pytest.raises(ValueError, match="n_steps must be >= 0"):
        chain(level, preconditioned(level, 0.5), x, -1)
    y, accept = chain(level, preconditioned(level, 0.5), x, 5, gen=gen(0))
    assert_close(accept, torch.ones(3, dtype=F64))  # exact for the Gaussian: nothing to correct
    for cfg, wrong in (
        (dict(n_steps=-1), "n_steps must be >= 0"),
        (dict(rho=1.0), "rho must lie"),
        (dict(temperature=0.0), "must be positive"),
        (dict(objective="paper"), "objective must be one of"),
        (dict(weighting="s"), "weighting must be one of"),
    ):
        with pytest.raises(ValueError, match=wrong):
            PriorCfg(**cfg)
    with pytest.raises(ValueError, match="a_0 = 1"):
        DiffusionEBM(published_schedule(2), zero(2, 2), PriorCfg())
    published = PriorCfg(objective="published", reference="flat", mala=False)
    with pytest.raises(ValueError, match="a_0 < 1"):
        DiffusionEBM(consistent_schedule(2), zero(2, 2), published)
    with pytest.raises(ValueError, match="energy has 2 levels, the schedule 3"):
        DiffusionEBM(consistent_schedule(3), zero(2, 2))


class Replay:
    "Stands in for a CUDA graph: fixed inputs into which new values are copied, the function run on those alone"

    made = 0

    def __init__(self, f, tensors):
        Replay.made += 1
        self.f, self.inputs = f, [x.clone() for x in tensors]

    def __call__(self, *tensors):
        for a, b in zip(self.inputs, tensors):
            a.copy_(b)
        return self.f(*self.inputs)


@pytest.mark.parametrize("kind", ["tilt", "flow", "mala"])
@pytest.mark.parametrize("symbol", [False, True])
def test_recorded_chain_equals_the_chain_it_recorded(kind, symbol):
    "Same noise, same end point; new weights, states and symbols go in through the recording's inputs"
    g, n = gen(0), 7
    net = EnergyNet(5, 3, 4, hidden=16, n_blocks=2, gen=g).double()
    Replay.made = 0
    for _ in range(2):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.3)
        z, m = (torch.randn(6, 5, generator=g, dtype=F64) for _ in "zm")
        v = torch.rand(6, 1, generator=g, dtype=F64) + 0.1
        t = torch.randint(4, (6,), generator=g)
        level = Conditional(Frozen(net), t, m, v, torch.full_like(v, 0.7))
        if symbol:
            level.y = torch.randint(3, (6,), generator=g)
        noise, uniform = torch.randn(n, 6, 5, generator=g, dtype=F64), None
        step = unadjusted(level, 0.05 * v) if kind == "flow" else preconditioned(level, 0.8)
        if kind == "mala":
            step, uniform = preconditioned(level, 0.8, 1.0), torch.rand(n, 6, generator=g, dtype=F64)
        want = updates(level, step, z, n, noise.__getitem__, uniform if uniform is None else uniform.__getitem__)
        got = record_chain(level, step, z, noise, uniform, recorder=Replay)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert (want[0] - z).abs().max() > 1e-3 and int(want[-1]) == n + 1
    assert Replay.made == 1


def test_recording_is_refused_where_it_cannot_be(monkeypatch):
    z, v = torch.zeros(1, 2), torch.ones(1, 1)
    net = EnergyNet(2, 1, 1, hidden=4, n_blocks=0)
    level = Conditional(Frozen(net), torch.zeros(1, dtype=torch.long), z, v, v)
    monkeypatch.setenv("LDEBM_RECORD", "1")
    assert not recording(z) and not has_recorded_chain(level, preconditioned(level), z, 3)  # no GPU holds z
    monkeypatch.setenv("LDEBM_RECORD", "yes")
    with pytest.raises(ValueError, match="LDEBM_RECORD must be"):
        recording(z)


@pytest.fixture
def recorded(monkeypatch):
    "Chains of networks are recorded, and nothing else is replaced"
    monkeypatch.setattr(graphs, "recording", lambda z: True)
    monkeypatch.setattr(graphs, "record_chain", partial(record_chain, recorder=Replay))
    monkeypatch.setitem(RUNNERS, "chain", [(has_recorded_chain, graphs.recorded_chain)])
    monkeypatch.setitem(RUNNERS, "training_terms", [])
    Replay.made = 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("objective", ["mala", "consistent", "published"])
def test_training_and_sampling_run_on_recorded_chains(objective, bf16, recorded):
    "Every chain of a training step and of a draw can be recorded, under autocast as well"
    prior, q = network(objective), DiagGaussian(torch.zeros(8, 6), torch.zeros(8, 6))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        terms = prior.terms(q, q.rsample(gen(1)), gen=gen(2))
        assert (
            Replay.made == 1
            and all(x.isfinite().all() for x in terms.values())
            and ("accept" in terms) == (objective == "mala")
        )
        z = prior.sample(5, gen=gen(3))
    assert Replay.made == 2 and z.isfinite().all(), "all levels of a draw share a recording"


class ReplayGrad(RecordedGrad):
    "Stands in for the two CUDA graphs: the function is run again on the fixed inputs, into fixed outputs"

    made = 0

    def record(self, f, gen):
        ReplayGrad.made += 1
        out, extra = f()
        self.out, self.extra, self.gout, self.grads = (
            out.detach().clone(),
            [x.clone() for x in extra],
            torch.zeros_like(out),
            [None] * len(self.wanted),
        )

        def forward():
            with torch.enable_grad():
                self.live, more = f()
            self.out.copy_(self.live.detach())
            for x, y in zip(self.extra, more):
                x.copy_(y)

        def backward():
            self.grads[:] = torch.autograd.grad(self.live, self.wanted, self.gout, allow_unused=True)

        self.forward, self.backward = forward, backward


def step_terms(p, terms, steps=3, labels=True):
    "Terms, and gradients of their sum in what made the latents and in the energy, in steps between which both change"
    g, net, out = gen(7), torch.nn.Linear(6, 12, dtype=F64), []
    with torch.no_grad():
        for w in net.parameters():
            w.copy_(torch.randn(w.shape, generator=gen(1), dtype=F64))
    for k in range(steps):
        q = DiagGaussian(*net(torch.randn(8, 6, generator=gen(20 + k), dtype=F64)).chunk(2, 1))
        more = (torch.arange(8) % 4 + k).fmod(4), torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=F64)
        t = terms(q, q.rsample(g), g, *(more if labels else ()))
        ps = [*net.parameters(), *p.parameters()]
        grads = torch.autograd.grad(sum(v.mean() for v in t.values() if v.requires_grad), ps, allow_unused=True)
        out.append(
            (
                {n: v.detach() for n, v in t.items()},
                [torch.zeros_like(w) if d is None else d for w, d in zip(ps, grads)],
            )
        )
        with torch.no_grad():
            for w, d in zip(ps, out[-1][1]):
                w -= 0.01 * d
        p.energy.power_iterate()
    return out, torch.rand(3, generator=g)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("objective", ["mala", "consistent", "published"])
def test_recorded_terms_equal_the_terms_they_recorded(objective, labels):
    "Noise, weights, latents and labels of every step go into one recording; the generator is left where it would be"
    p, r = network(objective).double(), network(objective).double()
    plain = published_terms if objective == "published" else consistent_terms
    want, rest = step_terms(p, lambda *args: plain(p, *args), labels=labels)
    ReplayGrad.made = 0
    got, left = step_terms(r, lambda *args: recorded_terms(r, *args, recorder=ReplayGrad), labels=labels)
    assert ReplayGrad.made == 1 and torch.equal(rest, left)
    for (a, da), (b, db) in zip(got, want):
        assert list(a) == list(b)
        for k in a:
            assert_close(a[k], b[k], rtol=1e-10, atol=1e-12)
        for x, y in zip(da, db):
            assert_close(x, y, rtol=1e-9, atol=1e-11)
    assert (want[0][0]["ebm"] - want[1][0]["ebm"]).abs().max() > 1e-3, "steps differ"


def test_a_recording_keeps_no_two_calls():
    p = network("consistent")
    q = DiagGaussian(torch.zeros(8, 6, requires_grad=True), torch.zeros(8, 6))
    first, _ = (recorded_terms(p, q, q.rsample(gen(1)), gen(k), recorder=ReplayGrad) for k in range(2))
    with pytest.raises(RuntimeError, match="call backward once, and before"):
        first["ebm"].sum().backward()
    last = recorded_terms(p, q, q.rsample(gen(1)), gen(3), recorder=ReplayGrad)
    last["ebm"].sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once, and before"):
        last["mi"].sum().backward()


def test_a_recording_follows_parameters():
    "New parameters in the old memory get the gradient; new memory, a frozen part, other settings: another recording"
    p = network("consistent")
    q = DiagGaussian(torch.zeros(8, 6), torch.zeros(8, 6))
    z = q.rsample(gen(1))

    def go():
        p.zero_grad()
        recorded_terms(p, q, z, gen(2), recorder=ReplayGrad)["ebm"].sum().backward()
        return [w.grad for w in p.parameters() if w.requires_grad]

    ReplayGrad.made = 0
    want = go()
    head = p.energy.head
    head.weight = nn.Parameter(head.weight.data)
    got = go()
    assert (
        ReplayGrad.made == 1 and all(torch.equal(a, b) for a, b in zip(got, want)) and head.weight.grad.abs().max() > 0
    )
    head.weight = nn.Parameter(head.weight.data.clone())
    go()
    assert ReplayGrad.made == 2
    head.bias.requires_grad_(False)
    go()
    assert ReplayGrad.made == 3 and head.bias.grad is None
    p.energy.symbol_temperature = 2.0
    go()
    assert ReplayGrad.made == 4


@with_runners
def test_a_bad_chain_in_a_recording_is_told():
    "At once, or to whoever collects what is pending"
    p = network("consistent")
    q = DiagGaussian(torch.zeros(8, 6), torch.zeros(8, 6))
    recorded_terms(p, q, q.rsample(gen(1)), gen(2), recorder=ReplayGrad)
    with torch.no_grad():
        p.energy.head.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="step 0 of 10 .*generator seed 2"):
        recorded_terms(p, q, q.rsample(gen(1)), gen(2), recorder=ReplayGrad)
    with Gathered() as seen:
        recorded_terms(p, q, q.rsample(gen(1)), gen(2), recorder=ReplayGrad)
    assert [int(first) for first, _ in seen.waiting] == [0] and Pending.now is None


def test_pending_checks_speak_when_they_are_settled():
    class Event:
        waited = 0

        def synchronize(self):
            Event.waited += 1

    p = Pending()
    p.waiting = [(torch.tensor(k), Event(), (9, torch.tensor([1, 1]), gen(3))) for k in (10, 4)]
    with pytest.raises(FloatingPointError, match="step 4 of 9 .level 1., generator seed 3"):
        p.settle()
    p.settle()
    assert Event.waited == 2, "told once"


def test_patient_questions_are_about_chains_of_the_step_before_last():
    class Event:
        def synchronize(self):
            pass

    p, bad = Pending(), (torch.tensor(4), Event(), (9, torch.tensor([1, 1]), gen(3)))
    p.waiting = [(torch.tensor(10), Event(), (9, torch.tensor([0]), gen(3)))]
    assert p.late(patient=True) is None and len(p.waiting) == 1, "not yet"
    p.waiting.append(bad)
    assert p.late(patient=True) is None and p.waiting == [bad], "the first was fine"
    p.waiting.append(bad)
    assert "step 4 of 9" in str(p.late(patient=True)) and len(p.waiting) == 1
    assert "step 4 of 9" in str(p.late()), "all, at the end"
    assert p.late() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("resident", "01")
@pytest.mark.parametrize("objective", ["mala", "consistent", "published"])
def test_recorded_terms_on_a_gpu(objective, resident, monkeypatch):
    """The same noise gives the same terms and gradients, recorded or launched singly

    Also where earlier steps are still remembered"""
    monkeypatch.setenv("LDEBM_RESIDENT", resident)
    found = []
    for on in "01":
        monkeypatch.setenv("LDEBM_RECORD", on)
        p, g, steps = network(objective).cuda(), torch.Generator("cuda").manual_seed(3), []
        for k in range(3):
            q = DiagGaussian(
                torch.linspace(-1, 1, 48, device="cuda").view(8, 6).requires_grad_(),
                torch.zeros(8, 6, device="cuda", requires_grad=True),
            )
            t = p.terms(q, q.rsample(g), g, torch.arange(8, device="cuda") % 4, torch.ones(4, device="cuda"))
            steps.append(
                (
                    t,
                    torch.autograd.grad(
                        sum(v.mean() for v in t.values() if v.requires_grad),
                        [q.mean, *p.parameters()],
                        allow_unused=True,
                    ),
                )
            )
        found.append(steps)
    for (a, da), (b, db) in zip(*found):
        for k in a:
            assert_close(a[k], b[k], rtol=1e-4, atol=1e-5)
        for x, y in zip(da, db):
            if x is not None:
                assert_close(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mala", [False, True])
def test_recorded_chain_on_a_gpu(mala, monkeypatch):
    "A recorded chain and a plain one draw from one law: means over many chains agree"
    net = EnergyNet(5, 3, 4, hidden=16, n_blocks=2).cuda()
    prior = DiffusionEBM(make_schedule("consistent", 4), net, PriorCfg(n_steps=8, mala=mala))
    ends = []
    for on in "01":
        monkeypatch.setenv("LDEBM_RECORD", on)
        ends.append(prior.sample(20_000, gen=torch.Generator("cuda").manual_seed(int(on))))
    a, b = ends
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * (a.var(0) / 20_000 + b.var(0) / 20_000).sqrt()).all()


# -- autocast: products in half precision, states and Metropolis tests in full


def network(objective, seed=0):
    g = gen(seed)
    net = EnergyNet(6, 4, 3, hidden=24, n_blocks=2, free_head=False, init=0.3, gen=g)
    if objective == "published":
        return DiffusionEBM(published_schedule(3), net, PriorCfg(objective="published", reference="flat", n_steps=30))
    return DiffusionEBM(consistent_schedule(3), net, PriorCfg(n_steps=10, mala=objective == "mala"))


def half():
    return torch.autocast("cpu", torch.bfloat16)


def test_chains_with_a_metropolis_test_do_not_see_autocast():
    p = network("mala")
    want = p.sample(50, gen=gen(1))
    with half():
        got = p.sample(50, gen=gen(1))
    assert torch.equal(got, want)


@pytest.mark.parametrize("objective", ["published", "unadjusted"])
def test_unadjusted_chains_under_autocast_end_nearly_where_they_would(objective):
    p = network(objective)
    z, t = torch.randn(200, 6, generator=gen(2)), torch.arange(200) % 3
    want = p.conditional(z, t).sample(gen=gen(3))[0]
    with half():
        got = p.conditional(z, t).sample(gen=gen(3))[0]
    moved = (want - z).norm()
    off = (got - want).norm() / moved
    assert got.dtype == want.dtype == torch.float32
    assert 0 < off < 0.02, "rounding of products, not of states"
    if objective == "published":
        assert moved < z.norm() and (z.bfloat16().float() - z).norm() / moved > off, (
            "chains of small steps: rounding a state costs more"
        )


def test_an_energy_that_is_held_in_part_stays_in_full_precision():
    p = network("published")
    mask = torch.tensor([True] * 3 + [False] * 3)
    z = torch.randn(20, 6, generator=gen(4))
    want = p.sample(20, gen=gen(5), known=Known(mask, z, 1))
    with half():
        got = p.sample(20, gen=gen(5), known=Known(mask, z, 1))
    assert torch.equal(got, want)


@pytest.mark.parametrize("tied", [True, False])
def test_words_under_autocast_are_those_of_the_rounded_model(tied):
    torch.manual_seed(0)
    d = Decoder(50, TextCfg(embed=16, hidden=16, d=5, tied=tied), bos=2, eos=3)
    for p in d.parameters():
        p.data.normal_(0, 0.6, generator=gen(6))
    z = torch.randn(40, 5, generator=gen(7))
    with half():
        got = d.generate(z, max_len=12)
        drawn = d.generate(z, max_len=12, temperature=1.0, top_p=0.9, gen=gen(8))
    want, full = copy.deepcopy(d).bfloat16().generate(z.bfloat16(), max_len=12), d.generate(z, max_len=12)
    assert torch.equal(got, want) and drawn.shape[0] == 40
    n = min(got.shape[1], full.shape[1])
    assert 0.6 < (got[:, :n] == full[:, :n]).float().mean() and d.embed.weight.dtype == torch.float32
