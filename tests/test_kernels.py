"Fast paths against plain PyTorch: products, loss, recurrent layer, gradient of the energy, chains, a whole training"

import copy
import itertools
import math
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from chains import NO_RUNNERS, PUBLISHED, counted_calls
from plain import PlainEnergy, backwards, plain_gru, plain_logits, plain_loss, plain_paths, plain_product
from torch import nn
from torch.nn import functional as nnf
from torch.nn.utils.rnn import pack_padded_sequence

from ldebm import core, graphs, kernels, native, text_kernels, whole_chains
from ldebm.closed_form import closed_form_grad
from ldebm.corpora import load_corpus
from ldebm.energy import EnergyNet, Frozen, energy_grad
from ldebm.kernels import fast_linear, has_onednn, product, whole
from ldebm.langevin import Conditional, chain, preconditioned, unadjusted
from ldebm.layers import gru, gru_both, linear, linear_cross_entropy, packing
from ldebm.records import Run
from ldebm.registry import RUNNERS
from ldebm.text import batches
from ldebm.text_kernels import fast_gru_both, one_direction, packed_gru, sliced_cross_entropy
from ldebm.text_settings import TextJob, resolve, train_cfg
from ldebm.text_task import TextTask
from ldebm.train import fit

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
# Both libraries; on a PyTorch without oneDNN its cases are skipped, and counted by pytest
BACKENDS = [
    "blas",
    *(
        pytest.param(k, marks=pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN"))
        for k in ("onednn", "both")
    ),
]
WAYS = [*BACKENDS, "compiled"]  # Of an energy
# Largest relative error. Double precision: rounding alone. Single: sums of a few hundred terms. bfloat16 keeps eight
# bits, 2^-9 a rounding: a result a handful of roundings deep is right to one or two in a hundred, a gradient to a few
TOL = {F64: 1e-12, F32: 3e-6, BF16: 3e-2}


pytestmark = pytest.mark.usefixtures("in_test")


def gen(seed):
    return torch.Generator().manual_seed(seed)


def randn(*size, dtype=F64, seed=0):
    return torch.randn(*size, generator=gen(seed), dtype=F64).to(dtype)


@contextmanager
def using(backend, dtype=F32, known=True):
    """Products by this library

    Or `compiled`: energies as compiled code, where the machine has what it takes; where the energy is `known` nothing
    else"""
    one = backend == "compiled"
    if one and not any(RUNNERS.values()):
        pytest.skip(NO_RUNNERS)
    if one and (why := native.why_not(PUBLISHED, torch.zeros(1, PUBLISHED.d, dtype=dtype))):
        pytest.skip(why)
    with (
        patch.dict(os.environ, LDEBM_RESIDENT=str(int(one))),
        nullcontext() if one else patch.object(kernels, "matmul_backend", lambda: backend),
        counted_calls((native, "gradient_native"), (whole_chains, "run_chains")) as calls,
    ):
        yield
    assert bool(calls) == (one and known)


def error(got, want):
    "Largest difference, relative to the largest entry"
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


def close(got, want, tol, what=""):
    assert (e := error(got, want)) < tol, f"{what}: relative error {e:.1e}, {tol:.1e} allowed"


# -- which library


def test_wrong_library_is_an_error(monkeypatch):
    monkeypatch.setenv("LDEBM_MATMUL", "mkl")
    with pytest.raises(ValueError, match="LDEBM_MATMUL must be 'onednn', 'blas' or 'both', got 'mkl'"):
        kernels.matmul_backend.__wrapped__()
    cmd = [
        sys.executable,
        "-c",
        "import torch; from ldebm.kernels import product; product(torch.ones(2, 3), torch.ones(4, 3))",
    ]
    res = subprocess.run(cmd, capture_output=True, text=True, env={**os.environ, "LDEBM_MATMUL": "fast"})
    assert res.returncode != 0 and "LDEBM_MATMUL must be" in res.stderr.splitlines()[-1]


def test_library_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("LDEBM_MATMUL", "onednn")
    monkeypatch.setattr(kernels, "has_onednn", lambda: False)
    with pytest.raises(ValueError, match="without oneDNN"):
        kernels.matmul_backend.__wrapped__()


@pytest.mark.parametrize(
    "vendor,machine,there,capability,family,want",
    [
        ("AuthenticAMD", "x86_64", True, "AVX512", "26", "onednn"),
        ("AuthenticAMD", "x86_64", True, "AVX512", "25", "both"),
        ("AuthenticAMD", "x86_64", True, "AVX512", "", "onednn"),
        ("HygonGenuine", "x86_64", True, "AVX512", "24", "onednn"),
        ("AuthenticAMD", "x86_64", True, "AVX2", "25", "both"),
        ("AuthenticAMD", "x86_64", True, "DEFAULT", "25", "both"),
        ("GenuineIntel", "x86_64", True, "AVX512", "6", "blas"),
        ("", "x86_64", True, "AVX512", "", "blas"),
        ("AuthenticAMD", "aarch64", True, "DEFAULT", "25", "blas"),
        ("AuthenticAMD", "x86_64", False, "AVX2", "25", "blas"),
    ],
)
def test_library_by_processor(monkeypatch, vendor, machine, there, capability, family, want):
    monkeypatch.delenv("LDEBM_MATMUL", raising=False)
    monkeypatch.setattr(kernels, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(kernels, "has_onednn", lambda: there)
    monkeypatch.setattr(kernels.platform, "machine", lambda: machine)
    monkeypatch.setattr(kernels.torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(kernels, "cpu_info", lambda field: dict([("cpu family", family)])[field])
    assert kernels.matmul_backend.__wrapped__() == want


def test_wide_products_alone_go_to_onednn_under_both():
    x, small, wide = (
        randn(3, 5, dtype=F32),
        randn(kernels.wide_from() - 1, 5, dtype=F32),
        randn(kernels.wide_from(), 5, dtype=F32),
    )
    with using("both"):
        assert (
            not kernels.direct(x, small) and kernels.direct(x, wide) and not kernels.direct(x.double(), wide.double())
        )
    with using("onednn"):
        assert kernels.direct(x, small) and kernels.direct(x, wide)
    with using("blas"):
        assert not kernels.direct(x, wide)


@pytest.mark.parametrize(
    "info,want",
    [
        ("flags\t\t: fpu avx2 avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("model name : x avx512_bf16\n", False),
    ],
)
def test_half_precision_by_what_the_processor_says(monkeypatch, tmp_path, info, want):
    (tmp_path / "cpuinfo").write_text(info)
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda f, *a, **k: real(tmp_path / "cpuinfo" if f == "/proc/cpuinfo" else f, *a, **k)
    )
    monkeypatch.setattr(core, "cpu_info", core.cpu_info.__wrapped__)
    assert core.has_bf16() == want
    assert core.fast_precision("bf16", "cpu") == ("bf16" if want else "no")
    assert core.fast_precision("fp16", "cpu") == "fp16" and core.fast_precision("bf16", "cuda") == "bf16"


# -- products


def views(x):
    "The same matrix as it may lie in memory"
    n, m = x.shape
    big = x.new_zeros(n + 3, m + 5)
    big[1 : n + 1, 2 : m + 2] = x
    wide = x.new_zeros(n, 3 * m + 1)
    wide[:, 1 : m + 1] = x
    steps = x.new_zeros(n, 2 * m)
    steps[:, ::2] = x
    return dict(
        rows=x.clone(),
        columns=x.T.contiguous().T,
        part=big[1 : n + 1, 2 : m + 2],
        columns_of_wider=wide[:, 1 : m + 1],
        every_second=steps[:, ::2],
        part_turned=big.T.contiguous().T[1 : n + 1, 2 : m + 2],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_product_of_any_view(backend, dtype):
    for n, i, o in ((5, 7, 3), (1, 7, 3), (1, 1, 1), (4, 1, 6), (3, 33, 65)):
        x, w, b, add = (randn(*s, seed=k, dtype=dtype) for k, s in enumerate(((n, i), (o, i), (o,), (n, o))))
        for (kx, vx), (kw, vw) in itertools.product(views(x).items(), views(w).items()):
            with using(backend):
                for vb, va in ((None, None), (b, None), (None, add), (b, views(add)["part"])):
                    want = plain_product(
                        vx.double(),
                        vw.double(),
                        None if vb is None else vb.double(),
                        None if va is None else va.double(),
                    )
                    before = None if va is None else va.clone()
                    close(product(vx, vw, vb, va), want, TOL[dtype], f"{kx} {kw} {n}x{i}x{o}")
                    if va is not None:
                        assert torch.equal(va, before), "`add` was changed"


@pytest.mark.parametrize("backend", BACKENDS)
def test_product_of_no_rows(backend):
    with using(backend):
        assert product(torch.zeros(0, 5), torch.ones(3, 5), torch.ones(3), torch.zeros(0, 3)).shape == (0, 3)


def test_whole_leaves_what_fills_its_memory():
    x = torch.randn(6, 8, generator=gen(0))
    assert whole(x).data_ptr() == x.data_ptr() and whole(x.T).data_ptr() == x.data_ptr()
    assert whole(x[1:4]).data_ptr() == x[1:4].data_ptr(), "some of its rows do"
    for part in (x[:, :4], x.T[:3], x[:, 2:][1:3], x[:, :1]):
        assert (
            whole(part).is_contiguous() and torch.equal(whole(part), part) and whole(part).data_ptr() != part.data_ptr()
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("n,i,o", [(1, 5, 3), (6, 1, 4), (9, 40, 20)])
def test_linear(backend, dtype, n, i, o):
    "Values, and gradients to any subset of the inputs, for any layout of inputs and of the gradient that comes in"
    xs, g = (
        [randn(*s, seed=k, dtype=dtype) for k, s in enumerate(((n, i), (o, i), (o,)))],
        randn(n, o, seed=9, dtype=dtype),
    )
    for need in itertools.product((False, True), repeat=3):
        for kind in ("rows", "part", "columns", "every_second"):
            leaves = [[v.clone().requires_grad_(r) for v, r in zip(xs, need)] for _ in range(2)]
            with using(backend):
                got = fast_linear(views_of(leaves[0][0], kind), views_of(leaves[0][1], kind), leaves[0][2])
                want = nnf.linear(*(v.double() for v in leaves[1]))
                close(got, want, TOL[dtype])
                if any(need):
                    got.backward(views(g)[kind])
                    want.backward(g.double())
            for a, b, r in zip(*leaves, need):
                assert (a.grad is not None) == r
                if r:
                    close(a.grad, b.grad, TOL[dtype], kind)
    with using(backend):
        assert linear(xs[0], xs[1]).dtype == dtype
        close(linear(*xs), fast_linear(*xs), TOL[dtype], "whoever is asked")


def views_of(x, kind):
    "A leaf as a view of another layout, with the gradient going through"
    n, m = x.shape
    if kind == "columns":
        return x.T.clone().T
    if kind == "part":
        return nnf.pad(x, (2, 3, 1, 2))[1 : n + 1, 2 : m + 2]
    if kind == "every_second":
        return torch.stack([x, x], 2).flatten(1)[:, ::2]
    return x


def test_linear_of_more_dimensions_and_none():
    x, w = randn(2, 3, 5, dtype=F32), randn(4, 5, dtype=F32)
    with using("onednn" if has_onednn() else "blas"):
        close(linear(x, w), nnf.linear(x.double(), w.double()), TOL[F32])
        with torch.no_grad():
            assert not linear(x[0], w.requires_grad_()).requires_grad
        assert not linear(x[0], w.detach()).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_decides_the_precision(backend):
    x, w, b = randn(5, 7, dtype=F32), randn(3, 7, dtype=F32, seed=1).requires_grad_(), randn(3, dtype=F32, seed=2)
    with using(backend), torch.autocast("cpu", dtype=BF16):
        y = linear(x, w, b)
    assert y.dtype == BF16
    close(y, nnf.linear(x.double(), w.double(), b.double()), TOL[BF16])
    y.float().sum().backward()
    assert w.grad.dtype == F32


# -- the loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("n,i,V,rows", [(1, 4, 7, 256), (13, 8, 31, 4), (8, 8, 31, 8), (9, 1, 3, 2)])
def test_loss(backend, dtype, n, i, V, rows):
    "Values and gradients with a different weight for every row, among them zero; targets that repeat"
    h, w = 2 * randn(n, i, dtype=dtype), randn(V, i, seed=1, dtype=dtype)
    target = torch.randint(max(1, V // 2), (n,), generator=gen(2))
    g = randn(n, seed=3, dtype=F32 if dtype == BF16 else dtype)
    g[0] = 0 if n > 1 else g[0]
    for need in itertools.product((False, True), repeat=2):
        for kind in ("rows", "part", "columns"):
            (a, b), (c, d) = [[v.clone().requires_grad_(r) for v, r in zip((h, w), need)] for _ in range(2)]
            with using(backend):
                got = sliced_cross_entropy(views_of(a, kind), b, target, n_rows=rows)
                want = plain_loss(c.double(), d.double(), target)
                assert got.dtype == (F32 if dtype == BF16 else dtype)
                close(got, want, TOL[dtype])
                if any(need):
                    got.backward(g)
                    want.backward(g.double())
            for x, y, r in ((a, c, need[0]), (b, d, need[1])):
                assert (x.grad is not None) == r
                if r:
                    close(x.grad, y.grad, TOL[dtype], f"{kind} {need}")
    with torch.no_grad():
        close(sliced_cross_entropy(h, w, target, n_rows=rows), plain_loss(h.double(), w.double(), target), TOL[dtype])


def test_loss_of_large_logits():
    "Logits that would overflow an exponential"
    h, w, t = 300 * randn(6, 4, dtype=F32), randn(9, 4, dtype=F32, seed=1), torch.arange(6)
    want = plain_loss(h.double(), w.double(), t)
    for f in (sliced_cross_entropy, linear_cross_entropy):
        got = f(h, w, t)
        assert got.isfinite().all() and want.max() > 200
        close(got, want, TOL[F32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_under_autocast(backend):
    h, w, t = randn(13, 8, dtype=F32), randn(31, 8, dtype=F32, seed=1), torch.arange(13)
    (a, b), (c, d) = [[v.clone().requires_grad_() for v in (h, w)] for _ in range(2)]
    g = randn(13, seed=3, dtype=F32)
    with using(backend), torch.autocast("cpu", dtype=BF16):
        got = sliced_cross_entropy(a, b, t, n_rows=4)
    got.backward(g)
    plain_loss(c.double(), d.double(), t).backward(g.double())
    assert got.dtype == F32 and a.grad.dtype == b.grad.dtype == F32
    close(got, plain_loss(h.double(), w.double(), t), TOL[BF16])
    close(a.grad, c.grad, TOL[BF16])
    close(b.grad, d.grad, TOL[BF16])


# -- the recurrent layer

LENGTHS = dict(
    one_word=[1], words=[1, 1, 1], one_sentence=[6], equal=[4, 4, 4], unsorted=[3, 7, 1, 4, 1], sorted=[5, 3, 3, 1]
)


def grads(f, xs, need, gs, **kw):
    "Outputs of `f`, and gradients of the inputs that need one"
    xs = [None if x is None else x.clone().requires_grad_(r) for x, r in zip(xs, need)]
    out = f(*xs)
    if any(r and x is not None for x, r in zip(xs, need)):
        torch.autograd.backward(out, [g.to(o.dtype) for g, o in zip(gs, out)])
    return [o.detach() for o in out], [None if x is None else x.grad for x in xs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gru(backend, dtype, lengths):
    """States, last states, and gradients to words, first states, constant inputs and weights

    With and without constant inputs"""
    B, i, j, H = len(lengths), 5, 3, 4
    p = packing(torch.tensor(lengths))
    N = len(p.row)
    for extra, reverse, need_x, need_w in (
        (False, False, 1, 1),
        (True, False, 1, 1),
        (False, True, 1, 1),
        (True, True, 1, 1),
        (True, False, 0, 1),
        (True, False, 1, 0),
        (False, False, 0, 0),
    ):
        rnn = nn.GRU(i + j * extra, H, batch_first=True, bidirectional=reverse).to(dtype)
        for k, q in enumerate(rnn.parameters()):
            q.data.copy_(randn(*q.shape, seed=k))
            q.requires_grad_(bool(need_w))
        xs = [
            randn(N, i, seed=20, dtype=dtype),
            randn(B, H, seed=21, dtype=dtype),
            randn(B, j, seed=22, dtype=dtype) if extra else None,
        ]
        gs, need, res = (randn(N, H, seed=30), randn(B, H, seed=31)), [bool(need_x)] * 3, []
        for f, net, to in (
            (one_direction, rnn, dtype),
            (plain_gru, nn.GRU(i + j * extra, H, batch_first=True, bidirectional=reverse).double(), F64),
        ):
            if net is not rnn:
                net.load_state_dict(rnn.state_dict())
                [q.requires_grad_(bool(need_w)) for q in net.parameters()]
            with using(backend):
                out, gx = (
                    grads(
                        lambda x, h, e, f=f, net=net, reverse=reverse: f(net, p.pack(x), h, e, reverse),
                        [None if x is None else x.to(to) for x in xs],
                        need,
                        gs,
                    )
                    if need_x or need_w
                    else (
                        [
                            o.detach()
                            for o in f(
                                net,
                                p.pack(xs[0].to(to)),
                                xs[1].to(to),
                                None if xs[2] is None else xs[2].to(to),
                                reverse,
                            )
                        ],
                        [None] * 3,
                    )
                )
            if need_w and not need_x:
                for q in net.parameters():
                    q.grad = None
                with using(backend):
                    o = f(net, p.pack(xs[0].to(to)), xs[1].to(to), None if xs[2] is None else xs[2].to(to), reverse)
                torch.autograd.backward(o, [g.to(v.dtype) for g, v in zip(gs, o)])
            res.append((out, gx, [q.grad for q in net.parameters()]))
        for what, a, b in zip(("states", "inputs", "weights"), *res):
            for k, (x, y) in enumerate(zip(a, b)):
                if what != "states" and y is None:
                    assert x is None, f"{what} {k}: a gradient that nobody asked for"
                    continue
                close(x, y, 4 * TOL[dtype], f"{what} {k} {extra=} {reverse=}")
        assert any(g is not None for g in res[0][2]) == bool(need_w)


def test_gru_with_one_output_used():
    "The loss may look at all states or at the last ones alone"
    p, rnn = packing(torch.tensor([3, 1, 5])), nn.GRU(4, 3).double()
    for k, q in enumerate(rnn.parameters()):
        q.data.copy_(randn(*q.shape, seed=k))
    x, h = randn(9, 4), randn(3, 3, seed=1)
    for which in (0, 1):
        got = torch.autograd.grad(
            one_direction(rnn, p.pack(x.requires_grad_()), h.requires_grad_())[which].square().sum(),
            [x, h, *rnn.parameters()],
        )
        want = torch.autograd.grad(plain_gru(rnn, p.pack(x), h)[which].square().sum(), [x, h, *rnn.parameters()])
        for a, b in zip(got, want):
            close(a, b, TOL[F64])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_two_directions_as_pytorch_packs_them(lengths):
    "Both directions over the reading order of `packing` against a bidirectional `nn.GRU` over padded sentences"
    B, i, H = len(lengths), 5, 4
    n = torch.tensor(lengths)
    p = packing(n)
    rnn = nn.GRU(i, H, batch_first=True, bidirectional=True).double()
    pad = randn(B, max(lengths), i)
    x = pad[p.row, p.col]
    want, last = rnn(pack_padded_sequence(pad, n, batch_first=True, enforce_sorted=False))
    ahead, end = one_direction(rnn, p.pack(x), torch.zeros(B, H, dtype=F64))
    turned = backwards(p)
    assert torch.equal(text_kernels.backwards(p.sizes), turned)
    back, first = one_direction(rnn, p.pack(x[turned]), torch.zeros(B, H, dtype=F64), reverse=True)
    close(torch.cat([ahead, back[turned]], 1), want.data, TOL[F64])
    to = p.order.argsort()
    close(torch.stack([end[to], first[to]]), last, TOL[F64])


def test_gru_under_autocast():
    p, rnn = packing(torch.tensor([3, 7, 1, 4])), nn.GRU(6, 8)
    for k, q in enumerate(rnn.parameters()):
        q.data.copy_(0.3 * randn(*q.shape, seed=k))
    ref = nn.GRU(6, 8).double()
    ref.load_state_dict(rnn.state_dict())
    x, h, e, gs = (
        randn(15, 4, dtype=F32),
        randn(4, 8, seed=1, dtype=F32),
        randn(4, 2, seed=2, dtype=F32),
        (randn(15, 8, seed=3), randn(4, 8, seed=4)),
    )

    def half(x, h, e):
        with torch.autocast("cpu", dtype=BF16):
            return one_direction(rnn, p.pack(x), h, e)

    out, gx = grads(half, (x, h, e), [True] * 3, gs)
    want, wx = grads(lambda x, h, e: plain_gru(ref, p.pack(x), h, e), [v.double() for v in (x, h, e)], [True] * 3, gs)
    assert out[0].dtype == BF16 and all(g.dtype == F32 for g in gx)
    for a, b in zip(out + gx + [q.grad for q in rnn.parameters()], want + wx + [q.grad for q in ref.parameters()]):
        close(a, b, 2 * TOL[BF16])


@pytest.mark.parametrize("half", [False, True])
def test_gru_of_other_devices(half, monkeypatch):
    """PyTorch's own kernel, as GPUs run it, in the precision of autocast

    As in training wherever gradients are wanted, because cuDNN differentiates nothing else: also in a model that
    evaluates (the likelihood differentiates one in its latents)"""
    p, rnn, seen, real = (
        packing(torch.tensor([3, 7, 1, 4])),
        nn.GRU(6, 8).eval().requires_grad_(False),
        [],
        torch._VF.gru,
    )
    for k, q in enumerate(rnn.parameters()):
        q.data.copy_(0.3 * randn(*q.shape, seed=k))
    x, h, e, gs = (
        randn(15, 4, dtype=F32),
        randn(4, 8, seed=1, dtype=F32),
        randn(4, 2, seed=2, dtype=F32),
        (randn(15, 8, seed=3), randn(4, 8, seed=4)),
    )
    monkeypatch.setattr(
        torch._VF,
        "gru",
        lambda data, sizes, h0, ws, *rest: (
            seen.append((rest[3], data.dtype, h0.dtype, ws[0].dtype, torch.is_autocast_enabled("cpu")))
            or real(data, sizes, h0, ws, *rest)
        ),
    )

    def run(x, h, e):
        with torch.autocast("cpu", dtype=BF16, enabled=half):
            return packed_gru(rnn, p.pack(x), h, e)

    out, gx = grads(run, (x, h, e), [True] * 3, gs)
    with torch.no_grad():
        run(x, h, e)
    dtype = BF16 if half else F32
    assert (
        seen == [(True, dtype, dtype, dtype, False), (False, dtype, dtype, dtype, False)]
        and out[0].dtype == dtype
        and all(g.dtype == F32 for g in gx)
    )
    want, wx = grads(lambda x, h, e: one_direction(rnn, p.pack(x), h, e), (x, h, e), [True] * 3, gs)
    for a, b in zip(out + gx, want + wx):
        close(a, b, 4 * TOL[dtype])


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_gru_both(device):
    "Both directions in one call of PyTorch's own kernel, with gradients, against one after the other"
    p, rnn = packing(torch.tensor([3, 7, 1, 4])), nn.GRU(5, 8, bidirectional=True).double()
    for k, q in enumerate(rnn.parameters()):
        q.data.copy_(0.3 * randn(*q.shape, seed=k))
    x, gs = randn(15, 5), (randn(15, 16, seed=3), randn(4, 16, seed=4))

    def two(net, x):
        turn = backwards(p)
        ahead, end = one_direction(net, x, x.data.new_zeros(4, 8))
        back, start = one_direction(net, p.pack(x.data[turn]), x.data.new_zeros(4, 8), reverse=True)
        return torch.cat([ahead, back[turn]], 1), torch.cat([end, start], 1)

    found = []
    for f, where in ((gru_both.plain, "cpu"), (fast_gru_both, device), (two, "cpu")):
        net, y = copy.deepcopy(rnn).to(where), x.to(where, copy=True).requires_grad_()
        out = f(net, p.pack(y))
        loss = sum((a * g.to(where)).sum() for a, g in zip(out, gs, strict=True))
        slopes = torch.autograd.grad(loss, [y, *net.parameters()])
        found.append([v.detach().cpu() for v in (*out, *slopes)])
    for want, *others in zip(*found, strict=True):
        for got in others:
            close(got, want, TOL[F64])


def test_gru_of_two_layers_is_an_error():
    with pytest.raises(ValueError, match="one layer"):
        gru(nn.GRU(3, 2, num_layers=2), packing(torch.tensor([2])).pack(torch.zeros(2, 3)), torch.zeros(1, 2))


# -- derivatives by finite differences


def test_gradcheck():
    x, w, b = (randn(*s, seed=k).requires_grad_() for k, s in enumerate(((5, 4), (3, 4), (3,))))
    assert torch.autograd.gradcheck(kernels._Linear.apply, (x, w, b))
    assert torch.autograd.gradcheck(
        lambda h, v: text_kernels._LinearCrossEntropy.apply(h, v, torch.tensor([2, 0, 2, 1, 0]), 2), (x, w)
    )
    p = packing(torch.tensor([2, 4, 1]))
    sizes = p.sizes.tolist()
    gi, h0, extra, u, c = (
        randn(*s, seed=k).requires_grad_() for k, s in enumerate(((7, 6), (3, 2), (3, 6), (6, 2), (6,)))
    )
    assert torch.autograd.gradcheck(lambda *a: text_kernels._GRU.apply(*a, sizes), (gi, h0, extra, u, c))
    assert torch.autograd.gradcheck(
        lambda gi, h0, u, c: text_kernels._GRU.apply(gi, h0, None, u, c, sizes), (gi, h0, u, c)
    )


def test_second_derivatives_are_an_error():
    "First derivatives only: asking for more says so, and does not give a wrong number"
    x, w = randn(3, 4).requires_grad_(), randn(2, 4, seed=1).requires_grad_()
    g = torch.autograd.grad(kernels._Linear.apply(x, w, None).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# -- the energy's gradient


def network(dtype=F64, context_dim=0, groups=None, symbol_temperature=1.0, **kw):
    "Published sizes"
    net = EnergyNet(40, 20, 6, 200, 12, context_dim=context_dim, gen=gen(0), **kw).to(dtype)
    net.groups, net.symbol_temperature = groups, symbol_temperature
    return net


CASES = dict(
    free={},
    symbol=dict(ask="symbol"),
    groups=dict(groups=(8, 12)),
    mask=dict(ask="mask", groups=(8, 12)),
    warm=dict(ask="mask", symbol_temperature=0.7),
    context=dict(context_dim=9),
    context_symbol=dict(context_dim=9, ask="symbol"),
    unnormalised=dict(spectral=False),
    published=dict(init=0.1),
    free_head=dict(free_head=True),
)


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_energy_gradient(backend, dtype, case):
    kw = dict(case)
    ask = kw.pop("ask", None)
    net, B = network(dtype, **kw), 33
    z, t = 2 * randn(B, 40, dtype=dtype), torch.arange(B) % 6
    context = randn(B, 9, seed=2, dtype=dtype) if kw.get("context_dim") else None
    mask = torch.rand(B, 20, generator=gen(3)) < 0.5
    mask[:, 0] = mask[:, 19] = True
    y = dict(symbol=torch.arange(B) % 20, mask=mask).get(ask)
    run = energy_grad if backend == "compiled" else closed_form_grad
    with using(backend, dtype, ask != "mask" and not net.groups and net.symbol_temperature == 1):
        frozen = Frozen(net)
        got = [run(frozen, z, t, y, context) for _ in range(2)]  # the second time with what the first has kept
    F, g = PlainEnergy(net).grad(z, t, y, context)
    assert g.abs().max() > 1e-4, "the test sees a gradient"
    for Fx, gx in got:
        close(Fx, F, 1e-10 if dtype == F64 else 1e-5)
        close(gx, g, 1e-10 if dtype == F64 else 1e-5)
        assert Fx.dtype == gx.dtype == dtype and not gx.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context_dim", [0, 9])
def test_energy_of_a_training_step(backend, context_dim):
    "`logits` through shared weights, with gradients to every parameter, against layer by layer"
    net = network(F32, context_dim)
    z, t = randn(12, 40, dtype=F32), torch.arange(12) % 6
    ref = network(F64, context_dim)
    c, g = randn(12, 9, seed=2, dtype=F32) if context_dim else None, randn(12, 20, seed=3, dtype=F32)
    with using(backend):
        got = net.logits(z, t, c, net.weights())
        got.backward(g)
    want = plain_logits(ref, z.double(), t, None if c is None else c.double())
    want.backward(g.double())
    close(got, want, 1e-5)
    for (k, a), b in zip(net.named_parameters(), ref.parameters()):
        close(a.grad, b.grad, 1e-4, k)


def test_layers_of_one_shape_together():
    "Spectral norms, weights and their gradients as layer by layer; a free head is left alone"
    one, many = network(free_head=True), network(free_head=True)
    one.power_iterate(3)
    groups = graphs.of_one_shape(many.layers())
    assert [len(ms) for ms in groups] == [1, 15, 1] and not any(many.head in ms for ms in groups)
    for ms in groups:
        graphs.iterate_together(ms, 3)
    for a, b in zip(one.layers(), many.layers()):
        close(b.u, a.u, 1e-11)
        close(b.v, a.v, 1e-11)
    sum((m.normalised() ** 3).sum() for m in one.layers() if m.norm).backward()
    sum((w**3).sum() for ms in groups for w in graphs.normalise_together(ms)).backward()
    for a, b in zip(one.layers(), many.layers()):
        if a.norm:
            close(b.weight.grad, a.weight.grad, 1e-10)


# -- chains

# A chain multiplies an early difference by at most (1 + s^2 L/2) a step, L the slope of the gradient; these settings
# hardly expand, so the end is as far apart as its steps' roundings: a few 1e-16 each in double precision. In single
# precision 1e-7 each, and now and then a leaky ReLU's argument so near to zero that its sign differs between paths.
CHAIN_TOL = {F64: 1e-12, F32: 2e-5}


def run_chain(kind, energy, dtype):
    B = 24
    z, t = randn(B, 40, dtype=dtype, seed=5), torch.arange(B) % 6
    m, v, y = randn(B, 40, dtype=dtype, seed=6), 0.2 + 0.1 * (t[:, None] % 3).to(dtype), torch.arange(B) % 20
    noise = gen(7)

    def draw(x, g):
        return torch.randn(x.shape, generator=noise, dtype=F64).to(x.dtype)  # the same noise in every precision

    def run(temperature, make, metropolis=False, y=None):
        level = Conditional(energy, t, m, v, torch.as_tensor(temperature, dtype=dtype).expand_as(v), y=y)
        return chain(level, make(level), z, 20, metropolis=metropolis, gen=gen(8))

    with patch("ldebm.langevin.randn_like", draw), patch("ldebm.whole_chains.randn_like", draw):
        if kind == "unadjusted":
            return run(0.1 * v, partial(unadjusted, size2=0.1 * v), y=y)[0]
        if kind == "preconditioned":
            return run(1.0, partial(preconditioned, rho=0.8), y=y)[0]
        if kind == "short drifts":
            return run(0.05, partial(preconditioned, rho=0.8, longest=0.5))[0]
        out, accept = run(0.02, partial(preconditioned, rho=0.8), metropolis=True)
        assert 0.05 < accept.mean() < 0.999, "some moves are refused, so that a wrong acceptance would show"
        return out


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize(
    "kind,dtype",
    [
        ("unadjusted", F64),
        ("preconditioned", F64),
        ("short drifts", F64),
        ("mala", F64),
        ("unadjusted", F32),
        ("preconditioned", F32),
        ("short drifts", F32),
    ],
)
def test_chain_ends_at_the_same_point(backend, kind, dtype):
    "No MALA in single precision: one acceptance within rounding of its draw, and a chain goes elsewhere"
    net = network(dtype)
    want = run_chain(kind, PlainEnergy(net), dtype)
    with using(backend, dtype):
        got = run_chain(kind, Frozen(net), dtype)
    close(got, want, CHAIN_TOL[dtype], f"{kind} {backend}")
    assert error(want, randn(24, 40, seed=5)) > 0.1, "the chain moved"


# -- a whole training run

SMALL = (
    "embed=24 hidden=24 d=6 energy_hidden=16 n_blocks=2 langevin_steps=4 T=3 n_symbols=5 batch=32 dropout=.2 "
    "word_dropout=.2 w_cls=1 max_len=16 checkpoint_every=100"
)


def train(folder, objective, seed=0, settings=SMALL, steps=20, dtype=F64, log_every=1, **kw):
    "The real task and the real loop; clusters are made in the first epoch"
    own = " cls_start=0 w_sym=.3" if objective == "consistent" else ""
    s = resolve(
        TextJob(objective=objective, seed=seed, steps=steps, settings=settings + own if dtype == F64 else settings)
    )
    task = TextTask(load_corpus("grammar", max_len=s.max_len), s, seed)
    task.model.to(dtype)
    run = Run(folder, dict(seed=seed))
    seen = []
    start, task.start_epoch = task.start_epoch, lambda *a: seen.append(start(*a)) or seen[-1]
    at = fit(task, run, replace(train_cfg(s), log_every=log_every, **kw), seed)
    assert at.step == steps
    return (
        task,
        [o for o in run.log_lines() if o["kind"] == "train"],
        seen,
        [o for o in run.log_lines() if o["kind"] == "valid"],
    )


@pytest.mark.parametrize(
    "objective,extra",
    [
        ("consistent", ""),
        ("consistent", " enc_share=.5 reference=flat mala=False"),
        ("published", ""),
        ("published", " packed=True bucket=True"),
    ],
)
@pytest.mark.parametrize("backend", ["blas", "compiled"])
def test_training_equals_plain_training(tmp_path, objective, extra, backend):
    "Twenty steps in double precision: terms, norms of gradients, cluster labels and parameters"
    with using(backend, F64):
        task, lines, seen, valid = train(tmp_path / "fast", objective, settings=SMALL + extra)
    with plain_paths():
        other, plain, plainly, invalid = train(tmp_path / "plain", objective, settings=SMALL + extra)
    assert len(lines) == 20 and {"nll", "ebm", "cls", "sym", "mi", "kl_base"} <= set(lines[-1])
    assert seen[0] is not None and torch.equal(seen[0]["labels"], plainly[0]["labels"])
    for a, b in zip(lines, plain, strict=True):
        assert a.keys() == b.keys()
        for k in a.keys() - {"kind"}:  # the loop adds up its loss in single precision
            assert abs(a[k] - b[k]) <= (1e-6 if k == "loss" else 1e-8) * max(abs(b[k]), 1e-3), (
                f"{k} at step {a['step']}: {a[k]} and {b[k]}"
            )
    start = TextTask(task.corpus, task.settings, 0).model
    for (k, p), q, o in zip(task.model.named_parameters(), other.model.parameters(), start.parameters(), strict=True):
        assert p.dtype == F64
        assert (p - q).norm() <= 1e-8 * q.norm(), f"{k}: {((p - q).norm() / q.norm()).item():.1e}"
        assert not torch.equal(p.float(), o), f"{k} did not move"


@pytest.mark.parametrize("objective", ["consistent", "published"])
def test_terms_keep_double_precision(objective):
    s = resolve(TextJob(objective=objective, settings=SMALL))
    c = load_corpus("grammar", max_len=s.max_len)
    task = TextTask(c, s, 0)
    task.model.double().train()
    b = next(iter(batches(c["train"], 32, gen=gen(0), pad_to=s.max_len)))
    terms = task.model(b, gen(1), labels=torch.zeros(32, dtype=torch.long), label_weights=torch.ones(s.n_symbols))
    assert {k: v.dtype for k, v in terms.items()} == dict.fromkeys(terms, F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_equals_plain_generation(backend):
    "The same words, greedily and sampled, in double precision"
    s = resolve(TextJob(settings=SMALL))
    c = load_corpus("grammar", max_len=s.max_len)
    m = TextTask(c, s, 0).model.double().eval()
    z = randn(9, 6)
    for kw in ({}, dict(temperature=1.0), dict(temperature=0.8, top_p=0.9)):
        with using(backend):
            got = m.decoder.generate(z, max_len=12, gen=gen(1), **kw)
        with plain_paths():
            want = m.decoder.generate(z, max_len=12, gen=gen(1), **kw)
        assert torch.equal(got, want)
    h, ids = m.decoder.first(z, 9), m.decoder.generate(z, max_len=6)  # and word by word by PyTorch's own layer
    word = torch.full((9,), c.vocab.bos)
    for k in range(ids.shape[1]):
        _, h = m.decoder.rnn(torch.cat([m.decoder.embed(word), z], 1)[:, None], h[None])
        h = h[0]
        word = (h @ m.decoder.embed.weight.T).argmax(1)
        assert torch.equal(ids[:, k][ids[:, k] != 0], word[ids[:, k] != 0])


# -- half precision


@pytest.mark.slow
@pytest.mark.skipif(not core.has_bf16(), reason="this processor does not multiply in bfloat16")
def test_half_precision_trains_as_well(tmp_path):
    """The validation loss after a short training in bf16 lies within what seeds do to it in single precision

    Widened by their spread"""
    kw = dict(
        objective="consistent",
        settings="batch=32 max_len=16 langevin_steps=5 hidden=64 embed=64",
        steps=120,
        dtype=F32,
        log_every=20,
    )
    ends = {
        p: [train(tmp_path / f"{p}{k}", seed=k, mixed_precision=p, **kw)[3][-1]["recon_nll"] for k in range(3)]
        for p in ("no", "bf16")
    }
    lo, hi = min(ends["no"]), max(ends["no"])
    spread = hi - lo
    mean = {p: sum(v) / 3 for p, v in ends.items()}
    assert all(math.isfinite(v) for v in ends["bf16"]) and ends["bf16"] != ends["no"]
    assert (
        abs(mean["bf16"] - mean["no"]) <= spread
        and lo - spread <= min(ends["bf16"])
        and max(ends["bf16"]) <= hi + spread
    ), ends


def test_loss_memory_is_never_shared_by_two_graphs():
    "Two losses alive at once have their own memory; a second backward of one whose memory went on is refused"
    g = gen(0)
    data = [
        (
            torch.randn(9, 4, generator=g, requires_grad=True),
            torch.randn(6, 4, generator=g, requires_grad=True),
            torch.randint(6, (9,), generator=g),
        )
        for _ in range(2)
    ]
    sliced_cross_entropy(*data[0]).sum().backward()  # leaves memory behind
    for h, w, _ in data:
        h.grad = w.grad = None
    losses = [sliced_cross_entropy(*d).sum() for d in data]
    for loss in losses:
        loss.backward(retain_graph=True)
    for h, w, t in data:
        want = torch.autograd.grad(plain_loss(h, w, t).sum(), (h, w))
        for a, b in zip((h.grad, w.grad), want):
            torch.testing.assert_close(a, b)
    sliced_cross_entropy(*data[0]).sum().backward()  # takes the memory
    refused = 0
    for loss in losses:
        try:
            loss.backward(retain_graph=True)
        except RuntimeError as e:
            assert "modified by an inplace operation" in str(e)
            refused += 1
    assert refused == 1
