"""Numbers of the method, in float64 on the plain paths, that a rewriting must leave as they are

    python tests/golden.py > tests/golden.json   # stores them anew: only when a change of the mathematics is meant
    python tests/golden.py --difference          # what differs from the stored ones

Every call into the package stands in the adapters of the first part; the cases of the second know tensors and names.
`test_golden` holds the stored numbers."""

import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from defined import Anywhere

ldebm, text = Anywhere(), Anywhere("text")  # names, on whatever page they stand

PLAIN = dict(LDEBM_RESIDENT="0", LDEBM_RECORD="0", LDEBM_RUNNERS="0", LDEBM_MATMUL="blas", OMP_NUM_THREADS="1")

STORED = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-6
D, SYMBOLS, LEVELS, BATCH = 5, 4, 3, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# -- adapters: the only places that name the package


def make_prior(schedule, symbols=SYMBOLS, spectral=True, **settings):
    "A small `DiffusionEBM` in float64; its spectral norms too, so that no other machine rounds them otherwise"
    energy = ldebm.EnergyNet(D, symbols, LEVELS, 8, 2, spectral=spectral, free_head=True, gen=generator(0)).double()
    with torch.no_grad():
        energy.head.weight.mul_(1000)
    energy.power_iterate(50)
    return ldebm.DiffusionEBM(ldebm.make_schedule(schedule, LEVELS), energy, ldebm.PriorCfg(**settings))


def make_posterior(mean, log_variance):
    return ldebm.DiagGaussian(mean, log_variance)


def make_score_prior(**settings):
    "Its last layer is zero at the start: drawn, so that there is something to see"
    cfg = ldebm.ScorePriorCfg(n_levels=30, hidden=8, n_blocks=2, **settings)
    prior = ldebm.make_score_prior(D, cfg, SYMBOLS, generator(0)).double()
    with torch.no_grad():
        prior.net.out.weight.copy_(0.3 * normal(D, 8, seed=1))
    return prior


def make_layered_prior(shape, groups, **settings):
    "Energies over the layers of a small generator, with weights as after training"
    tower = make_generator(shape).requires_grad_(False).eval()
    nets = ldebm.LayerNets(
        tower.cfg.sizes,
        tower.cfg.channels,
        ldebm.context_widths(tower),
        sum(groups),
        LEVELS,
        8,
        1,
        False,
        True,
        gen=generator(1),
    ).double()
    with torch.no_grad():
        for net in nets.nets:
            net.head.weight.mul_(10)
    energy = ldebm.LayeredEnergy(tower, nets, LEVELS, groups)
    return ldebm.DiffusionEBM(ldebm.make_schedule("consistent", LEVELS), energy, ldebm.PriorCfg(n_steps=3, **settings))


LADDERS = dict(
    vectors=dict(sizes=(1, 1, 1), channels=(4, 2, 3), widths=(12, 12, 12), blocks=(1, 0, 0)),
    maps=dict(sizes=(4, 8), channels=(2, 1), widths=(6, 5), blocks=(1, 0)),
    mixed=dict(
        sizes=(1, 2, 4),
        channels=(4, 3, 2),
        widths=(8, 7, 6),
        blocks=(1, 0, 1),
        likelihood="logistic",
        mixtures=2,
    ),
)


def make_generator(shape):
    tower = ldebm.Generator(ldebm.GeneratorCfg(shape=(1, 8, 8), **LADDERS[shape]), generator(0)).double()
    with torch.no_grad():
        for head in tower.prior:
            head.weight.mul_(5)
    return tower


def generator_loss(tower, free_nats, pictures, seed):
    n = len(pictures)
    batch = ldebm.ImageBatch(pictures, torch.zeros(n, 0, dtype=torch.long), torch.arange(n))
    return ldebm.GeneratorModel(tower, free_nats)(batch, generator(seed))


def frozen(energy):
    return ldebm.Frozen(energy)


def energy_and_slope(energy, z, t, y=None):
    return ldebm.energy_grad(energy, z, t, y)


# A chain's target: energy, first states, levels, means and variances


