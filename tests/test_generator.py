"The ladder of latents: its map T and the inverse, the posterior in u, likelihoods, the KL, and what stops bad sizes"

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf
from torch.testing import assert_close

from ldebm.core import Average
from ldebm.generator import Generator
from ldebm.generator_model import GeneratorModel, multiply_adds
from ldebm.generator_parts import (
    Block,
    Conv,
    Down,
    GeneratorCfg,
    Up,
    gaussian_nll,
    logistic_nll,
    logistic_parts,
    soft_bound,
)
from ldebm.images import ImageBatch

F64 = torch.float64

LADDERS = {
    2: dict(shape=(1, 8, 8), sizes=(1, 1), channels=(4, 3), widths=(16, 16), blocks=(1, 0)),
    "maps": dict(shape=(1, 8, 8), sizes=(4, 8), channels=(2, 1), widths=(8, 6), blocks=(1, 1)),
    5: dict(
        shape=(3, 8, 8),
        sizes=(1, 2, 4, 4, 8),
        channels=(4, 3, 2, 2, 1),
        widths=(16, 12, 8, 8, 6),
        blocks=(1, 0, 1, 1, 0),
        likelihood="logistic",
        mixtures=2,
    ),
    "cells": dict(
        shape=(3, 16, 16),
        sizes=(1, 2, 4),
        channels=(4, 2, 2),
        widths=(12, 10, 8),
        blocks=(1, 0, 1),
        cells=((8, 6, 1), (16, 4, 0)),
        likelihood="logistic",
    ),
    30: dict(
        shape=(1, 8, 8),
        sizes=(1,) * 10 + (4,) * 10 + (8,) * 10,
        channels=(3,) * 10 + (2,) * 10 + (1,) * 10,
        widths=(12,) * 10 + (8,) * 10 + (6,) * 10,
        blocks=(1, 0) * 15,
    ),
}


def gen(seed):
    return torch.Generator().manual_seed(seed)


def ladder(name, spread=1.0, dtype=torch.float32, seed=0, **kw):
    "A generator whose prior heads are `spread` times as large as at the start: scales that vary between samples"
    g = Generator(GeneratorCfg(**{**LADDERS[name], **kw}), gen(seed))
    with torch.no_grad():
        for m in g.prior:
            m.weight.mul_(spread)
    return g.to(dtype).requires_grad_(False)


def normal(n, d, seed, dtype=F64):
    return torch.randn(n, d, generator=gen(seed), dtype=F64).to(dtype)


def pictures(g, n, seed=0):
    c = g.cfg
    return (torch.randint(c.levels, (n, *c.shape), generator=gen(seed)) / (c.levels - 1)).to(g.start)


# -- the map and its inverse


