"Any file at all: it is refused before training in one sentence that says what to do, or the job ends in a complete record"
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ldebm import text_score as S
from ldebm.core import check_result
from ldebm.likelihood import AISCfg, NLLCfg
from ldebm.text import BEGIN, BOS, END, EOS, HIDDEN, PAD, SHAPING, UNK, load_corpus, split_sentences
from ldebm.text_job import TextJob, open_job

TINY = "embed=8 hidden=8 batch=8 max_len=6 vocab_size=7 n_samples={n} nll_draws=4 nll_sentences=6 lm=quick lm_seeds=1"
EBM = " d=2 energy_hidden=8 n_blocks=1 T=2 langevin_steps=2 n_symbols=3"
ROWS = {"ldebm": EBM+" cls_start=0 energy_steps=2 energy_batch=4", "ldebm published": EBM, "vae": " d=2", "dgm-vae": " d=2 codes=2 classes=2 importance_draws=4", "rnn-lm": ""}
CFG = NLLCfg(draws=4, chains=4, fit=16, rich=2, top=16, n_z=4, paths=2, ais=AISCfg(chains=2, long=2, pilot=8))
REMEDY = re.compile(r"a corpus is a text file with one sentence a line|a corpus has one sentence a line|at least \d+ (sentences )?are needed|convert it|begin a new line|lower |give ")
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<eos>", "<bos>", "<sos>", "<UNK>", "</S>", "<Pad>")
ODD = "\ufeff\u200b\u200d\u00ad\u00a0\u2028\u0085\x01\x1b\x1c\x7f\r\x0b'\ufe0f\ufffd\u202e\ufffe"

quiet = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
words = st.one_of(st.sampled_from(["a", "b", "it's", "long-word", "Ā", "𝒳"]), st.sampled_from(SPECIAL), st.text(st.characters(codec="utf-8"), max_size=4), st.text(ODD, min_size=1, max_size=3))
plain = st.lists(st.sampled_from(["a", "b", "it's", "c d", "𝒳", "<unk>", "e\ufeff"]), min_size=1, max_size=9).map(" ".join)
tagged = plain.map(lambda s: f"<s> {s} </s> <pad>") | plain.map(lambda s: s+" <eos>")
anything = st.lists(words, max_size=7).map(" ".join)


@st.composite
def texts(draw):
    "Lines of one kind or of several, over and over"
    line = draw(st.sampled_from([plain, tagged, plain | tagged, anything, anything | plain]))
    lines = draw(st.lists(line, min_size=1, max_size=8))
    n = draw(st.sampled_from([1, 19, 45, 46, 130]))
    end = draw(st.sampled_from(["\n", "\r\n", "\n\n", "\r", " \n"]))
    return end.join((lines*n)[:max(n, len(lines))])+draw(st.sampled_from(["", end]))


def refusal(e, path):
    "One sentence that names the file and a remedy"
    said = str(e)
    assert "\n" not in said and path.name in said and REMEDY.search(said), said


@settings(max_examples=200, **quiet)
@given(st.one_of(texts().map(str.encode), st.binary(max_size=60), st.text(max_size=40).map(lambda s: s.encode("utf-16"))))
def test_any_file_is_a_corpus_or_is_refused(raw):
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/"any.txt"
        path.write_bytes(raw)
        try: c = load_corpus(str(path), max_len=6, vocab_size=7)
        except ValueError as e: return refusal(e, path)
        every = split_sentences(str(path))
        assert {k: c.whole(k) for k in c.splits} == split_sentences(str(path), vocab=c.vocab)
        assert c.source == raw and {k: len(s) for k, s in c.splits.items()} == {k: len(s) for k, s in every.items()}
    found = {w for s in every.values() for ws in s for w in ws}
    assert not any(w.lower() in (PAD, *BEGIN, *END) or HIDDEN.search(w) or SHAPING.fullmatch(w) or "\u200b" in w or w.split() != [w] for w in found)
    assert not any(w.lower() == UNK and w != UNK for w in found) and all(ws for s in every.values() for ws in s)
    assert len(c.vocab) <= 9 and {PAD, UNK, BOS, EOS} <= set(c.vocab.itos)


def complete(rec, row):
    "A record with every metric of its row, or the reason why there is none"
    check_result(rec)
    m = rec["metrics"]
    need = {"wkl", "self_bleu", "overlap_4", "memorised", "unique", "mean_length", "rppl", *([] if row == "rnn-lm" else ["bleu", "active_units", "nll_valid", "prior_hole_auroc"])}
    assert need <= set(m) | ({"nll_valid"} if row == "rnn-lm" else set()), need-set(m)
    for k, v in m.items(): assert v["value"] is not None or v["estimator"], k
    for k in need: assert m[k]["value"] is not None or "not computed: " in m[k]["estimator"], (k, m[k])


def whole_job(text, row, n):
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/"any.txt"
        path.write_bytes(text.encode())
        system, _, objective = row.partition(" ")
        job = TextJob(corpus=str(path), row=system, objective=objective or "consistent", steps=2, device="cpu", threads=1, settings=TINY.format(n=n)+ROWS[row], out=f"{d}/run")
        try: open_job(job)
        except ValueError as e:
            assert not (Path(d)/"run").exists()
            return refusal(e, path)
        path.unlink()                       # whatever becomes of it: it has been read
        complete(S.run_job(job), row)
        complete(json.loads((Path(d)/"run"/"result.json").read_text()), row)
        assert len((Path(d)/"run"/"samples.txt").read_text().split("\n")) == n+1


@pytest.mark.usefixtures("in_test")
@settings(max_examples=20, **quiet)
@given(texts(), st.sampled_from(sorted(ROWS)), st.sampled_from([20, 100]))
@example("a b\n"*130, "ldebm", 100)
@example("one two three <eos>\nfour five <eos>\n"*65, "vae", 100)
def test_any_job_is_refused_or_complete(text, row, n):
    kept = S.nll_cfg, S.sampler_evidence
    S.nll_cfg, S.sampler_evidence = lambda task: CFG, lambda prior, gen, cpu_gen: kept[1](prior, gen, n=20, longer=2, cpu_gen=cpu_gen)
    try: whole_job(text, row, n)
    finally: S.nll_cfg, S.sampler_evidence = kept