def conditional(target, temperature, y):
    energy, z, t, mean, variance = target
    temperature = torch.as_tensor(temperature, dtype=z.dtype).expand_as(variance)
    return ldebm.Conditional(energy, t, mean, variance, temperature, y=y)


def unadjusted_chain(target, n_steps, squared_step, temperature, y=None, gen=None):
    level = conditional(target, temperature, y)
    return ldebm.chain(level, ldebm.unadjusted(level, squared_step), target[1], n_steps, metropolis=False, gen=gen)[0]


def preconditioned_chain(target, n_steps, rho, temperature, drift=math.inf, y=None, gen=None):
    level = conditional(target, temperature, y)
    step = ldebm.preconditioned(level, rho, drift)
    return ldebm.chain(level, step, target[1], n_steps, metropolis=False, gen=gen)[0]


def metropolis_chain(target, n_steps, rho, temperature, drift=math.inf, y=None, gen=None):
    "States and mean acceptance"
    level = conditional(target, temperature, y)
    return ldebm.chain(level, ldebm.preconditioned(level, rho, drift), target[1], n_steps, gen=gen)


def chain_statistics(traces):
    return torch.tensor([ldebm.split_rhat(traces), ldebm.ess(traces)], dtype=torch.float64)


def level_conditional(prior, z_next, t):
    "Mean and variance of the Gaussian that level `t` tilts"
    return prior.tilted_gaussian(z_next, t)


def prior_terms(prior, q, z, seed, labels=None, weights=None):
    return prior.terms(q, z, generator(seed), labels, weights)


def prior_sample(prior, n, seed, **asked):
    if "known" in asked:
        asked["known"] = (*asked["known"], asked.pop("sweeps"))
    return prior.sample(n, gen=generator(seed), **asked)


def prior_log_z(prior, z_next, t, n, seed):
    return prior.log_z(z_next, t, n, generator(seed))


def prior_kl(prior, q, z, n, seed):
    return prior.kl(q, z, generator(seed), n)


def prior_traces(prior, n, copies, seed, n_steps):
    "`F` along chains; without a Metropolis test those of the top level, up to the last update but one"
    traces = ldebm.energy_traces(prior, n, copies, gen=generator(seed), n_steps=n_steps)
    return traces if prior.metropolis else traces[-1][:-1]


def symbol_logits(prior, z, t):
    return prior.symbol_logits(z, t)


def base_kl(prior, q):
    return prior.base_kl(q)


def clusters(means, k, previous=None, **how):
    return ldebm.cluster_targets(means, k, gen=generator(3), previous=previous, **how)


def released_epoch(labels):
    return ldebm.published_draw(labels, generator(4))


def resample_layers(prior, u, k, seed):
    return ldebm.resample_below(prior, u, k, gen=generator(seed))


def edit_latents(prior, u, y, level, keep, seed):
    return ldebm.edit(prior, u, y, level, keep=keep, gen=generator(seed))


def outlier_scores(prior, x, seed):
    return ldebm.ood_scores(prior, x, gen=generator(seed))


def grammar_batch(n):
    "Sentences of the embedded corpus, and its vocabulary"
    corpus = ldebm.load_corpus("grammar")
    return ldebm.get_batch(corpus.splits["train"], torch.arange(n)), corpus.vocab


def make_text_model(vocab, prior, **settings):
    cfg = ldebm.TextCfg(**{**dict(embed=8, hidden=8, d=D, init=0.3), **settings})
    return ldebm.TextModel(len(vocab), cfg, prior, bos=vocab.bos, eos=vocab.eos, gen=generator(5)).double()


def make_system(system, objective, vocab):
    "One system of the table as its job builds it, very small"
    sizes = "embed=8 hidden=8 batch=6"
    if system.startswith(("svebm", "ldebm")):
        sizes += " d=6 energy_hidden=8 n_blocks=2 langevin_steps=2 n_symbols=4"
    if system.startswith("ldebm"):
        sizes += " T=3"
    settings = text.resolve(
        ldebm.TextJob(corpus="grammar", preset="quick", objective=objective, system=system, settings=sizes)
    )
    return ldebm.build_model(settings, vocab, 0).double()


