"Numbers that the released LDEBM code gave, and what it does beside its formulas: k-means, power iterations, padding"

import json
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from chains import NO_RUNNERS, counted_calls, gen
from plain import plain_paths
from torch import nn
from torch.testing import assert_close

from ldebm import langevin, levels, native, posterior, prior, schedule, text_score, text_task, whole_chains
from ldebm.closed_form import ClosedForm
from ldebm.clusters import cluster_targets
from ldebm.conditioning import GuidedEnergy
from ldebm.corpora import load_corpus
from ldebm.energy import Energy, EnergyNet, Frozen, energy_grad
from ldebm.exact import QuadraticEnergy
from ldebm.graphs import square_stacks
from ldebm.levels import PriorCfg
from ldebm.posterior import DiagGaussian
from ldebm.prior import DiffusionEBM
from ldebm.recovery import frozen_free
from ldebm.registry import RUNNERS
from ldebm.schedule import consistent_schedule, published_schedule
from ldebm.stacks import Stack
from ldebm.text_nets import cut_after
from ldebm.text_settings import TextJob, resolve
from ldebm.text_task import TextTask
from ldebm.text_vae import strip
from ldebm.whole_chains import Sizes

F64 = torch.float64
VECTORS = Path(__file__).parents[1] / "data" / "published" / "released-code-vectors.json"


# -- numbers of the released code, on every path


def doubles(x):
    "Nested lists of numbers as tensors, whole numbers as long"
    if isinstance(x, dict):
        return {k: doubles(v) for k, v in x.items()}
    if isinstance(x, list) and isinstance(x[0], dict):
        return [doubles(v) for v in x]
    if not isinstance(x, list):
        return x
    whole = torch.tensor(x)
    return whole if whole.dtype == torch.long else torch.tensor(x, dtype=F64)


@pytest.fixture(scope="module")
def vectors():
    return doubles(json.loads(VECTORS.read_text()))


def released_prior(v):
    "`published` at the sizes of the vectors, with their weights, power-iteration vectors and level table"
    s = v["sizes"]
    net = EnergyNet(s["d"], s["K"], s["T"], hidden=s["H"], n_blocks=s["n_blocks"]).double()
    net.table = v["level_table"]
    layers = {k: getattr(net, k) for k in ("z1", "z2", "t1", "t2", "merge", "head")}
    pairs = [(layers[k], v["energy"][k]) for k in layers] + list(zip(net.blocks, v["energy"]["blocks"], strict=True))
    with torch.no_grad():
        for m, w in pairs:
            for name in ("weight", "bias", "u", "v"):
                assert getattr(m, name).shape == w[name].shape
                getattr(m, name).copy_(w[name])
    return DiffusionEBM(
        published_schedule(s["T"]),
        net,
        PriorCfg(
            objective="published",
            reference="flat",
            n_steps=s["langevin_steps"],
            squared_step=s["b2"],
            free_nats=s["kappa"],
            mala=False,
        ),
    )


PATHS = ["plain", "autograd", "library", "compiled"]


@contextmanager
def path(name):
    "One way to the energy and its chains, and no other"
    if name in ("library", "compiled") and not any(RUNNERS.values()):
        pytest.skip(NO_RUNNERS)
    why = native.why_not(Sizes(3, 6, 4, 2), torch.zeros(1, 3, dtype=F64)) if name == "compiled" else ""
    if why:
        pytest.skip(why)
    way = dict(plain=plain_paths, autograd=lambda: patch.dict(RUNNERS, energy_grad=[], chain=[])).get(name, nullcontext)
    compiled_ways = (native, "gradient_native"), (whole_chains, "run_chains")
    with (
        pytest.MonkeyPatch.context() as env,
        counted_calls((ClosedForm, "grad"), *compiled_ways) as fast,
        counted_calls(*compiled_ways) as compiled,
    ):
        env.setenv("LDEBM_RESIDENT", str(int(name == "compiled")))
        with way():
            yield
    assert bool(fast) == (name in ("library", "compiled")) and bool(compiled) == (name == "compiled")


@contextmanager
def given_noise(*noise, levels=None):
    "What draws noise gives these tensors, in this order, to the last one; random levels are `levels`"
    todo = list(noise)

    def draw(like, gen=None):
        x = todo.pop(0)
        assert x.shape == like.shape
        return x

    with ExitStack() as stack:
        for where in (prior, posterior, schedule, langevin, whole_chains):
            stack.enter_context(patch.object(where, "randn_like", draw))
        if levels is not None:
            stack.enter_context(patch.object(torch, "randint", lambda *args, **kw: levels))
        yield
    assert not todo


