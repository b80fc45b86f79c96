"Models that are saved, opened, uploaded: in the repository, in folders, on a Hub"

import json
import re
import shutil
import sys
from types import SimpleNamespace

import hub
import pytest
import torch
from torch.testing import assert_close

from ldebm.core import load_tensors, make_gen, save_tensors, weights_hash
from ldebm.image_measure import decode_all
from ldebm.image_shipped import prior_card
from ldebm.image_stages import load_prior
from ldebm.image_uses import UPDATES, sample_requested
from ldebm.records import check_result
from ldebm.shipped import latents_of, model_card
from ldebm.text_job import MODELS, load_model, load_symbols
from ldebm.text_vae import TextModel, sample_sentences

SHIPPED = sorted(path.parent.name for path in MODELS.glob("*/config.json"))
PICTURES = sorted({path.parent.name for path in MODELS.glob("*/result.json")} - set(SHIPPED))


def test_models_come_along_and_are_small():
    assert "grammar" in SHIPPED and PICTURES == ["digits", "shapes"]
    assert sum(p.stat().st_size for p in MODELS.rglob("*")) < 8 * 2**20


@pytest.mark.parametrize("name", SHIPPED)
def test_a_later_version_reads_as_this_one_did(name):
    sentences = json.loads((MODELS / name / "sentences.json").read_text())
    kept = load_tensors(MODELS / name / "latents.safetensors")[0]["latents"]
    torch.testing.assert_close(latents_of(name, sentences), kept, rtol=1e-3, atol=1e-3)
    assert kept.std(0).min() > 0.01, "different sentences have different latents"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_is_what_the_record_says(name):
    record = check_result(json.loads((MODELS / name / "result.json").read_text()))
    assert not record["provenance"]["commit"].endswith("dirty")
    card = (MODELS / name / "README.md").read_text()
    request = card.partition("symbols.request(")[2].partition(")\n")[0]
    assert card == model_card(record, name, request, "apache-2.0")


@pytest.mark.parametrize("name", PICTURES)
def test_the_card_of_an_image_prior_is_what_the_record_says(name):
    record = check_result(json.loads((MODELS / name / "result.json").read_text()))
    assert record["corpus"] == name and not record["provenance"]["commit"].endswith("dirty")
    assert (MODELS / name / "README.md").read_text() == prior_card(record, name, "apache-2.0")


def test_shapes_have_the_colour_that_they_are_asked_for():
    generator, prior = load_prior("shapes")
    asked = torch.arange(4).repeat_interleave(16)
    gen = make_gen(0, "colours")
    u = [sample_requested(prior, 16, dict(colour=colour), 3, gen) for colour in prior.attributes["colour"]]
    x = decode_all(generator, torch.cat(u))
    pixels = x.flatten(2).transpose(1, 2)  # (64, 256, 3)
    brightest = pixels[torch.arange(64), (pixels.amax(2) - pixels.amin(2)).argmax(1)]
    pure = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]])
    read = torch.nn.functional.normalize(brightest) @ torch.nn.functional.normalize(pure).T
    assert (read.argmax(1) == asked).double().mean() > 0.9


def test_a_request_by_name_is_the_request_by_number():
    for name, by_name, by_number in (
        ("shapes", dict(size="large", shape="cross"), [3, -1, 1, -1]),
        ("digits", {"class": "7"}, 7),
    ):
        _, prior = load_prior(name)
        u = sample_requested(prior, 3, by_name, 2, make_gen(0, "request"))
        y = torch.tensor(by_number).repeat(3, *[1] * isinstance(by_number, list))
        same = prior.guided(2).sample(3, y=y, n_steps=UPDATES, gen=make_gen(0, "request"))
        assert_close(u, same, atol=0, rtol=0)


def test_a_prior_without_names_says_why_it_takes_no_request(tmp_path):
    tensors, about = load_tensors(MODELS / "digits" / "model.safetensors", "cpu")
    del about["attributes"]
    _, prior = load_prior(save_tensors(tmp_path / "model.safetensors", tensors, about))
    with pytest.raises(ValueError, match="no names to be asked by: only ldebm-coupled"):
        sample_requested(prior, 1, {"class": "7"})


def test_digits_look_like_the_class_that_they_are_asked_for():
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    generator, prior = load_prior("digits")
    asked = torch.arange(10).repeat(10)
    x = decode_all(generator, prior.guided(2).sample(100, y=asked, n_steps=UPDATES, gen=make_gen(0, "digits")))
    images, labels = load_digits(return_X_y=True)
    read = KNeighborsClassifier(1).fit(images / 16, labels).predict(x.flatten(1).numpy())
    assert (read == asked.numpy()).mean() > 0.9


