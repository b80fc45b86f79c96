"Data: files and their errors, the embedded grammar against slower definitions, densities and the two-sample statistic"

import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ldebm import data, grammar_corpus
from ldebm.data import checksum, find_data
from ldebm.grammar import Alt, Grammar, Seq, derivations, opt, seq, words
from ldebm.grammar_corpus import GRAMMAR_FILES, grammar_texts, load_grammar, load_grammar_files, write_grammar
from ldebm.toys import TOYS, pinwheel, pinwheel_log_density

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clean(tmp_path, monkeypatch):
    "An empty world: no LDEBM_DATA, no checkout, an empty cache"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LDEBM_DATA", raising=False)
    monkeypatch.delenv("LDEBM_DOWNLOAD", raising=False)
    monkeypatch.setenv("LDEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "data_root", lambda: [Path(tmp_path / "here"), Path(tmp_path / "cache")])
    return tmp_path


def gen(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def grammar():
    return load_grammar()


@pytest.fixture(scope="module")
def drawn(grammar):
    return grammar.sample(3000, gen(11))


def slow_joint(g, ws):
    "p(attributes, words) of each combination, by enumerating derivations"
    return [p * sum(q for j, q, _ in derivations(g.rule(**a), ws) if j == len(ws)) for p, a in zip(g.prior, g.combos)]


# -- files


def test_files_in_the_checkout_are_regenerated_bit_by_bit(tmp_path):
    write_grammar(tmp_path)
    for name, want in GRAMMAR_FILES.items():
        made, kept = (tmp_path / name).read_bytes(), (ROOT / "data" / "grammar" / name).read_bytes()
        assert made == kept, name
        assert checksum(made) == want, name
    assert {p.name for p in tmp_path.iterdir()} == set(GRAMMAR_FILES)


def test_the_corpus_without_its_files_is_the_same(clean, monkeypatch):
    in_memory = load_grammar_files()
    write_grammar(clean / "here" / "grammar")
    monkeypatch.setattr(grammar_corpus, "grammar_texts", lambda: pytest.fail("made although the files are there"))
    from_files = load_grammar_files()
    for split in ("train", "valid", "test"):
        assert in_memory[split][0] == from_files[split][0]
        for k, v in in_memory[split][1].items():
            assert_close(v, from_files[split][1][k], rtol=0, atol=0)


def test_altered_corpus_is_refused(clean):
    write_grammar(clean / "here" / "grammar")
    with open(clean / "here" / "grammar" / "test.txt", "a") as f:
        f.write("one more .\n")
    with pytest.raises(
        ValueError, match=r"test\.txt: wrong checksum: wanted gitblob:[0-9a-f]{40}, got gitblob:[0-9a-f]{40}"
    ):
        load_grammar_files()


def test_missing_data_says_where_it_looked_and_how_to_get_it(clean):
    (clean / "here" / "demo").mkdir(parents=True)
    (clean / "here" / "demo" / "a.txt").write_text("one")
    with pytest.raises(FileNotFoundError) as e:
        find_data("demo", {"a.txt": None, "b.txt": None}, url="https://example.org/x", hint="Ask nicely.")
    for said in (
        "'demo'",
        f"{clean / 'here' / 'demo'}: without b.txt",
        f"{clean / 'cache' / 'demo'}: no such folder",
        "LDEBM_DATA",
        "LDEBM_DOWNLOAD=1",
        "https://example.org/x/b.txt",
        "Ask nicely.",
    ):
        assert said in str(e.value), said


def test_data_roots_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path / "mine"))
    monkeypatch.setenv("LDEBM_CACHE", str(tmp_path / "cache"))
    roots = [p.resolve() for p in data.data_root()]
    assert roots == [
        (tmp_path / "mine").resolve(),
        (tmp_path / "data").resolve(),
        ROOT / "data",
        (tmp_path / "cache").resolve(),
    ]


