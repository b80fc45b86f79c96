"A run's folder has one owner at a time: other processes, killed ones, machines, file systems without locks, launchers"

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ldebm import records, sweep
from ldebm.core import exclusive
from ldebm.image_job import ImageJob
from ldebm.image_job import open_job as open_image
from ldebm.records import FolderInUse, Run
from ldebm.text_job import open_job as open_text
from ldebm.text_settings import TextJob
from ldebm.toy_job import ToyJob
from ldebm.toy_job import open_job as open_toy

pytestmark = [
    pytest.mark.usefixtures("in_test"),
    pytest.mark.skipif(os.name != "posix", reason="signals and locks as on Unix"),
]
ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from ldebm.records import Run
run = Run(sys.argv[1], {'a': 1})
print('mine', flush=True)
time.sleep(300)
"""
TRY = """
import sys
from ldebm.records import Run, _FolderLock
_FolderLock.wait = 0.3
Run(sys.argv[1], {'a': 1})
print('mine')
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(records._FolderLock, "wait", 0.3)


def child(code, path, **env):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
    )


@pytest.fixture
def other(tmp_path):
    "Another process that has the folder `run`"
    p = child(HOLD, tmp_path / "run")
    assert p.stdout.readline() == "mine\n"
    yield p
    p.kill()
    p.wait()


def lock_of(path, **changes):
    "A lock file as somebody else would have left it"
    path.mkdir(exist_ok=True)
    me = dict(host=platform.node(), pid=os.getpid(), started=psutil.Process().create_time())
    (path / ".run.lock").write_text(json.dumps({**me, **changes}))
    return path


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# -- processes of this machine


def test_the_second_is_told_who_has_it_and_every_way_out_works(tmp_path, other):
    before = files(tmp_path / "run")
    for settings in ({"a": 1}, {"a": 2}):  # nor is a folder in use to be deleted because its settings differ
        with pytest.raises(FolderInUse) as e:
            Run(tmp_path / "run", settings, resume=False)
        began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(psutil.Process(other.pid).create_time()))
        assert f"run is in use by process {other.pid} on {platform.node()}, started {began}" in str(
            e.value
        ) and "delete" not in str(e.value)
    assert files(tmp_path / "run") == before
    Run(tmp_path / "another", {"a": 1})  # choose another folder
    other.terminate()
    other.wait()  # or stop it
    Run(tmp_path / "run", {"a": 1})


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_no_one_out(tmp_path, other, how):
    other.send_signal(how)
    other.wait()
    assert (tmp_path / "run" / ".run.lock").exists()
    Run(tmp_path / "run", {"a": 1})
    assert not (tmp_path / "run" / ".run.lock").exists(), "given back with the last Run"


def test_one_process_opens_its_own_run_again_and_keeps_it_until_the_last_is_gone(tmp_path):
    first = Run(tmp_path / "run", {"a": 1})
    second = Run(tmp_path / "run", {"a": 1})
    again = Run(tmp_path / "run", {"a": 1}, resume=False)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run")
    Run(link, {"a": 1})
    del first, again
    assert child(TRY, tmp_path / "run").wait() == 1
    del second
    assert child(TRY, tmp_path / "run").wait() == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["settings.json"]


def test_a_refused_opening_gives_the_lock_back(tmp_path):
    Run(tmp_path / "run", {"a": 2})
    with pytest.raises(ValueError, match="other settings") as e:
        Run(tmp_path / "run", {"a": 1})
    assert not (tmp_path / "run" / ".run.lock").exists() and e


def test_a_folder_that_was_deleted_and_made_again(tmp_path):
    import shutil

    old = Run(tmp_path / "run", {"a": 1})
    shutil.rmtree(old.path)
    new = Run(tmp_path / "run", {"a": 2})
    del old
    assert (new.path / ".run.lock").exists() and child(TRY, tmp_path / "run").wait() == 1


def test_a_forked_process_takes_part_and_does_not_give_the_lock_away(tmp_path):
    run = Run(tmp_path / "run", {"a": 1})
    pid = os.fork()
    if pid == 0:
        Run(tmp_path / "run", {"a": 1})
        records._locks.clear()
        run._lock = None
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0 and (tmp_path / "run" / ".run.lock").exists()
    assert child(TRY, tmp_path / "run").wait() == 1


