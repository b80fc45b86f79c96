"Sweeps: a failure takes no other run with it, what is stopped or killed goes on, what cannot work never starts"

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from ldebm import sweep as module
from ldebm.sweep import SweepJob, check_cluster, claim, locked, run_one, sweep, sweep_status

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="locks and signals are POSIX")

# A notebook that says when it starts and ends, writes while it runs, saves on Ctrl-C, and fails where it is told to
PARAMETERS = "x: int = 0\nout: str = ''\nseconds: float = 0.\nfail: bool = False"
WORK = """import os, pathlib, time
here = pathlib.Path(out)
def note(s):
    with open(here.parent/'events.txt', 'a') as f: f.write(f'{s} {x}\\n')
note('start')
print('x is', x)
end = time.monotonic()+seconds
try:
    while time.monotonic() < end:
        (here/'pulse').write_text(str(time.time())); time.sleep(.05)
except KeyboardInterrupt:
    note('saved'); raise
if fail and not (here.parent/'mended').exists(): raise ValueError(f'x = {x} is not wanted')"""
END = "(here/'result.json').write_text('{}'); note('end')"


def write(path, *cells):
    cells = [new_code_cell(c) for c in cells]
    cells[0].metadata["tags"] = ["parameters"]
    spec = {
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
        "language_info": {"name": "python"},
    }
    nbformat.write(new_notebook(cells=cells, metadata=spec), path)
    return str(path)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, deadline):
    "No progress bars, one thread, and an end to waiting"
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with deadline(300, "the sweep does not end"):
        yield


@pytest.fixture
def make(tmp_path):
    notebook = write(tmp_path / "tiny.ipynb", PARAMETERS, WORK, END)

    def job(x, **kw):
        out = tmp_path / "runs" / str(x)
        return SweepJob(f"x={x}", notebook, str(out), {"x": x, "out": str(out), **kw})

    return job


@pytest.fixture(scope="module")
def cluster():
    "A scheduler that was there before: two workers, one of which declares what it has"
    from distributed import Nanny, Scheduler, SpecCluster

    kw = dict(nthreads=1, memory_limit=None, preload=["ldebm.sweep"], dashboard_address=None)
    with SpecCluster(
        scheduler={"cls": Scheduler, "options": {"dashboard": False, "host": "127.0.0.1", "port": 0}},
        silence_logs=50,
        workers={0: {"cls": Nanny, "options": {**kw, "resources": {"MEMORY": 4e9}}}, 1: {"cls": Nanny, "options": kw}},
    ) as c:
        yield c


def events(tmp_path):
    return (tmp_path / "runs" / "events.txt").read_text().splitlines()


def states(outcomes):
    return [o["state"] for o in outcomes]


def wait_for(f, seconds=120):
    end = time.monotonic() + seconds
    while not f():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# -- errors before any work


@pytest.mark.parametrize(
    "change,error,text",
    [
        (lambda js: [js[0], replace(js[1], name="x=0")], ValueError, "have the name x=0"),
        (lambda js: [js[0], replace(js[1], folder=js[0].folder + "/../0")], ValueError, "have the folder"),
        (lambda js: [js[0], replace(js[1], notebook="nowhere.ipynb")], FileNotFoundError, "no notebook at"),
        (
            lambda js: [js[0], replace(js[1], parameters={"sedonds": 1.0})],
            ValueError,
            "unknown parameter of tiny.ipynb 'sedonds'; did you mean 'seconds'",
        ),
        (lambda js: [js[0], replace(js[1], parameters={"x": [1]})], ValueError, "parameter x"),
        (lambda js: [js[0], replace(js[1], parameters={"seconds": float("nan")})], ValueError, "finite number"),
        (
            lambda js: [js[0], replace(js[1], memory_gb=1e6)],
            ValueError,
            r"needs 1e\+06 GB of memory and this machine offers",
        ),
        (lambda js: [js[0], replace(js[1], gpus=1000)], ValueError, "needs 1000 GPUs and this machine offers"),
        (lambda js: [js[0], replace(js[1], gpus=1.5)], ValueError, "share of one GPU or a whole number"),
    ],
    ids=["name", "folder", "notebook", "parameter", "kind", "nan", "memory", "gpus", "share"],
)
def test_what_cannot_work_is_said_before_any_work(make, tmp_path, monkeypatch, change, error, text):
    monkeypatch.setattr(module, "run_all", lambda *a: pytest.fail("work was started"))
    monkeypatch.setattr(module.Local, "__enter__", lambda *a: pytest.fail("workers were started"))
    with pytest.raises(error, match=text):
        sweep(change([make(0), make(1)]))
    assert not (tmp_path / "runs").exists()


