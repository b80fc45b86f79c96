"Priors and tilts whose every consequence is known"

import math

import torch

from ldebm.annealing import model_level
from ldebm.energy import Frozen
from ldebm.exact import QuadraticEnergy
from ldebm.langevin import Conditional
from ldebm.levels import PriorCfg
from ldebm.prior import DiffusionEBM
from ldebm.schedule import consistent_schedule

F64 = torch.float64
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
    energy = quadratic(T, d, strength, seed) if strength else zero_energy(T, d)
    return DiffusionEBM(consistent_schedule(T), energy, PriorCfg(reference=reference))


def level_of(energy, m, v):
    "The tilt of `N(m, v)` by level 0 of an energy, or by a function of states"
    frozen = Frozen(energy) if isinstance(energy, QuadraticEnergy) else energy
    t = torch.zeros(len(m), dtype=torch.long)
    return Conditional(frozen, t, m, v, temperature=torch.ones_like(v))


def exact_log_z(p, z, t):
    level = model_level(p, z, t)
    return p.energy.tilt(level.mean, float(level.variance[0]), t)[2]
