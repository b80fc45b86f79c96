"Exploring a trained text model: what the pages cannot show, for every kind of system, and the page itself"

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_jobs import papermill
from tiny import tiny_corpus
from torch.testing import assert_close

from ldebm.explorer import Explorer, explore, newest_run, real_sentences
from ldebm.likelihood import NLLCfg
from ldebm.panel import Panel
from ldebm.text_job import open_job, save_model
from ldebm.text_settings import TextJob

ROOT = Path(__file__).resolve().parent.parent
EBM = " T=3 n_symbols=5 energy_hidden=8 n_blocks=1 langevin_steps=3"
SYSTEMS = ("ldebm", "vae", "dgm-vae", "rnn-lm")


def settings_of(system):
    text = "embed=16 hidden=16 batch=16 steps=6 max_len=12 lm=''"
    return text + dict(ldebm=" d=4" + EBM, vae=" d=4").get(system, " d=4 codes=2 classes=3" if "dgm" in system else "")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Folders of untrained models of a user's file, by system"
    root = tmp_path_factory.mktemp("explore")
    corpus, out = tiny_corpus(root), {}
    for system in SYSTEMS:
        out[system] = root / system
        job = dict(corpus=str(corpus), system=system, settings=settings_of(system), out=str(out[system]))
        run, task, _ = open_job(TextJob(device="cpu", threads=1, **job))
        save_model(run, task)
    corpus.unlink()  # the run has its copy
    return out


@pytest.fixture(scope="module")
def one(folders):
    return explore(folders["ldebm"])


def shown(area):
    "Kinds of what an output area shows, and its texts"
    kinds = [k for out in area.outputs for k in out["data"] if k != "text/plain"]
    return kinds, "".join(out["data"].get("text/markdown", "") for out in area.outputs)


# -- opening


def test_sentences_are_those_of_the_run(folders, one):
    sentences = real_sentences(folders["ldebm"])
    assert len({tuple(words) for words in sentences}) == len(sentences) == len(one.sentences) > 20
    assert one.note == "" and "real sentences" in one._repr_markdown_()
    assert len(explore(folders["ldebm"], 7).sentences) == 7


def test_samples_stand_in_for_a_lost_corpus_and_it_says_so(folders, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["ldebm"] / name).read_bytes())
    explorer = explore(tmp_path, 30)
    assert "corpus.txt does not exist" in explorer.note and explorer.note in explorer._repr_markdown_()
    assert "real sentences" not in explorer._repr_markdown_().partition("\n")[0]
    assert explorer.sentences == explore(tmp_path, 30).sentences != explore(tmp_path, 30, seed=1).sentences


def test_the_newest_text_run_is_found(tmp_path):
    for age, (name, kind) in enumerate([("old", "text"), ("deep/new", "text"), ("pictures", "image")]):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(dict(kind=kind)))
        (tmp_path / name / "model.safetensors").touch()
        os.utime(tmp_path / name / "model.safetensors", (age, age))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text('{"kind": "text"}')
    assert newest_run((tmp_path,)) == tmp_path / "deep" / "new"
    with pytest.raises(FileNotFoundError, match="make train"):
        newest_run((tmp_path / "pictures",))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a finished run"):
        explore(tmp_path)


# -- asking


