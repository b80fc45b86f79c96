"`likelihood`: weights by hand, chains against closed forms, bounds in their order, likelihoods against exact ones and against integrals"

import json
import math

import pytest
import torch

from ldebm import likelihood as L
from ldebm.energy import EnergyNet
from ldebm.exact import QuadraticEnergy
from ldebm.langevin import shorten
from ldebm.levels import PriorCfg
from ldebm.posterior import DiagGaussian, StandardNormal
from ldebm.prior import DiffusionEBM
from ldebm.schedule import consistent_schedule, published_schedule

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("in_test")
REFERENCES = ["gaussian", "flat"]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*n, g):
    return torch.randn(*n, generator=g, dtype=F64)


def log_N(x, m, v):
    return -0.5 * ((x - m) ** 2 / v + math.log(2 * math.pi * v)).sum(-1)


def quadratic(T, d, strength=1.0, seed=0):
    g = gen(seed)
    A = randn(T, d, d, g=g) * (strength / d) ** 0.5
    return QuadraticEnergy(A @ A.mT, 0.5 * randn(T, d, g=g)).requires_grad_(False)


def zero_energy(T, d):
    return QuadraticEnergy(torch.zeros(T, d, d, dtype=F64), torch.zeros(T, d, dtype=F64)).requires_grad_(False)


def prior(T, d, reference="gaussian", strength=1.0, seed=0):
    return DiffusionEBM(
        consistent_schedule(T),
        quadratic(T, d, strength, seed) if strength else zero_energy(T, d),
        PriorCfg(reference=reference),
    )


def tilt_of(e, t=0):
    return lambda y: (-0.5 * ((y - e.c[t]) @ e.A[t] * (y - e.c[t])).sum(-1), -(y - e.c[t]) @ e.A[t])


def exact_log_z(p, z, t):
    m, v = p.tilt(z, torch.full((len(z),), t))
    return p.energy.tilt(m, float(v[0]), t)[2]


# --- weights


def test_weights_by_hand():
    w = torch.tensor([[1.0, 1.0], [1.0, 3.0], [1.0, 0.0]], dtype=F64).log()
    assert L.log_variance(w)[0].item() == pytest.approx(0, abs=1e-12)
    a = torch.tensor([0.1, -0.2, 0.4, 0.0], dtype=F64)
    kong, normal = (
        (a.exp() ** 2).sum() / a.exp().sum() ** 2 - 1 / 4,
        torch.tensor((0.05**2 + 0.35**2) / 2).expm1() / 4,
    )  # about the median, .05
    assert L.log_variance(a).item() == pytest.approx(max(kong, normal).item())
    assert L.trusted(a).item() == pytest.approx(1 / (max(kong, normal).item() + 0.25))


def test_weights_without_any_weight():
    some = torch.tensor([0.0, -math.inf, -math.inf])
    assert L.log_variance(some) == 1 and 0.5 < L.trusted(some) <= 1


def test_spread_of_the_upper_half():
    "Normal log-weights: their variance; draws without weight do no harm, an outlier above does"
    w = torch.randn(64, 4000, generator=gen())
    assert (L.log_variance(w) * 64).log1p().median().item() == pytest.approx(1, abs=0.1)
    half = torch.cat([torch.zeros(32, 1), torch.full((31, 1), -1e4), torch.full((1, 1), -math.inf)])
    assert L.log_variance(half[:-1]).item() == pytest.approx(1 / 32 - 1 / 63, rel=0.02)
    outlier = torch.cat([torch.zeros(63), torch.tensor([20.0])])
    assert L.log_variance(outlier) > 0.9


def test_one_weight_has_no_known_variance():
    assert L.log_variance(torch.zeros(1, 3)).tolist() == [1, 1, 1]


def test_heavy_tails_are_not_trusted():
    w = 2 * torch.randn(64, 2000, generator=gen()) - 2  # log-normal with mean 1
    low = -L.log_mean_exp(w).mean().item()
    assert low > 0.1 and 0.5 * L.log_variance(w).mean() > low > 0.5 * (1 / L.effective(w) - 1 / 64).mean() * 1.5
    assert (L.trusted(w) <= L.effective(w) * (1 + 1e-5)).all()


@pytest.mark.parametrize("n", [1, 4, 1000])
def test_resample_by_weight(n):
    w = torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.7, 1.0]], dtype=F64).log()
    rows = L.resample(w, n, gen())
    assert rows.shape == (n, 2) and (rows[:, 1] == 2).all()
    if n == 1000:
        assert [(rows[:, 0] == k).sum().item() for k in range(3)] == pytest.approx([100, 200, 700], abs=1)


# --- chains


