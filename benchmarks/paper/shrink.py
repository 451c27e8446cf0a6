"""Scale all images of a directory to 80 pixels on the shorter side: bicubic, saved as JPEG of quality 95.

python benchmarks/paper/shrink.py imagenette imagenette80
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

SIDE = 80


def shrink(source: Path, target: Path) -> None:
    """Write the images below ``source`` to the same paths below ``target``."""
    for path in sorted(source.rglob("*.JPEG")):
        with Image.open(path) as image:
            scale = SIDE / min(image.size)
            width, height = (round(side * scale) for side in image.size)
            small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        small.save(place, quality=95)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory with .JPEG images, at any depth")
    parser.add_argument("target", type=Path, help="directory to create")
    options = parser.parse_args()
    shrink(options.source, options.target)
