"The kernel for whole chains, on a processor (a fibre for every thread of a cluster) and, where there is one, on a GPU"

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chains import PUBLISHED, SMALL, energy, plain_updates, problem, step_of, tame, whole_updates
from torch.testing import assert_close

from ldebm.native import compiler, compiler_version
from ldebm.resident import CLUSTER, launch, source, why_not
from ldebm.whole_chains import Sizes, sizes_of

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
    level, z, noise, _ = problem(energy(sizes), 21, 4)
    step = step_of(level, rho, longest=drift)
    want, _, first = plain_updates(level, step, z, noise)
    got, _, too = whole_updates(start, level, step, z, noise)
    assert (want - z).abs().mean() > 0.1, "they went somewhere"
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert first == too == 5


@pytest.mark.parametrize("sizes", SMALL)
@pytest.mark.parametrize("drift", [math.inf, 0.5])
def test_chains_with_a_metropolis_test_end_where_the_plain_ones_do(start, sizes, drift):
    level, *given = problem(energy(sizes, steep=8.0), 21, 6)
    step = step_of(level, 0.5, longest=drift)
    want, total, first = plain_updates(level, step, *given)
    got, share, too = whole_updates(start, level, step, *given)
    assert 0.05 < total.mean() / 6 < 0.95, "some proposals are refused, some are not"
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert_close(share, total, rtol=1e-3, atol=1e-4)
    assert first == too


def test_a_context_is_part_of_what_stays_the_same(start):
    level, z, noise, _ = problem(energy(SMALL[0], context=4), CLUSTER, 3)
    given = level, step_of(level), z, noise
    assert_close(whole_updates(start, *given)[0], plain_updates(*given)[0], rtol=1e-4, atol=1e-5)


def ends(start, sizes, n, seeds, instead=None):
    level, *given = problem(energy(sizes, steep=8.0), 5, n)
    step = step_of(level, 0.5, longest=0.5)
    return [whole_updates(start, level, step, *given, seed=seed, instead=instead)[0] for seed in range(seeds)]


@pytest.mark.parametrize("sizes", SMALL)
def test_the_order_of_threads_between_waits_does_not_matter(start, sizes):
    first, *others = ends(start, sizes, 3, 4)
    assert all(torch.equal(first, x) for x in others)


@pytest.mark.parametrize(
    "instead",
    [
        ("p ^= 1;\n            return sum", "return sum"),
        ("l--, q ^= 1", "l--"),
        ("cluster_sync();\n        // down", "block_sync();\n        // down"),
        (
            "block_sync();\n        float sum = 0.f;\n        if (tid < S * C)",
            "float sum = 0.f;\n        if (tid < S * C)",
        ),
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
    level, z, noise, _ = problem(tame(energy(sizes)), B, 1)
    given = level, step_of(level), z, noise
    want, _, first = plain_updates(*given)
    got, _, too = whole_updates(start, *given)
    assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert first == too == 2


@pytest.mark.parametrize("n", [0, 1])
def test_chains_of_no_update_and_of_one(start, n):
    level, z, noise, uniform = problem(energy(SMALL[0]), 3, n)
    for test in (None, uniform):
        want, total, first = plain_updates(level, step_of(level), z, noise, test)
        got, share, too = whole_updates(start, level, step_of(level), z, noise, test)
        assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert_close(share, total, rtol=1e-3, atol=1e-4)
        assert first == too == n + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_found_at_the_same_update(start, bad):
    level, z, noise, uniform = problem(energy(SMALL[0]), 5, 4)
    noise[2, 3, 1] = bad
    for test in (None, uniform):
        given = level, step_of(level), z, noise, test
        assert plain_updates(*given)[2] == whole_updates(start, *given)[2] == 3


def test_other_energies_and_machines_go_another_way(monkeypatch):
    e = energy(SMALL[0])
    z = torch.zeros(3, 6)
    assert sizes_of(e) == SMALL[0] and why_not(sizes_of(e), z) == "latents are not on a GPU"
    e.energy.groups = (2, 3)
    assert sizes_of(e) is None and "not a network" in why_not(sizes_of(e), z)
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
    level, z, noise, uniform = problem(e, B, 8)
    assert why_not(sizes_of(e), z) == ""
    step = step_of(level, longest=0.5)
    want, _, first = plain_updates(level, step, z, noise)
    got, _, too = whole_updates(launch, level, step, z, noise)
    assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert first == too == 9
    step = step_of(level, 0.5)
    want, total, _ = plain_updates(level, step, z, noise, uniform)
    got, share, _ = whole_updates(launch, level, step, z, noise, uniform)
    same = (got - want).abs().amax(1) < 1e-3
    assert same.float().mean() > 0.97, "a proposal at the edge may fall to either side, by rounding"
    assert_close(share[same], total[same], rtol=1e-2, atol=1e-3)


@on_gpu
def test_on_a_gpu_a_chain_repeats_itself_and_goes_into_recordings():
    level, *given = problem(energy(PUBLISHED, device="cuda"), 128, 20)

    def run():
        return whole_updates(launch, level, step_of(level), *given)[0]

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
