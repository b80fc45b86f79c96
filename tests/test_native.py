"Whole chains in compiled code, on a CPU"

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from chains import PUBLISHED, SMALL, counted_calls, energy, gen, problem
from torch.testing import assert_close

from ldebm import langevin, native
from ldebm.energy import EnergyNet, FastEnergy, MixedEnergy, energy_grad
from ldebm.langevin import mala_chain, mala_resident, mala_states, tilt_chain, tilt_resident, tilt_states
from ldebm.levels import PriorCfg
from ldebm.native import FLAGS, compiled, launch_native, no_program, program, why_not
from ldebm.prior import DiffusionEBM
from ldebm.schedule import make_schedule
from ldebm.whole_chains import Sizes

ODD = [*SMALL, Sizes(1, 4, 1, 0), Sizes(256, 256, 3, 0), Sizes(2, 36, 300, 1), Sizes(17, 33, 2, 29)]
TIGHT = {torch.float64: dict(rtol=1e-10, atol=1e-11), torch.float32: dict(rtol=2e-4, atol=2e-5)}


def needs(dtype=torch.float32, half=False):
    "Skips where the machine lacks something; a program that does not compile or load is an error"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(native, "no_program", lambda *a: "")
        if why := why_not(SMALL[0], torch.zeros(1, 6, dtype=dtype), torch.bfloat16 if half else None):
            pytest.skip(why)
    try:
        native.compiler()
    except RuntimeError as e:
        pytest.skip(str(e))
    program(dtype, half)


