"A fresh interpreter, and what a folder holds"

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python(code, *args, root=ROOT, **env):
    "Start a fresh interpreter on `code`, with the package of the checkout at `root`"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **env},
    )


def snapshot(folder):
    "Names, contents and times of everything below `folder`"
    return {
        p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in Path(folder).rglob("*")
    }
