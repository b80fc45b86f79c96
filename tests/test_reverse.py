"`reverse`: the protocol, the metric and its interval, models shared by processes"

import dataclasses
import json
import math
import multiprocessing
import os
import random

import pytest
import torch
from tiny_lm import TINY, model, text

from ldebm import lm_training, reverse
from ldebm.core import make_gen
from ldebm.corpora import split_sentences
from ldebm.lm import LMS, lm_nll, lm_words

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("in_test")


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args, **kw):
        raise AssertionError("work began before the error")

    monkeypatch.setattr(reverse, "train_lm", fail)


def test_protocol():
    assert [reverse.protocol(n) for n in (100, 4300, 41_499, 41_500, 42_068, 43_000, 46_000)] == [
        (93, 100),
        (4000, 4300),
        (38_603, 41_499),
        (40_000, 41_500),
        (40_000, 42_068),
        (40_000, 43_000),
        (40_000, 43_000),
    ]
    with pytest.raises(ValueError, match="99 sentences are too few"):
        reverse.protocol(99)


def test_which_sentences_do_what(monkeypatch):
    monkeypatch.setattr(reverse, "_N_TRAIN", 200)
    monkeypatch.setattr(reverse, "_N_VALID", 30)
    cfg = dataclasses.replace(TINY, batch=8, bptt=16, epochs=2)
    calls, forward = [], []
    real, real_f = lm_training.train_lm, reverse.forward_ppl
    monkeypatch.setattr(
        reverse,
        "train_lm",
        lambda train, valid, cfg, seed, **kw: (
            calls.append((train, valid, seed, kw["also"])),
            real(train, valid, cfg, seed, **kw),
        )[1],
    )
    monkeypatch.setattr(reverse, "forward_ppl", lambda lms, s: (forward.append(s), real_f(lms, s))[1])
    samples, test, train = text(260, 1), text(30, 2, ["cat", "unheard", "mat"]), text(300, 3)
    out = reverse.reverse_ppl(samples, test, train, cfg, seeds=(4, 5))
    assert [c[2] for c in calls] == [4, 5, 4, 5]
    for c in calls[:2]:
        assert c[0] == samples[:200] and c[1] == samples[200:230] and c[3] == test
    for c in calls[2:]:
        assert c[0] == train[:200] and c[1] == train[200:230] and c[3][:30] == test
    assert forward == [samples[230:]]
    assert set(out) == {"rppl", "rppl_unseen", "rppl_floor", "rppl_floor_unseen", "ppl_forward"}
    said = out["rppl"]["estimator"]
    assert (
        "200 sentences to train and 30 to choose" in said
        and "4: " in said
        and "5: " in said
        and f"{sum(len(s) + 1 for s in test)} tokens" in said
    )
    unheard = sum(s.count("unheard") for s in test) / sum(map(len, test))
    assert out["rppl_unseen"]["value"] == pytest.approx(unheard) and unheard > 0.1
    for k, m in out.items():
        assert (
            set(m) == {"value", "interval", "n", "estimator"} and m["interval"][0] <= m["value"] <= m["interval"][1]
        ), k
        json.dumps(m, allow_nan=False)
    floor = reverse.rppl_floor(train, test, cfg, n=260, seeds=(4, 5))
    assert floor["rppl_floor"]["value"] == out["rppl_floor"]["value"]


def test_value_is_the_geometric_mean_and_repeats(tmp_path):
    samples, test = text(120, 1), text(40, 2)
    assert reverse.protocol(120) == (111, 120)
    one = reverse.reverse_ppl(samples, test, cfg=TINY, own=tmp_path)
    assert (
        one
        == reverse.reverse_ppl(samples, test, cfg=TINY, own=tmp_path)
        == reverse.reverse_ppl(samples, test, cfg=TINY)
    )
    nats = [
        lm_nll(lm_training.train_lm(samples[:111], samples[111:], TINY, s, also=test), test).sum().item()
        for s in (0, 1)
    ]
    n = sum(len(s) + 1 for s in test)
    assert one["rppl"]["value"] == pytest.approx(math.exp(sum(nats) / 2 / n), rel=1e-9) and nats[0] != nats[1]


def test_better_samples_score_better():
    "Full text, text of half the words, and shuffled words"
    data = split_sentences("grammar")
    train, test = data["train"][:1000], data["valid"][:150]
    half = set(lm_words(train)[0][:100])
    rnd = random.Random(0)
    rows = dict(
        real=train, half=[[w for w in s if w in half] for s in train], shuffled=[rnd.sample(s, len(s)) for s in train]
    )
    cfg = dataclasses.replace(LMS["quick"], epochs=4, embed=48)
    v = {k: reverse.reverse_ppl(s, test, cfg=cfg, seeds=(0,)) for k, s in rows.items()}
    ppl = {k: m["rppl"]["value"] for k, m in v.items()}
    assert ppl["half"] > 1.5 * ppl["real"] and ppl["shuffled"] > 2 * ppl["real"]
    assert v["half"]["rppl_unseen"]["value"] > 0.02 > v["real"]["rppl_unseen"]["value"]


def test_empty_sentences_are_legal():
    samples = [[] if i % 3 else ["cat"] for i in range(200)]
    m = reverse.reverse_ppl(samples, [["cat"], [], ["dog"]], cfg=dataclasses.replace(TINY, batch=2), seeds=(0,))
    assert math.isfinite(m["rppl"]["value"]) and m["rppl"]["n"] == 3
    assert lm_nll(model(), [[], []]).shape == (2,)


