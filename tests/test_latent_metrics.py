"`latent_metrics` against independent implementations, bad input, and the published reference values on real data"

import math

import numpy as np
import pytest
import torch

from ldebm import latent_metrics as lat
from ldebm.core import make_gen


def value(m):
    return m["value"]


def width(m):
    return m["interval"][1] - m["interval"][0]


# --- symbols


def test_mutual_information_is_stable_and_bounded():
    extreme = torch.tensor([[1e4, 0.0], [0.0, 1e4], [-1e4, -1e4 + 1e-3]])
    m = lat.mutual_information(extreme)
    assert math.isfinite(m["value"]) and 0 < m["value"] < math.log(2)
    assert value(lat.mutual_information(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), probs=True)) == pytest.approx(
        math.log(2)
    )
    assert value(lat.effective_symbols(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), probs=True)) == pytest.approx(1)
    assert value(lat.mutual_information(torch.full((10, 5), 3.0))) == pytest.approx(0, abs=1e-12)
    x = torch.randn(500, 8, generator=make_gen(0, "x"))
    shifted = x + 100 * torch.randn(500, 1, generator=make_gen(1, "x"))
    assert value(lat.mutual_information(shifted)) == pytest.approx(value(lat.mutual_information(x)), abs=1e-4)
    for bad in (torch.tensor([[float("nan"), 0.0]]), torch.zeros(0, 3), torch.zeros(4)):
        with pytest.raises(ValueError):
            lat.mutual_information(bad)
    with pytest.raises(ValueError):
        lat.mutual_information(torch.tensor([[0.5, 0.6]]), probs=True)


def test_mutual_information_interval_covers():
    "Sentences of a known law p(k|x): the interval of 400 holds the value of very many, as often as it says"

    def draw(n, i):
        return 2 * torch.randn(n, 6, generator=make_gen(0, "law", i))

    truth = value(lat.mutual_information(draw(200_000, 0)))
    hits = sum(
        lo <= truth <= hi for lo, hi in (lat.mutual_information(draw(400, i))["interval"] for i in range(1, 201))
    )
    assert 0.90 * 200 <= hits <= 200


def test_mutual_information_per_batch():
    x = 5 * torch.randn(300, 12, generator=make_gen(0, "x"))
    m = lat.mutual_information_per_batch(x, 128)
    v = [value(lat.mutual_information(x[i : i + 128])) for i in (0, 128)]
    assert value(m) == pytest.approx(np.mean(v)) and m["n"] == 256
    assert value(m) < value(lat.mutual_information(x[:256]))  # concavity
    one = torch.eye(50) * 1e4
    assert value(lat.mutual_information_per_batch(one, 10)) == pytest.approx(math.log(10))  # the cap
    with pytest.raises(ValueError, match="do not fill"):
        lat.mutual_information_per_batch(x, 301)


def test_numbers_of_symbols_have_intervals():
    def draw(i):
        return torch.randn(150, 40, generator=make_gen(0, "symbols", i)) * 3 - 0.2 * torch.arange(40)

    for f, least in ((lat.active_symbols, 70), (lat.effective_symbols, 68)):
        ms = [f(draw(i)) for i in range(80)]
        truth = np.mean([value(m) for m in ms])
        assert sum(m["interval"][0] <= truth <= m["interval"][1] for m in ms) >= least
        assert width(ms[0]) < 0.5 * truth
    assert lat.active_symbols(torch.eye(3))["interval"] == [3, 3]  # each seen once, leaving out any changes the same
    assert lat.effective_symbols(torch.zeros(10, 3))["interval"] == pytest.approx([3, 3])


