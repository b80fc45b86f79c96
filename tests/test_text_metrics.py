"`text_metrics` against independent implementations, bad input, and the published reference values on real data"

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from ldebm import text_metrics as tm
from ldebm.core import make_gen
from ldebm.grammar_corpus import load_grammar


def value(m):
    return m["value"]


def grammar_text(n, *stream):
    return load_grammar().sample(n, make_gen(0, *stream))[0]


def width(m):
    return m["interval"][1] - m["interval"][0]


def lines(path):
    return [s.split() for s in path.read_text().splitlines() if s.split()]


# --- BLEU


def multi_bleu(hyps, refs):
    "Moses' multi-bleu.perl for one reference, written from its source"
    correct, total, len_h, len_r = [0] * 4, [0] * 4, 0, 0
    for h, r in zip(hyps, refs):
        len_h, len_r = len_h + len(h), len_r + len(r)
        for n in range(1, 5):
            ref = Counter(tuple(r[i : i + n]) for i in range(len(r) - n + 1))
            for g, c in Counter(tuple(h[i : i + n]) for i in range(len(h) - n + 1)).items():
                total[n - 1] += c
                correct[n - 1] += min(c, ref[g])
    if min(correct) == 0:
        return 0.0  # log(0) is -9999999999 in the script
    bp = math.exp(1 - len_r / len_h) if len_h < len_r else 1.0
    return 100 * bp * math.exp(sum(math.log(c / t) for c, t in zip(correct, total)) / 4)


def noisy_pairs(seed, n=60, words="the a cat dog sat ran . , <unk> N 's".split(), drop=0.15):
    "Sentences of few, hence repeated, words and noisy copies of them; odd tokens included"
    rnd = random.Random(seed)
    refs = [[rnd.choice(words) for _ in range(rnd.randint(1, 20))] for _ in range(n)]
    hyps = [[rnd.choice(words) if rnd.random() < 0.2 else w for w in r if rnd.random() > drop] for r in refs]
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
    assert (
        value(tm.bleu(["a b c x".split()], ["a b c d".split()]))
        == 0
        == multi_bleu(["a b c x".split()], ["a b c d".split()])
    )
    assert value(tm.bleu([["a"]], [["a"]])) == 0  # no 4-gram anywhere
    hyps, refs = [[], "a b c d e".split()], ["x y".split(), "a b c d e".split()]
    assert value(tm.bleu(hyps, refs)) == pytest.approx(multi_bleu(hyps, refs))  # an empty reconstruction
    assert value(tm.bleu([[], []], refs)) == 0
    hyps, refs = ["a b c d e f".split(), ["z"]], ["a b c d e f".split(), []]
    assert value(tm.bleu(hyps, refs)) == pytest.approx(multi_bleu(hyps, refs))  # an empty reference
    for bad in (([], []), ([["a"]], [["a"], ["b"]])):
        with pytest.raises(ValueError):
            tm.bleu(*bad)


def test_bleu_is_case_sensitive_and_keeps_tokens():
    assert value(tm.bleu(["The Cat sat down".split()], ["the cat sat down".split()])) == 0
    s = "do n't split <unk> u.s. @-@ &amp; N $".split()
    assert value(tm.bleu([s], [s])) == pytest.approx(100)


def test_bleu_interval_is_reproducible_and_about_right():
    hyps, refs = noisy_pairs(0, n=300)
    a, b = (tm.bleu(hyps, refs, gen=make_gen(0, "boot")) for _ in range(2))
    assert a == b and a["interval"][0] < a["value"] < a["interval"][1]
    values = [
        value(tm.bleu(*noisy_pairs(s, n=300))) for s in range(1, 25)
    ]  # the spread the interval is meant to describe
    width = a["interval"][1] - a["interval"][0]
    assert 0.6 < width / (2 * 1.96 * np.std(values, ddof=1)) < 1.6


# --- frequencies


def test_wkl_uses_the_first_sentences_and_either_form_of_train():
    train = [["a", "b"], ["b", "c"]]
    samples = [["a"]] * 3 + [["b"]] * 5
    m = tm.wkl(samples, train, n_max=3)
    assert m["n"] == 3 and m["value"] == pytest.approx(math.log(4))
    assert tm.wkl(samples, tm.word_counts(train)) == tm.wkl(samples, train)
    with pytest.raises(ValueError):
        tm.wkl([[]], train)


