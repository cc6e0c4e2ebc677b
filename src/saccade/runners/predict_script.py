"""``predict.py`` of an artefact: photos in, classes out, by the engine, NumPy and Pillow alone."""

from __future__ import annotations

_SCRIPT = '''"""Classes of photos: python predict.py PHOTO... (needs {needs}, numpy and pillow)"""

import json
import math
import sys
from pathlib import Path

import numpy as np
{imports}
from PIL import Image, ImageOps

HERE = Path(__file__).parent
CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))["saccade_export"]
PREP = CONFIG["preprocessing"]
{opening}

def pixels(photo: str) -> np.ndarray:
    """A photo as the model takes it: float32 [1, 3, h, w], or uint8 [1, H, W, 3]."""
    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    if CONFIG["pixels"]:  # the graph does the rest
        return np.asarray(image)[None]
    (h, w), mode = PREP["size"], PREP["crop_mode"]
    tall, wide = (math.floor(side / PREP["crop_pct"]) for side in (h, w))
    ratio = (min if mode == "border" else max)(wide / image.width, tall / image.height)
    size = (wide, tall) if mode == "squash" else (round(image.width * ratio), round(image.height * ratio))
    if mode == "center" and tall == wide:  # torchvision rounds the longer side down
        size = tuple(int(tall * side / min(image.size)) for side in image.size)
    image = image.resize(size, Image.Resampling[PREP["interpolation"].upper()])
    canvas = Image.new("RGB", (w, h), tuple(round(255 * m) for m in PREP["mean"]))
    spare = (w - image.width, h - image.height)  # what is padded, or below 0 cropped
    canvas.paste(image, tuple(s // 2 if s > 0 else -int(round(-s / 2)) for s in spare))
    array = (np.asarray(canvas, np.float32) / 255 - np.float32(PREP["mean"])) / np.float32(PREP["std"])
    return np.ascontiguousarray(array.transpose(2, 0, 1)[None])


def answer(photo: str) -> list:
    """The five best classes with their probabilities; of an encoder, the embedding."""
    batch = np.repeat(pixels(photo), CONFIG["runner"].get("batch") or 1, axis=0)
    logits = np.asarray({running}, np.float64)[0]
    if CONFIG["outputs"][0] == "embedding":
        return logits.tolist()
    odds = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    names = CONFIG.get("labels") or range(len(logits))
    return [f"{{names[i]}} {{odds[i]:.3f}}" for i in np.argsort(-odds)[:5]]


def main(photos: list) -> int:
    """A line for each photo; those that cannot be read are named on standard error, and the exit code is then 1."""
    if not photos or photos[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    unread = 0
    for photo in photos:
        try:
            print(photo, *answer(photo), sep="\\t")
        except OSError as error:
            unread = 1
            print(f"{{photo}}: {{error}}", file=sys.stderr)
    return unread


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''
HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}  # OpenVINO's words
_ENGINES = {
    "onnx": {
        "needs": "onnxruntime",
        "imports": "import onnxruntime",
        "opening": 'SESSION = onnxruntime.InferenceSession(str(HERE / "model.onnx"))\n',
        "running": 'SESSION.run(None, {"images": batch})[0]',
    },
    "openvino": {
        "needs": "openvino",
        "imports": "import openvino",
        "opening": 'PROGRAM = openvino.Core().read_model(str(HERE / "model.xml"))\n'
        "SHAPE = PROGRAM.input(0).partial_shape\n"
        'SHAPE[0] = CONFIG["runner"].get("batch") or 1  # what runs one size alone runs it faster\n'
        "PROGRAM.reshape(SHAPE)\n"
        'MODEL = openvino.compile_model(PROGRAM, "CPU", {"INFERENCE_PRECISION_HINT": HINTS})\n',
        "running": "MODEL(batch)[0]",
    },
    "aoti": {
        "needs": "torch",
        "imports": "import torch",
        "opening": 'MODEL = torch._inductor.aoti_load_package(str(HERE / "model.pt2"))\n',
        "running": "MODEL(torch.from_numpy(batch))[0].numpy()",
    },
    "torch": {
        "needs": "torch",
        "imports": "import torch",
        "opening": 'MODEL = torch.export.load(HERE / "model.pt2").module()\n',
        "running": "MODEL(torch.from_numpy(batch))[0].detach().numpy()",
    },
}


def script(engine: str, precision: str) -> str:
    """The text of ``predict.py`` for an engine; ``precision`` is what it was told to compute in."""
    parts = {name: text.replace("HINTS", repr(HINTS[precision])) for name, text in _ENGINES[engine].items()}
    if engine == "aoti":
        parts["imports"] = "import torch\nimport torch._inductor"
    return _SCRIPT.format(**parts)