def test_download_is_checked_before_it_gets_its_name(clean, monkeypatch):
    (clean / "server").mkdir()
    (clean / "server" / "a.txt").write_bytes(b"right\n")
    files, url = {"a.txt": checksum(b"right\n")}, (clean / "server").as_uri()
    with pytest.raises(FileNotFoundError):
        find_data("demo", files, url=url)  # not unless asked
    with pytest.raises(ValueError, match="wrong checksum"):
        find_data("demo", {"a.txt": checksum(b"wrong\n")}, url=url, download=True)
    assert not list((clean / "cache").rglob("*.*"))
    with pytest.raises(OSError, match="could not download nothing.txt"):
        find_data("demo", {"nothing.txt": None}, url=url, download=True)
    assert not list((clean / "cache").rglob("*.*"))
    monkeypatch.setenv("LDEBM_DOWNLOAD", "1")
    assert [p.name for p in find_data("demo", files, url=url).iterdir()] == ["a.txt"]
    (clean / "server" / "a.txt").unlink()
    assert find_data("demo", files, url=url) == clean / "cache" / "demo"  # from the cache


@pytest.mark.data
def test_ptb_checksums(ldebm_data):
    assert find_data("ptb", data.PTB_FILES) == ldebm_data / "ptb"
    with pytest.raises(ValueError, match="ptb.test.txt: wrong checksum"):
        find_data("ptb", {"ptb.test.txt": data.PTB_FILES["ptb.valid.txt"]})


# -- the grammar class, on grammars small enough to write out


def random_rule(depth, g):
    "A random rule; short words and many choices make it ambiguous"
    kind = int(torch.randint(4 if depth else 1, (1,), generator=g))
    if kind == 0:
        return ["a", "b", "a b", "b a a", ""][int(torch.randint(5, (1,), generator=g))]
    parts = [random_rule(depth - 1, g) for _ in range(int(torch.randint(1, 4, (1,), generator=g)))]
    if kind == 1:
        return Seq(tuple(parts))
    if kind == 2:
        return opt(parts[0], 0.3)
    return Alt(tuple((int(torch.randint(1, 5, (1,), generator=g)), p) for p in parts))