def test_homogeneity_against_its_formula_and_chance():
    a = torch.randint(4, (3000,), generator=make_gen(0, "a"))
    c = torch.where(
        torch.rand(3000, generator=make_gen(0, "u")) < 0.7, a, torch.randint(10, (3000,), generator=make_gen(0, "c"))
    )
    joint = (
        torch.zeros(4, 10, dtype=torch.double).index_put_((a, c), torch.ones(3000, dtype=torch.double), accumulate=True)
        / 3000
    )

    def H(p):
        return -(p[p > 0] * p[p > 0].log()).sum().item()

    m = lat.homogeneity(a, c, make_gen(0, "p"), "topic")
    assert set(m) == {"homogeneity_topic", "homogeneity_topic_chance"}
    assert value(m["homogeneity_topic"]) == pytest.approx(1 - (H(joint) - H(joint.sum(0))) / H(joint.sum(1)), abs=1e-9)
    assert value(m["homogeneity_topic_chance"]) == pytest.approx(
        3 * 9 / (2 * 3000) / H(joint.sum(1)), rel=0.4
    )  # chi-squared, 3*9 dof
    x = lat.ami(a, c, make_gen(0, "p"))
    assert abs(value(x["ami_chance"])) < 0.005 and 0.2 < value(x["ami"]) < 1
    assert value(lat.ami(a, (a + 2) % 4, make_gen(0, "p"))["ami"]) == pytest.approx(1)  # names of symbols do not matter
    assert lat.homogeneity(a.tolist(), c.numpy(), make_gen(0, "p"), "topic") == m
    with pytest.raises(ValueError):
        lat.homogeneity(a, c[:-1], make_gen(0, "p"))
    with pytest.raises(ValueError):
        lat.homogeneity_per_batch(a[:100], c[:100], make_gen(0, "p"))


@pytest.mark.parametrize("shape", [(1, 3), (4, 9), (7, 1), (5, 5)])
def test_cluster_scores_against_sklearn(shape):
    from sklearn.metrics import homogeneity_score, v_measure_score

    for n in (5, 60, 400):
        a, c = (torch.randint(k, (n,), generator=make_gen(0, "codes", n, i)) + 3 for i, k in enumerate(shape))
        assert value(lat.homogeneity(a, c, make_gen(0))["homogeneity"]) == pytest.approx(
            homogeneity_score(a, c), abs=1e-9
        )
        assert value(lat.v_measure(a, c, make_gen(0))["v_measure"]) == pytest.approx(v_measure_score(a, c), abs=1e-9)
        if n < 60:
            continue
        want = [homogeneity_score(a[i : i + 20], c[i : i + 20]) for i in range(0, n, 20)]
        assert value(
            lat.homogeneity_per_batch(a, c, make_gen(0), batch_size=20)["homogeneity_per_batch"]
        ) == pytest.approx(np.mean(want), abs=1e-9)


@pytest.mark.parametrize("f, name", [(lat.homogeneity, "homogeneity"), (lat.v_measure, "v_measure"), (lat.ami, "ami")])
def test_intervals_of_cluster_scores(f, name):
    def draw(i):
        a = torch.randint(4, (600,), generator=make_gen(0, "a", i))
        return a, torch.where(
            torch.rand(600, generator=make_gen(0, "u", i)) < 0.6,
            a,
            torch.randint(12, (600,), generator=make_gen(0, "c", i)),
        )

    ms = [f(*draw(i), make_gen(0, "p", i), n_perm=1)[name] for i in range(25)]
    values = [value(f(*draw(i), make_gen(0, "p", i), n_perm=1, n_boot=0)[name]) for i in range(200)]
    truth, sd = np.mean(values), np.std(values, ddof=1)
    assert 0.8 < np.mean([width(m) for m in ms]) / (2 * 1.96 * sd) < 1.25  # a standard deviation from 200, to 5 %
    assert sum(m["interval"][0] <= truth <= m["interval"][1] for m in ms) > 25 * (0.95 - 5 * (0.95 * 0.05 / 25) ** 0.5)
    none = f(*draw(0), make_gen(0), n_perm=2, n_boot=0)[name]
    assert none["interval"] is None and "no interval" in none["estimator"]


@pytest.mark.data
@pytest.mark.parametrize(
    "batch, want",
    [
        (30, (0.59, 0.63, 0.91, 0.91)),
        (50, (0.44, 0.50, 0.86, 0.88)),
        (128, (0.21, 0.31, 0.69, 0.73)),
        (None, (0.00, 0.01, 0.02, 0.07)),
    ],
)
def test_random_homogeneity_on_dailydialog(ldebm_data, batch, want):
    "Symbols that know nothing, on the test labels in file order: 20 symbols act, emotion; 125 symbols act, emotion"
    labels = {
        k: (ldebm_data / "dailydialog" / "test" / f"dialogues_{k}_test.txt").read_text().split()
        for k in ("act", "emotion")
    }
    got = [
        value(lat.random_homogeneity(labels[a], k, make_gen(0, "random", k), batch, n_rep=3))
        for k in (20, 125)
        for a in ("act", "emotion")
    ]
    assert got == pytest.approx(want, abs=0.02)