def decode_greedily(model, z, max_len):
    return model.decoder.generate(z, max_len=max_len)


def sample_text(model, n, seed, max_len):
    return ldebm.sample_sentences(model, n, gen=generator(seed), max_len=max_len)


def importance_nll(prior, q, log_lik, draws, seed):
    return ldebm.nll_importance(prior, q, log_lik, draws, gen=generator(seed))


def standard_normal(d):
    return ldebm.StandardNormal(d).double()


def released_nll(prior, q, log_lik, draws, chunk, seed):
    return ldebm.nll_ldebm(prior, q, log_lik, draws, chunk, generator(seed))


def annealed_log_z(prior, z_next, t, seed):
    work = ldebm.AISCfg(chains=2, least=4, most=8, long=3, pilot=16)
    return ldebm.log_z_bounds(prior, z_next, t, work, generator(seed))


def bounded_nll(prior, q, log_lik, seed):
    annealing = ldebm.AISCfg(chains=2, least=4, most=8, long=3, pilot=16)
    work = ldebm.NLLCfg(refine=20, draws=8, chains=2, most=8, paths=2, n_z=8, ais=annealing, top=32, fit=32, rich=4)
    return ldebm.nll_bounds(prior, q, log_lik, work, generator(seed))


# -- cases


PRIORS = {
    "consistent gaussian": dict(),
    "consistent gaussian unadjusted": dict(mala=False),
    "consistent gaussian drift": dict(drift=0.1),
    "consistent gaussian unadjusted drift": dict(mala=False, drift=0.1),
    "consistent gaussian temperature": dict(temperature=0.5, free_nats=0.1),
    "consistent gaussian all levels": dict(levels="all", free_nats=0.1, clamp=False),
    "consistent flat": dict(reference="flat"),
    "consistent flat all levels": dict(reference="flat", levels="all", mala=False),
    "consistent frozen": dict(encoder=False),
    "consistent plain energy": dict(symbols=1),
    "published flat": dict(objective="published", reference="flat", free_nats=0.02, squared_step=0.02),
    "published gaussian": dict(objective="published", reference="gaussian", squared_step=0.02),
    "published gaussian likelihood": dict(objective="published", weighting="likelihood", squared_step=0.02),
}


def small_prior(settings):
    kind = "published" if settings.get("objective") == "published" else "consistent"
    return make_prior(kind, n_steps=4, **settings)


def levels(n):
    return torch.arange(n) % LEVELS


def log_normal(residual):
    return -0.5 * (residual.square() + math.log(2 * math.pi)).sum(-1)


def posterior(n, d, seed, requires_grad=False):
    "A posterior, and a draw of it that carries the gradient"
    mean = normal(n, d, seed=seed).requires_grad_(requires_grad)
    log_variance = (0.3 * normal(n, d, seed=seed + 1) - 1).requires_grad_(requires_grad)
    q = make_posterior(mean, log_variance)
    return q, mean + (0.5 * log_variance).exp() * normal(n, d, seed=seed + 2)


def gradient_norms(terms, inputs) -> torch.Tensor:
    total = sum(x.sum() for x in terms.values() if x.requires_grad)
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return torch.stack([torch.zeros((), dtype=total.dtype) if g is None else g.norm() for g in grads])


def term_cases(settings) -> dict:
    prior = small_prior(settings)
    q, z = posterior(BATCH, D, seed=20, requires_grad=True)
    labels = None if settings.get("symbols") == 1 else torch.arange(BATCH) % SYMBOLS
    weights = None if labels is None else torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
    out = prior_terms(prior, q, z, 23, labels, weights)
    params = [p for p in prior.parameters() if p.requires_grad]
    norms = gradient_norms(out, [*params, z])
    return {**{f"terms {k}": v for k, v in out.items()}, "gradients": norms}


