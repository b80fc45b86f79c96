"`stats` against closed forms, independent implementations and simulated coverage"

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.testing import assert_close

from ldebm import stats as st
from ldebm import two_samples as two
from ldebm.core import make_gen
from ldebm.toys import TOYS, pinwheel
from ldebm.two_samples import kernel, mmd, mmd2, mmd_test


def value(m):
    return m["value"]


def normal(n, d, *stream):
    return torch.randn(n, d, generator=make_gen(0, *stream), dtype=torch.float64)


# --- intervals


def test_wilson_interval_against_known_values():
    lo, hi = st.wilson_interval(8, 10)
    assert (lo, hi) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert st.wilson_interval(0, 10)[0] == 0 and st.wilson_interval(10, 10)[1] == 1 and st.wilson_interval(0, 0) is None


def test_mean_interval_covers():
    v = torch.randn(1000, 50, generator=make_gen(0, "v")).double() + 3
    hits = sum(lo <= 3 <= hi for lo, hi in map(st.mean_interval, v.numpy()))
    assert abs(hits / 1000 - 0.95) < 5 * math.sqrt(0.05 * 0.95 / 1000)
    assert st.mean_interval([1.0]) is None


def test_weights_by_hand():
    w = torch.tensor([[1.0, 1.0], [1.0, 3.0], [1.0, 0.0]], dtype=torch.float64).log()
    assert st.log_mean_exp(w).exp().tolist() == pytest.approx([1, 4 / 3]) and st.log_mean_exp(w.T, 1).equal(
        st.log_mean_exp(w)
    )
    assert st.effective(w).tolist() == pytest.approx([3, 16 / 10]) and st.effective(w.float()).dtype == torch.float32
    far = w - 1000
    assert_close(st.log_mean_exp(far), st.log_mean_exp(w) - 1000)
    assert_close(st.effective(far), st.effective(w))


def test_weights_without_any_weight():
    none = torch.full((5, 2), -math.inf)
    assert st.effective(none).tolist() == [1, 1] and (st.log_mean_exp(none) == -math.inf).all()


def test_share_metric():
    m = st.share_metric(3, 4, "share")
    assert (m["value"], m["n"], m["estimator"]) == (0.75, 4, "share") and tuple(m["interval"]) == st.wilson_interval(
        3, 4
    )
    none = st.share_metric(0, 0, "share")
    assert none["value"] is none["interval"] is None and none["n"] == 0


def test_clustered_share():
    "Words that come in runs: Wilson's interval for all words would promise far too much"

    def draw(i):
        g = make_gen(0, "runs", i)
        t = torch.randint(1, 20, (60,), generator=g)
        p = torch.where(torch.rand(60, generator=g) < 0.3, 0.9, 0.1)
        return torch.binomial(t.double(), p.double(), generator=g).numpy(), t.numpy()

    truth = 0.3 * 0.9 + 0.7 * 0.1

    def inside(interval):
        return interval[0] <= truth <= interval[1]

    hits = sum(inside(st.clustered_share(*draw(i), "x")["interval"]) for i in range(400))
    naive = sum(inside(st.wilson_interval(int(h.sum()), int(t.sum()))) for h, t in map(draw, range(400)))
    assert 0.91 * 400 <= hits <= 0.985 * 400 and naive < 0.8 * 400
    m = st.clustered_share([1, 0, 0], [2, 0, 2], "x")
    assert (value(m), m["n"]) == (0.25, 2)
    assert st.clustered_share([], [], "x")["value"] is None and st.clustered_share([0], [0], "x")["interval"] is None
    assert st.clustered_share([5], [5], "x")["interval"] == list(st.wilson_interval(1, 1))  # one sentence is one trial
    one = st.clustered_share(np.arange(100) % 2, np.ones(100), "x")  # a trial an item
    assert one["interval"] == pytest.approx(st.wilson_interval(50, 100), abs=2e-3)


def test_resampling():
    w = st.resample_counts(30, 2000, make_gen(0, "w"))
    assert w.shape == (2000, 30) and (w.sum(1) == 30).all()
    assert abs(w.mean(0) - 1).max() < 5 / 2000**0.5 and abs(w.var(0) - (1 - 1 / 30)).max() < 0.2  # multinomial
    assert (w == st.resample_counts(30, 2000, make_gen(0, "w"))).all()
    assert st.bootstrap_interval(0.1, [0.0, 1.0, 0.0, 1.0], lo=0.0, hi=1.0) == (0.0, 1.0)
    lo, hi = st.bootstrap_interval(5.0, [4.0, 6.0])
    assert (lo, hi) == pytest.approx((5 - 1.959964 * 2**0.5, 5 + 1.959964 * 2**0.5))