def test_wrong_files_settings_and_addresses(make, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CONNECT", 1.0)
    text = tmp_path / "text.ipynb"
    text.write_text("not a notebook")
    with pytest.raises(ValueError, match="cannot be read as a notebook"):
        sweep([replace(make(0), notebook=str(text))])
    with pytest.raises(ValueError, match="threads must be a positive int"):
        sweep([make(0)], threads=0)
    with pytest.raises(ValueError, match="at a scheduler its workers decide"):
        sweep([make(0)], "tcp://127.0.0.1:1", workers=2)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="no Dask scheduler answers at 'tcp://127.0.0.1:1'"):
        sweep([make(0)], "tcp://127.0.0.1:1", show=False)
    with pytest.raises(ConnectionError, match="no Dask scheduler answers at 'nonsense://'"):
        sweep([make(0)], "nonsense://", show=False)
    assert time.monotonic() - start < 8 and sweep([]).counts == {} and not (tmp_path / "runs").exists()


# -- one job, in this process


def test_a_job_whose_folder_is_taken_is_busy(make, monkeypatch):
    job = make(0)
    monkeypatch.setattr(module, "claim", lambda folder, wait=0.3: claim(folder, wait))
    with claim(Path(job.folder)):
        assert locked(Path(job.folder)) and states(sweep_status([job])) == ["busy"]
        got = run_one(job)
        assert (
            got["state"] == "busy"
            and f"process {os.getpid()} on " in got["error"]
            and not job.file(Path(job.notebook).name).exists()
        )
    assert not locked(Path(job.folder)) and states(sweep_status([job])) == ["left"]


def test_a_notebook_without_result_a_dead_kernel_and_its_threads(make, tmp_path, monkeypatch):
    "Threads and hidden GPUs reach the kernel, folder and environment stay; no result, and a death, are failures"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    nb = write(
        tmp_path / "odd.ipynb",
        "die: bool = False",
        """import os, pathlib
seen = [os.environ[k] for k in ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')]
print(seen, pathlib.Path.cwd().name, os.environ.get('LDEBM_SHARED_GPU'))
if die: os.kill(os.getpid(), 11)""",
    )
    job, here = SweepJob("odd", nb, str(tmp_path / "runs" / "odd"), memory_gb=1.0), os.getcwd()
    got = run_one(job, threads=3)
    assert (
        got["state"] == "failed"
        and "left no result.json" in got["error"]
        and os.getcwd() == here
        and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    )
    assert f"['3', ''] {tmp_path.name} None" in job.file("sweep.log").read_text()
    assert (
        run_one(replace(job, done="", gpus=0.5))["state"] == "done"
        and f"['1', '3'] {tmp_path.name} 1" in job.file("sweep.log").read_text()
    ), "it is told that it shares a card"
    got = run_one(replace(job, parameters={"die": True}))
    assert (
        got["state"] == "failed"
        and "the kernel died" in got["error"]
        and json.loads(job.file("failed.json").read_text())["error"] == got["error"]
    )


# -- a scheduler that is there


