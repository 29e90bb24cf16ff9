"""Counts of the house: how large its rooms and cells are, and how much of it an example shows.

    python tests/house.py            a table of the working tree
    python tests/house.py COMMIT     the same of a commit
"""
import ast
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def files(commit: str = "") -> dict[str, str]:
    "Path in the repository -> text, of the modules and notebooks."
    def wanted(p): return re.fullmatch(r"fer_nb/\w+\.py|nbs/\w+\.ipynb", p) and not p.endswith(("_modidx.py", "__init__.py"))
    git = ["git", "-C", str(ROOT)]
    if not commit:
        here = {p.relative_to(ROOT).as_posix(): p for d in ("fer_nb", "nbs") for p in sorted((ROOT/d).iterdir())}
        return {name: p.read_text(encoding="utf-8") for name, p in here.items() if wanted(name)}
    listed = subprocess.run([*git, "ls-tree", "-r", "--name-only", commit], capture_output=True, text=True, check=True).stdout.split()
    def shown(p): return subprocess.run([*git, "show", f"{commit}:{p}"], capture_output=True, text=True, check=True).stdout
    return {p: shown(p) for p in listed if wanted(p)}


def code(source: str) -> ast.Module:
    "A cell's code, without the lines that only a notebook understands."
    lines = ["" if line.lstrip().startswith(("%", "!", "#|")) else line for line in source.splitlines()]
    try: return ast.parse("\n".join(lines))
    except SyntaxError: return ast.parse("")


def cells(texts: dict[str, str]):
    "(notebook, source, is it exported) of every code cell."
    for path, text in texts.items():
        if not path.endswith(".ipynb"): continue
        for c in json.loads(text)["cells"]:
            s = "".join(c["source"])
            if c["cell_type"] == "code": yield path, s, bool(re.search(r"^#\|\s*exports?\b", s, re.M))


def definitions(tree: ast.Module) -> list[str]:
    "Names that a cell defines at its top; a method that is patched in counts as one."
    return [n.name for n in tree.body if isinstance(n, DEFINITIONS)]


def public_names(tree: ast.Module) -> set[str]:
    "What a cell adds to a module for everybody; a method that is patched in is its class's."
    def patched(n): return any("patch" in ast.unparse(d) for d in getattr(n, "decorator_list", []))
    return {n.name for n in tree.body if isinstance(n, DEFINITIONS) and not n.name.startswith("_") and not patched(n)}


def used(tree: ast.AST) -> set[str]:
    "Names and attributes that some code uses."
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def examples(texts: dict[str, str]) -> tuple[set[str], set[str]]:
    "(public names, those of them that a cell which isn't exported uses)."
    public, shown = set(), set()
    for _, source, exported in cells(texts):
        tree = code(source)
        if exported: public |= public_names(tree)
        else: shown |= used(tree)
    return public, public & shown


def arrows(texts: dict[str, str]) -> dict[str, set[str]]:
    "Module -> the modules of the house that it imports."
    names = {Path(p).stem for p in texts if p.startswith("fer_nb/")}
    def imported(tree):
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom) and n.module == "fer_nb": yield from (a.name for a in n.names)
            elif isinstance(n, ast.ImportFrom) and n.module:
                if n.level or n.module.startswith("fer_nb."): yield n.module.rsplit(".", 1)[-1]
            elif isinstance(n, ast.Import): yield from (a.name.rsplit(".", 1)[-1] for a in n.names if a.name.startswith("fer_nb."))
    return {Path(p).stem: (set(imported(ast.parse(t))) & names) - {Path(p).stem} for p, t in texts.items() if p.startswith("fer_nb/")}


def size(source: str) -> int: return sum(bool(line.strip()) and not line.startswith("#|") for line in source.splitlines())


def count(texts: dict[str, str]) -> dict[str, float]:
    "What is counted, by name."
    modules = {Path(p).stem: len(t.splitlines()) for p, t in texts.items() if p.startswith("fer_nb/")}
    exported = [(s, definitions(code(s))) for _, s, e in cells(texts) if e]
    with_one = [d for _, d in exported if d]
    public, shown = examples(texts)
    functions = [n.end_lineno - n.lineno + 1 for p, t in texts.items() if p.startswith("fer_nb/") for n in ast.walk(ast.parse(t))
                 if isinstance(n, DEFINITIONS[:2])]
    return {"modules": len(modules), "lines of modules": sum(modules.values()), "module, median lines": statistics.median(modules.values()),
            "module, most lines": max(modules.values()), "largest module": max(modules, key=modules.get),
            "notebooks": sum(p.endswith(".ipynb") for p in texts), "export cells": len(exported),
            "export cell, median lines": statistics.median(size(s) for s, _ in exported),
            "export cell, most lines": max(size(s) for s, _ in exported),
            "cells with one definition, of those with any": round(sum(len(d) == 1 for d in with_one)/len(with_one), 3),
            "function, median lines": statistics.median(functions), "functions over 40 lines": sum(f > 40 for f in functions),
            "public names": len(public), "public names in an example": round(len(shown)/len(public), 3),
            "arrows between modules": sum(map(len, arrows(texts).values()))}


def unshown(texts: dict[str, str]) -> dict[str, list[str]]:
    "Notebook -> its public names that stand in no example."
    _, shown = examples(texts)
    out: dict[str, list[str]] = {}
    for path, source, exported in cells(texts):
        if exported:
            for n in sorted(public_names(code(source)) - shown): out.setdefault(Path(path).stem, []).append(n)
    return out


if __name__ == "__main__":
    texts = files(*sys.argv[1:2])
    for name, value in count(texts).items(): print(f"{name:48}{value}")
    several = Counter(Path(p).stem for p, s, e in cells(texts) if e and len(definitions(code(s))) > 1)
    print("cells with several definitions:", dict(several))
    for nb, names in unshown(texts).items(): print(f"in no example, {nb}: {', '.join(names)}")
