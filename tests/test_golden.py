"The numbers of the method, as they were stored: terms, gradients, chains, samples, likelihoods, in float64"

import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest

HERE = Path(__file__).resolve().parent


def computed(**environment):
    "In a process of its own: what switches compiled paths off is read once"
    env = {**os.environ, **golden.PLAIN, **environment}
    done = subprocess.run([sys.executable, HERE / "golden.py"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_method_gives_the_stored_numbers():
    found = golden.differences(computed(), json.loads(golden.STORED.read_text(encoding="utf-8")))
    assert not found, "\n".join(found)


def test_stored_numbers_are_finite_and_not_of_one_kind():
    "Or the comparison would see nothing"
    stored = json.loads(golden.STORED.read_text(encoding="utf-8"))
    values = [v for cases in stored.values() for numbers in cases.values() for v in numbers]
    assert len(values) > 3000
    assert sum(v == 0 for v in values) < 0.1 * len(values)
    for drift in ("", " drift"):
        accepted = stored[f"consistent gaussian{drift}, terms"]["terms accept"]
        assert min(accepted) < 0.85 < 0.95 < max(accepted)


@pytest.mark.parametrize("factor,found", [(1 + 1e-9, 0), (1 + 1e-4, 1)])
def test_a_difference_is_seen(factor, found):
    stored = {"a": {"x": [1.0, -2.0], "y": [3.0]}}
    moved = {"a": {"x": [1.0, -2.0 * factor], "y": [3.0]}}
    assert len(golden.differences(moved, stored)) == found
    assert len(golden.differences({"a": {"x": [1.0, -2.0]}}, stored)) == 1
    assert len(golden.differences({}, stored)) == 1