@pytest.mark.parametrize("dtype,most", [(F64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("name", list(LADDERS))
def test_round_trip(name, spread, dtype, most):
    g = ladder(name, spread, dtype)
    u = 1.5 * normal(20, g.d, 1, dtype)
    z = g.T(u)
    assert [tuple(p.shape[1:]) for p in z] == [(c, s, s) for c, s in zip(g.cfg.channels, g.cfg.sizes)]
    assert (g.inverse(z) - u).abs().max() < most
    if spread > 1:  # or the check above could pass with scales of one
        scale = torch.cat([s.flatten() for s in scales(g, u)])
        assert scale.max() > 3 and scale.max() / scale.min() > 20 and (g.join_layers(z) - u).abs().max() > 1
    if dtype == F64:  # the other way round: any z has a u
        w = g.inverse([p + 0.1 for p in z])
        assert max((a - b - 0.1).abs().max() for a, b in zip(g.T(w), z)) < 1e-7


def scales(g, u):
    "`exp(log sigma)` of every layer but the top, by the prior heads' own outputs"
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, a, out: seen.append(soft_bound(out.chunk(2, 1)[1], g.cfg.bound_scale).exp()))
        for m in g.prior
    ]
    g.T(u)
    for h in hooks:
        h.remove()
    return seen


@pytest.mark.parametrize("name", [2, "maps", 5, "cells"])
def test_log_det_and_triangular_jacobian(name):
    "Against autograd: the determinant; and `u_i` moves `z_i` by its own scale alone, nothing above, and what is below"
    g = ladder(name, 10.0, F64)
    u = normal(1 if name == 5 else 3, g.d, 2)
    at = [0] + torch.tensor(g.cfg.dims).cumsum(0).tolist()
    for row in u:
        J = torch.autograd.functional.jacobian(lambda x: g.join_layers(g.T(x[None]))[0], row)
        sign, logdet = torch.linalg.slogdet(J)
        assert sign == 1
        assert_close(g.log_det(row[None])[0], logdet, atol=1e-9, rtol=1e-9)
        own = [torch.ones(g.cfg.dims[0], dtype=F64), *[s.flatten() for s in scales(g, row[None])]]
        assert (torch.cat(own).log().abs() > 0.2).any(), "scales near one show nothing"
        for i in range(g.L):
            rows = slice(at[i], at[i + 1])
            assert (J[rows, at[i + 1] :] == 0).all(), "a lower layer moves an upper one"
            assert_close(J[rows, rows], own[i].diag(), atol=1e-10, rtol=1e-10)
            if i:
                assert (J[rows, : at[i]] != 0).any(1).all(), "a layer that does not look up"
    assert (
        Generator(GeneratorCfg(sizes=(1,), channels=(3,), widths=(8,), blocks=(0,)), gen(0)).log_det(
            torch.randn(4, 3, generator=gen(0))
        )
        == 0
    ).all()


def test_features_and_contexts():
    "What the pixels and each layer are drawn from"
    g = ladder(5)
    u = normal(3, g.d, 0, torch.float32)
    z, h, hs = g.T(u, features=True, contexts=True)
    assert_close(g.pixels(h), g.pixels(g.T(u, features=True)[1]), rtol=0, atol=0)
    for i in range(1, g.L):
        m, s = g.prior[i - 1](nnf.silu(hs[i])).chunk(2, 1)
        want = soft_bound(m, g.cfg.bound) + soft_bound(s, g.cfg.bound_scale).exp() * g.split_layers(u)[i]
        assert_close(z[i], want)


def test_temperature():
    g = ladder(5, 10.0, F64)
    u = normal(4, g.d, 3)
    for a, b in zip(g.T(u, 0.6), g.T(0.6 * u)):
        assert_close(a, b)
    assert_close(g.decode(u, 0.0), g.decode(torch.zeros_like(u)))
    cold = g.sample(5, gen=gen(0), temperature=0.0)
    assert_close(cold, cold[:1].expand_as(cold))
    assert (g.sample(5, gen=gen(0)).std(0) > 1e-3).any()


# -- inference


@pytest.mark.parametrize("name", [2, 5, 30])
def test_encode_gives_the_draw_that_decode_uses(name):
    "The z that inference walks down with are T of the u it returns, bit for bit; u is mean plus noise"
    g = ladder(name, 10.0)
    x, seen = pictures(g, 6), []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(a[0])) for m in g.combine]
    q, u = g.encode(x, gen(5))
    z_inference, z_decode = seen[:], seen.clear()
    g.decode(u)
    z_decode = seen[:]
    for h in hooks:
        h.remove()
    assert len(z_inference) == len(z_decode) == g.L
    for a, b, c in zip(z_inference, z_decode, g.T(u)):
        assert torch.equal(a, b) and torch.equal(a, c)
    noise = gen(5)
    e = g.join_layers([torch.randn(6, c, s, s, generator=noise) for c, s in zip(g.cfg.channels, g.cfg.sizes)])
    assert_close(u, q.mean + (0.5 * q.logvar).exp() * e)
    assert_close(g.inverse(g.T(u)), u, atol=1e-4, rtol=0)
    q0, u0 = g.encode(x, mean=True)
    assert torch.equal(u0, q0.mean) and not torch.equal(u, u0)
    assert_close(g.nll(x, u), g.pixel_nll(x, g.pixels(g.T(u, features=True)[1])), rtol=0, atol=0)


