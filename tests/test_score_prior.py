"`score_prior`: schedules, the sampler against exact moments, training, classes, and what must be refused"

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldebm import score_prior as sp
from ldebm.core import load_tensors, make_gen, save_tensors
from ldebm.image_outliers import score_norm
from ldebm.perfect_score import GaussianScore, gaussian_moments
from ldebm.posterior import DiagGaussian, StandardNormal
from ldebm.schedule import diffuse
from ldebm.two_samples import mmd2


def small(d=3, n_symbols=0, **kw):
    kw = dict(hidden=16, n_blocks=1, n_levels=30) | kw
    return sp.make_score_prior(d, sp.ScorePriorCfg(**kw), n_symbols, make_gen(0, "net"))


def test_linear_schedule_is_ho():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    s = sp.linear_schedule(1000)
    assert s.abar.dtype == torch.float64
    assert_close(s.abar[1:] ** 2, (1 - beta).cumprod(0))  # `abar` is an amplitude
    for T in (25, 100, 400):
        assert float(sp.linear_schedule(T).abar[-1]) < 0.02
    for T in (24, True, 50.0):
        with pytest.raises(ValueError, match="25"):
            sp.linear_schedule(T)


@pytest.mark.parametrize(
    "kw",
    [
        dict(schedule="sigmoid"),
        dict(predict="x"),
        dict(variance="mid"),
        dict(n_levels=1),
        dict(draws=0),
        dict(n_blocks=-1),
        dict(eta=1.5),
        dict(ema=1.0),
        dict(drop=-0.1),
        dict(sample_steps=101),
        dict(hidden=0),
    ],
)
def test_settings_are_checked(kw):
    with pytest.raises(ValueError):
        sp.ScorePriorCfg(**kw)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("predict", ["eps", "v"])
@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("steps,eta", [(50, 1.0), (7, 1.0), (7, 0.5), (7, 0.0)])
def test_exact_moments(schedule, predict, variance, steps, eta):
    "With a perfect network, samples have the moments of the closed-form recursion, discretisation error included"
    cfg = sp.ScorePriorCfg(n_levels=50, schedule=schedule, predict=predict, variance=variance)
    mean, L = (
        torch.tensor([1.0, -0.5], dtype=torch.float64),
        torch.tensor([[0.6, 0.0], [0.5, 0.9]], dtype=torch.float64),
    )
    g, n = GaussianScore(mean, L @ L.T, cfg), 8000
    mu, C = gaussian_moments(g, steps, eta)
    z = sp.ScorePrior(g, cfg).sample(
        n, n_steps=steps, eta=eta, gen=make_gen(1, schedule, predict, variance, steps, int(10 * eta))
    )
    assert z.dtype == torch.float64
    assert ((z.mean(0) - mu).abs() < 5 * (C.diag() / n).sqrt()).all()
    assert ((z.T.cov() - C).abs() < 5 * ((C.diag()[:, None] * C.diag() + C**2) / n).sqrt()).all()


def test_exact_moments_can_fail():
    "Negative control: a slightly wrong network is noticed by the same check"
    cfg = sp.ScorePriorCfg(n_levels=50)
    m, S, n = torch.zeros(2, dtype=torch.float64), 0.5 * torch.eye(2, dtype=torch.float64), 8000
    mu, C = gaussian_moments(GaussianScore(m, S, cfg), 50, 1.0)
    z = sp.ScorePrior(GaussianScore(m, 1.15 * S, cfg), cfg).sample(n, gen=make_gen(2))
    assert not ((z.T.cov() - C).abs() < 5 * ((C.diag()[:, None] * C.diag() + C**2) / n).sqrt()).all()


def test_large_variance_is_exact_for_standard_normal():
    cfg = sp.ScorePriorCfg(n_levels=40, variance="large")
    g = GaussianScore(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), cfg)
    for steps in (40, 10):  # all that is missing is the noise of the last step
        _, C = gaussian_moments(g, steps, 1.0)
        last = sp.step_levels(40, steps)[-2]
        assert_close(C, torch.eye(2, dtype=torch.float64) * float(cfg.levels().abar[last]) ** 2, rtol=1e-9, atol=1e-12)


def test_more_steps_approach_the_truth():
    S = torch.diag(torch.tensor([1.5, 0.25, 1.0], dtype=torch.float64))
    err = []
    for T in (50, 200, 800):
        g = GaussianScore(torch.zeros(3, dtype=torch.float64), S, sp.ScorePriorCfg(n_levels=T))
        err.append(
            max(float((gaussian_moments(g, T, eta)[1] / S.diag()).diag().sub(1).abs().max()) for eta in (0.0, 1.0))
        )
    assert err[0] > 2.5 * err[1] > 6 * err[2]


