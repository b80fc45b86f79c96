"`annealing`: weights by hand, chains against closed forms, bounds in their order"

import math

import pytest
import torch
from gaussians import F64, REFERENCES, exact_log_z, gen, level_of, log_N, prior, quadratic, randn

from ldebm.annealing import (
    AISCfg,
    Plan,
    anneal,
    annealed_draws,
    log_variance,
    log_z_bounds,
    metropolis,
    model_level,
    plan_ais,
    resample,
    tempered,
    trusted,
)
from ldebm.energy import EnergyNet
from ldebm.langevin import preconditioned, shorten
from ldebm.levels import PriorCfg
from ldebm.prior import DiffusionEBM
from ldebm.schedule import consistent_schedule
from ldebm.stats import effective, log_mean_exp

pytestmark = pytest.mark.usefixtures("in_test")


def test_weights_by_hand():
    w = torch.tensor([[1.0, 1.0], [1.0, 3.0], [1.0, 0.0]], dtype=F64).log()
    assert log_variance(w)[0].item() == pytest.approx(0, abs=1e-12)
    a = torch.tensor([0.1, -0.2, 0.4, 0.0], dtype=F64)
    kong, normal = (
        (a.exp() ** 2).sum() / a.exp().sum() ** 2 - 1 / 4,
        torch.tensor((0.05**2 + 0.35**2) / 2).expm1() / 4,
    )  # about the median, .05
    assert log_variance(a).item() == pytest.approx(max(kong, normal).item())
    assert trusted(a).item() == pytest.approx(1 / (max(kong, normal).item() + 0.25))


def test_weights_without_any_weight():
    some = torch.tensor([0.0, -math.inf, -math.inf])
    assert log_variance(some) == 1 and 0.5 < trusted(some) <= 1


def test_spread_of_the_upper_half():
    "Normal log-weights: their variance; draws without weight do no harm, an outlier above does"
    w = torch.randn(64, 4000, generator=gen())
    assert (log_variance(w) * 64).log1p().median().item() == pytest.approx(1, abs=0.1)
    half = torch.cat([torch.zeros(32, 1), torch.full((31, 1), -1e4), torch.full((1, 1), -math.inf)])
    assert log_variance(half[:-1]).item() == pytest.approx(1 / 32 - 1 / 63, rel=0.02)
    outlier = torch.cat([torch.zeros(63), torch.tensor([20.0])])
    assert log_variance(outlier) > 0.9


def test_one_weight_has_no_known_variance():
    assert log_variance(torch.zeros(1, 3)).tolist() == [1, 1, 1]


def test_heavy_tails_are_not_trusted():
    w = 2 * torch.randn(64, 2000, generator=gen()) - 2  # log-normal with mean 1
    low = -log_mean_exp(w).mean().item()
    assert low > 0.1 and 0.5 * log_variance(w).mean() > low > 0.5 * (1 / effective(w) - 1 / 64).mean() * 1.5
    assert (trusted(w) <= effective(w) * (1 + 1e-5)).all()


@pytest.mark.parametrize("n", [1, 4, 1000])
def test_resample_by_weight(n):
    w = torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.7, 1.0]], dtype=F64).log()
    rows = resample(w, n, gen())
    assert rows.shape == (n, 2) and (rows[:, 1] == 2).all()
    if n == 1000:
        assert [(rows[:, 0] == k).sum().item() for k in range(3)] == pytest.approx([100, 200, 700], abs=1)


@pytest.mark.parametrize("rho, drift", [(0.3, 3.0), (0.9, 0.2)])
def test_metropolis_leaves_the_tilt_as_it_is(rho, drift):
    g, n, d = gen(1), 20_000, 3
    e = quadratic(1, d, 3.0, seed=1)
    level = level_of(e, randn(1, d, g=g).expand(n, d), torch.full((n, 1), 0.7, dtype=F64))
    mean, cov, _ = e.tilt(level.mean[:1], 0.7, 0)
    z = mean + randn(n, d, g=g) @ torch.linalg.cholesky(cov).T
    here, step = level.evaluate(z), preconditioned(level, rho, drift)
    for _ in range(8):
        here, a = metropolis(level, step, here, g)
        assert ((a >= 0) & (a <= 1)).all() and 0.02 < a.mean() < 0.999
    assert not torch.equal(here.z, z)
    assert ((here.z.mean(0) - mean[0]).abs() < 5 * (cov.diagonal() / n).sqrt()).all()
    spread = ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / n).sqrt()
    assert ((torch.cov(here.z.T) - cov).abs() < 5 * spread).all()
    now = level.evaluate(here.z)
    torch.testing.assert_close(tuple(here), tuple(now))


