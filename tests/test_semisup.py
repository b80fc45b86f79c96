"Few labels: sparse against dense, the choice of labels, interruption, records, and errors that name the missing thing"

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from torch.testing import assert_close

from ldebm import few_labels as fl
from ldebm import label_job as lj
from ldebm.bag_model import BagCfg, BagEncoder, BagGenerator, multinomial_nll
from ldebm.core import make_gen
from ldebm.documents import bags_of, load_documents, make_documents, parse_stories, split_stories
from ldebm.records import Run, check_result
from ldebm.settings import notebook_params
from ldebm.train import fit

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "d=4 hidden=16 T=2 energy_hidden=8 n_blocks=1 langevin_steps=2 batch=20 labelled_batch=10 checks=5 warmup=2 "
    "begin=0.2 rise=0.2"
)


@pytest.fixture(scope="module")
def grammar():
    return load_documents("grammar")


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)


# -- sparse and dense -------------------------------------------------------------------------------------------------


@pytest.fixture
def bags():
    "Random counts with an empty document first, in the middle and last"
    counts = np.random.default_rng(0).poisson(0.3, (40, 60))
    counts[[0, 20, 39]] = 0
    return torch.tensor(counts, dtype=torch.float), bags_of(
        CountVectorizer(analyzer=list, vocabulary=range(60)).transform(
            [[w for w, c in enumerate(row) for _ in range(c)] for row in counts]
        ),
        torch.arange(40) % 4,
    )


@pytest.mark.parametrize("order", ["forward", "backward", "repeated"])
def test_sparse_is_dense(bags, order):
    dense, sparse = bags
    index = {"forward": torch.arange(40), "backward": torch.arange(40).flip(0), "repeated": torch.tensor([3, 0, 3, 39])}
    index = index[order]
    batch = sparse[index]
    x = torch.zeros(len(index), 60).index_put_((batch.rows, batch.ids), batch.counts)
    assert torch.equal(x, dense[index]) and torch.equal(batch.labels, index % 4)
    encoder = BagEncoder(60, BagCfg(d=3, hidden=20), make_gen(0)).eval()
    want = torch.relu(encoder.second(torch.relu(x @ encoder.words + encoder.bias)))
    assert_close(encoder(batch), want)
    (a,) = torch.autograd.grad(encoder(batch).square().sum(), encoder.words)
    (b,) = torch.autograd.grad(want.square().sum(), encoder.words)
    assert_close(a, b)


def test_nll_is_a_multinomial(bags):
    "Equal to a dense product, and to PyTorch's law up to its coefficient, with the same gradient"
    dense, sparse = bags
    batch = sparse[torch.arange(40)]
    logits = torch.randn(40, 60, generator=make_gen(1)).requires_grad_()
    own, want = multinomial_nll(logits, batch), -(dense * logits.log_softmax(-1)).sum(-1)
    assert_close(own, want)
    assert own[0] == own[20] == own[39] == 0
    for a, b in zip(*(torch.autograd.grad(v.sum(), logits) for v in (own, want))):
        assert_close(a, b)
    law = torch.distributions.Multinomial(int(dense[5].sum()), logits=logits[5])
    coefficient = torch.lgamma(dense[5].sum() + 1) - torch.lgamma(dense[5] + 1).sum()
    assert_close(own[5], coefficient - law.log_prob(dense[5]))


def test_background(grammar):
    "Log-frequencies of training alone; a generator with nothing to say predicts them"
    counts = grammar["train"].matrix(len(grammar.words)).sum(0)
    want = torch.tensor(np.asarray(counts / counts.sum())[0])
    assert_close(grammar.background.double().exp(), want, atol=1e-6, rtol=1e-4)
    generator = BagGenerator(grammar.background, BagCfg(d=3, hidden=8), make_gen(0)).eval()
    for p in generator.out.parameters():
        torch.nn.init.zeros_(p)
    assert_close(generator(torch.randn(2, 3)).softmax(-1), want.float().expand(2, -1), atol=1e-6, rtol=1e-4)


