"""Import modules, each in a process of its own, with the optional packages hidden

    python tests/import_alone.py ldebm.core ldebm.data             # whether they can be
    python tests/import_alone.py --loaded ldebm.core ldebm.data    # and what of the package each brings

A process is forked from one that has loaded what takes long and the package requires anyway, so that a module takes a
fraction of a second."""

import importlib
import os
import sys
import traceback

# What the package itself requires may be imported, with whatever that needs; these may not
HIDDEN = {
    "torchtext",
    "matplotlib",
    "seaborn",
    "dask",
    "distributed",
    "PIL",
    "IPython",
    "ipywidgets",
    "ipykernel",
    "nbdev",
    "execnb",
    "papermill",
    "sphinx",
    "myst_nb",
    "torchmetrics",
}


class Hide:
    "A finder that says an optional package is not installed"

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden: it is optional)", name=name)


def load(module, loaded=False):
    mod = importlib.import_module(module)
    missing = [n for n in getattr(mod, "__all__", []) if not hasattr(mod, n)]
    if missing:
        raise SystemExit(f"{module} promises {missing} and does not define them")
    own = sorted(m.removeprefix("ldebm.") for m in sys.modules if m.startswith("ldebm."))
    print(*((module, *own) if loaded else ("ok", module)), flush=True)


def forked(module, loaded):
    "Exit status of a child that loads it"
    sys.stdout.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        load(module, loaded)
        os._exit(0)
    except BaseException:
        print(f"{module}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)


def main(*modules):
    sys.meta_path.insert(0, Hide)
    import sklearn.cluster  # noqa: F401
    import torch  # noqa: F401

    taken = [m for m in sys.modules if m.partition(".")[0] in {"ldebm", *HIDDEN}]
    assert not taken, f"already loaded: {taken}"
    loaded = "--loaded" in modules
    return sum(forked(m, loaded) != 0 for m in modules if m != "--loaded")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
