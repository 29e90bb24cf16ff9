"""Write the part of Noto Sans CJK TC that the report's Chinese page needs. Run it after a new character came into report/_summary_zh.qmd.

    python workflow/font.py NotoSansCJK-Regular.ttc NotoSansCJK-Bold.ttc
"""
import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTCollection

ROOT = Path(__file__).resolve().parent.parent
FAMILY = "Noto Sans CJK TC"


def wanted() -> str:
    "Every character beyond Latin in the sources of the Chinese page, and in the sentences that are generated for it."
    text = (ROOT/"report"/"_summary_zh.qmd").read_text(encoding="utf-8") + (ROOT/"fer_nb"/"pack_blocks.py").read_text(encoding="utf-8")
    return "".join(sorted({c for c in text if ord(c) >= 0x2E80}))


def main():
    for path in sys.argv[1:]:
        font = next(f for f in TTCollection(path).fonts if f["name"].getDebugName(1) == FAMILY)
        options = subset.Options(layout_features=["*"], name_IDs=["*"], notdef_outline=True, hinting=False, desubroutinize=True)
        part = subset.Subsetter(options)
        part.populate(text=wanted())
        part.subset(font)
        out = ROOT/"fer_nb"/"static"/f"{Path(path).stem.replace('CJK', 'CJKtc')}.subset.otf"
        font.save(out)
        print(f"{len(wanted())} characters, {out.stat().st_size/1e3:.0f} kB: {out.relative_to(ROOT)}")


if __name__ == "__main__": main()
