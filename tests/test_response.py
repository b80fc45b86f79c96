"Answering: what a context may and may not change, scores against hand-computed ones, a run that is killed, errors"

import json

import pytest
import torch
from torch.testing import assert_close

from ldebm.core import make_gen
from ldebm.dialogues import (
    DIALOGUES,
    SPECIALS,
    Dialogue,
    context_ids,
    get_pairs,
    grammar_dialogues,
    load_dialogues,
    make_dialogues,
    make_pairs,
    read_kvret,
)
from ldebm.energy import Energy, EnergyNet
from ldebm.graphs import has_recorded_terms
from ldebm.levels import PriorCfg
from ldebm.posterior import DiagGaussian, StandardNormal
from ldebm.prior import DiffusionEBM
from ldebm.records import Run
from ldebm.response import ContextEncoder, ResponseCfg, ResponseModel, answer
from ldebm.response_job import evaluate, finish, load_response, open_job, word_vectors
from ldebm.response_metrics import WordVectors, corpus_vectors, embedding_scores, read_word_vectors, word_scores
from ldebm.response_task import ResponseJob, ResponseTask, fit_response_energies, resolve, train_cfg
from ldebm.schedule import consistent_schedule, published_schedule
from ldebm.text import build_vocab
from ldebm.text_nets import TextCfg
from ldebm.train import Interrupted, fit

