"Packaging: everything is read from settings.ini, the one list of requirements"

import json
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

licenses = {"apache2": "Apache-2.0"}
statuses = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
pythons = ["3.10", "3.11", "3.12", "3.13"]
extras = {k[: -len("_requirements")]: v.split() for k, v in cfg.items() if k.endswith("_requirements")}
readme = root / "README.md"
came_along = ["nbs/train_*.ipynb", "models/*/*", "data/*/*"]  # `ldebm.data.came_along` finds them


def without_outputs(notebook):
    "A job's notebook as it is run: outputs of the default run are for readers of the repository"
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= dict(outputs=[], execution_count=None)
    return json.dumps(content, indent=1, ensure_ascii=False)


class Build(build_py):
    "The package, with `share`: notebooks of the jobs, trained models, small data sets"

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout has them beside the package
        for path in (path for pattern in came_along for path in sorted(root.glob(pattern))):
            copy = Path(self.build_lib, cfg["lib_name"], "share", path.relative_to(root))
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".ipynb":
                copy.write_text(without_outputs(path), encoding="utf-8")
            else:
                copy.write_bytes(path.read_bytes())


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license=licenses[cfg["license"]],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
    ]
    + [f"Programming Language :: Python :: {v}" for v in pythons],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    package_data={cfg["lib_name"]: ["py.typed", "*.cpp", "*.cu", "*.cuh"]},
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    python_requires=f">={cfg['min_python']},<3.14",
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": Build},
    zip_safe=False,
)
