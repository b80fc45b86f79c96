"What `.ci/run` asks of its short runs: a run that has learnt passes, one that has not is named"

import json
from pathlib import Path

import check_runs
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent

TEXT = dict(recon_nll=20.0, nll_valid=25.0, exact_gap=8.0, rppl=30.0, rppl_floor=10.0)
DIGITS = dict(frechet=5.0, frechet_recon=2.0, frechet_gaussian=9.0)


def record(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(metrics={k: dict(value=v) for k, v in values.items()})
    (folder / "result.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changed,said",
    [
        ({}, None),
        (dict(recon_nll=None), "not computed"),
        (dict(recon_nll=float("nan")), "guessing"),
        (dict(recon_nll=1e4), "guessing"),
        (dict(exact_gap=-0.1), "cannot be below"),
        (dict(nll_valid=1e4), "guessing"),
        (dict(rppl=9.0), "reverse perplexity"),
        (dict(rppl_floor=0.5), "reverse perplexity"),
    ],
)
def test_text(tmp_path, changed, said):
    record(tmp_path, {**TEXT, **changed})
    if said is None:
        assert "20.00 nats" in check_runs.check_text(tmp_path)
    else:
        with pytest.raises(AssertionError, match=said):
            check_runs.check_text(tmp_path)


@pytest.mark.parametrize(
    "changed,said",
    [({}, None), (dict(frechet_recon=9.5), "reconstructions"), (dict(frechet=8.9), "the energies did not help")],
)
def test_digits(tmp_path, changed, said):
    record(tmp_path / "ldebm", {**DIGITS, **changed})
    if said is None:
        assert "Frechet distance 5.0" in check_runs.check_digits(tmp_path)
    else:
        with pytest.raises(AssertionError, match=said):
            check_runs.check_digits(tmp_path)


def test_hooks_before_a_commit_are_local():
    "No hook loads anything: they are the commands that `make lint` and `make prepare` run"
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [r["repo"] for r in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert all(h["language"] == "system" for h in hooks)
    entries = " ".join(h["entry"] for h in hooks)
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("ruff check", "ruff format", "nbdev_clean", "nbdev_export", "write_readme"):
        assert command in entries, command
        assert command.split()[-1] in make, command
