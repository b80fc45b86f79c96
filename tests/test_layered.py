"Energies of layers over u: gradients through T, networks evaluated together, the sampler's law, requests, uses"

import math

import pytest
import torch
from torch.testing import assert_close

from ldebm.conditioning import GuidedEnergy
from ldebm.energy import Energy, Frozen, energy_grad
from ldebm.exact import MixtureEnergy
from ldebm.generator import Generator
from ldebm.generator_parts import GeneratorCfg
from ldebm.langevin import linear_chain_moments
from ldebm.layer_control import edit, from_top, layer_swaps, ood_scores, resample_below, upper_score
from ldebm.layered import LayeredEnergy, LayerNets, context_widths
from ldebm.levels import PriorCfg
from ldebm.map_nets import MapNets
from ldebm.posterior import DiagGaussian
from ldebm.prior import DiffusionEBM
from ldebm.schedule import consistent_schedule, diffuse_pair, published_schedule
from ldebm.stacks import Stack, VectorNets
from ldebm.two_samples import mmd_test

F64 = torch.float64
SE = 5  # standard errors allowed

LADDERS = {
    "vectors": dict(shape=(1, 8, 8), sizes=(1, 1, 1), channels=(4, 2, 3), widths=(12, 12, 12), blocks=(1, 0, 0)),
    "maps": dict(shape=(1, 8, 8), sizes=(4, 8), channels=(2, 1), widths=(6, 5), blocks=(1, 0)),
    "mixed": dict(
        shape=(1, 8, 8), sizes=(1, 2, 4, 4, 8), channels=(3, 2, 2, 2, 1), widths=(8, 6, 6, 6, 5), blocks=(1, 0, 0, 1, 0)
    ),
}


def gen(seed):
    return torch.Generator().manual_seed(seed)


def ladder(name, spread=5.0, dtype=F64):
    g = Generator(GeneratorCfg(**LADDERS[name]), gen(0))
    with torch.no_grad():
        for m in g.prior:
            m.weight.mul_(spread)
    return g.to(dtype).requires_grad_(False).eval()


def energy(
    name,
    groups=(1,),
    contexts=True,
    T=3,
    spectral=False,
    free_head=True,
    head=10.0,
    symbol_temperature=1.0,
    dtype=F64,
):
    "Energies with weights as after training: heads `head` times those of the start"
    g = ladder(name, dtype=dtype)
    nets = LayerNets(
        g.cfg.sizes,
        g.cfg.channels,
        context_widths(g) if contexts else (),
        sum(groups),
        T,
        8,
        1,
        spectral,
        free_head,
        gen=gen(1),
    )
    if free_head:
        with torch.no_grad():
            for n in nets.nets:
                n.head.weight.mul_(head)
    return LayeredEnergy(g, nets.to(dtype), T, groups, symbol_temperature)


def consistent(e, **kw):
    return DiffusionEBM(consistent_schedule(e.n_levels), e, PriorCfg(**kw))


def published(e, **kw):
    return DiffusionEBM(
        published_schedule(e.n_levels), e, PriorCfg(objective="published", reference="gaussian", mala=False, **kw)
    )


def normal(n, d, seed, dtype=F64):
    return torch.randn(n, d, generator=gen(seed), dtype=dtype)


def check_moments(x, mean, var, what=""):
    "Mean and variance of independent coordinates, `(d,)` each or numbers, within five standard errors"
    n = len(x)
    mean, var = torch.as_tensor(mean, dtype=x.dtype), torch.as_tensor(var, dtype=x.dtype)
    a, b = ((x.mean(0) - mean).abs() / (var / n).sqrt()).max(), ((x.var(0) - var).abs() / (var * (2 / n) ** 0.5)).max()
    assert a < SE and b < SE, f"{what}: mean is {a:.1f}, variance {b:.1f} standard errors off"


def one_law(x, y, n_perm=199):
    "p-value of a permutation test"
    return mmd_test(x, y, gen(0), bandwidth=(0.5 * x.shape[1] ** 0.5, x.shape[1] ** 0.5), n_perm=n_perm)[1]


# -- networks


def stacks(module):
    return [m for m in module.modules() if isinstance(m, Stack)]


@pytest.mark.parametrize("name", ["vectors", "maps"])
def test_spectral_norms_are_one(name):
    "Of every slice, after the weights have moved and the iterations have caught up; and not of raw weights"
    nets = energy(name, spectral=True, free_head=False).nets
    assert len(stacks(nets)) > 8
    with torch.no_grad():
        for m in stacks(nets):
            m.weight.mul_(1.7).add_(
                0.2 * torch.randn(m.weight.shape, generator=gen(3), dtype=F64) / m.v.shape[1] ** 0.5
            )
    with torch.no_grad():
        stale = max(
            float((torch.linalg.matrix_norm(m.normalised().flatten(2), ord=2) - 1).abs().max()) for m in stacks(nets)
        )
    assert stale > 1e-3
    nets.power_iterate(500)
    for m in stacks(nets):
        assert m.norm and len(m.weight) == len(m.normalised())
        assert_close(
            torch.linalg.matrix_norm(m.normalised().flatten(2), ord=2),
            torch.ones(len(m.weight), dtype=F64),
            atol=1e-4,
            rtol=0,
        )
    for free in (True, False):  # the logits' weights alone are exempt
        heads = [n.head for n in energy(name, spectral=True, free_head=free).nets.nets]
        assert all(h.norm != free for h in heads)