@pytest.mark.parametrize("rho, drift", [(0.3, 3.0), (0.9, 0.2)])
def test_metropolis_leaves_the_tilt_as_it_is(rho, drift):
    g, n, d = gen(1), 20_000, 3
    e = quadratic(1, d, 3.0, seed=1)
    m, v = randn(1, d, g=g).expand(n, d), torch.full((n, 1), 0.7, dtype=F64)
    mean, cov, _ = e.tilt(m[:1], 0.7, 0)
    y = mean + randn(n, d, g=g) @ torch.linalg.cholesky(cov).T
    p, first = L.Point(y, *tilt_of(e)(y)), y
    for _ in range(8):
        p, a = L.metropolis(tilt_of(e), p, m, v, 1.0, rho, drift, g)
        assert ((a >= 0) & (a <= 1)).all() and 0.02 < a.mean() < 0.999
    assert not torch.equal(p.y, first)
    assert ((p.y.mean(0) - mean[0]).abs() < 5 * (cov.diagonal() / n).sqrt()).all()
    assert ((torch.cov(p.y.T) - cov).abs() < 5 * ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / n).sqrt()).all()
    torch.testing.assert_close(p.D, tilt_of(e)(p.y)[0])
    torch.testing.assert_close(p.g, tilt_of(e)(p.y)[1])


def test_metropolis_ratio_by_hand():
    e, beta, rho, drift = quadratic(1, 2, 4.0), 0.6, 0.4, 0.5
    y, m, v = randn(5, 2, g=gen(2)), randn(5, 2, g=gen(3)), torch.full((5, 1), 0.6, dtype=F64)
    tilt = tilt_of(e)
    p = L.Point(y, *tilt(y))
    _, a = L.metropolis(tilt, p, m, v, beta, rho, drift, gen(4))
    s2 = 0.6 * (1 - rho**2)
    e_noise = randn(5, 2, g=gen(4))
    sd = torch.full((5, 1), s2**0.5, dtype=F64)

    def to(x):
        return m + rho * (x - m) + shorten((1 - rho) * 0.6 * beta * tilt(x)[1], drift, sd)

    new = to(y) + s2**0.5 * e_noise

    def log_p(x):
        return beta * tilt(x)[0] + log_N(x, m, 0.6)

    want = (log_p(new) - log_p(y) + log_N(y, to(new), s2) - log_N(new, to(y), s2)).clamp(max=0).exp()
    torch.testing.assert_close(a, want)


def test_a_point_without_density_is_refused():
    def wall(y):
        return (torch.where(y[:, 0] > 0, -torch.inf, 0.0), torch.zeros_like(y))

    def nan(y):
        return (torch.where(y[:, 0] > 0, torch.nan, 0.0), torch.zeros_like(y))

    for tilt in (wall, nan):
        y = -torch.rand(500, 2, generator=gen(), dtype=F64)
        p = L.Point(y, *tilt(y))
        for _ in range(5):
            p, _ = L.metropolis(
                tilt, p, torch.zeros(500, 2, dtype=F64), torch.ones(500, 1, dtype=F64), 1.0, 0.5, 3.0, gen(1)
            )
        assert (p.y[:, 0] <= 0).all() and (p.D == 0).all()


@pytest.mark.parametrize("back", [False, True])
def test_annealing_is_unbiased_with_few_temperatures(back):
    g, n, d = gen(5), 30_000, 3
    e = quadratic(1, d, 2.0, seed=2)
    m, v = torch.full((n, d), 0.2, dtype=F64), torch.full((n, 1), 0.9, dtype=F64)
    mean, cov, log_Z = e.tilt(m[:1], 0.9, 0)
    y = mean + randn(n, d, g=g) @ torch.linalg.cholesky(cov).T if back else m + v.sqrt() * randn(n, d, g=g)
    plan = L.Plan([0.3, 1.0], [0.6, 0.5], False)
    w, p, acc = L.anneal(tilt_of(e), L.Point(y, *tilt_of(e)(y)), m, v, plan, back=back, gen=g)
    ratio = (w + log_Z if back else w - log_Z).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / n**0.5
    assert (-w if back else w).mean() * (1 if not back else -1) < log_Z * (1 if not back else -1)
    assert ((acc > 0) & (acc <= 1)).all()


def test_plan_is_increasing_and_says_when_it_is_cut():
    e = quadratic(1, 10, 20.0)
    m, v = torch.zeros(128, 10, dtype=F64), torch.ones(128, 1, dtype=F64)
    p = L.plan_ais(tilt_of(e), m, v, L.AISCfg(variance=0.5), gen=gen())
    assert (
        all(a < b for a, b in zip([0.0, *p.betas], p.betas))
        and p.betas[-1] == 1
        and len(p.rhos) == len(p.betas)
        and not p.limited
    )
    assert all(0 < r < 1 for r in p.rhos) and 8 <= len(p.betas) <= 200
    cut = L.plan_ais(tilt_of(e), m, v, L.AISCfg(least=2, most=5, variance=0.01), gen=gen())
    assert len(cut.betas) == 5 and cut.betas[-1] == 1 and cut.limited
    more = L.plan_ais(tilt_of(e), m, v, L.AISCfg(variance=0.01, most=10_000), gen=gen())
    assert len(more.betas) > 3 * len(p.betas)