def same(got, want, what=""):
    assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("name", PATHS)
def test_released_energy_and_its_gradient(vectors, name):
    p, c = released_prior(vectors), vectors["energy_case"]
    with path(name):
        F, g = energy_grad(Frozen(p.energy), c["z"], c["t"])
        logits = p.energy.logits(c["z"], c["t"])
    same(F, c["F"], "F")
    same(g, c["grad"], "gradient")
    same(logits.detach(), c["logits"], "logits")


@pytest.mark.parametrize("name", PATHS)
def test_released_chains(vectors, name):
    p = released_prior(vectors)
    assert [c["level"] for c in vectors["chains"]] == list(range(p.T))
    for c in vectors["chains"]:
        t = torch.full((len(c["start"]),), c["level"])
        with path(name), given_noise(*c["noise"]):
            end = p.conditional(c["start"], t).sample()[0]
        same(end / p.scale(t, end), c["end"], f"level {c['level']}")


@pytest.mark.parametrize("name", PATHS)
def test_released_terms_total_and_gradients(vectors, name):
    p, c = released_prior(vectors), vectors["terms_case"]
    n, w = c["noise"], vectors["sizes"]["weights"]
    q = DiagGaussian(c["mean"].clone().requires_grad_(), c["logvar"].clone().requires_grad_())
    noise = c["eps"], torch.cat([n["z_t"], n["z_top"]]), torch.cat([n["z_next"], n["z_top_next"]]), *n["chain"], n["z0"]
    with path(name), given_noise(*noise, levels=c["random_level"]):
        t = p.terms(q, q.rsample(), labels=c["labels"])
    names = dict(entropy_mask_sum="entropy", ebm_enc="ebm_enc", gauss="gauss", ebm="ebm", mi="mi", cls="cls")
    for k, ours in names.items():
        same(t[ours].mean().item(), c[k], k)
    total = (
        sum(w["w_kl"] * t[k].mean() for k in ("entropy", "ebm_enc", "gauss", "ebm"))
        - w["w_mi"] * t["mi"].mean()
        + w["w_cls"] * t["cls"].mean()
    )
    same(total.item(), c["total"], "total")
    e = p.energy
    got = torch.autograd.grad(total, [q.mean, q.logvar, e.z1.weight, e.head.weight, e.blocks[0].weight])
    for k, g in zip(("mean", "logvar", "z1", "head", "block0"), got, strict=True):
        same(g, c[f"grad_{k}"], f"gradient in {k}")


def test_every_vector_is_used(vectors):
    assert set(vectors) == {"sizes", "energy", "level_table", "energy_case", "chains", "terms_case"}
    assert set(vectors["energy_case"]) == {"t", "z", "logits", "F", "grad"}
    assert all(set(c) == {"level", "start", "noise", "end"} for c in vectors["chains"])
    assert set(vectors["terms_case"]) == {
        "mean",
        "logvar",
        "eps",
        "random_level",
        "labels",
        "noise",
        "entropy_mask_sum",
        "ebm_enc",
        "gauss",
        "ebm",
        "mi",
        "cls",
        "total",
        "grad_mean",
        "grad_logvar",
        "grad_z1",
        "grad_head",
        "grad_block0",
    }


# -- what holds an energy still holds all of it


class Own(Energy):
    "A user's energy, whose `weights()` prepare all, a part, or none of what it uses"

    d, n_levels, n_symbols = 3, 3, 2

    def __init__(self, prepared, dtype=F64):
        super().__init__()
        g = gen(5)
        self.prepared = prepared
        self.first = nn.Parameter(torch.randn(8, 3, generator=g, dtype=dtype))
        self.level = nn.Parameter(torch.randn(3, 8, generator=g, dtype=dtype))
        self.last = nn.Linear(8, 2).to(dtype)
        self.sharp = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        with torch.no_grad():
            for w in self.last.parameters():
                w.copy_(torch.randn(w.shape, generator=g, dtype=dtype))

    def weights(self):
        first = self.first.tanh()
        return dict(
            none=None,
            part=(first,),
            named=dict(first=first, level=self.level),
            all=[first, self.level, self.last.weight, self.last.bias],
        )[self.prepared]

    def logits(self, z, t, context=None, weights=None):
        w = self.weights() if weights is None else weights
        w = {} if w is None else w if isinstance(w, dict) else dict(zip(("first", "level", "weight", "bias"), w))
        h = z @ w.get("first", self.first.tanh()).T + w.get("level", self.level)[t]
        return h.tanh() @ w.get("weight", self.last.weight).T + w.get("bias", self.last.bias)

    def free(self, logits, y=None):
        return self.sharp * super().free(logits, y)  # with a parameter of its own


