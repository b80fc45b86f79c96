"""Agreement with the peer library ebmkit, which trains and measures energies in the space of the data

Skipped where it is not installed: pip install --no-deps --target folder ebmkit, and the folder on PYTHONPATH."""

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from ldebm.annealing import AISCfg, bracket
from ldebm.core import make_gen
from ldebm.energy import EnergyNet, Frozen
from ldebm.exact import QuadraticEnergy
from ldebm.langevin import Conditional, log_normal

ebm = pytest.importorskip("ebm", reason="ebmkit is not installed")
F64 = torch.float64


@pytest.fixture
def seeded():
    "ebmkit draws from the global generator"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def tilted(mean, variance, scale):
    "A random energy over two dimensions, of which a Gaussian is tilted"
    net = EnergyNet(2, 1, 1, hidden=32, n_blocks=1, spectral=False, init=scale, gen=make_gen(0)).to(F64)
    frozen = Frozen(net.requires_grad_(False))
    ones = torch.ones(1, 2, dtype=F64)
    return Conditional(frozen, torch.zeros(1, dtype=torch.long), mean * ones, variance * ones, ones[:, :1])


@pytest.mark.parametrize("mean,variance,scale", [(0.0, 1.0, 0.5), (1.0, 4.0, 0.5)])
def test_log_z_between_bounds(mean, variance, scale, seeded):
    "Annealing there and back by both libraries, and the integral over a grid"
    level = tilted(mean, variance, scale)

    def tilt(x):
        return level.energy(x, torch.zeros(len(x), dtype=torch.long))

    side = torch.linspace(-15, 15, 601, dtype=F64) + mean
    grid = torch.cartesian_prod(side, side)
    log_density = log_normal(grid, torch.full_like(grid, mean), variance)
    exact = (tilt(grid) + log_density).logsumexp(0).item() + 2 * torch.log(side[1] - side[0]).item()
    assert exact - (tilt(grid) * log_density.softmax(0)).sum() > 0.4  # of which plain averages know nothing

    ours = bracket(level, AISCfg(chains=2048), make_gen(1))
    base = Independent(Normal(level.mean[0], level.variance[0].sqrt()), 1)
    how = dict(base=base, n_temps=100, sampler=ebm.HMC(step_size=0.3, leapfrog_steps=5, steps=1))

    def energy(x):
        return -tilt(x) - base.log_prob(x)

    lower = ebm.ais_log_z(energy, (2,), n_chains=1024, **how)
    upper = ebm.reverse_ais_log_z(energy, lower.samples, **how)
    found = dict(ours=(ours.lower.item(), ours.upper.item()), theirs=(lower.log_z, upper.log_z))
    for who, bounds in found.items():
        assert all(abs(bound - exact) < 0.05 for bound in bounds), (who, bounds, exact)


class Peer(nn.Module):
    "Our energy as theirs: low is likely, and a noise level instead of `t`"

    def __init__(self, energy):
        super().__init__()
        self.energy = energy

    def forward(self, x, sigma):
        return -self.energy(x, torch.zeros(len(x), dtype=torch.long))


def test_gradients_of_the_recovery_likelihood(seeded):
    "The same quadratic energy: exact gradient, our chains, and theirs"
    A = torch.tensor([[[2.0, 0.5], [0.5, 1.0]]], dtype=F64)
    energy = QuadraticEnergy(A, torch.tensor([[0.4, -0.3]], dtype=F64))
    sigmas, n = torch.tensor([1.0, 0.5], dtype=F64), 20_000
    variance = (sigmas[0] ** 2 - sigmas[1] ** 2).item()
    gen = make_gen(2)
    x = torch.randn(n, 2, generator=gen, dtype=F64)
    clean = x + sigmas[1] * torch.randn(n, 2, generator=gen, dtype=F64)
    noisy = clean + variance**0.5 * torch.randn(n, 2, generator=gen, dtype=F64)
    t, ones = torch.zeros(n, dtype=torch.long), torch.ones(n, 2, dtype=F64)

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [energy.A, energy.c])])

    exact = gradient((energy.tilt(noisy, variance, 0)[2] - energy(clean, t)).mean())
    level = Conditional(Frozen(energy), t, noisy, variance * ones, ones[:, :1])
    negative, _ = level.sample(gen=gen)
    ours = gradient((energy(negative.detach(), t) - energy(clean, t)).mean())
    theirs = gradient(ebm.DiffusionRecoveryLikelihood(sigmas, mcmc_steps=60, step_scale=0.1)(Peer(energy), x).loss)
    assert exact.abs().max() > 0.2
    assert (ours - exact).abs().max() < 0.05, (ours, exact)
    assert (theirs - exact).abs().max() < 0.05, (theirs, exact)
