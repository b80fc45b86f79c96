"""The same model by PyTorch's own layers and autograd: what the fast paths must agree with

Benchmarks compare them with it"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.nn import functional as nnf
from torch.nn.utils.rnn import PackedSequence

from ldebm import kernels
from ldebm.energy import EnergyNet, energy_grad
from ldebm.registry import plainly


def plain_logits(net, z, t, context=None, weights=None):
    """Logits of an `EnergyNet` layer by layer

    Every weight is divided by its spectral norm and the level embedded at every call"""

    def act(x):
        return nnf.leaky_relu(x, net.slope)

    parts = [act(net.z2(act(net.z1(z)))), act(net.t2(act(net.t1(net.table[t]))))]
    if net.context_dim:
        parts.insert(1, act(net.c2(act(net.c1(context)))))
    h = net.merge(torch.cat(parts, 1))
    for b in net.blocks:
        h = h + b(act(h))
    return net.head(act(h))


class PlainEnergy:
    "What a sampler wants of an energy, with nothing kept between calls and the gradient by autograd"

    def __init__(self, net, weights=None):
        self.net = net

    def __call__(self, z, t, y=None, context=None):
        if not isinstance(self.net, EnergyNet):
            return self.net(z, t, y, context)
        return self.net.free(plain_logits(self.net, z, t, context), y)

    def grad(self, z, t, y=None, context=None):
        return energy_grad.plain(self.__call__, z, t, y, context)


def plain_gru(rnn, x, h0, extra=None, reverse=False):
    "One direction of `torch.nn.GRU` over packed sentences, inputs side by side"
    if extra is not None:
        x = PackedSequence(
            torch.cat([x.data, torch.cat([extra[:n] for n in x.batch_sizes.tolist()])], 1), x.batch_sizes
        )
    if reverse or rnn.bidirectional:  # one direction of two
        one = torch.nn.GRU(rnn.input_size, rnn.hidden_size, device="meta")
        names = [n for n, _ in one.named_parameters()]
        own = {n: getattr(rnn, n + ("_reverse" if reverse else "")) for n in names}
        out, last = torch.func.functional_call(one, own, (x, h0[None]))
    else:
        out, last = rnn(x, h0[None])
    return out.data, last[0]


def backwards(p):
    "For each word of a `Packing` the place of the word of its sentence that is as far from the end"
    words = list(zip(p.row.tolist(), p.col.tolist()))
    length = p.row.bincount().tolist()
    return torch.tensor([words.index((row, length[row] - 1 - col)) for row, col in words])


def plain_loss(h, w, target, rows=0):
    return nnf.cross_entropy(nnf.linear(h, w), target, reduction="none")


def plain_product(x, w, b=None, add=None):
    return nnf.linear(x, w, b) if add is None else nnf.linear(x, w, b) + add


@contextmanager
def plain_paths():
    "Inside, every fast path is its plain counterpart; noise is drawn in the same order"
    with ExitStack() as stack:
        stack.enter_context(plainly())
        stack.enter_context(patch.object(EnergyNet, "logits", plain_logits))
        stack.enter_context(patch.object(kernels, "matmul_backend", lambda: "blas"))
        yield
