"""Draw the pictures that come with the package: first frames of scans never trained on.

python recipes/digits/pictures.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from packcache.digits.world import Scene, render, scan_indices

FOLDER = Path(__file__).parents[2] / "src" / "packcache" / "digits" / "pictures"

#: name: digit, which of its held-out scans, colour, corner of its box
PICTURES = {
    "red-3": (3, 2, "red", (0, 20)),
    "blue-7": (7, 2, "blue", (20, 40)),
    "yellow-5": (5, 4, "yellow", (0, 0)),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (digit, number, colour, (x, y)) in PICTURES.items():
        scan = int(scan_indices("test", digit)[number])
        scene = Scene(digit=digit, scan=scan, colour=colour, direction="right", x=x, y=y)
        Image.fromarray(render(scene, 1)[0]).save(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
