"""Fill one short loan of a machine: every run of a plan, as many side by side as the machine carries, until the time is up.

    python workflow/lease.py PLAN.yaml --out RUNS --set epochs=40 --side-by-side 16 --until 540

A plan is a list of runs: a name (its folder below RUNS), the notebook, its parameters, the runs that it `needs`, and `for` with lists
that it is repeated over (an entry that is a mapping sets several words at once). `{word}` in a text is filled in from `--set` and
`for`, `{out}` is RUNS. A run starts when all that it needs is done, and in the plan's order. What is unfinished when the time is up is
stopped; its last checkpoint stays, and the same call goes on from there. `lease.json` in RUNS says when each run began, how long it
took and how it ended. `run.json` in a run's folder keeps its settings: what is done with others than the plan now asks for has failed,
until somebody removes the folder, to run it anew, or its run.json, to keep it as it is.
"""

import argparse
import contextlib
import difflib
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
CHECK = """
import json, sys
try: from fer_nb.runs import UsageError, check_parameters, notebook_path
except ImportError as e: sys.exit(str(e))
for name, notebook, parameters in json.load(sys.stdin):
    try: check_parameters(notebook_path(notebook), parameters)
    except UsageError as e: print(f"{name}: {e}"); break
"""
KINDS = {"name": (str, "a text"), "notebook": (str, "a text"), "parameters": (dict, "names and values"), "needs": (list, "a list"),
         "for": (dict, "words, each with a list")}  # what an entry of a plan may say
DONE = ("done", "done before")


class Refused(SystemExit):
    "One sentence for whoever called; the exit code is 2."
    def __init__(self, words: str):
        super().__init__(words)
        self.code = 2


def typed(text: str):
    "A number or a list where the text is one in JSON, else the text."
    try: return json.loads(text)
    except json.JSONDecodeError: return text


def words_of(given: list[str]) -> dict:
    "The words of `--set`."
    odd = [s for s in given if not s.partition("=")[0] or "=" not in s]
    if odd: raise Refused(f"--set {odd[0]}: give WORD=VALUE")
    return {k: typed(v) for k, v in (s.split("=", 1) for s in given)}


def fill(value, words: dict):
    "A plan's value with its words filled in; a text that is one word alone takes that word's own type."
    if isinstance(value, dict): return {k: fill(v, words) for k, v in value.items()}
    if isinstance(value, list): return [fill(v, words) for v in value]
    if not isinstance(value, str): return value
    alone = value[1:-1] if value[:1] == "{" and value[-1:] == "}" else None
    try: return words[alone] if alone in words else value.format(**words)
    except KeyError as e: raise Refused(f"'{value}' has a word that is not set: give --set {e.args[0]}=VALUE") from None
    except (IndexError, ValueError, AttributeError, TypeError) as e: raise Refused(f"'{value}' can't be filled in: {e}") from None


