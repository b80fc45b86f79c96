"Shared fixtures: real data when it is at hand, and a count of what was skipped for want of it"

import contextlib
import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))  # `import bench`, `import against`

importlib.import_module("ldebm.runners")  # As jobs do; LDEBM_RUNNERS=0 runs the suite on plain definitions

NO_DATA = "LDEBM_DATA is not set: no real data"


def pytest_configure(config):
    config.addinivalue_line("markers", "data: needs real data found through LDEBM_DATA")


@pytest.fixture
def ldebm_data():
    "Folder of real data named by `LDEBM_DATA`; the test is skipped (and counted) when it is not set"
    root = os.environ.get("LDEBM_DATA")
    if not root:
        pytest.skip(NO_DATA)
    assert Path(root).is_dir(), f"LDEBM_DATA names {root}, which is not a folder"
    return Path(root)


@pytest.fixture
def deadline():
    "`with deadline(seconds, what):` what waits longer is an error"

    @contextlib.contextmanager
    def within(seconds, what):
        def late(*args):
            raise TimeoutError(what)

        old = signal.signal(signal.SIGALRM, late)
        signal.alarm(seconds)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)

    return within


@pytest.fixture
def one_thread():
    "The number of threads changes the order of sums"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def in_test(monkeypatch, one_thread):
    "One thread, and no progress bars"
    monkeypatch.setenv("IN_TEST", "1")


def pytest_terminal_summary(terminalreporter):
    n = sum(NO_DATA in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    hint = " (set LDEBM_DATA to a folder with ptb/ and dailydialog/ to run them)" if n else ""
    terminalreporter.write_line(f"{n} tests skipped for want of data{hint}")