def test_the_grammar_model_does_what_it_is_asked():
    model, vocab = load_model("grammar")
    symbols = load_symbols("grammar")
    for mood, mark in (("question", "?"), ("statement", "."), ("command", "!")):
        prior = model.prior
        model.prior = prior.guided(4.0)
        sentences = sample_sentences(model, 200, y=symbols.request(mood=mood), gen=make_gen(0, mood))
        model.prior = prior
        ends = [vocab.decode(ids)[-1] for ids in sentences if ids]
        assert sum(end == mark for end in ends) > 180, (mood, ends[:20])


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nor a model that came along \\(.*grammar"):
        load_model(tmp_path / "nothing")


# -- folders and the Hub ----------------------------------------------------------------------------------------------

FORMAT = {"model.safetensors", "config.json", "result.json", "README.md"}


def drawn(model):
    return sample_sentences(model, 5, gen=make_gen(0, "same"))


def same(model, other):
    "Weights bit for bit, words, symbols and sentences"
    assert weights_hash(model) == weights_hash(other) and model.vocab.itos == other.vocab.itos
    assert model.symbols.titles == other.symbols.titles
    return drawn(model) == drawn(other)


@pytest.fixture(scope="module")
def grammar():
    return TextModel.from_pretrained("grammar")


@pytest.fixture
def repository(grammar, tmp_path):
    "A Hub that has `someone/grammar`; arguments that download from it"
    grammar.save_pretrained(tmp_path / "hub" / "someone" / "grammar")
    with hub.serve(tmp_path / "hub") as address:
        yield dict(endpoint=address, cache_dir=tmp_path / "cache")


def test_a_saved_model_is_the_same_bits(grammar, tmp_path):
    folder = grammar.save_pretrained(tmp_path / "copy", name="grammar", request="topic='farm', mood='question'")
    assert {path.name for path in folder.iterdir()} == FORMAT
    for name in FORMAT - {"model.safetensors"}:  # whose head has no fixed order
        assert (folder / name).read_bytes() == (MODELS / "grammar" / name).read_bytes(), name
    assert same(grammar, TextModel.from_pretrained(folder))
    model, vocab = load_model(folder)
    assert drawn(model) == drawn(grammar) and vocab.itos == grammar.vocab.itos


def test_weights_that_changed_have_no_record(tmp_path):
    model = TextModel.from_pretrained("grammar")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.decoder.embed.weight.mul_(1.01)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FORMAT - {"result.json"}
    card = (tmp_path / "README.md").read_text()
    assert "nothing about them has been measured" in card and "| metric |" not in card
    assert card.startswith("---\nlicense: apache-2.0\n"), "as the card that came along"
    (tmp_path / "README.md").unlink()
    assert (
        "licen" not in TextModel.from_pretrained(tmp_path).save_pretrained(tmp_path).joinpath("README.md").read_text()
    )
    assert weights_hash(TextModel.from_pretrained(tmp_path)) == weights_hash(model)


def test_from_a_hub(grammar, repository):
    model = TextModel.from_pretrained("someone/grammar", **repository)
    assert same(model, grammar)
    assert model.origin.files["result.json"] == grammar.origin.files["result.json"]
    with pytest.raises(FileNotFoundError, match="(?s)someone/else is no model here: .*, and .* does not give it: 404"):
        TextModel.from_pretrained("someone/else", **repository)


def test_a_misspelt_run_is_told_its_neighbours(grammar, repository, tmp_path, monkeypatch):
    grammar.save_pretrained(tmp_path / "runs" / "good")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="runs/god is not the folder of a finished run, .*; did you mean 'runs/good'"
    ):
        TextModel.from_pretrained("runs/god", **repository)


def test_a_repository_may_be_called_like_a_folder_without_runs(grammar, repository, tmp_path, monkeypatch):
    (tmp_path / "someone").mkdir()
    monkeypatch.chdir(tmp_path)
    assert same(TextModel.from_pretrained("someone/grammar", **repository), grammar)


def test_a_run_on_pictures_says_what_opens_it(tmp_path):
    (tmp_path / "generator").mkdir()
    (tmp_path / "ldebm").mkdir()
    (tmp_path / "ldebm" / "result.json").touch()
    for folder in (tmp_path, tmp_path / "ldebm"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"load_prior({str(tmp_path / 'ldebm')!r})` opens it")):
            TextModel.from_pretrained(folder)


def test_code_from_a_hub_is_asked_for(repository, tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "hub" / "someone" / "grammar" / "own.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        TextModel.from_pretrained("someone/grammar", **repository)
    assert not ran.exists()
    model = TextModel.from_pretrained("someone/grammar", trust_remote_code=True, **repository)
    assert ran.exists() and (model.save_pretrained(tmp_path / "copy") / "own.py").exists()


def test_to_a_hub(grammar, tmp_path, monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repo, **how):
            seen["made"] = repo, how
            return SimpleNamespace(repo_id=f"someone/{repo}")

        def upload_folder(self, folder_path, repo_id, **how):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = grammar.push_to_hub("grammar", private=True, token="t")
    assert address.endswith("someone/grammar/commit/1")
    assert seen == dict(token="t", made=("grammar", dict(private=True, exist_ok=True)))
    card = (tmp_path / "hub" / "someone" / "grammar" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "from_pretrained('someone/grammar')" in card
    with hub.serve(tmp_path / "hub") as place:
        assert same(grammar, TextModel.from_pretrained("someone/grammar", endpoint=place, cache_dir=tmp_path / "c"))


def test_without_the_package_of_the_hub(grammar, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert same(grammar, TextModel.from_pretrained(grammar.save_pretrained(tmp_path / "here")))
    for ask in (lambda: TextModel.from_pretrained("someone/grammar"), lambda: grammar.push_to_hub("someone/grammar")):
        with pytest.raises(ImportError, match=r"pip install 'ldebm\[hub\]'"):
            ask()


def test_a_model_that_was_not_opened_has_nothing_to_save(tmp_path):
    model = load_model("grammar")[0]
    for save in (lambda: model.save_pretrained(tmp_path / "new"), lambda: model.push_to_hub("someone/new")):
        with pytest.raises(ValueError, match="open that with TextModel.from_pretrained"):
            save()
    assert not (tmp_path / "new").exists()
    (tmp_path / "config.json").write_text(json.dumps(dict(kind="response")))
    with pytest.raises(ValueError, match="of kind response, not of text"):
        TextModel.from_pretrained(tmp_path)
