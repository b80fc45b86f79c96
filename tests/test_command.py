"The command `ldebm`: what it passes on, what it prints, what it refuses"

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_corpus

from ldebm import command, sweep
from ldebm.core import save_tensors
from ldebm.job import run_files
from ldebm.text import Vocab, get_batch, make_split
from ldebm.text_job import MODELS, load_model, load_symbols
from ldebm.text_settings import TextJob, TextSettings, resolve
from ldebm.text_task import build_model
from ldebm.text_vae import sample_sentences

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "An empty folder to work in, on a quiet machine"
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(text):
    return command.main(text.split())


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_names_every_subcommand_and_job(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(
        f"\n    {name} " in said for name in "train sample score runs table pending".split()
    )
    with pytest.raises(SystemExit):
        run("train --help")
    said = capsys.readouterr().out
    assert all(re.search(rf"\b{job}\b", said) for job in sweep.job_notebooks())


def test_parameters_are_those_of_the_notebook(capsys):
    assert run("train toy2d --parameters") == 0
    said = capsys.readouterr().out
    assert "| density | \"both\" | `gaussians16`, `pinwheel` or `both` |" in said
    parameters, _, settings = said.partition("\n\n")
    assert len(parameters.splitlines()) == 2 + len(sweep.notebook_parameters(str(sweep.job_notebooks()["toy2d"])))
    assert "| rho_single | " in settings
    names = dict(ptb="n_symbols", control="w_cls", images="w_kl", semisup="w_agree", response="n_turns")
    for job, name in names.items():
        assert f"\n| {name} | " in command.parameters_table(job).partition("\n\n")[2], job


def test_options_stand_for_parameters_of_the_notebook(monkeypatch):
    given = []
    monkeypatch.setattr(command, "train_job", lambda job, values: given.append((job, values)) or 0)
    assert run("train text --system vae --seed 3 -p steps 5") == 0
    assert given == [("ptb", dict(system="vae", seed="3", steps="5"))]


def test_an_error_speaks_of_the_options_of_the_command(monkeypatch):
    said = 'lower batch (settings="batch=9"), as systems="ldebm" does'
    monkeypatch.delenv("LDEBM_MAKE", raising=False)
    assert command._as_typed(said) == 'lower batch (-p settings "batch=9"), as -p systems "ldebm" does'
    assert command._as_typed(command._as_typed(said)) == command._as_typed(said)
    monkeypatch.setenv("LDEBM_MAKE", "1")
    assert command._as_typed(said) == 'lower batch (SETTINGS="batch=9"), as SYSTEM="ldebm" does'


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,complaint",
    [
        ("train prb", "unknown job 'prb'; did you mean 'ptb'?"),
        ("train text -p stepps 5", "unknown parameter of ptb 'stepps'; did you mean 'steps'?"),
        ("train digits --corpus mine.txt", "did you mean `ldebm train ptb --corpus ...`?"),
        ("sample gramar", "nor a model that came along (digits, grammar, shapes); did you mean 'grammar'?"),
        ("sample digits --symbol 3", "digits draws pictures: --symbol and --temperature are for sentences"),
        ("sample digits --guidance 3", "--guidance weighs what is asked: say what, with --ask or --symbol"),
        ("sample digits --ask clas=3", "unknown attribute 'clas'; did you mean 'class'?"),
        ("sample grammar --ask topic=farm topic=school", "--ask topic=farm topic=school: one value of each"),
        ("sample shapes --ask colour=gren", "unknown colour 'gren'; did you mean 'green'?"),
        ("sample -n 0", "-n 0: at least one"),
        ("sample --ask farm", "--ask farm: write what it is as well, topic=farm"),
        ("sample shapes --ask cross", "--ask cross: write what it is as well, shape=cross"),
        ("sample shapes --ask crss", "--ask crss: write what it is as well, NAME=crss"),
        ("train digits --dataset pics", "`ldebm train images --dataset pics`"),
        ("train -p energy_steps 100", "energy_steps is a setting of ptb: -p settings \"energy_steps=100\""),
        ("pending", "there is no folder results: run this in a checkout, or name a folder of records with --results"),
        ("sample --symbol 80", "grammar has symbols 0 to 79"),
        ("sample --ask topic=frm", "unknown topic 'frm'; did you mean 'farm'?"),
        ("sample --ask tpic=farm", "unknown attribute 'tpic'; did you mean 'topic'?"),
        ("score grammar nowhere.txt", "nowhere.txt"),
        ("runs", "no run under runs: `ldebm train` makes one"),
        ("table --systems veo", "did you mean 'vae'"),
        ("pending --budget soon", "BUDGET=soon is no length of time"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, complaint, capsys, elsewhere):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert complaint in err and len(err.strip().splitlines()) == 1 and not out
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "arguments", ["", "trian", "train -p steps", "sample -n few", "sample --symbol 1 --ask topic=farm"]
)
def test_what_cannot_be_read(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run(arguments)
    assert end.value.code == 2 and "usage: ldebm" in capsys.readouterr().err


def test_a_missing_corpus_in_a_process_of_its_own(elsewhere):
    "The job itself says so, in one line after papermill's, and nothing is left"
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    cmd = [sys.executable, "-m", "ldebm.command", "train", "--corpus", "nowhere.txt"]
    res = subprocess.run(cmd, env=env, capture_output=True, text=True)
    assert res.returncode == 2, res.stderr
    assert "Traceback" not in res.stdout + res.stderr
    assert re.match(r"FileNotFoundError: .*nowhere\.txt", res.stderr.strip().splitlines()[-1])
    assert not [path for path in elsewhere.rglob("*") if path.is_file()]


@pytest.mark.parametrize("missing", ["papermill", "ipykernel", "matplotlib"])
def test_a_missing_package_has_a_remedy(missing, monkeypatch, capsys):
    found = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    assert run("train") == 2
    assert f"pip install {missing}\n" in capsys.readouterr().err


# -- train ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def papermill(monkeypatch):
    "A stand-in: what it was called with, and what it does"
    calls = []

    def stand_in(arguments, say):
        calls.append(arguments)
        Path(arguments[1]).write_text("executed")
        say(stand_in.last_word)
        return stand_in.status(Path(arguments[1]).parent)

    stand_in.calls, stand_in.status, stand_in.last_word = calls, lambda folder: 0, "over"
    monkeypatch.setattr(sweep, "papermill_command", stand_in)
    return stand_in


@pytest.fixture
def accepting(monkeypatch):
    "Any parameter will do"
    monkeypatch.setattr(command, "_resolved", lambda *what: (None, TextSettings()))


def finished(folder):
    (folder / "result.json").write_text((MODELS / "grammar" / "result.json").read_text())
    return 0


def begun(folder):
    (folder / "settings.json").write_text("{}")
    return 130


@pytest.mark.parametrize(
    "arguments,says",
    [
        ("train -p system svebn", "unknown system 'svebn'; did you mean 'svebm'?"),
        ("train zoo --preset smal", "unknown preset 'smal'; did you mean 'small'?"),
        ("train --corpus ptbb", "unknown corpus 'ptbb'; did you mean 'ptb'?"),
        ("train --corpus texts/mine.txt", "/texts/mine.txt; it should be a text file"),
        ("train -p settings wkl=1", "unknown setting 'wkl'; did you mean 'w_kl'?"),
        ("train -p settings foo=1", "unknown setting 'foo': the page text_settings lists the "),
        ("train -p steps many", "steps='many' must be int"),
        ("train control -p settings attributs=all", "unknown setting 'attributs'; did you mean 'attributes'?"),
        ("train images --dataset shape", "unknown data set 'shape'; did you mean 'shapes'?"),
        ("train images --dataset my/pictures", "/my/pictures"),
        ("train digits -p systems ldebn", "unknown system 'ldebn'; did you mean 'ldebm'?"),
        ("train toy2d -p density pinweel", "unknown density 'pinweel'; did you mean 'pinwheel'?"),
        ("train semisup --corpus agnew", "unknown corpus with classes 'agnew'; did you mean 'agnews'?"),
        ("train response -p system ldeb", "unknown system 'ldeb'; did you mean 'ldebm'?"),
    ],
)
def test_refused_before_a_kernel_starts(arguments, says, papermill, elsewhere, capsys):
    "And nothing is left behind"
    assert run(arguments) == 2 and says in capsys.readouterr().err
    assert not papermill.calls and not list(Path().iterdir())


@pytest.mark.parametrize(
    "arguments,content,says",
    [
        ("train --corpus own.txt", b"a\x00b", "own.txt is a binary file"),
        ("train --corpus own.txt", b"", "own.txt is empty"),
        ("train --corpus own.txt", b"a short line\n" * 39, "own.txt has 39 sentences; at least 40 are needed"),
        ("train --corpus own.txt", None, "own.txt is a folder"),
        ("train images --dataset own.txt", b"no zip", "own.txt is not a zip"),
    ],
)
def test_what_cannot_be_read_is_refused_before_a_kernel_starts(arguments, content, says, papermill, elsewhere, capsys):
    path = Path("own.txt")
    path.mkdir() if content is None else path.write_bytes(content)
    assert run(arguments) == 2 and says in capsys.readouterr().err
    assert not papermill.calls and [other.name for other in Path().iterdir()] == ["own.txt"]


@pytest.mark.parametrize("load,threads,told", [(1.9, "2", True), (0.1, "2", False), (1.9, "1", False)])
def test_a_busy_machine_is_told_of(load, threads, told, papermill, elsewhere, capsys, monkeypatch):
    "Two threads that wait for each other there take longer than one"
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    papermill.status = finished
    assert run("train") == 0
    assert ("OMP_NUM_THREADS=1 in front" in capsys.readouterr().err) == told


def test_a_run_that_has_begun_needs_its_file_no_more(papermill, elsewhere, capsys):
    papermill.status = finished
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/settings.json").write_text("{}")
    assert run("train --corpus gone.txt --out runs/mine") == 0 and papermill.calls


@pytest.mark.usefixtures("accepting")
def test_parameters_reach_the_notebook(papermill, elsewhere, capsys):
    papermill.status = finished
    assert run("train --corpus 12 --preset small -p seed 3 -p variant 7 --out runs/mine") == 0
    (arguments,) = papermill.calls
    assert arguments[0] == str(ROOT / "nbs" / "train_ptb.ipynb")
    given = [tuple(arguments[i : i + 3]) for i, a in enumerate(arguments) if a in ("-p", "-r")]
    # a text that looks like a number stays one
    assert set(given) == {
        ("-r", "corpus", "12"),
        ("-r", "preset", "small"),
        ("-p", "seed", "3"),
        ("-r", "variant", "7"),
        ("-r", "out", "runs/mine"),
    }
    assert [p.name for p in Path("runs/mine").glob("*.ipynb")] == ["train_ptb.ipynb"]
    assert "ldebm+control-grammar-quick-consistent-s0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,folder",
    [
        ("train", "runs/ldebm-grammar-quick-consistent-s0"),
        ("train --corpus texts/mine.txt -p seed 2", "runs/ldebm-mine-quick-consistent-s2"),
        ("train toy2d", "runs/toy2d-s0"),
        ("train digits -p variant wide", "runs/digits-quick-consistent-s0+wide"),
        ("train control", "runs/ldebm+control-grammar-quick-consistent-s0"),
        ("train response -p seed 1", "runs/response-ldebm-grammar-quick-consistent-s1"),
        ("train semisup", "runs/labels-grammar-quick-consistent"),
        ("train images --dataset cifar10 --preset small", "runs/cifar10-small-consistent-s0"),
    ],
)
@pytest.mark.usefixtures("accepting")
def test_a_folder_of_its_own(arguments, folder, papermill):
    papermill.status = finished
    assert run(arguments) == 0 and Path(folder, "result.json").exists()


def test_what_is_kept_of_a_run_that_did_not_finish(papermill, elsewhere, capsys):
    papermill.status = lambda folder: 2
    assert run("train --out new") == 2 and not Path("new").exists()
    papermill.status = finished
    assert run("train --out old") == 0
    papermill.status = lambda folder: 2
    assert run("train --out old") == 2
    assert sorted(p.name for p in Path("old").iterdir()) == ["result.json", "train_ptb.ipynb"]
    papermill.status = begun
    Path("new").mkdir()
    Path("new", f"train_ptb.running.{2**22 + 1}.ipynb").touch()  # of a process that was killed
    assert run("train --out new") == 130
    assert sorted(p.name for p in Path("new").iterdir()) == ["settings.json", "train_ptb.stopped.ipynb"]
    assert "train_ptb.stopped.ipynb shows where" in capsys.readouterr().err
    papermill.status = finished
    assert run("train --out new") == 0 and not Path("new", "train_ptb.stopped.ipynb").exists()


# -- what the terminal shows ------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    def __init__(self, live):
        super().__init__()
        self.live = live

    def isatty(self):
        return self.live


def log(folder, *lines, torn=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(dict(steps=40, energy_steps=10)))
    with open(folder / "log.jsonl", "a") as f:
        f.write("".join(json.dumps(line) + "\n" for line in lines) + torn)


@pytest.fixture
def seconds(monkeypatch):
    "A clock of one's own"
    clock = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    return clock


def watched(screen, seconds, run):
    "A training of two stages and a measurement, half a minute a step of ten"
    log(run / "old", dict(kind="train", step=9, loss=7.0))  # of an earlier call
    watch = command._Watch(run, command._Line(screen))
    for step in (10, 20, 30, 40):
        log(run, dict(kind="train", step=step, nll=50.0 - step, loss=9.0), torn="{" if step == 30 else "")
        if step == 30:
            (run / "log.jsonl").write_text((run / "log.jsonl").read_text()[:-1])
        seconds[0] += 31
        watch.look()
    log(run / "energies", dict(kind="train", step=5, kl=3.0), dict(kind="valid", step=5, kl=2.5), torn='{"kind": "va')
    watch.look()
    (run / "score").mkdir()
    for name in ("sampler", "likelihood-test"):
        (run / "score" / f"{name}.json").write_text("{}")
        watch.look()
    watch.line.end()
    return screen.getvalue()


def test_the_last_word_comes_after_the_last_line(papermill, elsewhere, accepting, capfd):
    def stopped(folder):
        log(folder, dict(kind="train", step=7, nll=43.0))
        return 130

    papermill.status, papermill.last_word = stopped, "Interrupted: it stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", sys.stdout)  # one stream, as in a terminal
        assert run("train --out new") == 130
    said = capfd.readouterr().out
    assert 0 < said.index("step 7/40") < said.index("Interrupted: it stopped") < said.index("The run stopped")