def test_a_seed_fixes_samples(one):
    a, b, c = (one.sample(2, guidance=2.0, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert a.sentences == b.sentences and a.symbols == b.symbols and torch.equal(a.path, b.path)
    assert not torch.equal(a.path, c.path) and a.path.shape == (4, 5, 4)


def test_guidance_zero_is_no_request_and_one_is_the_prior_given_it(one):
    free, none, plain, more = one.sample(), *(one.sample(2, guidance=g) for g in (0.0, 1.0, 4.0))
    assert torch.equal(free.path, none.path) and free.sentences == none.sentences
    assert torch.equal(free.path[-1], more.path[-1]) and not torch.equal(free.path[0], more.path[0])
    near = one.sample(2, guidance=1 + 1e-6)
    assert_close(plain.path, near.path, atol=1e-3, rtol=1e-3)


def test_energies_and_map_of_a_path(one):
    path = one.sample(n=3).path
    prior, t = one.model.prior, torch.full((3,), 2)
    assert_close(one.energies(path)[2], -prior.energy(path[2], t).detach(), atol=1e-5, rtol=1e-4)
    axs = one.plot_path(one.sample(n=3), most=3)
    drawn = [line.get_xydata() for line in axs[0].lines if line.get_linestyle() == "-"]
    assert len(drawn) == 3
    assert_close(torch.tensor(drawn[1]), torch.tensor(one.places(path[:, 1])).double(), atol=1e-5, rtol=1e-5)


def test_a_sentence_is_read(one):
    known = one.sentences[3]
    reading = one.read(" ".join(known).upper())
    assert reading.words == known and reading.unknown == [] and reading.nearest[0][1] < 1e-3
    assert_close(reading.probs.sum(), torch.tensor(1.0))
    strange = one.read(f"zebra {' '.join(known[:3])} </s>")
    assert strange.unknown == ["zebra", "</s>"] and strange.words == ["<unk>", *known[:3], "<unk>"]
    assert "zebra" in strange._repr_markdown_()


def test_gaps_are_filled(one):
    done = one.complete("A ___ b ___", 3, symbol=1, seed=5)
    assert len(done.sentences) == 3 and done.sentences == one.complete("a ___ b ___", 3, symbol=1, seed=5).sentences
    assert all(s.split()[::2] == ["a", "b"] and "___" not in s for s in done.sentences)


@pytest.mark.parametrize(
    "ask,says",
    [
        (lambda e: e.sample(9), "0..4"),
        (lambda e: e.sample(1, guidance=-1.0), "guidance must not be negative"),
        (lambda e: e.sample(temperature=-1.0), "temperature"),
        (lambda e: e.sample(n=0), "at least 1"),
        (lambda e: e.read("  "), "1 to 10 words"),
        (lambda e: e.read("a " * 11), "this one has 11"),
        (lambda e: e.complete("a b"), "no gap"),
        (lambda e: e.complete("zebra ___"), "zebra"),
        (lambda e: e.complete("a ___", symbol=9), "0..4"),
        (lambda e: Explorer(e.model, e.vocab, []), "no sentence"),
    ],
)
def test_what_cannot_be_is_an_error(one, ask, says):
    with pytest.raises(ValueError, match=says):
        ask(one)


# -- other systems

LACKS = {"vae": {"symbols", "path"}, "dgm-vae": {"symbols", "path", "completion"}}
ASKS = dict(
    symbols=lambda e: e.sample(1),
    path=lambda e: e.plot_path(e.sample(temperature=1.0)),
    reading=lambda e: e.read("a b"),
    completion=lambda e: e.complete("a ___"),
)


# -- between sentences, to a symbol, and what sentences cost

FEW = NLLCfg(refine=0, draws=8, chains=4, paths=1, fit=32, rich=2, top=32, most=8)


def test_a_line_goes_from_one_sentence_to_the_other(one):
    ends = [" ".join(words) for words in one.sentences[:2]]
    line = one.between(*ends, n=4)
    assert [line.sentences[i] for i in (0, -1)] == [one.read(text).decoded for text in ends]
    assert_close(line.path[0, 1], (2 * one.read(ends[0]).z + one.read(ends[1]).z) / 3)
    for level in range(one.model.prior.T):
        marks = one.plot_line(line, level).lines[1].get_xdata()
        z = one.model.prior.schedule.abar[level].float() * line.path[0]
        t = torch.full((4,), level)
        assert_close(torch.as_tensor(marks), -one.model.prior.energy(z, t).detach(), atol=1e-4, rtol=1e-4)


def test_an_edit_starts_from_the_sentence_and_takes_requests(one):
    text = " ".join(one.sentences[0])
    edited = one.edit(text, 2, seed=3)
    assert edited.sentences[0] == one.read(text).decoded and len(edited.sentences) == one.model.prior.T + 1
    wanted = torch.zeros(5, dtype=torch.bool)
    wanted[2] = True
    assert one.edit(text, wanted, seed=3).sentences == edited.sentences
    assert one.sample(wanted, seed=3).sentences == one.sample(2, seed=3).sentences
    with pytest.raises(ValueError, match="9"):
        one.edit(text, 9)


@pytest.mark.parametrize("system", ("ldebm", "vae", "dgm-vae"))
def test_a_bound_lies_in_its_interval(folders, system):
    explorer = explore(folders[system])
    texts = [" ".join(words) for words in explorer.sentences[:3]]
    scores = explorer.score(texts, FEW)
    assert (scores.low <= scores.nll).all() and (scores.nll <= scores.high).all() and (scores.nll > 0).all()
    assert scores.nll.equal(explorer.score(texts, FEW).nll)
    assert len(scores._repr_markdown_().splitlines()) == 5


@pytest.mark.parametrize("system", ("vae", "dgm-vae", "rnn-lm"))
def test_what_a_system_lacks_is_said_and_the_rest_works(folders, system):
    explorer = explore(folders[system])
    assert set(explorer.lacks) == LACKS.get(system, set(ASKS))
    assert all(why in explorer._repr_markdown_() for why in explorer.lacks.values())
    assert len(explorer.sample(temperature=1.0, n=4).sentences) == 4
    for what, ask in ASKS.items():
        if what in explorer.lacks:
            with pytest.raises(ValueError) as error:
                ask(explorer)
            assert str(error.value) == explorer.lacks[what]
        else:
            ask(explorer)


# -- controls


def test_controls_show_what_the_methods_return(one):
    panel = Panel(one)
    panel.symbol.value, panel.guidance.value, panel.seed.value = 2, 2.0, 7
    for button in (panel.sample, panel.read, panel.complete):
        button.click()
    assert shown(panel.drawn)[0] == ["text/markdown", "image/png"]
    assert shown(panel.drawn)[1] == one.sample(2, guidance=2.0, seed=7)._repr_markdown_()
    assert shown(panel.reading)[1] == one.read(panel.sentence.value)._repr_markdown_()
    assert shown(panel.completions)[1] == one.complete(panel.gaps.value, seed=7)._repr_markdown_()


@pytest.mark.parametrize("system", SYSTEMS)
def test_controls_show_what_is_wrong(folders, system):
    panel = Panel(explore(folders[system]))
    panel.gaps.value, panel.sentence.value = "no gaps", ""
    for button in (panel.sample, panel.read, panel.complete):
        button.click()
    assert panel.symbol.disabled == (system != "ldebm") and "sample" in shown(panel.drawn)[1]
    assert all("Not possible" in shown(area)[1] for area in (panel.reading, panel.completions))


def test_without_ipywidgets_the_panel_says_what_to_install(tmp_path, folders):
    (tmp_path / "ipywidgets.py").write_text("raise ImportError('hidden')")
    code = (
        "from ldebm.explorer import explore; from ldebm.panel import Panel; import sys\n"
        "e = explore(sys.argv[1]); e.sample(1); e.read('a b'); e.complete('a ___')\n"
        "try: Panel(e)\nexcept ImportError as missing: print(missing)"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", code, str(folders["ldebm"])]
    res = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert res.returncode == 0 and "pip install ipywidgets" in res.stdout, res.stderr


# -- the page


@pytest.mark.parametrize("system,widgets", [("ldebm", True), ("ldebm", False), ("rnn-lm", True)])
def test_the_page_runs(folders, tmp_path, system, widgets):
    if not widgets:
        (tmp_path / "ipywidgets.py").write_text("raise ImportError('hidden')")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = tmp_path / "done.ipynb"
    env = dict(PYTHONPATH=path, MPLBACKEND="module://matplotlib_inline.backend_inline")
    res = papermill(done, "-p", "run", folders[system], notebook=ROOT / "nbs" / "explore.ipynb", **env)
    assert res.returncode == 0, res.stderr[-2000:]
    outputs = [o for c in json.loads(done.read_text())["cells"] for o in c.get("outputs", [])]
    kinds = [k for o in outputs for k in o.get("data", {})]
    assert any("widget" in kind for kind in kinds) == widgets
    assert ("pip install ipywidgets" in str(outputs)) == (not widgets)
    assert ("image/png" in kinds) == (system == "ldebm")
