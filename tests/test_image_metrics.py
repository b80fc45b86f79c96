"`image_metrics` against closed forms, independent implementations and hand counts, with negative controls"

import builtins
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torch.testing import assert_close

from ldebm import image_metrics as im
from ldebm.core import make_gen
from ldebm.image_sets import load_images


def value(m):
    return m["value"]


def normal(n, d, *stream):
    return torch.randn(n, d, generator=make_gen(0, *stream), dtype=torch.float64)


# --- Fréchet distance


def spd(d, seed, rank=None):
    A = normal(d, rank or d, "spd", seed)
    return A @ A.T


@pytest.mark.parametrize("d", [1, 2, 7])
def test_frechet_moments_against_scipy(d):
    ma, mb, Sa, Sb = normal(d, 1, "a")[:, 0], normal(d, 1, "b")[:, 0], spd(d, 1), spd(d, 2)
    want = float(((ma - mb) ** 2).sum() + Sa.trace() + Sb.trace() - 2 * np.trace(sqrtm((Sa @ Sb).numpy()).real))
    assert im.frechet_moments(ma, Sa, mb, Sb) == pytest.approx(want, rel=1e-8)
    if d == 1:
        assert want == pytest.approx(float((ma - mb) ** 2 + (Sa.sqrt() - Sb.sqrt()) ** 2))


def test_frechet_is_the_formula_of_sample_moments():
    a, b = normal(500, 6, "a") @ spd(6, 1), normal(300, 6, "b") + 1
    Sa, Sb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    want = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.trace(Sa) + np.trace(Sb) - 2 * np.trace(sqrtm(Sa @ Sb).real)
    assert im.frechet(a, b) == pytest.approx(want, rel=1e-6)
    assert im.frechet(a.float(), b.float()) == pytest.approx(want, rel=1e-4)
    assert im.frechet(b, a) == pytest.approx(im.frechet(a, b), rel=1e-9)


def test_frechet_of_gaussians_converges_to_the_law():
    la, lb = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([1.0, 1.0, 1.0]).double()
    a, b = normal(200_000, 3, "a") * la.sqrt(), normal(200_000, 3, "b") * lb.sqrt() + torch.tensor([0.0, 2.0, 0.0])
    assert im.frechet(a, b) == pytest.approx(4 + 1 + 0.25, abs=0.05)


def test_frechet_singular():
    "Dead features, and samples on a line: the distance still equals the formula in the live dimensions"
    a, b = normal(400, 4, "a"), 2 * normal(400, 4, "b")

    def pad(x):
        return torch.cat([x, torch.zeros(400, 3, dtype=torch.float64), torch.ones(400, 1, dtype=torch.float64)], 1)

    assert im.frechet(pad(a), pad(b)) == pytest.approx(im.frechet(a, b), abs=1e-6)
    assert im.frechet(pad(a), pad(a)) < 1e-9
    assert im.frechet(pad(a).float() * 1e3, pad(a).float() * 1e3) < 1e-5
    u, v = normal(1, 4, "u"), normal(100, 1, "v")
    line = v @ u  # rank one
    assert im.frechet(line, 3 * line) == pytest.approx(
        float(((line.mean(0) * 2) ** 2).sum() + 4 * line.var(0).sum()), abs=1e-6
    )


def test_frechet_rotation_shift_scale():
    a, b = normal(300, 5, "a"), normal(300, 5, "b") @ spd(5, 3)
    Q, t = torch.linalg.qr(normal(5, 5, "q")).Q, normal(1, 5, "t")
    f = im.frechet(a, b)
    assert im.frechet(a @ Q + t, b @ Q + t) == pytest.approx(f, rel=1e-9)
    assert im.frechet(3 * a, 3 * b) == pytest.approx(9 * f, rel=1e-9)
    assert im.frechet(a[:, [0, 1, 2, 4, 3]], b) != pytest.approx(f, rel=1e-3)  # rotating one of them does matter