def tame(e):
    "The same energy with weights of wide layers smaller, so that rounding does not grow on the way"
    with torch.no_grad():
        for W, _ in (e.w.z1, e.w.z2, *e.w.blocks):
            W.div_(max(1.0, len(W) / 24))
    return type(e)(e.net, e.w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", ODD)
@pytest.mark.parametrize("rho, drift", [(None, math.inf), (0.8, math.inf), (0.8, 0.3)])
def test_unadjusted_chains_end_where_the_plain_ones_do(dtype, sizes, rho, drift):
    needs(dtype)
    e = tame(energy(sizes, dtype=dtype))
    args, noise, _ = problem(sizes, 21, 4, dtype=dtype)
    s2 = 0.1 * args["v"] if rho is None else None
    want, first = tilt_states(e, **args, s2=s2, noise=noise, n_steps=4, rho=rho, drift=drift)
    got, too = tilt_resident(e, **args, s2=s2, noise=noise, rho=rho, drift=drift)
    assert (want - args["z"]).abs().mean() > 0.1, "they went somewhere"
    assert_close(got, want, **TIGHT[dtype])
    assert first == too == 5


@pytest.mark.parametrize("sizes", SMALL)
@pytest.mark.parametrize("drift", [math.inf, 0.5])
def test_chains_with_a_metropolis_test_end_where_the_plain_ones_do(sizes, drift):
    needs(torch.float64)
    e = energy(sizes, steep=8.0, dtype=torch.float64)
    args, noise, uniform = problem(sizes, 67, 6, dtype=torch.float64)
    want, total, first = mala_states(e, **args, noise=noise, uniform=uniform, n_steps=6, rho=0.5, drift=drift)
    got, share, too = mala_resident(e, **args, noise=noise, uniform=uniform, rho=0.5, drift=drift)
    assert 0.05 < total.mean() / 6 < 0.95, "some proposals are refused, some are not"
    assert_close(got, want, rtol=1e-10, atol=1e-11)
    assert_close(share, total, rtol=1e-8, atol=1e-9)
    assert first == too


def test_at_published_size_in_double_precision():
    needs(torch.float64)
    e = energy(PUBLISHED, dtype=torch.float64)
    e = tame(e)
    args, noise, uniform = problem(PUBLISHED, 128, 50, dtype=torch.float64)
    want, _ = tilt_states(e, **args, s2=None, noise=noise, n_steps=50, rho=0.8, drift=math.inf)
    assert_close(
        tilt_resident(e, **args, s2=None, noise=noise, rho=0.8, drift=math.inf)[0], want, rtol=1e-10, atol=1e-11
    )


def test_a_context_is_part_of_what_stays_the_same():
    needs()
    e = energy(SMALL[0], context=4)
    args, noise, _ = problem(SMALL[0], 16, 3, context=4)
    want, _ = tilt_states(e, **args, s2=None, noise=noise, n_steps=3, rho=0.8, drift=math.inf)
    assert_close(
        tilt_resident(e, **args, s2=None, noise=noise, rho=0.8, drift=math.inf)[0], want, **TIGHT[torch.float32]
    )
    other = tilt_resident(e, **{**args, "context": args["context"] + 1}, s2=None, noise=noise, rho=0.8, drift=math.inf)[
        0
    ]
    assert (other - want).abs().max() > 1e-3


@pytest.mark.parametrize("half", [False, True])
def test_a_chain_ends_at_the_same_number_whatever_the_threads_and_its_company(half):
    needs(half=half)
    e = energy(SMALL[0], steep=4.0)
    args, noise, uniform = problem(SMALL[0], 203, 3)
    n = torch.get_num_threads()
    found = []
    if half:
        e = MixedEnergy(e, torch.bfloat16)

    def run(rows):
        return mala_resident(
            e,
            **{k: x if x is None else x[rows] for k, x in args.items()},
            noise=noise[:, rows],
            uniform=uniform[:, rows],
            rho=0.8,
            drift=0.5,
        )[0]

    try:
        for k in (1, 2, 3, 7):
            torch.set_num_threads(k)
            found.append(run(slice(None)))
    finally:
        torch.set_num_threads(n)
    assert all(torch.equal(found[0], x) for x in found[1:])
    for rows in (slice(0, 1), slice(5, 18), slice(150, 203)):
        assert torch.equal(run(rows), found[0][rows])


def test_threads_of_its_own_where_pytorch_has_none_to_lend(monkeypatch):
    needs()
    e = energy(SMALL[0])
    args, noise, _ = problem(SMALL[0], 40, 3)
    n = torch.get_num_threads()

    def run():
        return tilt_resident(e, **args, s2=None, noise=noise, rho=0.8, drift=math.inf)[0]

    try:
        torch.set_num_threads(2)
        want = run()
        monkeypatch.setattr(native, "pool", native.ctypes.c_void_p)
        assert torch.equal(run(), want)
    finally:
        torch.set_num_threads(n)


def test_products_in_bfloat16_are_as_near_as_bfloat16_is():
    needs(half=True)
    e = tame(energy(PUBLISHED))
    args, noise, _ = problem(PUBLISHED, 50, 20)
    half = MixedEnergy(e, torch.bfloat16)
    go = dict(**args, s2=None, noise=noise, rho=0.8, drift=math.inf)
    exact, start = tilt_states(e, **go, n_steps=20)[0], args["z"]
    there, here = (tilt_states(half, **go, n_steps=20)[0] - exact).norm(), (tilt_resident(half, **go)[0] - exact).norm()
    assert 0 < here < 1.2 * there, "sums and residual stream are in single precision: no worse than PyTorch's"
    assert here < 5e-3 * (exact - start).norm()


def test_narrower_registers_give_the_same(tmp_path):
    needs()
    flags = ("-O3", "-mavx2", "-mfma", *(f for f in FLAGS if not f.startswith(("-O", "-march"))))
    e = energy(SMALL[2])
    args, noise, _ = problem(SMALL[2], 21, 4)
    go = dict(**args, s2=None, noise=noise, rho=0.8, drift=0.3)
    narrow = program.__wrapped__(torch.float32, flags=flags, folder=tmp_path)
    got = tilt_resident(e, **go, start=lambda *a: launch_native(*a, lib=narrow))[0]
    assert_close(got, tilt_states(e, **go, n_steps=4)[0], **TIGHT[torch.float32])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_found_at_the_same_update(bad):
    needs()
    e = energy(SMALL[0])
    args, noise, uniform = problem(SMALL[0], 5, 4)
    noise[2, 3, 1] = bad
    first = [
        f(e, **args, s2=None, noise=noise, rho=0.8, drift=math.inf, **kw)[1]
        for f, kw in ((tilt_states, dict(n_steps=4)), (tilt_resident, {}))
    ]
    assert first[0] == first[1] == 3
    first = [
        f(e, **args, noise=noise, uniform=uniform, rho=0.8, drift=math.inf, **kw)[2]
        for f, kw in ((mala_states, dict(n_steps=4)), (mala_resident, {}))
    ]
    assert first[0] == first[1] == 3


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_seed_gives_the_same_numbers_either_way(dtype, n, monkeypatch):
    needs(dtype)
    e = energy(SMALL[0], dtype=dtype)
    args, *_ = problem(SMALL[0], 13, 1, dtype=dtype)
    args.pop("y"), args.pop("context")

    def run():
        g = gen(3)
        return tilt_chain(e, **args, n_steps=n, rho=0.8, gen=g), *mala_chain(e, **args, n_steps=n, gen=g), g.get_state()

    with counted_calls((langevin, "run_chains")) as calls:
        found = both(run, monkeypatch)
    assert len(calls) == (2 if n else 0), "compiled code where there is an update, nothing of it with LDEBM_RESIDENT=0"
    for x, y in zip(*found):
        assert_close(x, y, **(TIGHT[dtype] if x.is_floating_point() else dict(rtol=0, atol=0)))


def test_samples_of_a_prior_and_its_products_in_autocast(monkeypatch):
    needs(half=True)
    net = EnergyNet(6, 5, 3, hidden=24, n_blocks=2, init=0.3, gen=gen(1))
    kinds = []
    monkeypatch.setattr(
        langevin, "launch_native", lambda *a, half, **kw: kinds.append(half) or launch_native(*a, half=half, **kw)
    )
    monkeypatch.setattr(FastEnergy, "grad", None)
    for mala, half in ((True, False), (True, True), (False, False), (False, True)):
        prior = DiffusionEBM(make_schedule("cosine", 3), net, PriorCfg(n_steps=3, mala=mala))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            z = prior.sample(9, gen=gen(4))
        assert z.isfinite().all() and z.dtype == torch.float32 and kinds == 3 * [half and not mala]
        kinds.clear()


def test_what_goes_another_way(monkeypatch):
    e, z = energy(SMALL[0]), torch.zeros(3, 6)
    assert "no chains" in why_not(SMALL[0], z[:0]) and "not a network" in why_not(None, z)
    assert "bfloat16" in why_not(SMALL[0], z.bfloat16()) and "float16" in why_not(SMALL[0], z, torch.float16)
    e.net.groups = (2, 3)
    assert e.sizes() is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in why_not(SMALL[0], z)
    monkeypatch.setenv("LDEBM_RESIDENT", "0")
    assert why_not(SMALL[0], z) == "LDEBM_RESIDENT=0"
    monkeypatch.setenv("LDEBM_RESIDENT", "yes")
    with pytest.raises(ValueError, match="LDEBM_RESIDENT must be"):
        why_not(SMALL[0], z)


def test_processors_with_tiles_of_bfloat16_keep_their_library(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(native, "no_program", lambda *a: "asked")
    monkeypatch.setattr(native, "multiplies_pairs", native.multiplies_pairs.__wrapped__)
    for flags, said in (
        ("avx512_bf16", "asked"),
        ("avx512_bf16 amx_bf16", "something better"),
        ("avx512f", "does not multiply pairs"),
    ):
        monkeypatch.setattr(native, "cpu_info", lambda field, flags=flags: flags)
        assert (
            said in why_not(SMALL[0], torch.zeros(3, 6), torch.bfloat16)
            and why_not(SMALL[0], torch.zeros(3, 6)) == "asked"
        )


@pytest.mark.parametrize(
    "cxx, said",
    [
        ("no-such-compiler", "no C\\+\\+ compiler called no-such-compiler: install"),
        ("false", "false does not compile it: exit status 1"),
        ('g++ "', "is not a command line: No closing quotation"),
        ("binary", "does not compile it: .*not a word"),
        ("empty", "cannot be loaded, and is deleted"),
    ],
)
def test_without_a_compiler_chains_go_on_and_say_so(cxx, said, monkeypatch, tmp_path):
    for name, does in (
        ("binary", r"printf 'not a word: \377\n' >&2; exit 1"),
        ("empty", 'for last; do :; done; [ "$1" = --version ] || : > "$last"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("LDEBM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(native, "program", program.__wrapped__)
    monkeypatch.setattr(native, "no_program", no_program.__wrapped__)
    e = energy(SMALL[0])
    args, *_ = problem(SMALL[0], 5, 1)
    args.pop("y"), args.pop("context")
    with pytest.warns(UserWarning, match=f"(?s)product by product.*{said}.*LDEBM_RESIDENT=0"):
        got = tilt_chain(e, **args, n_steps=3, rho=0.8, gen=gen(3))
    monkeypatch.setenv("LDEBM_RESIDENT", "0")
    assert torch.equal(got, tilt_chain(e, **args, n_steps=3, rho=0.8, gen=gen(3)))
    assert not list(tmp_path.rglob("*.so"))


def test_processes_that_compile_at_once_and_one_that_finds_it_done(tmp_path):
    needs()
    code = "import torch; from ldebm.native import program; program(torch.float32)"

    def go(**env):
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "LDEBM_CACHE": str(tmp_path), **env},
            stderr=subprocess.PIPE,
            text=True,
        )

    for p in [go(), go()]:
        assert p.wait() == 0, p.stderr.read()
    made = [*tmp_path.rglob("*")]
    assert [p.suffix for p in made if p.is_file()] == [".so"]
    at = made[-1].stat().st_mtime_ns
    p = go(CXX="")
    assert p.wait() == 0 and made[-1].stat().st_mtime_ns == at


def test_the_name_of_a_program_stands_for_all_that_made_it(tmp_path, monkeypatch):
    needs()
    monkeypatch.setattr(
        native.subprocess,
        "run",
        lambda command, **kw: (
            native.Path(command[-1]).write_text("made") if "-o" in command else None,
            subprocess.CompletedProcess(command, 0, "version 1", ""),
        )[1],
    )
    first = compiled(torch.float32, folder=tmp_path)
    assert compiled(torch.float32, folder=tmp_path) == first and first.read_text() == "made"
    others = [
        compiled(torch.float64, folder=tmp_path),
        compiled(torch.float32, True, folder=tmp_path),
        compiled(torch.float32, flags=FLAGS[1:], folder=tmp_path),
    ]
    monkeypatch.setattr(native, "cpu_info", lambda field: "another")
    others.append(compiled(torch.float32, folder=tmp_path))
    monkeypatch.setattr(native, "CHAINS", native.CHAINS + "// another")
    others.append(compiled(torch.float32, folder=tmp_path))
    assert len({first, *others}) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind, half, look", [("double", 0, "address,undefined"), ("float", 1, "thread")])
def test_no_access_goes_astray_and_no_two_threads_meet(kind, half, look, tmp_path):
    needs(half=bool(half))
    code, made = tmp_path / "shapes.cpp", tmp_path / "shapes"

    def run(text):
        code.write_text(text)
        got = subprocess.run(
            [
                *native.compiler(),
                "-O1",
                "-march=native",
                "-std=c++17",
                "-pthread",
                f"-fsanitize={look}",
                "-fno-sanitize-recover=all",
                f"-DREAL={kind}",
                f"-DHALF={half}",
                str(code),
                "-o",
                str(made),
            ],
            capture_output=True,
            text=True,
        )
        return got if got.returncode else subprocess.run([str(made)], capture_output=True, text=True)

    if run("int main() { return 0; }").returncode:
        pytest.skip(f"the compiler does not look at {look}")
    got = run(native.source() + Path(__file__).with_name("shapes.cpp").read_text())
    assert got.stdout == "nothing found\n" and got.returncode == 0, got.stderr[-2000:]


def both(run, monkeypatch):
    "What a function gives product by product, and as compiled code"
    found = []
    for on in "01":
        monkeypatch.setenv("LDEBM_RESIDENT", on)
        found.append(run())
    return found


@pytest.mark.parametrize(
    "wide",
    [
        dict(tau=torch.full((1, 1), 0.7)),
        dict(v=torch.full((1, 1), 0.3)),
        dict(m=torch.full((1, 6), 0.2)),
        dict(m=torch.full((6,), 0.2)),
        dict(t=torch.ones(1, dtype=torch.long)),
    ],
)
def test_what_is_the_same_for_all_chains_may_be_given_once(wide, monkeypatch):
    needs()
    e = energy(SMALL[0])
    args, *_ = problem(SMALL[0], 9, 1)
    args.pop("y"), args.pop("context")
    args.update(wide)
    want, got = both(
        lambda: (
            tilt_chain(e, **args, n_steps=3, rho=0.8, gen=gen(3)),
            mala_chain(e, **args, n_steps=3, gen=gen(3))[0],
        ),
        monkeypatch,
    )
    for a, b in zip(want, got):
        assert_close(a.float(), b, **TIGHT[torch.float32])


def test_contexts_and_chains_under_autocast(monkeypatch):
    needs(half=True)
    e = energy(SMALL[0], context=4)
    args, *_ = problem(SMALL[0], 9, 1, context=4)
    args.pop("y")
    for energies, context in (
        (e, args["context"]),
        (MixedEnergy(e, torch.bfloat16), args["context"]),
        (MixedEnergy(e, torch.bfloat16), args["context"].bfloat16()),
    ):

        def run(energies=energies, context=context):
            with torch.autocast("cpu", torch.bfloat16, enabled=energies is not e):
                return tilt_chain(energies, **{**args, "context": context}, n_steps=3, rho=0.8, gen=gen(3))

        want, got = both(run, monkeypatch)
        assert got.dtype == torch.float32 and (want - got).abs().max() < 0.05


@pytest.mark.parametrize("half", [False, True])
def test_a_chain_that_is_lost_takes_no_other_along(half):
    "Slabs follow each other through the same memory, whose rows are wider than a latent"
    needs(half=half)
    e = energy(SMALL[1])
    args, noise, uniform = problem(SMALL[1], 130, 6)
    n = torch.get_num_threads()
    if half:
        e = MixedEnergy(e, torch.bfloat16)
    lost = noise.clone()
    lost[2, 0] = math.nan
    start = {**args, "z": args["z"].clone()}
    start["z"][0] = math.nan
    try:
        torch.set_num_threads(1)
        right, wrong = (tilt_resident(e, **args, s2=None, noise=x, rho=0.8, drift=math.inf) for x in (noise, lost))
        assert wrong[0][0].isnan().all() and torch.equal(right[0][1:], wrong[0][1:]) and wrong[1] == 3
        right, wrong = (
            mala_resident(e, **a, noise=noise, uniform=uniform, rho=0.8, drift=math.inf) for a in (args, start)
        )
        assert torch.equal(right[0][1:], wrong[0][1:]) and torch.equal(right[1][1:], wrong[1][1:]) and wrong[2] == 0
    finally:
        torch.set_num_threads(n)


@pytest.mark.parametrize("most", [1, 3 * 9 * 6 * 4, 10**9])
def test_a_long_chain_goes_in_stretches(most, monkeypatch):
    needs()
    e = energy(SMALL[0], steep=4.0)
    args, *_ = problem(SMALL[0], 9, 1)
    args.pop("y"), args.pop("context")
    calls = []
    want = tilt_chain(e, **args, n_steps=7, rho=0.8, gen=gen(3)), *mala_chain(e, **args, n_steps=7, gen=gen(3))
    run = langevin.run_chains
    monkeypatch.setattr(langevin, "MOST_NOISE", most)
    monkeypatch.setattr(langevin, "run_chains", lambda *a, **kw: calls.append(len(a[6])) or run(*a, **kw))
    got = tilt_chain(e, **args, n_steps=7, rho=0.8, gen=gen(3)), *mala_chain(e, **args, n_steps=7, gen=gen(3))
    assert calls == 2 * {1: 7 * [1], 10**9: [7]}.get(most, [3, 3, 1])
    for a, b in zip(want, got):
        assert_close(a, b, rtol=1e-6, atol=1e-6)
    bad, draw = iter([0, 0, 0, 0, math.nan, *9 * [0]]), langevin.randn_like
    monkeypatch.setattr(langevin, "randn_like", lambda x, g: draw(x, g) + next(bad))
    with pytest.raises(FloatingPointError, match="at Langevin step 5 of 7"):
        tilt_chain(e, **args, n_steps=7, rho=0.8, gen=gen(3))
    bad = iter([0, 0, 0, 0, math.nan, *9 * [0]])
    with pytest.raises(FloatingPointError, match="at Langevin step 5 of 7"):
        mala_chain(e, **args, n_steps=7, gen=gen(3))


def test_weights_are_laid_out_once_for_an_energy(monkeypatch):
    needs(half=True)
    packed, lib = [], program(torch.float32)

    class Counting:
        def __getattr__(self, name):
            return (lambda *a: packed.append(1) or lib.pack(*a)) if name == "pack" else getattr(lib, name)

    monkeypatch.setattr(native, "program", lambda dtype, half: Counting())
    e, other = energy(SMALL[0]), energy(SMALL[0], steep=3.0)
    args, noise, _ = problem(SMALL[0], 5, 2)

    def run(e):
        return tilt_resident(e, **args, s2=None, noise=noise, rho=0.8, drift=math.inf)[0]

    a, b, c = run(e), run(e), run(other)
    assert torch.equal(a, b) and not torch.equal(a, c) and len(packed) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_symbols_that_are_asked_for(dtype, monkeypatch):
    needs(dtype)
    with counted_calls((langevin, "run_chains")) as calls:
        for sizes in SMALL:
            e = energy(sizes, steep=4.0, dtype=dtype)
            args, *_ = problem(sizes, 71, 1, dtype=dtype)
            args.pop("context")
            args["y"] = torch.arange(71) % sizes.n_symbols
            want, got = both(
                lambda e=e, args=args: (
                    tilt_chain(e, **args, n_steps=4, rho=0.8, gen=gen(3)),
                    *mala_chain(e, **args, n_steps=4, gen=gen(3)),
                ),
                monkeypatch,
            )
            for a, b in zip(want, got):
                assert_close(a, b, **TIGHT[dtype])
            if sizes.n_symbols > 1:
                assert (
                    tilt_chain(e, **{**args, "y": args["y"].flip(0)}, n_steps=4, rho=0.8, gen=gen(3)) - got[0]
                ).abs().max() > 1e-3
        n = len(calls)
        assert n == 3 * 2 + 2
        tilt_chain(
            e, **{**args, "y": torch.ones(71, sizes.n_symbols, dtype=torch.bool)}, n_steps=4, rho=0.8, gen=gen(3)
        )
        assert len(calls) == n, "sets of symbols go another way"
    for wrong in (args["y"][:5], args["y"] + 1000, -1 - args["y"]):
        with pytest.raises((ValueError, RuntimeError), match="symbols must be|expand"):
            tilt_chain(e, **{**args, "y": wrong}, n_steps=4, rho=0.8)
    with pytest.raises(ValueError, match="from 0 to 36; got torch.int64, cpu, .71,., from 1000 to 1036"):
        tilt_chain(e, **{**args, "y": args["y"] + 1000}, n_steps=4, rho=0.8)


def test_symbols_with_products_in_bfloat16():
    needs(half=True)
    e = tame(energy(PUBLISHED))
    args, noise, _ = problem(PUBLISHED, 50, 20)
    half = MixedEnergy(e, torch.bfloat16)
    go = dict(**{**args, "y": torch.arange(50) % 20}, s2=None, noise=noise, rho=0.8, drift=math.inf)
    exact = tilt_states(e, **go, n_steps=20)[0]
    there, here, without = (
        (x - exact).norm()
        for x in (
            tilt_states(half, **go, n_steps=20)[0],
            tilt_resident(half, **go)[0],
            tilt_resident(half, **{**go, "y": None})[0],
        )
    )
    assert 0 < here < 1.2 * there and here < 0.1 * without


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", ODD)
def test_one_gradient_is_that_of_autograd(dtype, sizes, monkeypatch):
    needs(dtype)
    e = tame(energy(sizes, context=3, dtype=dtype))
    args, *_ = problem(sizes, 70, 1, context=3, dtype=dtype)
    calls = []
    monkeypatch.setattr("ldebm.energy.gradient_native", lambda *a: calls.append(1) or native.gradient_native(*a))
    with torch.no_grad():  # `tame` changed what the fast energy holds: the network's own weights, or copies of them
        for mine, theirs in zip((e.w.z1, e.w.z2, *e.w.blocks), (e.net.z1, e.net.z2, *e.net.blocks)):
            theirs.weight.copy_(mine[0])
    for y in (None, torch.arange(70) % sizes.n_symbols):
        want = energy_grad(lambda z, t, y, context: e.net(z, t, y, context), args["z"], args["t"], y, args["context"])
        got = (
            e.grad(args["z"], args["t"], y, args["context"]),
            e.grad(args["z"], args["t"], y, base=e.base(args["t"], args["context"])),
            e.grad(args["z"].T.contiguous().T, args["t"], y, args["context"]),
        )
        for F, g in got:
            assert_close(F, want[0], **TIGHT[dtype])
            assert_close(g, want[1], **TIGHT[dtype])
    assert len(calls) == 6 and e.grad(args["z"][:0], args["t"][:0], context=args["context"][:0])[1].shape == (
        0,
        sizes.d,
    )
    for wrong, said in (
        (dict(y=torch.full((70,), sizes.n_symbols)), "symbols must be"),
        (dict(z=args["z"][:, :-1]), "z must be"),
        (dict(base=args["z"].new_zeros(70, 1)), "base must be"),
    ):
        with pytest.raises(ValueError, match=said):
            e.grad(**{**dict(z=args["z"], t=args["t"], context=args["context"]), **wrong})
    monkeypatch.setenv("LDEBM_RESIDENT", "0")
    e.grad(args["z"], args["t"], context=args["context"])
    assert len(calls) == 9


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_one_gradient_of_unusual_tensors(monkeypatch):
    needs(half=True)
    e = energy(SMALL[0], context=4)
    args, *_ = problem(SMALL[0], 9, 1, context=4)
    z, t, c = args["z"], args["t"], args["context"]
    F, g = e.grad(z, t, context=c)
    for x in (torch._neg_view(-z), torch.stack([z, z], 2)[:, :, 0]):
        for a, b in zip(e.grad(x, t, context=c), (F, g)):
            assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(e.grad(z, t, context=c)[1], g)
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match="forward AD"):
        e.grad(fwAD.make_dual(z, torch.ones_like(z)), t, context=c)
    base, weights = e.base(t, c), e.packed()
    for wrong in (weights[:-1], weights.double(), weights[None]):
        with pytest.raises(ValueError, match="weights must be"):
            native.gradient_native(e.sizes(), wrong, base, z)
    assert torch.equal(native.gradient_native(e.sizes(), torch.stack([weights, weights], 1)[:, 0], base, z)[1], g)
    monkeypatch.setattr("ldebm.energy.gradient_native", None)
    assert MixedEnergy(e, torch.bfloat16).grad(z, t, context=c)[1].isfinite().all(), (
        "in half precision product by product"
    )


def test_rooms_and_weights_are_kept_apart():
    needs()
    e = energy(SMALL[0])
    z, t = torch.zeros(3, 6), torch.zeros(3, dtype=torch.long)
    some = torch.ones(3, 5, dtype=torch.bool)
    e.grad(z, t)
    packed = e.kept["native"][False]
    e.grad(z, t, some)
    room = e.kept["room"][1]
    e.grad(z, t)
    e.grad(z, t, some)
    assert e.kept["native"][False] is packed and e.kept["room"][1] is room
    e.grad(z[:2], t[:2], some[:2])
    assert e.kept["room"][1] is not room