@pytest.mark.slow
def test_a_failure_is_reported_alone_and_retried_on_request(make, cluster, tmp_path, capsys):
    jobs = [replace(make(0, fail=True), cost=2.0), make(1), replace(make(2), cost=3.0, memory_gb=2.0)]
    address = cluster.scheduler_address
    got = sweep(jobs, address)
    assert (
        states(got) == ["failed", "done", "done"]
        and got["x=0"]["error"] == "ValueError: x = 0 is not wanted (cell [3])"
        and not got.ok
    )
    failed = json.loads(jobs[0].file("failed.json").read_text())
    assert "ValueError: x = 0 is not wanted" in failed["traceback"] and failed["parameters"]["fail"] is True
    assert "x is 0" in jobs[0].file("sweep.log").read_text() and jobs[0].file(Path(jobs[0].notebook).name).exists()
    assert "failed  x=0 (< 1 min) ValueError" in (said := capsys.readouterr().out) and "no worker declares" not in said
    assert "| x=0 | failed | < 1 | ValueError: x = 0 is not wanted (cell [3]) |" in got._repr_markdown_()
    n = len(events(tmp_path))
    got = sweep(jobs, address)
    assert (
        states(got) == states(sweep_status(jobs)) == ["failed", "skipped", "skipped"]
        and "retry" in got["x=0"]["error"]
        and len(events(tmp_path)) == n == 5
    )
    assert states(sweep(jobs, address, retry=True)) == ["failed", "skipped", "skipped"] and len(events(tmp_path)) == 6
    (tmp_path / "runs" / "mended").touch()
    assert (
        states(sweep(jobs, address, retry=True)) == ["done", "skipped", "skipped"]
        and not jobs[0].file("failed.json").exists()
    )
    assert sweep(jobs, address).ok and len(events(tmp_path)) == 8


def test_a_changed_key_runs_again(make, cluster, tmp_path):
    job = replace(make(0), key={"version": 1})
    assert states(sweep([job], cluster.scheduler_address)) == ["done"]
    assert states(sweep([replace(job, cost=9.0)], cluster.scheduler_address)) == [
        "skipped"
    ]  # what is not the key does not count
    assert (
        states(sweep([replace(job, key={"version": 2})], cluster.scheduler_address)) == ["done"]
        and len(events(tmp_path)) == 4
    )
    job.file("result.json").unlink()
    assert states(sweep_status([replace(job, key={"version": 2})])) == ["left"]


def test_resources_of_a_scheduler(make, cluster, capsys):
    "Too large is an error; what no worker declares is not asked for, and said"
    with pytest.raises(ValueError, match=r"job x=0 needs MEMORY=5e\+09 and no worker .* \(largest: MEMORY=4e\+09\)"):
        sweep([replace(make(0), memory_gb=5.0)], cluster.scheduler_address)
    assert (
        states(sweep([replace(make(0), gpus=0.5)], cluster.scheduler_address)) == ["done"]
        and "no worker declares GPU" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="no worker"):
        check_cluster([replace(make(1), memory_gb=1.0, gpus=1)], [{"MEMORY": 4e9}, {"GPU": 1.0}])


@pytest.mark.slow
def test_a_worker_that_is_told_to_close_hands_its_run_on(make, cluster, tmp_path):
    "The notebook is given time to save, and another worker goes on"
    from threading import Thread

    from distributed import Client

    jobs, got = [make(0, seconds=4.0)], []
    t = Thread(target=lambda: got.extend(sweep(jobs, cluster.scheduler_address, show=False)))
    with Client(cluster) as client:
        t.start()
        wait_for(lambda: jobs[0].file("pulse").exists())
        at = next(a for a, ks in client.processing().items() if ks)
        client.retire_workers([at])
        t.join()
    assert states(got) == ["done"] and events(tmp_path) == ["start 0", "saved 0", "start 0", "end 0"]


# -- a sweep of its own that is stopped, or killed

SCRIPT = """import json, sys
from ldebm.sweep import SweepJob, SweepStopped, sweep
if __name__ == '__main__':
    try: print('RESULT', sweep([SweepJob(**o) for o in json.load(open(sys.argv[1]))], workers=int(sys.argv[2])))
    except SweepStopped as e: print('STOPPED', e)
"""


@contextmanager
def start(jobs, tmp_path, workers):
    "A sweep in a process group of its own, as on a terminal"
    from dataclasses import asdict

    (tmp_path / "jobs.json").write_text(json.dumps([asdict(j) for j in jobs]))
    (tmp_path / "script.py").write_text(SCRIPT)
    p = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "jobs.json"), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield p
    finally:
        for o in descendants(p.pid):
            o.kill()
        p.kill()
        p.wait()
        p.stdout.close()