def test_frechet_errors():
    a = normal(10, 4, "a")
    with pytest.raises(ValueError, match="at least 5"):
        im.frechet(a[:4], a)
    with pytest.raises(ValueError, match="compared"):
        im.frechet(a, a[:, :3])
    with pytest.raises(ValueError, match="compared"):
        im.frechet(a[0], a)
    im.frechet(a[:5], a)


def test_frechet_metric_interval():
    "The bootstrap's spread is the spread over fresh samples, and without a generator there is none"

    def draw(i):
        return (normal(300, 4, "a", i), 1.5 * normal(300, 4, "b", i) + 0.5)

    m = im.frechet_metric(*draw(0), make_gen(0, "boot"))
    sd = np.std([im.frechet(*draw(i)) for i in range(1, 200)])
    half = (m["interval"][1] - m["interval"][0]) / 2 / 1.96
    assert 0.75 < half / sd < 1.35
    assert m["interval"][0] <= m["value"] <= m["interval"][1] and m["n"] == 300
    assert m == im.frechet_metric(*draw(0), make_gen(0, "boot"))
    assert im.frechet_metric(*draw(0))["interval"] is None


def test_gap_closed():
    assert im.gap_closed(0.24, 12.31, 3.75) == pytest.approx((12.31 - 3.75) / (12.31 - 0.24))
    assert im.gap_closed(dict(value=1.0), dict(value=3.0), dict(value=4.0)) == -0.5
    assert im.gap_closed(1.0, 1.0, 0.0) is None


# --- density and coverage


def naive_dc(real, fake, k):
    D = np.linalg.norm(real[:, None] - real[None], axis=-1)
    r = np.sort(D, 1)[:, k]
    inside = np.linalg.norm(real[:, None] - fake[None], axis=-1) < r[:, None]
    return inside.sum() / (k * len(fake)), inside.any(1).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_coverage_against_naive(k):
    real, fake = normal(120, 3, "r"), 1.3 * normal(90, 3, "f")
    dc = im.density_coverage(real, fake, k, chunk=17)
    want = naive_dc(real.numpy(), fake.numpy(), k)
    assert (value(dc["density"]), value(dc["coverage"])) == pytest.approx(want)


def test_density_coverage_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # k=1 radii 1, 1, 2, 4
    assert im.knn_radii(real, 1).tolist() == [1, 1, 2, 4]
    assert im.knn_radii(real, 2).tolist() == [3, 2, 3, 6]
    dc = im.density_coverage(real, torch.tensor([[0.5], [4.0], [100.0]]), k=1)  # 0.5: balls of 0, 1; 4: of 3, 7
    assert value(dc["density"]) == pytest.approx(4 / 3) and value(dc["coverage"]) == 1
    dc = im.density_coverage(real, torch.tensor([[100.0]]), k=1)
    assert value(dc["density"]) == value(dc["coverage"]) == 0
    with pytest.raises(ValueError, match="k must lie in 1..3"):
        im.density_coverage(real, real, k=4)
    with pytest.raises(ValueError, match="compared"):
        im.density_coverage(real, torch.zeros(3, 2))


def test_density_of_equal_laws_is_one():
    d = [value(im.density_coverage(normal(400, 2, "r", i), normal(400, 2, "f", i))["density"]) for i in range(10)]
    assert np.mean(d) == pytest.approx(1, abs=0.08)  # in expectation, Naeem et al. (2020), Lemma 1


def test_precision_recall_by_hand():
    real, fake = (
        torch.tensor([[0.0], [1.0], [10.0]]),
        torch.tensor([[0.5], [0.6], [50.0]]),
    )  # k=1 radii: real 1, 1, 9; fake .1, .1, 49.4
    pr = im.precision_recall(real, fake, k=1)
    assert value(pr["precision"]) == pytest.approx(2 / 3)  # 50 is in no real ball
    assert value(pr["recall"]) == pytest.approx(2 / 3)  # only the ball of 50, from 0.6 on, holds 1 and 10


