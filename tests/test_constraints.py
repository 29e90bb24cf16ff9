"""constraints.txt holds the README's install: all that settings.ini asks for, at one version each, with hashes."""
import re
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT/"workflow"))
import constraints

BLOCK = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)( ; [^\\]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)
TEXT = (ROOT/"constraints.txt").read_text()


def test_every_line_is_a_pinned_version_with_hashes():
    assert BLOCK.sub("", TEXT).split("\n", 1)[1].strip() == ""
    assert len(BLOCK.findall(TEXT)) > 200


def test_what_settings_ask_for_is_there_at_a_version_that_they_allow():
    pins = {canonicalize_name(name): version for name, version, *_ in BLOCK.findall(TEXT)}
    for text in constraints.wanted():
        r = Requirement(text)
        assert r.specifier.contains(pins[canonicalize_name(r.name)]), text


def test_what_is_installed_is_read_as_pins():
    pins = dict(line.split("==") for line in constraints.tested())
    assert "fer-nb" not in pins and "opencv-python" in pins and "opencv-python-headless" not in pins


def test_the_readme_s_install_uses_it():
    make = (ROOT/"Makefile").read_text()
    assert "pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r constraints.txt" in make and "--no-deps" in make
