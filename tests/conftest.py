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


@pytest.fixture(scope="session")
def film_path(real_data):
    "A function from the name of a real film or picture to its path."
    def path(name) -> Path:
        if not (real_data/"video"/name).is_file(): pytest.skip(f"the film {name} is not at hand")
        return real_data/"video"/name
    return path


def model_paths(name: str) -> list[Path]:
    "The files of a detector: in FER_NB_MODELS, or in shared/models beside the checkout."
    from fer_nb.detectors import MODEL_FILES
    for folder in filter(None, (os.environ.get("FER_NB_MODELS"), ROOT.parent/"shared"/"models")):
        paths = [Path(folder)/f.name for f in MODEL_FILES[name]]
        if all(p.is_file() for p in paths): return paths
    pytest.skip(f"the files of '{name}' are not at hand: set FER_NB_MODELS to their folder")


def picture(i, size=40, colour=False):
    "A smooth random picture, grey or BGR."
    shape = (size, size, 3) if colour else (size, size)
    noise = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)


def linear_model(path, faces, labels, size=48):
    "Save the softmax regression of prepared faces, uint8 (N, size, size, 3), as a model with metadata: small, honest, quick to make."
    import onnx
    from onnx import TensorProto, helper
    from sklearn.linear_model import LogisticRegression

    from fer_nb.deploy import ModelFacts
    from fer_nb.geometry import Geometry, normalise
    geometry = Geometry(size=size)
    x = normalise(faces, geometry).reshape(len(faces), -1)
    fitted = LogisticRegression(C=1e-4, max_iter=300).fit(x, labels)
    weights, bias = np.full((x.shape[1], 7), 0, np.float32), np.full(7, -30, np.float32)  # a class that was never shown is never given
    weights[:, fitted.classes_], bias[fitted.classes_] = fitted.coef_.T, fitted.intercept_
    nodes = [helper.make_node("Flatten", ["faces"], ["flat"]), helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"])]
    graph = helper.make_graph(nodes, "linear", [helper.make_tensor_value_info("faces", TensorProto.FLOAT, ["batch", 3, size, size])],
                              [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 7])],
                              [helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.ravel()),
                               helper.make_tensor("bias", TensorProto.FLOAT, bias.shape, bias)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, ModelFacts(geometry, 1.0, "linear", "0"*64, "synthetic-film").to_metadata())
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory) -> Path:
    "A linear model of faces that Haar finds in two drawn films."
    from fer_nb.artifacts import CLASSES
    from fer_nb.capture import SyntheticSource
    from fer_nb.detectors import Haar
    from fer_nb.geometry import Framing, Geometry, prepare_face
    from fer_nb.synthetic import label_at
    finder, geometry, faces, labels = Haar(min_face=60), Geometry(size=48), [], []
    for seed in (7, 8):
        film = SyntheticSource(14, 10, seed=seed)
        while frame := film.read():
            for d in finder.detect(frame.image)[:1]:
                faces.append(prepare_face(frame.image, geometry, d.box, crop=Framing().crop("haar")[0]))
                labels.append(CLASSES.index(label_at(film.events, 1000*frame.time_sec)))
    return linear_model(tmp_path_factory.mktemp("model")/"linear.onnx", np.stack(faces), np.array(labels))