TINY = (
    "embed=16 hidden=16 context_hidden=8 context=8 shown=8 d=4 n_symbols=3 energy_hidden=8 n_blocks=1 langevin_steps=2 "
    "T=2 batch=20 cls_start=.3 energy_steps=12 energy_batch=16 energy_draws=4 checkpoint_every=4"
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    "No progress bars, one thread, and a working folder in which a stray file would be seen"
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.chdir(tmp_path)
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def few(monkeypatch):
    "Grammar dialogues, some dozens"
    sizes = dict(train=50, valid=8, test=10)
    data = {split: grammar_dialogues(n, make_gen(0, split)) for split, n in sizes.items()}
    corpus = make_dialogues("grammar", data, max_len=24)
    monkeypatch.setitem(DIALOGUES, "grammar", lambda **_: corpus)
    return corpus


def job(tmp_path, name="run", **kw):
    kw = dict(settings=TINY, steps=20, device="cpu", threads=1, out=str(tmp_path / name)) | kw
    return ResponseJob(**kw)


# -- a context in the prior


class Bound(Energy):
    "An energy whose context is a constant: what a prior without contexts would have for it"

    def __init__(self, net, context):
        super().__init__()
        self.net, self.constant = net, context
        self.d, self.n_levels, self.n_symbols = net.d, net.n_levels, net.n_symbols

    def weights(self):
        return self.net.weights()

    def logits(self, z, t, context=None, weights=None):
        return self.net.logits(z, t, self.constant.expand(len(z), -1), weights)


CONFIGS = {
    "contrast": dict(n_steps=3),
    "every level": dict(n_steps=3, levels="all"),
    "bound": dict(n_steps=3, encoder_draws=4),
    "draws": dict(energy_draws=5, levels="all"),
    "flat": dict(n_steps=3, reference="flat"),
    "published": dict(objective="published", reference="flat", n_steps=3),
    "cui": dict(objective="published", reference="gaussian", n_steps=3),
}


def with_and_alone(cfg, B=6):
    "A prior whose rows have contexts of their own, and for each context the prior that has no other"
    g = make_gen(0, "context")
    net = EnergyNet(3, 2, 3, 16, 1, context_dim=4, spectral=False, gen=g)
    contexts = torch.randn(B, 4, generator=g)
    q = DiagGaussian(torch.randn(B, 3, generator=g), torch.full((B, 3), -1.0))
    schedule = (published_schedule if cfg.objective == "published" else consistent_schedule)(3)
    alone = [DiffusionEBM(schedule, Bound(net, c), cfg) for c in contexts]
    return DiffusionEBM(schedule, net, cfg), alone, q, contexts


def rows_agree(with_context, without, q, contexts):
    "Each row of the one is that row of the other, whose context is its own for all rows; and rows do differ"
    got = with_context(contexts)
    for i in range(len(contexts)):
        want = without(i)
        for name in set(got) - {"mi", "kl"}:
            assert_close(got[name][i], want[name][i])
    other = with_context(contexts.flip(0))
    assert any(not torch.allclose(got[name], other[name]) for name in got)


@pytest.mark.parametrize("kind", CONFIGS)
def test_terms_given_a_context_are_those_of_each_context_alone(kind):
    prior, alone, q, contexts = with_and_alone(PriorCfg(**CONFIGS[kind]))

    def terms(p, **kw):
        mean = q.mean.clone().requires_grad_()
        return p.terms(DiagGaussian(mean, q.logvar), mean + 0.1, make_gen(1, "terms"), **kw)

    rows_agree(lambda c: terms(prior, context=c), lambda i: terms(alone[i]), q, contexts)


def test_scores_bound_and_log_z_given_a_context_are_those_of_each_context_alone():
    prior, alone, q, contexts = with_and_alone(PriorCfg())
    t = torch.arange(len(contexts)) % 3

    def measured(p, **kw):
        score = p.score_terms(q, make_gen(1, "score"), **kw)["score"]
        kl, draws = p.kl(q, q.mean, make_gen(1, "kl"), 8, **kw)
        return dict(score=score, bound=kl, draws=draws, log_z=p.log_z(q.mean, t, 8, make_gen(1, "z"), **kw)[0])

    rows_agree(lambda c: measured(prior, context=c), lambda i: measured(alone[i]), q, contexts)


def test_the_energies_of_a_prior_leave_the_context_alone():
    "Its gradient is the decoder's affair"
    prior, _, q, contexts = with_and_alone(PriorCfg(n_steps=2))
    c = contexts.clone().requires_grad_()
    terms = prior.terms(q, q.mean, make_gen(0), context=c)
    (terms["ebm"] + terms["ebm_enc"]).sum().backward()
    assert c.grad is None and all(p.grad is not None for p in prior.energy.c1.parameters())


def test_recorded_terms_decline_a_context(monkeypatch):
    import ldebm.graphs as graphs

    prior, _, q, contexts = with_and_alone(PriorCfg(n_steps=2))
    monkeypatch.setattr(graphs, "recording", lambda z: True)
    assert has_recorded_terms(prior, q, q.mean, None, None, None)
    assert not has_recorded_terms(prior, q, q.mean, None, None, None, context=contexts)


# -- contexts


def reader(**kw):
    torch.manual_seed(0)
    return ContextEncoder(12, 6, 5, 7, **kw)


def test_padding_and_absent_utterances_do_not_matter():
    net = reader()
    said = torch.tensor([[[4, 5, 6], [7, 8, 0]], [[9, 0, 0], [4, 4, 5]]])
    wide = torch.zeros(2, 4, 6, dtype=torch.long)
    wide[:, (0, 3), :3] = said
    assert_close(net.read(said), net.read(wide))
    assert_close(net.read(said)[:1], net.read(said[:1]))
    longer = said.clone()
    longer[0, 1, 2] = 6
    assert not torch.allclose(net.read(longer)[0], net.read(said)[0])


def test_padding_has_no_gradient():
    net = reader()
    net.read(torch.tensor([[[4, 5, 0, 0], [0, 0, 0, 0]]])).sum().backward()
    assert net.embed.weight.grad.abs().sum(1).nonzero()[:, 0].tolist() == [4, 5]


def test_windows_keep_the_order_and_the_opener():
    turns = [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]
    vocab = build_vocab(turns, specials=SPECIALS)
    pairs = make_pairs(vocab, [Dialogue(turns)], n_turns=3)
    assert [pairs.said(i) for i in range(5)] == [[["a"]], [["a"], ["b"]], turns[:3], turns[1:4], turns[2:5]]
    assert pairs.context[0].tolist() == [-1, 0, 1]
    own = context_ids(vocab, [turns[:2], turns[1:4]], n_turns=3)
    assert torch.equal(own, get_pairs(pairs, torch.tensor([1, 3])).context)


def test_empty_contexts_are_named():
    vocab = build_vocab([["a"]], specials=SPECIALS)
    with pytest.raises(ValueError, match="context 2 is empty"):
        context_ids(vocab, [[["a"]], []])
    with pytest.raises(ValueError, match="context 1 of the batch is empty"):
        reader().read(torch.tensor([[[4]], [[0]]]))


def test_no_dialogue_is_in_two_splits():
    corpus = load_dialogues("grammar", max_len=24)
    texts = {}
    for split, pairs in corpus.splits.items():
        texts[split] = {(*map(tuple, pairs.said(i)), tuple(words)) for i, words in enumerate(pairs.responses())}
        assert pairs.context.max() < len(pairs.turns) and not pairs.cut.any()
    for one, other in (("train", "test"), ("train", "valid"), ("valid", "test")):
        assert not texts[one] & texts[other]


@pytest.mark.data
def test_dailydialog_pairs():
    try:
        corpus = load_dialogues("dailydialog")
    except FileNotFoundError as e:
        pytest.skip(str(e))
    test = corpus["test"]
    assert (test.dialogues, len(test)) == (1000, 6740) and set(test.labels) == {"act", "emotion"}
    assert test.labels["act"].min() == 0 and test.labels["act"].max() == 3 and len(corpus.notes) == 2


def kvret(*dialogues):
    turns = [[dict(turn=who, data=dict(utterance=text)) for who, text in said] for said in dialogues]
    return json.dumps([dict(dialogue=said, scenario={}) for said in turns]).encode()


def test_kvret_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="kvret_train_public.json"):
        load_dialogues("smd")
    (tmp_path / "smd").mkdir()
    for name in ("train", "dev", "test"):
        said = [("driver", f"Is it {name}?"), ("assistant", ""), ("assistant", "Yes."), ("driver", "Thanks!")]
        (tmp_path / "smd" / f"kvret_{name}_public.json").write_bytes(kvret(said))
    corpus = load_dialogues("smd")
    assert corpus["test"].said(1) == [["<usr>", "Is", "it", "<unk>", "?"], ["<sys>", "Yes", "."]]
    assert corpus["train"].responses() == [["<sys>", "Yes", "."], ["<usr>", "Thanks", "!"]]
    (tmp_path / "smd" / "kvret_dev_public.json").write_text('[\n{"dialogue": [}\n]')
    with pytest.raises(ValueError, match="kvret_dev_public.json is not JSON, line 2"):
        load_dialogues("smd")