def test_elsewhere_than_in_a_terminal_lines_are_plain(tmp_path, seconds):
    said = watched(Screen(False), seconds, tmp_path / "run")
    assert "\r" not in said and "\x1b" not in said
    assert said.splitlines() == [
        "train      step 10/40   nll 40   loss 9",
        "train      step 20/40   62 s left   nll 30   loss 9",
        "train      step 30/40   31 s left   nll 20   loss 9",
        "train      step 40/40   done   nll 10   loss 9",
        "energies   step 5/10   validation at 5: kl 2.5",
        "measure    done so far: sampler",
        "measure    done so far: sampler, likelihood-test",
    ]


def test_a_terminal_has_one_live_line_a_stage(tmp_path, seconds):
    said = watched(Screen(True), seconds, tmp_path / "run")
    left = [line.split("\r")[-1].removeprefix("\x1b[2K") for line in said.split("\n")[:-1]]
    assert [line.split()[0] for line in left] == ["train", "energies", "measure"] and "step 40/40" in left[0]
    assert said.count("\r") == 7


def test_what_takes_long_without_a_line_says_so(tmp_path, seconds):
    "Imports before training, measurements of pictures after it"
    screen = Screen(False)
    watch = command._Watch(tmp_path, command._Line(screen))
    for _ in range(2):
        seconds[0] += 4
        watch.look()
    log(tmp_path, dict(kind="train", step=20, loss=1.0))
    for step in (None, 40):
        if step:
            log(tmp_path, dict(kind="train", step=step, loss=1.0))
        for _ in range(2):
            watch.look()
            seconds[0] += 40
    watch.look()
    watch.line.end()
    told = [line.split("  ")[0] for line in screen.getvalue().splitlines()]
    assert told == ["prepare", "train", "train", "measure", "measure"], screen.getvalue()


