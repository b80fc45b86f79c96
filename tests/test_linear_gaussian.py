"`linear_gaussian`: closed forms against draws"

import pytest
import torch
from gaussians import F64, REFERENCES, gen, randn

from ldebm.annealing import log_variance
from ldebm.linear_gaussian import LinearGaussian
from ldebm.posterior import DiagGaussian
from ldebm.stats import log_mean_exp

pytestmark = pytest.mark.usefixtures("in_test")


@pytest.mark.parametrize("reference", REFERENCES)
def test_linear_gaussian(reference):
    m = LinearGaussian(3, 2, n_x=2, scale=0.7, strength=1.0, reference=reference, seed=4)
    z = torch.zeros(100_000, 2, dtype=F64)
    for t in reversed(range(3)):
        lev = torch.full((len(z),), t)
        mean, cov, _ = m.prior.energy.tilt(
            m.prior.tilted_gaussian(z, lev)[0], float(m.prior.tilted_gaussian(z[:1], lev[:1])[1]), t
        )
        z = ((mean + randn(*z.shape, g=gen(t)) @ torch.linalg.cholesky(cov).T) / m.prior.scale(lev, z)).detach()
    assert ((z.mean(0) - m.mean).abs() < 5 * (m.cov.diagonal() / len(z)).sqrt()).all()
    assert (
        (torch.cov(z.T) - m.cov).abs() < 5 * ((m.cov.diagonal()[:, None] * m.cov.diagonal() + m.cov**2) / len(z)).sqrt()
    ).all()
    x = m.sample(3)
    w = torch.stack([m.log_lik(x)(z, torch.full((len(z),), k)) for k in range(3)], 1)
    assert ((-log_mean_exp(w) - m.nll(x)).abs() < 5 * log_variance(w).sqrt() + 1e-3).all()
    q = m.posterior(x)
    zq = q.mean[:1] + (0.5 * q.logvar[:1]).exp() * randn(50_000, 2, g=gen(8))
    kl = DiagGaussian(q.mean[:1], q.logvar[:1]).log_prob(zq) - torch.distributions.MultivariateNormal(
        m.mean, m.cov
    ).log_prob(zq)
    assert abs(kl.mean() - m.rate(q)[0]) < 5 * kl.std() / 50_000**0.5


def test_zero_strength_is_the_reference():
    m = LinearGaussian(4, 3, strength=0.0)
    torch.testing.assert_close(m.cov, torch.eye(3, dtype=F64))
    torch.testing.assert_close(m.mean, torch.zeros(3, dtype=F64))