def sample_cases(settings) -> dict:
    prior = small_prior(settings)
    symbols = settings.get("symbols", SYMBOLS)
    mask = torch.arange(D) < 2
    known = (mask, normal(BATCH, D, seed=31))
    start = (normal(BATCH, D, seed=32), 2)
    return {
        "sample": prior_sample(prior, BATCH, 30),
        "sample path": prior_sample(prior, 2, 30, path=True),
        "sample symbol": prior_sample(prior, BATCH, 30, y=torch.arange(BATCH) % symbols),
        "sample known": prior_sample(prior, BATCH, 30, known=known, sweeps=2),
        "sample start": prior_sample(prior, BATCH, 30, start=start, n_steps=2),
    }


def density_cases(settings) -> dict:
    prior = small_prior(settings)
    q, z = posterior(BATCH, D, seed=40)
    t, z_next = levels(BATCH), normal(BATCH, D, seed=43)
    out = dict(zip(("mean", "variance"), level_conditional(prior, z_next, t)))
    out.update(zip(("log z", "log z draws"), prior_log_z(prior, z_next, t, 16, 44)))
    out["traces"] = prior_traces(prior, 3, 2, 45, 4)
    out["logits"] = symbol_logits(prior, z, 1)
    out["base kl"] = base_kl(prior, q)
    if settings.get("objective") != "published":
        out.update(zip(("kl", "kl draws"), prior_kl(prior, q, z, 16, 46)))
    return out


def chain_cases() -> dict:
    prior = make_prior("consistent")
    energy, t = frozen(prior.energy), levels(BATCH)
    z, mean, y = normal(BATCH, D, seed=50), normal(BATCH, D, seed=51), torch.arange(BATCH) % SYMBOLS
    variance = 0.2 + normal(BATCH, 1, seed=52).square()
    target, temperature = (energy, z, t, mean, variance), 0.7 + 0.1 * t[:, None].double()
    out = {}
    for name, asked in (("", None), (" symbol", y)):
        more = dict(y=asked)
        out[f"unadjusted{name}"] = unadjusted_chain(target, 6, 0.1 * variance, temperature, **more, gen=generator(53))
        out[f"preconditioned{name}"] = preconditioned_chain(target, 6, 0.8, temperature, **more, gen=generator(53))
        out[f"drift{name}"] = preconditioned_chain(target, 6, 0.8, 0.2, 0.3, **more, gen=generator(53))
        for kind, drift in (("metropolis", math.inf), ("truncated", 0.3)):
            ends = metropolis_chain(target, 6, 0.5, 0.2, drift, **more, gen=generator(53))
            out.update({f"{kind}{name} {k}": v for k, v in zip(("end", "acceptance"), ends)})
    value, slope = energy_and_slope(energy, z, t, y)
    walk = normal(40, 3, seed=54).cumsum(0)
    return {**out, "energy": value, "slope": slope, "statistics": chain_statistics(walk)}


def score_cases() -> dict:
    out = {}
    for name, settings in (
        ("v", dict()),
        ("eps", dict(predict="eps", schedule="linear")),
        ("few", dict(sample_steps=7, eta=0.5, variance="small", guidance=1.5)),
    ):
        prior = make_score_prior(**settings)
        q, z = posterior(BATCH, D, seed=60)
        labels = torch.arange(BATCH) % SYMBOLS
        weights = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
        terms = prior_terms(prior, q, z, 63, labels, weights)
        out.update({f"{name} {k}": v for k, v in terms.items()})
        out[f"{name} gradients"] = gradient_norms(terms, [p for p in prior.parameters() if p.requires_grad])
        out[f"{name} sample"] = prior_sample(prior, BATCH, 64, y=labels)
    return out


def layered_cases() -> dict:
    out = {}
    for shape, groups, settings in (
        ("vectors", (1,), dict()),
        ("maps", (3,), dict(mala=False)),
        ("mixed", (2, 3), dict()),
    ):
        prior = make_layered_prior(shape, groups, **settings)
        q, u = posterior(4, prior.d, seed=70, requires_grad=True)
        labels = torch.arange(4 * len(groups)).view(4, -1) % 2 if sum(groups) > 1 else None
        terms = prior_terms(prior, q, u, 73, labels)
        out.update({f"{shape} {k}": v for k, v in terms.items()})
        params = [p for p in prior.parameters() if p.requires_grad]
        out[f"{shape} gradients"] = gradient_norms(terms, [*params, u])
        asked = None if labels is None else labels
        out[f"{shape} sample"] = prior_sample(prior, 4, 74, y=asked)
        given = u.detach()
        out[f"{shape} below"] = resample_layers(prior, given, 1, 75)
        if asked is not None:
            out[f"{shape} edit"] = edit_latents(prior, given, asked, 2, (1,), 76)
        pictures = normal(4, 1, 8, 8, seed=77).sigmoid()
        out.update({f"{shape} scores {k}": v for k, v in outlier_scores(prior, pictures, 78).items()})
    return out


