"""The demo's picture: prompts across, ways of sampling down, every row labelled with what it cost.

Drawn with Pillow and its built-in font, so that it looks the same everywhere.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_INK: Final = (28, 30, 36)
_GREY: Final = (112, 117, 128)
_PAPER: Final = (255, 255, 255)
_BAND: Final = (235, 244, 238)
_ACCENT: Final = (18, 122, 76)
_LABEL: Final = 260
_GAP: Final = 12
_MARGIN: Final = 28
_NOTE: Final = 22


@final
@dataclass(frozen=True, eq=False)
class Row:
    """One way of sampling.

    Args:
        title: its name.
        lines: what is said of it, at the left of its pictures.
        pictures: in [0, 1], one for each column.
        notes: what is said under each picture, if anything.
        marked: whether this row is the point of the sheet.
    """

    title: str
    lines: Sequence[str]
    pictures: Float[Tensor, "b 3 h w"]
    notes: Sequence[str] = ()
    marked: bool = False


def draw(
    title: str, subtitle: str, columns: Sequence[str], rows: Sequence[Row], footer: str, side: int = 128
) -> Image.Image:
    """The sheet.

    Args:
        title: large, at the top.
        subtitle: under it.
        columns: a caption for each column.
        rows: from the top.
        footer: small, at the bottom.
        side: about how many pixels a picture shall have; each of its own becomes a whole number of them.
    """
    height, width = rows[0].pictures.shape[-2:]
    factor = max(1, round(side / max(height, width)))
    cell_w, cell_h = width * factor, height * factor
    large, medium, small = (ImageFont.load_default(size=s) for s in (30, 20, 15))
    captions = [_wrap(_drawable(c), small, cell_w) for c in columns]
    head = _MARGIN + 44 + 34 + 14
    caption_h = 19 * max(map(len, captions)) + 8
    pitch = cell_h + 2 * _GAP + _NOTE
    size = (
        2 * _MARGIN + _LABEL + len(columns) * (cell_w + _GAP) - _GAP,
        head + caption_h + pitch * len(rows) + 16 + 24 + _MARGIN,
    )
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), _drawable(title), _INK, large)
    pen.text((_MARGIN, _MARGIN + 44), _drawable(subtitle), _GREY, medium)
    left = _MARGIN + _LABEL
    for i, lines in enumerate(captions):
        for j, line in enumerate(lines):
            # at the foot of the caption's space, next to the pictures
            y = head + caption_h - 8 - 19 * (len(lines) - j)
            pen.text((left + i * (cell_w + _GAP), y), line, _INK, small)
    for r, row in enumerate(rows):
        top = head + caption_h + r * pitch
        if row.marked:
            box = (_MARGIN - _GAP, top, size[0] - _MARGIN + _GAP, top + pitch - 2)
            pen.rounded_rectangle(box, 10, _BAND)
        y = top + _GAP
        pen.text((_MARGIN, y), _drawable(row.title), _ACCENT if row.marked else _INK, medium)
        y += 6
        for line in row.lines:
            y += 24
            pen.text((_MARGIN, y), _drawable(line), _INK if row.marked else _GREY, small)
        for i, picture in enumerate(row.pictures):
            image = Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
            at = (left + i * (cell_w + _GAP), top + _GAP)
            sheet.paste(image.resize((cell_w, cell_h), Image.Resampling.NEAREST), at)
            if row.notes:
                note = _drawable(row.notes[i])
                x = at[0] + (cell_w - small.getlength(note)) / 2
                pen.text((x, at[1] + cell_h + 3), note, _INK if row.marked else _GREY, small)
    pen.text((_MARGIN, size[1] - _MARGIN - 18), _drawable(footer), _GREY, small)
    return sheet


def _drawable(text: str) -> str:
    """The text in the letters that Pillow's built-in font has."""
    parted = unicodedata.normalize("NFKD", text.replace("×", "x"))
    return "".join(c if c.isascii() or c == "·" else "?" for c in parted if not unicodedata.combining(c))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than a column; a word that is wider is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width:
            word = word[:-2].rstrip("…") + "…"
        lines.append(word) if lines[-1] else lines.__setitem__(-1, word)
    return lines
