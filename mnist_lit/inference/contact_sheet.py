"""One picture of many small ones, with what was said of each."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_PICTURES = 1_000  # pictures on a sheet
WIDTH, HEIGHT, PICTURE, GAP = 112, 146, 84, 14


def contact_sheet_of(rows: list[dict[str, Any]], pictures: list[np.ndarray | None]) -> bytes:
    """A PNG with the first pictures, uint8 [28, 28], their digits, probabilities and names.

    Args:
        rows: What ``predict`` returns of them.
        pictures: None stands for one that could not be read.
    """
    shown = list(zip(rows, pictures, strict=False))[:MAX_PICTURES]
    columns = min(12, max(4, math.ceil(math.sqrt(len(shown)))))
    sheet = Image.new("RGB", (columns * WIDTH, math.ceil(len(shown) / columns) * HEIGHT), "white")
    draw, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(11)
    for place, (row, pixels) in enumerate(shown):
        left, top = place % columns * WIDTH + GAP, place // columns * HEIGHT + GAP
        name = str(row["file"]).rpartition("/")[2].encode("ascii", "replace").decode()  # what the font can show
        name = name if len(name) <= 15 else f"{name[:6]}...{name[-6:]}"
        if pixels is None:
            draw.rectangle((left, top, left + PICTURE, top + PICTURE), fill="#eeeeee")
            draw.text((left, top + PICTURE + 3), "not read", fill="#b00020", font=large)
        else:
            sheet.paste(Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (left, top))
            sure = "black" if row["probability"] >= 0.9 else "#b00020"
            draw.text((left, top + PICTURE + 3), f"{row['digit']}   {row['probability']:.1%}", fill=sure, font=large)
        draw.text((left, top + PICTURE + 23), name, fill="#555555", font=small)
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()
