"""``vilavt attention``: draw where regions look inside the vision encoder, and what the query changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vilavt_core.cli.chat import Device, Dtype, DtypeOption
from vilavt_core.cli.quiet import open_quietly
from vilavt_core.cli.showing import printable_json
from vilavt_core.failures import printable_text
from vilavt_core.progress import counted, waiting
from vilavt_core.watching import zooms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vilavt_core.conversation import Inquiry
    from vilavt_core.protocol import Region
    from vilavt_core.results import ChatResult

    from ..chat import VilavtChat

NO_ZOOM = 3
"""Exit code when the conversation had no zoom call, so that there is nothing to draw."""


def attention(
    model: Annotated[str, typer.Option(help="Checkpoint folder in our format, or a hub id.")],
    image: Annotated[list[str], typer.Option(help="Image: a path. May be repeated.")],
    question: Annotated[
        str | None, typer.Option(help="Ask this, and draw every zoom call of the conversation. Or name regions.")
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="[IMAGE:]X1,Y1,X2,Y2 in pixels of the image as it is shown (as `vilavt ask --json` gives boxes), "
            "encoded without a conversation. May be repeated: regions of one call."
        ),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(
            help='With regions: what to look for in them; "" is no query. Given twice, the difference is drawn. With a '
            "question: another query, to compare the model's own with."
        ),
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="Vision block, from 0, or all; may be repeated. Default: query-aware ones.")
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="Head, from 0, or all, drawn beside the mean of all; may be repeated.")
    ] = None,
    patch: Annotated[
        list[str] | None,
        typer.Option(help="REGION:ROW,COLUMN, from 0, in patches of 14 pixels: draw where it looks. May be repeated."),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(help="received: how much a patch is looked at; 'region N' or 'patch N': where that one looks."),
    ] = None,
    out: Annotated[Path, typer.Option(help="A .png with everything, or a folder for one .png per call.")] = Path(
        "vilavt-attention.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print maps and numbers; the rest goes to stderr.")] = False,
    scale: Annotated[float, typer.Option(min=0.5, max=4, help="Size of the drawing.")] = 1.5,
    preset: Annotated[str | None, typer.Option(help="How the episode runs; default: the checkpoint's own.")] = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Draw where regions look inside the vision encoder, and what the query changes.

    With --question a conversation is run and each of its zoom calls drawn; with --region and --query no conversation is
    needed. Exit code 3: the conversation had no zoom call.
    """
    regions, queries = [_region(text) for text in region or ()], query or []
    if (question is None) == (not regions):
        raise typer.BadParameter("pass either --question, or --region and --query", param_hint="--question")
    if len(queries) > (2 if regions else 1) or (regions and not queries):
        allowed = "--region needs one --query, or two to compare" if regions else "--question takes one --query at most"
        raise typer.BadParameter(f"{len(queries)} given; {allowed}", param_hint="--query")
    other = queries[-1] if len(queries) == 2 or (question is not None and queries) else None
    patches = [_patch(text) for text in patch or ()]
    shown = show or ("patch 0" if patches and other is None else "received")
    if other is not None and shown != "received":
        raise typer.BadParameter(f"{show!r}: a comparison of two queries shows received", param_hint="--show")
    chosen: dict[str, Any] = {
        "blocks": _numbers("--block", block) if block else None,
        "heads": _numbers("--head", head),
    }
    if out.suffix.lower() != ".png" and not out.is_dir() and (out.suffix or out.is_file()):
        raise typer.BadParameter(f"{out}: name a .png file or a folder", param_hint="--out")
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(
            f"{out}: the folder {out.absolute().parent} does not exist; create it first", param_hint="--out"
        )
    settings: dict[str, Any] = {} if preset is None else {"preset": preset}

    def opened() -> VilavtChat:
        from ..chat import VilavtChat

        return VilavtChat.from_pretrained(model, dtype=dtype.value, device=device, **settings)

    chat = open_quietly(model, opened)
    from ..attention_maps import Patch, attention_of, zoom

    result = None
    if question is None:
        inquiries = [replace(zoom(chat.settings, image, regions), query=queries[0])]
        captions = [[_caption(i, one.box, one.index) for i, one in enumerate(regions)]]
    else:
        with waiting("asking"):
            result = chat.ask(image, question)
        typer.echo(
            f"answer: {printable_text(result.answer)}" if result.answer else f"no answer ({result.finish})", err=as_json
        )
        inquiries, captions = _zoom_calls(result)
        if not inquiries:
            typer.echo("the model answered without a zoom call: there is nothing to draw", err=True)
            raise typer.Exit(NO_ZOOM)
    chosen["patches"] = [Patch(*place) for place in patches]
    drawn = [
        attention_of(chat.model, chat.processor, inquiry, other, **chosen, captions=names)
        for inquiry, names in counted(list(zip(inquiries, captions, strict=True)), "measuring", "zoom call")
    ]
    record = _provenance(chat)
    for path in _draw(drawn, shown, out, scale, record):
        typer.echo(f"image: {path}", err=as_json)
    if as_json:
        told = None if result is None else result.to_json()
        calls = [one.to_json() for one in drawn]
        typer.echo(printable_json({**record, "conversation": told, "calls": calls}))


