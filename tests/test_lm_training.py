"`lm_training`: the recipe by hand, a killed run, kept models, a chain of known entropy"

import dataclasses
import math
import multiprocessing
import os
import random

import numpy as np
import pytest
import torch
from tiny_lm import TINY, model, text

from ldebm import lm_training
from ldebm.core import make_gen
from ldebm.lm import LMS, STOP, as_stream, lm_nll, read_text, side_by_side

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("in_test")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def no_seconds(lm):
    return [{k: v for k, v in o.items() if k != "seconds"} for o in lm.history]


def test_activity():
    gen = torch.Generator().manual_seed(0)
    raw, m = torch.randn(6, 3, 4, generator=gen, dtype=F64), 2.0 * torch.randint(2, (1, 3, 4), generator=gen)
    r, d = raw.numpy(), (raw * m).numpy()
    want = 2 * np.mean(d**2) + 1 * np.mean(
        [(r[t + 1, b, k] - r[t, b, k]) ** 2 for t in range(5) for b in range(3) for k in range(4)]
    )
    assert lm_training.activity(raw * m, raw, 2.0, 1.0).item() == pytest.approx(want, rel=1e-12)
    assert lm_training.activity(raw, raw, 0.0, 0.0) == 0 and lm_training.activity(raw[:1], raw[:1], 0.0, 1.0) == 0


def test_segments():
    s = [x for e in range(60) for x in lm_training.segments(3000, 70, make_gen(0, e))]
    for i, n, drawn in lm_training.segments(3000, 70, make_gen(0, 0))[:-1]:
        assert n == drawn >= 5
    one = lm_training.segments(3000, 70, make_gen(0, 0))
    assert [i for i, *_ in one] == [0, *np.cumsum([d for *_, d in one])[:-1]] and sum(n for _, n, _ in one) in (
        2998,
        2999,
    )  # the last target may be left out
    drawn = np.array([d for *_, d in s])
    short = (drawn < 52).mean()
    assert abs(short - 0.05) < 5 * math.sqrt(0.05 * 0.95 / len(drawn))
    assert abs(drawn[drawn > 52].mean() - 69.5) < 0.5 and abs(drawn[drawn > 52].std() - 5) < 0.4
    assert min(d for e in range(200) for *_, d in lm_training.segments(300, 5, make_gen(1, e))) == 5


@pytest.mark.parametrize("kind", ["asgd", "adam"])
def test_rates(kind, monkeypatch):
    cfg = dataclasses.replace(TINY, optimizer=kind, lr=0.5, warmup=0.25, epochs=2)
    lm = model(cfg, dtype=torch.float32)
    data = torch.randint(9, (120, 4), generator=make_gen(0))
    opt = lm_training.make_lm_optimizer(lm, False)
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append(opt.param_groups[0]["lr"]))
    for e in range(2):
        lm_training._pass(lm.train(), opt, data, e, 0, lm_training.progress(total=1))
    segs = [(e, *s) for e in range(2) for s in lm_training.segments(120, 8, make_gen(0, "segments", e))]
    u = [(e + i / 120) / 2 for e, i, *_ in segs]
    want = [0.5 * d / 8 for *_, d in segs] if kind == "asgd" else [0.5 * min(x / 0.25, (1 - x) / 0.75) for x in u]
    assert seen == pytest.approx(want)


