"`text_metrics` against independent implementations, bad input, and the published reference values on real data"
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from ldebm import text_metrics as tm
from ldebm.core import make_gen


def value(m): return m["value"]


def lines(path): return [s.split() for s in path.read_text().splitlines() if s.split()]


# --- BLEU

def multi_bleu(hyps, refs):
    "Moses' multi-bleu.perl for one reference, written from its source"
    correct, total, len_h, len_r = [0]*4, [0]*4, 0, 0
    for h, r in zip(hyps, refs):
        len_h, len_r = len_h + len(h), len_r + len(r)
        for n in range(1, 5):
            ref = Counter(tuple(r[i:i+n]) for i in range(len(r)-n+1))
            for g, c in Counter(tuple(h[i:i+n]) for i in range(len(h)-n+1)).items():
                total[n-1] += c
                correct[n-1] += min(c, ref[g])
    if min(correct) == 0: return 0.0   # log(0) is -9999999999 in the script
    bp = math.exp(1 - len_r/len_h) if len_h < len_r else 1.0
    return 100*bp*math.exp(sum(math.log(c/t) for c, t in zip(correct, total))/4)


def noisy_pairs(seed, n=60, words="the a cat dog sat ran . , <unk> N 's".split(), drop=0.15):
    "Sentences of few, hence repeated, words and noisy copies of them; odd tokens included"
    rnd = random.Random(seed)
    refs = [[rnd.choice(words) for _ in range(rnd.randint(1, 20))] for _ in range(n)]
    hyps = [[rnd.choice(words) if rnd.random() < .2 else w for w in r if rnd.random() > drop] for r in refs]
    return hyps, refs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_bleu_equals_multi_bleu(seed, drop):
    hyps, refs = noisy_pairs(seed, drop=drop)
    want = multi_bleu(hyps, refs)
    assert 5 < want < 95
    assert value(tm.bleu(hyps, refs)) == pytest.approx(want, abs=1e-9)
    assert value(tm.bleu(refs, refs)) == pytest.approx(100, abs=1e-9)


def test_bleu_edge_cases():
    assert value(tm.bleu(["a b c x".split()], ["a b c d".split()])) == 0 == multi_bleu(["a b c x".split()], ["a b c d".split()])
    assert value(tm.bleu([["a"]], [["a"]])) == 0   # no 4-gram anywhere
    hyps, refs = [[], "a b c d e".split()], ["x y".split(), "a b c d e".split()]
    assert value(tm.bleu(hyps, refs)) == pytest.approx(multi_bleu(hyps, refs))   # an empty reconstruction
    assert value(tm.bleu([[], []], refs)) == 0
    hyps, refs = ["a b c d e f".split(), ["z"]], ["a b c d e f".split(), []]
    assert value(tm.bleu(hyps, refs)) == pytest.approx(multi_bleu(hyps, refs))   # an empty reference
    for bad in (([], []), ([["a"]], [["a"], ["b"]])):
        with pytest.raises(ValueError): tm.bleu(*bad)


def test_bleu_is_case_sensitive_and_keeps_tokens():
    assert value(tm.bleu(["The Cat sat down".split()], ["the cat sat down".split()])) == 0
    s = "do n't split <unk> u.s. @-@ &amp; N $".split()
    assert value(tm.bleu([s], [s])) == pytest.approx(100)


def test_bleu_interval_is_reproducible_and_about_right():
    hyps, refs = noisy_pairs(0, n=300)
    a, b = (tm.bleu(hyps, refs, gen=make_gen(0, "boot")) for _ in range(2))
    assert a == b and a["interval"][0] < a["value"] < a["interval"][1]
    values = [value(tm.bleu(*noisy_pairs(s, n=300))) for s in range(1, 25)]   # the spread the interval is meant to describe
    width = a["interval"][1] - a["interval"][0]
    assert 0.6 < width/(2*1.96*np.std(values, ddof=1)) < 1.6


# --- frequencies

def test_wkl_uses_the_first_sentences_and_either_form_of_train():
    train = [["a", "b"], ["b", "c"]]
    samples = [["a"]]*3 + [["b"]]*5
    m = tm.wkl(samples, train, n_max=3)
    assert m["n"] == 3 and m["value"] == pytest.approx(math.log(4))
    assert tm.wkl(samples, tm.word_counts(train)) == tm.wkl(samples, train)
    with pytest.raises(ValueError): tm.wkl([[]], train)


def test_wkl_skips_and_unseen_share_tells():
    assert value(tm.wkl([["x"]*9 + ["a"]], [["a"]])) == pytest.approx(0.1*math.log(0.1))   # negative: not a divergence any more
    assert value(tm.unseen_share([["x"]*9 + ["a"]], [["a"]])) == pytest.approx(0.9)


