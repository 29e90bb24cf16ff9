"""Write constraints.txt: every package of the README's install, as it was tested, with the hashes of its files. `make constraints` runs it.

    python workflow/constraints.py UV [--newest]

The versions are those of the environment that runs this, unless --newest asks for the newest that settings.ini allows (then `make test`).
"""
import argparse
import subprocess
import tempfile
from configparser import ConfigParser
from importlib.metadata import distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.11"  # the oldest that is promised: Debian 12 has 3.11.2
HEAD = "# Made by `make constraints`: the versions that were tested, with the sha256 of every file that may be installed.\n"


def wanted() -> list[str]:
    "The requirements of settings.ini, of all extras."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return sorted({r for key, value in config["DEFAULT"].items() if key.endswith("requirements") for r in value.split()})


def tested() -> list[str]:
    "What is installed here and runs on the oldest Python too; the build of OpenCV without windows stands for the one with them."
    names = {d.name.lower().replace("_", "-"): d.version for d in distributions()
             if f"{PYTHON}.0" in SpecifierSet(d.metadata.get("Requires-Python") or "")}
    if "opencv-python-headless" in names: names["opencv-python"] = names.pop("opencv-python-headless")
    return [f"{n}=={v}" for n, v in sorted(names.items()) if n != "fer-nb"]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("uv", help="the command uv")
    p.add_argument("--newest", action="store_true", help="the newest versions that settings.ini allows")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        for name, lines in (("wanted", wanted()), ("tested", [] if a.newest else tested())): Path(d, name).write_text("\n".join(lines))
        subprocess.run([a.uv, "pip", "compile", f"{d}/wanted", "-c", f"{d}/tested", "--universal", "--python-version", PYTHON,
                        "--generate-hashes", "--no-header", "--no-annotate", "--quiet", "-o", f"{d}/out"], check=True)
        text = Path(d, "out").read_text()
    (ROOT/"constraints.txt").write_text(HEAD + text)
    print(f"{sum(line[:1].isalnum() for line in text.splitlines())} packages, {text.count('--hash')} files: constraints.txt")


if __name__ == "__main__": main()