def test_plan_of_a_diverged_energy():
    with pytest.raises(FloatingPointError, match="diverged"):
        L.plan_ais(lambda y: (y.sum(-1) * math.nan, y), torch.zeros(8, 2), torch.ones(8, 1))


@pytest.mark.parametrize(
    "bad",
    [
        dict(chains=0),
        dict(most=0),
        dict(least=0),
        dict(least=9, most=8),
        dict(accept=1.0),
        dict(accept=0.0),
        dict(variance=0.0),
        dict(pilot=0),
    ],
)
def test_bad_annealing(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        L.AISCfg(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        dict(draws=0),
        dict(chains=0),
        dict(paths=0),
        dict(n_z=0),
        dict(top=0),
        dict(rows=0),
        dict(draws=1),
        dict(chains=1),
    ],
)
def test_bad_likelihood(bad):
    with pytest.raises(ValueError, match="at least"):
        L.NLLCfg(**bad)


# --- log Z


@pytest.mark.parametrize("reference", REFERENCES)
def test_zero_energy_has_log_z_zero(reference):
    p = prior(3, 5, reference, strength=0)
    for t in range(3):
        o = L.log_z_bounds(p, randn(6 if t < 2 else 1, 5, g=gen()), t, gen=gen(1))
        assert (o.lower == 0).all() and (o.upper == 0).all() and (o.gap == 0).all() and o.accept == pytest.approx(1)


@pytest.mark.parametrize("reference", REFERENCES)
def test_log_z_against_closed_form(reference):
    p = prior(3, 6, reference, seed=3)
    for t in range(3):
        z = randn(8 if t < 2 else 1, 6, g=gen(t))
        o, exact = L.log_z_bounds(p, z, t, L.AISCfg(chains=64), gen(1)), exact_log_z(p, z, t)
        assert max((o.lower - exact).abs().max(), (o.upper - exact).abs().max()) < 0.15 and exact.abs().max() > 0.3
        assert (o.ess > 10).all() and (o.variance < 0.05).all()


def test_bounds_are_in_order_on_average():
    p, z = prior(2, 8, strength=6.0, seed=4), randn(400, 8, g=gen(6))
    o, exact = L.log_z_bounds(p, z, 0, L.AISCfg(chains=1, least=4, most=4), gen(7)), exact_log_z(p, z, 0)
    low, high = o.lower - exact, o.upper - exact
    assert low.mean() < -5 * low.std() / 20 and high.mean() > 5 * high.std() / 20
    assert abs(low.exp().mean() - 1) < 5 * low.exp().std() / 20  # the lower one averages to Z itself


def test_log_z_in_parts_and_again():
    p, z, cfg = prior(2, 4), randn(10, 4, g=gen()), L.AISCfg(chains=8)
    one, two = L.log_z_bounds(p, z, 0, cfg, gen(1)), L.log_z_bounds(p, z, 0, cfg, gen(1))
    assert torch.equal(one.lower, two.lower) and torch.equal(one.upper, two.upper)
    assert not torch.equal(one.lower, L.log_z_bounds(p, z, 0, cfg, gen(2)).lower)
    parts = L.log_z_bounds(p, z, 0, cfg, gen(1), rows=24)  # three conditions at a time
    assert parts.lower.shape == (10,) and (parts.lower - exact_log_z(p, z, 0)).abs().max() < 0.5


@pytest.mark.parametrize("t", [-1, 2])
def test_log_z_of_no_level(t):
    with pytest.raises(ValueError, match=r"level must lie in 0\.\.1"):
        L.log_z_bounds(prior(2, 3), torch.zeros(1, 3, dtype=F64), t)


def test_network_in_both_directions():
    net = EnergyNet(8, 5, 2, hidden=24, n_blocks=2, free_head=True, gen=gen(1))
    with torch.no_grad():
        net.head.weight.mul_(100)  # steep
    p = DiffusionEBM(consistent_schedule(2), net, PriorCfg())
    o = L.log_z_bounds(p, torch.randn(6, 8, generator=gen()), 0, L.AISCfg(chains=64), gen(2))
    assert o.gap.abs().mean() < 0.2 and o.lower.dtype == torch.float32