@pytest.mark.data
def test_wkl_of_ptb(ldebm_data):
    train, test = (lines(ldebm_data/"ptb"/f"ptb.{s}.txt") for s in ("train", "test"))
    assert (len(train), len(test)) == (42_068, 3_761)
    assert tm.word_counts(train) == Counter(w for s in train for w in s)   # splitting 's changes nothing here
    counts = tm.word_counts(train)
    assert value(tm.wkl(test, counts)) == pytest.approx(0.136, abs=0.001)
    assert value(tm.wkl([s[:38] for s in test], counts)) == pytest.approx(0.138, abs=0.001)
    assert value(tm.wkl(lines(ldebm_data/"ptb"/"ptb.valid.txt"), counts)) == pytest.approx(0.178, abs=0.001)
    m = tm.wkl_reference(train, 40_000, make_gen(0, "wkl"), n_rep=3)
    assert value(m) == pytest.approx(0.006, abs=0.0007) and m["n"] == 40_000
    assert value(tm.wkl_reference(train, 1000, make_gen(0, "wkl"), n_rep=3)) == pytest.approx(0.210, abs=0.01)
    drawn = torch.randint(len(train), (40_000,), generator=make_gen(1, "wkl")).tolist()
    assert value(tm.wkl([train[i] for i in drawn], counts)) == pytest.approx(value(m), abs=0.0005)


@pytest.mark.data
def test_bleu_of_ptb_references(ldebm_data):
    test = [s[:38] for s in lines(ldebm_data/"ptb"/"ptb.test.txt")]
    assert value(tm.bleu(test, test)) == pytest.approx(100, abs=1e-9)
    shorter = [s[:-1] if len(s) > 4 else s for s in test]
    assert value(tm.bleu(shorter, test)) == pytest.approx(multi_bleu(shorter, test), abs=1e-9)


# --- variety

def test_variety_edge_cases():
    assert tm.distinct_n([["a"], []], 2)["value"] is None and tm.unique_share([])["value"] is None
    assert value(tm.distinct_n([["a", "b", "c"]], 1)) == 1
    assert value(tm.distinct_n([["a"]*11], 2)) == pytest.approx(0.1)
    assert value(tm.memorised_share([["a", "b"], ["a"]], [["a", "b", "c"], ["a"]])) == 0.5   # whole sentences, not parts
    with pytest.raises(ValueError): tm.self_bleu([["a"]])


def test_self_bleu_by_definition():
    from sacrebleu.metrics import BLEU
    kind = BLEU(tokenize="none", force=True, smooth_method="floor", smooth_value=0.1, effective_order=True)
    rnd = random.Random(0)
    samples = [[rnd.choice("abcde") for _ in range(rnd.randint(1, 12))] for _ in range(40)] + [list("abcd")]*3
    text = [" ".join(s) for s in samples]
    slow = [kind.sentence_score(t, text[:i] + text[i+1:]).score for i, t in enumerate(text)]
    assert value(tm.self_bleu(samples)) == pytest.approx(np.mean(slow), abs=1e-9)
    assert value(tm.self_bleu([list("abcdef")]*5)) == pytest.approx(100)
    assert tm.self_bleu(samples*3, make_gen(0, "s"), n_max=50) == tm.self_bleu(samples*3, make_gen(0, "s"), n_max=50)
    assert tm.self_bleu(samples*3, make_gen(0, "s"), n_max=50)["n"] == 50


# --- symbols

def test_mutual_information_is_stable_and_bounded():
    extreme = torch.tensor([[1e4, 0.], [0., 1e4], [-1e4, -1e4 + 1e-3]])
    m = tm.mutual_information(extreme)
    assert math.isfinite(m["value"]) and 0 < m["value"] < math.log(2)
    assert value(tm.mutual_information(torch.tensor([[1., 0.], [0., 1.]]), probs=True)) == pytest.approx(math.log(2))
    assert value(tm.effective_symbols(torch.tensor([[1., 0.], [1., 0.]]), probs=True)) == pytest.approx(1)
    assert value(tm.mutual_information(torch.full((10, 5), 3.))) == pytest.approx(0, abs=1e-12)
    x = torch.randn(500, 8, generator=make_gen(0, "x"))
    shifted = x + 100*torch.randn(500, 1, generator=make_gen(1, "x"))
    assert value(tm.mutual_information(shifted)) == pytest.approx(value(tm.mutual_information(x)), abs=1e-4)
    for bad in (torch.tensor([[float("nan"), 0.]]), torch.zeros(0, 3), torch.zeros(4)):
        with pytest.raises(ValueError): tm.mutual_information(bad)
    with pytest.raises(ValueError): tm.mutual_information(torch.tensor([[.5, .6]]), probs=True)


def test_mutual_information_interval_covers():
    "Sentences of a known law p(k|x): the interval from 400 of them holds the value from very many, about as often as it says"
    draw = lambda n, i: 2*torch.randn(n, 6, generator=make_gen(0, "law", i))
    truth = value(tm.mutual_information(draw(200_000, 0)))
    hits = sum(lo <= truth <= hi for lo, hi in (tm.mutual_information(draw(400, i))["interval"] for i in range(1, 201)))
    assert 0.90*200 <= hits <= 200


