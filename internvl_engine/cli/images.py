"""Commands on single images: classify, caption, ask, embed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Debug, Json, command, print_json, print_table, print_title, progress
from .model import BatchSize, Device, Dtype, Mode, Model, check_mode, load

Images = Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")]
Beams = Annotated[int, typer.Option("--beams", min=1, help="1 is greedy; published: 5.")]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Published: 30.")]
MinTokens = Annotated[int, typer.Option("--min-new-tokens", min=0, help="Published: 8.")]
Stream = Annotated[bool, typer.Option("--stream", help="Print the text as it is made.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for function in (classify, caption, ask, embed):
        command(app)(function)


def classify(
    images: Images,
    labels: Annotated[
        list[str],
        typer.Option("--labels", "-l", help="Comma-separated, or @FILE with one label a line."),
    ],
    template: Annotated[
        list[str] | None,
        typer.Option(help='Prompt with {} for the label; may be repeated. "a photo of a {}."'),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels to show of each image.")] = 5,
    mode: Mode = "c",
    batch_size: BatchSize = 32,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say which of some labels fits each image best.

    internvl classify photo.jpg --labels "cat,dog,red panda"
    """
    names = _labels(labels)
    engine = load(model, device, dtype, check_mode(mode))
    options: dict[str, Any] = {"templates": template, "mode": mode, "top_k": top}
    found: list[list[Any]] = []
    with progress(len(images), "images") as bar:
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            found += engine.classify(part, names, **options)
            bar.update(len(part))
    if as_json:
        results = [
            {"image": image, "predictions": [row._asdict() for row in rows]}
            for image, rows in zip(images, found, strict=True)
        ]
        print_json({"model": engine.name, "mode": mode, "results": results})
        return
    for image, rows in zip(images, found, strict=True):
        print_title(image)
        print_table(("", ""), [(f"{100 * p:.2f}%", label) for label, p in rows], indent="  ")


def caption(
    images: Images,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help='What the description continues; may be repeated. "English caption:"'),
    ] = None,
    beams: Beams = 1,
    max_new_tokens: MaxTokens = 30,
    min_new_tokens: MinTokens = 0,
    stream: Stream = False,
    batch_size: BatchSize = 8,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Describe images in words.

    internvl caption photo.jpg --beams 5 --min-new-tokens 8
    """
    prompts = prompt or ["English caption:"]
    if stream and (as_json or len(images) > 1 or len(prompts) > 1 or beams > 1):
        raise typer.BadParameter(
            "one image with one prompt, one beam and no --json", param_hint="--stream"
        )
    engine = load(model, device, dtype, "caption")
    lengths = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    if stream:
        for piece in engine.caption(images[0], prompts[0], stream=True, **lengths):
            typer.echo(piece, nl=False)
        typer.echo()
        return
    texts: list[list[str]] = []
    with progress(len(images), "images") as bar:
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            options = {"num_beams": beams, "batch_size": batch_size, **lengths}
            texts += engine.caption(part, prompts, **options)
            bar.update(len(part))
    if as_json:
        results = [
            {"image": image, "captions": dict(zip(prompts, row, strict=True))}
            for image, row in zip(images, texts, strict=True)
        ]
        print_json({"model": engine.name, "results": results})
        return
    for image, row in zip(images, texts, strict=True):
        if len(images) > 1 or len(prompts) > 1:
            print_title(image)
        for text in row:
            typer.echo(text)


def ask(
    image: Annotated[str, typer.Argument(help="Image file.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...")],
    template: Annotated[
        str, typer.Option(help="Prompt with {} for the question.")
    ] = "Question: {} Answer:",
    beams: Beams = 1,
    max_new_tokens: MaxTokens = 30,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer questions about an image.

    internvl ask photo.jpg "What colour is the car?"
    """
    engine = load(model, device, dtype, "caption")
    options = {"num_beams": beams, "max_new_tokens": max_new_tokens}
    answers = engine.answer(image, questions, template=template, **options)
    if as_json:
        pairs = [
            {"question": question, "answer": answer}
            for question, answer in zip(questions, answers, strict=True)
        ]
        print_json({"model": engine.name, "image": image, "answers": pairs})
        return
    for question, answer in zip(questions, answers, strict=True):
        if len(questions) > 1:
            print_title(question)
        typer.echo(answer)


def embed(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE...]", help="Image files.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write .safetensors instead.")
    ] = None,
    mode: Annotated[str, typer.Option(help="c, g or both.")] = "c",
    normalize: Annotated[bool, typer.Option(help="Give vectors unit length.")] = True,
    batch_size: BatchSize = 32,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn images and texts into vectors: cosines between them tell how well they fit.

    internvl embed *.jpg --text "a red panda" --output vectors.safetensors
    """
    images, texts = images or [], text or []
    if not images and not texts:
        raise typer.BadParameter("give images, or texts with --text", param_hint="IMAGE...")
    if output is not None and output.suffix != ".safetensors":
        raise typer.BadParameter("needs the ending .safetensors", param_hint="--output")
    check_mode(mode, "both")
    tower = "image" if mode == "c" else "g"
    parts = "text" if not images else tower if not texts else "c" if mode == "c" else "g"
    engine = load(model, device, dtype, parts)
    vectors: dict[str, Any] = {}
    with progress(len(images), "images") as bar:
        if images:
            options: dict[str, Any] = {"mode": mode, "normalize": normalize}
            options |= {"batch_size": batch_size, "progress": bar.update}
            found = engine.encode_image(images, **options)
            vectors |= found._asdict() if mode == "both" else {mode: found}
    if texts:
        vectors["text"] = engine.encode_text(texts, normalize=normalize)
    _show_vectors(engine.name, images, texts, vectors, output, as_json)


def _show_vectors(
    name: str,
    images: list[str],
    texts: list[str],
    vectors: dict[str, Any],
    output: Path | None,
    as_json: bool,
) -> None:
    of = {kind: texts if kind == "text" else images for kind in vectors}
    document: dict[str, Any] = {"model": name, "images": images, "texts": texts}
    if output is not None:
        import json

        from safetensors.torch import save_file

        names = {"model": name, "images": json.dumps(images), "texts": json.dumps(texts)}
        save_file({kind: v.cpu().contiguous() for kind, v in vectors.items()}, output, names)
        document |= {
            "output": str(output),
            "shapes": {k: list(v.shape) for k, v in vectors.items()},
        }
    else:
        document["embeddings"] = {kind: v.tolist() for kind, v in vectors.items()}
    if as_json:
        print_json(document)
    elif output is not None:
        shapes = ", ".join(f"{kind} {tuple(v.shape)}" for kind, v in vectors.items())
        typer.echo(f"{output}: {shapes}")
    else:
        for kind, values in vectors.items():
            for item, row in zip(of[kind], values.tolist(), strict=True):
                typer.echo("\t".join([kind, item, *(f"{value:.6f}" for value in row)]))


def _labels(given: list[str]) -> list[str]:
    """The labels of all --labels, files read."""
    found: list[str] = []
    for value in given:
        parts = (
            Path(value[1:]).read_text("utf-8").splitlines()
            if value.startswith("@")
            else value.split(",")
        )
        found += [part.strip() for part in parts if part.strip()]
    if not found:
        raise typer.BadParameter("no label in it", param_hint="--labels")
    return found
