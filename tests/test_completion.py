"Completion: what the page cannot show"

import math

import pytest
import torch
from torch.testing import assert_close

from ldebm.codes import MixturePrior
from ldebm.completion import HIDDEN, complete, hidden_words_nll, hide_words, move_latents, read_gaps, weigh_words
from ldebm.core import make_gen
from ldebm.energy import EnergyNet
from ldebm.grammar_corpus import load_grammar
from ldebm.levels import PriorCfg
from ldebm.posterior import StandardNormal
from ldebm.prior import DiffusionEBM
from ldebm.schedule import consistent_schedule, published_schedule
from ldebm.text import Vocab
from ldebm.text_nets import TextCfg
from ldebm.text_vae import TextModel

VOCAB = Vocab(['<pad>', '<s>', '</s>', '<unk>', 'a', 'b', 'c', 'd'])


def tiny(prior, d=1):
    model = TextModel(len(VOCAB), TextCfg(8, 8, d=d, init=1.5), prior, bos=1, eos=2, gen=make_gen(0))
    return model.eval().requires_grad_(False)


def diffusion(T=6, objective='consistent', d=1, scale=1.0, **cfg):
    make = consistent_schedule if objective == 'consistent' else published_schedule
    reference = 'gaussian' if objective == 'consistent' else 'flat'
    energy = EnergyNet(d, 3, T, hidden=8, n_blocks=1, spectral=False, init=scale, gen=make_gen(1))
    return DiffusionEBM(make(T), energy, PriorCfg(objective=objective, reference=reference, **cfg))


def silence(prior):
    for parameter in prior.energy.parameters():
        parameter.data.zero_()
    return prior


def test_without_energies_six_levels_complete_as_the_normal_prior_does():
    gaps = read_gaps(['a ___ b'.split()], VOCAB).repeat(5)
    truth = gaps.ids.clone()
    truth[:, 2] = torch.arange(3, 8)
    priors = StandardNormal(1), silence(diffusion())
    one, six = (hidden_words_nll(tiny(p), gaps, truth, chains=100, sweeps=24, gen=make_gen(2)) for p in priors)
    assert_close(one.neg().exp(), six.neg().exp(), atol=0.03, rtol=0)
    assert one.neg().exp().sum() == pytest.approx(1, abs=0.08)


def test_the_posterior_of_a_quadratic_likelihood_is_a_known_gaussian():
    prior, observed, sd = silence(diffusion(d=2)), torch.tensor([1.0, -0.5]), 0.5
    z = torch.zeros(4000, 2)
    for i in range(30):
        z, accept = move_latents(
            prior, lambda z: -((z - observed) ** 2).sum(1) / (2 * sd**2), z, gen=make_gen(3, str(i))
        )
    share = 1 / (1 + sd**2)
    assert_close(z.mean(0), share * observed, atol=0.03, rtol=0)
    assert_close(z.var(0), torch.full((2,), share * sd**2), atol=0.02, rtol=0)
    assert accept.mean() > 0.8


@pytest.mark.parametrize('objective', ['consistent', 'published'])
def test_both_objectives_complete_and_a_symbol_can_be_asked_for(objective):
    model = tiny(diffusion(objective=objective, n_steps=3, scale=0.3))
    for y in (None, 2):
        found = complete(model, VOCAB, '___ c ___', 3, y=y, sweeps=2, gen=make_gen(0))
        assert [sentence.split()[1] for sentence in found.sentences] == ['c'] * 3


def test_a_prior_without_chains_is_named():
    model = tiny(StandardNormal(4), d=4)
    model.prior = MixturePrior(4, 2, 3, make_gen(0))
    with pytest.raises(ValueError, match='MixturePrior'):
        complete(model, VOCAB, 'a ___', gen=make_gen(0))


@pytest.mark.parametrize(
    'text, says', [('a </s> ___', '</s>'), ('a <pad> ___', '<pad>'), ('', 'no gap'), ('Zebra ___', 'Zebra')]
)
def test_what_cannot_be_completed_is_said_before_any_chain(text, says):
    with pytest.raises(ValueError, match=says):
        complete(tiny(StandardNormal(1)), VOCAB, text)


def test_hidden_words_are_never_tags_and_their_probabilities_add_up():
    model, gaps = tiny(StandardNormal(1)), read_gaps(['a ___ b'.split()], VOCAB)
    many = gaps.repeat(5)
    ids = many.ids.clone()
    ids[:, 2] = torch.arange(3, 8)
    z = torch.full((5, 1), 0.4)
    _, seen, said = weigh_words(model.decoder, z, many._replace(ids=ids), torch.zeros(5, dtype=torch.bool))
    assert_close(said.exp().sum(), torch.tensor(1.0))
    whole = -model.decoder.nll(ids, gaps.lengths.repeat(5), z)
    assert_close(seen + said, whole)
    drawn, _, _ = weigh_words(model.decoder, z.repeat(200, 1), gaps.repeat(1000), gen=make_gen(5))
    assert drawn[:, 2].min() >= 3


def test_rows_are_read_in_pieces_of_any_size():
    model, gaps = tiny(StandardNormal(1)), read_gaps(['a ___ b'.split(), 'd c ___'.split(), ['___']], VOCAB)
    ids = gaps.ids.masked_fill(gaps.hidden, 5)
    z, none = torch.randn(3, 1, generator=make_gen(6)), torch.zeros(3, dtype=torch.bool)
    whole = weigh_words(model.decoder, z, gaps._replace(ids=ids), none)
    parts = weigh_words(model.decoder, z, gaps._replace(ids=ids), none, rows=2)
    for one, other in zip(whole, parts):
        assert_close(one, other)


def test_the_grammar_knows_the_least_that_hidden_words_can_cost():
    "Mean over sentences of the exact cost: seeing both sides is cheaper than seeing the left"
    grammar = load_grammar()
    sentences, _ = grammar.sample(300, make_gen(7))
    both = left = 0.0
    for words in sentences:
        shown = hide_words(words, gen=make_gen(8, ' '.join(words)))
        hidden = [None if word == HIDDEN else word for word in shown]
        cost = grammar.visible_log_prob(hidden) - grammar.log_prob(words)
        assert cost >= -1e-12 and math.isfinite(cost)
        both += cost
        left += sum(c for c, word in zip(grammar.read(words)[0].tolist(), hidden) if word is None)
    assert both < 0.8 * left