def test_first_norms_are_one_too():
    for m in stacks(LayerNets((1, 4), (5, 2), (), 2, 3, 8, gen=gen(0))):
        assert_close(
            torch.linalg.matrix_norm(m.normalised().flatten(2), ord=2), torch.ones(len(m.weight)), atol=0.05, rtol=0
        )


def alone(net, g, make, width=None):
    "Network `g` of a group as a group of one"
    one = make().double()
    state = {}
    for k, v in net.state_dict().items():
        v = v if k.endswith("table") else v[g : g + 1]
        if width is not None and k in ("z.weight", "s.weight"):
            v = v[:, :, :width]
        if width is not None and k in ("z.v", "s.v"):
            v = v[:, :width]
        state[k] = v
    one.load_state_dict(state)
    return one


@pytest.mark.parametrize("spectral", [True, False])
def test_networks_together_equal_networks_alone(spectral):
    "Vectors of unequal widths, and maps, with the levels of a batch mixed; energies, and gradients in the weights"
    t = torch.tensor([0, 2, 1, 1, 0])
    widths = [4, 2, 3]
    cases = [
        (
            VectorNets(widths, 3, 3, 8, 2, spectral, gen=gen(0)).double(),
            [normal(5, w, w) for w in widths],
            [(lambda w=w: VectorNets([w], 3, 3, 8, 2, spectral)) for w in widths],
            widths,
        ),
        (
            MapNets(3, 2, 8, 3, 3, 6, spectral, gen=gen(0)).double(),
            [normal(5, 2 * 64, i).view(5, 2, 8, 8) for i in range(3)],
            [lambda: MapNets(1, 2, 8, 3, 3, 6, spectral)] * 3,
            [None] * 3,
        ),
    ]
    for net, zs, makes, widths in cases:
        w = net.weights()
        together = net.logits(zs, t, w)
        assert together.shape == (3, 5, 3) and together.std() > 1e-3
        for g in range(3):
            one = alone(net, g, makes[g], widths[g])
            w1 = one.weights()
            f = one.logits([zs[g]], t, w1)
            assert_close(together[g], f[0], atol=1e-12, rtol=1e-10)
            (a,) = torch.autograd.grad(
                together[g].sum(),
                net.a.weight if isinstance(net, VectorNets) else net.conv[0].weight,
                retain_graph=True,
            )
            (b,) = torch.autograd.grad(f.sum(), one.a.weight if isinstance(net, VectorNets) else one.conv[0].weight)
            assert_close(a[g : g + 1], b, atol=1e-11, rtol=1e-9)
            assert (a[[i for i in range(3) if i != g]] == 0).all()


def test_layers_keep_their_places():
    "Shapes that alternate are gathered into groups, and their logits come back in order"
    sizes, channels = (4, 1, 4, 8, 4, 2), (2, 5, 3, 1, 2, 2)
    nets = LayerNets(sizes, channels, (), 2, 3, 6, gen=gen(0)).double()
    assert sorted(map(len, nets.members)) == [1, 1, 2, 2]
    zs = [normal(3, c * s * s, i).view(3, c, s, s) for i, (c, s) in enumerate(zip(channels, sizes))]
    w, t = nets.weights(), torch.tensor([0, 1, 2])
    f = nets.logits(zs, t, w)
    for i in range(6):
        moved = nets.logits([z + 1 if j == i else z for j, z in enumerate(zs)], t, w)
        assert [bool((moved[j] != f[j]).any()) for j in range(6)] == [j == i for j in range(6)]
    other = nets.logits(zs, torch.tensor([1, 1, 2]), w)
    assert (other[:, 0] != f[:, 0]).all() and torch.equal(other[:, 1:], f[:, 1:]), "levels belong to their rows"


def test_networks_that_cannot_be():
    with pytest.raises(ValueError, match="a power of two from 4 on, got 6"):
        MapNets(1, 2, 6, 1, 3, 4)
    with pytest.raises(ValueError, match="1 context widths for 2 layers"):
        LayerNets((1, 1), (2, 2), (4,))
    g = ladder("vectors")
    with pytest.raises(ValueError, match=r"contexts of widths \(0, 9, 12\), and a generator of widths \(12, 12, 12\)"):
        LayeredEnergy(g, LayerNets(g.cfg.sizes, g.cfg.channels, (0, 9, 12)), 3)
    with pytest.raises(ValueError, match="networks for 2 layers, and a generator of 3"):
        LayeredEnergy(g, LayerNets((1, 1), (4, 2)), 3)
    with pytest.raises(ValueError, match="the energy has 3 levels, the schedule 2"):
        DiffusionEBM(consistent_schedule(2), energy("vectors"))


