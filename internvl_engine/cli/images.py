"""Commands on single images: classify, caption, ask, embed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..printable import printable
from .console import Json, check_writable, command, print_json, print_table, print_title, show
from .labels import read_labels
from .model import BatchSize, Mode, ModelOptions, check_mode, parts_for
from .pictures import Results, sources

if TYPE_CHECKING:
    from torch import Tensor

NO_MODEL = ModelOptions()
Images = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Image files; - is standard input.")
]
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
    model: ModelOptions = NO_MODEL,
    as_json: Json = False,
) -> None:
    """Say which of some labels fits each image best.

    internvl classify photo.jpg --labels "cat,dog,red panda"
    """
    names, pictures = read_labels(labels), sources(images)
    engine = model.load(parts_for(check_mode(mode), texts=True))
    options: dict[str, Any] = {"templates": template, "mode": mode, "top_k": top}

    def show_labels(image: str, rows: Any) -> None:
        print_title(image)
        print_table(("", ""), [(f"{100 * p:.2f}%", label) for label, p in rows], indent="  ")

    results = Results(images, None if as_json else show_labels)
    results.take(engine.classify_each(pictures, names, batch_size=batch_size, **options))
    if as_json:
        rows = results.rows(lambda found: {"predictions": [row._asdict() for row in found]})
        document = {"model": engine.name, "mode": mode, "results": list(rows)}
        print_json(document | results.failure())
    results.finish()


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
    model: ModelOptions = NO_MODEL,
    as_json: Json = False,
) -> None:
    """Describe images in words.

    internvl caption photo.jpg --beams 5 --min-new-tokens 8
    """
    prompts = prompt or ["English caption:"]
    if stream and (as_json or len(images) > 1 or len(prompts) > 1 or beams > 1):
        raise typer.BadParameter(
            "one image with one prompt, one beam and no --json", param_hint="--stream"
        )
    pictures = sources(images)
    engine = model.load("caption")
    lengths: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    if stream:
        for piece in engine.caption(pictures[0], prompts[0], stream=True, **lengths):
            show(piece, end="")
        show("")
        return

    def show_texts(image: str, texts: list[str]) -> None:
        if len(images) > 1 or len(prompts) > 1:
            print_title(image)
        for text in texts:
            show(text)

    results = Results(images, None if as_json else show_texts)
    options: dict[str, Any] = {"num_beams": beams, "batch_size": batch_size, **lengths}
    results.take(engine.caption_each(pictures, prompts, **options))
    if as_json:
        rows = results.rows(lambda texts: {"captions": dict(zip(prompts, texts, strict=True))})
        print_json({"model": engine.name, "results": list(rows)} | results.failure())
    results.finish()


def ask(
    image: Annotated[str, typer.Argument(help="Image file; - is standard input.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...")],
    template: Annotated[
        str, typer.Option(help="Prompt with {} for the question.")
    ] = "Question: {} Answer:",
    beams: Beams = 1,
    max_new_tokens: MaxTokens = 30,
    model: ModelOptions = NO_MODEL,
    as_json: Json = False,
) -> None:
    """Answer questions about an image.

    internvl ask photo.jpg "What colour is the car?"
    """
    (picture,) = sources([image])
    engine = model.load("caption")
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": max_new_tokens}
    answers = engine.answer(picture, questions, template=template, **options)
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
        show(answer)


def embed(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IMAGE...]", help="Image files; - is standard input."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write .safetensors instead.")
    ] = None,
    mode: Annotated[str, typer.Option(help="c, g or both.")] = "c",
    normalize: Annotated[bool, typer.Option(help="Give vectors unit length.")] = True,
    batch_size: BatchSize = 32,
    model: ModelOptions = NO_MODEL,
    as_json: Json = False,
) -> None:
    """Turn images and texts into vectors: cosines between them tell how well they fit.

    internvl embed *.jpg --text "a red panda" --output vectors.safetensors
    """
    images, texts = images or [], text or []
    if not images and not texts:
        raise typer.BadParameter("give images, or texts with --text", param_hint="IMAGE...")
    check_mode(mode, "both")
    if output is not None:
        if output.suffix != ".safetensors":
            raise typer.BadParameter("needs the ending .safetensors", param_hint="--output")
        check_writable(output, "--output")
    pictures = sources(images)
    engine = model.load(parts_for(mode, images=bool(images), texts=bool(texts)))
    results = Results(images, None)
    vectors: dict[str, Tensor] = {}
    if images:
        options: dict[str, Any] = {"normalize": normalize, "batch_size": batch_size, "mode": mode}
        results.take(engine.each_image(pictures, **options))
        vectors |= _columns(list(results.values.values()), mode, engine.model.config.clip_embed_dim)
    if texts:
        vectors["text"] = engine.encode_text(texts, normalize=normalize)
    document = {
        "model": engine.name,
        "images": [images[number] for number in results.values],
        "texts": texts,
    }
    _give(document | results.failure(), vectors, output, as_json)
    results.finish()


def _columns(rows: list[Any], mode: str, width: int) -> "dict[str, Tensor]":
    """The embeddings (n, E) of every kind, of rows that have one or both."""
    import torch

    kinds = {"c": 0, "g": 1} if mode == "both" else {mode: None}
    of = {k: [row if i is None else row[i] for row in rows] for k, i in kinds.items()}
    none = torch.empty(0, width, dtype=torch.float32, device="cpu")
    return {k: torch.stack(found) if found else none for k, found in of.items()}


def _give(
    document: dict[str, Any], vectors: "dict[str, Tensor]", output: Path | None, as_json: bool
) -> None:
    """Writes or prints the vectors of the images and texts that a document names."""
    if output is not None:
        import json

        from safetensors.torch import save_file

        names = {k: v if isinstance(v, str) else json.dumps(v) for k, v in document.items()}
        save_file({kind: v.cpu().contiguous() for kind, v in vectors.items()}, output, names)
        shapes = {kind: list(v.shape) for kind, v in vectors.items()}
        document = document | {"output": str(output), "shapes": shapes}
        text = f"{output}: " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in vectors.items())
    else:
        rows = {kind: v.tolist() for kind, v in vectors.items()}
        document = document | {"embeddings": rows}
        text = "\n".join(
            "\t".join([kind, printable(name, None), *(f"{value:.6f}" for value in row)])
            for kind, of_kind in rows.items()
            for name, row in zip(
                document["texts" if kind == "text" else "images"], of_kind, strict=True
            )
        )
    if as_json:
        print_json(document)
    elif text:
        typer.echo(text)