def test_scale_of_logits_is_fixed(grammar):
    task = fl.LabelTask(grammar, small_settings(), "ldebm", 2, 0)
    trained = {id(p) for group in task.model.groups().values() for p in group}
    left = [name for name, p in task.model.named_parameters() if id(p) not in trained]
    assert left == ["generator.norm.weight"] and not task.model.generator.norm.weight.requires_grad


# -- which labels -----------------------------------------------------------------------------------------------------


def small_settings(**more):
    return replace(lj.resolve(lj.LabelJob(settings=TINY)), **more)


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_are_nested_and_balanced(grammar, seed):
    smaller = set()
    for n in (1, 5, 50, 125):
        chosen = fl.labelled_subset(grammar, n, seed)
        assert grammar["train"].labels[chosen].bincount().tolist() == [n] * 5
        assert smaller < set(chosen.tolist())
        assert torch.equal(chosen, fl.labelled_subset(grammar, n, seed))
        smaller = set(chosen.tolist())
    assert smaller != set(fl.labelled_subset(grammar, 125, seed + 1).tolist())


def test_batches_use_no_other_labels(grammar):
    "Labelled documents are the chosen ones; changing every other label changes no step"
    task = fl.LabelTask(grammar, small_settings(steps=10), "ldebm", 2, 0)
    known = {tuple(ids.tolist()) for ids in (grammar["train"][i[None]].ids for i in task.subset)}
    for _, extra in task.batches(None, make_gen(0)):
        own = extra["labelled"]
        assert own.labels.bincount().tolist() == [2] * 5
        assert {tuple(ids.tolist()) for ids in own.ids.tensor_split(own.offsets[1:])} <= known
    train = grammar["train"]
    other = torch.zeros_like(train.labels).index_put_((task.subset,), train.labels[task.subset])
    blind = replace(grammar, splits=dict(grammar.splits, train=replace(train, labels=other)))
    terms = []
    for documents in (grammar, blind):
        task.documents = documents
        batch, extra = next(task.batches(None, make_gen(0)))
        terms.append(task.model(batch, make_gen(1), **extra))
    assert all(torch.equal(terms[0][name], terms[1][name]) for name in terms[0])


def test_batches_after_a_start(grammar):
    task = fl.LabelTask(grammar, small_settings(steps=10, checks=1), "ldebm", 2, 0)
    whole, late = list(task.batches(None, make_gen(0))), list(task.batches(None, make_gen(0), 7))
    assert len(whole) == 10 and len(late) == 3
    for (a, more), (b, others) in zip(whole[7:], late):
        assert torch.equal(a.ids, b.ids) and torch.equal(more["labelled"].ids, others["labelled"].ids)


