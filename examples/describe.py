"""Describes a picture word by word, then answers questions about it.

python examples/describe.py                                      the embedded model and a sample
python examples/describe.py OpenGVLab/InternVL-14B-224px photo.jpg "What is the dog doing?"
"""

import sys

from internvl_engine import InternVL
from internvl_engine.assets import nano_directory

sample = sorted(nano_directory().glob("samples/*.png"))[0]
arguments = sys.argv[1:] or [nano_directory(), sample, "what digit is it?", "what colour is it?"]
model, image, *questions = arguments

engine = InternVL.from_pretrained(model, parts="caption")
for piece in engine.caption(image, stream=True):
    print(piece, end="", flush=True)
print()
for question in questions:
    print(question, engine.answer(image, question)[0])
