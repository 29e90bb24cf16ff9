"""Render the executed notebooks, the API and the guides as a site for a browser without a network: `make docs`. Nothing is executed here.

The site has the repository's own layout, so that links stay what they are: nbs/05_students.ipynb becomes nbs/05_students.html, what a link
leads to is shown or copied, and a link that leads nowhere fails the build."""
import ast
import html
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pypandoc

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).parent
GUIDES = ("README.md", "docs/GALLERY.md", "docs/USE.md", "docs/SCALE.md", "runs/reference/RESULTS.md", "fer_nb/models/MODEL_CARD.md",
          "fer_nb/models/MODEL_CARD_fer2013.md", "CONTRIBUTING.md", "CHANGELOG.md")
SHOWN = {".py", ".yaml", ".yml", ".ini", ".toml", ".txt", ".qmd", ".md", ""}  # read as a page; other files are copied as they are
LONG = 14  # lines of an example that are folded


class Page(NamedTuple):
    "A page before links are followed."
    source: str  # its path in the repository, or api/MODULE
    title: str
    body: str
    about: str = ""


def at(source):
    "Where a page stands in the site."
    if source == "README.md": return "index.html"
    return re.sub(r"\.(md|ipynb)$", "", source) + ".html"


def pandoc(text):
    "Markdown as HTML, with formulas in MathML."
    command = [pypandoc.get_pandoc_path(), "--from=gfm", "--to=html5", "--mathml", "--wrap=preserve"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    return re.sub(r'<span id="cb[\d-]+"><a href="#cb[\d-]+"[^>]*></a>', "<span>", re.sub(r' id="cb\d+"', "", done))


def plain(text): return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<annotation.*?</annotation>", "", text)))


# Notebooks

def output(o, keep):
    "One output of a cell as markdown or as raw HTML, which `keep` puts aside; the richest form that a page can show."
    data, text = o.get("data") or {}, "".join
    if o["output_type"] == "error": return keep(f'<pre class="out">{html.escape(o["ename"])}: {html.escape(o["evalue"])}</pre>')
    if o["output_type"] == "stream": return keep(f'<pre class="out">{html.escape(bare(text(o["text"])))}</pre>')
    if "text/html" in data: return keep(rooted(re.sub(r"<style.*?</style>", "", text(data["text/html"]), flags=re.DOTALL)))
    if "text/markdown" in data:  # its headings are none of the page's
        return keep(rooted(pandoc(re.sub(r"^#+ (.*)$", r"**\1**", text(data["text/markdown"]), flags=re.MULTILINE))))
    for kind in ("image/svg+xml", "image/png", "image/jpeg"):
        if kind not in data: continue
        if kind.endswith("xml"): return keep(text(data[kind]))
        said = html.escape(bare(text(data.get("text/plain", "a figure"))).splitlines()[0][:80])
        return keep(f'<img alt="{said}" src="data:{kind};base64,{text(data[kind]).strip()}" loading="lazy">')
    return keep(f'<pre class="out">{html.escape(bare(text(data.get("text/plain", ""))))}</pre>')


def rooted(made):
    "An output without links into the folder of a run that was there when it was made, and without pictures that lie in it."
    made = re.sub(r'<a [^>]*?href="(?!https?:|#)[^"]*"[^>]*>(.*?)</a>', r"\1", made, flags=re.DOTALL)
    return re.sub(r'<img (?![^>]*?src="data:)(?:[^>]*?alt="([^"]*)")?[^>]*>', r"\1", made)


def bare(text): return re.sub(r"\x1b\[[\d;]*[A-Za-z]|^.*\r(?!\n)", "", text, flags=re.MULTILINE)


def defined(source):
    "The names that a cell defines."
    try: body = ast.parse(source).body
    except SyntaxError: return []
    names = [n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return names + [t.id for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]


def folded(source, why):
    return f'<details class="code">\n<summary>{why}</summary>\n\n`````python\n{source}\n`````\n\n</details>'


def code_cell(cell, keep):
    "A code cell: what the library gets is folded, results come before the example that made them, what is hidden stays so."
    lines = "".join(cell["source"]).split("\n")
    said = {m[1] for m in (re.match(r"#\| ?(\w+)", line) for line in lines) if m}
    source = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
    if said & {"hide", "default_exp"} or not source: return ""
    names = ", ".join(f"<code>{html.escape(n)}</code>" for n in defined(source))
    statements = ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.MULTILINE)).body
    imports = all(isinstance(n, ast.Import | ast.ImportFrom) for n in statements)
    rich = any({"text/html", "text/markdown", "image/png", "image/jpeg"} & set(o.get("data") or {}) for o in cell["outputs"])
    shown = "\n\n".join(["<div class=\"output\">", *(output(o, keep) for o in cell["outputs"]), "</div>"]) if cell["outputs"] else ""
    if "export" in said or imports: code = folded(source, "imports" if imports else f"the code: {names}" if names else "the code")
    elif rich and source.count("\n") >= LONG: code = folded(source, "how it was made")
    else: code = f"`````python\n{source}\n`````"
    return "\n\n".join(x for x in ((shown, code) if rich else (code, shown)) if x)


