"A language model so small that tests can train it, and text for it"

import dataclasses
import random

import torch

from ldebm.core import make_gen
from ldebm.lm import LM, LMS, STOP

TINY = dataclasses.replace(LMS["quick"], embed=12, hidden=10, epochs=3, batch=4, bptt=8, parts=(0.5, 0.8))


def text(n, seed=0, words="the a cat dog sat ran on mat . big".split()):
    rnd = random.Random(seed)
    return [[words[min(int(rnd.expovariate(0.5)), len(words) - 1)] for _ in range(rnd.randint(0, 7))] for _ in range(n)]


def model(cfg=TINY, n_words=9, cuts=(), seed=0, dtype=torch.float64):
    return LM([STOP, *(f"w{i}" for i in range(n_words - 1))], list(cuts), cfg, make_gen(seed, "weights")).to(dtype)
