"""InternVL-14B whole on this machine, with random weights: load time, memory, speed.

    python -m internvl_engine.benchmarks.full_size /big/disk/14b --quantize int8

writes the checkpoint where it is not there (14 GB in int8, 8 GB in int4, 28 GB in bfloat16), and
in a process of its own loads it, encodes a picture (C and G) and describes it, twice: the first
time weights come from the disk. Memory is what the kernel counts of that process:

    anonymous   RssAnon, the most that was seen: what it allocated
    touched     VmHWM: that and the pages of mapped files that it read
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from internvl_engine.engine import InternVL

from .random_checkpoint import write_random

MODULE = "internvl_engine.benchmarks.full_size"
NEW_TOKENS = 16
STEP = 0.02  # seconds between two looks at the memory


def measure(folder: str | Path, new_tokens: int = NEW_TOKENS, **options: Any) -> dict[str, Any]:
    """Loads a checkpoint and uses it, in this process.

    Args:
        folder: of a checkpoint of InternVL-14B, any size.
        new_tokens: of the caption.
        options: of `InternVL.from_pretrained`.

    Returns:
        Seconds, tokens per second, and bytes of memory, beyond those before for `anonymous`.
    """
    before = status("RssAnon")
    with watching("RssAnon") as most:
        start = time.perf_counter()
        engine = InternVL.from_pretrained(folder, **options)
        found: dict[str, Any] = {"load_s": time.perf_counter() - start}
        found["load_anonymous"] = most() - before
        size = engine.model.config.image_size
        generator = torch.Generator().manual_seed(0)
        shape = (size, size, 3)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()
        for turn in ("first", "again"):
            found[turn] = _use(engine, image, new_tokens)
        found["anonymous"] = most() - before
    found["touched"] = status("VmHWM")
    found["weights"] = sum(parameter.nbytes for parameter in engine.model.parameters())
    return found


def _use(engine: InternVL, image: Any, new_tokens: int) -> dict[str, float]:
    embedding, encode_c = _timed(lambda: engine.encode_image([image], "c"))
    _, encode_g = _timed(lambda: engine.encode_image([image], "g"))
    assert bool(embedding.isfinite().all()), "an embedding is not finite"

    def describe(count: int) -> Any:
        return engine.caption([image], max_new_tokens=count, min_new_tokens=count)

    _, first = _timed(lambda: describe(1))
    _, whole = _timed(lambda: describe(new_tokens))
    rate = (new_tokens - 1) / (whole - first) if whole > first else float("inf")
    return {
        "encode_c_s": encode_c, "encode_g_s": encode_g, "first_token_s": first,
        "caption_s": whole, "tokens_per_s": rate,
    }  # fmt: skip


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@contextmanager
def watching(field: str) -> Iterator[Callable[[], int]]:
    """Looks at a field of the status all the time; gives the most so far."""
    done = threading.Event()
    most = status(field)

    def watch() -> None:
        nonlocal most
        while not done.wait(STEP):
            most = max(most, status(field))

    def so_far() -> int:
        return max(most, status(field))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield so_far
    finally:
        done.set()
        watcher.join()


def run(
    folder: str | Path, quantize: str | None = None, dtype: str = "auto",
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:  # fmt: skip
    """Writes the 14B where it is not there, and measures it in a process of its own.

    Args:
        folder: for the checkpoint, which stays.
        quantize: "int8", "int4" (of QLLaMA; the vision tower is int8) or None for bfloat16.
        dtype: that products are computed in.
        new_tokens: of the caption.

    Returns:
        As `measure`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        write_random(folder, quantize)
    command = [sys.executable, "-m", MODULE, str(folder), "--measure", "--dtype", dtype,
               "--new-tokens", str(new_tokens)]  # fmt: skip
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def page(found: dict[str, Any]) -> str:
    """What was measured, to be read."""
    gigabytes = {n: found[n] / 1e9 for n in ("weights", "load_anonymous", "anonymous", "touched")}
    lines = [
        f"loaded in {found['load_s']:.1f} s: {gigabytes['weights']:.2f} GB of weights, "
        f"{gigabytes['load_anonymous']:.2f} GB of memory",
        f"peak memory {gigabytes['anonymous']:.2f} GB, with mapped pages that were touched "
        f"{gigabytes['touched']:.2f} GB ({found['touched'] / 2**30:.2f} GiB)",
    ]
    for turn in ("first", "again"):
        use = found[turn]
        lines.append(
            f"{turn}: image C {use['encode_c_s']:.2f} s, G {use['encode_g_s']:.2f} s, first token "
            f"{use['first_token_s']:.2f} s, {use['tokens_per_s']:.2f} tokens/s"
        )
    return "\n".join(lines)


def main() -> None:
    """The command in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", help="where the checkpoint is, or is to be written")
    parser.add_argument("--quantize", choices=("int8", "int4"), default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--measure", action="store_true", help="in this process, as JSON")
    asked = parser.parse_args()
    if asked.measure:
        measured = measure(asked.folder, asked.new_tokens, dtype=asked.dtype)
        sys.stdout.write(json.dumps(measured) + "\n")
    else:
        found = run(asked.folder, asked.quantize, asked.dtype, asked.new_tokens)
        sys.stdout.write(page(found) + "\n")


if __name__ == "__main__":
    main()
