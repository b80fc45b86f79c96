"""What a chain, a training step, a sample cost, and how much of the machine they use.

    python bench/bench.py [--only matmul chain ...] [--threads 1 2] [--out results]

Writes `bench/<part>-<machine>.json` into the results folder as soon as a part is done. A part that fails is named at
the end, and the others are kept. One process, a fixed number of threads. Compared paths take turns in every round, and
bare products with them; the first rounds are dropped, and a time is the median over rounds with its quartiles.
Arithmetic is counted from sizes, matrix products alone, a multiply-add as two.
"""

import argparse
import functools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import checkout as checkout  # the package and the tests of this checkout

# isort: split

import torch
from chains import counted_calls
from plain import PlainEnergy, plain_paths
from torch.nn import functional as nnf

from ldebm import core, graphs, kernels, langevin, native, records, resident, whole_chains
from ldebm.closed_form import ClosedForm
from ldebm.core import atomic_write, check_writable, keep_memory, progress
from ldebm.corpora import load_corpus
from ldebm.energy import EnergyNet, Frozen, map_tensors
from ldebm.energy_task import fit_energies
from ldebm.grammar_corpus import load_grammar
from ldebm.langevin import Conditional
from ldebm.layers import WordReader
from ldebm.prior import DiffusionEBM
from ldebm.records import provenance, results_root
from ldebm.schedule import make_schedule
from ldebm.settings import check_params
from ldebm.text import Batch, Vocab
from ldebm.text_job import load_model, open_job
from ldebm.text_kernels import FastReader
from ldebm.text_metrics import grammar_scores, wkl, word_counts
from ldebm.text_settings import TextJob, TextSettings, prior_cfg, resolve, train_cfg
from ldebm.text_task import TextTask, build_model
from ldebm.text_vae import sample_sentences, strip
from ldebm.train import fit, make_optimizer
from ldebm.two_samples import two_sample_auroc
from ldebm.whole_chains import sizes_of

OBJECTIVES = ("published", "consistent")
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
TINY = "embed=16 hidden=16 d=4 energy_hidden=12 n_blocks=2 langevin_steps=3 T=3 n_symbols=4 batch=16"


