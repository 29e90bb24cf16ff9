"""Draw the pictures of docs/GALLERY.md from the reference runs: `make gallery`. They show drawn faces, figures and pages, never a person.

    python workflow/gallery.py
"""
import shutil
from io import BytesIO
from pathlib import Path

import PIL.Image

from fer_nb import pack_figures
from fer_nb.material import Material, name_all
from fer_nb.tuning import tune, tuning_plot

ROOT = Path(__file__).resolve().parent.parent
OUT, RUNS = ROOT/"docs"/"gallery", ROOT/"runs"/"reference"


def keep(picture: PIL.Image.Image, name: str, width: int = 760):
    "Save a picture small."
    height = round(picture.height*width/picture.width)
    picture.convert("RGB").resize((width, height), PIL.Image.Resampling.LANCZOS).save(OUT/f"{name}.webp", quality=80, method=6)


def keep_figure(fig, name: str):
    "Save a figure small."
    data = BytesIO()
    fig.savefig(data, format="png", dpi=200)
    keep(PIL.Image.open(data), name)


def keep_page(page: Path, name: str):
    "The top of an HTML page, as a browser shows it; nothing where there is no browser."
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser: print("no browser: the picture of the report stays as it is"); return
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = b.new_page(viewport={"width": 860, "height": 1150})
        tab.goto(page.as_uri())
        keep(PIL.Image.open(BytesIO(tab.screenshot())), name)
        b.close()


def main():
    OUT.mkdir(exist_ok=True)
    m = Material(RUNS/"gpu", RUNS/"fer2013")
    name_all(m)
    first = m.conventions[0]
    keep_figure(pack_figures.reliability(m, first), "reliability")
    keep_figure(pack_figures.arms(m, first), "arms")
    keep_figure(pack_figures.timeline(m, m.found["session"][0]), "timeline")
    keep_figure(tuning_plot(tune(m.found["session"][0], jitter_limit=60, write=False)), "tuning")
    keep_page(ROOT/"report"/"reference"/"report.html", "report")


if __name__ == "__main__": main()
