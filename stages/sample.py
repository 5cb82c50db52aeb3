"""sample: a small labelled set of fruit on a turntable, rendered, so that a first run needs no download.

usage: sample.py OUTPUT --frames 36 --size 100 --seed 0

writes  OUTPUT/LABEL/FRAME_100.jpg (stalk up) and OUTPUT/LABEL/r_FRAME_100.jpg (on its side), as Fruits-360 names them
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from tqdm import tqdm

Floats = NDArray[np.floating]  # all of a surface is float32, for speed

STEPS = 328  # frame numbers of a whole turn in Fruits-360, about 1.1 degrees apart
QUALITY = 90  # of the JPEG
RAYS = 2  # along each side of a pixel, which smooths the outline
POINTS = 7  # on the body for each ray of the frame: enough to leave no hole
MARGIN = 0.96  # of the frame is filled by the fruit's longer side
TILT = np.radians(22)  # the camera looks down on the turntable
LAMP = np.array([-0.50, 0.62, 0.60])  # x right, y to the camera, z up
MIRROR = np.array([-0.28, 0.90, 0.33])  # the normal that reflects the lamp to us


@dataclass(frozen=True)
class Part:
    """A closed surface around the stalk's axis, and its skin; lengths in half-widths."""

    base: str
    tint: str  # the second colour, which the patterns below blend in
    radius: float = 1.0
    length: float = 1.0  # from the middle to an end, in radii
    height: float = 0.0  # of the middle, above the fruit's
    taper: float = 0.0  # narrower above, wider below
    boxy: float = 0.0  # fuller ends, towards a cylinder
    neck: float = 0.0  # a waist in the upper half
    top: float = 0.0  # the stalk end drawn out, or sunk where negative
    bottom: float = 0.0  # the same of the other end
    ridges: int = 0
    ridge: float = 0.0  # their height
    cleft: float = 0.0  # depth of the seam of a stone fruit
    sag: float = 0.0  # how far the rim of a leaf hangs down
    bend: float = 0.0  # radians from the middle to an end
    lumps: float = 0.012  # unevenness of growth
    pores: float = 0.0  # their depth
    start: float = 0.0  # what the sum of the patterns must exceed to tint
    along: float = 0.0  # towards the stalk
    across: float = 0.0  # towards the side that saw the sun
    stripes: int = 0
    stripe: float = 0.0  # their strength
    mottle: float = 0.3
    sharp: float = 3.0  # edge of the tint
    dots: int = 0
    dot: str = "white"
    dot_size: float = 0.015
    gloss: float = 0.3


STALK = Part("#4a3520", "#8b7a44", radius=0.055, length=6, bend=0.5, boxy=0.8, gloss=0.1)
GREEN = Part("#4f7a28", "#7fa548", radius=0.06, length=4, bend=0.4, boxy=0.8, gloss=0.2)
LEAVES = Part("#4c8a2c", "#7fb04a", length=0.06, ridges=5, ridge=0.6, lumps=0.05, gloss=0.1)