def test_level_draws_have_the_moments_of_the_level():
    p = prior(2, 3, "flat", seed=5)
    z = randn(1, 3, g=gen()).expand(8000, 3)
    y = L.level_draws(p, z, 0, gen=gen(1), rows=3000)
    m, v = p.tilt(z[:1], torch.zeros(1, dtype=torch.long))
    mean, cov, _ = p.energy.tilt(m, float(v), 0)
    assert ((y.mean(0) - mean[0]).abs() < 5 * (cov.diagonal() / 8000).sqrt()).all()
    assert (
        (torch.cov(y.T) - cov).abs() < 5 * ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / 8000).sqrt()
    ).all()


# --- latents as noise


def test_flat_jacobian():
    p = DiffusionEBM(consistent_schedule(6), zero_energy(6, 40), PriorCfg(reference="flat"))
    q = DiagGaussian(randn(3, 40, g=gen()), torch.zeros(3, 40, dtype=F64))
    P = L.Paths(p, q, lambda z, i: 0 * z[:, 0])
    zs, _ = P.latents(randn(30, 240, g=gen(1)), torch.arange(3).repeat(10))
    s = p.schedule
    bare = log_N(zs[5], 0.0, float(s.sigma[6]) ** 2) + sum(
        log_N(float(s.a[t + 1]) * zs[t], zs[t + 1], float(s.sigma[t + 1]) ** 2) for t in range(5)
    )
    torch.testing.assert_close(P.unnormalised(zs) - bare, torch.full((30,), -51.0711, dtype=F64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("better", [False, True])
def test_log_q_of_a_path(better):
    p, B, d = prior(3, 2), 4, 2
    q = DiagGaussian(randn(B, d, g=gen()), 0.3 * randn(B, d, g=gen(1)))
    P = L.Paths(p, q, lambda z, i: 0 * z[:, 0])
    if better:
        P.better = {
            t: L.Proposal(
                randn(d, g=gen(2)), 0.1 * randn(d, d, g=gen(3)), torch.tensor([[0.8, 0.0], [0.3, 1.2]], dtype=F64)
            )
            for t in (0, 2)
        }
    i = torch.arange(B)
    e = randn(B, 6, g=gen(4)).requires_grad_()
    zs, log_q = P.latents(e, i)

    def flat(x):
        return torch.cat(P.latents(x[None], i[:1])[0], 1)[0]  # change of variables: log q = log N(e) - log |det dz/de|

    J = torch.autograd.functional.jacobian(flat, e[0].detach())
    torch.testing.assert_close(log_q[0].detach(), log_N(e[0].detach(), 0.0, 1.0) - torch.linalg.slogdet(J)[1])


@pytest.mark.parametrize("reference", REFERENCES)
def test_path_weights_average_to_the_likelihood(reference):
    m = L.LinearGaussian(3, 2, n_x=3, scale=0.5, strength=0.5, reference=reference, seed=1)
    x = m.sample(2)
    q = m.posterior(x)
    q = DiagGaussian(q.mean, q.logvar + 0.3)  # wider than the posterior
    P = L.Paths(m.prior, q, m.log_lik(x))
    P.rough_log_z = lambda zs, t: exact_log_z(m.prior, zs[t + 1], t)[None]
    P.top = exact_log_z(m.prior, torch.zeros(1, 2, dtype=F64), 2).item()
    i = torch.arange(2).repeat(20_000)
    w = P.log_weight(randn(40_000, 6, g=gen()), i).detach().view(-1, 2)
    assert ((-L.log_mean_exp(w) - m.nll(x)).abs() < 5 * L.log_variance(w).sqrt() + 1e-3).all() and (
        L.log_variance(w) < 0.05
    ).all()


def test_rough_log_z_is_unbiased():
    p, q = prior(2, 3, seed=2), DiagGaussian(torch.zeros(1, 3, dtype=F64), torch.zeros(1, 3, dtype=F64))
    P = L.Paths(p, q, lambda z, i: 0 * z[:, 0], n_z=20_000, gen=gen())
    P.proposals[0] = L.Proposal(
        0.2 * randn(3, g=gen(1)),
        0.1 * randn(3, 3, g=gen(2)),
        torch.eye(3, dtype=F64)
        * p.tilt(torch.zeros(1, 3, dtype=F64), torch.zeros(1, dtype=torch.long))[1].sqrt().item(),
    )
    z = randn(5, 3, g=gen(3))
    w = P.rough_log_z([z, z], 0)
    assert ((L.log_mean_exp(w) - exact_log_z(p, z, 0)).abs() < 5 * L.log_variance(w).sqrt() + 1e-3).all()


def test_fitted_proposal():
    g, n = gen(), 20_000
    x = randn(n, 2, g=g)
    G = torch.tensor([[1.0, 0.0, 0.5], [0.0, -2.0, 0.0]], dtype=F64)
    b = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    C = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.1]], dtype=F64)
    o = L.fit_proposal(x, b + x @ G + randn(n, 3, g=g) @ torch.linalg.cholesky(C).T, 1.0, wide=1.0)
    torch.testing.assert_close(o.G, G, rtol=0, atol=0.05)
    torch.testing.assert_close(o.b, b, rtol=0, atol=0.05)
    torch.testing.assert_close(o.L @ o.L.T, C, rtol=0.05, atol=0.05)
    assert all(v.is_contiguous() for v in o)  # as read back from a file, so that a resumed run rounds alike
    few = L.fit_proposal(x[:2], randn(2, 3, g=g), 0.5)  # fewer draws than dimensions: still a proposal
    assert torch.linalg.eigvalsh(few.L @ few.L.T).min() > 0.2


