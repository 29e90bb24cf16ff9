"""Calibrated probabilities of faces with NumPy, OpenCV and onnxruntime alone.

    python predict_standalone.py model_fp32.onnx face.png another.jpg

Each picture is a face already, of any size. Whatever must be known of the model stands in its metadata. Copy what you need:
`Model(path)([image, ...])` gives an array (N, 7); images are uint8, BGR as cv2.imread gives them.
"""
import json
import math
import os
import sys
from pathlib import Path

import cv2
import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: onnxruntime's official builds report every session home otherwise
import onnxruntime as ort

KERNELS = {"area-cubic": (cv2.INTER_AREA, cv2.INTER_CUBIC), "area-linear": (cv2.INTER_AREA, cv2.INTER_LINEAR),
           "linear-linear": (cv2.INTER_LINEAR, cv2.INTER_LINEAR)}  # for shrinking, for enlarging


class Model:
    def __init__(self, path, provider="CPUExecutionProvider"):
        self.session = ort.InferenceSession(str(path), providers=[provider])
        if (got := self.session.get_providers()[0]) != provider: raise SystemExit(f"{provider} is not to be had: onnxruntime took {got}")
        said = self.session.get_modelmeta().custom_metadata_map
        if said.get("fer_nb.schema") != "1": raise SystemExit(f"{path}: no metadata that this program knows: make it with 'fer-nb export'")
        self.classes, self.geometry = json.loads(said["fer_nb.classes"]), json.loads(said["fer_nb.geometry"])
        if self.geometry["colour_order"] != "RGB": raise SystemExit(f"{path}: this program gives RGB, the model wants another order")
        self.temperature, self.bias = float(said["fer_nb.temperature"]), np.zeros(len(self.classes))
        beside = Path(path).parent/"logit_bias.json"
        if beside.is_file():
            values = json.loads(beside.read_text(encoding="utf-8"))
            self.bias = np.array([values.get("values", values).get(c, 0.0) for c in self.classes])

    def prepare(self, image):  # uint8 (H, W, 3) BGR or (H, W) grey -> uint8 (S, S, 3) RGB
        g, (h, w) = self.geometry, image.shape[:2]
        side, size = max(h, w), g["size"]
        if g.get("grey") and image.ndim == 3: image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)  # colours are nothing that it has learned
        if h != w:  # pad to a square by repeating the border; a large one is halved, thirded, ... on the way
            out = side if side <= 2*size else size*math.ceil(side/(2*size))
            k, shift = out/side, np.floor((side - np.array([w, h]))/2 + 0.5)
            m = np.column_stack([np.eye(2)*k, shift*k + (k - 1)/2])
            image, side = cv2.warpAffine(image, m, (out, out), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), out
        down, up = KERNELS[g["interpolation"]]
        if side != size: image = cv2.resize(image, (size, size), interpolation=down if side > size else up)
        if image.ndim == 2: image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)  # YCrCb keeps grey as it is
        if g["clahe"]:
            limit, tiles = g["clahe"]
            image = cv2.cvtColor(image, cv2.COLOR_BGR2YCrCb)
            image[..., 0] = cv2.createCLAHE(limit, (tiles, tiles)).apply(np.ascontiguousarray(image[..., 0]))
            image = cv2.cvtColor(image, cv2.COLOR_YCrCb2BGR)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def __call__(self, images):  # list of uint8 (H, W, 3) BGR or (H, W) grey -> float64 (N, 7), rows sum to 1
        mean, std = (np.array(self.geometry[k], np.float32) for k in ("mean", "std"))
        x = (np.stack([self.prepare(i) for i in images]).astype(np.float32)/np.float32(255) - mean)/std
        z = self.session.run(["logits"], {"faces": np.ascontiguousarray(np.moveaxis(x, -1, 1))})[0]
        z = z.astype(np.float64)/self.temperature + self.bias
        e = np.exp(z - z.max(1, keepdims=True))
        return e/e.sum(1, keepdims=True)


if __name__ == "__main__":
    if len(sys.argv) < 3: raise SystemExit(__doc__)
    model, paths = Model(sys.argv[1]), sys.argv[2:]
    images = [cv2.imread(p) for p in paths]
    for p, image in zip(paths, images):
        if image is None: raise SystemExit(f"{p} is not there, or is no picture")
    for path, row in zip(paths, model(images)):
        print(path, *(f"{c} {v:.3f}" for c, v in sorted(zip(model.classes, row), key=lambda cv: -cv[1])), sep="  ")
