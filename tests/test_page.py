"""The page's secrets and processes: the token stands in no list, the cookie is the session's, and nothing outlives the command."""
import http.cookiejar
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from fer_nb import page
from fer_nb.locks import life_of

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="read from /proc"), pytest.mark.timeout(300)]
pytest.importorskip("voila", reason="Voilà is not installed: pip install voila")
SERVE = "from fer_nb.page import serve_cell; serve_cell(source='synthetic:5', detector='haar', out={out!r}, show=False)"


def below(pid: int) -> list[int]:
    "All descendants of a process."
    children = {}
    for p in Path("/proc").glob("[0-9]*"):
        try: children.setdefault(int((p/"stat").read_text().rpartition(")")[2].split()[1]), []).append(int(p.name))
        except OSError: continue
    found, todo = [], [pid]
    while todo:
        here = children.get(todo.pop(), [])
        found += here
        todo += here
    return found


def read(pid: int, what: str) -> str:
    try: return Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace")
    except OSError: return ""


@pytest.fixture
def served(tmp_path):
    "A page whose kernel runs: its process, its address, its cookies, a folder for temporaries of its own."
    (tmp_path/"t").mkdir()
    code = SERVE.format(out=str(tmp_path/"demo"))
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path/"t")})
    try:
        url, cookies = process.stdout.readline().strip(), http.cookiejar.CookieJar()
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(cookies))
        with opener.open(url, timeout=200) as answer:
            text, headers = answer.read().decode(), answer.headers.get_all("Set-Cookie")
            yield process, url, (text, headers), tmp_path
    finally:
        process.kill(); process.wait(); process.stdout.close()


def test_the_token_is_no_local_user_s_to_read(served):
    process, url, (text, headers), _ = served
    token = re.search(r"token=(\S+)", url)[1]
    children = below(process.pid)
    kernels = [p for p in children if "ipykernel" in read(p, "cmdline")]
    assert kernels and not [p for p in (process.pid, *children) if token in read(p, "cmdline")]
    assert not [k for k in kernels if page.PROOF in read(k, "environ")]  # the token does reach them, as part of the address asked for
    assert {os.stat(f"/proc/{p}/environ").st_mode & 0o077 for p in (process.pid, *children)} == {0}
    login = next(h for h in headers if h.startswith("username-"))
    assert "SameSite=Strict" in login and "HttpOnly" in login and not re.search("expires|max-age", login, re.IGNORECASE)
    for at in ("", "?token=wrong"):
        with urllib.request.urlopen(url.split("?")[0] + at) as answer: assert "/login" in answer.url


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_server_and_kernel_end_with_the_command(served, sign):
    process, url, _, tmp_path = served
    lives = [x for x in map(life_of, below(process.pid)) if x]
    assert len(lives) >= 2
    process.send_signal(sign)
    process.wait(60)
    until = time.monotonic() + 60
    while (left := [x for x in lives if life_of(int(x.partition(":")[0])) == x]) and time.monotonic() < until: time.sleep(0.2)
    assert left == []
    with pytest.raises(OSError): urllib.request.urlopen(url, timeout=2)
    code = "from fer_nb.locks import passing_folder\nwith passing_folder(): pass"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path/"t")}, check=True)
    assert [p.name for p in (tmp_path/"t").iterdir() if p.name.startswith(("fer_nb_", "voila_"))] == []
