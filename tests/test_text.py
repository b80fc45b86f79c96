"Text: vocabulary, corpora, files that cannot be one, and batches"

import random
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from ldebm.corpora import DD_LABELS, load_corpus
from ldebm.grammar_corpus import load_grammar, load_grammar_files
from ldebm.sentences import parse_sentences
from ldebm.text import Vocab, batches, build_vocab, get_batch, make_split, n_batches


def gen(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("grammar")


# -- corpora


def test_grammar_corpus(corpus):
    files = load_grammar_files()
    assert {k: len(s) for k, s in corpus.splits.items()} == {"train": 8000, "valid": 1000, "test": 2000}
    for k, s in corpus.splits.items():
        assert s.sentences() == files[k][0]  # nothing truncated, nothing unknown
        for n, v in s.labels.items():
            assert_close(v, files[k][1][n], rtol=0, atol=0)
    assert list(corpus.label_names) == ["topic", "mood", "tense", "number"]
    g = load_grammar()
    assert set(corpus.vocab.itos) == {*g.words, "<pad>", "<unk>", "<s>", "</s>"}
    i = 17
    assert corpus["test"].ids[i].tolist() == [
        corpus.vocab.bos,
        *corpus.vocab.encode(files["test"][0][i]),
        corpus.vocab.eos,
    ]


def test_vocabulary_ties_and_round_trip():
    v = build_vocab([["b", "a", "c"], ["c"]], size=5)
    assert v.itos == ["<pad>", "<unk>", "<s>", "c", "</s>", "b", "a"]  # ties by first appearance, not by letter
    assert build_vocab([["b", "a", "c"], ["c"]], size=4).itos == v.itos[:-1]
    assert v.decode(v.encode(["a", "nothing", "c"])) == ["a", "<unk>", "c"]
    assert v.decode(torch.tensor([v.bos, v.stoi["a"], v.eos, v.stoi["c"], 0])) == ["a"]
    assert Vocab(v.itos) == v and len(v) == 7
    with pytest.raises(ValueError, match="<pad> first"):
        Vocab(["<unk>", "<pad>", "<s>", "</s>"])
    with pytest.raises(ValueError, match="distinct"):
        Vocab([*v.itos, "a"])


def test_vocabulary_is_that_of_torchtext():
    "Sorted and cut as there, once a fraction of each count lets earlier words come first among equals"
    theirs = pytest.importorskip("torchtext.vocab").Vocab
    draw = random.Random(0)
    sentences = [[f"w{int(draw.paretovariate(0.7))}" for _ in range(12)] for _ in range(300)]
    counts = Counter(word for words in sentences for word in ["<s>", *words, "</s>"])
    n = len(counts)
    untied = Counter({word: count + (n - i) / (n + 1) for i, (word, count) in enumerate(counts.items())})
    for size in (50, 150):
        assert n > size and "<unk>" not in counts
        assert build_vocab(sentences, size).itos == theirs(untied, max_size=size, specials=["<pad>", "<unk>"]).itos


def test_truncation():
    v = build_vocab([[f"w{i}" for i in range(50)]])
    s = make_split(v, [[f"w{i}" for i in range(n)] for n in (37, 38, 39, 50)], max_len=40)
    assert s.lengths.tolist() == [39, 40, 40, 40]
    assert all(o[0] == v.bos and o[-1] == v.eos for o in s.ids)
    assert s.tokens(3) == [f"w{i}" for i in range(38)]
    with pytest.raises(ValueError, match="max_len must be at least 3"):
        make_split(v, [["w0"]], max_len=2)


@pytest.mark.data
def test_ptb_facts(ldebm_data):
    c = load_corpus("ptb")
    assert [len(c[k]) for k in ("train", "valid", "test")] == [42_068, 3_370, 3_761]
    assert len(c.vocab) == 10_001
    assert (c.vocab.pad, c.vocab.unk, c.vocab.bos, c.vocab.eos) == (0, 2, 3, 4)
    assert "isi" not in c.vocab.stoi and c.vocab.itos[1] == "the"
    for k, want in (("train", 21.729), ("valid", 21.572), ("test", 21.594)):
        assert abs((c[k].lengths - 1).double().mean() - want) < 5e-4, k
    words = set(w for line in (ldebm_data / "ptb" / "ptb.test.txt").read_text().split("\n") for w in line.split())
    assert words <= set(c.vocab.stoi)  # no unknown test word
    assert int(c["train"].lengths.max()) == 40


@pytest.mark.data
def test_dailydialog_facts(ldebm_data):
    c = load_corpus("dailydialog")
    assert [len(c[k]) for k in ("train", "valid", "test")] == [87_170, 8_069, 7_740]
    assert len(c.vocab) == 10_004 and c.vocab.itos[:4] == ["<pad>", "<unk>", "<sys>", "<usr>"]
    assert c["test"].labels["act"].bincount().tolist() == [3534, 2210, 1278, 718]
    assert c["test"].labels["emotion"].bincount().tolist() == [6321, 118, 47, 17, 1019, 102, 116]
    for s in c.splits.values():
        assert {k: (int(v.min()), int(v.max())) for k, v in s.labels.items()} == {
            k: (0, len(n) - 1) for k, n in DD_LABELS.items()
        }
        assert int(s.lengths.min()) >= 3 and int(s.lengths.max()) <= 40
    assert 0.005 < c["train"].flat.eq(c.vocab.unk).double().mean() < 0.01


def test_dailydialog_files_that_do_not_go_together(tmp_path, monkeypatch):
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    for s in ("train", "validation", "test"):
        d = tmp_path / "dailydialog" / s
        d.mkdir(parents=True)
        (d / f"dialogues_{s}.txt").write_text("Hi there . __eou__ Hello ! __eou__\n")
        (d / f"dialogues_act_{s}.txt").write_text("1 1\n")
        (d / f"dialogues_emotion_{s}.txt").write_text("0 4\n")
    c = load_corpus("dailydialog")
    assert c["train"].sentences() == [["hi", "there", "."], ["hello", "!"]] and c["train"].labels[
        "emotion"
    ].tolist() == [0, 4]
    (tmp_path / "dailydialog" / "test" / "dialogues_act_test.txt").write_text("1\n")
    with pytest.raises(ValueError, match="dialogue 1 has 2 turns, 1 acts, 2 emotions"):
        load_corpus("dailydialog")
    (tmp_path / "dailydialog" / "test" / "dialogues_act_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="without test/dialogues_act_test.txt"):
        load_corpus("dailydialog")


# -- bad input


@pytest.mark.parametrize(
    "content,wrong",
    [
        (b"", "is empty"),
        (b"\n \n\n", "is empty"),
        (b"just one line\n", "has 1 sentence; at least 40"),
        (b"two words\n" * 39, "has 39 sentences; at least 40"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "binary file .a zero byte at 8"),
        (b"fine\nna\xefve\n", "not UTF-8: byte 0xef in line 2"),
        (b"word\n" * 40, "single word"),
        (b"a <s> b\n" * 40, "sentence 1 has the word '<s>'"),
    ],
)
def test_files_that_cannot_be_a_corpus(tmp_path, content, wrong):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=wrong) as e:
        load_corpus(str(path))
    assert "mine.txt" in str(e.value)


def test_names_and_paths_that_do_not_exist(tmp_path):
    known = "Known: grammar, ptb, dailydialog, movie-reviews"
    with pytest.raises(ValueError, match=f"unknown corpus 'gramar'; did you mean 'grammar'. {known}"):
        load_corpus("gramar")
    with pytest.raises(ValueError, match="unknown corpus 'zzz'. Known:"):
        load_corpus("zzz")
    with pytest.raises(FileNotFoundError, match="no such file: .*missing.txt"):
        load_corpus(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match="is a folder"):
        load_corpus(str(tmp_path))
    with pytest.raises(ValueError, match="vocab_size must be at least 4"):
        load_corpus("grammar", vocab_size=1)


def test_missing_ptb(tmp_path, monkeypatch):
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    monkeypatch.setenv("LDEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LDEBM_DOWNLOAD", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data set 'ptb' not found. Looked in") as e:
        load_corpus("ptb")
    assert (
        str(tmp_path / "ptb") in str(e.value) and "LDEBM_DOWNLOAD=1" in str(e.value) and "ptb.train.txt" in str(e.value)
    )
    (tmp_path / "ptb").mkdir()
    for k in ("train", "valid", "test"):
        (tmp_path / "ptb" / f"ptb.{k}.txt").write_text("not the treebank\n")
    with pytest.raises(ValueError, match="ptb.train.txt: wrong checksum"):
        load_corpus("ptb")


def test_own_file(tmp_path):
    path = tmp_path / "mine.txt"
    lines = [f"sentence w{i} of mine" for i in range(110)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())  # byte-order mark, Windows ends, blank lines
    a, b, c = load_corpus(str(path)), load_corpus(path), load_corpus(str(path), seed=1)
    assert (
        [len(a[k]) for k in ("train", "valid", "test")] == [100, 5, 5]
        and a.name == "mine.txt"
        and a["test"].labels == {}
    )
    for k in a.splits:
        assert torch.equal(a[k].flat, b[k].flat)
    assert a.vocab != c.vocab
    assert a["train"].sentences() == [
        s.split() for s in lines if s.split()[1] in a.vocab.stoi
    ]  # file order, and only its own words
    assert all(s[1] == "<unk>" for s in a["test"].sentences())
    assert len(load_corpus(path, vocab_size=6).vocab) == 8


# -- special words and what cannot be seen


@pytest.mark.parametrize(
    "text,want,said",
    [
        ("<s> a b </s>\n<s> c </s>\n", [["a", "b"], ["c"]], "4 begin and end tags dropped"),
        ("a b <eos>\nc <EOS>\n", [["a", "b"], ["c"]], "2 begin and end tags dropped"),
        (
            "<bos> a </s> <pad> <pad>\n<s> </s>\n",
            [["a"]],
            "4 begin and end tags dropped; 2 <pad> dropped; 1 lines of nothing else skipped",
        ),
        ("a <unk> <UNK>\nunk\n", [["a", "<unk>", "<unk>"], ["unk"]], "2 <unk> read as the unknown word"),
        ("\ufeffa b\n\ufeffc\n", [["a", "b"], ["c"]], "1 invisible characters dropped"),
        ("a\u00adb \x01\nc\x7f d\u200e\n", [["ab"], ["c", "d"]], "4 invisible characters dropped"),
        ("a\u00a0b\u200bc\u2028d\x85e\n", [["a", "b", "c", "d", "e"]], ""),
        ("a b\r\nc\rd\n", [["a", "b"], ["c"], ["d"]], ""),
        (
            "\u0645\u06cc\u200c\u062e a\u200d \u200d \u2764\ufe0f\n",
            [["\u0645\u06cc\u200c\u062e", "a\u200d", "\u2764\ufe0f"]],
            "1 invisible words dropped",
        ),
    ],
)
def test_what_is_no_word(text, want, said):
    got, notes = parse_sentences(text.encode(), "mine.txt")
    assert got == want and "; ".join(notes) == said


@pytest.mark.parametrize(
    "line,word",
    [
        ("a <eos> b", "<eos>"),
        ("a <s>", "<s>"),
        ("</s> a", "</s>"),
        ("<pad> a", "<pad>"),
        ("a <PAD> b", "<pad>"),
        ("a <bos> b <eos>", "<bos>"),
    ],
)
def test_an_end_in_the_middle(line, word):
    with pytest.raises(
        ValueError,
        match=f"mine.txt: sentence 2 has the word '{word}' in the middle .line 3., "
        "which is reserved: begin a new line there",
    ):
        parse_sentences(f"x y\n\n{line}\n".encode(), "mine.txt")


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings(code):
    with pytest.raises(ValueError, match="not UTF-8|binary"):
        parse_sentences("a b\n".encode(code), "mine.txt")


def test_rare_special_words_keep_their_place():
    many = [[f"w{i}" for i in range(9)]] * 5
    v = build_vocab([*many, ["<unk>"]], size=6)
    assert v.itos == ["<pad>", "<s>", "</s>", "w0", "w1", "w2", "<unk>"] and len(v) == 7
    v = build_vocab(
        [["x"] * 9 + ["y"] * 9 + ["z"] * 9 + ["u"] * 9 + ["<unk>"]], size=4
    )  # the tags too are rarer than every word
    assert v.itos == ["<pad>", "x", "<unk>", "<s>", "</s>"]
    assert build_vocab([["x"] * 9 + ["y"] * 9 + ["z"] * 9 + ["u"] * 9], size=4).itos == [
        "<pad>",
        "<unk>",
        "x",
        "y",
        "<s>",
        "</s>",
    ]
    assert build_vocab([*many, ["<unk>"] * 9], size=6).itos == [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        "w0",
        "w1",
        "w2",
    ]  # as published where it is frequent


def test_one_unknown_word_in_a_large_vocabulary(tmp_path):
    (tmp_path / "mine.txt").write_text(
        "".join(f"w{i} w{i + 1} w{i} w{i + 1}\n" for i in range(100)) + "one <unk> more\n"
    )
    c = load_corpus(str(tmp_path / "mine.txt"), vocab_size=50)
    assert len(c.vocab) == 51 and c.vocab.itos[-1] == "<unk>" and "1 <unk> read as the unknown word" in c.notes
    assert "Reading it: 1 &lt;unk> read" in c._repr_markdown_()


def test_a_file_is_never_taken_for_a_corpus_of_ours(tmp_path):
    (tmp_path / "grammar").write_text("a b c\n" * 40)
    assert load_corpus(str(tmp_path / "grammar")).name == "file-grammar"


def test_a_fingerprint_is_of_all_that_is_read(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"a b c d{i % 7} e f\n" for i in range(60)))
    a, b = load_corpus(path, max_len=5), load_corpus(path, max_len=5)
    cut = load_corpus(path, max_len=6)
    path.write_text(path.read_text().replace("e f", "f e"))  # beyond max_len
    c = load_corpus(path, max_len=5)
    assert a.fingerprint == b.fingerprint and all(torch.equal(a[k].flat, c[k].flat) for k in a.splits)
    assert (
        len({a.fingerprint, cut.fingerprint, c.fingerprint}) == 3 and a.sha256 != c.sha256 and a.altered("train") == 54
    )


# -- batches


def test_every_sentence_once_and_padding(corpus):
    s = corpus["valid"]
    for kw in ({}, {"gen": gen(0)}, {"gen": gen(0), "bucket": False}, {"gen": gen(0), "pad_to": 40}):
        seen = []
        for b in batches(s, 64, **kw):
            seen += b.index.tolist()
            assert b.ids.shape == (len(b.index), kw.get("pad_to", int(b.lengths.max())))
            assert torch.equal(b.ids.ne(0).sum(1), b.lengths)
            for j, i in list(enumerate(b.index.tolist()))[:3]:
                assert torch.equal(b.ids[j, : b.lengths[j]], s.ids[i]) and b.labels["topic"][j] == s.labels["topic"][i]
        assert sorted(seen) == list(range(len(s)))
        assert (seen == list(range(len(s)))) == (kw == {})


def test_order_is_the_generators_alone(corpus):
    s = corpus["valid"]

    def order(g):
        return torch.cat([b.index for b in batches(s, 64, gen=g)])

    random.seed(1)
    torch.manual_seed(1)
    a = order(gen(3))
    random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(a, order(gen(3))) and not torch.equal(a, order(gen(4)))
    g, h = gen(3), gen(3)
    batches(s, 64, gen=g)  # drawn at the call, used or not
    order(h)
    assert torch.equal(g.get_state(), h.get_state())
    assert not torch.equal(order(g), a)  # the next epoch is another


@pytest.mark.parametrize("bucket", [True, False])
def test_resume_equals_the_tail(corpus, bucket):
    s = corpus["train"]
    whole = list(batches(s, 128, gen=gen(5), bucket=bucket))
    for start in (0, 1, 40, 62, 63):
        tail = list(batches(s, 128, gen=gen(5), bucket=bucket, start=start))
        assert len(tail) == len(whole) - start
        for a, b in zip(whole[start:], tail):
            assert torch.equal(a.ids, b.ids) and torch.equal(a.index, b.index)


def test_buckets_save_padding(corpus):
    s = corpus["train"]

    def waste(**kw):
        return sum(int(b.ids.eq(0).sum()) for b in batches(s, 64, **kw)) / sum(
            b.ids.numel() for b in batches(s, 64, **kw)
        )

    assert waste(gen=gen(0)) < 0.05 < waste(gen=gen(0), bucket=False)


def test_counts_and_dropping(corpus):
    s = corpus["valid"]
    for size in (1, 30, 64, 1000, 2000):
        for drop in (False, True):
            assert len(list(batches(s, size, gen=gen(0), drop_last=drop))) == n_batches(s, size, drop_last=drop)
    kept = torch.cat([b.index for b in batches(s, 300, gen=gen(0), drop_last=True)])
    left = torch.ones(len(s), dtype=torch.bool)
    left[kept] = False
    mean = s.lengths.double()
    assert (
        abs(mean[left].mean() - mean.mean()) < 5 * mean.std() / left.sum().sqrt()
    )  # those left out are random, not the longest
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        batches(s, 0)


def test_index_draws_an_epoch(corpus):
    s = corpus["train"]
    index = torch.randint(len(s), (500,), generator=gen(0))
    seen = torch.cat([b.index for b in batches(s, 64, gen=gen(1), index=index)])
    assert torch.equal(seen.sort().values, index.sort().values)
    assert torch.equal(torch.cat([b.index for b in batches(s, 64, index=index)]), index)
    assert n_batches(s, 64, index=index) == 8


def test_batch_moves_and_refuses_a_narrow_width(corpus):
    b = get_batch(corpus["test"], torch.tensor([3, 1]))
    m = b.to("meta")
    assert {t.device.type for t in (m.ids, m.lengths, m.index, *m.labels.values())} == {"meta"} and len(m) == 2
    with pytest.raises(ValueError, match="pad_to is 4"):
        get_batch(corpus["test"], torch.tensor([0]), pad_to=4)
