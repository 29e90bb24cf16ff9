"""Fill one short loan of a machine: every run of a plan, as many side by side as the machine carries, until the time is up.

    python workflow/lease.py PLAN.yaml --out RUNS --set epochs=40 --side-by-side 16 --until 540

A plan is a list of runs: a name (its folder below RUNS), the notebook, its parameters, the runs that it `needs`, and `for` with lists
that it is repeated over (an entry that is a mapping sets several words at once). `{word}` in a text is filled in from `--set` and
`for`, `{out}` is RUNS. A run starts when all that it needs is done, and in the plan's order. What is unfinished when the time is up is
stopped; its last checkpoint stays, and the same call goes on from there. `lease.json` in RUNS says when each run began, how long it
took and how it ended.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

RUN = "import json, sys; from fer_nb.runs import run_notebook; run_notebook(*sys.argv[1:3], json.loads(sys.argv[3]))"


def typed(text: str):
    "A number or a list where the text is one in JSON, else the text."
    try: return json.loads(text)
    except json.JSONDecodeError: return text


def fill(value, words: dict):
    "A plan's value with its words filled in; a text that is one word alone takes that word's own type."
    if isinstance(value, dict): return {k: fill(v, words) for k, v in value.items()}
    if isinstance(value, list): return [fill(v, words) for v in value]
    if not isinstance(value, str): return value
    alone = value[1:-1] if value[:1] == "{" and value[-1:] == "}" else None
    return words[alone] if alone in words else value.format(**words)


def expand(plan: list[dict], words: dict) -> list[dict]:
    "Every run of a plan, in order: name, notebook, parameters, needs."
    runs = []
    for entry in plan:
        over = entry.get("for", {})
        for values in itertools.product(*over.values()):
            own = dict(words)
            for word, value in zip(over, values): own |= value if isinstance(value, dict) else {word: value}
            runs.append({k: fill(v, own) for k, v in {"needs": [], "parameters": {}, **entry}.items() if k != "for"})
    names = [r["name"] for r in runs]
    for r in runs:
        if names.count(r["name"]) > 1: raise SystemExit(f"the plan names {r['name']} twice: give each run a name of its own")
        odd = [n for n in r["needs"] if n not in names]
        if odd: raise SystemExit(f"{r['name']} needs {odd[0]}, which is no run of the plan")
    return runs


def start(run: dict, out: Path) -> subprocess.Popen:
    "One run in a process group of its own, on one thread; what it prints goes to log.txt in its folder."
    folder = out/run["name"]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", RUN, run["notebook"], str(folder/f"{run['notebook']}.ipynb"),
               json.dumps({**run["parameters"], "out": str(folder)})]
    with (folder/"log.txt").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def is_done(run: dict, out: Path) -> bool: return (out/run["name"]/"hash_manifest.json").is_file()


def walk(runs: list[dict], out: Path, side_by_side: int, until: float) -> dict:
    "Run them all; name -> what became of it."
    began, going, told = time.monotonic(), {}, {r["name"]: {"state": "done before"} for r in runs if is_done(r, out)}
    waiting = [r for r in runs if r["name"] not in told]
    while going or waiting:
        now = time.monotonic() - began
        for name, p in list(going.items()):
            if p.poll() is None and now < until: continue
            if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
            told[name] |= {"seconds": round(now - told[name]["began"], 1), "state": {0: "done", None: "stopped"}.get(p.poll(), "failed")}
            del going[name]
            print(f"{now:5.0f} s  {told[name]['state']:8}{name}", flush=True)
        ready = [r for r in waiting if all(told.get(n, {}).get("state", "").startswith("done") for n in r["needs"])]
        for r in ready[:max(0, side_by_side - len(going))] if now < until else ():
            going[r["name"]], told[r["name"]] = start(r, out), {"began": round(now, 1)}
            waiting.remove(r)
        if not going and (now >= until or not ready): break
        (out/"lease.json").write_text(json.dumps(told, indent=2) + "\n")
        time.sleep(0.5)
    told |= {r["name"]: {"state": "not begun"} for r in waiting}
    (out/"lease.json").write_text(json.dumps(told, indent=2) + "\n")
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--set", nargs="*", default=[], metavar="WORD=VALUE", help="words of the plan")
    parser.add_argument("--side-by-side", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which all is stopped")
    parser.add_argument("--only", nargs="*", default=[], metavar="START", help="runs whose names begin so")
    a = parser.parse_args()
    words = {k: typed(v) for k, v in (s.split("=", 1) for s in a.set)} | {"out": str(a.out)}
    runs = [r for r in expand(yaml.safe_load(a.plan.read_text()), words) if not a.only or r["name"].startswith(tuple(a.only))]
    a.out.mkdir(parents=True, exist_ok=True)
    told = walk(runs, a.out, a.side_by_side, a.until)
    sys.exit(not all(t["state"].startswith("done") for t in told.values()))


if __name__ == "__main__": main()