def own_prior(prepared, objective):
    if objective == "published":
        return DiffusionEBM(
            published_schedule(3),
            Own(prepared),
            PriorCfg(objective="published", reference="flat", n_steps=3, mala=False),
        )
    return DiffusionEBM(consistent_schedule(3), Own(prepared), PriorCfg(n_steps=3))


def gradients(p, names):
    "Of the sum of these terms in the posterior's mean and in every parameter of the energy"
    mean = torch.linspace(-1, 1, 24, dtype=F64).view(8, 3).requires_grad_()
    q = DiagGaussian(mean, torch.full_like(mean, -2.0))
    t = p.terms(q, q.rsample(gen(1)), gen(2))
    got = torch.autograd.grad(sum(t[k].mean() for k in names), [mean, *p.energy.parameters()], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip([mean, *p.energy.parameters()], got)]


@pytest.mark.parametrize("prepared", ["none", "part", "named", "all"])
@pytest.mark.parametrize("objective", ["consistent", "published"])
def test_the_encoders_share_leaves_an_energy_of_ones_own_alone(objective, prepared):
    "The energy gets the contrast's gradient once, the encoder its own, whatever `weights()` prepare"
    p = own_prior(prepared, objective)
    contrast, share = gradients(p, ["ebm"]), gradients(p, ["ebm_enc"])
    assert all((g == 0).all() for g in share[1:]) and share[0].abs().max() > 1e-4
    assert all(g.abs().max() > 1e-6 for g in contrast[1:]) and (contrast[0] == 0).all()
    for g, a, b in zip(gradients(p, ["ebm", "ebm_enc"]), contrast, share):
        assert_close(g, a + b, rtol=1e-12, atol=1e-14)
    for a, b in zip(share, gradients(own_prior("all", objective), ["ebm_enc"])):
        assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_held_energies_are_the_same_energies():
    "Shared, wrapped and spectrally normalised by PyTorch's own means as well"

    class Tied(Energy):
        d, n_levels, n_symbols = 3, 2, 1

        def __init__(self):
            super().__init__()
            self.a = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3).double()).eval()
            self.b = self.a  # one module in two places, and one parameter
            self.also = self.a.bias
            self.c = nn.Parameter(torch.randn(2, 3, generator=gen(1), dtype=F64))

        def logits(self, z, t, context=None, weights=None):
            return -(self.b(self.a(z).tanh()) - self.c[t]).square().sum(-1, keepdim=True)

    t = torch.tensor([0, 1, 1, 0])
    for e in (Tied(), GuidedEnergy(Own("none"), 3.0), Own("part")):
        z = torch.randn(4, 3, generator=gen(2), dtype=F64).requires_grad_()
        F = frozen_free(e, z, t, e.weights())
        assert_close(F, e(z, t), rtol=1e-12, atol=1e-12)
        F.sum().backward()
        assert_close(z.grad, energy_grad(e, z, t)[1], rtol=1e-12, atol=1e-12)
        assert all(w.grad is None and w.requires_grad for w in e.parameters())


# -- clusters


def lloyd(means, starts, dims=3, iterations=20):
    "Whitened, on the sphere, k-means by its definition"
    x = means.double() - means.double().mean(0)
    lam, Q = torch.linalg.eigh(x.T @ x / (len(x) - 1))
    x = nn.functional.normalize((x @ Q / lam.sqrt())[:, -dims:], dim=1)
    centres = x[starts]
    for _ in range(iterations):
        labels = torch.cdist(x, centres).argmin(1)
        centres = torch.stack([x[labels == k].mean(0) for k in range(len(starts))])
    return torch.cdist(x, centres).argmin(1)


def test_clusters_from_given_points_are_k_means_by_its_definition():
    x = torch.randn(900, 7, generator=gen(1)) * torch.arange(1, 8)
    starts = torch.randperm(900, generator=gen(2))[:9]
    got = cluster_targets(x, 9, starts=starts, gen=gen(3))
    assert torch.equal(got, lloyd(x, starts))
    assert torch.equal(got, cluster_targets(x, 9, starts=starts, gen=gen(4))), "nothing left to chance"
    assert not torch.equal(got, lloyd(x, starts, iterations=3)), "it takes its iterations"


NET = "embed=16 hidden=16 d=6 energy_hidden=12 n_blocks=1 langevin_steps=2 T=2 n_symbols=5 batch=32"


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("grammar", max_len=24)