def test_metropolis_ratio_by_hand():
    e, beta, rho, drift = quadratic(1, 2, 4.0), 0.6, 0.4, 0.5
    y, m, v = randn(5, 2, g=gen(2)), randn(5, 2, g=gen(3)), torch.full((5, 1), 0.6, dtype=F64)
    level = tempered(level_of(e, m, v), beta)
    _, a = metropolis(level, preconditioned(level, rho, drift), level.evaluate(y), gen(4))
    s2 = 0.6 * (1 - rho**2)
    e_noise = randn(5, 2, g=gen(4))
    sd = torch.full((5, 1), s2**0.5, dtype=F64)

    def tilt(x):
        return -0.5 * ((x - e.c[0]) @ e.A[0] * (x - e.c[0])).sum(-1), -(x - e.c[0]) @ e.A[0]

    def to(x):
        return m + rho * (x - m) + shorten((1 - rho) * 0.6 * beta * tilt(x)[1], drift, sd)

    new = to(y) + s2**0.5 * e_noise

    def log_p(x):
        return beta * tilt(x)[0] + log_N(x, m, 0.6)

    want = (log_p(new) - log_p(y) + log_N(y, to(new), s2) - log_N(new, to(y), s2)).clamp(max=0).exp()
    torch.testing.assert_close(a, want)


@pytest.mark.parametrize("beyond", [-torch.inf, torch.nan])
def test_a_point_without_density_is_refused(beyond):
    def wall(z, t, y=None, context=None):
        return torch.where(z[:, 0] > 0, beyond, 0.0 * z[:, 0])

    level = level_of(wall, torch.zeros(500, 2, dtype=F64), torch.ones(500, 1, dtype=F64))
    here, step = level.evaluate(-torch.rand(500, 2, generator=gen(), dtype=F64)), preconditioned(level, 0.5, 3.0)
    for k in range(5):
        here, _ = metropolis(level, step, here, gen(k))
    assert (here.z[:, 0] <= 0).all() and (here.F == 0).all()


@pytest.mark.parametrize("back", [False, True])
def test_annealing_is_unbiased_with_few_temperatures(back):
    g, n, d = gen(5), 30_000, 3
    e = quadratic(1, d, 2.0, seed=2)
    level = level_of(e, torch.full((n, d), 0.2, dtype=F64), torch.full((n, 1), 0.9, dtype=F64))
    mean, cov, log_Z = e.tilt(level.mean[:1], 0.9, 0)
    z = mean + randn(n, d, g=g) @ torch.linalg.cholesky(cov).T if back else level.gaussian(g)
    plan = Plan([0.3, 1.0], [0.6, 0.5], False)
    w, _, acc = anneal(level, level.evaluate(z), plan, back=back, gen=g)
    ratio = (w + log_Z if back else w - log_Z).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / n**0.5
    assert -w.mean() > log_Z if back else w.mean() < log_Z
    assert ((acc > 0) & (acc <= 1)).all()


def test_plan_is_increasing_and_says_when_it_is_cut():
    e = quadratic(1, 10, 20.0)
    level = level_of(e, torch.zeros(128, 10, dtype=F64), torch.ones(128, 1, dtype=F64))
    p = plan_ais(level, AISCfg(variance=0.5), gen=gen())
    assert (
        all(a < b for a, b in zip([0.0, *p.betas], p.betas))
        and p.betas[-1] == 1
        and len(p.rhos) == len(p.betas)
        and not p.limited
    )
    assert all(0 < r < 1 for r in p.rhos) and 8 <= len(p.betas) <= 200
    cut = plan_ais(level, AISCfg(least=2, most=5, variance=0.01), gen=gen())
    assert len(cut.betas) == 5 and cut.betas[-1] == 1 and cut.limited
    more = plan_ais(level, AISCfg(variance=0.01, most=10_000), gen=gen())
    assert len(more.betas) > 3 * len(p.betas)


