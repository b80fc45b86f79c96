"The wheel: what it holds, and that it works where there is no checkout"

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
CAME_ALONG = [
    p.relative_to(ROOT) for pattern in ("nbs/train_*.ipynb", "models/*/*", "data/*/*") for p in ROOT.glob(pattern)
]


def call(*command, **how):
    res = subprocess.run([*map(str, command)], capture_output=True, text=True, **how)
    assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-2000:]
    return res.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, so that nothing is left in the checkout"
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "ldebm"
    for folder in ("ldebm", "nbs", "models", "data"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    call(*build, place / "out", copy)
    (found,) = (place / "out").glob("ldebm-*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel):
    "A fresh one that borrows this one's packages, but not its ldebm"
    env = wheel.parent.parent / "env"
    call(sys.executable, "-m", "venv", "--without-pip", env)
    site = Path(call(env / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        env / "bin" / "python",
        "install",
        "-q",
        "-I",
        "--no-deps",
        "--no-index",
        wheel,
    )
    return env / "bin"


@pytest.fixture
def outside(tmp_path):
    "How to call something in an empty folder, without the checkout on the path"
    drop = ("PYTHONPATH", "LDEBM_DATA")
    return dict(cwd=tmp_path, env={k: v for k, v in os.environ.items() if k not in drop})


def test_what_came_along_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as content:
        shared = {n.removeprefix("ldebm/share/"): n for n in content.namelist() if n.startswith("ldebm/share/")}
        assert set(shared) == {p.as_posix() for p in CAME_ALONG} and len(CAME_ALONG) > 20
        for path in CAME_ALONG:
            inside, here = content.read(shared[path.as_posix()]), (ROOT / path).read_bytes()
            if path.suffix != ".ipynb":
                assert inside == here, path
                continue
            cells = [json.loads(text)["cells"] for text in (inside, here)]
            assert [c["source"] for c in cells[0]] == [c["source"] for c in cells[1]], path
            assert not any(c.get("outputs") for c in cells[0])


def test_it_samples_outside_a_checkout(environment, outside):
    where = call(environment / "python", "-c", "import ldebm; print(ldebm.__file__)", **outside)
    assert Path(where.strip()).is_relative_to(environment.parent)
    here = call(sys.executable, "-m", "ldebm.command", "sample", "-n", "3", cwd=ROOT)
    assert call(environment / "ldebm", "sample", "-n", "3", **outside) == here and len(here.splitlines()) == 3


def test_its_jobs_run_outside_a_checkout(environment, outside):
    about = call(environment / "ldebm", "train", "toy2d", "--parameters", **outside)
    assert "| density |" in about
    call(environment / "ldebm", "train", "semisup", "-p", "steps", "2", "-p", "systems", "logistic", **outside)
    folder = outside["cwd"] / "runs" / "labels-grammar-quick-consistent"
    assert (folder / "train_semisup.ipynb").exists()
    assert "logistic+n10-grammar" in call(environment / "ldebm", "runs", **outside)


def test_a_build_in_place_copies_nothing(tmp_path):
    "`pip install -e .` leaves what came along beside the package"
    copy = tmp_path / "ldebm"
    shutil.copytree(ROOT / "ldebm", copy / "ldebm", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy / file)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-e",
        copy,
    ]
    call(*command, "--target", tmp_path / "site")
    assert not (copy / "ldebm" / "share").exists()
