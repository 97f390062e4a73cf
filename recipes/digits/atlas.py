"""Draw the world for the documentation: a clip of each kind, every fourth frame, its prompt above.

python recipes/digits/atlas.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from packcache.digits import prompts, world

TARGET = Path(__file__).parents[2] / "docs" / "images" / "world.png"
ZOOM, GAP, CAPTION = 1.5, 6, 26  # pixels
LATENTS = 8
#: kind, seed, patterned
CLIPS = (("one", 3, False), ("two", 4, True), ("hidden", 6, True), ("enters", 0, False))


def strip(scene: world.Scene) -> Image.Image:
    """Every fourth frame side by side: the last of each latent frame."""
    video = world.render(scene, world.GROUP * LATENTS - world.GROUP + 1)[:: world.GROUP]
    side = round(world.SIZE * ZOOM)
    out = Image.new("RGB", (LATENTS * (side + GAP) - GAP, side), "white")
    for number, frame in enumerate(video):
        picture = Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)
        out.paste(picture, (number * (side + GAP), 0))
    return out


def main() -> None:
    rows = []
    for kind, seed, patterned in CLIPS:
        scene = world.sample_scene(
            np.random.default_rng(seed), "test", kind=kind, gap=2, patterned=patterned
        )
        rows.append((f"{kind}: “{prompts.prompt(scene)}”", strip(scene)))
    height = sum(CAPTION + row.height + GAP for _, row in rows)
    page = Image.new("RGB", (rows[0][1].width, height), "white")
    draw, font, y = ImageDraw.Draw(page), ImageFont.load_default(size=16), 0
    for caption, row in rows:
        draw.text((0, y + 2), caption, fill="#22242c", font=font)
        page.paste(row, (0, y + CAPTION))
        y += CAPTION + row.height + GAP
    temporary = TARGET.with_suffix(".partial.png")
    page.save(temporary, optimize=True)
    temporary.replace(TARGET)


if __name__ == "__main__":
    main()