def test_step_levels():
    for n in range(1, 31):
        lv = sp.step_levels(30, n)
        assert lv[0] == 30 and lv[-1] == 0 and len(lv) == n + 1 and all(a > b for a, b in zip(lv, lv[1:]))
    for n in (0, 31, True, 2.0):
        with pytest.raises(ValueError, match="1..30"):
            sp.step_levels(30, n)


class Oracle(nn.Module):
    "Knows the clean latent, which is the same for every row"

    n_symbols = 0

    def __init__(self, z0, cfg):
        super().__init__()
        self.register_buffer("z0", z0)
        self.d, self.n_levels, self.s, self.predict = len(z0), cfg.n_levels, cfg.levels(), cfg.predict

    def forward(self, z, t, y=None):
        a, b = self.s.coefficient("abar", t, z), self.s.coefficient("sbar", t, z)
        eps = (z - a * self.z0) / b
        return eps if self.predict == "eps" else a * eps - b * self.z0


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_terms_of_an_oracle_are_zero(predict):
    cfg = sp.ScorePriorCfg(n_levels=30, predict=predict)
    z0 = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    p = sp.ScorePrior(Oracle(z0, cfg), cfg)
    z = z0.expand(50, 3)
    assert float(p.terms(None, z, make_gen(0))["score"].max()) < 1e-16
    assert float(p.terms(None, z + 0.1, make_gen(0))["score"].mean()) > 1e-3
    t = torch.full((50,), 17)
    zt = diffuse(p.schedule, z, t, make_gen(1))
    clean, eps = p.denoise(zt, t)
    assert_close(clean, z)
    assert_close(p.schedule.coefficient("abar", t, z) * clean + p.schedule.coefficient("sbar", t, z) * eps, zt)
    assert_close(p.sample(4, eta=0.0, gen=make_gen(2)), z0.expand(4, 3), rtol=0, atol=1e-9)


def test_terms_interface():
    p = small(n_symbols=4)
    z = torch.randn(64, 3, generator=make_gen(0, "z")).requires_grad_()
    q = DiagGaussian(z, torch.zeros_like(z))
    y = torch.arange(64) % 4
    a, b = (p.terms(q, z, make_gen(1), y) for _ in range(2))
    assert a["score"].shape == (64,) and set(a) == {"score", "kl_base"}
    assert_close(a["score"], b["score"], rtol=0, atol=0)
    assert_close(a["kl_base"], StandardNormal(3).terms(q, z)["kl_base"])
    a["score"].mean().backward()
    assert z.grad is None, "the simple loss must not train an encoder"
    w = torch.tensor([0.0, 1.0, 2.0, 1.0])
    c = p.terms(q, z, make_gen(1), y, w)["score"]
    assert_close(c, b["score"] * w[y])
    hidden = p.terms(q, z, make_gen(1), torch.full((64,), -1), w)["score"]
    assert (hidden > 0).all()
    with pytest.raises(ValueError, match="without classes"):
        small().terms(None, z, labels=y)


def test_labels_are_dropped_at_the_stated_rate():
    seen = []

    class Spy(sp.ScoreNet):
        def forward(self, z, t, y=None):
            seen.append(y)
            return super().forward(z, t, y)

    cfg = sp.ScorePriorCfg(n_levels=30, hidden=8, n_blocks=0, drop=0.25, draws=2)
    p = sp.ScorePrior(Spy(2, 30, 8, 0, 3, make_gen(0)), cfg)
    p.terms(None, torch.zeros(2000, 2), make_gen(1), torch.ones(2000, dtype=torch.long))
    share = (seen[0] == -1).float().mean()
    assert set(seen[0].tolist()) == {-1, 1} and abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_weights_come_from_the_generator():
    a, b = small(), small()
    torch.manual_seed(123)
    c = small()
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters()):
        assert torch.equal(x, y) and torch.equal(x, z)
    state = torch.get_rng_state()
    a.sample(3, gen=make_gen(0))
    a.terms(None, torch.zeros(4, 3), make_gen(0))
    assert torch.equal(state, torch.get_rng_state()), "sampling and training use the given generator alone"


