"""Contact sheets: many small images on one, each with its prediction."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_IMAGES = 1_000  # per sheet
WIDTH, HEIGHT, SIZE, GAP = 112, 146, 84, 14  # pixels: a cell, the image in it, and the gap between images


def contact_sheet_of(cells: list[tuple[dict[str, Any], np.ndarray | None]]) -> bytes:
    """A PNG file showing the first ``MAX_IMAGES`` images with their predicted digits or names of classes, probabilities and file names.

    Args:
        cells: Each prediction, as ``predict`` returns them, with its image: uint8 [28, 28], or None if it was refused.
    """
    cells = cells[:MAX_IMAGES]
    columns = min(12, max(4, math.ceil(math.sqrt(len(cells)))))
    sheet = Image.new("RGB", (columns * WIDTH, math.ceil(len(cells) / columns) * HEIGHT), "white")
    draw, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(11)
    for i, (row, pixels) in enumerate(cells):
        left, top = i % columns * WIDTH + GAP, i // columns * HEIGHT + GAP
        name = _printable(str(row["file"]).rpartition("/")[2])
        name = name if len(name) <= 15 else f"{name[:6]}...{name[-6:]}"
        if pixels is None:
            draw.rectangle((left, top, left + SIZE, top + SIZE), fill="#eeeeee")
            text, color = "refused", "#b00020"
        else:
            sheet.paste(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.NEAREST), (left, top))
            text, color = "no digit", "#b00020"
            if not row["error"]:
                text = f"{row['digit']}   {row['probability']:.1%}"
                if "name" in row:  # cut to fit into the cell
                    text = f"{_printable(row['name'])[:8]} {row['probability']:.0%}"
                color = "#b00020" if row["probability"] < 0.9 else "black"
        draw.text((left, top + SIZE + 3), text, fill=color, font=large)
        draw.text((left, top + SIZE + 23), name, fill="#555555", font=small)
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()


def _printable(text: str) -> str:
    return text.encode("ascii", "replace").decode()  # the font has ASCII only