def test_processes_of_one_launcher_share_it(tmp_path, other, monkeypatch):
    before = files(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    Run(tmp_path / "run", {"a": 1}, resume=False)  # reads, writes nothing
    assert files(tmp_path / "run") == before
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(FolderInUse):
        Run(tmp_path / "run", {"a": 1})  # the first of another launch


@pytest.mark.parametrize(
    "open_job",
    [
        lambda out: open_text(
            TextJob(out=out, device="cpu", settings="embed=16 hidden=16 d=4 energy_hidden=8 n_blocks=1")
        ),
        lambda out: open_toy(ToyJob(out=out)),
        lambda out: open_image(ImageJob(out=out, device="cpu", threads=1)),
    ],
    ids=["text", "toy", "digits"],
)
def test_every_job_is_refused(tmp_path, other, open_job):
    before = files(tmp_path / "run")
    with pytest.raises(FolderInUse, match="is in use by process"):
        open_job(str(tmp_path / "run"))
    assert files(tmp_path / "run") == before


@pytest.mark.slow
def test_a_sweep_leaves_what_another_command_is_at(tmp_path, monkeypatch):
    "It is no failure, which would have to be retried"

    class InNotebook(Exception):
        ename = "FolderInUse"

    def execute(*args):
        raise InNotebook("is in use by process 1")

    monkeypatch.setattr(sweep, "execute", execute)
    job = sweep.SweepJob("a", "x.ipynb", str(tmp_path / "a"))
    out = sweep.run_one(job)
    assert out["state"] == "busy" and "in use by process 1" in out["error"] and not job.file("failed.json").exists()


# -- where the kernel's locks are missing, or stay on one machine


@pytest.fixture(params=["none", "local"])
def weak(request, monkeypatch):
    "A file system without locks, and one whose locks other machines do not see"
    if request.param == "none":
        monkeypatch.setattr(records, "_flock", lambda f, wait: False)
    else:
        monkeypatch.setattr(records, "_locks_reach_others", lambda folder: False)
    return request.param


def test_stale_locks_are_taken_over(tmp_path, weak):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    time.sleep(1)  # ended, and nobody has asked
    for name, changes in dict(
        dead=dict(pid=gone.pid), remains=dict(pid=zombie.pid), reused=dict(pid=os.getppid(), started=1.0)
    ).items():
        run = Run(lock_of(tmp_path / name, **changes), {"a": 1})
        assert json.loads((run.path / ".run.lock").read_text())["pid"] == os.getpid()
    zombie.wait()


def test_of_another_machine_one_cannot_know_and_is_told_what_to_delete(tmp_path, weak):
    path = lock_of(tmp_path / "run", host="elsewhere")
    with pytest.raises(
        FolderInUse, match=rf"process {os.getpid()} on elsewhere.*if it runs no more, delete (.*\.run\.lock)"
    ) as e:
        Run(path, {"a": 1})
    Path(str(e.value).rpartition("delete ")[2]).unlink()
    Run(path, {"a": 1})


def test_without_locks_a_living_process_still_keeps_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_flock", lambda f, wait: False)
    path = lock_of(tmp_path / "run", pid=os.getppid(), started=psutil.Process(os.getppid()).create_time())
    with pytest.raises(FolderInUse, match=f"process {os.getppid()} on"):
        Run(path, {"a": 1})
    (path / ".run.lock").write_text("")  # torn
    with pytest.raises(FolderInUse, match=r"another process.*delete .*\.run\.lock"):
        Run(path, {"a": 1})


def test_locks_that_reach_other_machines_are_believed(tmp_path):
    "A container that was killed has left another host's name on this disk"
    Run(lock_of(tmp_path / "run", host="elsewhere"), {"a": 1})


def test_mounts_that_keep_locks_to_themselves(tmp_path):
    dev, table = os.stat(tmp_path).st_dev, tmp_path / "mountinfo"
    at = f"{os.major(dev)}:{os.minor(dev)}"
    for options, reach in (
        ("rw,vers=4.2", True),
        ("rw,vers=3,nolock", False),
        ("rw,local_lock=none", True),
        ("rw,local_lock=all", False),
        ("rw,local_lock=flock", False),
        ("rw,localflock", False),
    ):
        table.write_text(f"1 0 999:9 / /x rw - nfs a:/ rw,nolock\n2 0 {at} / /y rw - nfs a:/ {options}\n")
        assert records._locks_reach_others(tmp_path, table) == reach, options


def test_exclusive_without_locks(tmp_path, monkeypatch):
    "Caches on a network file system: the work may be done twice, and nothing fails"
    import fcntl

    def flock(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path / "x.lock"), exclusive(tmp_path / "x.lock", wait=False):
        pass


def test_a_folder_that_cannot_be_written_can_be_read(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", {"a": 1})
    run.log({"step": 1})
    path = run.path
    del run

    def refuse(self, folder):
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(records._FolderLock, "__init__", refuse)
    assert Run(path, {"a": 1}).log_lines() == [{"step": 1}]
