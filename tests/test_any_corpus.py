"Any file at all is refused before training, in one sentence that says what to do, or the job ends in a complete record"

import hashlib
import json
import random
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ldebm import data, lm, lm_training, reverse, table, text_job, text_measure, text_settings, text_task, zoo
from ldebm import text_score as S
from ldebm.annealing import AISCfg
from ldebm.corpora import load_corpus, make_corpus, split_sentences
from ldebm.likelihood import NLLCfg
from ldebm.records import check_result
from ldebm.sentences import BEGIN, END, HIDDEN, SHAPING
from ldebm.text import BOS, EOS, PAD, UNK, Vocab
from ldebm.text_job import open_job
from ldebm.text_settings import TextJob, load_own

TINY = "embed=8 hidden=8 batch=8 max_len=6 vocab_size=7 n_samples={n} nll_draws=4 nll_sentences=6 lm=quick lm_seeds=1"
EBM = " d=2 energy_hidden=8 n_blocks=1 T=2 langevin_steps=2 n_symbols=3"
CASES = {
    "ldebm": EBM + " cls_start=0 energy_steps=2 energy_batch=4",
    "ldebm published": EBM,
    "vae": " d=2",
    "dgm-vae": " d=2 codes=2 classes=2 importance_draws=4",
    "rnn-lm": "",
}
CFG = NLLCfg(draws=4, chains=4, fit=16, rich=2, top=16, n_z=4, paths=2, ais=AISCfg(chains=2, long=2, pilot=8))
REMEDY = re.compile(
    r"it should be a text file with one sentence a line|a corpus has one sentence a line|"
    r"at least \d+ (sentences )?are needed|convert it|begin a new line|lower |give "
)
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<eos>", "<bos>", "<sos>", "<UNK>", "</S>", "<Pad>")
ODD = "\ufeff\u200b\u200d\u00ad\u00a0\u2028\u0085\x01\x1b\x1c\x7f\r\x0b'\ufe0f\ufffd\u202e\ufffe"

quiet = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
words = st.one_of(
    st.sampled_from(["a", "b", "it's", "long-word", "Ā", "𝒳"]),
    st.sampled_from(SPECIAL),
    st.text(st.characters(codec="utf-8"), max_size=4),
    st.text(ODD, min_size=1, max_size=3),
)
plain = st.lists(st.sampled_from(["a", "b", "it's", "c d", "𝒳", "<unk>", "e\ufeff"]), min_size=1, max_size=9).map(
    " ".join
)
tagged = plain.map(lambda s: f"<s> {s} </s> <pad>") | plain.map(lambda s: s + " <eos>")
anything = st.lists(words, max_size=7).map(" ".join)


@st.composite
def texts(draw):
    "Lines of one kind or of several, over and over"
    line = draw(st.sampled_from([plain, tagged, plain | tagged, anything, anything | plain]))
    lines = draw(st.lists(line, min_size=1, max_size=8))
    n = draw(st.sampled_from([1, 19, 45, 46, 130]))
    end = draw(st.sampled_from(["\n", "\r\n", "\n\n", "\r", " \n"]))
    return end.join((lines * n)[: max(n, len(lines))]) + draw(st.sampled_from(["", end]))


def refusal(e, path):
    "One sentence that names the file and a remedy"
    said = str(e)
    assert "\n" not in said and path.name in said and REMEDY.search(said), said


@settings(max_examples=200, **quiet)
@given(
    st.one_of(texts().map(str.encode), st.binary(max_size=60), st.text(max_size=40).map(lambda s: s.encode("utf-16")))
)
def test_any_file_is_a_corpus_or_is_refused(raw):
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "any.txt"
        path.write_bytes(raw)
        try:
            c = load_corpus(str(path), max_len=6, vocab_size=7)
        except ValueError as e:
            return refusal(e, path)
        every = split_sentences(str(path))
        assert {k: c.whole(k) for k in c.splits} == split_sentences(str(path), vocab=c.vocab)
        assert c.source == raw and {k: len(s) for k, s in c.splits.items()} == {k: len(s) for k, s in every.items()}
    found = {w for s in every.values() for ws in s for w in ws}
    assert not any(
        w.lower() in (PAD, *BEGIN, *END)
        or HIDDEN.search(w)
        or SHAPING.fullmatch(w)
        or "\u200b" in w
        or w.split() != [w]
        for w in found
    )
    assert not any(w.lower() == UNK and w != UNK for w in found) and all(ws for s in every.values() for ws in s)
    assert len(c.vocab) <= 9 and {PAD, UNK, BOS, EOS} <= set(c.vocab.itos)


