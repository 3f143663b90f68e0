"""Write the animation of the start page: that of `examples/mog.py` in fewer colours.

python examples/mog.py && python docs/animation.py runs/mog/training.gif
"""

import sys
from pathlib import Path

from PIL import Image, ImageSequence


def main(source: str) -> None:
    """Write docs/figures/mog_training.gif with one palette for all frames."""
    with Image.open(source) as movie:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(movie)]
    palette = frames[-1].quantize(64, dither=Image.Dither.NONE)
    first, *others = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    target = Path(__file__).parent / "figures" / "mog_training.gif"
    first.save(target, save_all=True, append_images=others, duration=125, loop=0, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