# fmt: off
CATALOGUE: dict[str, tuple[Part, ...]] = {
    "Apple Golden": (
        Part("#c9c03f", "#ecca5a", length=0.95, taper=-0.12, top=-0.36, bottom=-0.22, ridges=5,
             ridge=0.012, across=0.7, dots=260, dot="#8d7a2c", gloss=0.35),
        replace(STALK, height=0.82),
    ),
    "Apple Red": (
        Part("#dba545", "#9c1420", length=0.92, taper=-0.14, top=-0.38, bottom=-0.22, ridges=5,
             ridge=0.015, start=-0.65, along=-0.55, across=0.4, stripes=38, stripe=0.25,
             mottle=0.35, sharp=4, dots=200, dot="#d98a6a", gloss=0.5),
        replace(STALK, height=0.78),
    ),
    "Banana": (
        Part("#f0c92c", "#7d7a2c", length=4.6, boxy=0.8, neck=0.5, top=0.8, bottom=0.3, ridges=5,
             ridge=0.05, bend=0.85, start=0.93, along=1, mottle=0.02, sharp=40, dots=70,
             dot="#6b4a1c", gloss=0.15),
    ),
    "Eggplant": (
        Part("#2a1030", "#4a1f4f", length=1.65, taper=0.28, mottle=0.4, gloss=0.9),
        replace(LEAVES, radius=0.55, height=1.62, sag=0.5),
        replace(GREEN, radius=0.13, height=1.95, length=3),
    ),
    "Kiwi": (
        Part("#6b4f2c", "#957548", length=1.28, boxy=0.12, lumps=0.02, pores=0.006, mottle=0.8,
             gloss=0),
        Part("#3d2b18", "#5a4526", radius=0.13, length=0.6, height=1.26, gloss=0),
    ),
    "Lemon": (
        Part("#f2cf2b", "#dcc22c", length=1.2, top=0.22, bottom=0.26, lumps=0.03, pores=0.0035,
             gloss=0.4),
    ),
    "Lime": (
        Part("#4e8a22", "#a3b840", length=1.12, top=0.1, bottom=0.18, lumps=0.02, pores=0.003,
             across=0.5, start=0.5, gloss=0.5),
    ),
    "Orange": (
        Part("#ec7a10", "#f2982a", length=0.95, top=-0.06, lumps=0.02, pores=0.0045, gloss=0.35),
        replace(LEAVES, radius=0.1, height=0.91, ridge=0.3),
    ),
    "Peach": (
        Part("#eeb765", "#b8323a", length=0.94, top=-0.25, bottom=0.08, cleft=0.09, lumps=0.02,
             across=1, start=0.1, mottle=0.6, gloss=0.03),
    ),
    "Pear": (
        Part("#b9b83c", "#c98a35", length=1.35, taper=0.32, neck=0.25, bottom=-0.18, lumps=0.03,
             across=0.7, start=0.6, dots=420, dot="#75652a", gloss=0.25),
        replace(STALK, height=1.5),
    ),
    "Plum": (
        Part("#3a1838", "#7a2440", length=1.1, top=-0.12, cleft=0.07, across=0.6, mottle=0.7,
             gloss=0.22),
        replace(STALK, height=1.1, length=4),
    ),
    "Strawberry": (
        Part("#c41420", "#ea6a50", length=1.2, taper=-0.36, boxy=0.1, top=-0.1, lumps=0.025,
             start=0.85, along=1, sharp=7, dots=150, dot="#f0cf6a", dot_size=0.045, gloss=0.5),
        replace(LEAVES, radius=0.5, height=1.2, ridges=7, sag=0.15),
        replace(GREEN, height=1.35),
    ),
    "Tomato": (
        Part("#d3200f", "#e5571c", length=0.82, top=-0.2, bottom=-0.05, ridges=6, ridge=0.015,
             along=0.7, start=0.8, gloss=0.8),
        replace(LEAVES, radius=0.42, height=0.74, sag=0.12),
        replace(GREEN, height=0.85),
    ),
    "Watermelon": (
        Part("#234d1c", "#8fae5a", length=1.12, stripes=11, stripe=1, start=0.5, mottle=0.5,
             sharp=5),
        replace(STALK, height=1.15, length=3),
    ),
}
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """Render every label of the catalogue."""
    args = parse_args(argv)
    args.output.mkdir()
    render = functools.partial(write_label, folder=args.output, frames=args.frames, size=args.size, seed=args.seed)
    with ProcessPoolExecutor() as pool:
        labels = tqdm(pool.map(render, CATALOGUE), "sample", len(CATALOGUE), unit="label")
        written = sum(labels)
    print(f"sample: {written:,} images of {len(CATALOGUE)} labels")


def write_label(label: str, folder: Path, frames: int, size: int, seed: int) -> int:
    """Write the images of one label and return their number."""
    rng = np.random.default_rng([seed, *label.encode()])  # the same in whichever process
    fruit = grow(CATALOGUE[label], POINTS * (RAYS * size) ** 2, rng)
    upright, lying = turn(1, 2, rng.normal(0, 0.08)), turn(1, 2, np.pi / 2)
    (folder / label).mkdir()
    for prefix, pose in (("", upright), ("r_", lying)):
        for index in range(frames):
            view = turn(1, 2, -TILT) @ turn(0, 1, 2 * np.pi * index / frames) @ pose
            name = f"{prefix}{round(index * STEPS / frames)}_100.jpg"  # 100 whatever the size
            photograph(fruit, view, size, rng).save(folder / label / name, quality=QUALITY)
    return 2 * frames


