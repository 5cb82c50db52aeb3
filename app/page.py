"""page: build the static folder that recognises photographs in a browser, with no server behind it.

usage: python -m app.page MODEL OUTPUT [LABELS]

reads   MODEL   what `export` wrote
        LABELS  a CSV file of label, fr, en: how the page names labels; without it, as they are
writes  OUTPUT  index.html and all it needs, the licences of all that is served (LICENSES.txt) among them;
                takes the place of another page or of an empty folder, and of nothing else

The same model gives the same bytes. The runtime is TensorFlow.js, as app/package-lock.json pins it: npm fetches it into
app/node_modules the first time, checks its hashes, and runs none of its scripts.
"""

import argparse
import base64
import codecs
import csv
import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from app.model import describe

APP = Path(__file__).resolve().parent
MODULES = APP / "node_modules"
LANGUAGES = ("fr", "en")
# What src/pixels.js does to a photograph; width and height are the model's.
PIXELS = {"orientation": "upright", "mode": "RGB", "fit": "stretch", "resampler": "Pillow", "resampling": "bicubic"}
# Nothing comes from elsewhere and nothing goes anywhere: the page could send no photograph, even if it wanted to. The worker
# comes from memory (blob:), for a page that was opened from a disk may start none from a file.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self' 'wasm-unsafe-eval'",
        "worker-src 'self' blob:",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "manifest-src 'self'",
        "connect-src 'none'",
        "form-action 'none'",
        "base-uri 'none'",
    ]
)
BUNDLES = ("page.js", "recogniser.js")
OWN = ("service-worker.js", "weights.js")  # a folder that has them is a page
ICONS = (180, 192, 512)  # pixels: Apple's, and those that Android asks for


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    model, output = Path(args.model), Path(args.output).resolve()
    check_output(output)
    description = read_model(model)
    names = read_names(Path(args.labels), description["labels"]) if args.labels else {}
    fetch_runtime()
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        whole = Path(folder, "page")
        whole.mkdir()
        build(model, description, names, whole)
        if output.exists():
            output.rename(Path(folder, "before"))
        whole.rename(output)
    size = sum(path.stat().st_size for path in output.iterdir())
    where = Path(args.output, "index.html")
    print(f"page: {len(description['labels']):,} labels, {size / 1e6:.1f} MB in {args.output}; open {where}")


