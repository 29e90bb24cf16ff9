"""Where there is no home, no room, no Unicode and nothing may be written: work on, or one line."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from fer_nb import images
from fer_nb.artifacts import GateError
from fer_nb.geometry import Geometry
from fer_nb.images import pack_cache
from fer_nb.manifests import build_manifest
from fer_nb.painting import framed_face
from fer_nb.synthetic import write_dataset

ROOT = Path(images.__file__).parents[1]
NOBODY = """
import os, pwd, sys
os.environ.pop("HOME", None)
def nobody(*a): raise KeyError("uid not found")
pwd.getpwuid = nobody
from fer_nb.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture")/"表情 ü.png"
    cv2.imencode(".png", framed_face(3, size=150, frame=(240, 320)).image)[1].tofile(path)
    return path


def run(*args, code=None, **env):
    command = [sys.executable, *(["-c", code] if code else ["-m", "fer_nb.cli"]), *map(str, args)]
    env = {k: v for k, v in (os.environ | env).items() if v is not None}
    return subprocess.run(command, capture_output=True, env=env, cwd=args[-1].parent if isinstance(args[-1], Path) else None)


@pytest.mark.parametrize("detector", ["auto", "haar"])
@pytest.mark.parametrize("home", ["nobody's", "gone", "a file"])
def test_without_a_home(picture, tmp_path, home, detector):
    (tmp_path/"file").write_text("")
    how = {"code": NOBODY} if home == "nobody's" else {"HOME": str(tmp_path/("file" if home == "a file" else "gone"))}
    done = run("predict", "--detector", detector, picture, XDG_CACHE_HOME=None, FER_NB_MODELS=None, **how)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"fault" not in done.stderr, done.stderr.decode()


@pytest.mark.parametrize("encoding, shown", [
    ("cp1252", "\\u8868\\u60c5 ü.png"), ("ascii", "\\u8868\\u60c5 \\xfc.png"), ("utf-8", "表情 ü.png")])
def test_any_terminal_gets_every_line(picture, encoding, shown):
    done = run("predict", "--detector", "haar", picture.name, picture, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert shown in done.stdout.decode(encoding) and b"fault" not in done.stderr
    lost = run("predict", "--detector", "haar", picture.parent/"無.png", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert lost.returncode == 2 and "doesn't exist" in lost.stderr.decode(encoding)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("faces")
    write_dataset(root/"faces", n=140, size=48)
    return root, build_manifest([f"synthetic={root/'faces'}"], root/"m", name="demo").manifest


def test_a_full_disk_is_told_before_anything_is_written(manifest, tmp_path, monkeypatch):
    def full(fd, start, size): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(GateError, match="no room for 0 MB of prepared faces") as e:
        pack_cache(manifest[1], Geometry(size=48), tmp_path/"c", sample=0)
    assert str(tmp_path) in str(e.value) and not list(tmp_path.iterdir())


def _in_small_disk(folder, script, size="1m"):
    "A script where `folder` is a disk of its own, in a namespace of its own."
    if not shutil.which("unshare"): pytest.skip("no unshare")
    mount = f'mount -t tmpfs -o size={size} none "{folder}" && exec "{sys.executable}" -c "$0"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount, script], capture_output=True, text=True)
    if "mount" in done.stderr and "ermi" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()[:80]}")
    return done


def test_a_disk_that_is_really_full_ends_nothing_by_a_signal(manifest, tmp_path):
    root, disk = manifest[0], tmp_path/"disk"
    disk.mkdir()
    done = _in_small_disk(disk, f"""
import os
from pathlib import Path
from fer_nb.artifacts import GateError
from fer_nb.geometry import Geometry
from fer_nb.images import pack_cache
from fer_nb.manifests import load_manifest
m = load_manifest({str(root/'m')!r})
try: pack_cache(m, Geometry(size=96), {str(disk/'c')!r}, sample=0, progress=False)
except GateError as e: print(e)
print(os.listdir({str(disk)!r}))
print(pack_cache(m, Geometry(size=24), {str(disk/'c')!r}, sample=0, progress=False).images.shape)""")
    assert done.returncode == 0, done.stderr
    told, left, shape = done.stdout.splitlines()
    assert "no room for" in told and "No space left" in told and left == "[]" and shape.startswith("(140, 24, 24")


def test_a_package_that_may_not_be_written(picture, tmp_path):
    if not shutil.which("unshare"): pytest.skip("no unshare")
    package = ROOT/"fer_nb"
    script = (f'mount --bind "{package}" "{package}" && mount -o remount,ro,bind "{package}" && '
              f'! touch "{package}/x" 2>/dev/null && exec "$@"')
    command = [sys.executable, "-m", "fer_nb.cli", "predict", "--detector", "haar", str(picture)]
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *command], capture_output=True, text=True)
    if "mount" in done.stderr or "unshare" in done.stderr: pytest.skip(f"no mounts here: {done.stderr.strip()[:80]}")
    assert done.returncode == 0, done.stderr


def test_an_array_is_what_numpy_would_have_written(tmp_path):
    made = images._new_array(tmp_path/"a.npy", (7, 5, 5, 3))
    made[:] = np.arange(7, dtype=np.uint8)[:, None, None, None]
    made.flush()
    np.save(tmp_path/"b.npy", np.array(made))
    assert (tmp_path/"a.npy").read_bytes() == (tmp_path/"b.npy").read_bytes()