def test_homogeneity_against_its_formula_and_chance():
    a = torch.randint(4, (3000,), generator=make_gen(0, "a"))
    c = torch.where(torch.rand(3000, generator=make_gen(0, "u")) < .7, a, torch.randint(10, (3000,), generator=make_gen(0, "c")))
    joint = torch.zeros(4, 10, dtype=torch.double).index_put_((a, c), torch.ones(3000, dtype=torch.double), accumulate=True)/3000
    H = lambda p: -(p[p > 0]*p[p > 0].log()).sum().item()
    m = tm.homogeneity(a, c, make_gen(0, "p"), "topic")
    assert set(m) == {"homogeneity_topic", "homogeneity_topic_chance"}
    assert value(m["homogeneity_topic"]) == pytest.approx(1 - (H(joint) - H(joint.sum(0)))/H(joint.sum(1)), abs=1e-9)
    assert value(m["homogeneity_topic_chance"]) == pytest.approx(3*9/(2*3000)/H(joint.sum(1)), rel=0.4)   # chi-squared, 3*9 dof
    x = tm.ami(a, c, make_gen(0, "p"))
    assert abs(value(x["ami_chance"])) < 0.005 and 0.2 < value(x["ami"]) < 1
    assert value(tm.ami(a, (a + 2) % 4, make_gen(0, "p"))["ami"]) == pytest.approx(1)   # names of symbols do not matter
    assert tm.homogeneity(a.tolist(), c.numpy(), make_gen(0, "p"), "topic") == m
    with pytest.raises(ValueError): tm.homogeneity(a, c[:-1], make_gen(0, "p"))
    with pytest.raises(ValueError): tm.homogeneity_per_batch(a[:100], c[:100], make_gen(0, "p"))


@pytest.mark.data
@pytest.mark.parametrize("k, batch, act, emotion", [
    (125, 128, .698, .726), (60, 128, .502, .567), (51, 128, .453, .521), (20, 128, .200, .307), (11, 128, .109, .193),
    (11, 30, .402, .474),
    (125, None, .020, .073), (60, None, .010, .037), (51, None, .009, .035), (20, None, .003, .009), (11, None, .001, .007)])
def test_chance_levels_on_dailydialog(ldebm_data, k, batch, act, emotion):
    for name, want in (("act", act), ("emotion", emotion)):
        labels = np.array((ldebm_data/"dailydialog"/"test"/f"dialogues_{name}_test.txt").read_text().split(), dtype=int)
        assert len(labels) == 7740
        clusters = torch.randint(k, (len(labels),), generator=make_gen(0, "random clusters", k))
        if batch is None: got = tm.homogeneity(labels, clusters, make_gen(0, "p"), n_perm=3)
        else: got = tm.homogeneity_per_batch(labels, clusters, make_gen(0, "p"), batch_size=batch, n_perm=1)
        tolerance = 0.02 if batch else max(0.003, 0.3*want)   # over the whole set the reference's draw and ours both scatter by 8 %
        for m in got.values(): assert value(m) == pytest.approx(want, abs=tolerance)   # score of random clusters, and its chance level


# --- the rest

def test_active_units():
    mu = torch.randn(500, 3, generator=make_gen(0, "mu"))*torch.tensor([1., 0.11, 0.09])
    assert value(tm.active_units(mu)) == 2
    assert value(tm.active_units(mu + 100)) == 2
    for bad in (mu[:1], mu[0], mu*float("nan")):
        with pytest.raises(ValueError): tm.active_units(bad)


def test_grammar_scores():
    calls = []
    def log_prob(s):
        calls.append(tuple(s))
        return {("a",): -1.0, ("b",): -3.0}.get(tuple(s), -math.inf)
    s = tm.grammar_scores([["a"], ["a"], ["b"], ["c"]], log_prob, train=[["b"]])
    assert (value(s["grammatical"]), value(s["memorised"]), s["exact_nll"]["n"]) == (0.75, 0.25, 3)
    assert value(s["exact_nll"]) == pytest.approx(5/3)
    assert len(calls) == 3   # equal sentences are parsed once
    none = tm.grammar_scores([["c"]], log_prob)
    assert none["exact_nll"]["value"] is None and none["exact_nll"]["n"] == 0 and "memorised" not in none
    with pytest.raises(ValueError, match="'x'"): tm.grammar_scores([["x"]], lambda s: float("nan"))


def test_wilson_interval_against_known_values():
    lo, hi = tm.wilson_interval(8, 10)
    assert (lo, hi) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert tm.wilson_interval(0, 10)[0] == 0 and tm.wilson_interval(10, 10)[1] == 1 and tm.wilson_interval(0, 0) is None


def test_mean_interval_covers():
    v = torch.randn(1000, 50, generator=make_gen(0, "v")).double() + 3
    hits = sum(lo <= 3 <= hi for lo, hi in map(tm.mean_interval, v.numpy()))
    assert abs(hits/1000 - 0.95) < 5*math.sqrt(.05*.95/1000)
    assert tm.mean_interval([1.0]) is None