def test_kl_is_that_of_the_sequential_posterior():
    "Closed form along the draw against the mean of `log q(u) - log N(u)`; other draws are told apart"
    g = ladder(5, 10.0, F64)
    with torch.no_grad():
        for m in g.post:
            m.weight.mul_(2)
    n = 3000
    x = pictures(g, 1).expand(n, -1, -1, -1)
    q, u = g.encode(x, gen(0))
    assert (q.mean.std(0)[g.layer_mask(g.L)] < 1e-9).all() and (q.mean.std(0)[g.layer_mask(1)] > 1e-3).any(), (
        "lower layers look at the draw above"
    )

    def far(u):
        gap = q.log_prob(u) + 0.5 * (u**2 + math.log(2 * math.pi)).sum(1) - q.kl_standard().sum(1)
        return abs(float(gap.mean() / (gap.std() / n**0.5)))

    assert far(u) < 5
    assert far(u.roll(1, 0)) > 5
    assert float(q.kl_standard().sum(1).mean()) > 5


# -- likelihoods


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_logistic_probabilities_sum_to_one(levels, M):
    C, n = 2, 40
    out = 4 * torch.randn(n, 3 * M * C, 1, 1, generator=gen(levels + M), dtype=F64)
    p = torch.zeros(n, C, dtype=F64)
    lw, m, s = logistic_parts(out, C, M)
    for k in range(levels):
        x = torch.full((n, C, 1, 1), k / (levels - 1), dtype=F64)
        one = torch.stack(
            [logistic_nll(x[:, :1], out.view(n, 3, M, C, 1, 1)[:, :, :, c].flatten(1, 2), levels, M) for c in range(C)],
            1,
        )
        assert_close(logistic_nll(x, out, levels, M), one.sum(1))  # channels are independent
        p += (-one).exp()

        # written out: the mass of a bin, whose outermost ones reach to infinity
        def edge(e):
            return torch.sigmoid((e - m) * (-s).exp())

        lo = 0.0 if k == 0 else edge((k - 0.5) / (levels - 1))
        hi = 1.0 if k == levels - 1 else edge((k + 0.5) / (levels - 1))
        assert_close((-one).exp(), (lw.exp() * (hi - lo)).sum(1)[:, :, 0, 0], atol=1e-9, rtol=1e-4)
    assert_close(p, torch.ones_like(p), atol=1e-9, rtol=0)


@pytest.mark.parametrize("levels", [17, 256])
def test_finite_gradients_far_out(levels):
    "Means and scales at either end, at every grey level, in single precision"
    ends = torch.cartesian_prod(*[torch.tensor([-60.0, -5.0, 0.0, 5.0, 60.0])] * 3)
    x = torch.arange(levels) / (levels - 1)
    out = ends[None].expand(levels, -1, -1).reshape(-1, 3, 1, 1).clone().requires_grad_()
    nll = logistic_nll(x.repeat_interleave(len(ends))[:, None, None, None], out, levels, 1)
    assert nll.isfinite().all() and (nll > -1e-3).all()
    (grad,) = torch.autograd.grad(nll.sum(), out)
    assert grad.isfinite().all()
    assert nll.max() > 300  # a narrow component far from the pixel: the tail is not cut off
    far = (
        torch.tensor([0.0, 1.0, -3.0]).view(1, 3, 1, 1).requires_grad_()
    )  # a pixel at 0 under a mean of .73 and a scale of exp(-5): still pulled
    assert torch.autograd.grad(logistic_nll(torch.zeros(1, 1, 1, 1), far, levels, 1).sum(), far)[0][0, 1] > 1


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("value", [1e4, -1e4, 1e30])
def test_no_output_of_the_head_makes_a_pixel_impossible(part, value):
    "One step of training that goes too far must not end it: the loss stays finite, however wild the head"
    out = torch.zeros(1, 3, 2, 1, 1, 1)
    out[:, part] = value
    for pixel in (0.0, 0.5, 1.0):
        assert torch.isfinite(logistic_nll(torch.full((1, 1, 1, 1), pixel), out.view(1, 6, 1, 1), 256, 2)).all()


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_gaussian_nll(sigma):
    x, out = torch.rand(5, 2, 3, 3, generator=gen(0), dtype=F64), torch.randn(5, 2, 3, 3, generator=gen(1), dtype=F64)
    want = -torch.distributions.Normal(out.sigmoid(), sigma).log_prob(x).flatten(1).sum(1)
    assert_close(gaussian_nll(x, out, sigma), want)