def test_plan_of_a_diverged_energy():
    def diverged(z, t, y=None, context=None):
        return z.sum(-1) * math.nan

    with pytest.raises(FloatingPointError, match="diverged"):
        plan_ais(level_of(diverged, torch.zeros(8, 2), torch.ones(8, 1)))


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
        AISCfg(**bad)


@pytest.mark.parametrize("reference", REFERENCES)
def test_zero_energy_has_log_z_zero(reference):
    p = prior(3, 5, reference, strength=0)
    for t in range(3):
        o = log_z_bounds(p, randn(6 if t < 2 else 1, 5, g=gen()), t, gen=gen(1))
        assert (o.lower == 0).all() and (o.upper == 0).all() and (o.gap == 0).all() and o.accept == pytest.approx(1)


@pytest.mark.parametrize("reference", REFERENCES)
def test_log_z_against_closed_form(reference):
    p = prior(3, 6, reference, seed=3)
    for t in range(3):
        z = randn(8 if t < 2 else 1, 6, g=gen(t))
        o, exact = log_z_bounds(p, z, t, AISCfg(chains=64), gen(1)), exact_log_z(p, z, t)
        assert max((o.lower - exact).abs().max(), (o.upper - exact).abs().max()) < 0.15 and exact.abs().max() > 0.3
        assert (o.ess > 10).all() and (o.variance < 0.05).all()


def test_bounds_are_in_order_on_average():
    p, z = prior(2, 8, strength=6.0, seed=4), randn(400, 8, g=gen(6))
    o, exact = log_z_bounds(p, z, 0, AISCfg(chains=1, least=4, most=4), gen(7)), exact_log_z(p, z, 0)
    low, high = o.lower - exact, o.upper - exact
    assert low.mean() < -5 * low.std() / 20 and high.mean() > 5 * high.std() / 20
    assert abs(low.exp().mean() - 1) < 5 * low.exp().std() / 20  # the lower one averages to Z itself


def test_log_z_in_parts_and_again():
    p, z, cfg = prior(2, 4), randn(10, 4, g=gen()), AISCfg(chains=8)
    one, two = log_z_bounds(p, z, 0, cfg, gen(1)), log_z_bounds(p, z, 0, cfg, gen(1))
    assert torch.equal(one.lower, two.lower) and torch.equal(one.upper, two.upper)
    assert not torch.equal(one.lower, log_z_bounds(p, z, 0, cfg, gen(2)).lower)
    parts = log_z_bounds(p, z, 0, cfg, gen(1), rows=24)  # three conditions at a time
    assert parts.lower.shape == (10,) and (parts.lower - exact_log_z(p, z, 0)).abs().max() < 0.5


@pytest.mark.parametrize("t", [-1, 2])
def test_log_z_of_no_level(t):
    with pytest.raises(ValueError, match=r"level must lie in 0\.\.1"):
        log_z_bounds(prior(2, 3), torch.zeros(1, 3, dtype=F64), t)


def test_network_in_both_directions():
    net = EnergyNet(8, 5, 2, hidden=24, n_blocks=2, free_head=True, gen=gen(1))
    with torch.no_grad():
        net.head.weight.mul_(100)  # steep
    p = DiffusionEBM(consistent_schedule(2), net, PriorCfg())
    o = log_z_bounds(p, torch.randn(6, 8, generator=gen()), 0, AISCfg(chains=64), gen(2))
    assert o.gap.abs().mean() < 0.2 and o.lower.dtype == torch.float32


def test_level_draws_have_the_moments_of_the_level():
    p = prior(2, 3, "flat", seed=5)
    z = randn(1, 3, g=gen()).expand(8000, 3)
    y = annealed_draws(model_level(p, z, 0), gen=gen(1), rows=3000)
    level = model_level(p, z[:1], 0)
    mean, cov, _ = p.energy.tilt(level.mean, float(level.variance), 0)
    assert ((y.mean(0) - mean[0]).abs() < 5 * (cov.diagonal() / 8000).sqrt()).all()
    assert (
        (torch.cov(y.T) - cov).abs() < 5 * ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / 8000).sqrt()
    ).all()