def gen(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def machine_name(part):
    "In the name of a record: maker and instructions of the processor, or the GPU"
    if part == "gpu":
        return slug(torch.cuda.get_device_name())
    maker = dict(AuthenticAMD="amd", GenuineIntel="intel").get(kernels.cpu_vendor()) or slug(platform.machine())
    narrow = "-narrow" if kernels.has_avx512() and not kernels.has_wide_units() else ""
    return f"{maker}-{slug(torch.backends.cpu.get_cpu_capability())}{narrow}"


# -- counting: matrix products alone, 2 n i o for (n, i) times (i, o)


def flop_energy(B, d, H, N, K, backward=True, plain=False, T=0):
    """`F` of B latents, and its gradient in them

    Layers: d to H, H to H, the latent's share of the merge layer, N blocks, K logits; the gradient goes back through
    the same. The plain path embeds the level at every call (two layers and their share of the merge) and sends a
    gradient to that share too"""
    once = 2 * B * (d * H + H * H * (2 + N) + H * K)
    return once * (1 + backward) + plain * 2 * B * H * H * (3 + backward)


def flop_energy_step(B, n, s, objective, plain=False):
    """Energy in one training step, chains apart, forward and back

    n positives, n negatives and B clean latents; back to weights and inputs is twice the forward. With a share of the
    energy's gradient in the encoder once more, back to the latents alone: positives (`published`), or both
    (`consistent`). The levels' share, T rows, is below a thousandth and left out, except on the plain path, which has
    it for every row"""
    H, N, K = s.energy_hidden, s.n_blocks, s.n_symbols
    rows, again = 2 * n + B * (K > 1), n * (1 + (objective == "consistent")) * (s.enc_share > 0)
    forward, both = flop_energy(1, s.d, H, N, K, False, plain), flop_energy(1, s.d, H, N, K, True, plain)
    t1 = 2 * H * H * plain  # nothing needs the gradient of the level's embedding
    return (rows + again) * forward, rows * (2 * forward - t1) + again * (both - forward)


def flop_norms(s):
    """Spectral norms of one training step where power iterations are squared

    `W W'` of each layer, its powers, and their products with a vector. Few iterations are no matrix products"""
    n, H, K, G = chain_prior(s).power_iterations - 1, s.energy_hidden, s.n_symbols, 5 + s.n_blocks
    if n < graphs.MANY:
        return 0

    def powers(o):
        return 2 * o**3 * (n.bit_length() - 1) + 2 * o * o * n.bit_count()

    return 2 * H * H * (s.d + H * G) + 2 * K * K * H + G * powers(H) + powers(K)


def flop_encoder(words, B, s):
    "Two directions, three gates, input and state; mean and log variance. Forward"
    return 2 * words * 2 * 3 * s.hidden * (s.embed + s.hidden) + 2 * B * 2 * (2 * s.hidden * s.d)


def flop_decoder(words, B, V, s, plain=False):
    """Three gates, and the logits of every word; the latent's share of the gates, the first state, the bag of words

    Forward. The share of the gates is once a sentence, on the plain path once a word"""
    bow = 2 * B * s.d * V if s.w_bow > 0 else 0
    return (
        2 * words * (3 * s.hidden * (s.embed + s.hidden) + s.hidden * V)
        + 2 * (words if plain else B) * s.d * 3 * s.hidden
        + 2 * B * s.d * s.hidden
        + bow
    )


def evaluations(s):
    return s.langevin_steps + s.mala  # of the energy's gradient, each level


def flop_step(B, read, words, V, s, objective, plain=False):
    """One optimiser step by part; backward is twice the forward

    `read`: words the encoder runs over; `words`: words the decoder predicts"""
    n = 2 * B if s.reference == "flat" and objective == "published" and s.T > 1 else B
    enc, dec = flop_encoder(read, B, s), flop_decoder(words, B, V, s, plain)
    energy, back = flop_energy_step(B, n, s, objective, plain)
    if not plain:  # there iterations are products with vectors
        energy += flop_norms(s)
    return dict(
        encoder=enc,
        decoder=dec,
        chains=evaluations(s) * flop_energy(n, s.d, s.energy_hidden, s.n_blocks, s.n_symbols, plain=plain),
        energy=energy,
        backward=back + 2 * (enc + dec),
    )


def flop_generate(n, words, V, s, plain=False):
    """Chains on every level, then one word after the other

    What the latent brings to the gates once a sentence, on the plain path once a word"""
    word = 2 * (3 * s.hidden * (s.embed + s.hidden) + s.hidden * V)
    latent = 2 * s.d * s.hidden * (n + 3 * (words if plain else n))
    gradient = flop_energy(n, s.d, s.energy_hidden, s.n_blocks, s.n_symbols, plain=plain)
    return words * word + latent + s.T * evaluations(s) * gradient


# -- timing


@contextmanager
def threads(n):
    old = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(old)


def once(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def interleave(paths, repeats, warm=1, beside=None, before=None):
    """Seconds of each round of each path, the paths taking turns

    `before` is called ahead of each path, and `beside` at the end of every round that counts"""
    out = {k: [] for k in paths}
    for i in range(warm + repeats):
        for k, f in paths.items():
            if before:
                before()
            s = once(f)
            if i >= warm:
                out[k].append(s)
        if beside and i >= warm:
            beside()
    return out


def spread(x):
    "Median and quartiles"
    x = sorted(x)
    q = statistics.quantiles(x, n=4, method="inclusive") if len(x) > 1 else x * 3
    return dict(median=statistics.median(x), q1=q[0], q3=q[2], rounds=len(x))


def products(shape, precision, device="cpu"):
    "The same product by each library"
    n, i, o = shape
    x, w = (
        torch.randn(a, b, generator=gen(k)).to(device, DTYPES[precision]) for k, (a, b) in enumerate(((n, i), (o, i)))
    )
    if device != "cpu":
        return dict(cuda=lambda: nnf.linear(x, w))
    out = dict(blas=lambda: nnf.linear(x, w)) if precision == "fp32" else dict(onednn=lambda: nnf.linear(x, w))
    if precision == "fp32" and kernels.has_onednn():
        out["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return out


def waited(f, device):
    "The same, to the end of what it started on a GPU"
    if torch.device(device).type != "cuda":
        return f

    def go(*args):
        out = f(*args)
        torch.cuda.synchronize()
        return out

    return go


def product_seconds(shape, precision, budget, rounds=5, device="cpu"):
    "Seconds of one product by each library at the present number of threads; a round repeats it for `budget` seconds"
    fs = products(shape, precision, device)
    for f in fs.values():
        f()
    inner = max(1, int(budget / max(once(waited(f, device)) for f in fs.values())))

    def many(f):
        def go():
            for _ in range(inner):
                f()

        return waited(go, device)  # on a GPU to the end of all, as a path is timed: not to the end of each

    return {k: [s / inner for s in v] for k, v in interleave({k: many(f) for k, f in fs.items()}, rounds, 0).items()}


SECONDS = {}  # (shape, precision, threads, device) -> library -> seconds of a product
BESIDE = 5  # Rounds of a product, if none were measured beside the paths


def measure_products(opt, shapes, precisions, rounds=1):
    """One more round of bare products at the present number of threads

    Between rounds of the paths that they are compared with: a machine's speed drifts"""
    for shape in {tuple(x) for x in (*shapes, opt.square)}:
        for p in precisions:
            mine = SECONDS.setdefault((shape, p, torch.get_num_threads(), opt.device), {})
            for k, v in product_seconds(shape, p, opt.budget, rounds, opt.device).items():
                mine.setdefault(k, []).extend(v)


def machine_rates(opt, shape, precision, n_threads):
    "Operations a second of each library on this shape"
    key = (tuple(shape), precision, n_threads, opt.device)
    if key not in SECONDS:
        with threads(n_threads):
            measure_products(opt, (shape,), (precision,), BESIDE)
    return {k: 2 * math.prod(shape) / statistics.median(v) for k, v in SECONDS[key].items()}


def entry(opt, what, path, n_threads, precision, sizes, seconds, flop, shape=None, **more):
    "One measured path, beside what the machine multiplies in the same process"
    s = spread(seconds)
    e = dict(
        what=what,
        path=path,
        threads=n_threads,
        precision=precision,
        sizes=sizes,
        seconds=s,
        flop=flop,
        rate=flop / s["median"],
        **more,
    )
    if shape:
        own = max(machine_rates(opt, shape, precision, n_threads).values())
        squares = machine_rates(opt, opt.square, precision, n_threads)
        square, usual = max(squares.values()), squares[usual_library(opt, precision)]
        e.update(
            shape=list(shape),
            rate_shape=own,
            rate_square=square,
            share=e["rate"] / max(own, square),
            rate_torch=usual,
            share_torch=e["rate"] / usual,
        )
    return e


def usual_library(opt, precision):
    "The one that PyTorch itself takes"
    if opt.device != "cpu":
        return "cuda"
    return "blas" if precision == "fp32" else "onednn"


NO_BF16 = "this processor does not multiply in bf16"


def pending(what, path, why, **more):
    return dict(what=what, path=path, pending=why, **more)


# -- parts


def bench_matmul(opt):
    "Products of the sizes that the model has, by each library"
    shapes = ((128, 200, 200), (256, 200, 200), (128, 1536, 512), (2048, 512, 10001), (1024, 1024, 1024))
    if opt.tiny:
        shapes = ((8, 12, 12), (16, 16, 8))
    out = []
    for n in opt.threads:
        with threads(n):
            for shape in shapes:
                for precision in opt.precisions:
                    for k, secs in product_seconds(shape, precision, opt.budget).items():
                        out.append(
                            entry(opt, "matmul", k, n, precision, dict(zip("nio", shape)), secs, 2 * math.prod(shape))
                        )
    return out


def job(objective, opt, **kw):
    return resolve(
        TextJob(
            corpus="grammar" if opt.tiny else "ptb",
            preset="quick" if opt.tiny else "paper",
            objective=objective,
            settings=TINY if opt.tiny else "",
            **kw,
        )
    )


def chain_prior(s):
    net = EnergyNet(
        s.d, s.n_symbols, s.T, s.energy_hidden, s.n_blocks, free_head=s.free_head, init=s.energy_init or None, gen=gen()
    )
    return DiffusionEBM(make_schedule(s.schedule, s.T), net, prior_cfg(s))


def using(lib):
    return patch.object(kernels, "matmul_backend", lambda: lib)


def chain_ends(prior, z, t, g, energy=None):
    "Where one chain for each latent ends; `energy`: what its gradient is asked of"
    return prior.conditional(z, t, energy=energy).sample(gen=g)[0]


def no_native(prior, z, precision):
    "What keeps chains from running as compiled code"
    return native.why_not(sizes_of(Frozen(prior.energy)), z, torch.bfloat16 if precision == "bf16" else None)


class Compiled:
    "The closed form by `torch.compile`, which chooses its own library, and cannot trace the call of oneDNN"

    def __init__(self, frozen, compiled):
        self.grad = compiled(ClosedForm(frozen).grad)


def chain_paths(prior, z, t, compiled=None, half=True):
    "Each way of running the same chains: name -> (precision, function of a generator)"
    net = prior.energy

    def run(energy, z, lib="blas", whole=False):  # `whole`: all updates as compiled code
        def go(g=None):
            with (
                using(lib),
                patch.dict(os.environ, LDEBM_RESIDENT=str(int(whole))),
                counted_calls((whole_chains, "run_chains")) as calls,
            ):
                end = chain_ends(prior, z, t, gen() if g is None else g, energy)
            if len(calls) != whole:
                raise RuntimeError(f"{'no' if whole else 'a'} chain was compiled code")
            return end

        return go

    def closed(dtype=torch.float32):
        return Frozen(
            net, map_tensors(lambda x: x.to(dtype), net.weights())
        )  # one a library: it lays out its weights for the first that multiplies

    fast, mixed = closed(), Frozen(net, precision=torch.bfloat16)
    out = dict(plain=("fp32", run(PlainEnergy(net), z)), blas=("fp32", run(fast, z)))
    if kernels.has_onednn():
        out["onednn"] = ("fp32", run(closed(), z, "onednn"))
    if half:
        out["mixed"] = ("bf16", run(mixed, z))
        out["bf16"] = ("bf16", run(closed(torch.bfloat16), z.bfloat16()))
    for name, precision, energy in (("native", "fp32", fast), ("native_bf16", "bf16", mixed)):
        if (half or precision == "fp32") and not no_native(prior, z, precision):
            out[name] = (precision, run(energy, z, whole=True))
    if compiled is not None:
        out["compile"] = ("fp32", run(Compiled(closed(), compiled), z))
    return out


@contextmanager
def same_noise():
    "Chains draw the same noise in every precision"

    def rounded(x, g):
        return torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)

    with patch.object(langevin, "randn_like", rounded), patch.object(whole_chains, "randn_like", rounded):
        yield


def bench_chain(opt):
    """Chains of the published sampler, each on a level of its own

    `end_difference` is the distance of the end from that of the closed form in double precision with the same noise,
    relative to how far chains move"""
    s = job("published", opt)
    B = 16 if opt.tiny else 128
    shape = (B, s.energy_hidden, s.energy_hidden)
    prior = chain_prior(s)
    z, t = torch.randn(B, s.d, generator=gen(1)), torch.arange(B) % s.T
    out = []

    twice = chain_prior(s).double()
    with same_noise():
        end = chain_ends(twice, z.double(), t, gen(2))
    moved = (end - z.double()).norm()
    sizes = dict(
        batch=B,
        d=s.d,
        hidden=s.energy_hidden,
        blocks=s.n_blocks,
        symbols=s.n_symbols,
        steps=s.langevin_steps,
        levels=s.T,
    )
    compiled = torch.compile if opt.compile and native.compiler_version() else None
    for n in opt.threads:
        with threads(n):
            if compiled:
                torch._dynamo.reset()
            paths = chain_paths(prior, z, t, compiled, "bf16" in opt.precisions)
            if compiled:
                start = once(paths["compile"][1])
            runs = {k: f for k, (_, f) in paths.items()}
            secs = interleave(runs, opt.rounds(15), 2, lambda: measure_products(opt, (shape,), opt.precisions))
            far = {}
            for k, (_, f) in paths.items():
                with same_noise():
                    far[k] = ((f(gen(2)).double() - end).norm() / moved).item()
        for k, (precision, _) in paths.items():
            flop = s.langevin_steps * flop_energy(B, s.d, s.energy_hidden, s.n_blocks, s.n_symbols, plain=k == "plain")
            more = dict(compile_seconds=start) if k == "compile" else {}
            out.append(entry(opt, "chain", k, n, precision, sizes, secs[k], flop, shape, end_difference=far[k], **more))
        if compiled is None:
            why = "no C++ compiler" if opt.compile else "not asked for (--compile)"
            out.append(pending("chain", "compile", why, threads=n))
        if "bf16" not in opt.precisions:
            out += [pending("chain", k, NO_BF16, threads=n) for k in ("mixed", "bf16", "native_bf16")]
        out += [
            pending("chain", k, why, threads=n)
            for k, p in (("native", "fp32"), ("native_bf16", "bf16"))
            if p in opt.precisions and (why := no_native(prior, z, p))
        ]
    return out


class Clock:
    "Seconds by part; a part inside another is taken off it"

    def __init__(self):
        self.stack, self.spent, self.since = ["other"], {}, time.perf_counter()

    def turn(self):
        now = time.perf_counter()
        self.spent[self.stack[-1]] = self.spent.get(self.stack[-1], 0.0) + now - self.since
        self.since = now

    @contextmanager
    def part(self, name):
        self.turn()
        self.stack.append(name)
        try:
            yield
        finally:
            self.turn()
            self.stack.pop()

    def timed(self, name, f):
        def go(*args, **kw):
            with self.part(name):
                return f(*args, **kw)

        return go


PARTS_OF_STEP = ("encoder", "decoder", "chains", "energy", "backward", "optimiser", "other")


class Stepper:
    "Training steps on fixed batches with a clock around each part; every term of the end of training is on"

    def __init__(self, s, objective, model, weights):
        self.s, self.model, self.weights, self.opt = s, model.train(), weights, make_optimizer(model, train_cfg(s))

    def step(self, batch, labels, label_weights, precision="fp32", gen=None):
        m, clock = self.model, Clock()
        auto = torch.autocast(batch.ids.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
        prior = m.prior
        with (
            patch.object(m.encoder, "forward", clock.timed("encoder", m.encoder.forward)),
            patch.object(m.decoder, "nll", clock.timed("decoder", m.decoder.nll)),
            patch.object(prior, "terms", clock.timed("energy", prior.terms)),
            patch.object(Conditional, "sample", clock.timed("chains", Conditional.sample)),
        ):
            with clock.part("energy"):
                m.before_step()
            with auto:
                terms = m(batch, gen, labels=labels, label_weights=label_weights)
        loss = sum(w * terms[k].float().mean() for k, w in self.weights.items() if w != 0)
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimiser"):
            for g in self.opt.param_groups:
                torch.nn.utils.clip_grad_norm_(g["params"], g["clip"])
            self.opt.step()
            self.opt.zero_grad()
        clock.turn()
        return clock.spent


def all_terms(task):
    "Weights of the end of training, clustering included"
    return task.weights(task.settings.steps - 1, task.settings.steps)


def fixed_batches(task, n):
    "Batches spread over the lengths that training meets, from the middle of each of `n` equal parts"
    found = [b for b, _ in task.batches(None, gen(3))]
    found.sort(key=lambda b: int(b.lengths.sum()))
    return [found[(2 * k + 1) * len(found) // (2 * n)] for k in range(n)]


def labels_of(s, objective, device="cpu"):
    "Labels and label weights of a step, as training has them once clusters are there"
    labels = (torch.arange(s.batch) % s.n_symbols).to(device)
    return labels, torch.ones(s.n_symbols, device=device) if objective == "consistent" else None


def words_in(batches, s):
    "Words that the decoder predicts, and those that the encoder runs over, padding included where it does"
    words = [int((b.lengths - 1).sum()) for b in batches]
    return words, [int(b.lengths.sum()) if s.packed else b.ids.numel() for b in batches]


def bench_step(opt):
    """One optimiser step, averaged over batches spread over the lengths of the corpus

    Under `published` all batches are padded and the encoder runs over padding, which its arithmetic counts; the decoder
    predicts real words alone on both paths"""
    corpus = load_corpus("grammar" if opt.tiny else "ptb", max_len=24 if opt.tiny else 40)
    tasks = {objective: TextTask(corpus, job(objective, opt), 0) for objective in OBJECTIVES}
    return [e for objective, task in tasks.items() for n in opt.threads for e in step_entries(opt, task, objective, n)]


def step_runner(task, objective, batches, start, path, precision):
    "Steps on batches from the weights `start`: seconds of each part, in the mean"
    labels, label_weights = labels_of(task.settings, objective)

    def go(batches=batches):
        task.model.load_state_dict(start)
        with plain_paths() if path == "plain" else nullcontext():
            stepper = Stepper(task.settings, objective, task.model, all_terms(task))
            spent = [stepper.step(b, labels, label_weights, precision, gen(4)) for b in batches]
        return {k: sum(o.get(k, 0.0) for o in spent) / len(spent) for k in PARTS_OF_STEP}

    return go


def step_rounds(opt, runners, batches, shape, what):
    "What each runner took in each round, taking turns"
    got = {k: [] for k in runners}
    for i in progress(range(1 + opt.rounds(3)), desc=what, unit="round"):
        for k, f in runners.items():
            if i:
                got[k].append(f())
            else:
                f(batches[-1:])  # warm-up, on the longest
        if i:
            measure_products(opt, (shape,), opt.precisions)
    return got


def step_entries(opt, task, objective, n):
    "Entries of one objective with `n` threads"
    s, V = task.settings, len(task.corpus.vocab)
    batches = fixed_batches(task, 1 if opt.tiny else 3)
    start = {k: v.clone() for k, v in task.model.state_dict().items()}
    words, read = words_in(batches, s)
    sizes = {k: getattr(s, k) for k in ("batch", "embed", "hidden", "d", "langevin_steps")}
    sizes.update(words=words, read=read, vocabulary=V, levels=s.T)
    shape = (opt.loss_rows, s.hidden, V)
    ways = [(path, precision) for precision in opt.precisions for path in ("plain", "fast")]
    runners = {way: step_runner(task, objective, batches, start, *way) for way in ways}
    with threads(n):
        got = step_rounds(opt, runners, batches, shape, f"step, {objective}, {n} thread{'s' * (n > 1)}")
    out = []
    for (path, precision), v in got.items():
        flops = [flop_step(s.batch, r, w, V, s, objective, path == "plain") for r, w in zip(read, words)]
        by_part = {k: sum(f[k] for f in flops) / len(flops) for k in flops[0]}
        split = {k: statistics.median(o[k] for o in v) for k in PARTS_OF_STEP}
        more = dict(objective=objective, split=split, flop_split=by_part)
        seconds, flop = [sum(o.values()) for o in v], sum(by_part.values())
        out.append(entry(opt, "step", path, n, precision, sizes, seconds, flop, shape, **more))
    task.model.load_state_dict(start)
    return out


@contextmanager
def counted_words():
    "Words that the decoder computes: up to three after the end of a sentence are among them"
    words = []

    def counting(read):
        def go(reader, word, h, constant):
            words.append(len(word))
            return read(reader, word, h, constant)

        return go

    with ExitStack() as stack:
        for kind in (WordReader, FastReader):
            stack.enter_context(patch.object(kind, "__call__", counting(kind.__call__)))
        yield words


def bench_generate(opt):
    """Sentences from a model with its initial weights

    Such a model hardly ever ends a sentence, so nearly each takes all the words it may: the worst case"""
    words = ["<pad>", "<unk>", "<s>", "</s>", *map(str, range(9997))]
    vocab = load_corpus("grammar", max_len=24).vocab if opt.tiny else Vocab(words)
    out = []
    for objective in OBJECTIVES:
        s = job(objective, opt)
        model = build_model(s, vocab, 0).eval()
        out += [*few_sentences(opt, model, s, objective), *many_sentences(opt, model, s, objective)]
    return out


def generate(model, s, n, path, precision, bar=None):
    "Words that generating `n` sentences computes"
    with (
        plain_paths() if path == "plain" else nullcontext(),
        counted_words() as words,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        sample_sentences(model, n, gen=gen(5), max_len=s.max_len, progress=bar)
    return sum(words)


def few_sentences(opt, model, s, objective):
    "Entries of each path, the paths taking turns"
    few = 8 if opt.tiny else 100
    shape = (few, s.hidden, model.n_words)
    ways = [("plain", "fp32"), *(("fast", q) for q in opt.precisions)]
    words, out = {}, []

    def runner(way):
        return lambda: words.update({way: generate(model, s, few, *way)})

    for n in opt.threads:
        with threads(n):
            beside = functools.partial(measure_products, opt, (shape,), opt.precisions)
            secs = interleave({way: runner(way) for way in ways}, opt.rounds(5), beside=beside)
        out += [generated(opt, objective, way, n, few, words[way], v, s, model.n_words) for way, v in secs.items()]
    return out


def many_sentences(opt, model, s, objective):
    "One entry of each precision, generated once"
    n, many = max(opt.threads), 40 if opt.tiny else 46_000
    if opt.skip_long:
        more = dict(objective=objective, threads=n, sizes=dict(sentences=many))
        return [pending("generate", "fast", "left out (--skip-long)", **more)]
    out = []
    for precision in opt.precisions:
        bar = functools.partial(progress, desc=f"generating, {objective}, {precision}", unit="chunk")
        with threads(n):
            start = time.perf_counter()
            words = generate(model, s, many, "fast", precision, bar)
            seconds = [time.perf_counter() - start]
        out.append(generated(opt, objective, ("fast", precision), n, many, words, seconds, s, model.n_words))
    return out


def generated(opt, objective, way, n_threads, n, words, seconds, s, V):
    "An entry; `way`: path and precision"
    path, precision = way
    e = entry(
        opt,
        "generate",
        path,
        n_threads,
        precision,
        dict(sentences=n, words=words, max_len=s.max_len),
        seconds,
        flop_generate(n, words, V, s, path == "plain"),
        (min(n, 256), s.hidden, V),
        objective=objective,
    )
    return {**e, "seconds_per_million_words": e["seconds"]["median"] / words * 1e6}


def made_batch(B, length, V):
    "Random sentences of one length"
    ids = torch.randint(4, V, (B, length), generator=gen(6))
    ids[:, 0], ids[:, -1] = 2, 3
    return Batch(ids, torch.full((B,), length), {}, torch.arange(B))


def slope(xs, ys):
    "Exponent of the power law fitted to both logarithms"
    x, y = [math.log(v) for v in xs], [math.log(v) for v in ys]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def bench_growth(opt):
    """Time against one size at a time, from the published ones with a batch of 32 sentences, on one thread

    `slope` is the exponent of the power law fitted"""
    V, out = 40 if opt.tiny else 10_001, []
    vocab = Vocab(["<pad>", "<unk>", "<s>", "</s>", *map(str, range(V - 4))])

    def chain(**kw):
        s = resolve(
            TextJob(
                corpus="ptb",
                preset="paper",
                settings=" ".join(
                    f"{k}={v}"
                    for k, v in {
                        **(dict(energy_hidden=12, n_blocks=2, langevin_steps=3) if opt.tiny else {}),
                        **kw,
                    }.items()
                    if k != "rows"
                ),
            )
        )
        prior, B = chain_prior(s), kw.get("rows", 128)
        if "T" in kw:
            return (
                lambda: prior.sample(B, gen=gen()),
                s.T * evaluations(s) * flop_energy(B, s.d, s.energy_hidden, s.n_blocks, s.n_symbols),
                (B, s.energy_hidden, s.energy_hidden),
            )
        z, t = torch.randn(B, s.d, generator=gen(1)), torch.arange(B) % s.T
        return (
            lambda: chain_ends(prior, z, t, gen()),
            evaluations(s) * flop_energy(B, s.d, s.energy_hidden, s.n_blocks, s.n_symbols),
            (B, s.energy_hidden, s.energy_hidden),
        )

    def step(**kw):
        own = {**(dict(embed=16, hidden=16, energy_hidden=12, n_blocks=2, langevin_steps=3) if opt.tiny else {}), **kw}
        if "hidden" in kw:
            own["embed"] = kw["hidden"]
        s = resolve(
            TextJob(
                corpus="ptb",
                preset="paper",
                settings=" ".join(f"{k}={v}" for k, v in {"batch": 32, **own}.items() if k != "length"),
            )
        )
        B, length = s.batch, kw.get("length", 21)
        b, model = made_batch(B, length + 1, V), build_model(s, vocab, 0)
        weights = dict(nll=1.0, kl=1.0, ebm=s.w_ebm, bow=s.w_bow, mi=-s.w_mi, cls=s.w_cls, sym=s.w_sym)
        st, labels, lw = (
            Stepper(s, "consistent", model, weights),
            torch.arange(B) % s.n_symbols,
            torch.ones(s.n_symbols),
        )
        return (
            lambda: st.step(b, labels, lw, gen=gen(4)),
            sum(flop_step(B, B * (length + 1), B * length, V, s, "consistent").values()),
            (min(opt.loss_rows, B * length), s.hidden, V),
        )

    t = opt.tiny
    axes = [
        ("chain", chain, "rows", (4, 8) if t else (32, 64, 128, 256, 512)),
        ("chain", chain, "langevin_steps", (2, 4) if t else (10, 20, 40, 80)),
        ("chain", chain, "energy_hidden", (8, 16) if t else (50, 100, 200, 400)),
        ("chain", chain, "T", (2, 3) if t else (2, 4, 8, 16)),
        ("step", step, "batch", (4, 8) if t else (16, 32, 64, 128)),
        ("step", step, "length", (4, 8) if t else (5, 10, 20, 39)),
        ("step", step, "hidden", (8, 16) if t else (64, 128, 256, 512)),
        ("step", step, "langevin_steps", (2, 4) if t else (5, 10, 20, 40, 80)),
        ("step", step, "T", (2, 3) if t else (2, 4, 8, 16)),
    ]
    n = min(opt.threads)
    for what, make, axis, values in progress(axes, desc="growth", unit="axis"):
        with threads(n):
            made = {v: make(**{axis: v}) for v in values}
            secs = interleave({v: f for v, (f, _, _) in made.items()}, opt.rounds(3))
            es = [
                entry(opt, what, "fast", n, "fp32", {axis: v}, secs[v], made[v][1], made[v][2], axis=axis, value=v)
                for v in values
            ]
        a, f = slope(values, [e["seconds"]["median"] for e in es]), slope(values, [e["flop"] for e in es])
        out += [{**e, "slope": a, "slope_flop": f} for e in es]
    return out


PRESET_RUNS = (("quick", "grammar"), ("small", "ptb"), ("paper", "ptb"))


def peak_mb():
    "Largest resident memory of this process since it was started, or None where the system does not say"
    p = Path("/proc/self/status")  # not `ru_maxrss`, which on Linux begins with what the parent process held
    found = re.search(r"VmHWM:\s*(\d+) kB", p.read_text()) if p.exists() else None
    return int(found[1]) / 1024 if found else provenance(None)["peak_memory_mb"]


def memory_child(preset, corpus, objective, steps, n_threads, settings):
    "In a process of its own: a few training steps; largest resident memory after importing, loading and training"
    torch.set_num_threads(n_threads)
    keep_memory()  # as every job does
    out = dict(imported=peak_mb())
    s = resolve(TextJob(corpus=corpus, preset=preset, objective=objective, settings=settings))
    task = TextTask(load_corpus(corpus, max_len=s.max_len, vocab_size=s.vocab_size), s, 0)
    out["loaded"] = peak_mb()
    st, labels, lw = (
        Stepper(s, objective, task.model, all_terms(task)),
        torch.arange(s.batch) % s.n_symbols,
        torch.ones(s.n_symbols) if objective == "consistent" else None,
    )
    longest = fixed_batches(task, 50)[-1] if len(task.corpus["train"]) >= 50 * s.batch else fixed_batches(task, 1)[0]
    secs = [once(lambda: st.step(longest, labels, lw, gen=gen(4))) for _ in range(steps)]
    out.update(trained=peak_mb(), seconds=secs, parameters=sum(p.numel() for p in task.model.parameters()))
    print(json.dumps(out))


def bench_memory(opt):
    "Peak resident memory of a few training steps on long sentences, each in a process of its own"
    out, n = [], max(opt.threads)
    for preset, corpus in PRESET_RUNS[:1] if opt.tiny else PRESET_RUNS:
        for objective in OBJECTIVES[:1] if opt.tiny else OBJECTIVES:
            cmd = [
                sys.executable,
                __file__,
                "--memory-child",
                preset,
                corpus,
                objective,
                "2" if opt.tiny else "4",
                str(n),
                TINY if opt.tiny else "",
            ]
            res = subprocess.run(cmd, capture_output=True, text=True, env={**os.environ, "IN_TEST": "1"})
            if res.returncode:
                raise RuntimeError(f"{preset}, {objective}: {res.stderr[-2000:]}")
            got = json.loads(res.stdout.splitlines()[-1])
            out.append(
                dict(
                    what="memory",
                    path="fast",
                    threads=n,
                    precision="fp32",
                    preset=preset,
                    corpus=corpus,
                    objective=objective,
                    sizes=dict(steps=len(got["seconds"]), parameters=got["parameters"]),
                    seconds=spread(got["seconds"][1:]),
                    peak_mb=got["trained"],
                    loaded_mb=got["loaded"],
                    imported_mb=got["imported"],
                )
            )
    return out


def trained(opt, folder):
    "The task whose prior is sampled: that of the finished run `--run`, or a model trained here on the embedded corpus"
    if opt.run:
        c = json.loads((Path(opt.run) / "config.json").read_text())
        s = check_params(TextSettings, c["settings"])
        if s.prior != "ebm":
            raise ValueError(f"--run {opt.run}: its prior is {s.prior!r}, without chains whose updates could be fewer")
        task = TextTask(load_corpus(c["corpus"], max_len=s.max_len, vocab_size=s.vocab_size), s, 0)
        task.model, vocab = load_model(opt.run)
        if task.corpus.vocab.itos != vocab.itos:
            raise ValueError(
                f"--run {opt.run}: the corpus {c['corpus']!r} found here has other words than the one it was trained on"
            )
        return task
    run, task, device = open_job(
        TextJob(
            out=folder, device="cpu", threads=max(opt.threads), **(dict(settings=TINY, steps=4) if opt.tiny else {})
        )
    )
    fit(task, run, train_cfg(task.settings), 0, device)
    fit_energies(task, run, 0, device)
    return task


def repeated(f, n):
    "What the last of `n` calls gave, and the seconds of each"
    found, seconds = [], []
    for _ in range(n):
        seconds.append(once(lambda: found.append(f())))
    return found[-1], seconds


class Quality:
    "Samples of a trained prior with some number of updates a level, and the sentences that they become"

    def __init__(self, opt, task):
        self.opt, self.task, self.count = opt, task, 100 if opt.tiny else 2000
        self.model, self.grammar = task.model.eval(), load_grammar() if task.corpus.name == "grammar" else None
        self.words_of = word_counts(task.corpus["train"].sentences())
        q, g = task.encode("train"), gen(1)
        self.encodings = q[torch.randperm(len(q), generator=g)[: self.count]].rsample(g)
        own = task.settings.langevin_steps
        self.updates = sorted({0, own} if opt.tiny else {0, 1, 2, 5, 10, 20, 40, own, 4 * own})
        self.far = self.sample(self.updates[-1], 7)

    def sample(self, updates, seed):
        return self.model.prior.sample(self.count, gen=gen(seed), n_steps=updates)

    def decode(self, u, half=False):
        vocab = self.task.corpus.vocab
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            ids = self.model.decoder.generate(u, max_len=self.task.settings.max_len)
        return [vocab.decode(o) for o in strip(ids, vocab.eos)]

    def grammatical(self, words):
        return grammar_scores(words, self.grammar.log_prob)["grammatical"]

    def of_sentences(self, u, own):
        "Scores of the sentences; for the settings' own number of updates also of those decoded in half precision"
        words = self.decode(u)
        out = dict(grammatical=self.grammatical(words)) if self.grammar else {}
        if own and "bf16" in self.opt.precisions:
            half = self.decode(u, True)
            out["same_half"] = sum(a == b for a, b in zip(words, half)) / self.count
            if self.grammar:
                out["grammatical_half"] = self.grammatical(half)
        return dict(wkl=wkl(words, self.words_of, gen=gen(6)), **out)

    def entry(self, updates, n):
        s = self.task.settings
        u, seconds = repeated(functools.partial(self.sample, updates, 2), self.opt.rounds(3))
        gradient = flop_energy(self.count, s.d, s.energy_hidden, s.n_blocks, s.n_symbols)
        return dict(
            what="quality",
            path="fast",
            threads=n,
            precision="fp32",
            sizes=dict(samples=self.count, updates=updates, levels=s.T, most=self.updates[-1]),
            seconds=spread(seconds),
            flop=s.T * evaluations(replace(s, langevin_steps=updates)) * gradient,
            settings=s.langevin_steps,
            corpus=self.task.corpus.name,
            hole=two_sample_auroc(u, self.encodings, gen=gen(3)),
            long=two_sample_auroc(u, self.far, gen=gen(4)),
            **self.of_sentences(u, updates == s.langevin_steps),
        )


def bench_quality(opt):
    """The prior of a trained model, sampled with more and fewer updates a level: what less arithmetic costs in samples

    `hole`: samples against encodings; `long`: samples against those with most updates; `wkl` and `grammatical`: the
    sentences they become"""
    n = max(opt.threads)
    with tempfile.TemporaryDirectory() as folder, threads(n):
        quality = Quality(opt, trained(opt, folder))
        return [quality.entry(updates, n) for updates in quality.updates]


WHAT = ("chain", "step", "generate")
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
)


def launches(f):
    "How often the processor hands the GPU something to do"
    kinds = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
    ]
    with torch.profiler.profile(activities=kinds) as p:
        f()
    return sum(e.count for e in p.key_averages() if e.key in LAUNCHES)


def bench_gpu(opt):
    """Chain, training step and generation on a GPU: launch by launch, and with recorded chains

    Every time ends when the GPU has ended"""
    n, out = opt.threads[0], []
    corpus = load_corpus("grammar" if opt.tiny else "ptb", max_len=24 if opt.tiny else 40)
    with threads(n):
        for objective in OBJECTIVES:
            print(f"gpu: {objective} ...", flush=True)
            device = OnDevice(opt, n, objective, corpus)
            for part in opt.what:
                out += getattr(device, part)()
    return out


@contextmanager
def replayed(one_kernel=False):
    """`RuntimeError` unless a chain was recorded or replayed inside: what is shown as such has to be

    Or a step's terms with their chain; with `one_kernel`: unless a chain was run as one kernel"""
    chains = (whole_chains, "run_chains") if one_kernel else (graphs.Recorded, "__call__")
    with counted_calls(chains, (graphs.RecordedGrad, "__call__")) as calls:
        yield
    if not calls:
        raise RuntimeError(
            "LDEBM_RESIDENT=1, and nothing was one kernel" if one_kernel else "LDEBM_RECORD=1, and nothing was recorded"
        )


class OnDevice:
    "What is measured on one device with `n` threads under one objective"

    def __init__(self, opt, n, objective, corpus):
        self.opt, self.n, self.objective, self.corpus = opt, n, objective, corpus
        self.device, self.s = torch.device(opt.device), job(objective, opt)
        self.prior = chain_prior(self.s).to(self.device)
        self.fast = Frozen(self.prior.energy)
        batch = self.s.batch if opt.tiny else 128
        self.z = torch.randn(batch, self.s.d, generator=gen(1)).to(self.device)
        self.t = (torch.arange(batch) % self.s.T).to(self.device)
        self.ways = self.possible()

    @property
    def cuda(self):
        return self.device.type == "cuda"

    def possible(self):
        "Names of the ways to run a chain here"
        stopped = resident.why_not(sizes_of(self.fast), self.z)
        if self.cuda and stopped:
            print(f"gpu: chains are not one kernel, {stopped}", flush=True)
        return ("plain", "fast", *(("recorded",) if self.cuda else ()), *(() if stopped else ("resident",)))

    def gen(self, seed):
        return gen(seed, self.device)

    def held(self, path, f):
        "`f` on one path, which is an error if it was not taken"
        one_kernel = path == "resident"
        recorded = path in ("recorded", "resident")
        switches = dict(LDEBM_RECORD=str(int(recorded)), LDEBM_RESIDENT=str(int(one_kernel)))

        def go():
            with patch.dict(os.environ, switches), replayed(one_kernel) if recorded else nullcontext():
                return f()

        return waited(go, self.device)

    def beside(self, shape, precisions):
        return functools.partial(measure_products, self.opt, (shape,), precisions)

    def entry(self, what, way, sizes, counted, seconds, flop, shape):
        "`way`: path and precision; `counted`: what launches are counted in, if anything"
        launched = launches(counted) if self.cuda and counted is not None else None
        more = dict(launches=launched, objective=self.objective)
        return entry(self.opt, what, way[0], self.n, way[1], sizes, seconds, flop, shape, **more)

    def chain(self):
        s, B = self.s, len(self.z)
        shape = (B, s.energy_hidden, s.energy_hidden)

        def run(path):
            energy = PlainEnergy(self.prior.energy) if path == "plain" else self.fast
            return self.held(path, lambda: chain_ends(self.prior, self.z, self.t, self.gen(2), energy))

        runs = {path: run(path) for path in self.ways}
        secs = interleave(runs, self.opt.rounds(15), 2, self.beside(shape, ("fp32",)))
        sizes = dict(batch=B, d=s.d, steps=evaluations(s), levels=s.T)
        out = []
        for path, v in secs.items():
            gradient = flop_energy(B, s.d, s.energy_hidden, s.n_blocks, s.n_symbols, plain=path == "plain")
            flop = evaluations(s) * gradient
            out.append(self.entry("chain", (path, "fp32"), sizes, runs[path], v, flop, shape))
        return out

    def step(self):
        s, V = self.s, len(self.corpus.vocab)
        task = TextTask(self.corpus, s, 0)
        task.model.to(self.device)
        batches = fixed_batches(task, 1 if self.opt.tiny else 3)
        there = [b.to(self.device) for b in batches]
        steps = StepsOnDevice(self, task)
        shape = (self.opt.loss_rows, s.hidden, V)
        ways = [(path, precision) for precision in self.opt.precisions for path in self.ways]
        runs = {way: steps.run(*way, there) for way in ways}
        beside, afresh = self.beside(shape, self.opt.precisions), waited(steps.afresh, self.device)
        with counted_calls((whole_chains, "run_chains")) as kernels_run:
            secs = interleave(runs, self.opt.rounds(5), 2, beside, afresh)
        if "resident" in self.ways and not kernels_run:
            raise RuntimeError(f"a step's chains, {self.objective}, are not one kernel: there are too many")
        words, read = words_in(batches, s)
        sizes = dict(batch=s.batch, words=words, read=read, vocabulary=V)
        out = []
        for way, v in secs.items():
            counts = [flop_step(s.batch, r, w, V, s, self.objective, way[0] == "plain") for r, w in zip(read, words)]
            flop = sum(sum(c.values()) for c in counts) / len(batches)
            seconds = [x / len(batches) for x in v]
            out.append(self.entry("step", way, sizes, steps.run(*way, there[:1]), seconds, flop, shape))
        return out

    def generate(self):
        model = build_model(self.s, self.corpus.vocab, 0).to(self.device).eval()
        few = ((8, 2), (40, 1)) if self.opt.tiny else ((100, self.opt.rounds(5)), (46_000, 1))
        counts = few[:1] if self.opt.skip_long and not self.opt.tiny else few
        return [e for count, rounds in counts for e in self.generated(model, count, rounds)]

    def generated(self, model, count, rounds):
        "Entries of `count` sentences; as one kernel only where that many chains are, in full precision"
        s, V, words = self.s, len(self.corpus.vocab), {}

        def run(path, precision):
            def go():
                half = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
                with counted_words() as computed, half:
                    sample_sentences(model, count, gen=self.gen(5), max_len=s.max_len)
                words[path, precision] = sum(computed)

            return self.held(path, go)

        def possible(path, precision):
            return path != "resident" or count <= resident.MOST and precision == "fp32"

        ways = [(k, q) for k in self.ways[1:] for q in self.opt.precisions if possible(k, q)]
        shape, runs = (min(count, 256), s.hidden, V), {way: run(*way) for way in ways}
        out = []
        for way, v in interleave(runs, rounds, 1, self.beside(shape, self.opt.precisions)).items():
            counted = runs[way] if count < 1000 else None  # a profile of more would hold millions of events
            sizes = dict(sentences=count, words=words[way], max_len=s.max_len)
            out.append(self.entry("generate", way, sizes, counted, v, flop_generate(count, words[way], V, s), shape))
        return out


class StepsOnDevice:
    "Training steps of a task, every round from the same weights"

    def __init__(self, where, task):
        self.where, self.task = where, task
        self.start = {k: v.clone() for k, v in task.model.state_dict().items()}
        self.labels, self.label_weights = labels_of(task.settings, where.objective, where.device)
        self.stepper = None

    def afresh(self):
        self.task.model.load_state_dict(self.start)
        self.stepper = Stepper(self.task.settings, self.where.objective, self.task.model, all_terms(self.task))

    def run(self, path, precision, batches):
        def go():
            with plain_paths() if path == "plain" else nullcontext():
                for b in batches:
                    self.stepper.step(b, self.labels, self.label_weights, precision, self.where.gen(4))

        return self.where.held(path, go)


PARTS = dict(
    matmul=bench_matmul,
    chain=bench_chain,
    step=bench_step,
    generate=bench_generate,
    growth=bench_growth,
    memory=bench_memory,
    quality=bench_quality,
    gpu=bench_gpu,
)


# -- the command


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"parts to run: {', '.join(PARTS)}",
    )
    p.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=None,
        help="numbers of threads to measure (default: 1, and 2 where there are two processors)",
    )
    p.add_argument("--repeats", type=float, default=1.0, help="factor on the number of rounds")
    p.add_argument("--out", default=None, help="folder of the records (default: the results folder)")
    p.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="what the part gpu measures")
    p.add_argument("--skip-long", action="store_true", help="leave out the long generation")
    p.add_argument(
        "--compile", action="store_true", help="also time torch.compile of the closed form, which needs a C++ compiler"
    )
    p.add_argument("--tiny", action="store_true", help="sizes that only show that every part runs; needs --out")
    p.add_argument(
        "--run",
        default=None,
        metavar="FOLDER",
        help="finished text run, with energies in its prior, whose samples the part quality studies "
        "(default: it trains one on the embedded corpus)",
    )
    p.add_argument("--memory-child", nargs=6, help=argparse.SUPPRESS)
    opt = p.parse_args(argv)
    cpus = os.cpu_count() or 1
    opt.threads = sorted(set(opt.threads or range(1, min(cpus, 2) + 1)))
    if opt.threads[0] < 1 or opt.threads[-1] > cpus:
        p.error(f"--threads must lie in 1..{cpus}, the processors of this machine; got {opt.threads}")
    if opt.repeats <= 0:
        p.error(f"--repeats must be positive, got {opt.repeats}")
    if opt.tiny and opt.out is None:
        p.error("--tiny measures nothing worth keeping: name another folder with --out")
    if opt.run and not (Path(opt.run) / "config.json").exists():
        p.error(f"--run {opt.run} is not the folder of a finished text run: it has no config.json")
    opt.budget, opt.square, opt.loss_rows = (1e-4, (32, 32, 32), 64) if opt.tiny else (0.03, (1024, 1024, 1024), 2048)
    opt.device, opt.precisions = "cpu", [q for q in DTYPES if q == "fp32" or opt.tiny or core.has_bf16()]
    opt.rounds = lambda n: 2 if opt.tiny else max(2, round(n * opt.repeats))
    return opt


def on_gpu(opt, device="cuda"):
    return argparse.Namespace(**{**vars(opt), "device": device, "precisions": list(DTYPES)})


def main(argv=None):
    opt = parse(argv)
    if opt.memory_child:
        preset, corpus, objective, steps, n, settings = opt.memory_child
        return memory_child(preset, corpus, objective, int(steps), int(n), settings)

    keep_memory()  # as every job does
    folder = (Path(opt.out) if opt.out else results_root()) / "bench"
    failed = []
    try:
        check_writable(folder, "name another folder with --out")
    except PermissionError as e:
        raise SystemExit(str(e)) from None
    folder.mkdir(parents=True, exist_ok=True)
    for name in opt.only:
        if name == "gpu" and not torch.cuda.is_available():
            print("gpu: there is none here, left out", flush=True)
            continue
        start, clock = time.time(), time.perf_counter()
        print(f"{name} ...", flush=True)
        SECONDS.clear()
        here = on_gpu(opt) if name == "gpu" else opt
        try:
            entries = PARTS[name](here)
            prov = provenance(start)
            prov.update(
                machine=machine_name(name),
                cpu=records._cpu_name(),
                torch_threads=opt.threads,
                onednn=kernels.has_onednn(),
                matmul=kernels.matmul_backend(),
                compiler=native.compiler_version(),
                load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            )
            rec = dict(bench=name, tiny=opt.tiny, entries=entries, provenance=prov)
            of = f"-{entries[0]['corpus']}" if name == "quality" and opt.run else ""
            atomic_write(
                folder / f"{name}-{prov['machine']}{of}.json", json.dumps(rec, indent=1, allow_nan=False) + "\n"
            )
            print(f"{name}: {len(entries)} entries, {time.perf_counter() - clock:.0f} s", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the other records are in {folder}")


if __name__ == "__main__":
    main()
