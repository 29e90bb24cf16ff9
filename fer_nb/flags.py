"""How the command line is read: flags as signatures have them, ranges, and answers to misspelt words. Written by hand, as cli.py."""
import argparse
import ast
import difflib
import io
import json
import re
import sys
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Parser", "Told", "about_function", "flags", "given", "ranged", "told"]


class Told(NamedTuple):
    "What a signature says of a parameter."
    about: str
    kind: str  # its annotation, or the type of its default
    default: object = None  # where it can be written down
    needed: bool = False


HERE = Path(__file__).parent


def told(where: str) -> dict[str, Told]:
    "Parameters with their docments, of MODULE.NAME or of a stage notebook; read as text, so that nothing is imported."
    if "." not in where: return _told_by_notebook(where)
    module, name = where.split(".")
    source = (HERE/f"{module}.py").read_text(encoding="utf-8")
    about, defined = _comments(source), [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    found = next(n for n in defined if n.name == name)
    named: list[tuple[str, ast.AnnAssign | ast.arg, ast.expr | None]]
    if isinstance(found, ast.ClassDef): named = [(ast.unparse(n.target), n, n.value) for n in found.body if isinstance(n, ast.AnnAssign)]
    else:
        args, defaults = found.args, [None]*(len(found.args.args) - len(found.args.defaults))
        named = [(x.arg, x, d) for x, d in zip([*args.args, *args.kwonlyargs], [*defaults, *args.defaults, *args.kw_defaults])]
    def kind(n, default): return ast.unparse(n.annotation) if n.annotation else type(_literal(default)).__name__
    return {k: Told(about.get(n.lineno, ""), kind(n, d), _literal(d), d is None) for k, n, d in named}


def _told_by_notebook(stage: str) -> dict[str, Told]:
    from fer_nb.runs import notebook_path
    cells = json.loads(Path(notebook_path(stage)).read_text(encoding="utf-8"))["cells"]
    source = "".join(next(c["source"] for c in cells if "parameters" in c["metadata"].get("tags", [])))
    about, named = _comments(source), [n for n in ast.parse(source).body if isinstance(n, ast.Assign)]
    return {ast.unparse(n.targets[0]): Told(about.get(n.lineno, ""), type(v := _literal(n.value)).__name__, v) for n in named}


def _comments(source: str) -> dict[int, str]:
    "Line -> the comment at its end."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def _literal(node):
    try: return None if node is None else ast.literal_eval(node)
    except ValueError: return None


def about_function(where: str) -> str:
    "The docstring of MODULE.NAME."
    module, name = where.split(".")
    source = (HERE/f"{module}.py").read_text(encoding="utf-8")
    return re.findall(rf'^def {name}\(.*?^    "(.+?)"$', source, re.MULTILINE | re.DOTALL)[0]


class Parser(argparse.ArgumentParser):
    "Usage errors in one line that names the remedy; a command's flags are made when it is the one that was given."
    fill = None
    last = None  # the command whose flags were read last: it knows what a misspelt one may have meant

    def error(self, message):
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        wrong = wrong or re.match(r"unrecognized arguments: (--\S+)()", message)
        if wrong:
            known = re.findall(r"[^', ]+", wrong[2]) or [o for p in (Parser.last, self) if p for o in p._option_string_actions]
            near = difflib.get_close_matches(wrong[1].partition("=")[0], known, 1, 0.6)
            if near: message = f"{message.partition(' (choose')[0]}: did you mean {near[0]}?"
        print(f"fer-nb: {message} (see '{self.prog} --help')", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args=None, namespace=None):
        if self.fill:
            self.fill(self)
            self.fill, Parser.last = None, self
            self._refuse_unknown(args or ())
        return super().parse_known_args(args, namespace)

    def _refuse_unknown(self, args):
        "Answer a misspelt flag before what is missing: it may be the very one."
        for word in args:
            if word == "--": return
            known = any(o.startswith(word.partition("=")[0]) for o in self._option_string_actions)
            if word.startswith("--") and " " not in word and not known: self.error(f"unrecognized arguments: {word}")


METAVARS = {"out": "DIR", "manifest": "DIR", "cache": "DIR", "softlabels": "DIR", "model": "FILE", "init_from": "PATH", "truth": "CSV",
            "convention": "NAME", "view": "VIEW", "device": "DEVICE", "source": "NAME", "data": "PATH", "arch": "NAME",
            "min_face": "PIXELS", "name": "NAME", "cluster": "NAME"}
RANGES = {"seed": (0, 2**32 - 1), "epochs": (1, 100_000), "val_fraction": (0, 0.9), "test_fraction": (0, 0.9),
          "sample": (0, 10**9), "img_size": (16, 4096), "framing_sample": (0, 10**9), "max_hamming": (0, 64),
          "resamples": (1, 10**7), "ties": (0, 100), "cores": (1, 4096), "batches": (1, 4096), "threads": (1, 4096), "runs": (1, 10**6),
          "min_face": (1, 10_000), "seconds": (0, 10**6), "ema": (0, 0.99), "delta": (0, 1), "window": (1, 120), "min_count": (1, 120),
          "jitter_limit": (0, 10_000), "most": (0, 10**9), "rows": (7, 10**9), "batch_size": (1, 65_536), "accumulate": (1, 4096),
          "lr": (1e-8, 10), "margin": (0, 1), "ece_margin": (0, 1), "agreement": (0, 1), "every": (1, 1000)}  # least and most of a number
MANY: dict[str, dict[str, Any]] = {"*": {"action": "append"}, "+": {"nargs": "+"}, "!": {"required": True}, "?": {"default": None}}
TYPES = {"int": int, "float": float}


def ranged(kind: type, name: str):
    "A reader of numbers within their range."
    low, high = RANGES[name]

    def read(text):
        try: value = kind(text)
        except ValueError: value = None
        if value is None or not low <= value <= high:  # nan is in no range
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{text}': give {what} from {low:,} to {high:,}")
        return value
    return read


def flags(
    parser,
    where: str,  # MODULE.NAME, or a stage notebook: who tells of the parameters
    words: str,  # flag, or flag<parameter where that has another name; .name is positional; * again and again, + several, ! must, ? unset
    **special,  # by flag: what argparse shall have otherwise
):
    "Flags as a signature has them: type, default and help are its own."
    known = told(where)
    for word in words.split():
        marks = "".join(c for c in word if c in MANY)
        name, _, parameter = word.strip("".join(MANY)).partition("<")
        positional, name = name.startswith("."), name.lstrip(".")
        t = known[parameter or name]
        how: dict[str, Any] = {"help": re.sub(r"\bNone\b", "not given", t.about).replace("%", "%%"), "default": t.default}
        if t.kind == "bool": how["action"] = "store_true"
        else:
            number = TYPES.get(t.kind.split(" | ")[0])
            usual = "N" if number is int else "X" if number else name.upper()
            how |= {"type": ranged(number, name) if number else str, "metavar": METAVARS.get(name, usual)}
        for m in marks: how |= MANY[m]
        if "*" in marks: how["default"] = []
        how |= special.get(name, {})
        if how["default"] not in (None, "", [], False) and not how.get("required"): how["help"] += " (default: %(default)s)"
        if positional: parser.add_argument(name, **{k: v for k, v in how.items() if k not in ("default", "required")})
        else: parser.add_argument(f"--{name.replace('_', '-')}", **how)


def given(c):
    "Parameters of a notebook by name."
    c.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter; may be repeated")
    c.add_argument("--parameters", default="{}", metavar="JSON", help="many parameters, as a JSON object")