def test_sample_chunks_path_and_errors():
    p = small(n_symbols=2)
    assert p.sample(10, gen=make_gen(0), chunk=4).shape == (10, 3)
    path = p.sample(10, gen=make_gen(0), n_steps=5, path=True, chunk=4)
    assert path.shape == (6, 10, 3)
    assert_close(path[0], p.sample(10, gen=make_gen(0), n_steps=5, chunk=4), rtol=0, atol=0)
    assert_close(
        p.sample(6, y=1, gen=make_gen(1)),
        p.sample(6, y=torch.ones(6, dtype=torch.long), gen=make_gen(1)),
        rtol=0,
        atol=0,
    )
    for bad in (2, -1):
        with pytest.raises(ValueError, match="0..1"):
            p.sample(3, y=bad)
    with pytest.raises(ValueError, match="without classes"):
        small().sample(3, y=0)
    with pytest.raises(ValueError, match="at least 1"):
        p.sample(0)
    with pytest.raises(ValueError, match="levels"):
        sp.ScorePrior(sp.ScoreNet(2, 10), sp.ScorePriorCfg(n_levels=20))


def test_guidance_extrapolates():
    p = small(n_symbols=2)
    nn.init.normal_(p.net.out.weight, generator=make_gen(3))
    z, t, y = torch.randn(5, 3, generator=make_gen(4)), torch.full((5,), 7), torch.tensor([0, 1, 0, 1, 1])
    cond, free, two = (p.denoise(z, t, *o)[1] for o in ((y, 0.0), (None, 0.0), (y, 2.0)))
    assert_close(two, cond + 2 * (cond - free))
    assert not torch.allclose(cond, free)


def test_average_follows_and_survives_saving(tmp_path):
    p = small(ema=0.9)
    assert p.sampler_net is p.net
    with torch.no_grad():
        for w in p.net.parameters():
            w.fill_(1.0)
    p.before_step()
    assert p.sampler_net is p.average
    with torch.no_grad():
        for w in p.net.parameters():
            w.fill_(2.0)
    for _ in range(200):
        p.before_step()
    for w in p.average.parameters():
        assert_close(w, torch.full_like(w, 2.0), rtol=1e-3, atol=0)
    assert all(not w.requires_grad for w in p.average.parameters())
    save_tensors(tmp_path / "p.safetensors", p.state_dict())
    q = small(ema=0.9)
    q.load_state_dict(load_tensors(tmp_path / "p.safetensors")[0])
    assert_close(q.sample(4, gen=make_gen(0)), p.sample(4, gen=make_gen(0)), rtol=0, atol=0)
    assert small(ema=0.0).average is None


def test_learns_a_mixture():
    "Two modes in the plane, a second of training: far closer to the data than N(0, I), and both modes are there"

    def draw(n, gen):
        return (2 * torch.randint(2, (n, 1), generator=gen) - 1) * torch.tensor([0.9, 0.9]) + 0.3 * torch.randn(
            n, 2, generator=gen
        )

    p = small(2, hidden=32, n_levels=50, ema=0.98)
    g, data = make_gen(0, "train"), draw(2000, make_gen(0, "data"))
    opt = torch.optim.Adam(p.net.parameters(), lr=1e-2)
    for i in range(250):
        opt.param_groups[0]["lr"] = 1e-2 * (1 - i / 250)
        p.before_step()
        loss = p.terms(None, data[torch.randint(2000, (128,), generator=g)], g)["score"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    fresh, normal = draw(1000, make_gen(1)), torch.randn(1000, 2, generator=make_gen(2))
    for kw in (dict(), dict(n_steps=15, eta=0.0)):
        z = p.sample(1000, gen=make_gen(3), **kw)
        assert mmd2(z, fresh) < 0.15 * mmd2(normal, fresh)
        assert 0.4 < (z.sum(1) > 0).float().mean() < 0.6


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_norm_of_the_expected_noise_by_hand(predict):
    "For N(0, I) the expected noise at `z_t` is `sbar z_t`, of mean square `sbar^2 (abar^2 z^2 + sbar^2)`"
    cfg = sp.ScorePriorCfg(n_levels=40, predict=predict)
    prior = sp.ScorePrior(GaussianScore(torch.zeros(3), torch.eye(3), cfg), cfg)
    z = torch.tensor([0.0, 1.0, 4.0])[:, None].expand(3, 3).repeat_interleave(4000, 0)
    got = score_norm(prior, z, n=4, gen=make_gen(0)).view(3, 4000).mean(1)
    levels = torch.tensor([40, 30, 20, 10])
    abar, sbar = (x[levels].float() for x in (prior.schedule.abar, prior.schedule.sbar))
    want = (sbar**2 * (abar**2 * torch.tensor([[0.0], [1.0], [16.0]]) + sbar**2)).mean(1)
    assert_close(got, want, rtol=0.03, atol=0.01)