def test_interval():
    gen = torch.Generator().manual_seed(0)
    n, tokens = 2000, torch.full((2000,), 10)
    nats = 50 + 5 * torch.randn(1, n, generator=gen, dtype=F64)  # independent sentences: the textbook deviation
    value, (lo, hi) = reverse.nats_interval(nats, tokens, make_gen(1))
    assert value == pytest.approx(math.exp(nats.mean() / 10))
    assert math.log(hi / lo) / 2 / 1.96 == pytest.approx(nats.std().item() / 10 / n**0.5, rel=0.15)
    seeds = torch.cat([nats, nats + 1, nats + 2])  # three models that differ by .1 a token
    value3, (lo3, hi3) = reverse.nats_interval(seeds, tokens, make_gen(1))
    want = math.sqrt((math.log(hi / lo) / 2 / 1.959964) ** 2 + 0.01 / 3)
    assert value3 == pytest.approx(value * math.exp(0.1)) and math.log(hi3 / lo3) / 2 / 1.959964 == pytest.approx(
        want, rel=1e-6
    )
    topic = (
        torch.randn(1, n // 50, generator=gen, dtype=F64).repeat_interleave(50, 1) * 5
    )  # sentences that go together: a wider one
    _, (a, b) = reverse.nats_interval(50 + topic, tokens, make_gen(1))
    assert math.log(b / a) > 3.5 * math.log(hi / lo)
    assert reverse.nats_interval(nats[:, :1], tokens[:1], make_gen(1))[1][0] == pytest.approx(
        math.exp(nats[0, 0] / 10)
    )  # one sentence: nothing to resample


@pytest.mark.parametrize(
    "args, kw, wrong",
    [
        (([], [["a"]]), {}, "samples has no sentences"),
        (([["a"]] * 50, [["a"]]), {}, "too few"),
        (([["a"]] * 200, []), {}, "test has no sentences"),
        (([["a"]] * 200, [["a"]]), dict(cfg="smal"), "did you mean 'small'"),
        (([["a"]] * 200, [["a"]]), dict(cfg=3), "must be one of"),
        (([["a"]] * 200, [["a"]]), dict(seeds=()), "seeds"),
        (([["a"]] * 200, [["a"]]), dict(seeds=(1, 1)), "seeds"),
        ((["a b"] * 200, [["a"]]), {}, "lists of words"),
        (([["a", "<eos>"]] * 200, [["a"]]), {}, "strip it"),
        (([["a"]] * 200, [["a"]], [["a"]] * 9), {}, "too few"),
    ],
)
def test_errors_before_any_work(args, kw, wrong, no_training):
    with pytest.raises(ValueError, match=wrong):
        reverse.reverse_ppl(*args, **kw)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX locks")
def test_two_processes_share_the_models_that_both_want(tmp_path):
    "While one trains a seed, the other trains the next, and both end with both"
    text = [[random.Random(i).choice("abcd") for _ in range(6)] for i in range(120)]
    real = lm_training.train_lm

    def work(name, meet):
        torch.set_num_threads(1)

        def seen(seed, first):
            def on_pass(line):
                open(tmp_path / f"{name}-{seed}", "a").write("x")
                if first:
                    meet.wait(30)  # neither goes on before both have a model to train

            return on_pass

        done = []

        def train(train, valid, cfg, seed, **kw):
            lm = real(train, valid, cfg, seed, on_pass=seen(seed, not done), **kw)
            done.append(seed)
            return lm

        reverse.train_lm = train
        lms, _ = reverse.protocol_lms(text, text, dataclasses.replace(TINY, parts=()), (0, 1), tmp_path / "lm")
        torch.save([lm.state_dict() for lm in lms], tmp_path / f"{name}.pt")

    context = multiprocessing.get_context("fork")
    meet = context.Barrier(2)
    both = [context.Process(target=work, args=(name, meet)) for name in "ab"]
    for p in both:
        p.start()
    for p in both:
        p.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    trained = sorted(p.name for p in tmp_path.glob("[ab]-*"))
    assert trained in (["a-0", "b-1"], ["a-1", "b-0"]) and all(
        (tmp_path / n).read_text() == "x" * TINY.epochs for n in trained
    )
    a, b = (torch.load(tmp_path / f"{n}.pt") for n in "ab")
    assert (
        all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)
        and len(a) == 2
        and not all(torch.equal(a[0][k], a[1][k]) for k in a[0])
    )


@pytest.mark.slow
def test_models_in_processes_of_their_own(tmp_path, monkeypatch):
    "The same models as one after the other; the second seed's was trained elsewhere"
    text = [["the", "cat", "sat", str(i % 7)] for i in range(150)]
    want, _ = reverse.protocol_lms(text, text, TINY, (0, 1))
    here, real = [], lm_training._pass
    monkeypatch.setattr(
        lm_training,
        "_pass",
        lambda lm, opt, text, epoch, seed, bar: here.append(seed) or real(lm, opt, text, epoch, seed, bar),
    )
    got, _ = reverse.protocol_lms(text, text, TINY, (0, 1), tmp_path / "lm", parallel=True)
    assert here == [0] * TINY.epochs
    for a, b in zip(got, want):
        assert a.seed == b.seed
        for x, y in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="need a folder"):
        reverse.protocol_lms(text, text, TINY, (0, 1), None, parallel=True)
    monkeypatch.setenv("LDEBM_SHARED_GPU", "yes")
    with pytest.raises(ValueError, match="LDEBM_SHARED_GPU must be '0' or '1', got 'yes'"):
        reverse.protocol_lms(text, text, TINY, (0, 1))
