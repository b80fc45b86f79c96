"The comparison of two checkouts: what it measures runs, and how it sums rounds up. No time is judged"

from pathlib import Path

import against
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["chain", "mala", "images generator", "images layers"])
def test_what_is_measured_runs(name, monkeypatch):
    make, _ = against.WHAT[name]
    monkeypatch.setitem(against.WHAT, name, (make, 1))
    assert against.measure([name])[name] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step small", "step paper", "generate"])
def test_what_takes_longer_runs_too(name, monkeypatch):
    test_what_is_measured_runs(name, monkeypatch)


def test_ratio_of_neighbours():
    "The machine was slow in one round, for both"
    found = against.compared([1.0, 1.0, 9.0, 1.0], [2.0, 2.0, 18.0, 2.0])
    assert found == dict(old=1.0, new=2.0, ratio=2.0, q1=2.0, q3=2.0)
    assert "2.000" in against.table(dict(chain=found))
    assert against.compared([2.0], [1.0])["ratio"] == 0.5


@pytest.mark.parametrize("argv", [[], ["nowhere", str(ROOT)], [str(ROOT)], [str(ROOT), str(ROOT), "--only", "x"]])
def test_what_cannot_be_compared(argv, capsys):
    with pytest.raises(SystemExit):
        against.parse(argv)
    assert "usage" in capsys.readouterr().err


def test_names_are_found_on_any_page():
    assert against.ldebm.EnergyNet.__name__ == "EnergyNet"
    assert against.text.resolve.__module__.startswith("ldebm.text")
    with pytest.raises(AttributeError, match="no module"):
        against.ldebm.nothing_of_this_name
    with pytest.raises(AttributeError, match="defined in .*, "):
        against.ldebm.resolve
