"`lm`: layers against PyTorch and hand computation, streams, dictionaries"

import dataclasses

import numpy as np
import pytest
import torch
from tiny_lm import TINY, model
from torch.nn import functional as nnf

from ldebm.core import make_gen
from ldebm.corpora import split_sentences
from ldebm.lm import (
    LM,
    LMS,
    STOP,
    as_stream,
    cut_points,
    drop_weights,
    lm_nll,
    lm_words,
    locked,
    lstm,
    mask,
    parts_nll,
    read_text,
    side_by_side,
)

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("in_test")


def test_paper_is_the_published_recipe():
    c = LMS["paper"]
    assert (c.layers, c.embed, c.hidden, c.batch, c.epochs, c.bptt, c.nonmono) == (3, 400, 1150, 20, 20, 70, 5)
    assert (c.dropout, c.dropout_between, c.dropout_input, c.dropout_embed, c.weight_drop) == (0.4, 0.25, 0.4, 0.1, 0.5)
    assert (c.ar, c.tar, c.weight_decay, c.optimizer, c.lr, c.clip, c.parts) == (2, 1, 1.2e-6, "asgd", 30, 0.25, ())
    lm = LM(["w"] * 10_000, [], c, make_gen(0))
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


@pytest.mark.parametrize("T, B", [(1, 1), (6, 3)])
def test_lstm_is_pytorchs(T, B):
    gen, i, H = torch.Generator().manual_seed(0), 5, 4
    args = [
        torch.randn(s, generator=gen, dtype=F64, requires_grad=True)
        for s in ((T, B, i), (B, H), (B, H), (4 * H, i), (4 * H, H), (4 * H,), (4 * H,))
    ]
    x, h, c, *w = args
    got, (hT, cT) = lstm(x, (h, c), *w)
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
    got, want = parts_nll(h, w, y, cuts), -lp.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(got, want)
    up = torch.rand(40, generator=gen, dtype=F64)
    for a, b in zip(torch.autograd.grad((got * up).sum(), (h, w)), torch.autograd.grad((want * up).sum(), (h, w))):
        torch.testing.assert_close(a, b)


def test_cuts_follow_tokens_and_leave_words_to_learn_from():
    assert cut_points([50, 30, 10, 6, 4, 0, 0, 0], (0.79, 0.94)) == [2, 4]
    assert cut_points([50, 30, 10, 6, 4], (0.999,)) == []  # the last part would be words without a single example
    assert cut_points([99, 1, 0, 0], (0.5, 0.9)) == [1]
    assert cut_points([1] * 10, ()) == []


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
    M = mask(raw, raw.shape, 0.5, make_gen(1))
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
    y = locked(x, 0.25, make_gen(0))
    assert torch.equal(y[0], y[4]) and not torch.equal(y[:, 0], y[:, 1]) and set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert y.mean() == pytest.approx(1, abs=0.1) and locked(x, 0.25, None) is x
    cfg = dataclasses.replace(
        TINY, layers=3, dropout=0.5, dropout_between=0.3, dropout_input=0.2, dropout_embed=0.4, weight_drop=0.1
    )
    lm, ids, gen = model(cfg), torch.tensor([[1, 1], [2, 1], [1, 8]]), make_gen(3)
    got, raw, _ = lm.train()(ids, lm.begin(2), make_gen(3))
    E = mask(got, (9, 1), 0.4, gen)  # the order in which masks are drawn
    z = locked(lm.table[ids, :-1] * E[ids], 0.2, gen)
    for i, (wi, wh, bi, bh) in enumerate(lm.rnn):
        dropped = drop_weights(wh, 0.1, gen)
        h = lstm(z, lm.begin(2)[i], wi, dropped, bi, bh)[0]
        z = locked(h, 0.5 if i == 2 else 0.3, gen)
    torch.testing.assert_close((got, raw), (z, h))
    with pytest.raises(ValueError, match="needs a generator"):
        lm(ids, lm.begin(2))


def test_dictionary_and_streams():
    words, freq = lm_words([["b", "a"], ["b"], []], [["c"]], [["d", "b"]])
    assert words == [STOP, "b", "a", "c", "d"] and freq == [3, 2, 1, 0, 0]
    ids = as_stream({w: i for i, w in enumerate(words)}, [["a"], [], ["d", "c"]])
    assert ids.tolist() == [2, 0, 0, 4, 3, 0]
    assert side_by_side(torch.arange(11), 3).tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_state_is_carried_across_sentences_and_chunks():
    lm = model(dataclasses.replace(TINY, layers=2)).eval()
    sents = [["w1", "w2"], [], ["w3"], ["w2", "w2", "w7"]]
    stream = [0, *as_stream(lm.ids, sents).tolist()]
    state, want = lm.begin(1), []
    with torch.no_grad():
        for a, b in zip(stream, stream[1:]):  # a word at a time
            h, _, state = lm(torch.tensor([[a]]), state)
            want.append(lm.nll(h, torch.tensor([[b]])).item())
    ends = np.cumsum([len(s) + 1 for s in sents])
    got = lm_nll(lm, sents)
    assert got.dtype == F64
    np.testing.assert_allclose(got, [sum(want[a:b]) for a, b in zip([0, *ends], ends)], rtol=1e-10)
    ids = torch.tensor(stream)[:, None]
    for rows in (1, 3, 100):
        torch.testing.assert_close(read_text(lm, ids, rows), torch.tensor(want, dtype=F64)[:, None])
    assert abs(lm_nll(lm, [sents[-1]]).item() - got[-1].item()) > 1e-6  # alone, it is read differently
    assert not lm.training


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match="'zebra'"):
        lm_nll(model(), [["w1", "zebra"]])


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
    words, freq = lm_words(s["train"][:40_000], s["train"][40_000:], s["test"])
    assert len(words) == 10_000 and 900 < cut_points(freq, LMS["small"].parts)[0] < 1100


def test_dictionary_does_not_depend_on_who_asks():
    "Words that were never met have no order of their own, so that the models of real text serve every generator"
    train = [["a", "b", "b"]]
    assert (
        lm_words(train, [["z", "x"]], [["y"]])
        == lm_words(train, [["y", "z"]], [["x", "z"]])
        == (["b", "a", "<eos>", "x", "y", "z"], [2, 1, 1, 0, 0, 0])
    )


def test_lstm_runs_as_in_training_where_gradients_are_wanted(monkeypatch):
    "The definition runs as in training wherever gradients are wanted: cuDNN differentiates nothing else"
    g, seen, real = torch.Generator().manual_seed(0), [], torch._VF.lstm

    def r(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).requires_grad_()

    x, state, ws = r(5, 3, 4), (r(3, 6), r(3, 6)), [r(24, 4), r(24, 6), r(24), r(24)]

    def run(f):
        out, (h, c) = f(x, state, *ws)
        return out, h, c, *torch.autograd.grad(out.square().sum() + h.sum() + c.exp().sum(), [x, *state, *ws])

    want = run(lstm)  # with whatever is registered
    monkeypatch.setattr(torch._VF, "lstm", lambda *args: seen.append(args[6]) or real(*args))
    for a, b in zip(run(lstm.plain), want):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        lstm.plain(x, state, *ws)
    assert seen == [True, False]