def descendants(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def after_ctrl_c(folder, *sources):
    "Exit code and output of a notebook with these cells that gets Ctrl-C once the file `there` exists"
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "one.ipynb")
    command = [sys.executable, "-m", "ldebm.sweep", "one.ipynb", "out.ipynb", "--kernel", "python3"]
    with subprocess.Popen(command, cwd=folder, stdout=-1, stderr=subprocess.STDOUT, text=True) as p:
        wait_for((folder / "there").exists)
        p.send_signal(signal.SIGINT)
        said = p.communicate(timeout=60)[0]
    return p.returncode, said


@pytest.mark.parametrize("swallowed", [True, False])
def test_ctrl_c_on_one_notebook_is_never_lost(tmp_path, swallowed):
    "IPython swallows a signal that comes while it draws a figure: then the next cell does not begin"
    first = "open('there', 'w').close()\nimport time\ntime.sleep(60)"
    if swallowed:
        first = f"try:\n    {first.replace(chr(10), chr(10) + '    ')}\nexcept KeyboardInterrupt:\n    pass"
    code, said = after_ctrl_c(tmp_path, first, "open('second', 'w').close()")
    assert code == 130 and not (tmp_path / "second").exists(), said
    assert ("Interrupted: stopped between two cells" if swallowed else "Interrupted: stopped in cell [1]; ") in said


def test_a_notebook_that_ends_in_spite_of_ctrl_c_has_ended(tmp_path):
    body = "open('there', 'w').close()\nimport time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass"
    code, said = after_ctrl_c(tmp_path, body)
    assert code == 0, said


@pytest.mark.slow
def test_ctrl_c_lets_notebooks_save_and_the_same_jobs_go_on(make, cluster, tmp_path):
    jobs = [
        replace(make(i, seconds=60.0 * (i == 1)), key={"x": i}) for i in range(3)
    ]  # `seconds` is no part of the key: later they are none
    with start(jobs, tmp_path, workers=1) as p:
        wait_for(jobs[1].file("pulse").exists)
        all_of_it = descendants(p.pid)
        os.killpg(p.pid, signal.SIGINT)  # as the terminal does: workers get it too
        said = p.communicate(timeout=120)[0]
        assert (
            "STOPPED sweep stopped: 1 done, 1 stopped, 1 left; run the same command again" in said and p.returncode == 0
        ), said
        assert not psutil.wait_procs(all_of_it, timeout=5)[1]
    assert events(tmp_path) == ["start 0", "end 0", "start 1", "saved 1"]
    assert states(sweep_status(jobs)) == ["skipped", "left", "left"] and not list(tmp_path.glob("runs/*/failed.json"))
    jobs = [replace(j, parameters={**j.parameters, "seconds": 0.0}) for j in jobs]
    assert states(sweep(jobs, cluster.scheduler_address)) == ["skipped", "done", "done"] and len(events(tmp_path)) == 8


@pytest.mark.slow
def test_a_killed_sweep_leaves_nothing_running_and_the_same_jobs_go_on(make, cluster, tmp_path):
    "Only the parent is killed, without warning"
    jobs = [replace(make(i, seconds=60.0 * (i == 1)), key={"x": i}) for i in range(4)]
    with start(jobs, tmp_path, workers=1) as p:
        wait_for(jobs[1].file("pulse").exists)
        all_of_it = descendants(p.pid)
        assert len([o for o in all_of_it if "ipykernel" in " ".join(o.cmdline())]) == 1
        os.kill(p.pid, signal.SIGKILL)
        p.wait()
        assert not psutil.wait_procs(all_of_it, timeout=5)[1] and not any(locked(Path(j.folder)) for j in jobs)
    pulse = jobs[1].file("pulse").read_text()
    assert events(tmp_path) == ["start 0", "end 0", "start 1"] and not list(tmp_path.glob("runs/*/failed.json"))
    time.sleep(0.3)
    assert jobs[1].file("pulse").read_text() == pulse
    jobs = [replace(j, parameters={**j.parameters, "seconds": 0.0}) for j in jobs]
    assert states(sweep(jobs, cluster.scheduler_address)) == ["skipped", "done", "done", "done"]
    assert sorted(events(tmp_path)) == [
        "end 0",
        "end 1",
        "end 2",
        "end 3",
        "start 0",
        "start 1",
        "start 1",
        "start 2",
        "start 3",
    ]