def test_random_homogeneity():
    a = torch.randint(4, (1000,), generator=make_gen(0, "a"))
    m = lat.random_homogeneity(a, 50, make_gen(0, "r"))
    assert (
        value(m) == pytest.approx(3 * 49 / (2 * 1000) / math.log(4), rel=0.2)
        and m["interval"][0] < value(m) < m["interval"][1]
    )  # chi-squared
    assert value(lat.random_homogeneity(a, 50, make_gen(0, "r"), 30)) > 0.6
    with pytest.raises(ValueError, match="do not fill"):
        lat.random_homogeneity(a[:20], 5, make_gen(0), 30)


@pytest.mark.data
@pytest.mark.parametrize(
    "k, batch, act, emotion",
    [
        (125, 128, 0.698, 0.726),
        (60, 128, 0.502, 0.567),
        (51, 128, 0.453, 0.521),
        (20, 128, 0.200, 0.307),
        (11, 128, 0.109, 0.193),
        (11, 30, 0.402, 0.474),
        (125, None, 0.020, 0.073),
        (60, None, 0.010, 0.037),
        (51, None, 0.009, 0.035),
        (20, None, 0.003, 0.009),
        (11, None, 0.001, 0.007),
    ],
)
def test_chance_levels_on_dailydialog(ldebm_data, k, batch, act, emotion):
    for name, want in (("act", act), ("emotion", emotion)):
        labels = np.array(
            (ldebm_data / "dailydialog" / "test" / f"dialogues_{name}_test.txt").read_text().split(), dtype=int
        )
        assert len(labels) == 7740
        clusters = torch.randint(k, (len(labels),), generator=make_gen(0, "random clusters", k))
        if batch is None:
            got = lat.homogeneity(labels, clusters, make_gen(0, "p"), n_perm=3)
        else:
            got = lat.homogeneity_per_batch(labels, clusters, make_gen(0, "p"), batch_size=batch, n_perm=1)
        tolerance = (
            0.02 if batch else max(0.003, 0.3 * want)
        )  # over the whole set the reference's draw and ours both scatter by 8 %
        for m in got.values():
            assert value(m) == pytest.approx(want, abs=tolerance)  # score of random clusters, and its chance level


# --- the rest


def test_active_units():
    mu = torch.randn(500, 3, generator=make_gen(0, "mu")) * torch.tensor([1.0, 0.11, 0.09])
    assert value(lat.active_units(mu)) == 2
    assert value(lat.active_units(mu + 100)) == 2
    for bad in (mu[:1], mu[0], mu * float("nan")):
        with pytest.raises(ValueError):
            lat.active_units(bad)


def test_active_units_interval():
    def draw(i):
        return torch.randn(400, 5, generator=make_gen(0, "mu", i)) * torch.tensor([1.0, 0.105, 0.1, 0.095, 0.01])

    ms = [lat.active_units(draw(i), gen=make_gen(0, "b", i)) for i in range(60)]
    assert all(m["interval"][0] <= value(m) <= m["interval"][1] for m in ms)
    assert sum(m["interval"][0] <= 2.5 <= m["interval"][1] for m in ms) >= 50  # the truth: two and a half
    sure = lat.active_units(torch.randn(400, 5, generator=make_gen(0, "mu")), gen=make_gen(0, "b"))
    assert sure["interval"] == [5, 5]
    assert (
        lat.active_units(draw(0))["interval"] is None
        and "without a generator" in lat.active_units(draw(0))["estimator"]
    )


def test_prior_hole():
    def N(*a):
        return torch.randn(400, 5, generator=make_gen(0, *a))

    posterior = 0.75**0.5 * N("mu") + 0.5 * N("eps")  # the aggregated posterior is standard normal
    none, hole = (
        lat.prior_hole(N("z"), posterior, make_gen(0, "g")),
        lat.prior_hole(N("z"), 2 * posterior, make_gen(0, "g")),
    )
    assert set(none) == {"prior_hole_auroc", "prior_hole_mmd"}
    assert none["prior_hole_auroc"]["interval"][0] < 0.5 < 0.8 < hole["prior_hole_auroc"]["interval"][0]
    assert none["prior_hole_mmd"]["interval"][0] < 0 < hole["prior_hole_mmd"]["interval"][0]
    assert lat.prior_hole(N("z"), posterior, make_gen(0, "g"), max_n=100)["prior_hole_mmd"]["n"] == 100
    assert lat.prior_hole(N("z"), posterior, make_gen(0, "g")) == none
