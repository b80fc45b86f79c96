"Whole chains in compiled code, on a CPU"

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from chains import (
    PUBLISHED,
    SMALL,
    counted_calls,
    energy,
    gen,
    plain_updates,
    problem,
    step_of,
    tame,
    whole_updates,
    with_runners,
)
from torch.testing import assert_close

from ldebm import langevin, native, whole_chains
from ldebm.energy import EnergyNet, Frozen, energy_grad
from ldebm.langevin import chain, preconditioned
from ldebm.levels import PriorCfg
from ldebm.native import FLAGS, compiled, launch_native, native_grad, no_program, program, why_not
from ldebm.prior import DiffusionEBM
from ldebm.schedule import make_schedule
from ldebm.whole_chains import Sizes, merged_share, packed, read_source, sizes_of

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


def native_updates(level, step, z, noise, uniform=None, **kwargs):
    "States, summed acceptance and first bad update, as `native_chain` starts them"
    e = level.energy
    how = dict(symbols=level.y, half=e.precision is not None, cache=e.cache.setdefault("native", {}))
    return whole_updates(launch_native, level, step, z, noise, uniform, **{**how, **kwargs})


def rounded(level):
    "The same with products in bfloat16"
    e = level.energy
    return replace(level, energy=Frozen(e.energy, e.weights, torch.bfloat16))