def test_wkl_skips_and_unseen_share_tells():
    assert value(tm.wkl([["x"] * 9 + ["a"]], [["a"]])) == pytest.approx(
        0.1 * math.log(0.1)
    )  # negative: not a divergence any more
    assert value(tm.unseen_share([["x"] * 9 + ["a"]], [["a"]])) == pytest.approx(0.9)


def zipf_text(n, *stream, types=60, length=8, power=1.0):
    p = 1 / torch.arange(1, types + 1).double() ** power
    return [
        [f"w{i}" for i in s]
        for s in torch.multinomial(p, n * length, replacement=True, generator=make_gen(0, *stream))
        .view(n, length)
        .tolist()
    ]


def test_wkl_interval():
    train = tm.word_counts(zipf_text(5000, "train"))
    other = [
        tm.wkl(zipf_text(300, "other", i, power=1.3), train, gen=make_gen(0, "b", i)) for i in range(60)
    ]  # truly different: the linear part rules
    sd = np.std([value(m) for m in other], ddof=1)
    assert 0.75 < np.mean([width(m) for m in other]) / (2 * 1.96 * sd) < 1.35
    same = [
        tm.wkl(zipf_text(300, "same", i), train, gen=make_gen(0, "b", i)) for i in range(60)
    ]  # noise rules: conservative, by about sqrt(3)
    sd, mean = np.std([value(m) for m in same], ddof=1), np.mean([value(m) for m in same])
    assert 1.1 < np.mean([width(m) for m in same]) / (2 * 1.96 * sd) < 2.6
    assert sum(m["interval"][0] <= mean <= m["interval"][1] for m in same) >= 55
    assert tm.wkl([["a"], []] * 50, [["a"]], gen=make_gen(0))["interval"] == [0, 0]  # nothing varies
    m = tm.wkl(
        [["a", "b", "x"], ["a"], ["b", "b"]] * 9, [["a", "b"]], gen=make_gen(1), n_boot=7
    )  # by definition, sentence by sentence
    from ldebm.stats import bootstrap_interval, resample_counts

    w = resample_counts(27, 7, make_gen(1))
    again = [[["a", "b", "x"], ["a"], ["b", "b"]][i % 3] for i in range(27)]
    slow = [value(tm.wkl([s for s, k in zip(again, row) for _ in range(int(k))], [["a", "b"]])) for row in w]
    assert m["interval"] == pytest.approx(bootstrap_interval(value(m), slow))


def test_wkl_reference_is_the_score_of_resampled_sentences():
    train = zipf_text(2000, "train")
    m = tm.wkl_reference(train, 500, make_gen(0, "r"))
    v = [
        value(tm.wkl([train[i] for i in torch.randint(2000, (500,), generator=make_gen(0, "d", j)).tolist()], train))
        for j in range(100)
    ]
    assert value(m) == pytest.approx(np.mean(v), abs=4 * np.std(v) / 20**0.5)
    assert sum(m["interval"][0] <= x <= m["interval"][1] for x in v) >= 80
    assert tm.wkl_reference(train, 500, make_gen(0, "r"), n_rep=1)["interval"] is None