@pytest.mark.parametrize("name", [2, 5])
def test_decode_is_the_mean_picture(name):
    g = ladder(name, dtype=F64)
    u = normal(3, g.d, 0)
    x, out = g.decode(u), g.pixels(g.T(u, features=True)[1])
    assert x.shape == (3, *g.cfg.shape) and 0 <= x.min() <= x.max() <= 1
    if name == 2:
        return assert_close(x, out.sigmoid())
    w, m, _ = out.view(3, 3, 2, 3, 8, 8).unbind(1)
    assert_close(x, (w.softmax(1) * m.sigmoid()).sum(1))


# -- sampling with layers kept


@pytest.mark.parametrize("top", range(6))
def test_sample_keeps_the_layers_above(top):
    g = ladder(5)
    keep = normal(4, g.d, 7, torch.float32)
    fresh = torch.randn(4, g.d, generator=gen(8))
    mask = torch.cat([torch.full((n,), g.L - i > top) for i, n in enumerate(g.cfg.dims)])
    want = g.decode(torch.where(mask, keep, fresh))
    assert_close(g.sample(4, gen=gen(8), keep=keep, top=top), want, rtol=0, atol=0)
    if top == 0:
        assert torch.equal(want, g.decode(keep))
    if top == g.L:
        assert torch.equal(want, g.sample(4, gen=gen(8)))


def test_layer_mask():
    g = ladder(5)
    masks = torch.stack([g.layer_mask(k) for k in range(1, 6)])
    assert (masks.sum(0) == 1).all() and masks.sum(1).tolist() == list(reversed(g.cfg.dims))
    assert masks[4, : g.cfg.dims[0]].all() and masks[0, -g.cfg.dims[-1] :].all()
    assert torch.equal(g.layer_mask([1, 5]), masks[0] | masks[4]) and not g.layer_mask([]).any()
    for bad in (0, 6, [3, -1]):
        with pytest.raises(ValueError, match=r"no layer (0|6|-1): layers are numbered 1 \(bottom\) to 5 \(top\)"):
            g.layer_mask(bad)


def test_wrong_shapes():
    g = ladder(2)
    with pytest.raises(ValueError, match=r"takes pictures of shape \(1, 8, 8\), got \(3, 8, 8\)"):
        g.encode(torch.zeros(2, 3, 8, 8))
    for u in (torch.zeros(2, 6), torch.zeros(7)):
        with pytest.raises(ValueError, match=r"expected latents of shape \(B, 7\), got"):
            g.T(u)
    with pytest.raises(NotImplementedError, match="train a GeneratorModel"):
        g(None)


@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(sizes=(), channels=(), widths=(), blocks=()), "a generator needs at least one layer"),
        (dict(channels=(4,)), r"channels has 1 entries for 2 layers \(sizes=\(1, 1\)\)"),
        (dict(widths=(8, 8, 8)), "widths has 3 entries for 2 layers"),
        (dict(blocks=(1,)), "blocks has 1 entries for 2 layers"),
        (dict(channels=(4, 0)), r"channels must be positive, got \(4, 0\)"),
        (dict(widths=(-1, -1)), "widths must be positive"),
        (dict(sizes=(0, 1)), "sizes must be positive"),
        (dict(blocks=(1, -1)), r"blocks must not be negative, got \(1, -1\)"),
        (dict(enc_blocks=-1), "enc_blocks=-1"),
        (dict(sizes=(4, 6)), r"as large as the one above or a multiple of it, got sizes \(4, 6\)"),
        (dict(sizes=(4, 1)), "a multiple of it"),
        (dict(shape=(1, 8, 16)), "pictures must be square, got 8 x 16: crop them when loading"),
        (dict(sizes=(1, 3)), "features of side 3 do not divide pictures of side 8"),
        (dict(widths=(16, 8)), r"layers of equal size share their features: widths 16 and 8 at side 1 must be equal"),
        (dict(likelihood="poisson"), "likelihood must be 'gaussian' or 'logistic', got 'poisson'"),
        (dict(sigma=0.0), "sigma must be positive"),
        (dict(levels=1), "levels at least 2"),
        (dict(mixtures=0), "mixtures at least 1"),
    ],
)
def test_impossible_sizes(kw, says):
    with pytest.raises(ValueError, match=says):
        GeneratorCfg(**{**LADDERS[2], **kw})


