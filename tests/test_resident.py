"The kernel for whole chains, on a processor (a fibre for every thread of a cluster) and, where there is one, on a GPU"

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chains import PUBLISHED, SMALL, energy, problem
from torch.testing import assert_close

from ldebm.langevin import mala_resident, mala_states, tilt_resident, tilt_states
from ldebm.native import compiler, compiler_version
from ldebm.resident import CLUSTER, source, why_not
from ldebm.whole_chains import Sizes

FIBRES = Path(__file__).with_name("fibres.cpp")
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="no GPU with clusters of sixteen blocks",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "Starts the kernel on fibres"
    if not compiler_version() or sys.platform != "linux":
        pytest.skip("no C++ compiler, or no ucontext")
    folder, built = tmp_path_factory.mktemp("fibres"), {}

    def go(sizes, tensors, numbers, seed=0, instead=None):  # `instead`: a part of the source, and what to put there
        key = sizes, instead
        if key not in built:
            there, code = folder / f"{len(built)}", source(sizes, "")
            if instead:
                assert code.count(instead[0]) == 1
                code = code.replace(*instead)
            there.with_suffix(".cu").write_text(code)
            got = subprocess.run(
                [
                    *compiler(),
                    "-O1",
                    "-U_FORTIFY_SOURCE",
                    "-std=c++17",
                    "-shared",
                    "-fPIC",
                    f'-DKERNEL_SOURCE="{there.with_suffix(".cu")}"',
                    str(FIBRES),
                    "-o",
                    str(there.with_suffix(".so")),
                ],
                capture_output=True,
                text=True,
            )
            assert got.returncode == 0, got.stderr
            built[key] = ctypes.CDLL(str(there.with_suffix(".so")))
        where = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
        assert built[key].run(where, *numbers[:3], ctypes.c_float(numbers[3]), seed) == 0, (
            "a wait that not everyone comes to"
        )

    return go


@pytest.mark.parametrize("sizes", SMALL)
@pytest.mark.parametrize("rho, drift", [(None, math.inf), (0.8, math.inf), (0.8, 0.3)])
def test_unadjusted_chains_end_where_the_plain_ones_do(start, sizes, rho, drift):
    e = energy(sizes)
    args, noise, _ = problem(sizes, 21, 4)
    s2 = 0.1 * args["v"] if rho is None else None
    want, first = tilt_states(e, **args, s2=s2, noise=noise, n_steps=4, rho=rho, drift=drift)
    got, too = tilt_resident(e, **args, s2=s2, noise=noise, rho=rho, drift=drift, start=start)
    assert (want - args["z"]).abs().mean() > 0.1, "they went somewhere"
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert first == too == 5


@pytest.mark.parametrize("sizes", SMALL)
@pytest.mark.parametrize("drift", [math.inf, 0.5])
def test_chains_with_a_metropolis_test_end_where_the_plain_ones_do(start, sizes, drift):
    e = energy(sizes, steep=8.0)
    args, noise, uniform = problem(sizes, 21, 6)
    want, total, first = mala_states(e, **args, noise=noise, uniform=uniform, n_steps=6, rho=0.5, drift=drift)
    got, share, too = mala_resident(e, **args, noise=noise, uniform=uniform, rho=0.5, drift=drift, start=start)
    assert 0.05 < total.mean() / 6 < 0.95, "some proposals are refused, some are not"
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert_close(share, total, rtol=1e-3, atol=1e-4)
    assert first == too


def test_a_context_is_part_of_what_stays_the_same(start):
    e = energy(SMALL[0], context=4)
    args, noise, _ = problem(SMALL[0], CLUSTER, 3, context=4)
    want, _ = tilt_states(e, **args, s2=None, noise=noise, n_steps=3, rho=0.8, drift=math.inf)
    got, _ = tilt_resident(e, **args, s2=None, noise=noise, rho=0.8, drift=math.inf, start=start)
    assert_close(got, want, rtol=1e-4, atol=1e-5)