@dataclass(frozen=True)
class Cloud:
    """The surface of a fruit as n points, in its own axes: z along the stalk."""

    points: Floats  # (3, n) positions in half-widths
    normals: Floats  # (3, n) unit vectors outwards
    colours: Floats  # (3, n) linear RGB, 0 to 1
    gloss: Floats  # (n,) strength of the reflections, 0 to 1


def grow(parts: Sequence[Part], count: int, rng: np.random.Generator) -> Cloud:
    """Cover the body of a fruit with ``count`` points, and its other parts as densely."""
    areas = [(part.radius * (1 + part.ridge)) ** 2 * max(part.length, 1) for part in parts]
    layers = []
    for part, area in zip(parts, areas, strict=True):
        polar, around = spiral(int(count * area / areas[0]))
        ways = rng.normal(size=(3, 16))
        waves = np.vstack([ways / np.linalg.norm(ways, axis=0), rng.uniform(0, 2 * np.pi, 16)])
        points = surface(part, polar, around, waves)
        south = surface(part, polar + np.float32(2e-3), around, waves) - points
        east = surface(part, polar, around + np.float32(2e-3), waves) - points
        normals = np.cross(south, east, axis=0)
        normals /= np.linalg.norm(normals, axis=0)
        gloss = np.full(len(polar), part.gloss, np.float32)
        layers.append((points, normals, skin(part, polar, around, waves), gloss))
    return Cloud(*(np.concatenate(each, axis=-1) for each in zip(*layers, strict=True)))


def spiral(count: int) -> tuple[Floats, Floats]:
    """Return ``count`` evenly spread directions: (n,) angles from the stalk and about it."""
    steps = np.arange(count)
    polar = np.arccos(1 - (2 * steps + 1) / count)
    around = steps * np.pi * (3 - np.sqrt(5)) % (2 * np.pi)
    return polar.astype(np.float32), around.astype(np.float32)


def sphere(polar: Floats, around: Floats) -> Floats:
    """Return the (3, n) unit vectors of (n,) angles."""
    out = np.sin(polar)
    return np.array([out * np.cos(around), out * np.sin(around), np.cos(polar)])


def surface(part: Part, polar: Floats, around: Floats, waves: Floats) -> Floats:
    """Return the (3, n) positions of a part at (n,) angles."""
    x, y, up = sphere(polar, around)
    wide = 1 - part.taper * up + part.boxy * up**2
    wide *= 1 - part.neck * np.exp(-(((up - 0.75) / 0.35) ** 2))
    wide *= 1 + part.ridge * np.cos(part.ridges * around)
    wide *= 1 - part.cleft * np.exp(-((np.sin(around / 2) / 0.12) ** 2))
    x, y = x * wide, y * wide
    z = part.length * up - part.sag * (x**2 + y**2)
    z += part.top * np.exp(-((polar / 0.42) ** 2))
    z -= part.bottom * np.exp(-(((np.pi - polar) / 0.36) ** 2))
    growth = 1 + part.lumps * noise(np.array([x, y, z]), 2, waves)
    if part.pores:
        growth += part.pores * noise(np.array([x, y, z]), 60, waves)
    x, y, z = x * growth, y * growth, z * growth
    if part.bend:
        centre = part.length / part.bend
        x, z = (centre + x) * np.cos(z / centre) - centre, (centre + x) * np.sin(z / centre)
    return part.radius * np.array([x, y, z]) + np.array([[0], [0], [part.height]], np.float32)