# --- likelihoods


@pytest.mark.parametrize(
    "args",
    [
        dict(T=1, d=10, scale=0.15, strength=0.5),
        dict(T=3, d=4, scale=0.2, strength=1.0, reference="flat"),
        dict(T=2, d=20, scale=0.15, strength=0.2),
        dict(T=4, d=10, scale=0.1, strength=0.2, reference="flat"),
    ],
)
def test_interval_covers(args):
    m = L.LinearGaussian(**args, seed=3)
    x = m.sample(30)
    o = L.nll_bounds(m.prior, m.posterior(x), m.log_lik(x), L.NLLCfg(draws=64), gen(1))
    lo, mid, hi = L.estimation_interval(o)
    exact = m.nll(x).mean().item()
    slack = 0.5 * (hi - lo)  # one run in twenty may miss, by less than this
    assert lo - slack < exact < hi + slack and hi - lo < 0.5 and lo <= mid <= hi
    assert {
        "nll",
        "gap",
        "variance",
        "ess",
        "is_ess",
        "annealed",
        "common",
        *(f"gap_{t}" for t in range(args["T"])),
    } == set(o) and all(v.shape == (30,) for v in o.values())
    assert (o["nll"] - m.nll(x)).abs().max() < 2


def test_where_importance_sampling_fails_annealing_takes_over():
    m = L.LinearGaussian(1, 40, scale=0.25, strength=0.0, seed=1)
    x = m.sample(16)
    q = m.posterior(x)
    q = DiagGaussian(q.mean, q.logvar - 1)  # far too narrow
    o = L.nll_bounds(
        m.prior, q, m.log_lik(x), L.NLLCfg(draws=64, chains=16, variance=0.2, few=1e4), gen(2)
    )  # never enough
    assert (o["annealed"] == 1).all()
    lo, _, hi = L.estimation_interval(o)
    assert lo - 0.1 < m.nll(x).mean() < hi + 0.1 and hi - lo < 0.6
    itself = L.nll_bounds(
        m.prior, q, m.log_lik(x), L.NLLCfg(draws=64, chains=16, variance=0.2, fit=2, rich=1), gen(2)
    )  # no proposal to speak of
    assert itself["annealed"].mean() > 0.5
    plain = L.nll_bounds(m.prior, q, m.log_lik(x), L.NLLCfg(draws=64, few=0.0, share=0.0, fit=2, rich=1), gen(2))
    assert (plain["annealed"] == 0).all() and (plain["nll"] - m.nll(x)).mean() > (o["nll"] - m.nll(x)).mean() + 0.2


def test_a_second_fit_where_the_first_is_nearly_good_enough(monkeypatch):
    "Few draws first; many only if importance sampling may then serve, and they make weights more even"
    m = L.LinearGaussian(1, 20, scale=0.2, strength=0.1, seed=1)
    x = m.sample(24)
    q = m.posterior(x)

    def run(**kw):
        names, inner = [], L.SentenceBounds.annealed
        with monkeypatch.context() as mp:
            mp.setattr(
                L.SentenceBounds,
                "annealed",
                lambda self, s, name, chains: (names.append((name, len(s) * chains)), inner(self, s, name, chains))[1],
            )
            return names, L.nll_bounds(m.prior, q, m.log_lik(x), L.NLLCfg(draws=64, **kw), gen(2))

    names, two = run()
    assert names[:2] == [("proposal", 320), ("finer proposal", 1280)]
    names, one = run(few=1e4)
    assert [k for k, _ in names] == ["proposal", "posterior"]
    assert two["is_ess"].mean() > 1.2 * one["is_ess"].mean()


def test_study_over_a_few_models():
    seen = []
    out = L.coverage_study((14, 15, 28), L.NLLCfg(draws=64), n=20, each=seen.append)
    assert seen == out and sum(o["covered"] for o in out) >= 2 and max(o["width"] for o in out) < 0.3
    assert all(o["covered"] == (o["lower"] <= o["exact"] <= o["upper"]) and o["rate"] <= 30 for o in out)