def test_the_generator_is_not_part_of_the_energy():
    "Neither an optimiser nor an average takes it along"
    e = energy("mixed")
    assert not {id(p) for p in e.generator.parameters()} & {id(p) for p in e.parameters()} and all(
        k.startswith("nets.") for k in e.state_dict()
    )


# -- gradients

REQUESTS = {
    (1,): [None],
    (4,): [None, 2, [0, 3, 1], torch.tensor([True, False, True, True])],
    (3, 2): [
        None,
        torch.tensor([[0, -1]]),
        torch.tensor([[0, 1], [-1, 1], [2, -1]]),
        torch.tensor([True, False, True, True, True]),
    ],
}


@pytest.mark.parametrize("contexts", [True, False])
@pytest.mark.parametrize("groups", list(REQUESTS))
@pytest.mark.parametrize("name", list(LADDERS))
def test_gradient_through_T(name, groups, contexts):
    "Finite differences along random directions, autograd of `forward`, and `fast()` agree, for every kind of request"
    e = energy(name, groups, contexts, symbol_temperature=0.5 if groups == (3, 2) else 1.0)
    u, t, h = normal(3, e.d, 4), torch.tensor([0, 2, 1]), 1e-5
    for y in REQUESTS[groups]:
        y = e.allowed(y, 3)
        F, grad = energy_grad(e, u, t, y)
        F1, g1 = energy_grad(Frozen(e), u, t, y)
        assert_close(F1, F, atol=1e-12, rtol=1e-12)
        assert_close(g1, grad, atol=1e-12, rtol=1e-10)
        assert not grad.requires_grad and not g1.requires_grad
        assert grad.norm(dim=1).min() > 0.01
        for s in range(4):
            v = normal(3, e.d, 10 + s)
            with torch.no_grad():
                slope = (e(u + h * v, t, y) - e(u - h * v, t, y)) / (2 * h)
            assert_close((grad * v).sum(1), slope, atol=1e-7, rtol=1e-6)
        for k in range(e.generator.L):  # every layer has a share, also in what it does to those below
            assert (grad[:, e.generator.layer_mask(k + 1)] != 0).any()


def test_F_is_the_sum_over_layers():
    e = energy("mixed", (3, 2), symbol_temperature=0.5)
    u, t = normal(4, e.d, 0), torch.tensor([0, 1, 2, 0])
    f = e.by_layer(u, t)
    assert f.shape == (5, 4, 5)
    assert_close(e.logits(u, t), f.sum(0))
    s = f.sum(0) / 0.5
    assert_close(e(u, t), 0.5 * (s[:, :3].logsumexp(1) + s[:, 3:].logsumexp(1)))
    plain = energy("mixed")
    assert_close(plain.layer_energies(u, t).sum(0), plain(u, t))
    assert e.layer_energies(u, t).shape == (5, 4)


def test_contexts_reach_the_energies():
    "A layer's energy at the same z_i depends on what it was drawn from, if it sees that, and only then"
    for contexts in (True, False):
        e = energy("vectors", contexts=contexts)
        g = e.generator
        u, top = normal(4, e.d, 0), g.layer_mask(3)
        zs = g.T(u)
        v = g.inverse([zs[0] + 1, *zs[1:]])
        assert_close(g.T(v)[1:], zs[1:])
        f, h = (e.layer_energies(x, torch.zeros(4, dtype=torch.long)) for x in (u, v))
        assert (f[0] != h[0]).all() and top.sum() == 4
        assert bool(((f[1:] - h[1:]).abs() > 1e-6).all()) == contexts
        if not contexts:
            assert_close(f[1:], h[1:])


def test_frozen_weights_stay():
    "`Frozen` lets no gradient out, and keeps the numbers that it was made with where weights are normalised"
    e = energy("mixed")
    u, t = normal(2, e.d, 0), torch.zeros(2, dtype=torch.long)
    before = energy_grad(Frozen(e), u, t)[0].clone()
    with torch.no_grad():
        for p in e.parameters():
            p.mul_(1.5)
    assert_close(energy_grad(Frozen(e, e.weights()), u, t)[0], e(u, t).detach())
    assert (e(u, t) - before).abs().min() > 1e-6
    spectral = energy("vectors", spectral=True, free_head=False)
    w = spectral.weights()
    assert_close(spectral(u[:, :9], t, weights=w), spectral(u[:, :9], t))
    frozen = Frozen(spectral, w)
    assert w[0]["head"].requires_grad and not frozen.weights[0]["head"].requires_grad
    kept = frozen(u[:, :9], t).clone()
    with torch.no_grad():
        for p in spectral.parameters():
            p.mul_(1.5).add_(0.1)
    assert_close(frozen(u[:, :9], t), kept)


