"Import one module in this process with the optional packages hidden: `python tests/import_alone.py ldebm.core`"
import importlib
import sys

# What the package itself requires may be imported, with whatever that needs; these may not
HIDDEN = {"torchtext", "matplotlib", "seaborn", "dask", "distributed", "PIL", "IPython", "ipykernel", "nbdev", "execnb", "papermill",
          "sphinx", "myst_nb", "torchmetrics"}


class Hide:
    "A finder that says an optional package is not installed"
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN: raise ModuleNotFoundError(f"No module named {name!r} (hidden: it is optional)", name=name)


def main(module):
    sys.meta_path.insert(0, Hide)
    mod = importlib.import_module(module)
    missing = [n for n in getattr(mod, "__all__", []) if not hasattr(mod, n)]
    if missing: raise SystemExit(f"{module} promises {missing} and does not define them")
    print("ok", module)


if __name__ == "__main__": main(sys.argv[1])
