"A command `ldebm` that executes no notebook: for tests of `make`, which calls it as `LDEBM=<this script>`"

import sys
from pathlib import Path

HEAD = (
    f"#!{sys.executable}\n"
    + '''\
import json, os, sys, time
from pathlib import Path
from ldebm import command, sweep
from ldebm.text_settings import TextSettings

def papermill(arguments, say):
    run = Path(arguments[1]).parent
    (run / "settings.json").write_text("{}")
    return execute(arguments, run)

sweep.papermill_command = papermill
command._resolved = lambda *what: (None, TextSettings())  # whatever the values are: they are to arrive
'''
)


def write_stand_in(folder: Path, *lines: str) -> str:
    "A variable of `make`; `lines` make up `execute(arguments, run)`, in place of papermill"
    path = folder / "stand-in"
    body = "".join(f"    {line}\n" for line in lines)
    path.write_text(f"{HEAD}\ndef execute(arguments, run):\n{body}\nsys.exit(command.main(sys.argv[1:]))\n")
    path.chmod(0o755)
    return f"LDEBM={path}"