def two_chains(level, z, n, gen_of=gen):
    "Ends of a chain without a Metropolis test; ends and acceptance of one with it"
    step = step_of(level)
    plain = chain(level, step, z, n, metropolis=False, gen=gen_of(3))[0]
    return plain, *chain(level, step, z, n, gen=gen_of(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", ODD)
@pytest.mark.parametrize("rho, drift", [(None, math.inf), (0.8, math.inf), (0.8, 0.3)])
def test_unadjusted_chains_end_where_the_plain_ones_do(dtype, sizes, rho, drift):
    needs(dtype)
    level, z, noise, _ = problem(tame(energy(sizes, dtype=dtype)), 21, 4)
    step = step_of(level, rho, longest=drift)
    want, _, first = plain_updates(level, step, z, noise)
    got, _, too = native_updates(level, step, z, noise)
    assert (want - z).abs().mean() > 0.1, "they went somewhere"
    assert_close(got, want, **TIGHT[dtype])
    assert first == too == 5


@pytest.mark.parametrize("sizes", SMALL)
@pytest.mark.parametrize("drift", [math.inf, 0.5])
def test_chains_with_a_metropolis_test_end_where_the_plain_ones_do(sizes, drift):
    needs(torch.float64)
    level, *given = problem(energy(sizes, steep=8.0, dtype=torch.float64), 67, 6)
    step = step_of(level, 0.5, longest=drift)
    want, total, first = plain_updates(level, step, *given)
    got, share, too = native_updates(level, step, *given)
    assert 0.05 < total.mean() / 6 < 0.95, "some proposals are refused, some are not"
    assert_close(got, want, rtol=1e-10, atol=1e-11)
    assert_close(share, total, rtol=1e-8, atol=1e-9)
    assert first == too


def test_at_published_size_in_double_precision():
    needs(torch.float64)
    level, z, noise, _ = problem(tame(energy(PUBLISHED, dtype=torch.float64)), 128, 50)
    given = level, step_of(level), z, noise
    assert_close(native_updates(*given)[0], plain_updates(*given)[0], rtol=1e-10, atol=1e-11)


def test_a_context_is_part_of_what_stays_the_same():
    needs()
    level, z, noise, _ = problem(energy(SMALL[0], context=4), 16, 3)
    step = step_of(level)
    want = plain_updates(level, step, z, noise)[0]
    assert_close(native_updates(level, step, z, noise)[0], want, **TIGHT[torch.float32])
    other = native_updates(replace(level, context=level.context + 1), step, z, noise)[0]
    assert (other - want).abs().max() > 1e-3


@pytest.mark.parametrize("half", [False, True])
def test_a_chain_ends_at_the_same_number_whatever_the_threads_and_its_company(half):
    needs(half=half)
    level, z, noise, uniform = problem(energy(SMALL[0], steep=4.0), 203, 3)
    n = torch.get_num_threads()
    found = []
    if half:
        level = rounded(level)

    def run(rows):
        some = {k: getattr(level, k)[rows] for k in ("t", "mean", "variance", "temperature")}
        part = replace(level, **some)
        return native_updates(part, step_of(part, longest=0.5), z[rows], noise[:, rows], uniform[:, rows])[0]

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
    level, z, noise, _ = problem(energy(SMALL[0]), 40, 3)
    n = torch.get_num_threads()

    def run():
        return native_updates(level, step_of(level), z, noise)[0]

    try:
        torch.set_num_threads(2)
        want = run()
        monkeypatch.setattr(native, "pool", native.ctypes.c_void_p)
        assert torch.equal(run(), want)
    finally:
        torch.set_num_threads(n)


def test_products_in_bfloat16_are_as_near_as_bfloat16_is():
    needs(half=True)
    level, z, noise, _ = problem(tame(energy(PUBLISHED)), 50, 20)
    step, half = step_of(level), rounded(level)
    exact = plain_updates(level, step, z, noise)[0]
    there = (plain_updates(half, step, z, noise)[0] - exact).norm()
    here = (native_updates(half, step, z, noise)[0] - exact).norm()
    assert 0 < here < 1.2 * there, "sums and residual stream are in single precision: no worse than PyTorch's"
    assert here < 5e-3 * (exact - z).norm()


def test_narrower_registers_give_the_same(tmp_path):
    needs()
    flags = ("-O3", "-mavx2", "-mfma", *(f for f in FLAGS if not f.startswith(("-O", "-march"))))
    level, z, noise, _ = problem(energy(SMALL[2]), 21, 4)
    given = level, step_of(level, longest=0.3), z, noise
    narrow = program.__wrapped__(torch.float32, flags=flags, folder=tmp_path)
    assert_close(native_updates(*given, lib=narrow)[0], plain_updates(*given)[0], **TIGHT[torch.float32])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_found_at_the_same_update(bad):
    needs()
    level, z, noise, uniform = problem(energy(SMALL[0]), 5, 4)
    noise[2, 3, 1] = bad
    for test in (None, uniform):
        first = [f(level, step_of(level), z, noise, test)[2] for f in (plain_updates, native_updates)]
        assert first[0] == first[1] == 3


@with_runners
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_seed_gives_the_same_numbers_either_way(dtype, n, monkeypatch):
    needs(dtype)
    level, z, *_ = problem(energy(SMALL[0], dtype=dtype), 13, 1)

    def run():
        g = gen(3)
        return *two_chains(level, z, n, lambda seed: g), g.get_state()

    with counted_calls((whole_chains, "run_chains")) as calls:
        found = both(run, monkeypatch)
    assert len(calls) == (2 if n else 0), "compiled code where there is an update, nothing of it with LDEBM_RESIDENT=0"
    for x, y in zip(*found, strict=True):
        assert_close(x, y, **(TIGHT[dtype] if x.is_floating_point() else dict(rtol=0, atol=0)))


@with_runners
def test_samples_of_a_prior_and_its_products_in_autocast(monkeypatch):
    needs(half=True)
    net = EnergyNet(6, 5, 3, hidden=24, n_blocks=2, init=0.3, gen=gen(1))
    kinds = []
    monkeypatch.setattr(
        native, "launch_native", lambda *a, half, **kw: kinds.append(half) or launch_native(*a, half=half, **kw)
    )
    monkeypatch.setattr(langevin, "energy_grad", None)
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
    assert sizes_of(e) == SMALL[0]
    e.energy.groups = (2, 3)
    assert sizes_of(e) is None
    e.energy.groups, e.energy.symbol_temperature = None, 2.0
    assert sizes_of(e) is None
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


@with_runners
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
    level, z, *_ = problem(energy(SMALL[0]), 5, 1)

    def run():
        return chain(level, step_of(level), z, 3, metropolis=False, gen=gen(3))[0]

    with pytest.warns(UserWarning, match=f"(?s)product by product.*{said}.*LDEBM_RESIDENT=0"):
        got = run()
    monkeypatch.setenv("LDEBM_RESIDENT", "0")
    assert torch.equal(got, run())
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
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
    monkeypatch.setattr(native, "read_source", lambda name: read_source(name) + "// another")
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
    got = run(read_source("native.cpp") + Path(__file__).with_name("shapes.cpp").read_text())
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
        dict(temperature=torch.full((1, 1), 0.7)),
        dict(variance=torch.full((1, 1), 0.3)),
        dict(mean=torch.full((1, 6), 0.2)),
        dict(mean=torch.full((6,), 0.2)),
        dict(t=torch.ones(1, dtype=torch.long)),
    ],
)
def test_what_is_the_same_for_all_chains_may_be_given_once(wide, monkeypatch):
    needs()
    level, z, *_ = problem(energy(SMALL[0]), 9, 1)
    level = replace(level, **wide)
    want, got = both(lambda: two_chains(level, z, 3), monkeypatch)
    for a, b in zip(want, got, strict=True):
        assert_close(a.float(), b, **TIGHT[torch.float32])


