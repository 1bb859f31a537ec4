"""Talks about a picture: each answer as it is made, and the later questions know the earlier.

python examples/converse.py                          the embedded chat model and a sample
python examples/converse.py OpenGVLab/InternVL3-1B photo.jpg "What is this?" "And its colour?"
"""

import sys

from internvl_engine import InternVLChat
from internvl_engine.assets import nano_chat_directory, nano_directory

sample = nano_directory() / "samples" / "red-seven.png"
arguments = sys.argv[1:] or [nano_chat_directory(), sample, "What digits?", "What colour is it?"]
model, image, *questions = arguments

engine = InternVLChat.from_pretrained(model)
images, history = image, None
for question in questions:
    print(question, end=" ", flush=True)
    stream = engine.chat(images, question, history=history, stream=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    images, history = None, stream.history
