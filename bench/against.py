"""Is a checkout as fast as another? Both are measured by turns, every round of each in a fresh process.

    python bench/against.py OLD NEW [--rounds 9] [--only chain mala ...] [--json FILE]

OLD and NEW are folders that hold `ldebm`. A process warms each measurement up and takes the median of a few. The table
has the median over rounds, and the ratio NEW/OLD of rounds that lie side by side, with its quartiles. Compiled code is
on, threads are as many as OMP_NUM_THREADS says. Sizes are those of Penn Treebank, sentences are drawn: no data is
needed. Nine rounds take some seven minutes on two cores."""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

WORDS, LENGTH = 10_001, 22


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- adapters: the only places that name the package


def package(page: str = ""):
    "Names of the package under PYTHONPATH, whatever module defines them"
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from defined import Anywhere

    return Anywhere(page)


ldebm, text = package(), package("text")


def use_compiled_code() -> None:
    try:
        importlib.import_module("ldebm.runners")
    except ImportError:  # a checkout without the list: the package finds compiled code by itself
        pass


def vocabulary():
    return ldebm.Vocab(["<pad>", "<unk>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS - 4))])


def drawn_batch(n: int, vocab):
    "Sentences of 12 to 32 words"
    lengths = torch.randint(12, 33, (n,), generator=generator(1))
    ids = torch.randint(4, WORDS, (n, int(lengths.max()) + 2), generator=generator(2))
    ids[:, 0] = vocab.bos
    ids[torch.arange(n), lengths + 1] = vocab.eos
    ids.masked_fill_(torch.arange(ids.shape[1]) > (lengths + 1)[:, None], vocab.pad)
    return ldebm.Batch(ids, lengths + 2, {}, torch.arange(n))


def text_model(preset: str):
    "The row `ldebm` as its job builds it, and its batch size"
    job = ldebm.TextJob(corpus="ptb", preset=preset, system="ldebm")
    settings = text.resolve(job)
    vocab = vocabulary()
    return ldebm.build_model(settings, vocab, 0), settings.batch, vocab


def text_prior(n_symbols: int = 20):
    "Of published size"
    energy = ldebm.EnergyNet(40, n_symbols, 6, 200, 12, free_head=True, gen=generator(0))
    schedule = ldebm.make_schedule("consistent", 6)
    return ldebm.DiffusionEBM(schedule, energy, ldebm.PriorCfg(n_steps=30))


def run_chain(prior, z_next, t, metropolis: bool):
    if hasattr(prior, "conditional"):
        return prior.conditional(z_next, t, mala=metropolis).sample(gen=generator(4))
    return prior.chain_from(z_next, t, mala=metropolis, gen=generator(4))


def sentences(model, n: int):
    return ldebm.sample_sentences(model, n, gen=generator(5), max_len=40)


def image_models():
    "A three-layer generator of pictures with 32 x 32 pixels, and the energies of its layers, of the preset `small`"
    tower = ldebm.Generator(
        ldebm.GeneratorCfg(
            shape=(3, 32, 32),
            sizes=(4, 8, 16),
            channels=(8, 4, 2),
            widths=(80, 48, 24),
            blocks=(1, 1, 1),
            likelihood="logistic",
            levels=256,
        ),
        generator(0),
    )
    nets = ldebm.LayerNets(
        tower.cfg.sizes,
        tower.cfg.channels,
        ldebm.context_widths(tower),
        1,
        3,
        32,
        1,
        False,
        True,
        gen=generator(1),
    )
    energy = ldebm.LayeredEnergy(tower, nets, 3, (1,))
    cfg = ldebm.PriorCfg(n_steps=10, rho=0.9, mala=False, encoder=False)
    prior = ldebm.DiffusionEBM(ldebm.make_schedule("consistent", 3), energy, cfg)
    return ldebm.GeneratorModel(tower), prior


def image_batch(n: int):
    x = torch.randint(256, (n, 3, 32, 32), generator=generator(6)) / 255
    return ldebm.ImageBatch(x, torch.zeros(n, 0, dtype=torch.long), torch.arange(n))


# -- measurements: each gives a function to be timed


def chains(metropolis: bool) -> Callable:
    prior = text_prior()
    z, t = torch.randn(128, 40, generator=generator(3)), torch.arange(128) % 6
    return lambda: run_chain(prior, z, t, metropolis)


def optimiser_step(model, terms: Callable) -> Callable:
    "Terms, gradients, clipping and Adam"
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(params, 1e-4)

    def go():
        model.before_step()
        loss = sum(v.mean() for v in terms().values() if v.requires_grad)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()

    return go


def text_step(preset: str) -> Callable:
    model, batch_size, vocab = text_model(preset)
    batch, labels = drawn_batch(batch_size, vocab), torch.arange(batch_size) % model.prior.n_symbols
    weights = torch.ones(model.prior.n_symbols)
    return optimiser_step(model, lambda: model(batch, generator(4), labels=labels, label_weights=weights))


def generation() -> Callable:
    model, _, _ = text_model("paper")
    model.eval()
    return lambda: sentences(model, 100)


def generator_step() -> Callable:
    model, _ = image_models()
    batch = image_batch(64)
    return optimiser_step(model, lambda: model(batch, generator(7)))


def layers_step() -> Callable:
    model, prior = image_models()
    model.generator.requires_grad_(False)
    batch = image_batch(64)

    def terms():
        with torch.no_grad():
            q, u = model.generator.encode(batch.x, generator(7))
        return prior.terms(q, u, generator(8))

    return optimiser_step(prior, terms)


WHAT = {  # Name -> how to make it, and how often a process times it
    "chain": (lambda: chains(False), 15),
    "mala": (lambda: chains(True), 15),
    "step small": (lambda: text_step("small"), 3),
    "step paper": (lambda: text_step("paper"), 2),
    "generate": (generation, 3),
    "images generator": (generator_step, 3),
    "images layers": (layers_step, 3),
}


def measure(names: list[str]) -> dict[str, float]:
    "Seconds of each, in this process"
    use_compiled_code()
    out = {}
    for name in names:
        make, repeats = WHAT[name]
        run = make()
        run()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        out[name] = statistics.median(seconds)
    return out


# -- comparison


def in_fresh_process(root: Path, names: list[str]) -> dict[str, float]:
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
    cmd = [sys.executable, str(Path(__file__).resolve()), "--measure", *names]
    done = subprocess.run(cmd, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{root}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(old: list[float], new: list[float]) -> dict[str, float]:
    "Medians of both, and the ratio of neighbours with its quartiles"
    ratios = [b / a for a, b in zip(old, new)]
    q1, middle, q3 = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return dict(old=statistics.median(old), new=statistics.median(new), ratio=middle, q1=q1, q3=q3)


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':18} {'old, s':>9} {'new, s':>9} {'new/old':>8}  middle half"]
    for name, r in found.items():
        lines.append(f"{name:18} {r['old']:9.4f} {r['new']:9.4f} {r['ratio']:8.3f}  {r['q1']:.3f} to {r['q3']:.3f}")
    return "\n".join(lines)


def parse(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("old", nargs="?", type=Path, help="folder of the earlier checkout")
    p.add_argument("new", nargs="?", type=Path, help="folder of the later one")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--only", nargs="+", choices=WHAT, default=list(WHAT), metavar="WHAT", help=", ".join(WHAT))
    p.add_argument("--json", type=Path, help="file for every number")
    p.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if not args.measure:
        for root in (args.old, args.new):
            if root is None or not (root / "ldebm" / "__init__.py").exists():
                p.error(f"two folders that hold ldebm are needed; {root} is none")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    roots = dict(old=args.old.resolve(), new=args.new.resolve())
    seconds = {k: [] for k in roots}
    for i in range(args.rounds):
        for k in list(roots) if i % 2 == 0 else list(reversed(roots)):
            seconds[k].append(in_fresh_process(roots[k], args.only))
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr, flush=True)
    found = {n: compared(*([r[n] for r in seconds[k]] for k in ("old", "new"))) for n in args.only}
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(dict(summary=found, rounds=seconds), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
