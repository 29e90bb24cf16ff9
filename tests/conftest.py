"""What several tests need: the real datasets where they are at hand, and a small dataset of embedded faces."""
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("shared_machine", deadline=None)  # a busy machine is no bug
settings.load_profile("shared_machine")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder with fer2013.zip and ferplus.zip; FER_NB_DATA names it, a folder shared/data beside the checkout is the default."
    folder = Path(os.environ.get("FER_NB_DATA", ROOT.parent / "shared" / "data"))
    missing = [n for n in ("fer2013.zip", "ferplus.zip") if not (folder / n).is_file()]
    if missing: pytest.skip(f"real data is not at hand ({', '.join(missing)}): set FER_NB_DATA to its folder")
    return folder


def picture(i, size=40, colour=False):
    "A smooth random picture, grey or BGR."
    shape = (size, size, 3) if colour else (size, size)
    noise = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)