def check_output(output: Path) -> None:
    """Make the folder above the output.

    Raises
    ------
    SystemExit
        what is there is neither a page nor an empty folder, or nothing can be written there.
    """
    if output.exists() and not output.is_dir():
        raise SystemExit(f"page: {output} is a file. Name the folder that the page shall have.")
    if output.exists() and any(output.iterdir()) and not all((output / name).is_file() for name in OWN):
        raise SystemExit(f"page: {output} has other things in it than a page, and would be replaced. Name a new folder.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"page: {output} cannot be made: {error.strerror}. Name another folder.") from None


def read_model(model: Path) -> dict[str, Any]:
    """Read what a model says of itself, and check that its files are those it speaks of.

    Raises
    ------
    SystemExit
        there is no model, a file has another SHA-256, or the pixels are not made as the page makes them.
    """
    try:
        description = describe(model, ("web/model.json", "web/weights.bin", "photographs.parquet"))
    except ValueError as error:
        raise SystemExit(f"page: {error}") from None
    pixels = description["pixels"]
    other = {key: pixels.get(key) for key, value in PIXELS.items() if pixels.get(key) != value}
    if other:
        raise SystemExit(f"page: the model wants pixels of {other}, and the page makes {PIXELS}. Change app/src/pixels.js.")
    return description


def read_names(path: Path, labels: list[str]) -> dict[str, dict[str, str]]:
    """Read how the page names labels in each language, from a CSV file as spreadsheets write it.

    It is UTF-8, or UTF-16 with a byte order mark; commas, semicolons or tabs separate its columns.

    Raises
    ------
    SystemExit
        the file cannot be read, a column is missing, a label is there twice, or the model does not have it.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        first = text.partition("\n")[0]
        separator = next((each for each in ";\t" if each in first), ",")
        lines = csv.reader(io.StringIO(text, newline=None), delimiter=separator)
        header, *rows = [row for row in ([cell.strip() for cell in line] for line in lines) if any(row)] or [[]]
    except OSError as error:
        raise SystemExit(f"page: {path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"page: {path} is no CSV file in UTF-8: {error}. Save it as UTF-8 (in Excel: CSV UTF-8).") from None
    if missing := {"label", *LANGUAGES} - set(header):
        raise SystemExit(f"page: {path} has no column {', '.join(sorted(missing))}: its first line is label,fr,en.")
    named = [{"label": ""} | dict(zip(header, row, strict=False)) for row in rows]
    names = {row["label"]: {language: row[language] for language in LANGUAGES if row.get(language)} for row in named}
    if twice := sorted(label for label, n in Counter(row["label"] for row in named).items() if n > 1):
        raise SystemExit(f"page: {path} names {len(twice)} labels more than once: {', '.join(twice[:5])}")
    if unknown := sorted(set(names) - set(labels)):
        raise SystemExit(f"page: {path} names {len(unknown)} labels that the model does not have: {', '.join(unknown[:5])}")
    return names


def fetch_runtime() -> None:
    fetch(APP, "page: fetching TensorFlow.js and esbuild into app/node_modules, 100 MB")


def fetch(folder: Path, said: str) -> None:
    """Let npm fetch what the folder's package-lock.json pins, and say so, unless it is there already."""
    lock, done = folder / "package-lock.json", folder / "node_modules" / ".package-lock.json"
    if done.is_file() and done.stat().st_mtime >= lock.stat().st_mtime:
        return
    print(said)
    run(find("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", cwd=folder)
    done.touch()


def build(model: Path, description: dict[str, Any], names: dict[str, dict[str, str]], output: Path) -> None:
    """Write all files of the page.

    A page that is opened from a disk may read scripts, style sheets and pictures, but no other file. So the model is in
    scripts: bytes in base64, the worker's code as a text.
    """
    inputs = bundle(output)
    code = (output / "recogniser.js").read_text()
    (output / "recogniser.js").write_text(assign("recogniser", code))
    said = ("labels", "calibrated", "thresholds", "measured", "trained_on", "pixels", "backbone")
    (output / "model.js").write_text(assign("model", {key: description[key] for key in said} | {"names": names}))
    weights = {"graph": (model / "web/model.json").read_text(), "weights": encode((model / "web/weights.bin").read_bytes())}
    (output / "weights.js").write_text(assign("weights", weights))
    (output / "photographs.js").write_text(assign("photographs", read_photographs(model / "photographs.parquet")))
    shutil.copyfile(APP / "src/page.css", output / "page.css")
    (output / "index.html").write_text((APP / "src/index.html").read_text().replace("{policy}", POLICY))
    for size in ICONS:
        draw_icon(size).save(output / f"icon-{size}.png")
    (output / "manifest.webmanifest").write_text(json.dumps(manifest(), indent=2) + "\n")
    (output / "LICENSES.txt").write_text(licences(inputs, description["backbone"]))
    # Last, for its version is that of all others.
    files = sorted(path.name for path in output.iterdir())
    version = hashlib.sha256(b"".join(hashlib.sha256((output / name).read_bytes()).digest() for name in files)).hexdigest()
    constants = f"const VERSION = {json.dumps(version)};\nconst FILES = {json.dumps(['./', *files])};\n"
    (output / "service-worker.js").write_text(constants + (APP / "src/service-worker.js").read_text())


def bundle(output: Path) -> set[Path]:
    """Let esbuild make one classic script of each part and all it imports; return the folders of packages they come from."""
    with tempfile.TemporaryDirectory() as folder:
        about = Path(folder, "about.json")
        run(
            find("node"),
            str(MODULES / "esbuild/bin/esbuild"),
            *(f"src/{name}" for name in BUNDLES),
            "--bundle",
            "--minify",
            "--format=iife",
            "--target=es2022",
            "--charset=utf8",
            "--loader:.wasm=binary",
            "--legal-comments=none",  # LICENSES.txt has them
            "--log-level=warning",
            f"--metafile={about}",
            f"--outdir={output.resolve()}",
        )
        outputs = json.loads(about.read_text())["outputs"].values()
    used = {name for each in outputs for name, part in each["inputs"].items() if part["bytesInOutput"]}
    return {package_of(APP / name) for name in used if name.startswith("node_modules/")}


def package_of(path: Path) -> Path:
    return next(folder for folder in path.parents if (folder / "package.json").is_file())


def licences(packages: Iterable[Path], backbone: dict[str, str]) -> str:
    """Say whose work the page is and under which terms, with the texts of all licences."""
    parts, apache = [], (MODULES / "long/LICENSE").read_text().strip()
    for folder in sorted(packages):
        about = json.loads((folder / "package.json").read_text())
        parts.append(f"{about['name']} {about['version']}: {about['license']}")
        texts = [path.read_text().strip() for path in sorted(folder.glob("LICEN[CS]E*"))]
        readme = (folder / "README.md").read_text()
        if not texts and "\nLICENSE" in readme:  # a package may keep its licence there
            texts = [readme[readme.index("\nLICENSE") :].strip()]
        parts += [text for text in texts if text != apache]
    weights = "Apache-2.0" if backbone["name"] == "efficientnet-lite0" else "as published with them"
    parts.append(f"The weights of the network {backbone['name']} ({backbone['weights']}): {weights}")
    parts += ["The page itself: MIT", (APP.parent / "LICENSE").read_text().strip(), "Apache-2.0:", apache]
    return f"\n\n{'-' * 80}\n\n".join(parts) + "\n"


def read_photographs(path: Path) -> list[dict[str, Any]]:
    """Read the known photographs: label, embedding (k numbers), picture as a data URL."""
    rows = pq.read_table(path, columns=["label", "embedding", "picture"]).to_pylist()
    for row in rows:
        kind = "webp" if row["picture"].startswith(b"RIFF") else "jpeg"
        row["picture"] = f"data:image/{kind};base64,{encode(row['picture'])}"
        row["embedding"] = [float(f"{value:.9g}") for value in row["embedding"]]  # all that a float32 holds
    return rows


def assign(name: str, value: Any) -> str:
    return f"self.{name} = {json.dumps(value, ensure_ascii=False, separators=(',', ':'))};\n"


def encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def manifest() -> dict[str, Any]:
    return {
        "name": "Fruit",
        "short_name": "Fruit",
        "id": "./",
        "start_url": "./",
        "scope": "./",
        "display": "standalone",
        "background_color": "#ffffff",
        "theme_color": "#ffffff",
        "icons": [
            {"src": f"icon-{size}.png", "sizes": f"{size}x{size}", "type": "image/png", "purpose": purpose}
            for size in ICONS[1:]
            for purpose in ("any", "maskable")
        ],
    }


def draw_icon(size: int) -> Image.Image:
    """Draw a cherry: what is cut off where an icon is round lies in the margin."""
    unit = size / 16  # drawn four times as large, then made smaller: smooth edges
    image = Image.new("RGB", (size * 4, size * 4), "#f4f3f0")
    draw = ImageDraw.Draw(image)

    def box(x: float, y: float, radius: float) -> list[float]:
        return [value * unit * 4 for value in (x - radius, y - radius, x + radius, y + radius)]

    stem = [(8 + 2.2 * math.sin(t / 20), 9 - 5 * t / 40) for t in range(41)]
    draw.line([(x * unit * 4, y * unit * 4) for x, y in stem], "#5b4a2f", round(unit * 2.4), joint="curve")
    draw.ellipse(box(7.6, 9.6, 3.4), "#b3202c")
    draw.ellipse(box(6.5, 8.3, 0.8), "#e0707a")
    draw.chord(box(9.9, 5.6, 2.5), 200, 320, "#2d6a2f")
    return image.resize((size, size), Image.Resampling.BOX)


def find(program: str) -> str:
    """Find a program of Node, beside this Python first.

    Raises
    ------
    SystemExit
        it is not there; the message says where it comes from.
    """
    beside = Path(sys.executable).parent
    found = shutil.which(program, path=str(beside)) or shutil.which(program)
    if found is None:
        raise SystemExit(f"page: no {program} here. `make app` installs it; or install requirements-app.txt.")
    return found


def run(*command: str, cwd: Path = APP) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"page: {' '.join(command[:3])} failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("labels", nargs="?")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
