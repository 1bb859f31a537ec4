"""Checks a downloaded checkpoint: files, names, shapes, values, hashes, the published example.

No hashes were published with the models: they are printed, and compared where a file `SHA256SUMS`
in the directory, or the caller, gives some.
"""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, hub_options
from ..checkpoint.entries import Quantized
from ..checkpoint.errors import listed
from ..checkpoint.files import read_json, size_of
from ..checkpoint.fill import track
from ..checkpoint.forms import rule_of
from ..checkpoint.locate import Source
from ..checkpoint.plan import Plan
from ..checkpoint.pretrained import prepare, take_context_id
from ..modeling.chat import VisionLanguageModel
from ..modeling.internvl import InternVLModel
from ..modeling.whole import whole_class
from ..processing import InternVLProcessor
from .chat import check_tokenizer
from .example import TEXTS, check_example
from .report import Report

PUBLISHED = (1048, 13_834_975_747)  # tensors and parameters of InternVL-14B at 224 px
CHUNK = 1 << 22  # values looked at together: 8 MB in bfloat16
SUMS = "SHA256SUMS"
TOKENIZER = "tokenizer.model"


def verify(
    directory: str | Path,
    images: Sequence[str | Path] | None = None,
    *,
    texts: Sequence[str] = TEXTS,
    hashes: bool | Mapping[str, str] = True,
    values: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> Report:
    """Checks a checkpoint and reports; damage is a failed check, not an exception.

    Args:
        directory: the checkpoint, or a file of one.
        images: the three example images of the model card, to run its example; the whole model is
            then loaded.
        texts: of the example, in place of the model card's.
        hashes: whether to compute the SHA-256 of every weight file; or the expected ones by file.
        values: whether to read every weight and look for values that are not finite.
        progress: bars on stderr; None shows them on a terminal.
        options: further arguments of `from_pretrained`, such as config or parts.
    """
    report = Report(str(directory))
    try:
        model, plan, found = prepare(whole_class(directory, **options), directory, **options)
    except CheckpointError as error:
        for line in str(error).split("\n"):
            report.add("names and shapes", False, line)
        return report
    report.tensors = len(plan.names)
    report.parameters = sum(parameter.numel() for parameter in model.parameters())
    as_published = " as published" if (report.tensors, report.parameters) == PUBLISHED else ""
    counts = f"{report.tensors:,} tensors, {report.parameters:,} parameters{as_published}"
    report.add("names and shapes", True, counts)
    if plan.contents.leftovers:
        report.add("leftovers", None, f"ignored {listed(plan.contents.leftovers)}")
    _check_forms(report, plan, model)
    is_chat = isinstance(model, VisionLanguageModel)
    if is_chat:
        take_context_id(model, found)
        check_tokenizer(report, found, model)
    else:
        _check_processor(report, found, model.config, options)
    _check_sizes(report, plan, found)
    if values:
        _check_values(report, plan, progress)
    if hashes:
        known = hashes if isinstance(hashes, Mapping) else _known_sums(found.folder)
        _check_hashes(report, plan, known, progress)
    if images is not None and is_chat:
        report.add("example", None, "was published with InternVL-14B, not with chat models")
    elif images is not None and report.ok:
        _check_example(report, found, images, texts, options)
    return report


def _check_forms(report: Report, plan: Plan, model: Any) -> None:
    """Every quantized weight is in the form that the scheme of the configuration says.

    Wide ones may be others than the scheme's: a form that was slower on a device was not taken.
    """
    scheme = plan.contents.scheme
    if scheme is None:
        return
    entries = {name: plan.entry(name) for name in plan.names}
    stored = {name: entry for name, entry in entries.items() if isinstance(entry, Quantized)}
    others = []
    for name, entry in stored.items():
        rule = rule_of(scheme, model, name, entry.shape)
        if rule is None:
            others.append(f"{entry} is {entry.form}, not wide")
        elif not entry.is_in(rule):
            groups = f" in groups of {rule.group}" if rule.form == entry.form else ""
            others.append(f"{entry} is {entry.form}, not {rule.form}{groups}")
    found = f"but {listed(others)}" if others else f"{len(stored):,} weights are so"
    report.add("forms", not others, f"{scheme.name!r} in config.json, {found}")


def _processor(source: Source, options: Mapping[str, Any]) -> InternVLProcessor:
    if source.hub is None:
        return InternVLProcessor.from_pretrained(source.folder)
    return InternVLProcessor.from_pretrained(str(source.path), **hub_options(options))


def _check_processor(
    report: Report, source: Source, config: Any, options: Mapping[str, Any]
) -> None:
    """The tokenizer and the image settings, without which no text and no picture goes in."""
    if config.parts == "image" and not (source.folder / TOKENIZER).is_file():
        return
    try:
        processor = _processor(source, options)
        pieces, size = len(processor.tokenizer), processor.image_processor.size
    except (OSError, ValueError) as error:
        report.add("processor", False, str(error))
        return
    rows = config.qllama_config.vocab_size
    report.add("tokenizer", pieces <= rows, f"{pieces:,} pieces, the model knows {rows:,}")
    if size == config.image_size:
        report.add("image size", True, f"{size} px")
    else:
        report.add(
            "image size", False,
            f"the settings say {size} px, the position table is for {config.image_size} px; "
            "`internvl convert` writes them alike",
        )  # fmt: skip


def _check_sizes(report: Report, plan: Plan, source: Source) -> None:
    """The index's total_size against the tensors; archives against their own checksums."""
    for path in plan.contents.files:
        report.add("file", True, f"{path.name}, {path.stat().st_size:,} bytes")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            report.add("archive", damaged is None, f"{path.name}: {damaged or 'checksums agree'}")
    weights = source.weights()
    if weights.index is None:
        return
    stated = read_json(weights.index).get("metadata", {}).get("total_size")
    sizes = (size_of(file, name) for file in plan.contents.opened for name in file.names())
    found = sum(sizes)
    complete = {source.folder / file for file in (weights.shards or {}).values()}
    if stated is None or complete != set(plan.contents.files):
        return
    report.add("total size", stated == found, f"index says {stated:,}, tensors have {found:,}")


def _check_values(report: Report, plan: Plan, progress: bool | None) -> None:
    """Every value finite; no matrix all zero, as an unfinished download leaves them."""
    infinite, empty = [], []
    for name in track(plan.names, progress):
        entry = plan.entry(name)
        weight: Any = entry.read()
        # Of a quantized weight what it is made of: as few values, and none is made.
        quantized = isinstance(entry, Quantized)
        looks = [*map(_inspect, weight.inner_tensors().values() if quantized else (weight,))]
        bad, zero = sum(count for count, _ in looks), looks[0][1]
        if bad:
            infinite.append(f"{entry} ({bad:,} values)")
        if zero and name.endswith(".weight") and len(entry.shape) > 1 and ".lora_B." not in name:
            empty.append(str(entry))
    report.add("finite", not infinite, listed(infinite) or "every value")
    report.add("not empty", not empty, listed(empty) or "no matrix is all zero")


def _inspect(tensor: Tensor) -> tuple[int, bool]:
    """How many values are not finite, and whether all are zero; in chunks, as memory is short."""
    bad, zero = 0, True
    for chunk in tensor.reshape(-1).split(CHUNK):
        if chunk.dtype == torch.float8_e4m3fn:  # of which PyTorch compares nothing
            chunk = chunk.float()
        bad += int((~torch.isfinite(chunk)).sum())
        zero = zero and not bool(chunk.any())
    return bad, zero


def _check_hashes(
    report: Report, plan: Plan, known: Mapping[str, str], progress: bool | None
) -> None:
    paths = {path.name: path for path in plan.contents.files}
    for name in track(paths, progress):
        report.sha256[name] = _sha256(paths[name])
        if name in known:
            same = report.sha256[name] == known[name].lower()
            expected = "as known" if same else f"known is {known[name]}"
            report.add("sha256", same, f"{name} {report.sha256[name]}, {expected}")
        else:
            report.add("sha256", None, f"{name} {report.sha256[name]}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 22):
        yield block


def _known_sums(folder: Path) -> dict[str, str]:
    """The lines of `sha256sum`'s output: a hash, two characters, a file name."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines())
    return {parts[1].lstrip("*"): parts[0] for parts in lines if len(parts) == 2}


def _check_example(
    report: Report, source: Source, images: Sequence[str | Path], texts: Sequence[str],
    options: Mapping[str, Any],
) -> None:  # fmt: skip
    model = InternVLModel.from_pretrained(source.path, **options)
    processor = _processor(source, options)
    report.example = check_example(model, processor, images, texts)
    for mode, result in report.example.items():
        rows = "; ".join(" ".join(f"{p:.4g}" for p in row) for row in result["probabilities"])
        report.add(f"example {mode}", result["agrees"], rows)