def test_study_models_are_those_of_the_seed():
    (a, m, x), (b, n, y) = L.study_model(16, 10), L.study_model(16, 10)
    assert a == b and torch.equal(x, y) and torch.equal(m.W, n.W) and a["rate"] <= 30
    scales = {L.study_model(s, 5)[0]["scale"] for s in range(12)}
    assert scales - {0.05, 0.1, 0.15, 0.2}  # some were drawn again, with half the scale
    assert L.study_model(16, 10, most=5.0)[0]["rate"] <= 5


def test_record(tmp_path):
    L.write_coverage(tmp_path / "calibration-likelihood.json", (14,), L.NLLCfg(draws=8, top=64), n=4)
    rec = L.check_coverage(json.loads((tmp_path / "calibration-likelihood.json").read_text()))
    assert rec["calibration"] == "likelihood" and rec["cfg"]["draws"] == 8 and rec["models"][0]["seed"] == 14
    with pytest.raises(ValueError, match="contradicts itself"):
        L.check_coverage({**rec, "models": [{**rec["models"][0], "covered": not rec["models"][0]["covered"]}]})
    with pytest.raises(ValueError, match="lacks upper"):
        L.check_coverage({**rec, "models": [{k: v for k, v in rec["models"][0].items() if k != "upper"}]})
    with pytest.raises(ValueError, match="lacks cfg"):
        L.check_coverage({k: v for k, v in rec.items() if k != "cfg"})


def test_committed_record():
    from ldebm.records import results_root

    rec = L.check_coverage(json.loads((results_root() / "calibration" / "likelihood.json").read_text()))
    assert [o["seed"] for o in rec["models"]] == list(range(50)) and rec["n"] == 40
    assert (
        sum(o["covered"] for o in rec["models"]) >= 45
        and max(o["width"] for o in rec["models"]) <= 0.5
        and max(o["rate"] for o in rec["models"]) <= 30
    )
    for o in rec["models"][::10]:  # the settings are those that the seeds give today
        s, m, x = L.study_model(o["seed"], rec["n"])
        assert all(o[k] == s[k] for k in ("T", "d", "scale", "strength", "reference")) and m.nll(
            x
        ).mean().item() == pytest.approx(o["exact"], abs=1e-6)


@pytest.mark.parametrize("few", [0.0, 1000.0])
def test_decoder_against_an_integral(few):
    "One latent, a network as decoder, N(0, 1) and an energy: p(x) by numerical integration"
    net = (
        torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        .double()
        .requires_grad_(False)
    )
    for k, w in enumerate(net.parameters()):
        w.copy_(1.5 * randn(*w.shape, g=gen(k)))
    energy = EnergyNet(1, 3, 1, hidden=8, n_blocks=1, spectral=False, gen=gen(9)).double().requires_grad_(False)
    x = net(randn(12, 1, g=gen(5))) + 0.5 * randn(12, 4, g=gen(6))

    def log_lik(z, i):
        return log_N(x[i], net(z), 0.25)

    grid = torch.linspace(-8, 8, 8001, dtype=F64)[:, None]
    base = log_N(grid, 0.0, 1.0) + math.log(0.002)
    tilted = base + energy(grid, torch.zeros(len(grid), dtype=torch.long))
    tilted = tilted - tilted.logsumexp(0)
    post = torch.stack([(log_lik(grid, torch.full((len(grid),), k)) + base).softmax(0) for k in range(12)])
    mean = post @ grid
    q = DiagGaussian(mean, ((post @ grid**2) - mean**2).log() + 0.5)
    for p, log_p in ((StandardNormal(1), base), (DiffusionEBM(consistent_schedule(1), energy, PriorCfg()), tilted)):
        exact = torch.stack([-(log_lik(grid, torch.full((len(grid),), k)) + log_p).logsumexp(0) for k in range(12)])
        o = L.nll_bounds(p, q, log_lik, L.NLLCfg(draws=200, few=few, share=0.0, chains=64), gen(7))
        assert (o["annealed"] == (few > 0)).all()
        lo, _, hi = L.estimation_interval(o)
        assert lo - 0.5 * (hi - lo) < exact.mean() < hi + 0.5 * (hi - lo) and hi - lo < 0.3
        assert ((o["nll"] - exact).abs() < 5 * o["variance"].sqrt() + 0.02).all()


