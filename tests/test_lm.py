"`lm`: the language model against PyTorch and hand computation, the protocol, resumption, a chain of known entropy"

import dataclasses
import json
import math
import multiprocessing
import os
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as nnf

from ldebm import lm as L
from ldebm.core import make_gen
from ldebm.corpora import split_sentences

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("in_test")
TINY = dataclasses.replace(L.LMS["quick"], embed=12, hidden=10, epochs=3, batch=4, bptt=8, parts=(0.5, 0.8))


def text(n, seed=0, words="the a cat dog sat ran on mat . big".split()):
    rnd = random.Random(seed)
    return [[words[min(int(rnd.expovariate(0.5)), len(words) - 1)] for _ in range(rnd.randint(0, 7))] for _ in range(n)]


def model(cfg=TINY, n_words=9, cuts=(), seed=0, dtype=F64):
    return L.LM([L.STOP, *(f"w{i}" for i in range(n_words - 1))], list(cuts), cfg, make_gen(seed, "weights")).to(dtype)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def no_seconds(lm):
    return [{k: v for k, v in o.items() if k != "seconds"} for o in lm.history]


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args, **kw):
        raise AssertionError("work began before the error")

    monkeypatch.setattr(L, "train_lm", fail)


# --- settings


def test_paper_is_the_published_recipe():
    c = L.LMS["paper"]
    assert (c.layers, c.embed, c.hidden, c.batch, c.epochs, c.bptt, c.nonmono) == (3, 400, 1150, 20, 20, 70, 5)
    assert (c.dropout, c.dropout_between, c.dropout_input, c.dropout_embed, c.weight_drop) == (0.4, 0.25, 0.4, 0.1, 0.5)
    assert (c.ar, c.tar, c.weight_decay, c.optimizer, c.lr, c.clip, c.parts) == (2, 1, 1.2e-6, "asgd", 30, 0.25, ())
    lm = L.LM(["w"] * 10_000, [], c, make_gen(0))
    assert [r[1].shape for r in lm.rnn] == [(4600, 1150), (4600, 1150), (1600, 400)]
    assert sum(p.numel() for p in lm.parameters()) == 10_000 * 401 + sum(
        4 * o * (i + o + 2) for i, o in ((400, 1150), (1150, 1150), (1150, 400))
    )
    table, bias = lm.table.detach().split([400, 1], 1)
    assert (
        (bias == 0).all() and table.abs().max() <= 0.1 and table.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.01)
    )