@pytest.mark.data
def test_wkl_of_ptb(ldebm_data):
    train, test = (lines(ldebm_data / "ptb" / f"ptb.{s}.txt") for s in ("train", "test"))
    assert (len(train), len(test)) == (42_068, 3_761)
    assert tm.word_counts(train) == Counter(w for s in train for w in s)  # splitting 's changes nothing here
    counts = tm.word_counts(train)
    assert value(tm.wkl(test, counts)) == pytest.approx(0.136, abs=0.001)
    assert value(tm.wkl([s[:38] for s in test], counts)) == pytest.approx(0.138, abs=0.001)
    assert value(tm.wkl(lines(ldebm_data / "ptb" / "ptb.valid.txt"), counts)) == pytest.approx(0.178, abs=0.001)
    m = tm.wkl_reference(train, 40_000, make_gen(0, "wkl"), n_rep=3)
    assert value(m) == pytest.approx(0.006, abs=0.0007) and m["n"] == 40_000
    assert value(tm.wkl_reference(train, 1000, make_gen(0, "wkl"), n_rep=3)) == pytest.approx(0.210, abs=0.01)
    assert value(tm.wkl_reference(train, 10_000, make_gen(0, "wkl"), n_rep=3)) == pytest.approx(0.027, abs=0.001)
    assert value(tm.wkl_reference(train, 20_000, make_gen(0, "wkl"), n_rep=3)) == pytest.approx(0.012, abs=0.001)
    some = [
        value(
            tm.wkl(
                [train[i] for i in torch.randperm(len(train), generator=make_gen(0, "some", j))[:3761].tolist()], counts
            )
        )
        for j in range(3)
    ]
    assert all(0.063 < v < 0.073 for v in some)
    assert value(tm.wkl(train, test, n_max=len(train))) == pytest.approx(0.017, abs=0.001)  # the other way round
    m = tm.wkl(test, counts, gen=make_gen(0, "boot"))
    assert m["interval"][0] < 0.136 < m["interval"][1] and width(m) < 0.03
    m = tm.wkl_reference(train, 40_000, make_gen(0, "wkl"), n_rep=3)
    drawn = torch.randint(len(train), (40_000,), generator=make_gen(1, "wkl")).tolist()
    assert value(tm.wkl([train[i] for i in drawn], counts)) == pytest.approx(value(m), abs=0.0005)


@pytest.mark.data
def test_bleu_of_ptb_references(ldebm_data):
    test = [s[:38] for s in lines(ldebm_data / "ptb" / "ptb.test.txt")]
    assert value(tm.bleu(test, test)) == pytest.approx(100, abs=1e-9)
    shorter = [s[:-1] if len(s) > 4 else s for s in test]
    assert value(tm.bleu(shorter, test)) == pytest.approx(multi_bleu(shorter, test), abs=1e-9)


# --- variety


def test_variety_edge_cases():
    assert tm.distinct_n([["a"], []], 2)["value"] is None and tm.unique_share([])["value"] is None
    assert value(tm.distinct_n([["a", "b", "c"]], 1)) == 1
    assert value(tm.distinct_n([["a"] * 11], 2)) == pytest.approx(0.1)
    assert value(tm.memorised_share([["a", "b"], ["a"]], [["a", "b", "c"], ["a"]])) == 0.5  # whole sentences, not parts
    with pytest.raises(ValueError):
        tm.self_bleu([["a"]])


def test_variety_intervals_leave_sentences_out():
    samples = [list(o) for o in ("abab", "abc", "abab", "d", "bcd", "")]
    from ldebm.stats import jackknife_interval

    for f in (lambda s: tm.distinct_n(s, 2), tm.unique_share):
        left = [value(f(samples[:i] + samples[i + 1 :])) for i in range(len(samples))]
        assert f(samples)["interval"] == pytest.approx(jackknife_interval(value(f(samples)), left, lo=0, hi=1))
    assert tm.distinct_n([["a", "b"], ["c"]], 2)["interval"] is None  # a single sentence has all pairs
    assert tm.unique_share([["a"]])["interval"] is None


def test_variety_intervals_hold_the_value_at_equal_n():
    for f, n in (
        (lambda s: tm.distinct_n(s, 2), 100),
        (lambda s: tm.distinct_n(s, 4), 100),
        (lambda s: tm.unique_share([o[:3] for o in s]), 200),
    ):
        ms = [f(grammar_text(n, "variety", i)) for i in range(80)]
        truth, sd = np.mean([value(m) for m in ms]), np.std([value(m) for m in ms], ddof=1)
        assert sum(m["interval"][0] <= truth <= m["interval"][1] for m in ms) >= 73
        assert 0.8 < np.mean([width(m) for m in ms]) / (2 * 1.96 * sd) < 2.5  # conservative