def test_same_generator_same_bits():
    m = L.LinearGaussian(2, 6, seed=2)
    x = m.sample(6)

    def run(seed, plans=None):
        return L.nll_bounds(
            m.prior, m.posterior(x), m.log_lik(x), L.NLLCfg(draws=16, top=64, fit=64), gen(seed), plans=plans
        )

    a, b, c = run(0), run(0), run(1)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["nll"], c["nll"])
    plans = {}
    d = run(0, plans)
    assert torch.equal(a["nll"], d["nll"]) and {("fit", 0), 0, "better"} <= set(plans)
    before = {k: v for k, v in plans.items()}
    again = run(3, plans)  # what the first chunk taught serves the second
    assert all(plans[k] is v for k, v in before.items()) and (again["nll"] - m.nll(x)).abs().max() < 2


def test_levels_too_hard_for_a_fitted_gaussian():
    m = L.LinearGaussian(2, 6, seed=2)
    x = m.sample(6)
    o = L.nll_bounds(
        m.prior, m.posterior(x), m.log_lik(x), L.NLLCfg(draws=16, top=256, fit=64, few=10.0, n_z=1), gen(0)
    )
    assert (o["nll"] - m.nll(x)).abs().mean() < 1


def test_interval_by_hand():
    parts = dict(
        nll=torch.tensor([1.0, 3.0]),
        gap=torch.tensor([0.2, 0.4]),
        variance=torch.tensor([0.04, 0.12]),
        common=torch.tensor([0.01, 0.01]),
    )
    se = math.sqrt(0.16 / 4 + 0.01)
    assert L.estimation_interval(parts) == pytest.approx((2 - 0.3 - 0.04 - 1.96 * se, 2, 2 + 1.96 * se))
    parts["gap"] = -parts["gap"]  # crossed by chance: the interval grows on the other side
    assert L.estimation_interval(parts) == pytest.approx((2 - 0.04 - 1.96 * se, 2, 2 + 0.3 + 1.96 * se))


def test_metrics_of_a_likelihood():
    n = 50
    parts = dict(
        nll=torch.linspace(10, 20, n),
        gap=torch.full((n,), 0.05),
        variance=torch.full((n,), 0.02),
        ess=torch.full((n,), 20.0),
        annealed=(torch.arange(n) < 5).float(),
        gap_0=torch.full((n,), 0.05),
        gap_1=torch.full((n,), 0.3),
    )
    got = L.nll_metric(parts, '; a test')
    assert (
        got["nll_valid"]["value"] == pytest.approx(15)
        and got["nll_valid"]["interval"][0] < 14.3 < 15.7 < got["nll_valid"]["interval"][1]
    )
    assert (
        got["nll_gap"]["value"] == pytest.approx(0.3)
        and "NOT valid" in got["nll_valid"]["estimator"]
        and got["nll_annealed"]["value"] == pytest.approx(0.1)
    )
    parts["gap_1"] = torch.full((n,), 0.05)
    assert "NOT valid" not in L.nll_metric(parts)["nll_valid"]["estimator"]


def test_a_bound_of_all_sentences_corrects_for_which_were_taken():
    n, N = 50, 1000
    nll = torch.linspace(10, 20, n)
    parts = dict(
        nll=nll,
        gap=torch.zeros(n),
        variance=torch.full((n,), 1e-6),
        ess=torch.full((n,), 20.0),
        annealed=torch.zeros(n),
    )
    every = torch.cat([nll + 1, torch.linspace(18, 28, N - n)])  # one nat above, and the others are harder
    plain, got = L.nll_metric(parts)["nll_valid"], L.nll_metric(parts, cheap=(every[:n], every))["nll_valid"]
    assert (
        plain["value"] == pytest.approx(15)
        and got["value"] == pytest.approx(float(every.mean()) - 1, abs=1e-4)
        and got["n"] == n
    )

    def width(m):
        return m["interval"][1] - m["interval"][0]

    assert width(got) == pytest.approx(2 * 1.96 * float(every.double().std()) / N**0.5, rel=0.02) and width(
        got
    ) < 0.4 * width(plain)
    assert "regression on the bound of all 1,000" in got["estimator"] and "regression" not in plain["estimator"]
    assert L.nll_metric(parts, cheap=(every[:n], every[:n]))["nll_valid"] == plain  # all there are


# --- as published