def complete(rec, case):
    "A record with every metric of its system, or the reason why there is none"
    check_result(rec)
    m = rec["metrics"]
    need = {
        "wkl",
        "self_bleu",
        "overlap_4",
        "memorised",
        "unique",
        "mean_length",
        "rppl",
        *([] if case == "rnn-lm" else ["bleu", "active_units", "nll_valid", "prior_hole_auroc"]),
    }
    assert need <= set(m) | ({"nll_valid"} if case == "rnn-lm" else set()), need - set(m)
    for k, v in m.items():
        assert v["value"] is not None or v["estimator"], k
    for k in need:
        assert m[k]["value"] is not None or "not computed: " in m[k]["estimator"], (k, m[k])


def whole_job(text, case, n):
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "any.txt"
        path.write_bytes(text.encode())
        system, _, objective = case.partition(" ")
        job = TextJob(
            corpus=str(path),
            system=system,
            objective=objective or "consistent",
            steps=2,
            device="cpu",
            threads=1,
            settings=TINY.format(n=n) + CASES[case],
            out=f"{d}/run",
        )
        try:
            open_job(job)
        except ValueError as e:
            assert not (Path(d) / "run").exists()
            return refusal(e, path)
        path.unlink()  # whatever becomes of it: it has been read
        complete(S.run_job(job), case)
        complete(json.loads((Path(d) / "run" / "result.json").read_text()), case)
        assert len((Path(d) / "run" / "samples.txt").read_text().split("\n")) == n + 1


@pytest.mark.usefixtures("in_test")
@settings(max_examples=20, **quiet)
@given(texts(), st.sampled_from(sorted(CASES)), st.sampled_from([20, 100]))
@example("a b\n" * 400, "ldebm", 100)  # enough sentences for a classifier, of latents that are all one
@example("one two three <eos>\nfour five <eos>\n" * 65, "vae", 100)
def test_any_job_is_refused_or_complete(text, case, n):
    kept = S.nll_cfg, S.sampler_evidence
    S.nll_cfg, S.sampler_evidence = (
        lambda task: CFG,
        lambda prior, gen, cpu_gen: kept[1](prior, gen, n=20, longer=2, cpu_gen=cpu_gen),
    )
    try:
        whole_job(text, case, n)
    finally:
        S.nll_cfg, S.sampler_evidence = kept


# -- read once


def lines(n, seed=0):
    r = random.Random(seed)
    return "".join(" ".join(r.choices("one two three four five".split(), k=r.randint(2, 5))) + "\n" for _ in range(n))


def make(tmp_path, **kw):
    return TextJob(
        **{
            **dict(
                corpus=str(tmp_path / "mine.txt"),
                system="vae",
                steps=2,
                device="cpu",
                threads=1,
                out=str(tmp_path / "run"),
                settings="embed=8 hidden=8 d=2 batch=8 nll_draws=0 n_samples=100 lm=quick lm_seeds=1",
            ),
            **kw,
        }
    )


CHANGES = {
    "appended to": lambda p: p.write_text(p.read_text() + lines(90, 1)),
    "edited": lambda p: p.write_text(p.read_text().replace("one", "six")),
    "deleted": lambda p: p.unlink(),
    "replaced by a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    d = tmp_path_factory.mktemp("untouched")
    (d / "mine.txt").write_text(lines(120))
    return S.run_job(make(d))["metrics"]


@pytest.mark.usefixtures("in_test")
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_its_model_trains(tmp_path, monkeypatch, untouched, change):
    (tmp_path / "mine.txt").write_text(lines(120))
    inner = S.launch

    def launch(*a, **k):
        CHANGES[change](tmp_path / "mine.txt")
        return inner(*a, **k)

    monkeypatch.setattr(S, "launch", launch)
    got = S.run_job(make(tmp_path))["metrics"]
    assert {k: v["value"] for k, v in got.items()} == {k: v["value"] for k, v in untouched.items()} and got["rppl"][
        "n"
    ] == got["bleu"]["n"] == 6
    assert (tmp_path / "run" / "corpus.txt").read_text() == lines(120)


@pytest.mark.usefixtures("in_test")
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_two_sittings(tmp_path, change):
    path = tmp_path / "mine.txt"
    path.write_text(lines(120))
    _, task, _ = open_job(make(tmp_path))
    CHANGES[change](path)
    if change == "deleted":
        assert open_job(make(tmp_path))[1].corpus.fingerprint == task.corpus.fingerprint
        with pytest.raises(FileNotFoundError, match="no such file"):
            open_job(make(tmp_path, resume=False))
        return
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match="corpus_sha256|is a folder"):
        open_job(make(tmp_path))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_large_file_is_compared_and_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(text_job, "COPIED_MB", 0)
    (tmp_path / "mine.txt").write_text(lines(120))
    run = open_job(make(tmp_path))[0]
    assert not run.file("corpus.txt").exists()
    (tmp_path / "mine.txt").unlink()
    with pytest.raises(FileNotFoundError, match="mine.txt"):
        open_job(make(tmp_path))