def skin(part: Part, polar: Floats, around: Floats, waves: Floats) -> Floats:
    """Return the (3, n) linear RGB of a part at (n,) angles."""
    ball = sphere(polar, around)
    tint = part.along * ball[2] + part.across * ball[0] - part.start
    tint += part.mottle * noise(ball, 5, waves)
    if part.stripes:
        tint += part.stripe * np.cos(part.stripes * around + noise(ball, 9, waves))
    palette = [ImageColor.getrgb(name) for name in (part.base, part.tint, part.dot)]
    base, other, dot = np.square(np.array(palette, np.float32)[:, :, None] / 255)  # linear light
    colours: Floats = base + (other - base) / (1 + np.exp(-part.sharp * tint))
    for centre in sphere(*spiral(part.dots)).T:
        # The points run from the stalk down, so those near a dot lie in one slice.
        near = slice(*np.searchsorted(-ball[2], np.array([-1, 1]) * part.dot_size - centre[2]))
        distance = np.linalg.norm(ball[:, near] - centre[:, None], axis=0)
        cover = np.clip(2 - 2 * distance / part.dot_size, 0, 1)
        colours[:, near] += (dot - colours[:, near]) * cover
    colours *= 1 + 0.05 * noise(ball, 24, waves)  # no skin is even
    return colours * (1 + min(part.top, 0) * np.exp(-((polar / 0.3) ** 2)))  # nor a hollow as light


def noise(points: Floats, frequency: float, waves: Floats) -> Floats:
    """Return (n,) smooth values of variance 1: the sum of (4, k) plane waves, phase last."""
    total = np.zeros_like(points[0])
    for x, y, z, phase in waves.T.tolist():
        total += np.cos(frequency * (x * points[0] + y * points[1] + z * points[2]) + phase)
    return total * math.sqrt(2 / waves.shape[1])


def turn(first: int, second: int, angle: float) -> Floats:
    """Return the (3, 3) matrix that turns the first axis towards the second, in radians."""
    matrix = np.eye(3)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix[[first, first, second, second], [first, second, first, second]] = cos, -sin, sin, cos
    return matrix


def photograph(fruit: Cloud, view: Floats, size: int, rng: np.random.Generator) -> Image.Image:
    """Return the picture, ``size`` pixels square, of the fruit turned by (3, 3) ``view``."""
    side = RAYS * size
    x, y, z = (project(axis, fruit.points) for axis in view)
    scale = MARGIN * side / max(np.ptp(x), np.ptp(z))
    middle = side * rng.uniform(0.495, 0.505, 2)  # within the margin, whatever the size
    column, row = (
        ((along - (along.min() + along.max()) / 2) * scale + centre).astype(np.int32)
        for along, centre in zip((x, -z), middle, strict=True)
    )
    # Depth in the high bits, the point's index in the low: a ray sees the point of largest code.
    code = ((y - y.min()) * 2**16).astype(np.int64) << 32 | np.arange(len(y))
    nearest = np.full(side * side, -1)
    np.maximum.at(nearest, row * side + column, code)
    hit = nearest >= 0
    seen = nearest[hit] & 0xFFFFFFFF

    facing = fruit.normals.take(seen, axis=1)
    normals = np.array([project(axis, facing) for axis in view])
    exposure, lamp = rng.normal(1, 0.015, 2)  # as film and bulb vary
    diffuse = np.maximum(project(LAMP, normals) + 0.2, 0)  # wraps round, as a large lamp's does
    light = exposure * (0.30 + 0.12 * normals[2] + 0.62 * lamp * diffuse)
    mirrored = np.maximum(project(MIRROR, normals), 0)
    rim = (1 - np.maximum(normals[1], 0)) ** 4  # where any skin mirrors the white room
    shine = fruit.gloss[seen] * (0.6 * mirrored**60 + 0.12 * mirrored**8 + 0.25 * rim)
    canvas = np.full((side * side, 3), 255, np.uint8)
    canvas[hit] = (255 * np.sqrt(np.clip(fruit.colours.take(seen, axis=1) * light + shine, 0, 1))).T
    return Image.fromarray(canvas.reshape(side, side, 3)).reduce(RAYS)


def project(axis: Floats, vectors: Floats) -> Floats:
    """Return the (n,) lengths of (3, n) vectors along a (3,) axis."""
    x, y, z = map(float, axis)  # by hand: BLAS may round differently with the number of cores
    return x * vectors[0] + y * vectors[1] + z * vectors[2]


def between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """Make a parser of numbers of that kind, from low to high, for argparse."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # false for NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value

    return number


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--frames", type=between(int, 1, STEPS), required=True, help=f"an axis, 1 to {STEPS}")
    parser.add_argument("--size", type=between(int, 16, 4096), required=True, help="of an image in pixels, 16 to 4,096")
    parser.add_argument("--seed", type=between(int, 0, 2**32 - 1), required=True, help="of all that varies")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
