"""Build fer_nb from settings.ini, the one place where version and requirements stand."""
import json
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="], interpolation=None)
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
SHARED = ("nbs/*.ipynb", "workflow/Snakefile", "workflow/provenance.rst", "workflow/*/config.yaml", "profiles/*.yaml", "report/*.qmd")  # what `fer-nb run` and `fer-nb report` read besides the modules


def bare(notebook: str) -> str:
    "A notebook without its outputs."
    nb = json.loads(notebook)
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell |= {"outputs": [], "execution_count": None}
    return json.dumps(nb, ensure_ascii=False, indent=1) + "\n"


class BuildWithShare(build_py):
    "Put notebooks, workflow and profiles into the package, as fer_nb/share; an editable install reads those of the checkout."
    def run(self):
        super().run()
        if self.editable_mode: return
        share = Path(self.build_lib)/"fer_nb"/"share"
        shutil.rmtree(share, ignore_errors=True)  # of an earlier build
        for source in (p for pattern in SHARED for p in sorted(Path().glob(pattern))):
            target = share/source
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8")
            target.write_text(bare(text) if source.suffix == ".ipynb" else text, encoding="utf-8")


extras = {name: cfg[f"{name}_requirements"].split() for name in ("train", "slurm", "tensorboard", "notebooks", "dev")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["fer_nb", "fer_nb.*"]),
    package_data={"fer_nb": ["models/*.onnx", "models/*.md", "models/hash_manifest.json", "static/*", "templates/*", "py.typed"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras | {"all": sorted({*extras["train"], *extras["notebooks"]})},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    cmdclass={"build_py": BuildWithShare},
    zip_safe=False,
)