def _zoom_calls(result: ChatResult) -> tuple[list[Inquiry], list[list[str]]]:
    """Inquiries of crops, in order, and what each image is."""
    if result.error is not None:
        raise result.error
    inquiries = zooms(result)
    captions = []
    for inquiry in inquiries:
        shown = [result.images[i] for i in inquiry.image_indices]
        captions.append([_caption(i, one.box, one.parent) for i, one in enumerate(shown)])
    return inquiries, captions


def _caption(place: int, box: Sequence[float] | None, parent: int | None) -> str:
    return f"region {place}: [{', '.join(f'{value:g}' for value in box or ())}] of image {parent}"


def _provenance(chat: VilavtChat) -> dict[str, Any]:
    """What the maps depend on besides the images."""
    vision = chat.model.config.vision_config
    return {
        "checkpoint": chat.settings.checkpoint,
        "fingerprint": chat.settings.fingerprint,
        "integration_point": vision.integration_point,
        "query_aware_blocks": sorted(vision.query_aware_blocks()),
        "blocks": vision.depth,
        "heads": vision.num_heads,
        "patch_pixels": vision.patch_size,
        "provenance": chat.settings.provenance(chat.settings.seed).to_json(),
    }


def _draw(drawn: Sequence[Any], show: str, out: Path, scale: float, record: dict[str, Any]) -> list[Path]:
    """Write one image, or one for each call into a folder."""
    from PIL.PngImagePlugin import PngInfo

    from vilavt_core.attention_figure import draw_attention

    aware = ", ".join(map(str, record["query_aware_blocks"])) or "none"
    footer = (
        f"{record['checkpoint']}, fingerprint {(record['fingerprint'] or 'unknown')[:12]}; query-aware of "
        f"{record['blocks']} blocks: {aware}; rows are means of {record['heads']} heads where no head is named"
    )
    about = PngInfo()
    about.add_itxt("vilavt", json.dumps(record, ensure_ascii=False))
    if out.suffix.lower() == ".png":
        pages = [(out, list(drawn))]
    else:
        pages = [(out / f"zoom-{n}.png", [one]) for n, one in enumerate(drawn, 1)]
    pictures = [(path, draw_attention(page, show=show, footer=footer, scale=scale)) for path, page in pages]
    for path, picture in pictures:
        path.parent.mkdir(exist_ok=True)
        picture.save(path, pnginfo=about)
    return [path for path, _ in pictures]


# ---------------------------------------------------------------------- reading options


def _region(text: str) -> Region:
    from vilavt_core.protocol import Region

    index, colon, box = text.rpartition(":")
    try:
        x1, y1, x2, y2 = map(float, box.split(","))
        return Region(int(index) if colon else 0, (x1, y1, x2, y2))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: write [IMAGE:]X1,Y1,X2,Y2", param_hint="--region") from None


def _patch(text: str) -> tuple[int, int, int]:
    index, _, place = text.rpartition(":")
    try:
        row, column = map(int, place.split(","))
        return int(index), row, column
    except ValueError:
        raise typer.BadParameter(f"{text!r}: write REGION:ROW,COLUMN", param_hint="--patch") from None


def _numbers(option: str, given: Sequence[str] | None) -> list[int] | Literal["all"]:
    given = given or []
    if "all" in given:
        if len(given) > 1:
            raise typer.BadParameter("'all' stands alone", param_hint=option)
        return "all"
    try:
        return [int(one) for one in given]
    except ValueError:
        raise typer.BadParameter(f"{list(given)}: write numbers, or all", param_hint=option) from None


__all__ = ["attention"]