@pytest.mark.parametrize("seed", range(12))
def test_random_ambiguous_grammars_against_full_enumeration(seed):
    r = gen(seed)
    rules = {(u, v): seq(random_rule(3, r), words("a b"), random_rule(3, r)) for u in "pq" for v in "st"}
    g = Grammar(
        {"first": ("p", "q"), "second": ("s", "t")},
        lambda first, second: 1 + 2 * (first == "p") - (first + second == "qt"),
        lambda first, second: rules[first, second],
    )
    said = list(g.all_sentences())
    assert len({tuple(ws) for ws, _ in said}) == len(said)
    assert math.isclose(sum(p for _, p in said), 1, rel_tol=1e-12)
    h = h_first = 0.0
    for ws, p in said:
        joint = slow_joint(g, ws)
        assert math.isclose(p, sum(joint), rel_tol=1e-10)
        assert math.isclose(g.log_prob(ws), math.log(sum(joint)), rel_tol=1e-10, abs_tol=1e-12)
        post = torch.zeros(2, dtype=torch.float64)
        for q, a in zip(joint, g.combos):
            post["pq".index(a["first"])] += q / sum(joint)
        assert_close(g.posterior(ws)["first"], post, rtol=1e-9, atol=1e-12)
        h, h_first = h - p * math.log(p), h_first + p * float(torch.special.entr(post).sum())
    prior, mutual = g.information()["first"]
    assert math.isclose(g.entropy(), h, rel_tol=1e-10, abs_tol=1e-12)
    assert math.isclose(prior - mutual, h_first, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(g.mean_length(), sum(p * len(ws) for ws, p in said), rel_tol=1e-10)
    assert g.max_length() == max(len(ws) for ws, _ in said)
    assert g.log_prob(["c"]) == -math.inf and g.log_prob(["a"] * (g.max_length() + 1)) == -math.inf


def test_writing_out_too_much_is_refused(grammar):
    with pytest.raises(ValueError, match="more than 50 sentences"):
        list(grammar.all_sentences(limit=50))


# -- the embedded corpus


def test_size_of_the_corpus(grammar, drawn):
    assert 150 <= len(grammar.words) <= 300
    assert grammar.entropy() >= 15
    assert len(grammar.attributes) >= 3
    lengths = [len(ws) for ws in drawn[0]]
    assert min(lengths) >= 5 and grammar.max_length() <= 20
    assert len(set(map(tuple, drawn[0]))) > 0.98 * len(drawn[0])


def test_log_prob_and_posterior_against_all_derivations(grammar, drawn):
    for ws in drawn[0][:25]:
        joint = slow_joint(grammar, ws)
        assert math.isclose(grammar.log_prob(ws), math.log(sum(joint)), rel_tol=1e-10)
        for n, vs in grammar.attributes.items():
            want = torch.tensor(
                [sum(q for q, a in zip(joint, grammar.combos) if a[n] == v) for v in vs], dtype=torch.float64
            ) / sum(joint)
            assert_close(grammar.posterior(ws)[n], want, rtol=1e-9, atol=1e-12)


def test_entropy_against_monte_carlo(grammar, drawn):
    lp = grammar.log_probs(drawn[0])
    assert abs(-lp.mean() - grammar.entropy()) < 5 * lp.std() / math.sqrt(len(lp))
    n = torch.tensor([float(len(ws)) for ws in drawn[0]])
    assert abs(n.mean() - grammar.mean_length()) < 5 * n.std() / math.sqrt(len(n))


def test_next_words_sum_to_one_everywhere(grammar):
    for step in grammar.step:
        if step:
            assert math.isclose(math.fsum(p for p, _ in step.values()), 1, rel_tol=1e-12)


def test_posterior_is_calibrated(grammar, drawn):
    "Mean posterior equals the frequency of the truth, and the mean log-posterior of the truth is -H(a|x)"
    post = [grammar.posterior(ws) for ws in drawn[0]]
    for n, truth in drawn[1].items():
        p = torch.stack([o[n] for o in post])
        hit = torch.nn.functional.one_hot(truth, p.shape[1]).double()
        assert (p[hit.bool()] > 0).all()
        se = ((hit - p).var(0) / len(p)).sqrt()
        assert ((hit - p).mean(0).abs() <= 5 * se + 1e-12).all(), n
        lp = p[hit.bool()].log()
        prior, mutual = grammar.information()[n]
        assert abs(-lp.mean() - (prior - mutual)) <= 5 * lp.std() / math.sqrt(len(lp)) + 1e-12, n


def test_sampling_given_attributes(grammar):
    sentences, labels = grammar.sample(200, gen(0), topic="farm", tense="past")
    assert (labels["topic"] == 3).all() and (labels["tense"] == 0).all() and (labels["mood"] != 2).all()
    for ws in sentences:
        assert grammar.posterior(ws)["topic"][3] > 0
    with pytest.raises(ValueError, match="no sentence has"):
        grammar.sample(1, gen(0), topic="moon")
    with pytest.raises(ValueError, match="no sentence has"):
        grammar.sample(1, gen(0), mood="command", tense="past")
    assert grammar.sample(20, gen(7))[0] == grammar.sample(20, gen(7))[0] != grammar.sample(20, gen(8))[0]


def test_word_soup_is_not_grammatical(grammar, drawn):
    g = gen(3)
    uniform = [
        [grammar.words[i] for i in torch.randint(len(grammar.words), (len(ws),), generator=g)] for ws in drawn[0][:500]
    ]
    shuffled = [[ws[i] for i in torch.randperm(len(ws), generator=g)] for ws in drawn[0][:500]]
    assert grammar.log_probs(uniform).isinf().all()
    assert grammar.log_probs(shuffled).isinf().float().mean() > 0.99
    assert grammar.log_prob([]) == -math.inf


@pytest.mark.parametrize(
    "good,bad",
    [
        ("this sailor repairs the boat .", "these sailor repairs the boat ."),
        ("these sailors repair the boat .", "these sailors repairs the boat ."),
        ("the sailors who live near the bay repair the boat .", "the sailors who live near the bay repairs the boat ."),
        ("the sailor repaired the boat yesterday .", "the sailor repaired the boat tomorrow ."),
        ("does the sailor repair the boat ?", "does the sailor repairs the boat ?"),
        ("where did the sailor repair the boat ?", "where did the sailor repair the boat in the bay ?"),
        ("the sailors sold the boat because they were tired .", "the sailors sold the boat because he was tired ."),
        ("please repair the boat !", "please repair the boat ."),
        ("the sailor repairs the boat .", "the sailor treats the boat ."),
    ],
)
def test_agreement(grammar, good, bad):
    assert grammar.log_prob(good.split()) > -math.inf
    assert grammar.log_prob(bad.split()) == -math.inf
    with pytest.raises(ValueError, match="not a sentence of the grammar"):
        grammar.posterior(bad.split())


def test_reading_adds_up(grammar, drawn):
    ws = drawn[0][0]
    surprisal, beliefs = grammar.read(ws)
    end = grammar.step[0]
    for w in ws:
        end = grammar.step[end[w][1]]
    assert math.isclose(-float(surprisal.sum()) + math.log(end[None][0]), grammar.log_prob(ws), rel_tol=1e-12)
    assert_close(beliefs["topic"].sum(1), torch.ones(len(ws) + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="at word 1, 'zebra'"):
        grammar.read(["the", "zebra"])


def test_log_prob_is_fast(grammar, drawn):
    import time

    t = time.perf_counter()
    grammar.log_probs(drawn[0])
    assert len(drawn[0]) / (time.perf_counter() - t) > 2000


def test_grammar_texts_do_not_depend_on_the_global_generator():
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert {k: checksum(v.encode()) for k, v in grammar_texts().items()} == GRAMMAR_FILES
    assert torch.equal(torch.get_rng_state(), state)


# -- densities in the plane


@pytest.mark.parametrize("name", TOYS)
def test_density_by_monte_carlo(name):
    "Under the law, E[q(x)/p(x)] = 1 for any normalised q inside its support: here a shifted, shrunk copy of a Gaussian"
    x = TOYS[name].sample(20_000, gen(5)).double()
    q = torch.distributions.Normal(
        torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor(1.4, dtype=torch.float64)
    )
    centre = TOYS[name].log_density(x)
    assert centre.isfinite().all()
    inside = centre > -6  # truncate both sides so that the ratio has a variance
    u = torch.arange(-7.0, 7.0, 0.05, dtype=torch.float64) + 0.025
    grid = torch.cartesian_prod(u, u)
    on = TOYS[name].log_density(grid) > -6
    want = q.log_prob(grid[on]).sum(1).exp().sum() * 0.05**2
    ratio = (q.log_prob(x).sum(1) - centre).exp() * inside
    assert abs(ratio.mean() - want) < 5 * ratio.std() / math.sqrt(len(x)) + 0.01 * want


def test_pinwheel_density_far_out_and_at_the_origin():
    x = torch.tensor([[0.0, 0.0], [7.0, 0.0], [-9.0, 3.0], [20.0, 0.0]])
    lp = pinwheel_log_density(x)
    assert lp[:3].isfinite().all() and lp[3] == -math.inf and lp.dtype == x.dtype
    turn = torch.tensor(
        [
            [math.cos(2 * math.pi / 10), -math.sin(2 * math.pi / 10)],
            [math.sin(2 * math.pi / 10), math.cos(2 * math.pi / 10)],
        ]
    )
    x = pinwheel(100, gen(1))
    assert_close(pinwheel_log_density(x @ turn), pinwheel_log_density(x), rtol=1e-3, atol=1e-3)  # ten-fold symmetry
    assert_close(pinwheel_log_density(x, chunk=7), pinwheel_log_density(x))