def task(corpus, objective="published", seed=0, settings="", system="ldebm"):
    return TextTask(
        corpus, resolve(TextJob(objective=objective, system=system, steps=20, settings=f"{NET} {settings}")), seed
    )


@pytest.mark.slow
def test_published_clusters_start_from_the_same_sentences_every_epoch(corpus):
    t, seen = task(corpus), []

    def spy(*args, starts=None, **kw):
        seen.append(starts)
        return cluster_targets(*args, starts=starts, **kw)

    with patch.object(text_task, "cluster_targets", spy):
        labels = [t.start_epoch(k, None, gen(k))["labels"] for k in range(3)]
        task(corpus, seed=1).start_epoch(0, None, gen(0))
        task(corpus, "consistent", settings="cls_start=0").start_epoch(0, None, gen(0))
    first, *more, other, consistent = seen
    assert (
        len(first.unique()) == 5
        and all(torch.equal(first, x) for x in more)
        and not torch.equal(first, other)
        and consistent is None
    )
    assert all(torch.equal(labels[0], x) for x in labels[1:]), (
        "the same means, the same numbers: epochs differ in their random streams alone"
    )


@pytest.mark.slow
def test_numbers_of_published_clusters_settle(corpus):
    "While the encoder moves a little, as between two epochs, sentences keep their number"
    t = task(corpus)
    before = t.start_epoch(0, None, gen(1))["labels"]
    with torch.no_grad():
        for w in t.model.encoder.parameters():
            w.mul_(1 + 0.02 * torch.randn(w.shape, generator=gen(2)))
    assert (before == t.start_epoch(1, None, gen(3))["labels"]).double().mean() > 0.7


# -- spectral norms


def moved(net, size, seed):
    with torch.no_grad():
        for k, w in enumerate(net.parameters()):
            w.add_(size * torch.randn(w.shape, generator=gen(seed + k), dtype=F64).to(w.dtype))


@pytest.mark.parametrize("n", [1, 2, 8, 9, 16, 31, 108])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_many_iterations_at_once_are_as_many_single_ones(n, dtype):
    "Of every layer of an energy, with and without a context, and of stacks"
    nets = [EnergyNet(5, 7, 3, hidden=20, n_blocks=2, context_dim=9, gen=gen(1)).to(dtype) for _ in range(2)]
    for net in nets:
        moved(net, 0.3, 4)
    together, singly = nets
    together.power_iterate(n)
    for m in singly.layers():
        m.power_iterate(n)
    tol = 1e-12 if dtype == F64 else 1e-4
    for a, b in zip(together.layers(), singly.layers()):
        assert_close((a.u, a.v), (b.u, b.v), rtol=tol, atol=tol)
    stacks = [Stack(3, (6, 4, 3, 3), gen=gen(2)).to(dtype) for _ in range(2)]
    for s in stacks:
        moved(s, 0.3, 9)
    square_stacks(stacks[:1], n)
    stacks[1].power_iterate(n)
    assert_close((stacks[0].u, stacks[0].v), (stacks[1].u, stacks[1].v), rtol=tol, atol=tol)


def test_layers_without_a_norm_and_of_weight_zero_are_left_alone():
    net = EnergyNet(5, 7, 3, hidden=20, n_blocks=1, free_head=True, gen=gen(1))
    with torch.no_grad():
        net.z2.weight.zero_()
    head = net.head.u.clone()
    net.power_iterate(50)
    assert torch.equal(net.head.u, head) and all(m.u.isfinite().all() and m.v.isfinite().all() for m in net.layers())


@pytest.mark.parametrize("K", [2, 50])
def test_published_makes_as_many_power_iterations_as_the_released_code(corpus, K):
    """One for each pass of its energy in a step

    Two chains, and by hand what `get_ebm_loss`, the encoder's terms, bottleneck and clusters ask"""
    t, n = task(corpus, settings=f"langevin_steps={K}"), []
    with patch.object(EnergyNet, "power_iterate", lambda self, k=1: n.append(k)):
        t.model.before_step()
    assert n == [2 * K + 2 * 2 + 2 + 2]
    for system, objective in (("ldebm", "consistent"), ("svebm-ib", "published"), ("svebm", "consistent")):
        n.clear()
        with patch.object(EnergyNet, "power_iterate", lambda self, k=1: n.append(k)):
            task(corpus, objective, system=system).model.before_step()
        assert n == [1], (system, objective)