def test_contexts_and_chains_under_autocast(monkeypatch):
    needs(half=True)
    level, z, *_ = problem(energy(SMALL[0], context=4), 9, 1)
    half = rounded(level)
    for asked in (level, half, replace(half, context=half.context.bfloat16())):

        def run(asked=asked):
            with torch.autocast("cpu", torch.bfloat16, enabled=asked is not level):
                return chain(asked, step_of(asked), z, 3, metropolis=False, gen=gen(3))[0]

        want, got = both(run, monkeypatch)
        assert got.dtype == torch.float32 and (want - got).abs().max() < 0.05


@pytest.mark.parametrize("half", [False, True])
def test_a_chain_that_is_lost_takes_no_other_along(half):
    "Slabs follow each other through the same memory, whose rows are wider than a latent"
    needs(half=half)
    level, z, noise, uniform = problem(energy(SMALL[1]), 130, 6)
    step, n = step_of(level), torch.get_num_threads()
    if half:
        level = rounded(level)
    lost, start = noise.clone(), z.clone()
    lost[2, 0] = start[0] = math.nan
    try:
        torch.set_num_threads(1)
        right, wrong = (native_updates(level, step, z, x) for x in (noise, lost))
        assert wrong[0][0].isnan().all() and torch.equal(right[0][1:], wrong[0][1:]) and wrong[2] == 3
        right, wrong = (native_updates(level, step, x, noise, uniform) for x in (z, start))
        assert torch.equal(right[0][1:], wrong[0][1:]) and torch.equal(right[1][1:], wrong[1][1:]) and wrong[2] == 0
    finally:
        torch.set_num_threads(n)


@with_runners
@pytest.mark.parametrize("most", [1, 3 * 9 * 6 * 4, 10**9])
def test_a_long_chain_goes_in_stretches(most, monkeypatch):
    needs()
    level, z, *_ = problem(energy(SMALL[0], steep=4.0), 9, 1)
    calls, run, draw = [], whole_chains.run_chains, whole_chains.randn_like

    def counting(sizes, arrays, *a, **kw):
        calls.append(len(arrays.noise))
        return run(sizes, arrays, *a, **kw)

    want = two_chains(level, z, 7)
    monkeypatch.setattr(whole_chains, "_MOST_NOISE", most)
    monkeypatch.setattr(whole_chains, "run_chains", counting)
    got = two_chains(level, z, 7)
    assert calls == 2 * {1: 7 * [1], 10**9: [7]}.get(most, [3, 3, 1])
    for a, b in zip(want, got, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-6)
    for metropolis in (False, True):
        bad = iter([0, 0, 0, 0, math.nan, *9 * [0]])
        monkeypatch.setattr(whole_chains, "randn_like", lambda x, g, bad=bad: draw(x, g) + next(bad))
        with pytest.raises(FloatingPointError, match="at Langevin step 5 of 7"):
            chain(level, step_of(level), z, 7, metropolis=metropolis, gen=gen(3))


def test_weights_are_laid_out_once_for_an_energy(monkeypatch):
    needs(half=True)
    laid_out, lib = [], program(torch.float32)

    class Counting:
        def __getattr__(self, name):
            return (lambda *a: laid_out.append(1) or lib.pack(*a)) if name == "pack" else getattr(lib, name)

    monkeypatch.setattr(native, "program", lambda dtype, half: Counting())
    level, z, noise, _ = problem(energy(SMALL[0]), 5, 2)
    other = replace(level, energy=energy(SMALL[0], steep=3.0))
    a, b, c = (native_updates(asked, step_of(asked), z, noise)[0] for asked in (level, level, other))
    assert torch.equal(a, b) and not torch.equal(a, c) and len(laid_out) == 2


@with_runners
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_symbols_that_are_asked_for(dtype, monkeypatch):
    needs(dtype)

    def ends(level, z):
        return chain(level, step_of(level), z, 4, metropolis=False, gen=gen(3))[0]

    with counted_calls((whole_chains, "run_chains")) as calls:
        for sizes in SMALL:
            level, z, *_ = problem(energy(sizes, steep=4.0, dtype=dtype), 71, 1)
            level.y = torch.arange(71) % sizes.n_symbols
            want, got = both(lambda level=level, z=z: two_chains(level, z, 4), monkeypatch)
            for a, b in zip(want, got, strict=True):
                assert_close(a, b, **TIGHT[dtype])
            if sizes.n_symbols > 1:
                assert (ends(replace(level, y=level.y.flip(0)), z) - got[0]).abs().max() > 1e-3
        n = len(calls)
        assert n == 3 * 2 + 2
        ends(replace(level, y=torch.ones(71, sizes.n_symbols, dtype=torch.bool)), z)
        assert len(calls) == n, "sets of symbols go another way"
    for wrong in (level.y[:5], level.y + 1000, -1 - level.y):
        with pytest.raises((ValueError, RuntimeError), match="symbols must be|expand"):
            ends(replace(level, y=wrong), z)
    with pytest.raises(ValueError, match="from 0 to 36; got torch.int64, cpu, .71,., from 1000 to 1036"):
        ends(replace(level, y=level.y + 1000), z)