# -- no energy: the base prior


def no_energy(name="mixed", T=3, dtype=F64, **kw):
    return energy(name, T=T, head=0.0, dtype=dtype, **kw)


@pytest.mark.parametrize("mala", [True, False])
@pytest.mark.parametrize("name,T", [("vectors", 3), ("vectors", 1), ("maps", 2)])
def test_zero_energy_is_the_base_prior_at_every_level(name, T, mala):
    "Levels of the diffusion and layers of the ladder: moments of u, and two-sample tests against base samples"
    e = no_energy(name, T)
    n, g = 3000, e.generator
    zs = consistent(e, n_steps=4, rho=0.5, mala=mala).sample(n, gen=gen(T), path=True)
    assert zs.shape == (T + 1, n, e.d)
    for t, u in enumerate(zs):
        check_moments(u, 0.0, 1.0, f"level {t}")
        assert (torch.corrcoef(u.T) - torch.eye(e.d)).abs().max() < 5.5 / n**0.5
        u, base = u[:300], normal(300, e.d, 99 + t)
        assert one_law(u, base, 999) > 0.002, f"level {t}"
        for k, (a, b) in enumerate(zip(g.T(u), g.T(base))):
            assert one_law(a.flatten(1), b.flatten(1), 999) > 0.002, f"level {t}, layer {g.L - k}"


def test_a_small_tilt_is_told_from_the_base_prior():
    "The tests above can fail: with energies of a few tenths of a nat they do"

    class Tilt(Energy):
        d, n_levels, n_symbols = 9, 3, 1

        def logits(self, z, t, context=None, weights=None):
            return 0.3 * z.sum(1, keepdim=True)

    p = DiffusionEBM(consistent_schedule(3), Tilt(), PriorCfg(n_steps=4, rho=0.5))
    zs = p.sample(3000, gen=gen(0), path=True)
    base = normal(3000, 9, 99, torch.float32)
    for u in zs[:3]:
        with pytest.raises(AssertionError, match="standard errors"):
            check_moments(u, 0.0, 1.0)
    assert one_law(zs[0][:300], base[:300], 999) <= 0.002
    e = energy("vectors", head=10.0)
    u = consistent(e, n_steps=4, rho=0.5).sample(3000, gen=gen(3))
    with torch.no_grad():
        assert e(u, torch.zeros(3000, dtype=torch.long)).std() < 2
    with pytest.raises(AssertionError, match="standard errors"):
        check_moments(u, 0.0, 1.0)


@pytest.mark.parametrize("K", [1, 30])
def test_zero_energy_in_the_published_sampler(K):
    "Unadjusted chains from u_{t+1} with a finite step have a linear chain's law, not the base prior's"
    T, b2, n = 3, 0.02, 4000
    e = no_energy("vectors", T)
    p, s = published(e, n_steps=K, squared_step=b2), published_schedule(T)
    one = torch.full((n, e.d), 1.7, dtype=F64)
    for t in range(T):
        a, v, last = s.a[t + 1].item(), (s.sigma[t + 1] ** 2).item(), t == T - 1
        step = b2 * (s.sbar[t] / s.sbar[0]).item() * v
        alpha, beta = (1 - 0.5 * step, 0.0) if last else (1 - 0.5 * step / v, 0.5 * step * a * 1.7 / v)
        u, _ = p.conditional(one, torch.full((n,), t)).sample(gen=gen(t))
        mean, var = linear_chain_moments(alpha, beta, step**0.5, 1.7, 0.0, K)
        check_moments(u, mean, var, f"level {t}")
        if not last and K > 1:
            with pytest.raises(AssertionError):
                check_moments(u, a * 1.7, v)  # the conditional that it does not reach
    zs, var = p.sample(n, gen=gen(9), path=True), 1.0
    check_moments(zs[T], 0.0, 1.0)
    for t in reversed(range(T)):
        a, v, last = s.a[t + 1].item(), (s.sigma[t + 1] ** 2).item(), t == T - 1
        step = b2 * (s.sbar[t] / s.sbar[0]).item() * v
        alpha = 1 - 0.5 * step / (1.0 if last else v)
        keep = linear_chain_moments(alpha, 0.0 if last else 0.5 * step * a / v, 0.0, 1.0, 0.0, K)[
            0
        ]  # of a start of 1: all is linear in u_{t+1}
        var = keep**2 * var + linear_chain_moments(alpha, 0.0, step**0.5, 0.0, 0.0, K)[1]
        check_moments(zs[t], 0.0, var, f"level {t}")