def test_data_of_a_name_that_changes_between_two_sittings(tmp_path, monkeypatch):
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    for s in ("train", "validation", "test"):
        (tmp_path / "dailydialog" / s).mkdir(parents=True)
        for k, text in (("", "Hi there . __eou__ Hello ! __eou__\n"), ("act_", "1 2\n"), ("emotion_", "0 4\n")):
            (tmp_path / "dailydialog" / s / f"dialogues_{k}{s}.txt").write_text(text * 20)
    job = make(tmp_path, corpus="dailydialog")
    open_job(job)
    open_job(job)
    p = tmp_path / "dailydialog" / "test" / "dialogues_emotion_test.txt"
    p.write_text(p.read_text().replace("4", "3"))
    with pytest.raises(
        ValueError,
        match="holds a run on other text of dailydialog .fingerprint .*: "
        "bring the old data back, or choose another folder",
    ):
        open_job(job)
    p.write_text(p.read_text().replace("3", "4"))
    open_job(job)
    p.write_text(p.read_text().replace("4", "3"))
    open_job(make(tmp_path, corpus="dailydialog", out=str(tmp_path / "another")))


def test_files_of_a_name_are_read_once(tmp_path, monkeypatch):
    "What was checked is what is used"
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "a.txt").write_bytes(b"right\n")
    seen, inner = [], Path.read_bytes

    def read(self):
        seen.append(self.name)
        got = inner(self)
        self.write_bytes(b"other\n")
        return got

    monkeypatch.setattr(Path, "read_bytes", read)
    assert data.read_data("demo", {"a.txt": data.checksum(b"right\n")}) == {"a.txt": b"right\n"} and seen == ["a.txt"]


OWN = """from ldebm.zoo import SYSTEMS, System
SYSTEMS['mine'] = System('Mine', 'single', dict(prior='none', d=0), about='a system of the test')
"""


@pytest.mark.usefixtures("in_test")
@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_a_module_that_changes_while_its_model_trains(tmp_path, monkeypatch, change):
    (tmp_path / "mine.txt").write_text(lines(120))
    mod = tmp_path / "mod.py"
    mod.write_text(OWN + f"# {change}\n")
    inner = S.launch

    def launch(*a, **k):
        mod.write_text("raise RuntimeError('run again')\n") if change == "edited" else mod.unlink()
        return inner(*a, **k)

    monkeypatch.setattr(S, "launch", launch)
    try:
        rec = S.run_job(
            make(tmp_path, system="mine", module=str(mod), settings="embed=8 hidden=8 batch=8 n_samples=20 lm=''")
        )
    finally:
        zoo.SYSTEMS.pop("mine", None)
    ran = (OWN + f"# {change}\n").encode()
    assert (tmp_path / "run" / "own.py").read_bytes() == ran and rec["settings"]["module_sha256"] == hashlib.sha256(
        ran
    ).hexdigest()


def test_a_users_file_of_earlier_versions_is_read(tmp_path):
    "It may lie beside a stored model"
    mod = tmp_path / "mod.py"
    mod.write_text(OWN.replace("SYSTEMS", "ROWS").replace("System", "Row"))
    try:
        load_own(str(mod))
        assert isinstance(zoo.SYSTEMS["mine"], zoo.System)
    finally:
        zoo.SYSTEMS.pop("mine", None)
    with pytest.raises(AttributeError, match="no attribute 'Rows'"):
        zoo.Rows