def notebook_page(path):
    nb, aside = json.loads((ROOT/path).read_text(encoding="utf-8")), []
    def keep(raw):
        aside.append(raw)
        return f'<div data-aside="{len(aside) - 1}"></div>'
    cells = [code_cell(c, keep) if c["cell_type"] == "code" else "".join(c["source"]) for c in nb["cells"]]
    body = re.sub(r'<div data-aside="(\d+)">\s*</div>', lambda m: aside[int(m[1])], pandoc("\n\n".join(filter(None, cells))))
    return page(path, body)


def page(source, body):
    "A page with the title that its first heading says, and what its first quotation says it is about."
    title = re.search(r"<h1[^>]*>(.*?)</h1>", body, re.DOTALL)
    about = re.search(r"<blockquote>\s*<p>(.*?)</p>", body, re.DOTALL)
    return Page(source, plain(title[1]) if title else Path(source).stem, body, plain(about[1]) if about else "")


def guide_page(path):
    text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT/path).read_text(encoding="utf-8"), flags=re.DOTALL)  # a card's front matter is for hubs
    return page(path, pandoc(text))


# The API

def comments(source):
    "Line -> the comment at its end: the docments."
    return {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}


def signature(node, about):
    "A function's parameters, one a line with its docment, and its docstring."
    args, d = node.args, [None]*(len(node.args.args) - len(node.args.defaults)) + node.args.defaults
    pairs = [*zip(args.args, d), *([(args.vararg, None)] if args.vararg else []), *zip(args.kwonlyargs, args.kw_defaults),
             *([(args.kwarg, None)] if args.kwarg else [])]
    rows = [(a.arg, ast.unparse(a.annotation) if a.annotation else "", ast.unparse(x) if x else "", about.get(a.lineno, ""))
            for a, x in pairs if a.arg not in ("self", "cls")]
    given = ", ".join(f"{'*' if a is args.vararg else '**' if a is args.kwarg else ''}{a.arg}{f'={ast.unparse(x)}' if x else ''}"
                      for a, x in pairs if a.arg not in ("self", "cls"))
    end = max((a.end_lineno for a, _ in pairs), default=node.lineno)
    returns = next((about[n] for n in range(end, node.body[0].lineno) if n in about and n != end), "")
    if node.returns: rows.append(("returns", ast.unparse(node.returns), "", returns))
    return f"{node.name}({given})", ast.get_docstring(node) or "", rows


def table(rows):
    if not any(kind or default or said for _, kind, default, said in rows): return ""
    def td(x, code): return f"<td>{f'<code>{html.escape(x)}</code>' if x and code else html.escape(x)}</td>"
    lines = [f"<tr>{td(n, n != 'returns')}{td(k, True)}{td(d, True)}{td(s, False)}</tr>" for n, k, d, s in rows]
    return ('<table class="api"><thead><tr><th></th><th>type</th><th>default</th><th></th></tr></thead><tbody>'
            + "".join(lines) + "</tbody></table>")


def said_in(docstring):
    return "".join("<p>" + re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(p)) + "</p>" for p in docstring.split("\n\n") if p)


def entry(name, head, docstring, rows, level=2):
    short = html.escape(name.rpartition(".")[2])
    return (f'<h{level} id="{name}"><code>{short}</code></h{level}>\n<pre class="signature">{html.escape(head)}</pre>\n'
            f"{said_in(docstring)}{table(rows)}")