# -- the published objective, written out


def test_published_step_written_out():
    "u <- u + g/2 - s/2 [r a (a u - u1)/sigma^2 + u] + sqrt(s) eps, from u = u1"
    T, K, b2 = 3, 4, 2e-4
    e = energy("mixed", T=T, contexts=False)
    p, S = published(e, n_steps=K, squared_step=b2), published_schedule(T)
    t = torch.arange(T).repeat(4)
    u1 = normal(len(t), e.d, 0)
    got, _ = p.conditional(u1, t).sample(gen=gen(7))
    a = S.a[t + 1][:, None]
    sigma = (1 - a**2).sqrt()
    sbar = (1 - S.a.cumprod(0) ** 2).sqrt()
    s = b2 * (sbar[t] / sbar[0])[:, None] * sigma**2
    r, noise, u = (t < T - 1).double()[:, None], gen(7), u1
    for _ in range(K):
        x = u.detach().requires_grad_()
        (g,) = torch.autograd.grad(e.by_layer(x, t).sum(), x)
        u = (
            u
            + g / 2
            - s / 2 * (r * a * (a * u - u1) / sigma**2 + u)
            + s.sqrt() * torch.randn(u.shape, generator=noise, dtype=F64)
        )
    assert_close(got, u.detach(), atol=1e-12, rtol=1e-12)
    assert (got - u1).abs().max() > 1e-3


@pytest.mark.parametrize("weighting", ["likelihood", "drl"])
def test_weights_of_the_levels(weighting):
    "1/s_t, the gradient of the likelihood of F/s_t; or sigma_1/sigma_{t+1}"
    T, b2 = 3, 3e-5
    e = energy("mixed", T=T, contexts=False)
    p, S = published(e, n_steps=0, squared_step=b2, weighting=weighting, encoder=True), published_schedule(T)
    u = normal(40, e.d, 0).requires_grad_()
    q = DiagGaussian(u.detach(), torch.zeros_like(u))
    out = p.terms(q, u, gen(5))
    g = gen(5)
    t = torch.randint(T, (40,), generator=g)
    assert set(t.tolist()) == {0, 1, 2}
    pos, nxt = diffuse_pair(S, u, t, g)  # without updates the chain ends where it starts, at u_{t+1}
    sbar, sigma = (1 - S.a.cumprod(0) ** 2).sqrt(), (1 - S.a**2).sqrt()
    s = b2 * sbar[t] / sbar[0] * sigma[t + 1] ** 2
    w = 1 / s if weighting == "likelihood" else sigma[1] / sigma[t + 1]
    assert_close(out["ebm"], w * (e(nxt, t) - e(pos, t)))
    assert_close(out["ebm_enc"], -w * e(pos, t))
    if weighting == "likelihood":
        assert (1 / s)[t == 0][0] == pytest.approx(69_659, rel=0.005) and (1 / s)[t == 2][0] == pytest.approx(
            347, rel=0.01
        )  # of the released constants
    assert_close(out["kl_base"], q.kl_standard().sum(1))


def test_published_samples_condition_at_every_level():
    "With the gaussian reference a request for a symbol holds at every level"
    e = energy("vectors", (4,), T=3)
    p = published(e, n_steps=2)
    asked, real = [], p.conditional

    def noted(z, t, **request):
        asked.append((int(t[0]), request["y"]))
        return real(z, t, **request)

    p.conditional = noted
    p.sample(3, y=2, gen=gen(0))
    assert [a for a, _ in asked] == [2, 1, 0] and all(y.tolist() == [2, 2, 2] for _, y in asked)


@pytest.mark.parametrize("make", [consistent, published])
@pytest.mark.parametrize("groups", [(1,), (4,), (3, 2)])
def test_gradients_of_the_terms_reach_every_network(make, groups):
    e = energy("mixed", groups)
    p = make(e, n_steps=2)
    u = normal(60, e.d, 0)
    labels = None if groups == (1,) else torch.stack([torch.randint(-1, k, (60,), generator=gen(1)) for k in groups], 1)
    out = p.terms(DiagGaussian(u, torch.zeros_like(u)), u, gen(2), labels=labels)
    assert ("cls_t" in out) == (groups != (1,)) and all(o.shape == (60,) and o.isfinite().all() for o in out.values())
    (out["ebm"].sum() + out.get("cls_t", out["ebm"] * 0).sum()).backward()
    for k, w in e.nets.named_parameters():
        assert w.grad is not None and (w.grad.flatten(1) != 0).any(1).all(), k
    assert all(q.grad is None for q in e.generator.parameters())


# -- exact conditionals


