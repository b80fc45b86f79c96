"`coverage_study`: models of the seed, and the record"

import json

import pytest
import torch

from ldebm.coverage_study import check_coverage, coverage_study, study_model, write_coverage
from ldebm.likelihood import NLLCfg

pytestmark = pytest.mark.usefixtures("in_test")


def test_study_over_a_few_models():
    seen = []
    out = coverage_study((14, 15, 28), NLLCfg(draws=64), n=20, each=seen.append)
    assert seen == out and sum(o["covered"] for o in out) >= 2 and max(o["width"] for o in out) < 0.3
    assert all(o["covered"] == (o["lower"] <= o["exact"] <= o["upper"]) and o["rate"] <= 30 for o in out)


def test_study_models_are_those_of_the_seed():
    (a, m, x), (b, n, y) = study_model(16, 10), study_model(16, 10)
    assert a == b and torch.equal(x, y) and torch.equal(m.W, n.W) and a["rate"] <= 30
    scales = {study_model(s, 5)[0]["scale"] for s in range(12)}
    assert scales - {0.05, 0.1, 0.15, 0.2}  # some were drawn again, with half the scale
    assert study_model(16, 10, most=5.0)[0]["rate"] <= 5


def test_record(tmp_path):
    write_coverage(tmp_path / "calibration-likelihood.json", (14,), NLLCfg(draws=8, top=64), n=4)
    rec = check_coverage(json.loads((tmp_path / "calibration-likelihood.json").read_text()))
    assert rec["calibration"] == "likelihood" and rec["cfg"]["draws"] == 8 and rec["models"][0]["seed"] == 14
    with pytest.raises(ValueError, match="contradicts itself"):
        check_coverage({**rec, "models": [{**rec["models"][0], "covered": not rec["models"][0]["covered"]}]})
    with pytest.raises(ValueError, match="lacks upper"):
        check_coverage({**rec, "models": [{k: v for k, v in rec["models"][0].items() if k != "upper"}]})
    with pytest.raises(ValueError, match="lacks cfg"):
        check_coverage({k: v for k, v in rec.items() if k != "cfg"})


def test_committed_record():
    from ldebm.records import results_root

    rec = check_coverage(json.loads((results_root() / "calibration" / "likelihood.json").read_text()))
    assert [o["seed"] for o in rec["models"]] == list(range(50)) and rec["n"] == 40
    assert (
        sum(o["covered"] for o in rec["models"]) >= 45
        and max(o["width"] for o in rec["models"]) <= 0.5
        and max(o["rate"] for o in rec["models"]) <= 30
    )
    for o in rec["models"][::10]:  # the settings are those that the seeds give today
        s, m, x = study_model(o["seed"], rec["n"])
        assert all(o[k] == s[k] for k in ("T", "d", "scale", "strength", "reference")) and m.nll(
            x
        ).mean().item() == pytest.approx(o["exact"], abs=1e-6)