def read_plan(path: Path) -> list[dict]:
    "The entries of a plan's file, each one that `expand` can use."
    try: plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e: raise Refused(f"{path} can't be read: {e.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise Refused(f"{path} is no YAML: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(plan, list) or not plan: raise Refused(f"{path} holds no list of runs, each with {', '.join(KINDS)}")
    for at, entry in enumerate(plan, 1):
        try: require_entry(entry)
        except Refused as e: raise Refused(f"{path}: entry {at} {e}") from None
    return plan


def require_entry(entry):
    "Refuse what is no entry of a plan."
    if not isinstance(entry, dict): raise Refused(f"is {entry!r:.80}: give {', '.join(KINDS)}")
    for key in ("name", "notebook"):
        if entry.get(key) is None: raise Refused(f"has no {key}")
    for key, value in entry.items():
        if key not in KINDS: raise Refused(f"has {key!r}, which is none of {', '.join(KINDS)}")
        kind, wanted = KINDS[key]
        if value is not None and not isinstance(value, kind): raise Refused(f"has {key}: {value!r:.80}: give {wanted}")
    for word, values in (entry.get("for") or {}).items():
        if not isinstance(values, list) or not values: raise Refused(f"has {word}: {values!r:.80} under for: give a list of values")


def expand(plan: list[dict], words: dict) -> list[dict]:
    "Every run of a plan, in order: name, notebook, parameters, needs, and its settings, in which `{out}` stays, wherever the runs lie."
    runs = []
    for entry in plan:
        entry = {"needs": [], "parameters": {}} | {k: v for k, v in entry.items() if v is not None}
        over = entry.pop("for", {})
        for values in itertools.product(*over.values()):
            own = dict(words)
            for word, value in zip(over, values): own |= value if isinstance(value, dict) else {word: value}
            run = fill(entry, own)
            runs.append(run | {"name": str(run["name"]), "needs": [str(n) for n in run["needs"]],
                               "settings": {"notebook": run["notebook"]} | fill(entry["parameters"], own | {"out": "{out}"})})
    require_runs(runs)
    return runs


def require_runs(runs: list[dict]):
    "Refuse runs that can't be told apart, lie elsewhere than below RUNS, or need what is not there."
    names = [r["name"] for r in runs]
    for r in runs:
        parts = Path(r["name"]).parts
        if not parts or ".." in parts or parts[0] == "/": raise Refused(f"'{r['name']}' is no name of a folder below the runs")
        if names.count(r["name"]) > 1: raise Refused(f"the plan names {r['name']} twice: give each run a name of its own")
        odd = [n for n in r["needs"] if n not in names]
        if odd: raise Refused(f"{r['name']} needs {odd[0]}, which is no run of the plan")
        try: json.dumps(r["parameters"])
        except TypeError as e: raise Refused(f"{r['name']}: its parameters are no JSON: {e}; put a date in quotes") from None


def select(runs: list[dict], only: list[str]) -> list[dict]:
    "The runs whose names begin with one of `only`; a beginning that no name has is answered with those that there are."
    names = [r["name"] for r in runs]
    starts = list(dict.fromkeys(n.split("/")[0] + "/"*("/" in n) for n in names))
    for odd in (o for o in only if not any(n.startswith(o) for n in names)):
        near = difflib.get_close_matches(odd, [*starts, *names], 1)
        raise Refused(f"--only {odd}: no run's name begins so; {f'did you mean {near[0]}? ' if near else ''}there are {', '.join(starts)}")
    return [r for r in runs if not only or r["name"].startswith(tuple(only))]


def check_runs(runs: list[dict], plan: list[dict], out: Path):
    "Refuse notebooks and parameters that don't exist, before the first run starts; what the plan's own runs will write may be missing yet."
    homes = [os.path.abspath(out/r["name"]) for r in plan]
    def own(v): return isinstance(v, str) and "/" in v and any(f"{os.path.abspath(v)}/".startswith(f"{h}/") for h in homes)
    asked = [(r["name"], r["notebook"], {k: "" if own(v) else v for k, v in r["parameters"].items()} | {"out": str(out/r["name"])})
             for r in runs if not left(r, out)]
    if not asked: return
    said = subprocess.run([sys.executable, "-c", CHECK], input=json.dumps(asked), capture_output=True, text=True)  # as a run is started
    if said.stdout: raise Refused(said.stdout.strip())
    why = said.stderr.strip().rpartition("\n")[2]
    if said.returncode: print(f"notebooks and parameters are not checked before the start: {why}", flush=True)


def start(run: dict, out: Path) -> subprocess.Popen:
    "One run in a process group of its own, on one thread; what it prints goes to log.txt in its folder."
    folder = out/run["name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"run.json").write_text(json.dumps(settings_of(run), indent=2) + "\n")
    command = [sys.executable, "-c", RUN, run["notebook"], str(folder/f"{run['notebook']}.ipynb"),
               json.dumps({**run["parameters"], "out": str(folder)})]
    with (folder/"log.txt").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def settings_of(run: dict) -> dict: return run.get("settings") or {"notebook": run["notebook"]} | run["parameters"]


def left(run: dict, out: Path) -> str:  # empty: not done
    "How earlier calls left a run: done before, or done with other settings; where these were not kept, nothing is compared."
    if not (out/run["name"]/"hash_manifest.json").is_file(): return ""
    now, kept = settings_of(run), {}
    with contextlib.suppress(OSError, ValueError): kept = json.loads((out/run["name"]/"run.json").read_text())
    def told(settings, k): return json.dumps(settings[k], sort_keys=True) if k in settings else "not given"
    pairs = {k: (told(kept, k), told(now, k)) for k in {**kept, **now}} if kept else {}
    changed = [f"{k} {was:.60}, now {wanted:.60}" for k, (was, wanted) in pairs.items() if was != wanted]
    return f"done with other settings: {'; '.join(changed)}" if changed else "done before"


def tell(state: str, name: str, more: str = "", at: float = 0): print(f"{at:5.0f} s  {state:13}{name}{more and f'  ({more})'}", flush=True)


def walk(runs: list[dict], out: Path, side_by_side: int, until: float, others=()) -> dict:
    "Run them all; name -> what became of it. Of the others nothing is run; what needs one that is done may start."
    began, going, told = time.monotonic(), {}, {r["name"]: {"state": left(r, out)} for r in runs if left(r, out)}
    needed, waiting = {n for r in runs for n in r["needs"]}, [r for r in runs if r["name"] not in told]
    there = {r["name"]: left(r, out) for r in others if r["name"] in needed and left(r, out)}
    for name, state in [*((n, t["state"]) for n, t in told.items()), *there.items()]:
        if state not in DONE: tell("taken as is" if name in there else "failed", name, state)
    def unmet(r): return [n for n in r["needs"] if n not in there and told.get(n, {}).get("state") not in DONE]
    while going or waiting:
        now = time.monotonic() - began
        for name, p in list(going.items()):
            ended = p.poll()
            if ended is None and now < until: continue
            if ended is None: os.killpg(p.pid, signal.SIGKILL)
            told[name] |= {"seconds": round(now - told[name]["began"], 1), "state": {0: "done", None: "stopped"}.get(ended, "failed")}
            del going[name]
            tell(told[name]["state"], name, str(out/name/"log.txt") if ended else "", now)
        ready = [r for r in waiting if not unmet(r)]
        for r in ready[:max(0, side_by_side - len(going))] if now < until else ():
            going[r["name"]], told[r["name"]] = start(r, out), {"began": round(now, 1)}
            waiting.remove(r)
        if not going and (now >= until or not ready): break
        (out/"lease.json").write_text(json.dumps(told, indent=2) + "\n")
        time.sleep(0.5)
    for r in waiting:
        if unmet(r): tell("not begun", r["name"], f"needs {', '.join(unmet(r))}", time.monotonic() - began)
    told |= {r["name"]: {"state": "not begun"} | ({"needs": unmet(r)} if unmet(r) else {}) for r in waiting}
    (out/"lease.json").write_text(json.dumps(told, indent=2) + "\n")
    return told


def fill_lease(a: argparse.Namespace) -> bool:
    "Whether all that was asked for is done."
    began = time.monotonic()
    if a.side_by_side < 1: raise Refused(f"--side-by-side {a.side_by_side}: give 1 or more")
    if not a.until > 0: raise Refused(f"--until {a.until}: give seconds, more than 0")
    plan = expand(read_plan(a.plan), words_of(a.set) | {"out": str(a.out)})
    runs = select(plan, a.only)
    try: a.out.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise Refused(f"--out {a.out}: {e.strerror}") from None
    check_runs(runs, plan, a.out)
    others = [r for r in plan if r["name"] not in {x["name"] for x in runs}]
    told = walk(runs, a.out, a.side_by_side, a.until - (time.monotonic() - began), others)
    return all(t["state"] in DONE for t in told.values())


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="WORD=VALUE", help="words of the plan")
    parser.add_argument("--side-by-side", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which all is stopped")
    parser.add_argument("--only", nargs="*", action="extend", default=[], metavar="START", help="runs whose names begin so")
    try: sys.exit(not fill_lease(parser.parse_args(given)))
    except Refused as e:
        print(f"lease.py: {e}", file=sys.stderr)
        raise


if __name__ == "__main__": main()
