"Chains of small networks, for tests of what runs them, and a count of what was called"

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch

from ldebm.energy import EnergyNet, Frozen
from ldebm.langevin import Conditional, first_bad, preconditioned, unadjusted, updates
from ldebm.registry import RUNNERS, plainly
from ldebm.whole_chains import Arrays, Sizes, coefficients, merged_share, packed, run_chains, sizes_of

# Columns of a block of the kernel for GPUs: 2, 3 and 3; inputs in even and odd numbers of four; one symbol, and more
# than threads in a warp
SMALL = [Sizes(6, 24, 5, 2), Sizes(5, 36, 1, 0), Sizes(3, 40, 37, 1)]
PUBLISHED = Sizes(40, 200, 20, 12)

NO_RUNNERS = "LDEBM_RUNNERS=0: no runner is asked"
with_runners = pytest.mark.skipif(not any(RUNNERS.values()), reason=NO_RUNNERS)


@contextmanager
def counted_calls(*ways):
    "Gives a list that grows by one at every call of a function inside, each named by `(module, name)`"
    calls = []

    def counting(f):
        return lambda *args, **kw: calls.append(1) or f(*args, **kw)

    with ExitStack() as open_:
        for where, name in ways:
            open_.enter_context(patch.object(where, name, counting(getattr(where, name))))
        yield calls


def gen(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def energy(sizes, context=0, steep=1.0, device="cpu", dtype=torch.float32):
    "A frozen network of this shape; nothing is normalised, so its weights are the network's own"
    d, H, K, N = sizes[:4]
    net = EnergyNet(d, K, 3, hidden=H, n_blocks=N, context_dim=context, spectral=False, init=0.3, gen=gen(1))
    net.to(device, dtype)
    with torch.no_grad():
        net.head.weight.mul_(steep)
    return Frozen(net)


def tame(e):
    "The same energy with weights of wide layers smaller, so that rounding does not grow on the way"
    net = e.energy
    with torch.no_grad():
        for layer in (net.z1, net.z2, *net.blocks):
            layer.weight.div_(max(1.0, len(layer.weight) / 24))
    return Frozen(net)


def problem(e, B, n):
    "What `B` chains sample, their first states, and normal and uniform noise of `n` updates"
    g, net, like = gen(2), e.energy, e.weights.merge_z

    def of(*shape):
        return torch.randn(*shape, generator=g).to(like)

    z, t, mean = of(B, net.d), (torch.arange(B) % 3).to(like.device), of(B, net.d)
    variance, temperature = of(B, 1).abs() + 0.1, of(B, 1).abs() + 0.3
    context = of(B, net.context_dim) if net.context_dim else None
    level = Conditional(e, t, mean, variance, temperature, context=context)
    return level, z, of(n, B, net.d), torch.rand(n, B, generator=g).to(like)


def step_of(level, rho=0.8, **drift):
    "A step exact for the Gaussian part; with `rho=None` one of a tenth of its variance"
    return unadjusted(level, 0.1 * level.variance) if rho is None else preconditioned(level, rho, **drift)


def plain_updates(level, step, z, noise, uniform=None):
    "States, summed acceptance and first bad update, by the definitions"
    with torch.no_grad(), plainly():
        return updates(
            level, step, z, len(noise), noise.__getitem__, uniform if uniform is None else uniform.__getitem__
        )


def whole_updates(launch, level, step, z, noise, uniform=None, **kwargs):
    "The same by compiled code, all updates at once"
    e = level.energy
    share = merged_share(e, level.t, level.context, len(z), z.dtype)
    arrays = Arrays(packed(e), share, z, level.mean, coefficients(level, step, z), noise, uniform)
    out, seen, slope, total = run_chains(sizes_of(e), arrays, launch, step.longest, **kwargs)
    if uniform is None:  # the end is looked at by its states
        seen, slope = torch.cat([seen, out.sum(-1)[None]]), torch.cat([slope, slope.new_zeros(1, len(z))])
        total = torch.zeros_like(total)
    return out, total, first_bad(seen, slope, uniform is not None)
