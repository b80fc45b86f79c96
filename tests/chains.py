"Chains of small networks, for tests of what runs them, and a count of what was called"

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from ldebm.energy import EnergyNet, fast_energy
from ldebm.whole_chains import Sizes

# Columns of a block of the kernel for GPUs: 2, 3 and 3; inputs in even and odd numbers of four; one symbol, and more
# than threads in a warp
SMALL = [Sizes(6, 24, 5, 2), Sizes(5, 36, 1, 0), Sizes(3, 40, 37, 1)]
PUBLISHED = Sizes(40, 200, 20, 12)


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
    d, H, K, N = sizes[:4]
    net = EnergyNet(d, K, 3, hidden=H, n_blocks=N, context_dim=context, spectral=False, init=0.3, gen=gen(1)).to(
        device, dtype
    )
    with torch.no_grad():
        net.head.weight.mul_(steep)
    return fast_energy(net)


def problem(sizes, B, n, context=0, device="cpu", dtype=torch.float32):
    "Arguments of chains, normal and uniform noise"
    g, d = gen(2), sizes.d

    def of(*shape):
        return torch.randn(*shape, generator=g).to(device, dtype)

    args = dict(
        z=of(B, d),
        t=(torch.arange(B) % 3).to(device),
        m=of(B, d),
        v=of(B, 1).abs() + 0.1,
        tau=of(B, 1).abs() + 0.3,
        y=None,
        context=of(B, context) if context else None,
    )
    return args, of(n, B, d), torch.rand(n, B, generator=g).to(device, dtype)
