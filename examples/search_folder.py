"""Indexes a folder of pictures, and finds those that fit a text or look like one of them.

python examples/search_folder.py                                 the embedded model and its samples
python examples/search_folder.py OpenGVLab/InternVL-14B-224px photos "a red panda"

Run it again: only new pictures are embedded. The index lies beside them, in .internvl_index.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from internvl_engine import InternVL
from internvl_engine.assets import nano_directory

with tempfile.TemporaryDirectory() as folder:  # of copies: an installed package stays as it is
    shutil.copytree(nano_directory() / "samples", folder, dirs_exist_ok=True)
    model, photos, query = sys.argv[1:] or [nano_directory(), folder, "something blue"]
    engine = InternVL.from_pretrained(model, parts="c")
    index = engine.index(photos, progress=lambda done, total: print(f"{done} of {total}"))
    print(index.report)
    for hit in engine.search(query, 3):
        print(f"{hit.score:.3f}  {hit.name}")
    best = engine.search(query, 1)[0]
    print("like", best.name, [hit.name for hit in engine.search(Path(best.path), 3)])