def class_entry(node, methods, about, lines):
    fields = [(ast.unparse(n.target), ast.unparse(n.annotation), ast.unparse(n.value) if n.value else "", about.get(n.lineno, ""))
              for n in node.body if isinstance(n, ast.AnnAssign) and not ast.unparse(n.target).startswith("_")]
    init = next((signature(n, about) for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    head = lines[node.lineno - 1].strip().rstrip(":").removeprefix("class ").partition(":")[0]
    out = [entry(node.name, head if not init else init[0].replace("__init__", node.name, 1), ast.get_docstring(node) or "",
                 [*fields, *(init[2] if init else [])])]
    own = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    for m in (m for m in (*own, *methods) if not m.name.startswith("_")):
        out.append(entry(f"{node.name}.{m.name}", *signature(m, about), level=3))
    return "\n".join(out)


def api_page(module, notebook):
    "The public names of a module, with their signatures and docments; read as text, nothing is imported."
    source = (ROOT/"fer_nb"/f"{module}.py").read_text(encoding="utf-8")
    tree, about, lines = ast.parse(source), comments(source), source.splitlines()
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    public = next((ast.literal_eval(n.value) for n in assigned if ast.unparse(n.targets[0]) == "__all__"), [])
    patched = {}
    for n in tree.body:
        if isinstance(n, ast.FunctionDef) and any(ast.unparse(d) == "patch" for d in n.decorator_list) and n.args.args[0].annotation:
            patched.setdefault(ast.unparse(n.args.args[0].annotation), []).append(n)
    known = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    parts = []
    for name in sorted(public, key=lambda x: (not isinstance(known.get(x), ast.ClassDef | ast.FunctionDef), 0)):
        node = known.get(name)
        if isinstance(node, ast.ClassDef): parts.append(class_entry(node, patched.get(name, []), about, lines))
        elif node: parts.append(entry(name, *signature(node, about)))
        else: parts.append(value_entry(name, tree, about))
    doc = (ast.get_docstring(tree) or "").strip()
    intro = f"<h1>{module}</h1>\n<blockquote><p>{html.escape(doc)}</p></blockquote>\n<p><code>from fer_nb.{module} import …</code>"
    return page(f"api/{module}", f'{intro}, made by <a href="../{notebook}">{Path(notebook).stem}</a>.</p>\n' + "\n".join(parts))


def value_entry(name, tree, about):
    "A constant as it is written."
    def names(n): return [ast.unparse(t) for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    node = next((n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) and name in names(n)), None)
    if node is None: return entry(name, name, "", [])
    written = ast.unparse(node)
    said = about.get(node.lineno, "") or about.get(node.end_lineno, "")
    return entry(name, written if len(written) < 400 else written[:400] + " …", said, [])


# Links

def inside(source, href):
    "What a link of a page leads to in the repository, and its anchor."
    path, _, anchor = href.partition("#")
    here = source if not source.startswith("api/") else f"{source}.html"
    return (os.path.normpath(os.path.join(os.path.dirname(here), unquote(path))) if path else here), anchor


class Site:
    "Pages by the path of their source, and what their links ask for."
    def __init__(self, pages):
        self.pages, self.wanted, self.lost = {p.source: p for p in pages}, [], []
        self.names = {}
        for p in pages:
            if p.source.startswith("api/"):
                for name in re.findall(r'<h2 id="([^"]+)">', p.body): self.names.setdefault(name, f"{p.source}.html#{name}")

    def where(self, source, href):
        "A link of a page as it is in the site."
        if re.match(r"[a-z]+:", href): return href
        if href.startswith("#"): return href.lower() if source.endswith(".ipynb") else href
        target, anchor = inside(source, href)
        if target.endswith(".ipynb"): anchor = anchor.lower()  # Jupyter keeps the capitals of headings
        anchor = f"#{anchor}" if anchor else ""
        if target in self.pages: found = at(target)
        elif target.startswith("api/") and target.removesuffix(".html") in self.pages: found = target
        elif (ROOT/target).exists() and not target.startswith(".."): found = self.ask(target)
        else: self.lost.append(f"{source}: {href}"); return href
        return os.path.relpath(found, os.path.dirname(at(source)) or ".") + anchor

    def ask(self, target):
        "A file or folder that is no page of its own: shown, listed or copied."
        if target not in self.wanted: self.wanted.append(target)
        path = ROOT/target
        if path.is_dir(): return f"{target}/index.html" if target != "." else "files.html"
        return f"{target}.html" if path.suffix in SHOWN else target

    def linked(self, p):
        "A page's body with its links followed, and names of the API as links."
        body = re.sub(r'(<a [^>]*?href|<img [^>]*?src)="([^"]*)"', lambda m: m[1] + '="' + html.escape(
            self.where(p.source, html.unescape(m[2])) if not m[2].startswith("data:") else m[2]) + '"', p.body)
        if p.source.startswith("api/"): return body
        parts = re.split(r"(<a .*?</a>|<pre.*?</pre>|<h\d.*?</h\d>|<summary>.*?</summary>)", body, flags=re.DOTALL)
        return "".join(x if i % 2 else re.sub(r"<code>(\w+)</code>", lambda m: self.named(p, m), x) for i, x in enumerate(parts))

    def named(self, p, m):
        "A name in code, as a link where it is one of the API's that nothing else is called."
        if m[1] not in self.names or not re.search(r"_|[a-z][A-Z]|^[A-Z]\w+[a-z]", m[1]): return m[0]
        return f'<a class="name" href="{os.path.relpath(self.names[m[1]], os.path.dirname(at(p.source)) or ".")}">{m[0]}</a>'


def shown(target):
    "A file as a page, or a folder as a list."
    path = ROOT/target
    if path.is_dir():
        rows = "".join(f'<li><a href="{html.escape(q.name)}">{html.escape(q.name)}{"/" if q.is_dir() else ""}</a></li>'
                       for q in sorted(path.iterdir(), key=lambda q: (q.is_file(), q.name)) if not q.name.startswith((".", "__")))
        return Page(f"{target}/index", target, f"<h1>{html.escape(target)}</h1><ul>{rows}</ul>")
    return Page(target, target, f"<h1>{html.escape(target)}</h1><pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>")


# The frame around a page

def sidebar(groups, source):
    "The list of all pages, the part open that holds this one."
    up = os.path.dirname(at(source)) or "."
    out = []
    for name, pages in groups.items():
        here = " open" if any(p.source == source for p in pages) else ""
        links = "".join(f'<li><a href="{os.path.relpath(at(p.source), up)}"{" aria-current=page" if p.source == source else ""}>'
                        f"{html.escape(p.title)}</a></li>" for p in pages)
        out.append(f"<details{here}><summary>{name}</summary><ul>{links}</ul></details>")
    return "".join(out)


def contents(body):
    "The headings of a page."
    found = re.findall(r'<h([23]) id="([^"]+)"[^>]*>(.*?)</h\1>', body, re.DOTALL)
    return "".join(f'<li class="h{n}"><a href="#{i}">{html.escape(plain(t))}</a></li>' for n, i, t in found)


def frame(p, body, groups, order):
    "The whole HTML of a page."
    here = os.path.dirname(at(p.source)) or "."
    up = os.path.relpath(".", here)
    toc, place = contents(body), next((i for i, q in enumerate(order) if q.source == p.source), None)
    beside = [] if place is None else [(w, order[i]) for w, i in (("←", place - 1), ("→", place + 1)) if 0 <= i < len(order)]
    ways = "".join(f'<a href="{os.path.relpath(at(q.source), here)}">{w} {html.escape(q.title)}</a>' for w, q in beside)
    toc = f'<nav class="toc"><details open><summary>On this page</summary><ul>{toc}</ul></details></nav>' if toc.count("<li") > 2 else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(p.title)} · fer_nb</title><link rel="stylesheet" href="{up}/site.css"></head>
<body data-up="{up}"><input type="checkbox" id="menu" aria-label="list of pages"><header><label for="menu">☰</label>
<a href="{up}/index.html">fer_nb</a></header>
<aside><input type="search" placeholder="search" aria-label="search"><ul id="found"></ul>{sidebar(groups, p.source)}</aside>
<main>{toc}<article>{body}</article><footer>{ways}</footer></main>
<script src="{up}/search-index.js"></script><script src="{up}/site.js"></script></body></html>
"""


def search_index(pages, names):
    "What can be found: pages, their headings, and the names of the API."
    rows = [[p.title, at(p.source), p.about] for p in pages]
    rows += [[name, where, f"fer_nb.{where[4:].partition('.')[0]}"] for name, where in names.items()]
    rows += [[plain(t), f"{at(p.source)}#{i}", p.title] for p in pages if not p.source.startswith("api/")
             for i, t in re.findall(r'<h[23] id="([^"]+)"[^>]*>(.*?)</h[23]>', p.body, re.DOTALL)]
    return f"const FOUND = {json.dumps(rows, ensure_ascii=False, separators=(',', ':'))};\n"


# What a browser would ask for

def asked(text):
    "The ids of a page, the places that it links to, and what it loads."
    def every(pattern): return [html.unescape(x) for x in re.findall(pattern, text)]
    loads = every(r'<(?:img|script|source|iframe|video|audio|embed)\b[^>]*?\ssrc="([^"]*)"') + every(r'<link\b[^>]*?\shref="([^"]*)"')
    return set(every(r'<\w[^>]*?\sid="([^"]+)"')), every(r'<a\b[^>]*?\shref="([^"]*)"'), loads


def check(site):
    "Links and anchors that lead nowhere, and anything that a page would fetch from a network."
    site, wrong = Path(site), []
    files = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    pages = {n: asked((site/n).read_text(encoding="utf-8")) for n in sorted(files) if n.endswith(".html") and "report/reference" not in n}
    for name, (_, links, loads) in pages.items():
        wrong += [f"{name} loads {x[:80]}" for x in loads if re.match(r"(https?:)?//", x)]
        for href in dict.fromkeys([*links, *(x for x in loads if not re.match(r"data:|(https?:)?//", x))]):
            if re.match(r"(https?|mailto):", href): continue
            to, _, anchor = href.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(to))) if to else name
            if target not in files: wrong.append(f"{name}: {href} leads nowhere")
            elif anchor and target in pages and unquote(anchor) not in pages[target][0]: wrong.append(f"{name}: {href} has no such place")
    return wrong


def build(out, notebooks=None):
    "Write the site; a selection of notebooks makes a small one."
    out = Path(out)
    given = sorted(p.name for p in (ROOT/"nbs").glob("*.ipynb")) if notebooks is None else [f"{n}.ipynb" for n in notebooks]
    names = sorted(f"nbs/{n}" for n in given)
    modules = [(m[1], n) for n in names if (m := re.search(r'"#\| default_exp (\w+)', (ROOT/n).read_text(encoding="utf-8")))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # pandoc is a process of its own
        guides, books = list(pool.map(guide_page, GUIDES)), list(pool.map(notebook_page, names))
    api = [api_page(m, n) for m, n in sorted(modules)]
    first = [p for p in books if p.source == "nbs/index.ipynb"]
    groups = {"Guides": guides, "Notebooks": first + [p for p in books if p not in first], "API": api}
    pages = [p for group in groups.values() for p in group]
    site = Site(pages)
    written = {at(p.source): frame(p, site.linked(p), groups, groups["Notebooks"]) for p in pages}
    for target in site.wanted:  # grows while folders are listed
        if (ROOT/target).is_file() and (ROOT/target).suffix not in SHOWN: continue
        p = shown(target)
        written[site.ask(target)] = frame(p, site.linked(p), groups, [])
    shutil.rmtree(out, ignore_errors=True)
    for name, text in written.items():
        (out/name).parent.mkdir(parents=True, exist_ok=True)
        (out/name).write_text(text, encoding="utf-8")
    for target in site.wanted:
        if not (ROOT/target).is_file() or (ROOT/target).suffix in SHOWN: continue
        (out/target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/target, out/target)
    (out/"search-index.js").write_text(search_index(pages, site.names), encoding="utf-8")
    for name in ("site.css", "site.js"): shutil.copy(HERE/f"docs_{name}", out/name)
    return [f"{line} is not in the repository" for line in site.lost] + check(out)


def main():
    out = ROOT/"_docs"
    wrong = build(out)
    for line in wrong: print(line, file=sys.stderr)
    print(f"{sum(1 for _ in out.rglob('*.html'))} pages in {out.name}/, to be opened at {out.name}/index.html")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
