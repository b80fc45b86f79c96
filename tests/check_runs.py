"""What a short run must have reached

    python tests/check_runs.py text FOLDER
    python tests/check_runs.py digits FOLDER

Called on the run folders that `.ci/run` makes. Whoever has learnt nothing fails."""

import json
import math
import sys
from pathlib import Path


def metrics(run: Path) -> dict[str, float]:
    "Values of a record"
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))["metrics"]
    return {k: v["value"] for k, v in found.items()}


def check_text(run: Path) -> str:
    "On the embedded corpus: better than guessing, above the grammar's own entropy, reverse perplexity above its floor"
    from ldebm.corpora import load_corpus

    m, corpus = metrics(run), load_corpus("grammar")
    words = (corpus.splits["valid"].lengths - 1).double().mean().item()  # predicted a sentence, the end mark included
    limit = math.log(len(corpus.vocab)) * words
    nll, valid, gap = m["recon_nll"], m["nll_valid"], m["exact_gap"]
    assert nll is not None, "recon_nll was not computed"
    assert math.isfinite(nll) and 0 < nll < limit, (
        f"recon_nll {nll} is not in (0, {limit:.1f}): no better than guessing"
    )
    assert gap > 0, f"nll_valid {valid:.2f} is {gap:.2f} nats above the grammar's own: it cannot be below it"
    assert valid < limit, f"nll_valid {valid:.2f} is above {limit:.1f}: no better than guessing"
    perplexity, least = m["rppl"], m["rppl_floor"]
    assert perplexity > least > 1, f"reverse perplexity {perplexity:.1f} must be above that of real text, {least:.1f}"
    return f"recon_nll {nll:.2f} nats a sentence; guessing costs {limit:.2f}"


def check_digits(run: Path) -> str:
    "A run on digits: reconstructions and the energies' samples are better than draws from the Gaussian prior"
    m = metrics(run / "ldebm")
    ours, reconstructed, gaussian = m["frechet"], m["frechet_recon"], m["frechet_gaussian"]
    assert 0 <= reconstructed < gaussian, "reconstructions are no better than draws from the Gaussian prior"
    assert ours < 0.9 * gaussian, f"the energies did not help: {ours:.1f} against {gaussian:.1f}"
    return f"Frechet distance {ours:.1f}; reconstructions {reconstructed:.1f}, Gaussian prior {gaussian:.1f}"


CHECKS = dict(text=check_text, digits=check_digits)

if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    print(CHECKS[kind](Path(folder)))