def test_stalled():
    assert not lm_training.stalled([], 9.0, 5) and not lm_training.stalled([1.0] * 5, 9.0, 5)  # too early
    assert lm_training.stalled([3.0, 9.0, 9.0, 9.0, 9.0, 9.0], 3.1, 5)  # worse than the only one that counts
    assert not lm_training.stalled([3.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2.9, 5)  # the last five do not count
    assert lm_training.stalled([3.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0], 2.5, 5) and not lm_training.stalled(
        [3.0, 2.0], 2.0, 1
    )


def test_averaging_starts_when_validation_stalls():
    cfg = dataclasses.replace(TINY, optimizer="asgd", lr=40.0, nonmono=1, epochs=8, dropout=0.0, dropout_input=0.0)
    lm = lm_training.train_lm(text(80), text(15, 1), cfg)
    v = [o["valid"] for o in lm.history]
    first = next(k for k in range(8) if lm_training.stalled(v[:k], v[k], 1))
    assert first < 7 and [o["averaged"] for o in lm.history] == [k > first for k in range(8)]


def test_average_is_the_mean_of_the_iterates():
    lm, data = (
        model(dataclasses.replace(TINY, optimizer="asgd", lr=1.0), dtype=torch.float32),
        torch.randint(9, (60, 4), generator=make_gen(0)),
    )
    opt, path = lm_training.make_lm_optimizer(lm, True), []
    opt.register_step_post_hook(lambda *_: path.append([p.detach().clone() for p in lm.parameters()]))
    lm_training._pass(lm.train(), opt, data, 0, 0, lm_training.progress(total=1))
    plain = [p.detach().clone() for p in lm.parameters()]
    with lm_training.averaged(lm, opt):
        for p, *vs in zip(lm.parameters(), *path):
            torch.testing.assert_close(
                p.detach(), torch.stack(vs[1:]).mean(0)
            )  # PyTorch's average leaves out the first
    assert len(path) > 3 and all(torch.equal(a, b) for a, b in zip(plain, lm.parameters()))


def test_best_pass_is_kept():
    cfg = dataclasses.replace(
        TINY, epochs=6, lr=0.3, clip=100.0, dropout=0.0
    )  # so high a rate that validation goes up and down
    lm = lm_training.train_lm(text(80), text(15, 1), cfg)
    v = [o["valid"] for o in lm.history]
    assert v[-1] > min(v)
    held = as_stream(lm.ids, text(15, 1))
    held = side_by_side(held, max(1, len(held) // 50))
    assert read_text(lm, held).mean().item() == min(v)


def test_a_chain_of_known_entropy():
    "Five words, each depending on the last: the loss is at least the entropy rate, and within a few percent of it"
    P = torch.tensor(
        [[0.0, 0.6, 0.2, 0.2], [0.3, 0.1, 0.6, 0.0], [0.1, 0.0, 0.1, 0.8], [0.5, 0.4, 0.0, 0.1]], dtype=F64
    )
    gen, at, out, s = make_gen(0, "chain"), 0, [], []
    names = [STOP, "a", "b", "c"]
    while len(out) < 1600:
        at = int(torch.multinomial(P[at], 1, generator=gen))
        if at:
            s.append(names[at])
        else:
            out.append(s)
            s = []
    pi = torch.linalg.matrix_power(P, 300)[0]
    rate = -(pi[:, None] * torch.xlogy(P, P)).sum().item()
    lm = lm_training.train_lm(out[:1200], out[1200:1300], dataclasses.replace(LMS["quick"], embed=24, epochs=5))
    v, n = lm_nll(lm, out[1300:]), torch.tensor([len(s) + 1 for s in out[1300:]])
    ids = as_stream({w: i for i, w in enumerate(names)}, out[1300:])
    exact = -P[torch.cat([ids[:1] * 0, ids[:-1]]), ids].log().mean().item()  # what the chain itself pays for this text
    got = (v.sum() / n.sum()).item()
    assert abs(exact / rate - 1) < 0.05 and 1 - 0.002 < got / exact < 1.03


@pytest.mark.parametrize(
    "cfg",
    [
        TINY,
        dataclasses.replace(
            TINY, optimizer="asgd", lr=40.0, nonmono=1, epochs=7, ar=2.0, tar=1.0, weight_drop=0.3, layers=2
        ),
    ],
    ids=["adam", "asgd"],
)
def test_a_killed_training_goes_on_bit_for_bit(cfg, tmp_path):
    train, valid = text(80), text(15, 1)
    whole = lm_training.train_lm(train, valid, cfg, 3)
    if cfg.optimizer == "asgd":
        assert whole.history[-1]["averaged"]

    class Killed(Exception):
        pass

    def die_in(stop):
        def on_pass(line):
            if line["epoch"] == stop:
                raise Killed

        return on_pass

    for stop in range(2, cfg.epochs + 1):  # every sitting does one pass more, and dies before the next checkpoint
        with pytest.raises(Killed):
            lm_training.train_lm(train, valid, cfg, 3, folder=tmp_path, on_pass=die_in(stop))
        (f,) = tmp_path.glob("*.safetensors")
        with pytest.raises(ValueError, match=f"after {stop - 1} of {cfg.epochs}"):
            lm_training.load_lm(f)
    again = lm_training.train_lm(train, valid, cfg, 3, folder=tmp_path)
    assert same(whole, again) and no_seconds(whole) == no_seconds(again)
    assert (
        same(lm_training.load_lm(f), whole)
        and lm_training.load_lm(f).seed == whole.seed == 3
        and lm_training.load_lm(f).words == whole.words
        and lm_training.load_lm(f).cfg == cfg
    )


def test_a_model_is_learned_once_and_never_stale(tmp_path, monkeypatch):
    passes = []
    real = lm_training._pass
    monkeypatch.setattr(lm_training, "_pass", lambda *a: (passes.append(1), real(*a))[1])

    def go(train=text(80), valid=text(15, 1), cfg=TINY, seed=0, also=()):
        return lm_training.train_lm(train, valid, cfg, seed, also=also, folder=tmp_path)

    first = go()
    assert len(passes) == 3 and same(first, go()) and len(passes) == 3
    for k, kw in enumerate(
        [
            dict(train=[["cat"]] + text(80)[1:]),
            dict(valid=text(16, 1)),
            dict(cfg=dataclasses.replace(TINY, dropout=0.2)),
            dict(seed=1),
            dict(also=[["new"]]),
        ],
        2,
    ):
        new = go(**kw)
        assert new.words != first.words if "also" in kw else "valid" in kw or not same(first, new)
        assert len(passes) == 3 * k and len(list(tmp_path.glob("*.safetensors"))) == k
    assert not same(go(seed=1), first)
    assert lm_training.lm_key(["a"], [["a", "b"]], [], TINY, 0, "cpu") != lm_training.lm_key(
        ["a"], [["a"], ["b"]], [], TINY, 0, "cpu"
    )


def test_other_errors():
    with pytest.raises(ValueError, match="too little text"):
        lm_training.train_lm(text(3), text(3), TINY)
    with pytest.raises(ValueError, match="valid has no sentences"):
        lm_training.train_lm(text(30), [], TINY)
    with pytest.raises(FloatingPointError, match="lower `lr`"):
        lm_training.train_lm(text(80), text(15), dataclasses.replace(TINY, lr=1e30, clip=1e30, optimizer="asgd"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX locks")
def test_one_of_two_processes_trains_a_model_that_both_want(tmp_path):
    text = [[random.Random(i).choice("abcd") for _ in range(6)] for i in range(60)]

    def work():
        torch.set_num_threads(1)
        lm_training.train_lm(
            text[:50],
            text[50:],
            dataclasses.replace(TINY, parts=()),
            folder=tmp_path,
            on_pass=lambda line: open(tmp_path / "passes", "a").write("x"),
        )

    both = [multiprocessing.get_context("fork").Process(target=work) for _ in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    assert (tmp_path / "passes").read_text() == "x" * TINY.epochs and len(list(tmp_path.glob("lm-*.safetensors"))) == 1
