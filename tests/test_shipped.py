"Models in the repository: what they read, what they say, and their cards"

import json

import pytest
import torch

from ldebm.core import load_tensors, make_gen
from ldebm.records import check_result
from ldebm.shipped import latents_of, model_card
from ldebm.text_job import MODELS, load_model, load_symbols
from ldebm.text_vae import sample_sentences

SHIPPED = sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def test_models_come_along_and_are_small():
    assert "grammar" in SHIPPED
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
    request = card.partition("').request(")[2].partition(")\n")[0]
    assert card == model_card(record, name, request)


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