@pytest.mark.parametrize("density", ["right", "as coded"])
def test_svebm_against_a_loop(density):
    S, B, d, chunk = 6, 2, 3, 3
    g = gen()
    q = DiagGaussian(randn(B, d, g=g), -1 + 0.2 * randn(B, d, g=g))
    z, F, ll = q.mean + (0.5 * q.logvar).exp() * randn(S, B, d, g=g), randn(S, B, g=g), -5 + randn(S, B, g=g)
    want = []
    for b in range(B):
        estimates = []
        for c in range(S // chunk):
            top = bottom = 0.0
            for s in range(c * chunk, (c + 1) * chunk):
                log_D = F[s, b].item()
                for k in range(d):
                    for mean, var, sign in ((0.0, 1.0, 1), (q.mean[b, k].item(), q.logvar[b, k].exp().item(), -1)):
                        sq = (z[s, b, k].item() - mean) ** 2
                        if density == "right":
                            log_g = -sq / (2 * var) - 0.5 * math.log(var) - 0.5 * math.log(2 * math.pi)
                        else:
                            log_g = -sq / (2 * var - 0.5 * math.log(var) - 0.5 * math.log(2 * math.pi))
                        log_D += sign * log_g
                top += math.exp(ll[s, b].item() + log_D)
                bottom += math.exp(log_D)
            estimates.append(top / bottom)
        want.append(-math.log(sum(estimates) / len(estimates)))
    assert L.nll_svebm(ll, F, z, q, chunk, density).tolist() == pytest.approx(want)


def test_svebm_errors():
    z, q = torch.zeros(5, 1, 2), DiagGaussian(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="5 draws do not fill chunks of 2"):
        L.nll_svebm(torch.zeros(5, 1), torch.zeros(5, 1), z, q, 2)
    with pytest.raises(ValueError, match="density"):
        L.nll_svebm(torch.zeros(5, 1), torch.zeros(5, 1), z, q, 5, "wrong")


def published_prior(T, d):
    return DiffusionEBM(
        published_schedule(T), zero_energy(T, d), PriorCfg(objective="published", reference="flat", mala=False)
    )


def test_ldebm_errors():
    q, ll = DiagGaussian(torch.zeros(1, 2, dtype=F64), torch.zeros(1, 2, dtype=F64)), lambda z, i: 0 * z[:, 0]
    with pytest.raises(ValueError, match="a_0 < 1"):
        L.nll_ldebm(prior(2, 2), q, ll)
    with pytest.raises(ValueError, match="150 draws do not fill chunks of 100"):
        L.nll_ldebm(published_prior(2, 2), q, ll, draws=150)


def test_ldebm_is_off_by_what_its_formula_says():
    "At one level and zero energy the published log Z has the width of q(z_0|z) instead of the prior's"
    m = L.LinearGaussian(1, 40, scale=0.1, strength=0.0, reference="flat", seed=2)
    x, s = m.sample(20), published_schedule(1)
    got = L.nll_ldebm(published_prior(1, 40), m.posterior(x), m.log_lik(x), gen=gen())
    off = (got - m.nll(x)).mean().item()
    assert off == pytest.approx(-40 * (s.sigma[1] / s.sbar[0]).log().item(), abs=6) and off < -100
    assert torch.equal(got, L.nll_ldebm(published_prior(1, 40), m.posterior(x), m.log_lik(x), gen=gen()))


# --- the model whose likelihood is known


@pytest.mark.parametrize("reference", REFERENCES)
def test_linear_gaussian(reference):
    m = L.LinearGaussian(3, 2, n_x=2, scale=0.7, strength=1.0, reference=reference, seed=4)
    z = torch.zeros(100_000, 2, dtype=F64)
    for t in reversed(range(3)):
        lev = torch.full((len(z),), t)
        mean, cov, _ = m.prior.energy.tilt(m.prior.tilt(z, lev)[0], float(m.prior.tilt(z[:1], lev[:1])[1]), t)
        z = ((mean + randn(*z.shape, g=gen(t)) @ torch.linalg.cholesky(cov).T) / m.prior.scale(lev, z)).detach()
    assert ((z.mean(0) - m.mean).abs() < 5 * (m.cov.diagonal() / len(z)).sqrt()).all()
    assert (
        (torch.cov(z.T) - m.cov).abs() < 5 * ((m.cov.diagonal()[:, None] * m.cov.diagonal() + m.cov**2) / len(z)).sqrt()
    ).all()
    x = m.sample(3)
    w = torch.stack([m.log_lik(x)(z, torch.full((len(z),), k)) for k in range(3)], 1)
    assert ((-L.log_mean_exp(w) - m.nll(x)).abs() < 5 * L.log_variance(w).sqrt() + 1e-3).all()
    q = m.posterior(x)
    zq = q.mean[:1] + (0.5 * q.logvar[:1]).exp() * randn(50_000, 2, g=gen(8))
    kl = DiagGaussian(q.mean[:1], q.logvar[:1]).log_prob(zq) - torch.distributions.MultivariateNormal(
        m.mean, m.cov
    ).log_prob(zq)
    assert abs(kl.mean() - m.rate(q)[0]) < 5 * kl.std() / 50_000**0.5


def test_zero_strength_is_the_reference():
    m = L.LinearGaussian(4, 3, strength=0.0)
    torch.testing.assert_close(m.cov, torch.eye(3, dtype=F64))
    torch.testing.assert_close(m.mean, torch.zeros(3, dtype=F64))
