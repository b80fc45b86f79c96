"`published`: the released formulas by hand, and how far off they are"

import math

import pytest
import torch
from gaussians import F64, gen, prior, randn, zero_energy

from ldebm.levels import PriorCfg
from ldebm.linear_gaussian import LinearGaussian
from ldebm.posterior import DiagGaussian
from ldebm.prior import DiffusionEBM
from ldebm.published import nll_ldebm, nll_svebm
from ldebm.schedule import published_schedule

pytestmark = pytest.mark.usefixtures("in_test")


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
    assert nll_svebm(ll, F, z, q, chunk, density).tolist() == pytest.approx(want)


def test_svebm_errors():
    z, q = torch.zeros(5, 1, 2), DiagGaussian(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="5 draws do not fill chunks of 2"):
        nll_svebm(torch.zeros(5, 1), torch.zeros(5, 1), z, q, 2)
    with pytest.raises(ValueError, match="density"):
        nll_svebm(torch.zeros(5, 1), torch.zeros(5, 1), z, q, 5, "wrong")


def published_prior(T, d):
    return DiffusionEBM(
        published_schedule(T), zero_energy(T, d), PriorCfg(objective="published", reference="flat", mala=False)
    )


def test_ldebm_errors():
    q, ll = DiagGaussian(torch.zeros(1, 2, dtype=F64), torch.zeros(1, 2, dtype=F64)), lambda z, i: 0 * z[:, 0]
    with pytest.raises(ValueError, match="a_0 < 1"):
        nll_ldebm(prior(2, 2), q, ll)
    with pytest.raises(ValueError, match="150 draws do not fill chunks of 100"):
        nll_ldebm(published_prior(2, 2), q, ll, draws=150)


def test_ldebm_is_off_by_what_its_formula_says():
    "At one level and zero energy the published log Z has the width of q(z_0|z) instead of the prior's"
    m = LinearGaussian(1, 40, scale=0.1, strength=0.0, reference="flat", seed=2)
    x, s = m.sample(20), published_schedule(1)
    got = nll_ldebm(published_prior(1, 40), m.posterior(x), m.log_lik(x), gen=gen())
    off = (got - m.nll(x)).mean().item()
    assert off == pytest.approx(-40 * (s.sigma[1] / s.sbar[0]).log().item(), abs=6) and off < -100
    assert torch.equal(got, nll_ldebm(published_prior(1, 40), m.posterior(x), m.log_lik(x), gen=gen()))