@pytest.mark.parametrize(
    "content,why",
    [
        (b'{"a": 1}', "must be a list of dialogues"),
        (b'[{"scenario": 1}]', "dialogue 1 has no list 'dialogue'"),
        (kvret([("driver", "Hi")], [("driver", "Hi"), ("robot", "Hi")]), "dialogue 2, turn 2 needs 'turn'"),
        (kvret([("driver", None)]), "dialogue 1, turn 1 needs"),
    ],
)
def test_malformed_kvret_names_the_place(content, why):
    with pytest.raises(ValueError, match=f"made-up: ?.*{why}|made-up {why}"):
        read_kvret(content, "made-up")


def test_corpora_without_dialogues_are_refused():
    with pytest.raises(ValueError, match="unknown corpus of dialogues 'ptb'.*Known: grammar, dailydialog, smd"):
        load_dialogues("ptb")
    with pytest.raises(ValueError, match="none of 2 dialogues has two turns"):
        make_pairs(build_vocab([["a"]], specials=SPECIALS), [Dialogue([["a"]]), Dialogue([["a"]])])


# -- the model


def small_model(prior):
    sizes = ResponseCfg(TextCfg(8, 8, 3, dropout=0.1), 8, 4, 6, 5)
    return ResponseModel(12, sizes, prior, bos=1, eos=2, gen=make_gen(0, "model"))