def ends(start, sizes, n, seeds, instead=None):
    e = energy(sizes, steep=8.0)
    args, noise, uniform = problem(sizes, 5, n)
    return [
        mala_resident(
            e,
            **args,
            noise=noise,
            uniform=uniform,
            rho=0.5,
            drift=0.5,
            start=lambda *a, seed=seed: start(*a, seed=seed, instead=instead),
        )[0]
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("sizes", SMALL)
def test_the_order_of_threads_between_waits_does_not_matter(start, sizes):
    first, *others = ends(start, sizes, 3, 4)
    assert all(torch.equal(first, x) for x in others)


@pytest.mark.parametrize(
    "instead",
    [
        ("p ^= 1; return sum", "return sum"),
        ("l--, q ^= 1", "l--"),
        ("cluster_sync();\n        // down", "block_sync();\n        // down"),
        ("block_sync();\n        float sum = 0.f;\n        if (tid < S*C)", "float sum = 0.f;\n        if (tid < S*C)"),
    ],
)
def test_without_a_wait_or_a_second_buffer_the_order_would_matter(start, instead):
    right = ends(start, SMALL[0], 3, 1)[0]
    wrong = ends(start, SMALL[0], 3, 3, instead)
    assert any(not torch.equal(right, x) for x in wrong), "fibres have to find such an error, or they show nothing"


@pytest.mark.parametrize(
    "sizes, B",
    [(Sizes(1, 4, 1, 0), 1), (Sizes(256, 256, 3, 0), 17), (Sizes(2, 36, 300, 1), 16), (Sizes(3, 8, 2, 29), 5)],
)
def test_shapes_at_the_limits(start, sizes, B):
    e = energy(sizes)
    args, noise, _ = problem(sizes, B, 1)
    with torch.no_grad():
        for W, _ in (e.w.z1, e.w.z2, *e.w.blocks):
            W.div_(max(1.0, len(W) / 24))
    e = type(e)(e.net, e.w)
    want, first = tilt_states(e, **args, s2=None, noise=noise, n_steps=1, rho=0.8, drift=math.inf)
    got, too = tilt_resident(e, **args, s2=None, noise=noise, rho=0.8, drift=math.inf, start=start)
    assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert first == too == 2


@pytest.mark.parametrize("n", [0, 1])
def test_chains_of_no_update_and_of_one(start, n):
    e = energy(SMALL[0])
    args, noise, uniform = problem(SMALL[0], 3, n)
    want, first = tilt_states(e, **args, s2=None, noise=noise, n_steps=n, rho=0.8, drift=math.inf)
    got, too = tilt_resident(e, **args, s2=None, noise=noise, rho=0.8, drift=math.inf, start=start)
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert first == too == n + 1
    want, total, first = mala_states(e, **args, noise=noise, uniform=uniform, n_steps=n, rho=0.8, drift=math.inf)
    got, share, too = mala_resident(e, **args, noise=noise, uniform=uniform, rho=0.8, drift=math.inf, start=start)
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert_close(share, total, rtol=1e-3, atol=1e-4)
    assert first == too == n + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_found_at_the_same_update(start, bad):
    e = energy(SMALL[0])
    args, noise, uniform = problem(SMALL[0], 5, 4)
    noise[2, 3, 1] = bad
    first = [
        f(e, **args, s2=None, noise=noise, rho=0.8, drift=math.inf, **kw)[1]
        for f, kw in ((tilt_states, dict(n_steps=4)), (tilt_resident, dict(start=start)))
    ]
    assert first[0] == first[1] == 3
    first = [
        f(e, **args, noise=noise, uniform=uniform, rho=0.8, drift=math.inf, **kw)[2]
        for f, kw in ((mala_states, dict(n_steps=4)), (mala_resident, dict(start=start)))
    ]
    assert first[0] == first[1] == 3


def test_other_energies_and_machines_go_another_way(monkeypatch):
    e = energy(SMALL[0])
    z = torch.zeros(3, 6)
    assert e.sizes() == SMALL[0] and why_not(e.sizes(), z) == "latents are not on a GPU"
    e.net.groups = (2, 3)
    assert e.sizes() is None and "not a network" in why_not(e.sizes(), z)
    monkeypatch.setenv("LDEBM_RESIDENT", "0")
    assert why_not(SMALL[0], z) == "LDEBM_RESIDENT=0"
    monkeypatch.setenv("LDEBM_RESIDENT", "yes")
    with pytest.raises(ValueError, match="LDEBM_RESIDENT must be"):
        why_not(SMALL[0], z)


@on_gpu
@pytest.mark.parametrize("B", [128, 21])
@pytest.mark.parametrize("sizes", [PUBLISHED, *SMALL])
def test_on_a_gpu_chains_end_where_the_plain_ones_do(sizes, B):
    e = energy(sizes, steep=3.0, device="cuda")
    args, noise, uniform = problem(sizes, B, 8, device="cuda")
    assert why_not(e.sizes(), args["z"]) == ""
    want, first = tilt_states(e, **args, s2=None, noise=noise, n_steps=8, rho=0.8, drift=0.5)
    got, too = tilt_resident(e, **args, s2=None, noise=noise, rho=0.8, drift=0.5)
    assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert first == too == 9
    want, total, _ = mala_states(e, **args, noise=noise, uniform=uniform, n_steps=8, rho=0.5, drift=math.inf)
    got, share, _ = mala_resident(e, **args, noise=noise, uniform=uniform, rho=0.5, drift=math.inf)
    same = (got - want).abs().amax(1) < 1e-3
    assert same.float().mean() > 0.97, "a proposal at the edge may fall to either side, by rounding"
    assert_close(share[same], total[same], rtol=1e-2, atol=1e-3)


@on_gpu
def test_on_a_gpu_a_chain_repeats_itself_and_goes_into_recordings():
    e = energy(PUBLISHED, device="cuda")
    args, noise, uniform = problem(PUBLISHED, 128, 20, device="cuda")

    def run():
        return mala_resident(e, **args, noise=noise, uniform=uniform, rho=0.8, drift=math.inf)[0]

    want = run()
    assert torch.equal(want, run())
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(want, out)