def test_a_run_that_goes_on_says_so(tmp_path):
    same = TextSettings(steps=40, energy_steps=10)
    other, refitted, more = (
        replace(same, **new) for new in (dict(steps=50), dict(refit_steps=10), dict(changes="40:steps=60"))
    )
    assert command._earlier(tmp_path, same) == ""
    log(tmp_path, dict(kind="train", step=20), dict(kind="valid", step=10))
    assert command._earlier(tmp_path, same) == f"{tmp_path} is at step 20 or later: with the same settings it goes on"
    (tmp_path / "result.json").write_text("{}")
    assert "is finished" in command._earlier(tmp_path, same) and command._earlier(tmp_path, other) == ""
    assert command._earlier(tmp_path, refitted) == "", "a setting that a run of its default does not keep"
    assert command._earlier(tmp_path, more) == f"{tmp_path} has been trained: it goes on as `changes` says"


def test_a_folder_of_runs_names_them(elsewhere, capsys):
    Path("some", "first").mkdir(parents=True)
    Path("some", "first", "config.json").write_text("{}")
    assert run("sample some") == 2
    assert f"some is a folder of runs; name one of them: {Path('some', 'first')}" in capsys.readouterr().err


def test_a_stage_that_is_quick_has_its_last_line_alone(tmp_path, seconds):
    "Lines within half a minute of each other are not all told"
    screen = Screen(False)
    watch = command._Watch(tmp_path, command._Line(screen))
    for step in range(1, 30):
        log(tmp_path, dict(kind="train", step=step, loss=1.0))
        seconds[0] += 1
        watch.look()
    watch.line.end()
    assert [line.split()[2] for line in screen.getvalue().splitlines()] == ["1/40", "29/40"]


