"""Classifies pictures without training, by the likeness of their embeddings to those of labels.

python examples/zero_shot.py                                     the embedded model and its samples
python examples/zero_shot.py OpenGVLab/InternVL-14B-224px photo.jpg --labels cat,dog
"""

import argparse

from internvl_engine import InternVL
from internvl_engine.assets import DIGITS, nano_directory

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", default=str(nano_directory()))
parser.add_argument("images", nargs="*", default=sorted(nano_directory().glob("samples/*.png")))
parser.add_argument("--labels", default=",".join(DIGITS))
options = parser.parse_args()

engine = InternVL.from_pretrained(options.model, parts="g")
labels = options.labels.split(",")
for mode in ("c", "g"):  # the vision tower alone; with what QLLaMA's queries read
    rows = engine.classify(options.images, labels, mode=mode, top_k=2)
    for image, row in zip(options.images, rows, strict=True):
        shares = ", ".join(f"{label} {probability:.1%}" for label, probability in row)
        print(f"{mode.upper()}  {image}: {shares}")
