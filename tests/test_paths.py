"`paths`: densities against change of variables, weights against exact likelihoods"

import pytest
import torch
from gaussians import F64, REFERENCES, exact_log_z, gen, log_N, prior, randn, zero_energy

from ldebm.annealing import log_variance
from ldebm.levels import PriorCfg
from ldebm.linear_gaussian import LinearGaussian
from ldebm.paths import Paths, Proposal, fit_proposal
from ldebm.posterior import DiagGaussian
from ldebm.prior import DiffusionEBM
from ldebm.schedule import consistent_schedule
from ldebm.stats import log_mean_exp

pytestmark = pytest.mark.usefixtures("in_test")


def test_flat_jacobian():
    p = DiffusionEBM(consistent_schedule(6), zero_energy(6, 40), PriorCfg(reference="flat"))
    q = DiagGaussian(randn(3, 40, g=gen()), torch.zeros(3, 40, dtype=F64))
    P = Paths(p, q, lambda z, i: 0 * z[:, 0])
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
    P = Paths(p, q, lambda z, i: 0 * z[:, 0])
    if better:
        P.better = {
            t: Proposal(
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
    m = LinearGaussian(3, 2, n_x=3, scale=0.5, strength=0.5, reference=reference, seed=1)
    x = m.sample(2)
    q = m.posterior(x)
    q = DiagGaussian(q.mean, q.logvar + 0.3)  # wider than the posterior
    P = Paths(m.prior, q, m.log_lik(x))
    P.rough_log_z = lambda zs, t: exact_log_z(m.prior, zs[t + 1], t)[None]
    P.top = exact_log_z(m.prior, torch.zeros(1, 2, dtype=F64), 2).item()
    i = torch.arange(2).repeat(20_000)
    w = P.log_weight(randn(40_000, 6, g=gen()), i).detach().view(-1, 2)
    assert ((-log_mean_exp(w) - m.nll(x)).abs() < 5 * log_variance(w).sqrt() + 1e-3).all() and (
        log_variance(w) < 0.05
    ).all()


def test_rough_log_z_is_unbiased():
    p, q = prior(2, 3, seed=2), DiagGaussian(torch.zeros(1, 3, dtype=F64), torch.zeros(1, 3, dtype=F64))
    P = Paths(p, q, lambda z, i: 0 * z[:, 0], n_z=20_000, gen=gen())
    P.proposals[0] = Proposal(
        0.2 * randn(3, g=gen(1)),
        0.1 * randn(3, 3, g=gen(2)),
        torch.eye(3, dtype=F64)
        * p.tilted_gaussian(torch.zeros(1, 3, dtype=F64), torch.zeros(1, dtype=torch.long))[1].sqrt().item(),
    )
    z = randn(5, 3, g=gen(3))
    w = P.rough_log_z([z, z], 0)
    assert ((log_mean_exp(w) - exact_log_z(p, z, 0)).abs() < 5 * log_variance(w).sqrt() + 1e-3).all()


def test_fitted_proposal():
    g, n = gen(), 20_000
    x = randn(n, 2, g=g)
    G = torch.tensor([[1.0, 0.0, 0.5], [0.0, -2.0, 0.0]], dtype=F64)
    b = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    C = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.1]], dtype=F64)
    o = fit_proposal(x, b + x @ G + randn(n, 3, g=g) @ torch.linalg.cholesky(C).T, 1.0, wide=1.0)
    torch.testing.assert_close(o.G, G, rtol=0, atol=0.05)
    torch.testing.assert_close(o.b, b, rtol=0, atol=0.05)
    torch.testing.assert_close(o.L @ o.L.T, C, rtol=0.05, atol=0.05)
    assert all(v.is_contiguous() for v in o)  # as read back from a file, so that a resumed run rounds alike
    few = fit_proposal(x[:2], randn(2, 3, g=g), 0.5)  # fewer draws than dimensions: still a proposal
    assert torch.linalg.eigvalsh(few.L @ few.L.T).min() > 0.2