def test_symbols_with_products_in_bfloat16():
    needs(half=True)
    level, z, noise, _ = problem(tame(energy(PUBLISHED)), 50, 20)
    level.y = torch.arange(50) % 20
    step, half = step_of(level), rounded(level)
    exact = plain_updates(level, step, z, noise)[0]
    there, here, without = (
        (x - exact).norm()
        for x in (
            plain_updates(half, step, z, noise)[0],
            native_updates(half, step, z, noise)[0],
            native_updates(replace(half, y=None), step, z, noise)[0],
        )
    )
    assert 0 < here < 1.2 * there and here < 0.1 * without


@with_runners
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", ODD)
def test_one_gradient_is_that_of_autograd(dtype, sizes, monkeypatch):
    needs(dtype)
    e = tame(energy(sizes, context=3, dtype=dtype))
    level, z, *_ = problem(e, 70, 1)
    t, context = level.t, level.context
    with counted_calls((native, "gradient_native")) as calls:
        for y in (None, torch.arange(70) % sizes.n_symbols):
            want = energy_grad.plain(lambda z, t, y, context: e.energy(z, t, y, context), z, t, y, context)
            for x in (z, z, z.T.contiguous().T):  # the second time with what the first has kept
                F, g = energy_grad(e, x, t, y, context)
                assert_close(F, want[0], **TIGHT[dtype])
                assert_close(g, want[1], **TIGHT[dtype])
        assert len(calls) == 6
        assert energy_grad(e, z[:0], t[:0], context=context[:0])[1].shape == (0, sizes.d)
        for wrong, said in ((dict(y=torch.full((70,), sizes.n_symbols)), "symbols"), (dict(z=z[:, :-1]), "z")):
            with pytest.raises(ValueError, match=f"{said} must be"):
                energy_grad(e, **{**dict(z=z, t=t, context=context), **wrong})
        with pytest.raises(ValueError, match="base must be"):
            native.gradient_native(sizes_of(e), packed(e), z.new_zeros(70, 1), z)
        monkeypatch.setenv("LDEBM_RESIDENT", "0")
        energy_grad(e, z, t, context=context)
        assert len(calls) == 9


@with_runners
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_one_gradient_of_unusual_tensors(monkeypatch):
    needs(half=True)
    e = energy(SMALL[0], context=4)
    level, z, *_ = problem(e, 9, 1)
    t, c = level.t, level.context
    F, g = native_grad(e, z, t, context=c)
    for x in (torch._neg_view(-z), torch.stack([z, z], 2)[:, :, 0]):
        for a, b in zip(energy_grad(e, x, t, context=c), (F, g), strict=True):
            assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(energy_grad(e, z, t, context=c)[1], g)
    share, weights = merged_share(e, t, c, 9, z.dtype), packed(e)
    for wrong in (weights[:-1], weights.double(), weights[None]):
        with pytest.raises(ValueError, match="weights must be"):
            native.gradient_native(sizes_of(e), wrong, share, z)
    every_second = torch.stack([weights, weights], 1)[:, 0]
    assert torch.equal(native.gradient_native(sizes_of(e), every_second, share, z)[1], g)
    monkeypatch.setattr(native, "gradient_native", None)
    in_half = energy_grad(Frozen(e.energy, e.weights, torch.bfloat16), z, t, context=c)
    assert in_half[1].isfinite().all(), "in half precision product by product"
    with fwAD.dual_level():  # compiled code would not see a tangent
        dual = fwAD.make_dual(z, torch.ones_like(z))
        for a, b in zip(energy_grad(e, dual, t, context=c), energy_grad.plain(e, z, t, context=c), strict=True):
            assert torch.equal(a, b)
        assert not native.has_native_chain(level, preconditioned(level), dual, 3)
    assert native.has_native_chain(level, preconditioned(level), z, 3)


@with_runners
def test_rooms_and_weights_are_kept_apart():
    needs()
    e = energy(SMALL[0])
    z, t = torch.zeros(3, 6), torch.zeros(3, dtype=torch.long)
    some = torch.ones(3, 5, dtype=torch.bool)
    energy_grad(e, z, t)
    laid_out = e.cache["native"][False]
    energy_grad(e, z, t, some)
    workspace = e.cache["closed_form"].workspace[1]
    energy_grad(e, z, t)
    energy_grad(e, z, t, some)
    assert e.cache["native"][False] is laid_out and e.cache["closed_form"].workspace[1] is workspace
    energy_grad(e, z[:2], t[:2], some[:2])
    assert e.cache["closed_form"].workspace[1] is not workspace