def mixture(T=3, sd=0.5):
    means = torch.tensor([[1.2, 0.8], [-1.0, 1.0], [0.2, -1.3]], dtype=F64)
    e = MixtureEnergy(consistent_schedule(T), means, sd, torch.tensor([0.5, 0.3, 0.2], dtype=F64))
    e.anchor = torch.nn.Parameter(torch.zeros((), dtype=F64))  # says the precision
    return e, means, sd


def exact(n, means, sd, probs, seed):
    g = gen(seed)
    k = torch.multinomial(torch.as_tensor(probs, dtype=F64), n, replacement=True, generator=g)
    return means[k] + sd * torch.randn(n, means.shape[1], generator=g, dtype=F64)


@pytest.mark.parametrize("value", [-0.9, 0.3])
def test_known_coordinates_condition_exactly(value):
    "Sweeps at level 0 give the exact conditional of a mixture; a neighbouring conditional is told from it"
    e, means, sd = mixture()
    n, given = 800, torch.zeros(800, 2, dtype=F64)
    given[:, 0] = value
    u = consistent(e, n_steps=60).sample(n, known=(torch.tensor([True, False]), given, 8), gen=gen(1))
    assert torch.equal(u[:, 0], given[:, 0])

    def law(v, seed):
        w = torch.tensor([0.5, 0.3, 0.2], dtype=F64) * torch.exp(-0.5 * ((v - means[:, 0]) / sd) ** 2)
        return exact(n, means[:, 1:], sd, w / w.sum(), seed)

    assert one_law(u[:, 1:], law(value, 2)) > 0.02
    assert one_law(u[:, 1:], law(value + 0.35, 2)) < 0.01


@pytest.mark.parametrize("y", [0, 2])
def test_samples_given_a_symbol_equal_rejection_from_the_joint(y):
    e, means, sd = mixture()
    p = consistent(e, n_steps=60)
    given = p.sample(500, y=y, gen=gen(0))
    u = p.sample(3500, gen=gen(1))
    drawn = torch.multinomial(p.symbol_logits(u).softmax(1), 1, generator=gen(2))[:, 0]
    kept = u[drawn == y][:500]
    assert (
        len(kept) > 300 and one_law(given, kept) > 0.02 and one_law(given, exact(500, means[[y]], sd, [1.0], 3)) > 0.02
    )
    assert one_law(given, u[:500]) < 0.01  # and not the joint itself
    assert one_law(u[:500], exact(500, means, sd, [0.5, 0.3, 0.2], 4)) > 0.02


def test_samples_of_allowed_values_and_of_a_negation():
    e, means, sd = mixture()
    p = consistent(e, n_steps=60)
    u = p.sample(500, y=torch.tensor([False, True, True]), gen=gen(0))
    assert one_law(u, exact(500, means[1:], sd, [0.6, 0.4], 1)) > 0.02
    assert one_law(u, exact(500, means[1:], sd, [0.4, 0.6], 1)) < 0.02
    v = DiffusionEBM(p.schedule, GuidedEnergy(e, 1.0), p.cfg).sample(
        500, y=torch.tensor([False, True, True]), gen=gen(0)
    )
    assert_close(u, v, atol=1e-8, rtol=0)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guided_energy(guidance):
    "F + guidance log p(y | z): 0 asks nothing, 1 is exact conditioning"
    for groups, tau in (((4,), 1.0), ((4,), 0.5), ((3, 2), 1.0), ((3, 2), 0.5)):
        e = energy("vectors", groups, symbol_temperature=tau)
        G = GuidedEnergy(e, guidance)
        u, t = normal(6, e.d, 0), torch.tensor([0, 1, 2, 0, 1, 2])
        lp = e.symbol_log_probs(e.logits(u, t)).split(groups, -1)
        assert_close(sum(part.exp().sum(1) for part in lp), torch.full((6,), float(len(groups)), dtype=F64))
        for y in REQUESTS[groups]:
            y = None if y is None else y if not isinstance(y, list) else y * 2
            if isinstance(y, torch.Tensor) and y.ndim == 2 and len(y) == 3:
                y = y.repeat(2, 1)
            y = e.allowed(y, 6)
            if y is None:
                want = e(u, t)
            elif y.dtype == torch.bool:
                want = e(u, t) + guidance * sum(
                    part.masked_fill(~m, -math.inf).logsumexp(-1) for part, m in zip(lp, y.split(groups, -1))
                )
            else:
                want = e(u, t) + guidance * lp[0].gather(1, y[:, None])[:, 0]
            assert_close(G(u, t, y), want)
            if tau == 1 and guidance == 1:
                assert_close(G(u, t, y), e(u, t, y))
            if guidance == 0:
                assert_close(G(u, t, y), e(u, t))
            F, g = energy_grad(Frozen(G), u, t, y)
            assert_close(F, want)
            assert g.isfinite().all()
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="guidance must not be negative"):
            GuidedEnergy(e, bad)