def test_published_norms_are_true_ones_while_weights_move():
    "At the published rate, where one iteration a step leaves weights in use some percent too large"
    cfg = PriorCfg(objective="published", reference="flat", n_steps=50)
    off = {}
    for many in (False, True):
        net = EnergyNet(6, 4, 2, hidden=64, n_blocks=2, init=0.1, gen=gen(1))
        p, opt = DiffusionEBM(published_schedule(2), net, cfg), torch.optim.Adam(net.parameters(), 1e-4)
        for k in range(60):
            p.before_step() if many else net.power_iterate()
            z = torch.randn(64, 6, generator=gen(k))
            t = torch.zeros(64, dtype=torch.long)
            opt.zero_grad()
            (net(z, t) - net(z * 0.3 + 1, t)).mean().backward()
            opt.step()
        p.before_step() if many else net.power_iterate()
        off[many] = max(float(torch.linalg.matrix_norm(m.normalised().detach(), 2)) - 1 for m in net.layers())
    assert off[True] < 0.005 and off[False] > 0.03, off


# -- sentences


def test_batches_of_released_ldebm_are_as_wide_as_the_longest_training_sentence(corpus):
    longest = int(corpus["train"].lengths.max())
    assert longest < 24, "shorter than `max_len`"

    def widths(t):
        return {b.ids.shape[1] for b, _ in t.batches(None, gen(0))}

    assert widths(task(corpus)) == widths(task(corpus, system="ldebm-no-gc")) == {longest}
    assert len(widths(task(corpus, system="svebm", settings=""))) > 1, (
        "other released code pads to the longest of the batch"
    )


def test_padding_that_is_generated_ends_a_sentence():
    ids = torch.tensor([[5, 0, 7, 4, 9], [5, 6, 4, 8, 0], [0, 5, 6, 7, 8], [5, 6, 7, 8, 9]])
    assert strip(cut_after(ids, 4), 4) == [[5], [5, 6], [], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("system", ["ldebm", "svebm-ib"])
def test_nll_published_reads_every_sentence_alone(corpus, system):
    "Unpadded, so that its value does not depend on which sentences are scored beside it"
    scored = f"{NET} nll_draws=2 nll_sentences=4 lm=''"
    t = task(corpus, system=system, settings="nll_draws=2 nll_sentences=4 lm=''")
    seen, index = [], torch.tensor([3, 8, 11])

    class Enough(Exception):
        pass

    def gap(*args, **kw):
        raise Enough  # what follows is of no interest here

    encode, replaced = (
        t.model.encode,
        dict(
            text_nll=lambda *args: dict(nll=torch.zeros(3), index=index),
            nll_metric=lambda *args: {},
            exact_gap=lambda *args: {},
            sampled_gap=gap,
            prior_hole=gap,
        ),
    )
    with ExitStack() as stack:
        for name, what in replaced.items():
            stack.enter_context(patch.object(text_score, name, what))
        stack.enter_context(patch.object(t.model, "encode", lambda b: seen.append(b.ids) or encode(b)))
        with pytest.raises(Enough):
            text_score.score(t, TextJob(objective="published", system=system, settings=scored), [], None)
    alone = [x.shape[1] for x in seen if len(x) == 1]
    assert alone == corpus["test"].lengths[index].tolist()


# -- the bound, whose log Z the released code leaves out


def test_kl_is_that_of_normalised_levels():
    "Quadratic energies, whose log Z is known: along one path, with its sign"
    T, d, n, B = 3, 2, 20_000, 6
    g = gen(3)
    A = torch.stack([torch.diag(0.2 + torch.rand(d, generator=g, dtype=F64)) for _ in range(T)])
    e = QuadraticEnergy(A, torch.randn(T, d, generator=g, dtype=F64))
    p = DiffusionEBM(consistent_schedule(T), e, PriorCfg())
    q = DiagGaussian(torch.randn(B, d, generator=g, dtype=F64), torch.full((B, d), -2.0, dtype=F64))
    z = q.rsample(g)
    zs = schedule.diffuse_path(p.schedule, z, gen(4))
    with patch.object(levels, "diffuse_path", lambda *args: zs), torch.no_grad():
        got, worth = p.kl(q, z, gen(5), n=n)
        want = q.kl_standard().sum(-1)
        for k in range(T):
            t = torch.full((B,), k)
            m, v = p.tilted_gaussian(zs[k + 1], t)
            log_z = e.tilt(m, float(v[0]), k)[2]
            assert log_z.abs().max() > 0.05
            want = want - e(zs[k], t) + log_z
    assert worth.min() > n / 20
    assert_close(got, want, rtol=0, atol=0.05)