def test_answers_are_several_and_by_symbol():
    net = EnergyNet(3, 2, 2, 8, 1, context_dim=6, gen=make_gen(0, "energy"))
    model = small_model(DiffusionEBM(consistent_schedule(2), net, PriorCfg(n_steps=2))).train()
    context = torch.tensor([[[0, 0, 0], [4, 5, 0]], [[6, 7, 8], [9, 4, 0]]])
    got = answer(model, context, 3, gen=make_gen(1), max_len=5)
    assert [len(own) for own in got] == [3, 3] and model.training
    assert got == answer(model, context, 3, gen=make_gen(1), max_len=5)
    assert len(answer(model, context, 1, 1, make_gen(1), chunk=1)) == 2
    with pytest.raises(ValueError, match="no symbols"):
        answer(small_model(StandardNormal(3)), context, y=0)
    with pytest.raises(ValueError, match="the prior has dimension 2, the response model 3"):
        small_model(StandardNormal(2))


# -- scores

AXES = WordVectors(dict(a=0, b=1, c=2), torch.tensor([[3.0, 0.0], [0.0, 1.0], [-2.0, -4.0]]), "three words")


def test_scores_against_hand_computed_ones():
    got = word_scores([["a", "b"], ["c", "a", "x"], ["x"]], [["b"], ["b", "c"], ["a"]], AXES)
    cos_ac, cos_bc = -2 / 20**0.5, -4 / 20**0.5
    # means (3, 1) and (0, 1); (1, -4) and (-2, -3)
    assert_close(got["average"], torch.tensor([1 / 10**0.5, 10 / (17 * 13) ** 0.5]))
    # (3, 1) and (0, 1); (3, -4) and (-2, -4)
    assert_close(got["extrema"], torch.tensor([1 / 10**0.5, 10 / (5 * 20**0.5)]))
    # a-b 0, b-b 1, back 1; c-c 1, a: the best of b (0) and c; back: b the best of c and a (0), c-c 1
    first, second = ((0 + 1) / 2 + 1) / 2, ((1 + max(0, cos_ac)) / 2 + (max(cos_bc, 0) + 1) / 2) / 2
    assert_close(got["greedy"], torch.tensor([first, second]))


def test_chunks_and_padding_leave_scores_alone():
    texts = [["a"], ["a", "b", "c", "a"], ["b", "c"], ["c"] * 7]
    refs = texts[1:] + texts[:1]
    whole, single = word_scores(texts, refs, AXES), word_scores(texts, refs, AXES, chunk=1)
    for name in whole:
        assert_close(whole[name], single[name])


def test_intervals_cover_the_mean_and_pairs_without_vectors_are_counted():
    got = embedding_scores([["a"], ["b"], ["<unk>"]], [["a"], ["a"], ["a"]], AXES, make_gen(0))
    assert got["average"]["n"] == 2 and "1 of 3 pairs skipped" in got["average"]["estimator"]
    assert_close(got["greedy"]["value"], 50.0)
    assert got["greedy"]["interval"][0] < 50 < got["greedy"]["interval"][1]
    none = embedding_scores([["x"]], [["a"]], AXES, make_gen(0))["extrema"]
    assert none["value"] is None and none["estimator"].startswith("not computed")


def test_word_vector_files(tmp_path):
    file = tmp_path / "v.txt"
    file.write_text("2 3\na 1 2 3\nb 4 5 6\na 7 8 9\n")
    got = read_word_vectors(file, ["b", "a"])
    assert got.rows == dict(a=0, b=1) and got.table.tolist() == [[1, 2, 3], [4, 5, 6]]
    for text, why in (("a 1 2\nz 1\n", "line 2 has 1 numbers"), ("a 1 x\n", "line 1 has something else than numbers")):
        file.write_text(text)
        with pytest.raises(ValueError, match=why):
            read_word_vectors(file, ["a"])
    with pytest.raises(ValueError, match="at least three different words"):
        corpus_vectors([["a", "b"]], make_gen(0))


# -- the job


