"A corpus of eighty short sentences, and settings with which a run takes a second"

TINY = (
    "embed=16 hidden=16 d=4 codes=2 batch=16 steps=6 max_len=12 n_samples=20 "
    "nll_draws=4 nll_sentences=4 importance_draws=4 lm=''"
)


def tiny_corpus(folder):
    words = "a b c d e f g h".split()
    path = folder / "few.txt"
    path.write_text("\n".join(" ".join(words[(i * k) % 8] for k in range(2, 4 + i % 5)) for i in range(1, 81)))
    return path
