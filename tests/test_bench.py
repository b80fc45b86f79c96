"""Benchmarks: every part runs and writes its record, what it counts is what PyTorch counts, the page renders them

No time is judged"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chains import NO_RUNNERS, with_runners
from plain import plain_paths
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import bench
from ldebm.records import load_results
from ldebm.registry import RUNNERS

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("in_test")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    if not any(RUNNERS.values()):
        pytest.skip(NO_RUNNERS)
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("IN_TEST", "1")
        bench.main(["--tiny", "--threads", "1", "--out", str(out)])
    return out


def read(folder):
    return {(rec := json.loads(p.read_text()))["bench"]: rec for p in sorted(folder.glob("bench/*.json"))}


CPU_PARTS = set(bench.PARTS) - {"gpu"}


# -- records


@pytest.mark.slow
def test_every_part_writes_a_record(records):
    got = read(records)
    assert (
        set(got) - {"gpu"} == CPU_PARTS and ("gpu" in got) == torch.cuda.is_available() and load_results(records) == []
    ), "benchmarks are no records of runs"
    assert all((records / "bench" / f"{k}-{v['provenance']['machine']}.json").exists() for k, v in got.items()), (
        "a record is named by its part and the machine"
    )
    for name, rec in got.items():
        assert rec["bench"] == name and rec["tiny"] is True and rec["entries"]
        assert {"commit", "versions", "device", "threads", "finished", "cpu", "torch_threads", "matmul"} <= set(
            rec["provenance"]
        )
        done = [e for e in rec["entries"] if "pending" not in e]
        assert done and all(isinstance(e["pending"], str) and e["pending"] for e in rec["entries"] if "pending" in e)
        for e in done:
            s = e["seconds"]
            assert 0 < s["q1"] <= s["median"] <= s["q3"] and s["rounds"] >= 1
            assert e["threads"] == 1 and e["precision"] in ("fp32", "bf16") and e["sizes"]
            if name == "quality":
                assert 0 <= e["hole"]["value"] <= 1 and 0 <= e["grammatical"]["value"] <= 1 and e["flop"] >= 0
                continue
            if name == "memory":
                assert e["peak_mb"] >= e["loaded_mb"] >= e["imported_mb"] > 0
                continue
            assert e["flop"] > 0 and math.isclose(e["rate"], e["flop"] / s["median"])
            if name != "matmul":
                assert math.isclose(e["share"], e["rate"] / max(e["rate_shape"], e["rate_square"]))


@pytest.mark.slow
def test_what_is_compared(records):
    got = {k: [e for e in v["entries"] if "pending" not in e] for k, v in read(records).items()}
    assert {e["path"] for e in got["chain"]} >= {"plain", "blas", "bf16"}
    assert {(e["objective"], e["path"], e["precision"]) for e in got["step"]} == {
        (o, p, q) for o in bench.OBJECTIVES for p in ("plain", "fast") for q in bench.DTYPES
    }
    assert {(e["what"], e["axis"]) for e in got["growth"]} >= {
        ("chain", "rows"),
        ("chain", "T"),
        ("step", "batch"),
        ("step", "length"),
        ("step", "langevin_steps"),
    }
    for e in got["step"]:
        assert set(e["split"]) == set(bench.PARTS_OF_STEP) and all(
            e["split"][k] > 0 for k in ("encoder", "decoder", "chains", "energy", "backward", "optimiser")
        )
        assert math.isclose(sum(e["flop_split"].values()), e["flop"])
        assert sum(e["split"].values()) == pytest.approx(e["seconds"]["median"], rel=0.5)
    ends = {e["path"]: e["end_difference"] for e in got["chain"]}
    assert ends["plain"] < 1e-4 and ends["blas"] < 1e-4 < ends["bf16"], "the paths are the same chains"


@pytest.mark.slow
def test_failed_part_is_named_and_loses_nothing(tmp_path, monkeypatch, capsys):
    def broken(opt):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(bench.PARTS, "chain", broken)
    with pytest.raises(SystemExit, match="failed: chain"):
        bench.main(["--tiny", "--threads", "1", "--only", "chain", "matmul", "--out", str(tmp_path)])
    assert set(read(tmp_path)) == {"matmul"} and "no such luck" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv,said",
    [
        (["--tiny"], "name another folder"),
        (["--threads", "0"], "processors"),
        (["--threads", "100000"], "processors"),
        (["--only", "sorting"], "invalid choice"),
        (["--repeats", "0"], "positive"),
    ],
)
def test_wrong_options(argv, said, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(argv)
    assert e.value.code == 2 and said in capsys.readouterr().err


def test_timer():
    "Paths take turns, and the first rounds are dropped"
    order, before = [], []
    secs = bench.interleave(
        dict(a=lambda: order.append("a"), b=lambda: order.append("b")), 3, 1, before=lambda: before.append(len(order))
    )
    assert (
        order == ["a", "b"] * 4 and before == list(range(8)) and {k: len(v) for k, v in secs.items()} == dict(a=3, b=3)
    )
    assert bench.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == dict(median=3.0, q1=2.0, q3=4.0, rounds=5)
    assert bench.slope([1, 2, 4], [5, 20, 80]) == pytest.approx(2) and bench.slope(
        [1, 2, 4], [7, 7, 7]
    ) == pytest.approx(0)


def test_products_are_measured_beside_the_paths():
    opt, calls = bench.parse(["--tiny", "--threads", "1", "--out", "x"]), []
    bench.SECONDS.clear()
    with bench.threads(1):
        bench.interleave(
            dict(a=lambda: calls.append(len(bench.SECONDS))),
            3,
            2,
            lambda: bench.measure_products(opt, ((4, 5, 6),), ("fp32",)),
        )
    assert calls[:3] == [0, 0, 0] and calls[3:] == [2, 2], "after each round that counts: the shape, and the square"
    secs = bench.SECONDS[(4, 5, 6), "fp32", 1, "cpu"]
    assert set(secs) >= {"blas"} and all(len(v) == 3 for v in secs.values())
    assert bench.machine_rates(opt, (4, 5, 6), "fp32", 1)["blas"] == pytest.approx(
        2 * 4 * 5 * 6 / sorted(secs["blas"])[1]
    )
    e = bench.entry(opt, "x", "fast", 1, "fp32", {}, [2.0, 1.0, 3.0], 240, (4, 5, 6))
    assert e["rate"] == 120 and e["share"] == pytest.approx(120 / max(e["rate_shape"], e["rate_square"]))
    bench.SECONDS.clear()


@with_runners
@pytest.mark.slow
def test_half_precision_is_pending_where_it_is_emulated(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.core, "has_bf16", lambda: False)
    opt = bench.parse(["--threads", "1"])
    assert opt.precisions == ["fp32"]
    monkeypatch.setattr(bench.core, "has_bf16", lambda: True)
    assert bench.parse(["--threads", "1"]).precisions == ["fp32", "bf16"]
    tiny = bench.parse(["--tiny", "--threads", "1", "--out", str(tmp_path)])
    tiny.precisions = ["fp32"]
    es = bench.bench_chain(tiny)
    assert {e["path"]: e["pending"] for e in es if "pending" in e}.keys() >= {"mixed", "bf16"} and not any(
        e.get("precision") == "bf16" for e in es
    )


@pytest.mark.slow
def test_what_a_gpu_would_run(monkeypatch):
    "The part for a GPU, on the processor: everything but recorded chains and launches"
    opt = bench.on_gpu(bench.parse(["--tiny", "--threads", "1", "--out", "x"]), "cpu")
    es = bench.bench_gpu(opt)
    assert {(e["what"], e["path"], e["objective"]) for e in es} == {
        (w, p, o)
        for o in bench.OBJECTIVES
        for w, p in (("chain", "plain"), ("chain", "fast"), ("step", "plain"), ("step", "fast"), ("generate", "fast"))
    }
    assert all(e["launches"] is None and e["seconds"]["median"] > 0 and e["flop"] > 0 for e in es)
    assert {e["sizes"]["sentences"] for e in es if e["what"] == "generate"} == {8, 40}
    bench.SECONDS.clear()


def test_what_is_shown_as_recorded_has_to_be(monkeypatch):
    "A chain or a step's terms replayed; one kernel: a chain run by it"
    replay, of_terms = (kind.__new__(kind) for kind in (bench.graphs.Recorded, bench.graphs.RecordedGrad))
    monkeypatch.setattr(bench.graphs.Recorded, "__call__", lambda self, x: x)
    monkeypatch.setattr(bench.graphs.RecordedGrad, "__call__", lambda self, x: -x)
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        with bench.replayed():
            pass
    with bench.replayed():
        assert replay(3) == 3
    with bench.replayed():
        assert of_terms(3) == -3
    monkeypatch.setattr(bench.whole_chains, "run_chains", lambda x: 2 * x)
    with pytest.raises(RuntimeError, match="nothing was one kernel"):
        with bench.replayed(True):
            replay(3)
    with bench.replayed(True):
        assert bench.whole_chains.run_chains(3) == 6
    with bench.replayed(True):
        assert of_terms(3) == -3


def test_clock():
    "A part inside another is taken off it, and the parts add up to the whole"
    clock, now = bench.Clock(), [0.0]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bench.time, "perf_counter", lambda: now[0])
        clock = bench.Clock()

        def pass_(s):
            now[0] += s

        pass_(1)
        with clock.part("outer"):
            pass_(2)
            clock.timed("inner", pass_)(4)
            pass_(8)
        pass_(16)
        clock.turn()
    assert clock.spent == dict(other=17, outer=10, inner=4)


# -- counts


class Words(bench.Vocab):
    def __init__(self, n):
        super().__init__(["<pad>", "<unk>", "<s>", "</s>", *map(str, range(n - 4))])


def settings(objective, **kw):
    own = (
        dict(
            embed=48,
            hidden=48,
            d=10,
            energy_hidden=40,
            n_blocks=3,
            langevin_steps=4,
            T=2,
            n_symbols=6,
            batch=24,
            dropout=0.0,
        )
        | kw
    )
    return bench.resolve(
        bench.TextJob(
            corpus="grammar", preset="quick", objective=objective, settings=" ".join(f"{k}={v}" for k, v in own.items())
        )
    )


class Counter(TorchDispatchMode):
    "PyTorch's own count of every operation; `FlopCounterMode` itself refuses `torch.autograd.grad` of a leaf"

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if f := flop_registry.get(func._overloadpacket):
            self.total += f(*args, **(kwargs or {}), out_val=out)
        return out


def count(f):
    with pytest.MonkeyPatch.context() as m, Counter() as c:
        m.setenv("LDEBM_RESIDENT", "0")
        f()  # products by PyTorch, which counts them
    return c.total


def test_counter_is_pytorchs():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    with FlopCounterMode(display=False) as c:
        a @ b
    assert count(lambda: a @ b) == c.get_total_flops() == 2 * 3 * 5 * 7


@pytest.mark.parametrize("objective", bench.OBJECTIVES)
def test_flop_of_chains(objective):
    s = settings(objective)
    prior, B = bench.chain_prior(s), 24
    z, t = torch.randn(B, s.d, generator=bench.gen(1)), torch.arange(B) % s.T
    plain, fast = (
        bench.evaluations(s) * bench.flop_energy(B, s.d, s.energy_hidden, s.n_blocks, s.n_symbols, plain=p)
        for p in (True, False)
    )
    with plain_paths():
        assert count(lambda: bench.chain_ends(prior, z, t, None)) == pytest.approx(plain, rel=0.02)
    with bench.using("blas"):
        f = bench.Frozen(prior.energy)
        assert count(lambda: bench.chain_ends(prior, z, t, None, f)) == pytest.approx(fast, rel=0.02)


@pytest.mark.parametrize(
    "objective,extra",
    [
        ("published", {}),
        ("consistent", {}),
        ("consistent", dict(enc_share=1.0, reference="flat")),
        ("published", dict(packed=True)),
        ("consistent", dict(w_bow=0.0, cluster_by="whitened")),
    ],
)
def test_flop_of_a_step(objective, extra):
    s = settings(objective, **extra)
    V, B, length = 150, s.batch, 9
    model = bench.build_model(s, Words(V), 0)
    ids = torch.randint(4, V, (B, length + 1), generator=bench.gen(2))
    lengths = torch.full((B,), length + 1) if s.packed else torch.arange(B) % 5 + length - 3
    batch = bench.Batch(ids.masked_fill(torch.arange(length + 1) >= lengths[:, None], 0), lengths, {}, torch.arange(B))
    latent = ("entropy", "gauss", "ebm_enc") if objective == "published" else ("kl",) + ("ebm_enc",) * (s.enc_share > 0)
    weights = {
        k: 1.0
        for k in ("nll", "ebm", "mi", "cls")
        + latent
        + ("sym",) * (objective == "consistent")
        + ("bow",) * (s.w_bow > 0)
    }
    st = bench.Stepper(s, objective, model, weights)
    words, read = int((lengths - 1).sum()), int(lengths.sum()) if s.packed else ids.numel()
    for path in ("plain", "fast") if any(RUNNERS.values()) else ("plain",):

        def step():
            st.step(batch, torch.arange(B) % s.n_symbols, None, gen=bench.gen(3))

        want = sum(bench.flop_step(B, read, words, V, s, objective, path == "plain").values())
        if path == "plain":
            with plain_paths():
                got = count(step)
        else:
            with bench.using("blas"):
                got = count(step)
        assert got == pytest.approx(want, rel=0.03), path


@pytest.mark.parametrize("path", ["plain", pytest.param("fast", marks=with_runners)])
@pytest.mark.parametrize("objective", bench.OBJECTIVES)
def test_flop_of_generation(objective, path):
    s = settings(objective)
    V, n = 150, 12
    model, ids = bench.build_model(s, Words(V), 0).eval(), []
    with plain_paths() if path == "plain" else bench.using("blas"), bench.counted_words() as rows:
        got = count(lambda: ids.extend(bench.sample_sentences(model, n, gen=bench.gen(4), max_len=s.max_len)))
    words = sum(rows)
    assert sum(map(len, ids)) <= words <= n * s.max_len
    assert got == pytest.approx(bench.flop_generate(n, words, V, s, path == "plain"), rel=0.03)


# -- the page


def run_page(folder, monkeypatch):
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    plt.close("all")  # of tests before
    monkeypatch.setenv("LDEBM_RESULTS", str(folder))
    monkeypatch.chdir(ROOT / "nbs")
    shown, scope = [], dict(__name__="page")
    for c in json.loads((ROOT / "nbs" / "benchmarks.ipynb").read_text(encoding="utf-8"))["cells"]:
        if c["cell_type"] != "code":
            continue
        import ast

        src = c["source"] if isinstance(c["source"], str) else "".join(c["source"])
        body = ast.parse(src)
        last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, "benchmarks.ipynb", "exec"), scope)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "benchmarks.ipynb", "eval"), scope))
    figures = plt.get_fignums()
    plt.close("all")
    return "\n".join(o.data for o in shown if hasattr(o, "data") and isinstance(o.data, str)), len(figures)


@pytest.mark.slow
def test_page_of_records(records, monkeypatch):
    text, figures = run_page(records, monkeypatch)
    assert figures == 3 and ("pending" in text or torch.cuda.is_available()), "the GPU"
    assert "tiny" in text, "sizes that measure nothing are called so"
    chain = next(e for e in read(records)["chain"]["entries"] if e["path"] == "blas")
    assert f"{1e3 * chain['seconds']['median']:.3g}" in text


def test_page_without_records(tmp_path, monkeypatch):
    text, figures = run_page(tmp_path, monkeypatch)
    assert text.count("pending") >= 5 and figures == 0


def test_page_has_no_typed_measurement():
    "Prose names no time, rate or factor: they are in the records"
    import re

    for c in json.loads((ROOT / "nbs" / "benchmarks.ipynb").read_text(encoding="utf-8"))["cells"]:
        src = c["source"] if isinstance(c["source"], str) else "".join(c["source"])
        if c["cell_type"] == "markdown":
            bad = re.search(
                r"\d+(?:\.\d+)? ?(?:s|ms|%|GB|MB|MiB|times|fold|x|×|seconds|minutes|[GTM]?FLOP\S*)\b|\d\s?%", src
            )
            assert not bad, f"typed by hand: {bad.group(0)}"


@pytest.mark.slow
def test_make_bench(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    res = subprocess.run(
        ["make", "bench", "NO_VENV=1", f"BENCH_ARGS=--tiny --threads 1 --only matmul --out {tmp_path}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert res.returncode == 0, res.stderr
    assert set(read(tmp_path)) == {"matmul"}