# -- sample, score, runs ----------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_card(capsys):
    assert run("sample -n 4 --ask topic=farm mood=question") == 0
    model, vocab = load_model("grammar")
    y = load_symbols("grammar").request(topic="farm", mood="question")
    want = sample_sentences(model, 4, y=y, gen=torch.Generator().manual_seed(0))
    assert capsys.readouterr().out.splitlines() == [" ".join(vocab.decode(ids)) for ids in want]


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_samples_of_pictures_are_a_file(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, seed in zip(files, (0, 0, 1)):
        assert run(f"sample {name} -n 4 --seed {seed} --out {file}") == 0
        assert str(file) in capsys.readouterr().out
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other
    value = dict(digits="class=7", shapes="colour=red shape=cross")[name]
    assert run(f"sample {name} -n 4 --seed 1 --guidance 2 --out {files[0]} --ask {value}") == 0
    assert files[0].read_bytes() != other and str(files[0]) in capsys.readouterr().out
    assert run(f"sample {name} --out mine.txt") == 2 and ".png" in capsys.readouterr().err
    assert list(tmp_path.glob("samples*")) == []


def test_a_gaussian_has_nothing_to_draw_from(tmp_path, capsys):
    for system in ("gaussian", "ldebm"):
        (tmp_path / "run" / system).mkdir(parents=True)
        (tmp_path / "run" / system / "result.json").write_text("{}")
    (tmp_path / "run" / "generator").mkdir()
    (tmp_path / "run" / "ldebm" / "model.safetensors").write_bytes(b"")
    assert run(f"sample {tmp_path}/run/gaussian") == 2
    assert "run/gaussian has no weights, a Gaussian needs none: models there: ldebm" in capsys.readouterr().err


def test_samples_go_into_a_file_that_is_named(tmp_path, capsys):
    assert run("sample -n 3") == 0
    printed = capsys.readouterr().out
    assert run(f"sample -n 3 --out {tmp_path}/new/mine.txt") == 0
    assert str(tmp_path) in capsys.readouterr().out
    assert (tmp_path / "new" / "mine.txt").read_text(encoding="utf-8") == printed


@pytest.mark.parametrize("out, said", [("", "is a folder"), ("/mine.txt/more.txt", "cannot be written")])
def test_a_file_that_cannot_be_written_is_refused_before_drawing(out, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    monkeypatch.setattr("ldebm.text_vae.sample_sentences", None)
    assert run(f"sample --out {tmp_path}{out}") == 2 and said in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_reader_that_has_read_enough_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m ldebm.command sample -n 3000 | head -n 1", shell=True, capture_output=True, text=True
    )
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""


def test_a_run_that_has_not_finished_is_named(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("{}")
    assert run(f"sample {tmp_path}") == 2 and "has not finished" in capsys.readouterr().err


def test_seeds_symbols_and_temperature_matter(capsys):
    said = []
    for more in ("", "--seed 0", "--seed 1", "--symbol 3", "--symbol 3 --guidance 4", "--temperature 1"):
        assert run(f"sample -n 6 {more}") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(set(said)) == 5


def test_a_real_sentence_is_likelier_than_its_words_in_disorder(elsewhere, capsys):
    words = json.loads((MODELS / "grammar" / "sentences.json").read_text())[0]
    Path("two.txt").write_text("\n".join(" ".join(s) for s in (words, words[::-1], ["zyx", *words[1:]])))
    assert run("score grammar two.txt --draws 16") == 0
    out = capsys.readouterr().out
    nats = [float(row.split("|")[2]) for row in out.splitlines()[2:5]]
    assert nats[0] + 10 < nats[1]
    mean = float(re.search(r"Mean ([\d.]+) nats", out)[1])
    assert abs(mean - sum(nats) / 3) < 0.01
    low, high = map(float, re.search(r"estimation (\d+\.\d+) to (\d+\.\d+)", out).groups())
    assert low <= mean <= high and "read as one unknown word: zyx." in out


def test_a_run_without_likelihood_is_scored_by_the_default(elsewhere, capsys):
    shutil.copytree(MODELS / "grammar", "plain")
    about = json.loads(Path("plain/config.json").read_text())
    about["settings"]["nll_draws"] = 0
    Path("plain/config.json").write_text(json.dumps(about))
    Path("one.txt").write_text(" ".join(json.loads((MODELS / "grammar" / "sentences.json").read_text())[0]))
    assert run("score plain one.txt") == 0 and "Mean" in capsys.readouterr().out


def test_without_a_latent_likelihood_is_exact(elsewhere, capsys):
    settings = resolve(TextJob(system="rnn-lm", settings="embed=8 hidden=8"))
    vocab = Vocab(["<pad>", "<unk>", "<s>", "</s>", "a", "b"])
    model = build_model(settings, vocab, 0)
    about = dict(kind="text", corpus="few", settings=asdict(settings), vocab=vocab.itos)
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(about))
    save_tensors("run/model.safetensors", model.state_dict())
    Path("few.txt").write_text("a b a\nb b\n")
    assert run("score run few.txt") == 0
    out = capsys.readouterr().out
    batch = get_batch(make_split(vocab, [["a", "b", "a"], ["b", "b"]]), torch.arange(2))
    want = model.eval().decoder.nll(batch.ids, batch.host_lengths, None)
    assert [row.split("|")[2].strip() for row in out.splitlines()[2:4]] == [f"{x:.2f}" for x in want.tolist()]
    assert "bound" not in out
    assert run("sample run --symbol 1 --temperature 1") == 2
    assert "this model has no latent" in capsys.readouterr().err


def test_runs_and_records_are_listed(elsewhere, capsys):
    record = json.loads((MODELS / "grammar" / "result.json").read_text())
    for place in ("runs/done", "runs/begun", "runs/begun/energies"):
        Path(place).mkdir(parents=True)
        Path(place, "settings.json").write_text("{}")
    Path("runs/done/result.json").write_text(json.dumps(record))
    assert run("runs") == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2 and f"bleu {record['metrics']['bleu']['value']:.4g}" in rows[0]
    assert rows[1].startswith("| runs/begun | not finished |")
    assert run(f"runs {ROOT / 'results'}") == 0
    assert len(capsys.readouterr().out.splitlines()) > 100


@pytest.mark.slow
def test_a_corpus_of_ones_own_from_a_file_to_sentences(elsewhere, capsys):
    file = tiny_corpus(elsewhere)
    tiny = "embed=16 hidden=16 d=4 batch=16 steps=6 energy_steps=5 max_len=12 n_samples=20 nll_draws=4 nll_sentences=4"
    assert command.main(["train", "--corpus", str(file), "--out", "run", "-p", "settings", f"{tiny} lm=''"]) == 0
    assert {"train_ptb.ipynb", "result.json", "model.safetensors"} <= {p.name for p in Path("run").iterdir()}
    said = capsys.readouterr().out
    stages = [line.split()[0] for line in said.partition("Samples:")[0].splitlines() if line]
    assert [stage for stage in dict.fromkeys(stages) if stage != "prepare"] == ["train", "energies", "measure"], said
    assert "Everything is in run:" in said and "epoch 1," not in said
    assert run("sample run -n 3 --temperature 1") == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize("changes,steps", [("", 20), ("5:lr=1", 20), ("5:lr=1,20:steps=30,30:steps=45", 45)])
def test_steps_of_a_run_are_those_that_changes_gave_it(tmp_path, changes, steps):
    settings = dict(steps=20, energy_steps=7, changes=changes)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert (command._steps_of(tmp_path, "train"), command._steps_of(tmp_path, "energies")) == (steps, 7)


def test_a_ddpm_takes_its_share_of_steps(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(dict(steps=200, ddpm_share=3)))
    assert [command._steps_of(tmp_path, stage) for stage in ("ldebm", "ddpm")] == [200, 600]


def test_a_file_in_place_of_a_job_is_told_its_option(elsewhere, capsys):
    Path("mine.txt").write_text("a sentence")
    assert run("train mine.txt") == 2
    assert "mine.txt is no job: --corpus takes a file of sentences" in capsys.readouterr().err


def test_files_of_a_run_have_the_names_that_they_will_have(tmp_path):
    for name in ("train_ptb.running.12.ipynb", "train_ptb.stopped.ipynb", "model.safetensors", ".lock"):
        (tmp_path / name).touch()
    assert run_files(tmp_path) == ["model.safetensors", "train_ptb.ipynb"]