def values(metrics):
    return {name: (m["value"], m["interval"], m["n"]) for name, m in metrics.items()}


def trained(a_job):
    run, task, vectors, device = open_job(a_job)
    fit(task, run, train_cfg(task.settings), a_job.seed, device)
    fit_response_energies(task, run, a_job.seed, device)
    return run, task, vectors


@pytest.mark.parametrize("system", ["ldebm", "svebm", "vae"])
def test_from_job_to_record(system, few, tmp_path):
    own = dict(ldebm=TINY, svebm=TINY.replace("T=2 ", "").replace("energy_draws=4 ", ""))
    own["vae"] = "embed=16 hidden=16 context_hidden=8 context=8 shown=8 d=4 batch=20"
    a_job = job(tmp_path, system=system, settings=own[system], results=str(tmp_path / "results"))
    run, task, vectors, device = open_job(a_job)
    end = fit(task, run, train_cfg(task.settings), 0, device)
    fit_response_energies(task, run, 0, device)
    metrics, found = evaluate(task, vectors, 0)
    path = finish(run, task, a_job, metrics, found, end)
    assert path == tmp_path / f"results/runs/grammar/quick/response-{system}-consistent-s0.json"
    model, _, _ = load_response(run.path)
    context = get_pairs(few["test"], torch.arange(3)).context
    assert answer(model, context, gen=make_gen(0)) == answer(task.model, context, gen=make_gen(0))


def test_a_killed_run_goes_on_bit_for_bit(few, tmp_path):
    "Killed in training, and again while the energies are trained alone"
    _, whole, vectors = trained(job(tmp_path, "whole"))
    broken = job(tmp_path, "broken")

    def stop_at(task, run, steps):
        before = task.before_step if hasattr(task, "before_step") else None
        left = [steps]

        def count():
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted("killed")
            return before() if before else None

        task.before_step = count

    run, task, _, device = open_job(broken)
    stop_at(task.model, run, 11)
    with pytest.raises(Interrupted):
        fit(task, run, train_cfg(task.settings), 0, device)
    run, task, _, device = open_job(broken)
    assert run.load()["progress"]["step"] in range(4, 12)
    fit(task, run, train_cfg(task.settings), 0, device)
    stop_at(task.model.prior, run, 6)
    with pytest.raises(Interrupted):
        fit_response_energies(task, run, 0, device)
    _, again, _ = trained(broken)
    for (name, x), y in zip(whole.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(x, y), name
    assert values(evaluate(whole, vectors, 0)[0]) == values(evaluate(again, vectors, 0)[0])


@pytest.mark.parametrize(
    "wrong,why",
    [
        (dict(corpus="ptb"), "unknown corpus of dialogues"),
        (dict(preset="tiny"), "unknown preset"),
        (dict(system="gan"), "unknown system"),
        (dict(split="train"), "unknown split"),
        (dict(seed=-1), "seed must not be negative"),
        (dict(system="vae", settings="T=4"), "T would have no effect on system 'vae'"),
        (dict(settings="batch=5000"), "fewer than batch or n_symbols"),
        (dict(settings="d=0"), "setting d=0"),
        (dict(vectors="nowhere.txt"), "no such file of word vectors"),
    ],
)
def test_bad_jobs_stop_before_anything_is_written(wrong, why, few, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=why):
        open_job(job(tmp_path, **{"settings": "", "steps": 0, **wrong}))
    assert not list(tmp_path.iterdir())


def test_vectors_of_a_file(few, tmp_path):
    file = tmp_path / "v.txt"
    file.write_text("".join(f"{word} {i} 1\n" for i, word in enumerate(few.vocab.itos)))
    assert word_vectors(job(tmp_path, vectors=str(file)), few).source == "v.txt, 2 dimensions"
    assert word_vectors(job(tmp_path), few).source.startswith("PPMI")
    task = ResponseTask(few, resolve(job(tmp_path)), 0)
    assert Run(tmp_path / "r", {}).path.exists() and len(task.encode("valid")) == 16