@pytest.mark.parametrize(
    "bad",
    [
        dict(dropout=1.0),
        dict(weight_drop=-0.1),
        dict(batch=0),
        dict(lr=0.0),
        dict(optimizer="sgd"),
        dict(parts=(0.9, 0.5)),
        dict(parts=(1.0,)),
        dict(ar=-1.0),
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        dataclasses.replace(TINY, **bad)


# --- layers


@pytest.mark.parametrize("T, B", [(1, 1), (6, 3)])
def test_lstm_is_pytorchs(T, B):
    gen, i, H = torch.Generator().manual_seed(0), 5, 4
    args = [
        torch.randn(s, generator=gen, dtype=F64, requires_grad=True)
        for s in ((T, B, i), (B, H), (B, H), (4 * H, i), (4 * H, H), (4 * H,), (4 * H,))
    ]
    x, h, c, *w = args
    got, (hT, cT) = L.lstm(x, (h, c), *w)
    net = torch.nn.LSTM(i, H).double()
    with torch.no_grad():
        for p, v in zip(net.parameters(), w):
            p.copy_(v)
    want = torch.func.functional_call(
        net, dict(zip((n for n, _ in net.named_parameters()), w)), (x, (h[None], c[None]))
    )
    torch.testing.assert_close((got, hT, cT), (want[0], want[1][0][0], want[1][1][0]))
    ups = [torch.randn(o.shape, generator=gen, dtype=F64) for o in (got, hT, cT)]

    def loss(*os):
        return sum((o * u).sum() for o, u in zip(os, ups))

    for a, b in zip(
        torch.autograd.grad(loss(got, hT, cT), args),
        torch.autograd.grad(loss(want[0], want[1][0][0], want[1][1][0]), args),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cuts", [[], [3], [2, 5]])
def test_softmax_in_parts(cuts):
    gen, V, d = torch.Generator().manual_seed(1), 9, 4
    h, w = (torch.randn(s, generator=gen, dtype=F64, requires_grad=True) for s in ((40, d), (V + len(cuts), d)))
    y = torch.randint(V, (40,), generator=gen)

    def plain(h, w):  # every word's probability as the definition has it
        edges, f = [0, *cuts, V], h @ w.T
        lp = torch.cat([f[:, : edges[1]], f[:, V:]], 1).log_softmax(1)
        return torch.cat(
            [lp[:, : edges[1]]]
            + [
                lp[:, edges[1] + k : edges[1] + k + 1] + f[:, a:b].log_softmax(1)
                for k, (a, b) in enumerate(zip(edges[1:-1], edges[2:]))
            ],
            1,
        )

    lp = plain(h, w)
    torch.testing.assert_close(lp.exp().sum(1), torch.ones(40, dtype=F64))
    got, want = L.parts_nll(h, w, y, cuts), -lp.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(got, want)
    up = torch.rand(40, generator=gen, dtype=F64)
    for a, b in zip(torch.autograd.grad((got * up).sum(), (h, w)), torch.autograd.grad((want * up).sum(), (h, w))):
        torch.testing.assert_close(a, b)


def test_cuts_follow_tokens_and_leave_words_to_learn_from():
    assert L.cut_points([50, 30, 10, 6, 4, 0, 0, 0], (0.79, 0.94)) == [2, 4]
    assert L.cut_points([50, 30, 10, 6, 4], (0.999,)) == []  # the last part would be words without a single example
    assert L.cut_points([99, 1, 0, 0], (0.5, 0.9)) == [1]
    assert L.cut_points([1] * 10, ()) == []


def test_weight_drop():
    cfg = dataclasses.replace(TINY, weight_drop=0.5, dropout=0.0, dropout_input=0.0)
    lm, ids = model(cfg), torch.arange(8).view(4, 2)

    def read(gen=None):
        return lm(ids, lm.begin(2), gen)[0]

    lm.train()
    one, two = read(make_gen(1)), read(make_gen(2))
    assert not torch.equal(one, two) and torch.equal(one, read(make_gen(1)))
    lm.eval()
    assert torch.equal(read(make_gen(1)), read(make_gen(2))) and torch.equal(read(), read())
    # by hand: the recurrent matrix times its mask, the input's matrix whole
    lm.train()
    raw = lm.rnn[0][1]
    M = L.mask(raw, raw.shape, 0.5, make_gen(1))
    assert set(M.unique().tolist()) == {0.0, 2.0} and 0.3 < (M == 0).double().mean() < 0.7
    x = nnf.embedding(ids, lm.table[:, :-1])
    wi, wh, bi, bh = lm.rnn[0]
    want = torch._VF.lstm(
        x, tuple(o[None] for o in lm.begin(2)[0]), [wi, (wh * M).detach(), bi, bh], True, 1, 0.0, False, False, False
    )[0]
    torch.testing.assert_close(one, want)
    one.square().sum().backward()  # of the raw weight: nothing where it was dropped, something elsewhere
    assert raw.is_leaf and raw.grad is not None and (raw.grad[M == 0] == 0).all() and (raw.grad[M > 0] != 0).all()


def test_masks_of_states_words_and_layers():
    x = torch.ones(5, 3, 400, dtype=F64)
    y = L.locked(x, 0.25, make_gen(0))
    assert torch.equal(y[0], y[4]) and not torch.equal(y[:, 0], y[:, 1]) and set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert y.mean() == pytest.approx(1, abs=0.1) and L.locked(x, 0.25, None) is x
    cfg = dataclasses.replace(
        TINY, layers=3, dropout=0.5, dropout_between=0.3, dropout_input=0.2, dropout_embed=0.4, weight_drop=0.1
    )
    lm, ids, gen = model(cfg), torch.tensor([[1, 1], [2, 1], [1, 8]]), make_gen(3)
    got, raw, _ = lm.train()(ids, lm.begin(2), make_gen(3))
    E = L.mask(got, (9, 1), 0.4, gen)  # the order in which masks are drawn
    z = L.locked(lm.table[ids, :-1] * E[ids], 0.2, gen)
    for l, r in enumerate(lm.rnn):
        r, wd = list(r), None
        wd = L.drop_weights(r[1], 0.1, gen)
        h = L.lstm(z, lm.begin(2)[l], r[0], wd, r[2], r[3])[0]
        z = L.locked(h, 0.5 if l == 2 else 0.3, gen)
    torch.testing.assert_close((got, raw), (z, h))
    with pytest.raises(ValueError, match="needs a generator"):
        lm(ids, lm.begin(2))


def test_activity():
    gen = torch.Generator().manual_seed(0)
    raw, m = torch.randn(6, 3, 4, generator=gen, dtype=F64), 2.0 * torch.randint(2, (1, 3, 4), generator=gen)
    r, d = raw.numpy(), (raw * m).numpy()
    want = 2 * np.mean(d**2) + 1 * np.mean(
        [(r[t + 1, b, k] - r[t, b, k]) ** 2 for t in range(5) for b in range(3) for k in range(4)]
    )
    assert L.activity(raw * m, raw, 2.0, 1.0).item() == pytest.approx(want, rel=1e-12)
    assert L.activity(raw, raw, 0.0, 0.0) == 0 and L.activity(raw[:1], raw[:1], 0.0, 1.0) == 0


# --- training


def test_segments():
    s = [x for e in range(60) for x in L.segments(3000, 70, make_gen(0, e))]
    for i, n, drawn in L.segments(3000, 70, make_gen(0, 0))[:-1]:
        assert n == drawn >= 5
    one = L.segments(3000, 70, make_gen(0, 0))
    assert [i for i, *_ in one] == [0, *np.cumsum([d for *_, d in one])[:-1]] and sum(n for _, n, _ in one) in (
        2998,
        2999,
    )  # the last target may be left out
    drawn = np.array([d for *_, d in s])
    short = (drawn < 52).mean()
    assert abs(short - 0.05) < 5 * math.sqrt(0.05 * 0.95 / len(drawn))
    assert abs(drawn[drawn > 52].mean() - 69.5) < 0.5 and abs(drawn[drawn > 52].std() - 5) < 0.4
    assert min(d for e in range(200) for *_, d in L.segments(300, 5, make_gen(1, e))) == 5


def test_rates(monkeypatch):
    seen = []
    real = torch.nn.utils.clip_grad_norm_
    for kind in ("asgd", "adam"):
        cfg = dataclasses.replace(TINY, optimizer=kind, lr=0.5, warmup=0.25, epochs=2)
        lm, data = model(cfg, dtype=torch.float32), torch.randint(9, (120, 4), generator=make_gen(0))
        opt = L.make_lm_optimizer(lm, False)
        monkeypatch.setattr(
            L.nn.utils, "clip_grad_norm_", lambda *a: (seen.append(opt.param_groups[0]["lr"]), real(*a))
        )
        for e in range(2):
            L._pass(lm.train(), opt, data, e, 0, L.progress(total=1))
        segs = [(e, *s) for e in range(2) for s in L.segments(120, 8, make_gen(0, "segments", e))]
        u = [(e + i / 120) / 2 for e, i, *_ in segs]
        want = [0.5 * d / 8 for *_, d in segs] if kind == "asgd" else [0.5 * min(x / 0.25, (1 - x) / 0.75) for x in u]
        assert seen == pytest.approx(want)
        seen.clear()


def test_stalled():
    assert not L.stalled([], 9.0, 5) and not L.stalled([1.0] * 5, 9.0, 5)  # too early
    assert L.stalled([3.0, 9.0, 9.0, 9.0, 9.0, 9.0], 3.1, 5)  # worse than the only one that counts
    assert not L.stalled([3.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2.9, 5)  # the last five do not count
    assert L.stalled([3.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0], 2.5, 5) and not L.stalled([3.0, 2.0], 2.0, 1)


def test_averaging_starts_when_validation_stalls():
    cfg = dataclasses.replace(TINY, optimizer="asgd", lr=40.0, nonmono=1, epochs=8, dropout=0.0, dropout_input=0.0)
    lm = L.train_lm(text(80), text(15, 1), cfg)
    v = [o["valid"] for o in lm.history]
    first = next(k for k in range(8) if L.stalled(v[:k], v[k], 1))
    assert first < 7 and [o["averaged"] for o in lm.history] == [k > first for k in range(8)]


def test_average_is_the_mean_of_the_iterates():
    lm, data = (
        model(dataclasses.replace(TINY, optimizer="asgd", lr=1.0), dtype=torch.float32),
        torch.randint(9, (60, 4), generator=make_gen(0)),
    )
    opt, path = L.make_lm_optimizer(lm, True), []
    opt.register_step_post_hook(lambda *_: path.append([p.detach().clone() for p in lm.parameters()]))
    L._pass(lm.train(), opt, data, 0, 0, L.progress(total=1))
    plain = [p.detach().clone() for p in lm.parameters()]
    with L.averaged(lm, opt):
        for p, *vs in zip(lm.parameters(), *path):
            torch.testing.assert_close(
                p.detach(), torch.stack(vs[1:]).mean(0)
            )  # PyTorch's average leaves out the first
    assert len(path) > 3 and all(torch.equal(a, b) for a, b in zip(plain, lm.parameters()))


def test_best_pass_is_kept():
    cfg = dataclasses.replace(
        TINY, epochs=6, lr=0.3, clip=100.0, dropout=0.0
    )  # so high a rate that validation goes up and down
    lm = L.train_lm(text(80), text(15, 1), cfg)
    v = [o["valid"] for o in lm.history]
    assert v[-1] > min(v)
    held = L.as_stream(lm.ids, text(15, 1))
    held = L.side_by_side(held, max(1, len(held) // 50))
    assert L.read_text(lm, held).mean().item() == min(v)


def test_a_chain_of_known_entropy():
    "Five words, each depending on the last: the loss is at least the entropy rate, and within a few percent of it"
    P = torch.tensor(
        [[0.0, 0.6, 0.2, 0.2], [0.3, 0.1, 0.6, 0.0], [0.1, 0.0, 0.1, 0.8], [0.5, 0.4, 0.0, 0.1]], dtype=F64
    )
    gen, at, out, s = make_gen(0, "chain"), 0, [], []
    names = [L.STOP, "a", "b", "c"]
    while len(out) < 1600:
        at = int(torch.multinomial(P[at], 1, generator=gen))
        if at:
            s.append(names[at])
        else:
            out.append(s)
            s = []
    pi = torch.linalg.matrix_power(P, 300)[0]
    rate = -(pi[:, None] * torch.xlogy(P, P)).sum().item()
    lm = L.train_lm(out[:1200], out[1200:1300], dataclasses.replace(L.LMS["quick"], embed=24, epochs=5))
    v, n = L.lm_nll(lm, out[1300:]), torch.tensor([len(s) + 1 for s in out[1300:]])
    ids = L.as_stream({w: i for i, w in enumerate(names)}, out[1300:])
    exact = -P[torch.cat([ids[:1] * 0, ids[:-1]]), ids].log().mean().item()  # what the chain itself pays for this text
    got = (v.sum() / n.sum()).item()
    assert abs(exact / rate - 1) < 0.05 and 1 - 0.002 < got / exact < 1.03


# --- streams


def test_dictionary_and_streams():
    words, freq = L.lm_words([["b", "a"], ["b"], []], [["c"]], [["d", "b"]])
    assert words == [L.STOP, "b", "a", "c", "d"] and freq == [3, 2, 1, 0, 0]
    ids = L.as_stream({w: i for i, w in enumerate(words)}, [["a"], [], ["d", "c"]])
    assert ids.tolist() == [2, 0, 0, 4, 3, 0]
    assert L.side_by_side(torch.arange(11), 3).tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_state_is_carried_across_sentences_and_chunks():
    lm = model(dataclasses.replace(TINY, layers=2)).eval()
    sents = [["w1", "w2"], [], ["w3"], ["w2", "w2", "w7"]]
    stream = [0, *L.as_stream(lm.ids, sents).tolist()]
    state, want = lm.begin(1), []
    with torch.no_grad():
        for a, b in zip(stream, stream[1:]):  # a word at a time
            h, _, state = lm(torch.tensor([[a]]), state)
            want.append(lm.nll(h, torch.tensor([[b]])).item())
    ends = np.cumsum([len(s) + 1 for s in sents])
    got = L.lm_nll(lm, sents)
    assert got.dtype == F64
    np.testing.assert_allclose(got, [sum(want[a:b]) for a, b in zip([0, *ends], ends)], rtol=1e-10)
    ids = torch.tensor(stream)[:, None]
    for rows in (1, 3, 100):
        torch.testing.assert_close(L.read_text(lm, ids, rows), torch.tensor(want, dtype=F64)[:, None])
    assert abs(L.lm_nll(lm, [sents[-1]]).item() - got[-1].item()) > 1e-6  # alone, it is read differently
    assert not lm.training


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match="'zebra'"):
        L.lm_nll(model(), [["w1", "zebra"]])


# --- resumption and caching


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
    whole = L.train_lm(train, valid, cfg, 3)
    if cfg.optimizer == "asgd":
        assert whole.history[-1]["averaged"]

    class Killed(Exception):
        pass

    for stop in range(2, cfg.epochs + 1):  # every sitting does one pass more, and dies before the next checkpoint

        def die(line):
            if line["epoch"] == stop:
                raise Killed

        with pytest.raises(Killed):
            L.train_lm(train, valid, cfg, 3, folder=tmp_path, on_pass=die)
        (f,) = tmp_path.glob("*.safetensors")
        with pytest.raises(ValueError, match=f"after {stop - 1} of {cfg.epochs}"):
            L.load_lm(f)
    again = L.train_lm(train, valid, cfg, 3, folder=tmp_path)
    assert same(whole, again) and no_seconds(whole) == no_seconds(again)
    assert (
        same(L.load_lm(f), whole)
        and L.load_lm(f).seed == whole.seed == 3
        and L.load_lm(f).words == whole.words
        and L.load_lm(f).cfg == cfg
    )


def test_a_model_is_learned_once_and_never_stale(tmp_path, monkeypatch):
    passes = []
    real = L._pass
    monkeypatch.setattr(L, "_pass", lambda *a: (passes.append(1), real(*a))[1])

    def go(train=text(80), valid=text(15, 1), cfg=TINY, seed=0, also=()):
        return L.train_lm(train, valid, cfg, seed, also=also, folder=tmp_path)

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
    assert L.lm_key(["a"], [["a", "b"]], [], TINY, 0, "cpu") != L.lm_key(["a"], [["a"], ["b"]], [], TINY, 0, "cpu")


# --- the metric


def test_protocol():
    assert [L.protocol(n) for n in (100, 4300, 41_499, 41_500, 42_068, 43_000, 46_000)] == [
        (93, 100),
        (4000, 4300),
        (38_603, 41_499),
        (40_000, 41_500),
        (40_000, 42_068),
        (40_000, 43_000),
        (40_000, 43_000),
    ]
    with pytest.raises(ValueError, match="99 sentences are too few"):
        L.protocol(99)


def test_which_sentences_do_what(monkeypatch):
    monkeypatch.setattr(L, "N_TRAIN", 200)
    monkeypatch.setattr(L, "N_VALID", 30)
    cfg = dataclasses.replace(TINY, batch=8, bptt=16, epochs=2)
    calls, forward = [], []
    real, real_f = L.train_lm, L.forward_ppl
    monkeypatch.setattr(
        L,
        "train_lm",
        lambda train, valid, cfg, seed, **kw: (
            calls.append((train, valid, seed, kw["also"])),
            real(train, valid, cfg, seed, **kw),
        )[1],
    )
    monkeypatch.setattr(L, "forward_ppl", lambda lms, s: (forward.append(s), real_f(lms, s))[1])
    samples, test, train = text(260, 1), text(30, 2, ["cat", "unheard", "mat"]), text(300, 3)
    out = L.reverse_ppl(samples, test, train, cfg, seeds=(4, 5))
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
    floor = L.rppl_floor(train, test, cfg, n=260, seeds=(4, 5))
    assert floor["rppl_floor"]["value"] == out["rppl_floor"]["value"]


def test_value_is_the_geometric_mean_and_repeats(tmp_path):
    samples, test = text(120, 1), text(40, 2)
    assert L.protocol(120) == (111, 120)
    one = L.reverse_ppl(samples, test, cfg=TINY, own=tmp_path)
    assert one == L.reverse_ppl(samples, test, cfg=TINY, own=tmp_path) == L.reverse_ppl(samples, test, cfg=TINY)
    nats = [L.lm_nll(L.train_lm(samples[:111], samples[111:], TINY, s, also=test), test).sum().item() for s in (0, 1)]
    n = sum(len(s) + 1 for s in test)
    assert one["rppl"]["value"] == pytest.approx(math.exp(sum(nats) / 2 / n), rel=1e-9) and nats[0] != nats[1]


def test_better_samples_score_better():
    "Full text, text of half the words, and shuffled words"
    data = split_sentences("grammar")
    train, test = data["train"][:1000], data["valid"][:150]
    half = set(L.lm_words(train)[0][:100])
    rnd = random.Random(0)
    rows = dict(
        real=train, half=[[w for w in s if w in half] for s in train], shuffled=[rnd.sample(s, len(s)) for s in train]
    )
    cfg = dataclasses.replace(L.LMS["quick"], epochs=4, embed=48)
    v = {k: L.reverse_ppl(s, test, cfg=cfg, seeds=(0,)) for k, s in rows.items()}
    ppl = {k: m["rppl"]["value"] for k, m in v.items()}
    assert ppl["half"] > 1.5 * ppl["real"] and ppl["shuffled"] > 2 * ppl["real"]
    assert v["half"]["rppl_unseen"]["value"] > 0.02 > v["real"]["rppl_unseen"]["value"]


def test_empty_sentences_are_legal():
    samples = [[] if i % 3 else ["cat"] for i in range(200)]
    m = L.reverse_ppl(samples, [["cat"], [], ["dog"]], cfg=dataclasses.replace(TINY, batch=2), seeds=(0,))
    assert math.isfinite(m["rppl"]["value"]) and m["rppl"]["n"] == 3
    assert L.lm_nll(model(), [[], []]).shape == (2,)


def test_interval():
    gen = torch.Generator().manual_seed(0)
    n, tokens = 2000, torch.full((2000,), 10)
    nats = 50 + 5 * torch.randn(1, n, generator=gen, dtype=F64)  # independent sentences: the textbook deviation
    value, (lo, hi) = L.nats_interval(nats, tokens, make_gen(1))
    assert value == pytest.approx(math.exp(nats.mean() / 10))
    assert math.log(hi / lo) / 2 / 1.96 == pytest.approx(nats.std().item() / 10 / n**0.5, rel=0.15)
    seeds = torch.cat([nats, nats + 1, nats + 2])  # three models that differ by .1 a token
    value3, (lo3, hi3) = L.nats_interval(seeds, tokens, make_gen(1))
    want = math.sqrt((math.log(hi / lo) / 2 / 1.959964) ** 2 + 0.01 / 3)
    assert value3 == pytest.approx(value * math.exp(0.1)) and math.log(hi3 / lo3) / 2 / 1.959964 == pytest.approx(
        want, rel=1e-6
    )
    topic = (
        torch.randn(1, n // 50, generator=gen, dtype=F64).repeat_interleave(50, 1) * 5
    )  # sentences that go together: a wider one
    _, (a, b) = L.nats_interval(50 + topic, tokens, make_gen(1))
    assert math.log(b / a) > 3.5 * math.log(hi / lo)
    assert L.nats_interval(nats[:, :1], tokens[:1], make_gen(1))[1][0] == pytest.approx(
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
        L.reverse_ppl(*args, **kw)


def test_other_errors():
    with pytest.raises(ValueError, match="too little text"):
        L.train_lm(text(3), text(3), TINY)
    with pytest.raises(ValueError, match="valid has no sentences"):
        L.train_lm(text(30), [], TINY)
    with pytest.raises(FloatingPointError, match="lower `lr`"):
        L.train_lm(text(80), text(15), dataclasses.replace(TINY, lr=1e30, clip=1e30, optimizer="asgd"))


# --- text that is not cut


def test_whole_sentences_of_a_file(tmp_path):
    f = tmp_path / "mine.txt"
    f.write_text("\n".join(" ".join(f"w{i}_{j}" for j in range(60)) for i in range(100)))
    from ldebm.corpora import load_corpus

    whole, cut = split_sentences(str(f), seed=5), load_corpus(str(f), seed=5, max_len=12, vocab_size=50)
    assert {k: len(v) for k, v in whole.items()} == {"train": 90, "valid": 5, "test": 5}
    assert all(len(s) == 60 for v in whole.values() for s in v)
    known = split_sentences(str(f), seed=5, vocab=cut.vocab)
    for k, v in known.items():
        assert [s[:10] for s in v] == cut[k].sentences() and all(len(s) == 60 for s in v)
    with pytest.raises(ValueError, match="did you mean 'ptb'"):
        split_sentences("ptbb")


@pytest.mark.data
def test_ptb_is_whole(ldebm_data):
    s = split_sentences("ptb")
    assert {k: len(v) for k, v in s.items()} == dict(train=42_068, valid=3_370, test=3_761)
    assert sum(len(o) + 1 for o in s["test"]) == 82_430
    words, freq = L.lm_words(s["train"][:40_000], s["train"][40_000:], s["test"])
    assert len(words) == 10_000 and 900 < L.cut_points(freq, L.LMS["small"].parts)[0] < 1100


def test_dictionary_does_not_depend_on_who_asks():
    "Words that were never met have no order of their own, so that the models of real text serve every generator"
    train = [["a", "b", "b"]]
    assert (
        L.lm_words(train, [["z", "x"]], [["y"]])
        == L.lm_words(train, [["y", "z"]], [["x", "z"]])
        == (["b", "a", "<eos>", "x", "y", "z"], [2, 1, 1, 0, 0, 0])
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX locks")
def test_one_of_two_processes_trains_a_model_that_both_want(tmp_path):
    text = [[random.Random(i).choice("abcd") for _ in range(6)] for i in range(60)]

    def work():
        torch.set_num_threads(1)
        L.train_lm(
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX locks")
def test_two_processes_share_the_models_that_both_want(tmp_path):
    "While one trains a seed, the other trains the next, and both end with both"
    text = [[random.Random(i).choice("abcd") for _ in range(6)] for i in range(120)]
    real = L.train_lm

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

        L.train_lm = train
        lms, _ = L.protocol_lms(text, text, dataclasses.replace(TINY, parts=()), (0, 1), tmp_path / "lm")
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


def test_lstm_of_other_devices(monkeypatch):
    "PyTorch's own kernel, as GPUs run it: as in training wherever gradients are wanted, because cuDNN differentiates nothing else"
    g, seen, real = torch.Generator().manual_seed(0), [], torch._VF.lstm

    def r(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).requires_grad_()

    x, state, ws = r(5, 3, 4), (r(3, 6), r(3, 6)), [r(24, 4), r(24, 6), r(24), r(24)]
    monkeypatch.setattr(torch._VF, "lstm", lambda *args: seen.append(args[6]) or real(*args))

    def run(f):
        out, (h, c) = f(x, state, *ws)
        return out, h, c, *torch.autograd.grad(out.square().sum() + h.sum() + c.exp().sum(), [x, *state, *ws])

    for a, b in zip(run(L.own_lstm), run(L.lstm)):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        L.own_lstm(x, state, *ws)
    assert seen == [True, False]


def test_models_in_processes_of_their_own(tmp_path, monkeypatch):
    "The same models as one after the other; the second seed's was trained elsewhere"
    text = [["the", "cat", "sat", str(i % 7)] for i in range(150)]
    want, _ = L.protocol_lms(text, text, TINY, (0, 1))
    here, real = [], L._pass
    monkeypatch.setattr(
        L, "_pass", lambda lm, opt, text, epoch, seed, bar: here.append(seed) or real(lm, opt, text, epoch, seed, bar)
    )
    got, _ = L.protocol_lms(text, text, TINY, (0, 1), tmp_path / "lm", apart=True)
    assert here == [0] * TINY.epochs
    for a, b in zip(got, want):
        assert a.seed == b.seed
        for x, y in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="need a folder"):
        L.protocol_lms(text, text, TINY, (0, 1), None, apart=True)
    monkeypatch.setenv("LDEBM_SHARED_GPU", "yes")
    with pytest.raises(ValueError, match="LDEBM_SHARED_GPU must be '0' or '1', got 'yes'"):
        L.protocol_lms(text, text, TINY, (0, 1))