def test_a_module_that_is_no_python_is_one_line(tmp_path):
    (tmp_path / "bad.py").write_text("import torch\nclass Mine(torch.nn.Module:\n")
    with pytest.raises(ValueError, match=r"module .*bad.py, line 2: ") as e:
        load_own(str(tmp_path / "bad.py"))
    assert "\n" not in str(e.value)


def test_all_runs_of_a_table_read_one_copy(tmp_path, monkeypatch):
    path, seen = tmp_path / "mine.txt", []
    path.write_text(lines(120))
    monkeypatch.setattr(table, "job_notebooks", lambda: dict(zoo=tmp_path / "nb.ipynb"))

    def sweep(todo, **how):
        path.write_text(lines(90, 1))
        seen.extend(todo)
        return {j.name: dict(state="done") for j in todo}

    monkeypatch.setattr(table, "sweep", sweep)
    jobs = table.table_jobs(
        str(path),
        systems=("vae", "rnn-lm"),
        seeds=(0,),
        settings="batch=8 max_len=9",
        out=str(tmp_path / "runs"),
        results=str(tmp_path / "results"),
    )
    table.run_jobs(jobs, device="cpu")
    copies = {j.parameters["corpus"] for j in seen}
    assert (
        len(seen) == 2
        and len(copies) == 1
        and Path(*copies).read_text() == lines(120)
        and Path(*copies).name == "mine.txt"
    )
    assert {j.key["corpus_sha256"] for j in seen} == {hashlib.sha256(lines(120).encode()).hexdigest()}


# -- what a late stage needs


def test_a_grammar_that_is_cut_has_no_exact_gap(tmp_path, capsys):
    for name, how in (("a", "max_len=8"), ("b", "vocab_size=60")):
        run, task, _ = open_job(
            TextJob(
                system="rnn-lm",
                steps=1,
                device="cpu",
                out=str(tmp_path / name),
                settings=f"embed=8 hidden=8 {how} n_samples=20 lm=''",
            )
        )
        assert "exact_gap will not be computed: " in capsys.readouterr().out
        got = S.score(task, TextJob(system="rnn-lm"), [["a"]] * 20)["exact_gap"]
        assert got["value"] is None and "not sentences of the grammar" in got["estimator"]
    whole = load_corpus("grammar")
    assert whole.altered("test") == 0 and "exact_gap" not in text_job.lacking(whole, text_settings.resolve(TextJob()))


@pytest.mark.usefixtures("in_test")
@pytest.mark.parametrize("made", [[[]] * 100, [["one", "two"], *[[]] * 99]])
def test_samples_without_words(tmp_path, monkeypatch, made):
    (tmp_path / "mine.txt").write_text(lines(120))
    job = make(tmp_path)
    run, task, _ = open_job(job)
    monkeypatch.setattr(text_measure, "decode_latents", lambda *a, **k: [task.corpus.vocab.encode(x) for x in made])
    metrics, found = text_measure.evaluate(task, 0)
    metrics.update(S.score(task, job, found["samples"], run.path, drawn=found.get("drawn")))
    empty = {k for k, v in metrics.items() if v["value"] is None}
    assert {"self_bleu"} <= empty and ("wkl" in empty) == (made[0] == []) and metrics["rppl"]["value"] > 0
    assert all(metrics[k]["estimator"] for k in empty)
    assert text_job.finish(run, task, job, metrics, found, 1.0).exists()


def test_language_models_say_what_they_need():
    for n, k in ((99, 5), (100, 0), (120, 0), (100, 1), (120, 5)):
        text = [["a"] * k] * n
        why = reverse.lm_lacks(text, "small")
        a, b = reverse.protocol(n) if n >= 100 else (n, n)
        if n < 100:
            assert "99 sentences are fewer than the 100" in why
        elif why:
            with pytest.raises(ValueError, match="too little text"):
                lm_training.train_lm(text[:a], text[a:b], "small")
        else:
            assert a * (k + 1) >= 5 * lm.LMS["small"].batch
    assert reverse.lm_lacks([[]] * 100, "small") and not reverse.lm_lacks([["a"]] * 100, "small")


def test_the_end_mark_of_language_models_is_no_word():
    vocab = Vocab([PAD, UNK, BOS, EOS, "a", "<eos>"])
    c = make_corpus("by-hand", vocab, {k: [["a", "<eos>"]] * 80 for k in ("train", "valid", "test")}, 9)
    with pytest.raises(ValueError, match="has the word '<eos>', .* strip it"):
        text_task.check_corpus(c, text_settings.resolve(TextJob()))
