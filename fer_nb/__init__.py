"Facial expression recognition that people can trust: from images to evidence."
import os

__version__ = "0.1.0"

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime's official builds report every session home unless told so before they are loaded