# --- latents


def test_spread():
    a = normal(500, 8, "a")
    s = im.spread(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    assert s == pytest.approx(dict(std=1.0, std_min=0.0, std_max=math.sqrt(2), mean_abs=1.0, mean_max=1.0))
    assert im.spread_ratio(3 * a, a) == pytest.approx(3)
    with pytest.raises(ValueError):
        im.spread(a[:1])


# --- classes


def test_class_metrics():
    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q))

    m = im.class_histogram_kl(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2, 2]), 3)
    assert value(m) == pytest.approx(kl([2.5 / 4.5, 1.5 / 4.5, 0.5 / 4.5], [1.5 / 5.5, 1.5 / 5.5, 2.5 / 5.5]))
    assert value(im.class_histogram_kl(torch.arange(3), torch.arange(3), 3)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="0..1"):
        im.class_histogram_kl(torch.tensor([2]), torch.tensor([0]), 2)
    real, y = normal(60, 2, "r"), torch.arange(60) % 3
    real += 10 * y[:, None]
    out = im.class_coverage(real, y, real[y != 2] + 0.01, y[y != 2])
    assert list(out) == [0, 1, 2]
    assert value(out[0]["coverage"]) == 1 and value(out[2]["coverage"]) == 0 and value(out[2]["density"]) is None
    swapped = im.class_coverage(real, y, real + 0.01, (y + 1) % 3)
    assert all(value(v["coverage"]) == 0 for v in swapped.values())  # good pictures of the wrong class cover nothing


# --- Inception


class Tiny(nn.Module):
    "Stands in for InceptionV3"

    num_features = 6

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(normal(3 * 4, 6, "tiny").float())

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1) @ self.w


def test_fid_with_own_network():
    a, b = (torch.rand(60, 1, 8, 8, generator=make_gen(i)) for i in (0, 1))
    net = Tiny()
    f = im.inception_features(a, net, chunk=7)
    assert f.shape == (60, 6) and not f.requires_grad
    assert value(im.fid(a, b, net)) == pytest.approx(im.frechet(f, im.inception_features(b, net)))
    assert im.inception(net) is net
    digits = load_images("digits")["valid"].subset(slice(0, 20))
    assert_close(im.inception_features(digits, net), im.inception_features(digits.x(), net))


def test_frechet_agrees_with_torchmetrics():
    tm = pytest.importorskip("torchmetrics.image.fid")
    a, b = (torch.rand(80, 3, 8, 8, generator=make_gen(i)).pow(i + 1) for i in (0, 1))
    net = Tiny()
    other = tm.FrechetInceptionDistance(feature=net, input_img_size=(3, 8, 8))

    def eight(x):
        return (x * 255).round().to(torch.uint8)

    other.update(eight(a), real=True)
    other.update(eight(b), real=False)
    assert value(im.fid(a, b, net)) == pytest.approx(float(other.compute()), rel=1e-3)


def test_inception_without_torchmetrics(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kw):
        if name.startswith("torchmetrics"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install .*ldebm\[fid\]"):
        im.inception_features(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    "error,raised,match",
    [
        (ModuleNotFoundError("torch-fidelity"), ImportError, "torch-fidelity"),
        (OSError("no route to host"), RuntimeError, "could not be downloaded .*no route"),
    ],
)
def test_inception_that_cannot_be_built(monkeypatch, error, raised, match):
    import sys
    import types

    class Fid:
        def __init__(self, **kw):
            raise error

    mods = {k: types.ModuleType(k) for k in ("torchmetrics", "torchmetrics.image", "torchmetrics.image.fid")}
    mods["torchmetrics.image.fid"].FrechetInceptionDistance = Fid
    for k, m in mods.items():
        monkeypatch.setitem(sys.modules, k, m)
    with pytest.raises(raised, match=match):
        im.inception()