# -- pieces


def test_conv_as_a_matrix_product():
    for kernel, side, pad in ((1, 1, 0), (4, 4, 0), (8, 8, 0), (1, 3, 0), (3, 3, 1)):
        m, x = Conv(3, 5, kernel, padding=pad).double(), torch.randn(2, 3, side, side, generator=gen(0), dtype=F64)
        assert_close(m(x), nnf.conv2d(x, m.weight, m.bias, padding=pad))


@pytest.mark.parametrize("a,b", [(1, 4), (2, 8), (4, 4), (1, 1)])
def test_up_and_down(a, b):
    assert Up(6, a, 5, b)(torch.zeros(2, 6, a, a)).shape == (2, 5, b, b) and Down(5, b, 6, a)(
        torch.zeros(2, 5, b, b)
    ).shape == (2, 6, a, a)
    assert Block(6, b)(torch.zeros(2, 6, b, b)).shape == (2, 6, b, b)


def test_multiply_adds_by_hand():
    g = Generator(GeneratorCfg(shape=(1, 8, 8), sizes=(1, 4), channels=(4, 2), widths=(16, 8), blocks=(1, 1)), gen(0))
    tower = 4 * 16 + 2 * 16 * 16 + 16 * 8 * 16 + 8 * 4 * 16 + 2 * 8 * 16  # combine, block, up, prior head, combine
    block, head = 2 * 8 * 8 * 9 * 16, 8 * 9 * 4 * 16
    assert multiply_adds(g) == dict(tower=tower, pixels=block + head)
    assert not any(m._forward_hooks for m in g.modules())


def test_cells_hold_no_latents_and_cost_the_map_nothing():
    with_cells, without = ladder("cells"), ladder("cells", cells=())
    assert with_cells.d == without.d
    tower, pixels = (multiply_adds(with_cells)[part] for part in ("tower", "pixels"))
    assert tower == multiply_adds(without)["tower"]
    up, block, narrow = 8 * 6 * 64, 2 * 6 * 6 * 9 * 64, 6 * 4 * 256  # 1x1 convolutions before the doubling
    above = 2 * 8 * 8 * 9 * 16  # the block under the bottom layer
    assert pixels == above + up // 4 + block + narrow // 4 + 4 * 9 * 9 * 256
    weights = with_cells.state_dict()
    without.load_state_dict(
        {k: v if "stem" in k or "head" in k else weights[k] for k, v in without.state_dict().items()}
    )
    u = normal(3, with_cells.d, 1, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(with_cells.T(u), without.T(u)))
    x = pictures(with_cells, 3)
    q, draw = with_cells.encode(x, gen(0))
    assert q.mean.shape == draw.shape == (3, with_cells.d) and with_cells.decode(draw).shape == x.shape


@pytest.mark.parametrize(
    "cells,says",
    [
        (((4, 6, 1),), r"sides of cells must be multiples of the side above them, got \[4, 4\]"),
        (((8, 6, 1), (12, 6, 1)), "sides of cells must be multiples"),
        (((8, 0, 1),), "cells need a positive width"),
        (((8, 6, -1),), "no negative number of blocks"),
        (((32, 6, 1),), "features of side 32 do not divide pictures of side 16"),
    ],
)
def test_impossible_cells(cells, says):
    with pytest.raises(ValueError, match=says):
        GeneratorCfg(**{**LADDERS["cells"], "cells": cells})