def test_negation_takes_away():
    "What is forbidden becomes rare, in the energy's own opinion"
    e = energy("vectors", (4,), head=60.0)
    p = consistent(e, n_steps=10)

    def share(y):
        return float(p.symbol_logits(p.sample(400, y=y, gen=gen(0))).detach().softmax(1)[:, 1].mean())

    no = torch.tensor([True, False, True, True])
    assert share(no) < share(None) - 0.02 and share(None) < share(1) - 0.02


def test_requests_that_cannot_be():
    e, two = energy("vectors", (4,)), energy("vectors", (3, 2))
    for ask, y, says in [
        (e, 4, r"symbols must lie in 0..3, got 4..4"),
        (e, -1, "symbols must lie in 0..3"),
        (e, [0, 1], "2 symbols for 5 latents"),
        (e, torch.ones(3, dtype=torch.bool), r"allowed values must have shape \(4,\) or \(5, 4\), got \(3,\)"),
        (e, torch.ones(2, 4, dtype=torch.bool), "allowed values must have shape"),
        (e, torch.zeros(4, dtype=torch.bool), "some attribute is allowed no value at all"),
        (two, 1, r"symbols of 2 attributes must have shape \(5, 2\), got \(\)"),
        (two, torch.zeros(5, 3, dtype=torch.long), r"must have shape \(5, 2\), got \(5, 3\)"),
        (two, torch.zeros(4, 2, dtype=torch.long), "must have shape"),
        (two, torch.tensor([[0, 2]]), "values of attribute 1 must lie in 0..1, or be -1 for free; got 2..2"),
        (two, torch.tensor([[-2, 0]]), "values of attribute 0"),
        (two, torch.tensor([True, False, False, False, False]), "allowed no value at all"),
    ]:
        with pytest.raises(ValueError, match=says):
            ask.allowed(y, 5)
        with pytest.raises(ValueError, match=says):
            consistent(ask, n_steps=1).sample(5, y=y)
    assert e.allowed(None, 5) is None and e.allowed(2, 5).tolist() == [2] * 5
    assert two.allowed(torch.tensor([[1, -1]]), 2).tolist() == [[False, True, False, True, True]] * 2
    with pytest.raises(ValueError, match=r"labels have 1 columns, the energy 2 attribute\(s\)"):
        two.symbol_nll(torch.zeros(5, 5), torch.zeros(5, dtype=torch.long))


def test_unknown_labels_cost_nothing():
    e = energy("vectors", (3, 2))
    f, y = normal(4, 5, 0), torch.tensor([[0, 1], [-1, 0], [2, -1], [-1, -1]])
    a, b = f[:, :3].log_softmax(1), f[:, 3:].log_softmax(1)
    assert_close(e.symbol_nll(f, y), -torch.stack([a[0, 0] + b[0, 1], b[1, 0], a[2, 2], torch.zeros((), dtype=F64)]))


# -- uses


def test_resample_below_keeps_the_layers_above():
    e = energy("mixed", dtype=torch.float32)
    p, g, u = consistent(e, n_steps=3), e.generator, normal(12, e.d, 0, torch.float32)
    for k in range(g.L + 1):
        v = resample_below(p, u, k, gen=gen(k))
        upper = g.layer_mask(range(k + 1, g.L + 1))
        assert torch.equal(v[:, upper], u[:, upper])
        assert (v != u)[:, ~upper].all()
        for i, (a, b) in enumerate(zip(g.T(v), g.T(u))):
            if g.L - i > k:
                assert torch.equal(a, b), "the layers above are the same pictures' too"
    same = resample_below(p, u, 0)
    same[0] = 7.0
    assert not (u == 7).any(), "a copy"
    v = resample_below(published(energy("mixed", dtype=torch.float32), n_steps=3), u, 2, gen=gen(0))
    assert torch.equal(v[:, g.layer_mask([3, 4, 5])], u[:, g.layer_mask([3, 4, 5])])
    with pytest.raises(ValueError, match="known must hold latents of shape"):
        consistent(e).sample(3, known=(g.layer_mask(1), u))


def test_resample_below_without_energy_is_the_base_prior():
    e = no_energy("vectors")
    u = torch.full((3000, e.d), 2.0, dtype=F64)
    v = resample_below(consistent(e, n_steps=3), u, 2, gen=gen(0))
    low = e.generator.layer_mask([1, 2])
    check_moments(v[:, low], 0.0, 1.0)


