"""Where the package defines a name, whatever page it stands on

Numbers that are held and speeds that are compared outlive pages: `Anywhere().DiffusionEBM` is found in any module."""

import importlib
import re
from functools import lru_cache
from pathlib import Path


@lru_cache
def texts() -> dict[str, str]:
    "Module -> its text"
    folder = Path(importlib.import_module("ldebm").__file__).parent
    return {p.stem: p.read_text(encoding="utf-8") for p in sorted(folder.glob("[a-z]*.py"))}


def modules_of(name: str) -> list[str]:
    "Modules that define a function, a class or a constant of this name; methods that join a class are none of them"
    definition = re.compile(rf"^(?:def|class) {name}\b(?!\(\s*self\b)|^{name}\s*(?::[^=\n]+)?=", flags=re.M)
    return [module for module, text in texts().items() if definition.search(text)]


class Anywhere:
    "Names of the package as attributes"

    def __init__(self, page: str = ""):
        self.page = page  # How a module's name begins, for names that several define

    def __getattr__(self, name: str):
        found = [m for m in modules_of(name) if m.startswith(self.page)]
        if len(found) != 1:
            raise AttributeError(f"{name} is defined in {', '.join(found) or 'no module'}")
        return getattr(importlib.import_module(f"ldebm.{found[0]}"), name)