def test_in_half_precision_what_is_random_stays_in_full():
    g, x = ladder("cells"), pictures(ladder("cells"), 4)
    q, u = g.encode(x, gen(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, draw = g.encode(x, gen(0))
        nll = g.nll(x, u)
    assert half.mean.dtype == half.logvar.dtype == draw.dtype == nll.dtype == torch.float32
    assert 0 < (half.mean - q.mean).abs().max() < 0.1
    assert_close(nll, g.nll(x, u), rtol=0.01, atol=0)


def test_weights_come_from_the_generator_given():
    a, b, c = (Generator(GeneratorCfg(**LADDERS[5]), gen(s)).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


# -- training terms


def batch(g, n=16):
    return ImageBatch(pictures(g, n), torch.full((n, 0), -1), torch.arange(n))


def test_terms():
    g = ladder(5)
    b = batch(g)
    out = GeneratorModel(g)(b, gen(3))
    q, u = g.encode(b.x, gen(3))
    assert_close(out["nll"], g.nll(b.x, u))
    kl = q.kl_standard()
    assert_close(out["kl"], kl.sum(1))
    assert_close(out["kl_base"], kl.sum(1))
    for k in range(1, 6):
        assert_close(out[f"kl_{k}"], kl[:, g.layer_mask(k)].sum(1))


def test_free_nats():
    "A layer under its allowance costs the allowance and is not pushed; the others are as they were"
    g = ladder(5).requires_grad_(True)
    b = batch(g)
    plain = GeneratorModel(g)(b, gen(3))
    means = [float(plain[f"kl_{k}"].mean()) for k in range(5, 0, -1)]  # top first
    layer_free_nats = (means[0] * 2, means[1] / 2, 0.0, means[3] * 3, means[4] / 2)
    out = GeneratorModel(g, layer_free_nats)(b, gen(3))
    assert float(out["kl"].detach().mean()) == pytest.approx(
        sum(max(m, f) for m, f in zip(means, layer_free_nats)), rel=1e-5
    )
    assert_close(out["kl_base"], plain["kl_base"])
    grads = torch.autograd.grad(
        GeneratorModel(g, tuple(m * 2 for m in means))(b, gen(3))["kl"].mean(),
        [m.weight for m in g.post],
        allow_unused=True,
    )
    assert all(o is None or (o == 0).all() for o in grads)
    paid = torch.autograd.grad(plain["kl"].mean(), [m.weight for m in g.post])
    assert all((o != 0).any() for o in paid)
    with pytest.raises(ValueError, match="2 free-nat allowances for 5 layers"):
        GeneratorModel(g, (1.0, 2.0))
    with pytest.raises(ValueError, match="free nats must not be negative"):
        GeneratorModel(g, (1.0, 2.0, 0.0, -1.0, 0.0))


def test_average():
    "The past counts n/(10+n) after n steps, at most `decay`; buffers are copied; and it is the average that is kept"
    net = nn.BatchNorm1d(1)
    avg, want = Average(net, 0.5), 1.0
    for n, w in enumerate([3.0, -1.0, 2.0] * 8, 1):
        with torch.no_grad():
            net.weight.fill_(w)
            net.running_mean.fill_(w)
        avg.update(net)
        keep = min(n / (10 + n), 0.5)
        want = keep * want + (1 - keep) * w
        assert float(avg.net.weight) == pytest.approx(want, rel=1e-5) and float(avg.net.running_mean) == w
    assert not avg.net.weight.requires_grad and int(avg.count) == 24
    for bad in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
            Average(net, bad)
    g = ladder(2)
    m = GeneratorModel(g, ema=0.9)
    start = g.start.clone()
    with torch.no_grad():
        g.start.add_(1)
    m.before_step()
    assert m.learned() is m.average.net and GeneratorModel(g).learned() is g
    assert_close(m.learned().start, start + 10 / 11)
    assert m.groups()["main"] == list(g.parameters())  # the optimiser does not see the average


def test_a_few_steps_lower_the_bound():
    g = ladder(2, sigma=0.2).requires_grad_(True)
    m, b = GeneratorModel(g), batch(ladder(2), 32)
    opt = torch.optim.Adam(g.parameters(), 3e-3)
    seen = []
    for i in range(60):
        out = m(b, gen(i))
        loss = (out["nll"] + 0.1 * out["kl"]).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        seen.append(float(loss.detach()))
    assert sum(seen[-5:]) < sum(seen[:5]) - 50
    assert all(p.grad is not None and p.grad.isfinite().all() for p in g.parameters())