def generator_cases() -> dict:
    out = {}
    for shape, free_nats in (("vectors", ()), ("maps", (2.0, 0.5)), ("mixed", ())):
        tower = make_generator(shape)
        grey = torch.randint(17, (4, 1, 8, 8), generator=generator(80))
        terms = generator_loss(tower, free_nats, grey.double() / 16, 81)
        out.update({f"{shape} {k}": v for k, v in terms.items()})
        out[f"{shape} gradients"] = gradient_norms(terms, list(tower.parameters()))
        u = normal(4, tower.d, seed=82)
        out[f"{shape} decode"] = tower.decode(u)
        out[f"{shape} inverse"] = tower.inverse(tower.T(u))
        out[f"{shape} log det"] = tower.log_det(u)
    return out


def text_cases() -> dict:
    batch, vocab = grammar_batch(BATCH)
    prior = small_prior(dict(mala=False))
    model = make_text_model(vocab, prior, bow=True, dropout=0.2, word_dropout=0.2, draws=2)
    terms = model(batch, generator(90), torch.arange(BATCH) % SYMBOLS)
    out = {f"terms {k}": v for k, v in terms.items()}
    out["gradients"] = gradient_norms(terms, list(model.parameters()))
    model.eval()
    out["greedy"] = decode_greedily(model, 3 * normal(BATCH, D, seed=91), 8)
    out["sampled words"] = torch.tensor([i for s in sample_text(model, 5, 92, 8) for i in s])
    q = model.encode(batch)
    out["posterior mean"], out["posterior log variance"] = q.mean, q.logvar
    return out


def system_cases() -> dict:
    "All sixteen systems: terms of one batch, and gradients"
    batch, vocab = grammar_batch(BATCH)
    out = {}
    for system in SYSTEMS:
        for kind in ("consistent", "published"):
            model = make_system(system, kind, vocab)
            terms = model(batch, generator(100))
            out.update({f"{system} {kind} {k}": v for k, v in terms.items()})
            norms = gradient_norms(terms, [p for p in model.parameters() if p.requires_grad])
            out[f"{system} {kind} gradients"] = norms
    return out


SYSTEMS = (
    "rnn-lm ae vae dae dvae di-vae semi-vae semi-vae-i gm-vae gm-vae-i dgm-vae dgm-vae-i "
    "svebm svebm-ib ldebm-no-gc ldebm"
).split()


def likelihood_cases() -> dict:
    q, _ = posterior(BATCH, D, seed=110)
    map_, x = normal(7, D, seed=113), normal(BATCH, 7, seed=114)

    def log_lik(z, index):
        return log_normal(x[index] - z @ map_.T)

    consistent, published = (small_prior(PRIORS[k]) for k in ("consistent gaussian", "published flat"))
    parts = importance_nll(standard_normal(D), q, log_lik, 20, 115)
    out = {f"importance {k}": v for k, v in parts.items()}
    out["released"] = released_nll(published, q, log_lik, 20, 10, 116)
    for t in range(LEVELS):
        z_next = normal(BATCH if t < LEVELS - 1 else 1, D, seed=117)
        bounds = annealed_log_z(consistent, z_next, t, 118)
        out.update({f"log z {t} {k}": getattr(bounds, k) for k in ("lower", "upper", "ess", "accept", "steps")})
    parts = bounded_nll(consistent, q, log_lik, 119)
    return {**out, **{f"bounds {k}": v for k, v in parts.items()}}