def test_mutual_information_begins_late(grammar):
    task = fl.LabelTask(grammar, small_settings(), "ldebm", 2, 0)
    early, middle, late = (task.weights(step, 100) for step in (10, 30, 90))
    assert early["mi"] == early["agree"] == 0 > middle["mi"] > late["mi"] == -task.settings.w_mi
    without = fl.LabelTask(grammar, small_settings(), "ldebm-no-mi", 2, 0)
    assert without.weights(90, 100)["mi"] == 0 and without.weights(90, 100)["agree"] > 0
    assert fl.LabelTask(grammar, small_settings(), "svebm-ib", 2, 0).model.prior.T == 1


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad,says",
    [
        (dict(corpus="ptb"), "unknown corpus with classes 'ptb'"),
        (dict(preset="huge"), "unknown preset 'huge'"),
        (dict(systems="ldebm vae"), "unknown system 'vae'"),
        (dict(systems=""), "systems is empty"),
        (dict(n_labels=100_000), "training documents of class 'kitchen', n_labels=100000 was asked for"),
        (dict(n_labels="ten"), "n_labels='ten' must be whole numbers"),
        (dict(seeds="-1"), "seeds='-1' must be whole numbers"),
        (dict(steps=-1), "steps must"),
        (dict(settings="batch=9000"), "8,000 training documents, fewer than batch=9000"),
        (dict(settings="dropout=1.0"), "dropout must be below 1"),
        (dict(settings="corpus=ptb"), "'corpus' is a parameter of its own"),
        (dict(device="tpu"), "unknown device 'tpu'"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, bad, says):
    with pytest.raises(ValueError, match=says):
        lj.open_job(lj.LabelJob(out=str(tmp_path / "run"), **bad))
    assert not (tmp_path / "run").exists()


def test_missing_files_are_named(tmp_path, monkeypatch):
    "Without any file, and with half of a set: what is needed, where it was looked for, and how to get it"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    monkeypatch.setenv("LDEBM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "agnews").mkdir()
    (tmp_path / "agnews" / "test.jsonl").write_text('{"label": 1, "text": "a"}')
    if (ROOT / "data" / "agnews").exists():
        pytest.skip("AG News is in the checkout")
    with pytest.raises(FileNotFoundError, match="without dev.jsonl") as found:
        load_documents("agnews")
    assert "LDEBM_DATA" in str(found.value) and "train.csv" in str(found.value)


@pytest.mark.parametrize(
    "name,content,says",
    [
        ("dev.jsonl", b'{"label": 1, "text": "a"}\nnot json', "agnews/dev.jsonl, story 2: no class and text"),
        ("dev.jsonl", b'{"label": 5, "text": "a"}', "class 5 is none of 1 to 4"),
        ("train.csv", b'"3","a","b"\n"x","a","b"', "agnews/train.csv, story 2"),
    ],
)
def test_bad_stories(name, content, says):
    with pytest.raises(ValueError, match=says):
        parse_stories(content, name)


def test_splits_share_no_story():
    def some(name, n):
        return [f"{name} {i}" for i in range(n)], [i % 4 for i in range(n)]

    test, dev = some("test", 40), some("dev", 20)
    train = tuple(a + b for a, b in zip(some("train", 100), dev))
    for files in (
        {"dev.jsonl": dev, "test.jsonl": test},
        {"train.csv": train, "test.csv": test},
        {"train.jsonl": train, "dev.jsonl": dev, "test.jsonl": test},
    ):
        data, notes = split_stories(files)
        texts = [set(part[0]) for part in data.values()]
        assert notes and sum(map(len, texts)) == len(set().union(*texts)) == sum(len(v[1]) for v in data.values())
        again, _ = split_stories(files)
        assert again == data


def test_vocabulary_is_of_training():
    data = {"train": (["a b", "b c"], [0, 1]), "valid": (["c d"], [0]), "test": (["e"], [1])}
    found = make_documents("x", data, ("p", "q"), CountVectorizer(token_pattern=r"\w+"))
    assert found.words == ("a", "b", "c") and found.tokens("test") == [[]]


# -- jobs -------------------------------------------------------------------------------------------------------------


def tiny_job(tmp_path, **more):
    own = dict(systems="ldebm supervised logistic", n_labels="2 4", seeds="0 1", steps=10)
    return lj.LabelJob(**{**own, **dict(settings=TINY, out=str(tmp_path / "run")), **more})


def test_job_records(tmp_path, quiet):
    "A valid record for each system, number of labels and seed; a second start reads, and repeats the numbers"
    job = tiny_job(tmp_path, results=str(tmp_path / "results"))
    first = lj.run_all(lj.open_job(job))
    copies = sorted((tmp_path / "results" / "runs" / "grammar" / "quick").glob("*.json"))
    assert len(first) == len(copies) == 12
    records = [check_result(json.loads(p.read_text())) for p in copies]
    assert {(r["system"], r["variant"], r["seed"]) for r in records} == {
        (s, f"n{n}", seed) for s in job.systems.split() for n in (2, 4) for seed in (0, 1)
    }
    assert all(r["metrics"]["accuracy"]["n"] == 2000 for r in records)
    second = lj.run_all(lj.open_job(job))
    assert [o.metrics for o in first] == [o.metrics for o in second]
    table = lj.accuracy_table(first)
    assert "±" in table and "2 a class" in table and "4 a class" in table
    with pytest.raises(ValueError, match="other settings.*T: 2 -> 3"):
        lj.open_job(replace(job, results="", settings=TINY.replace("T=2", "T=3")))


def test_published_objective_runs(tmp_path, quiet):
    job = tiny_job(tmp_path, systems="ldebm svebm-ib", n_labels=2, seeds=0, objective="published")
    place = lj.open_job(job)
    assert place.settings.w_mi == 5 and place.settings.w_cls == 200 and place.settings.lr_ebm == 1e-5
    assert len(lj.run_all(place)) == 2


KILLED = """
import sys
sys.path.insert(0, {root!r})
from ldebm import few_labels as fl
from ldebm import label_job as lj
from ldebm.documents import load_documents
from ldebm.records import Run
from ldebm.train import fit
from dataclasses import replace
settings = lj.resolve(lj.LabelJob(steps=200, settings={tiny!r}))
task = fl.LabelTask(load_documents('grammar'), settings, 'ldebm', 2, 0)
cfg = replace(lj.train_cfg(settings), checkpoint_every=3)
fit(task, Run(sys.argv[1], {{}}), cfg, 0, on_epoch=lambda line: print(line['step'], flush=True))
"""


def test_kill_and_resume_bitwise(tmp_path, quiet, grammar):
    "Killed without warning after its first validation, a run ends in the weights of an undisturbed one"
    settings = lj.resolve(lj.LabelJob(steps=200, settings=TINY))
    cfg = replace(lj.train_cfg(settings), checkpoint_every=3)
    torch.set_num_threads(1)
    whole = fl.LabelTask(grammar, settings, "ldebm", 2, 0)
    fit(whole, Run(tmp_path / "whole", {}), cfg, 0)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED.format(root=str(ROOT), tiny=TINY), str(tmp_path / "killed")]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert p.stdout.readline().strip() == "40"
    time.sleep(0.1)
    p.send_signal(signal.SIGKILL)
    p.wait()
    at = Run(tmp_path / "killed", {}).load()["progress"]["step"]
    assert 0 < at < 200, "killed in mid-run"
    again = fl.LabelTask(grammar, settings, "ldebm", 2, 0)
    fit(again, Run(tmp_path / "killed", {}), cfg, 0)
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()):
        assert_close(a, b, rtol=0, atol=0)


def test_parameters_cell_is_the_dataclass():
    "Names and defaults of the notebook's parameters are those of `LabelJob`"
    nb = json.loads((ROOT / "nbs" / "train_semisup.ipynb").read_text(encoding="utf-8"))
    (cell,) = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    ns = {}
    exec("".join(cell["source"]), ns)
    assert notebook_params(lj.LabelJob, {k: v for k, v in ns.items() if not k.startswith("__")}) == lj.LabelJob()


def test_a_table_of_systems_that_did_not_all_run_with_as_many_labels():
    def outcome(n, system, value):
        return lj.Outcome(n, 0, system, dict(accuracy=dict(value=value, interval=[0.1, 0.9])), None, [])

    table = lj.accuracy_table([outcome(125, "ldebm", 0.8), outcome(50, "ldebm", 0.7), outcome(50, "svebm", 0.6)])
    head, _, *rows = table.splitlines()
    assert head.index("50 a class") < head.index("125 a class")
    assert "70.0 (10.0 to 90.0) | 80.0" in rows[0] and rows[1].endswith("| pending |")