def test_ngram_overlap_by_hand():
    train, samples = [list("abcd"), list("xy")], [list("abcz"), list("b"), list("yxyx")]
    m = tm.ngram_overlap(samples, train, [list("abcd"), list("bd")], 2)
    assert value(m["overlap_2"]) == 3 / 6 and m["overlap_2"]["n"] == 2  # ab bc | xy; `b` has no pair
    assert value(m["overlap_2_real"]) == 3 / 4
    assert (
        list(tm.ngram_overlap(samples, train, n=8)) == ["overlap_8"]
        and tm.ngram_overlap(samples, train, n=8)["overlap_8"]["value"] is None
    )
    assert value(tm.ngram_overlap(train, train, n=3)["overlap_3"]) == 1


def test_ngram_overlap_of_a_copier():
    train, heldout = grammar_text(500, "train"), grammar_text(500, "heldout")
    fair = [tm.ngram_overlap(grammar_text(300, "fair", i), train, heldout, 4) for i in range(10)]
    copy = tm.ngram_overlap(train[:60] + grammar_text(240, "fair"), train, heldout, 8)
    assert copy["overlap_8"]["interval"][0] > copy["overlap_8_real"]["interval"][1]
    centre = np.mean([value(m["overlap_4"]) for m in fair])
    assert sum(m["overlap_4"]["interval"][0] <= centre <= m["overlap_4"]["interval"][1] for m in fair) >= 8


def test_self_bleu_interval_and_reference():
    real = grammar_text(2000, "real")
    ms = [tm.self_bleu(grammar_text(100, "self", i)) for i in range(80)]
    truth, sd = np.mean([value(m) for m in ms]), np.std([value(m) for m in ms], ddof=1)
    assert (
        0.8 < np.mean([width(m) for m in ms]) / (2 * 1.96 * sd) < 1.6
        and sum(m["interval"][0] <= truth <= m["interval"][1] for m in ms) >= 73
    )
    ref = tm.self_bleu_real(real, 100, make_gen(0, "ref"))
    assert ref["n"] == 100 and ref["interval"][0] < truth < ref["interval"][1]
    with pytest.raises(ValueError, match="3 real sentences"):
        tm.self_bleu_real(real[:2], 3)


def test_self_bleu_by_definition():
    from sacrebleu.metrics import BLEU

    kind = BLEU(tokenize="none", force=True, smooth_method="floor", smooth_value=0.1, effective_order=True)
    rnd = random.Random(0)
    samples = [[rnd.choice("abcde") for _ in range(rnd.randint(1, 12))] for _ in range(40)] + [list("abcd")] * 3
    text = [" ".join(s) for s in samples]
    slow = [kind.sentence_score(t, text[:i] + text[i + 1 :]).score for i, t in enumerate(text)]
    assert value(tm.self_bleu(samples)) == pytest.approx(np.mean(slow), abs=1e-9)
    assert value(tm.self_bleu([list("abcdef")] * 5)) == pytest.approx(100)
    from ldebm.stats import jackknife_interval

    left = [
        value(tm.self_bleu(samples[:i] + samples[i + 1 :])) for i in range(len(samples))
    ]  # leaving one out, by definition
    assert tm.self_bleu(samples)["interval"] == pytest.approx(jackknife_interval(np.mean(slow), left), abs=1e-9)
    assert tm.self_bleu(samples[:2])["interval"] is None
    assert tm.self_bleu(samples * 3, make_gen(0, "s"), n_max=50) == tm.self_bleu(
        samples * 3, make_gen(0, "s"), n_max=50
    )
    assert tm.self_bleu(samples * 3, make_gen(0, "s"), n_max=50)["n"] == 50


# --- the grammar


def test_grammar_scores():
    calls = []

    def log_prob(s):
        calls.append(tuple(s))
        return {("a",): -1.0, ("b",): -3.0}.get(tuple(s), -math.inf)

    s = tm.grammar_scores([["a"], ["a"], ["b"], ["c"]], log_prob, train=[["b"]])
    assert (value(s["grammatical"]), value(s["memorised"]), s["exact_nll"]["n"]) == (0.75, 0.25, 3)
    assert value(s["exact_nll"]) == pytest.approx(5 / 3)
    assert len(calls) == 3  # equal sentences are parsed once
    none = tm.grammar_scores([["c"]], log_prob)
    assert none["exact_nll"]["value"] is None and none["exact_nll"]["n"] == 0 and "memorised" not in none
    with pytest.raises(ValueError, match="'x'"):
        tm.grammar_scores([["x"]], lambda s: float("nan"))