def cluster_cases() -> dict:
    centres = 4 * normal(SYMBOLS, D, seed=120)
    means = torch.cat([centres + 0.3 * normal(SYMBOLS, D, seed=121 + i) for i in range(10)])
    labels = clusters(means, SYMBOLS)
    moved = means + 0.1 * normal(len(means), D, seed=140)
    return {
        "first": labels,
        "next": clusters(moved, SYMBOLS, previous=labels),
        "starts": clusters(moved, SYMBOLS, previous=labels, starts=torch.arange(SYMBOLS)),
        "epoch": released_epoch(labels),
    }


CASES = {
    "chains": chain_cases,
    "score prior": score_cases,
    "layered": layered_cases,
    "generator": generator_cases,
    "text": text_cases,
    "systems": system_cases,
    "likelihood": likelihood_cases,
    "clusters": cluster_cases,
}


def sections() -> dict[str, Callable[[], dict]]:
    "Name of each group of cases, and what computes it"
    parts = dict(terms=term_cases, samples=sample_cases, densities=density_cases)
    of_priors = {f"{name}, {k}": partial(f, settings) for name, settings in PRIORS.items() for k, f in parts.items()}
    return {**of_priors, **CASES}


# -- keeping and comparing


def digest(x) -> list[float]:
    "Few numbers as they are; of many their size, mean magnitude, norm and two weighted sums, which see the order"
    x = torch.as_tensor(x).detach().double().flatten()
    if len(x) > 24:
        i = torch.arange(len(x), dtype=torch.float64)
        sums = [x.abs().mean(), x.norm(), (x * i.cos()).sum(), (x * (0.7 * i).sin()).sum()]
        x = torch.stack([torch.tensor(len(x), dtype=torch.float64), *sums])
    return [float(f"{v:.10g}") for v in x.tolist()]


def computed() -> dict[str, dict[str, list[float]]]:
    return {name: {k: digest(v) for k, v in cases().items()} for name, cases in sections().items()}


def computable() -> tuple[dict, list[str]]:
    "What can be computed, and why the rest cannot: for a package that is being rewritten"
    values, failed = {}, []
    for name, cases in sections().items():
        try:
            values[name] = {k: digest(v) for k, v in cases().items()}
        except Exception as e:
            failed.append(f"{name}: {type(e).__name__}: {e}")
    return values, failed


def differs(a: list[float], b: list[float]) -> bool:
    "Beyond the tolerance, in units of the largest of the stored numbers `b`, or of the norm of a digest"
    if len(a) != len(b):
        return True
    size = max((abs(v) for v in b if math.isfinite(v)), default=0.0)
    if len(b) == 5 and b[0] > 24:
        size = b[2]
    near = (x == y or abs(x - y) <= TOLERANCE * max(size, TOLERANCE) for x, y in zip(a, b))
    return not all(near)


def differences(new: dict, stored: dict) -> list[str]:
    "Names of what is missing, new or different"
    out = [f"{name}: only {'stored' if name in stored else 'computed'}" for name in new.keys() ^ stored.keys()]
    for name in new.keys() & stored.keys():
        ours, theirs = new[name], stored[name]
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in ours or key not in theirs:
                out.append(f"{name}: {key}: only {'stored' if key in theirs else 'computed'}")
            elif differs(ours[key], theirs[key]):
                out.append(f"{name}: {key}: {ours[key][:4]} where {theirs[key][:4]} is stored")
    return sorted(out)


def written(values: dict) -> str:
    "One line a case"
    body = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in cases.items())
        + "\n }"
        for name, cases in values.items()
    ]
    return "{\n" + ",\n".join(body) + "\n}\n"


def main(*args: str) -> int:
    os.environ.update(PLAIN)  # before the package is imported
    torch.set_num_threads(1)
    if "--difference" not in args:
        sys.stdout.write(written(computed()))
        return 0
    values, failed = computable()
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    found = differences(values, {k: v for k, v in stored.items() if k in values or not failed})
    print(*failed, *found, f"{sum(map(len, values.values()))} values, {len(found)} differ", sep="\n")
    return bool(found or failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