def test_jackknife_of_a_mean_is_the_normal_interval():
    v = normal(50, 1, "v")[:, 0].numpy()
    assert st.jackknife_interval(v.mean(), (v.sum() - v) / 49) == pytest.approx(st.mean_interval(v), abs=1e-12)
    assert st.jackknife_interval(1.0, [1.0]) is None
    assert st.jackknife_interval(0.5, np.array([0.0, 1.0]), lo=0.0, hi=1.0) == (0.0, 1.0)
    two = [normal(50, 1, "v")[:, 0].numpy(), normal(20, 1, "w")[:, 0].numpy()]  # a difference of means
    lo, hi = st.jackknife_interval(0.0, *[(v.sum() - v) / (len(v) - 1) for v in two])
    assert (hi - lo) / 2 / 1.959964 == pytest.approx(sum(v.var(ddof=1) / len(v) for v in two) ** 0.5)


# --- ranking


def test_auroc_by_hand_and_against_sklearn():
    assert value(two.auroc([2, 2], [2, 2])) == 0.5
    assert value(two.auroc([3, 1], [2])) == 0.5
    assert value(two.auroc([1, 1, 0], [1, 0])) == pytest.approx((0.5 + 1 + 0.5 + 1 + 0 + 0.5) / 6)
    for seed in range(3):
        i, o = (
            normal(57, 1, "i", seed)[:, 0].mul(3).round(),
            normal(80, 1, "o", seed)[:, 0].mul(3).round() - 1,
        )  # many ties
        y, s = np.r_[np.ones(57), np.zeros(80)], torch.cat([i, o]).numpy()
        assert value(two.auroc(i, o)) == pytest.approx(roc_auc_score(y, s))
        assert value(two.auroc(-i, -o)) == pytest.approx(1 - roc_auc_score(y, s))
        assert value(two.aupr(i, o)) == pytest.approx(average_precision_score(y, s))
    assert (
        two.aupr(i, o, make_gen(0))["interval"][0] < value(two.aupr(i, o)) < two.aupr(i, o, make_gen(0))["interval"][1]
    )
    for bad in ([], [float("inf")], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            two.auroc(bad, [0.0])


def test_auroc_interval():
    for a in (0.0, 0.2, 0.5, 0.76, 0.99, 1.0):
        lo, hi = st.auroc_interval(a, 50, 70)
        assert 0 <= lo <= a <= hi <= 1 and 0.02 < hi - lo < 0.25
        l2, h2 = st.auroc_interval(1 - a, 50, 70)
        assert (1 - h2, 1 - l2) == pytest.approx((lo, hi))
        w = st.auroc_interval(a, 500, 700)
        assert w[1] - w[0] < hi - lo
    lo, hi = st.auroc_interval(0.5, 100, 100)
    assert (hi - lo) / 2 == pytest.approx(
        1.96 * math.sqrt(0.25 * (1 + 99 * 2 / 3) / 1e4), rel=0.06
    )  # Hanley & McNeil's standard error at a half


# --- two-sample AUROC


def test_two_sample_auroc():
    n, d = 400, 6
    L = torch.linalg.cholesky(0.85 * torch.ones(d, d) + 0.15 * torch.eye(d)).double()
    modes = 0.95 * normal(n, d, "m").sign() + math.sqrt(1 - 0.95**2) * normal(
        n, d, "m2"
    )  # mean 0, variance 1, uncorrelated
    a = normal(n, d, "a")

    def run(b, **kw):
        return value(two.two_sample_auroc(a, b, make_gen(0, "c"), **kw))

    same = run(normal(n, d, "b"))
    assert abs(same - 0.5) < 0.07
    assert run(2 * normal(n, d, "s")) > 0.9
    assert run(normal(n, d, "c") @ L.T) > 0.9
    assert run(modes) > 0.9
    assert run(normal(n, d, "sh") + 1) > 0.9
    assert 0.55 < run(1.2 * normal(n, d, "w")) < 0.8
    assert run(normal(n, d, "b")) == same  # the generator decides


def test_two_sample_auroc_many_dimensions_and_points():
    a, b = normal(300, 100, "a"), normal(400, 100, "b")
    m = two.two_sample_auroc(a, 1.1 * b, make_gen(0), n_folds=3, max_dim=8, max_n=250)
    assert m["n"] == 500 and "reduced to 8" in m["estimator"] and m["value"] > 0.75  # the norm tells
    assert abs(value(two.two_sample_auroc(a, b, make_gen(0), n_folds=3, max_dim=8)) - 0.5) < 0.1
    with pytest.raises(ValueError, match="at least 20"):
        two.two_sample_auroc(a[:19], b, make_gen(0))
    with pytest.raises(ValueError, match="compared"):
        two.two_sample_auroc(a, b[:, :5], make_gen(0))


# --- MMD


def test_mmd_tells_laws_apart_and_no_more():
    g = make_gen(6)
    a, b, c = pinwheel(400, g), pinwheel(400, g), TOYS["gaussians16"].sample(400, g)
    assert mmd(a, c) > 3 * mmd(a, b)
    assert mmd_test(a, c, g)[1] < 0.01 < mmd_test(a, b, g)[1]
    assert abs(mmd2(a, b)) < mmd2(a, c) / 5
    assert mmd(a, a) < 1e-4
    assert_close(mmd2(a, c, 0.5, chunk=33), mmd2(a, c, (0.5,)), rtol=1e-9, atol=0)
    k = kernel(a, a).double()
    off = (k.sum() - k.diagonal().sum()) / (400 * 399)
    kc = kernel(c, c).double()
    assert_close(
        mmd2(a, c),
        off + (kc.sum() - kc.diagonal().sum()) / (400 * 399) - 2 * kernel(a, c).double().mean(),
        rtol=1e-5,
        atol=1e-8,
    )
    with pytest.raises(ValueError, match="at least two points"):
        mmd2(a, a[:1])


def test_latent_mmd():
    a, b = normal(500, 8, "a"), normal(500, 8, "b")
    same, wide = two.latent_mmd(a, b), two.latent_mmd(a, 2 * b)
    assert abs(value(same)) < 2e-3 < 20 * 2e-3 < value(wide)

    def naive(x, y):
        return sum(torch.exp(-(torch.cdist(x, y) ** 2) / (2 * h * h * 8)) for h in (0.25, 0.5, 1, 2, 4)) / 5

    def off(K):
        return (K.sum() - K.trace()) / (len(K) * (len(K) - 1))

    assert value(wide) == pytest.approx(
        float(off(naive(a, a)) + off(naive(2 * b, 2 * b)) - 2 * naive(a, 2 * b).mean()), abs=1e-6
    )
    assert value(wide) == pytest.approx(float(two.mmd2(a, 2 * b, [h * 8**0.5 for h in two.BANDWIDTHS])), abs=1e-9)
    assert same["interval"][0] < 0 < same["interval"][1] and wide["interval"][0] > 0.5 * value(wide)
    few = two.latent_mmd(a[:40], 2 * b[:30], chunk=7)  # the jackknife by definition
    widths = [h * 8**0.5 for h in two.BANDWIDTHS]

    def drop(x, i):
        return torch.cat([x[:i], x[i + 1 :]])

    out = [
        [float(two.mmd2(drop(a[:40], i), 2 * b[:30], widths)) for i in range(40)],
        [float(two.mmd2(a[:40], 2 * drop(b[:30], i), widths)) for i in range(30)],
    ]
    assert few["interval"] == pytest.approx(list(st.jackknife_interval(value(few), *out)), abs=1e-9)
    assert two.latent_mmd(a[:2], b[:2])["interval"] is None
    with pytest.raises(ValueError, match="at least two points"):
        two.latent_mmd(a, b[:1])


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_latent_mmd_interval_covers(scale):
    def draw(i):
        return (normal(60, 3, "a", i), scale * normal(50, 3, "b", i))

    ms = [two.latent_mmd(*draw(i)) for i in range(300)]
    truth = np.mean([value(m) for m in ms])  # unbiased
    if scale == 1:
        assert abs(truth) < 5 * np.std([value(m) for m in ms]) / 300**0.5
    hits = sum(m["interval"][0] <= truth <= m["interval"][1] for m in ms)
    assert 0.92 * 300 <= hits  # conservative, more so for equal laws
