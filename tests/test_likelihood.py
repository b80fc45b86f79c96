"`likelihood`: against exact values and integrals, where importance sampling fails too; intervals and records"

import math

import pytest
import torch
from gaussians import F64, gen, log_N, randn

from ldebm.energy import EnergyNet
from ldebm.levels import PriorCfg
from ldebm.likelihood import NLLCfg, estimation_interval, nll_bounds, nll_metric
from ldebm.linear_gaussian import LinearGaussian
from ldebm.posterior import DiagGaussian, StandardNormal
from ldebm.prior import DiffusionEBM
from ldebm.schedule import consistent_schedule

pytestmark = pytest.mark.usefixtures("in_test")


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
        NLLCfg(**bad)


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
    m = LinearGaussian(**args, seed=3)
    x = m.sample(30)
    o = nll_bounds(m.prior, m.posterior(x), m.log_lik(x), NLLCfg(draws=64), gen(1))
    lo, mid, hi = estimation_interval(o)
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
    m = LinearGaussian(1, 40, scale=0.25, strength=0.0, seed=1)
    x = m.sample(16)
    q = m.posterior(x)
    q = DiagGaussian(q.mean, q.logvar - 1)  # far too narrow

    def run(**kw):
        cfg = NLLCfg(draws=64, chains=16, variance=0.2, fit=2, rich=1, refine=0, **kw)
        return nll_bounds(m.prior, q, m.log_lik(x), cfg, gen(2))

    o = run(few=1e4)  # never enough
    assert (o["annealed"] == 1).all()
    lo, _, hi = estimation_interval(o)
    assert lo - 0.1 < m.nll(x).mean() < hi + 0.1 and hi - lo < 0.6
    assert run()["annealed"].mean() > 0.5
    plain = run(few=0.0)
    assert (plain["annealed"] == 0).all() and (plain["nll"] - m.nll(x)).mean() > (o["nll"] - m.nll(x)).mean() + 0.2


def test_a_posterior_of_its_own_saves_annealing():
    "An encoder that is several nats off: its sentences are annealed; moved up their own bounds, none is"
    m = LinearGaussian(1, 10, scale=0.2, strength=0.1, seed=1)
    x = m.sample(24)
    q = DiagGaussian(m.posterior(x).mean + 1, m.posterior(x).logvar)
    encoder, own = (nll_bounds(m.prior, q, m.log_lik(x), NLLCfg(refine=steps), gen(2)) for steps in (0, 100))
    assert encoder["annealed"].mean() > 0.9 and own["annealed"].mean() < 0.1
    assert own["is_ess"].median() > 10 * encoder["is_ess"].median()
    assert (own["nll"] - m.nll(x)).abs().max() < 1


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
        o = nll_bounds(p, q, log_lik, NLLCfg(draws=200, few=few, chains=64), gen(7))
        assert (o["annealed"] == (few > 0)).all()
        lo, _, hi = estimation_interval(o)
        assert lo - 0.5 * (hi - lo) < exact.mean() < hi + 0.5 * (hi - lo) and hi - lo < 0.3
        assert ((o["nll"] - exact).abs() < 5 * o["variance"].sqrt() + 0.02).all()


def test_same_generator_same_bits():
    m = LinearGaussian(2, 6, seed=2)
    x = m.sample(6)

    def run(seed, plans=None):
        return nll_bounds(
            m.prior, m.posterior(x), m.log_lik(x), NLLCfg(draws=16, top=64, fit=64), gen(seed), plans=plans
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
    m = LinearGaussian(2, 6, seed=2)
    x = m.sample(6)
    o = nll_bounds(m.prior, m.posterior(x), m.log_lik(x), NLLCfg(draws=16, top=256, fit=64, few=10.0, n_z=1), gen(0))
    assert (o["nll"] - m.nll(x)).abs().mean() < 1


def test_interval_by_hand():
    parts = dict(
        nll=torch.tensor([1.0, 3.0]),
        gap=torch.tensor([0.2, 0.4]),
        variance=torch.tensor([0.04, 0.12]),
        common=torch.tensor([0.01, 0.01]),
    )
    se = math.sqrt(0.16 / 4 + 0.01)
    assert estimation_interval(parts) == pytest.approx((2 - 0.3 - 0.04 - 1.96 * se, 2, 2 + 1.96 * se))
    parts["gap"] = -parts["gap"]  # crossed by chance: the interval grows on the other side
    assert estimation_interval(parts) == pytest.approx((2 - 0.04 - 1.96 * se, 2, 2 + 0.3 + 1.96 * se))


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
    got = nll_metric(parts, '; a test')
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
    assert "NOT valid" not in nll_metric(parts)["nll_valid"]["estimator"]


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
    plain, got = nll_metric(parts)["nll_valid"], nll_metric(parts, cheap=(every[:n], every))["nll_valid"]
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
    assert nll_metric(parts, cheap=(every[:n], every[:n]))["nll_valid"] == plain  # all there are
