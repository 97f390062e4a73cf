"""Draw the pictures that come with the package: first frames of scans never trained on.

python recipes/digits/pictures.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from packcache.digits.scans import scan_indices
from packcache.digits.world import Digit, Scene, render

FOLDER = Path(__file__).parents[2] / "src" / "packcache" / "digits" / "pictures"

#: name: digit, which of its held-out scans, colour, corner of its box
PICTURES = {
    "red-3": (3, 8, "red", (4, 36)),
    "blue-7": (7, 2, "blue", (36, 64)),
    "yellow-5": (5, 4, "yellow", (8, 8)),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (value, number, colour, (x, y)) in PICTURES.items():
        scan = int(scan_indices("test", value)[number])
        digit = Digit(value=value, scan=scan, colour=colour, direction="right", x=x, y=y)
        Image.fromarray(render(Scene(digits=(digit,)), 1)[0]).save(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