def test_edit():
    "The higher the level, the more may change; layers to keep stay bit for bit; the wanted symbol becomes likelier"
    e = no_energy("vectors")
    p, u, s = consistent(e, n_steps=3), normal(3000, e.d, 0), consistent_schedule(3)
    for level in (1, 2, 3):
        v = edit(p, u, None, level, gen=gen(level))
        check_moments(v, 0.0, 1.0)
        want = 0.0 if level == 3 else float(s.abar[level]) ** 2  # down the way it came up; the top level forgets
        r = (u * v).mean(0)
        assert (r - want).abs().max() < SE * 2**0.5 / 3000**0.5, (level, r, want)
    c = energy("vectors", (4,), head=60.0)
    p, u = consistent(c, n_steps=10), normal(300, c.d, 0)

    def likely(x):
        return float(c.symbol_log_probs(c.logits(x, torch.zeros(len(x), dtype=torch.long)))[:, 1].detach().exp().mean())

    v = edit(p, u, 1, 2, keep=(3,), gen=gen(0))
    top = c.generator.layer_mask(3)
    assert torch.equal(v[:, top], u[:, top]) and (v != u)[:, ~top].all()
    assert likely(edit(p, u, 1, 2, gen=gen(0))) > likely(edit(p, u, 0, 2, gen=gen(0))) + 0.05
    for level in (0, 4):
        with pytest.raises(ValueError, match=rf"level must lie in 1..3, got {level}"):
            edit(p, u, 1, level)
    with pytest.raises(ValueError, match="no layer 9"):
        edit(p, u, 1, 1, keep=(9,))
    with pytest.raises(ValueError, match="start at a level from 1 to 3"):
        p.sample(300, start=(u, 0))


def test_upper_score():
    e = energy("mixed", (3, 2))
    g, u = e.generator, normal(6, e.d, 0)
    zero = torch.zeros(6, dtype=torch.long)
    assert_close(upper_score(e, u), e(u, zero) - 0.5 * u.square().sum(1))
    for k in range(g.L):
        low, f = g.layer_mask(range(1, k + 1)), upper_score(e, u, k)
        assert_close(upper_score(e, torch.where(low, normal(6, e.d, 1), u), k), f)  # what lies below does not count
        assert_close(f, e.free(e.by_layer(u, zero)[: g.L - k].sum(0)) - 0.5 * u[:, ~low].square().sum(1))
        v = u.clone()
        v[:, g.layer_mask(k + 1)] += 0.5
        assert ((upper_score(e, v, k) - f).abs() > 1e-6).all()
    assert_close(upper_score(e, u, 0, t=2), e(u, zero + 2) - 0.5 * u.square().sum(1))
    for k in (-1, 5):
        with pytest.raises(ValueError, match=rf"k must lie in 0..4, got {k}"):
            upper_score(e, u, k)


def test_ood_scores():
    "Shapes, each scheme by its definition, and signs: high is in distribution"
    e = energy("mixed", dtype=torch.float32)
    p, g = consistent(e, n_steps=2), e.generator
    x = torch.rand(5, 1, 8, 8, generator=gen(0))
    s = ood_scores(p, x, gen=gen(1), chunk=5)
    assert set(s) == {"inference", "diffusion", "ratio"} and all(
        v.shape == (5, 5) and v.isfinite().all() for v in s.values()
    )
    noise = gen(1)
    with torch.no_grad():
        u = g.encode(x, noise)[1]
        for k in range(g.L):
            v = resample_below(p, u, k, gen=noise)
            assert_close(s["inference"][k], upper_score(e, u, k))
            assert_close(s["diffusion"][k], upper_score(e, v))
            assert_close(
                s["ratio"][k], upper_score(e, v) - g.nll(x, v) - upper_score(e, u) + g.nll(x, u), atol=1e-3, rtol=1e-4
            )
    assert (s["ratio"][0] == 0).all() and torch.equal(s["inference"][0], s["diffusion"][0])
    many = ood_scores(p, x.repeat(3, 1, 1, 1), gen=gen(1), chunk=4)
    assert all(v.shape == (5, 15) for v in many.values())
    # pictures whose latents lie far out score low where no energy says otherwise
    e = no_energy("vectors", dtype=torch.float32)
    with torch.no_grad():
        for m in e.generator.post:
            m.weight.mul_(4)
    s = ood_scores(
        consistent(e, n_steps=2),
        torch.cat([torch.full((8, 1, 8, 8), 0.5), 30 * torch.rand(8, 1, 8, 8, generator=gen(0))]),
        gen=gen(0),
    )
    assert s["inference"][0, :8].mean() > s["inference"][0, 8:].mean() + 1


def test_pictures_of_layers():
    g = ladder("mixed", dtype=torch.float32)
    u, others = normal(3, g.d, 0, torch.float32), normal(4, g.d, 1, torch.float32)
    parts = from_top(g, u)
    assert len(parts) == 5 and all(x.shape == (3, 1, 8, 8) for x in parts) and torch.equal(parts[-1], g.decode(u))
    assert torch.equal(parts[0], g.decode(u * g.layer_mask(5)))
    swaps = layer_swaps(g, u[:1], others)
    for k, x in zip(range(5, 0, -1), swaps):
        assert torch.equal(x, g.decode(torch.where(g.layer_mask(k), others, u[:1])))
