"""Facts about the page that app/page.py builds, in a real browser without a network; Pillow and NumPy are the oracles.

The model of these tests recognises colours: `embedding` is the photograph's pixels as the model gets them.
"""

import base64
import errno
import gzip
import hashlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from app import page, serve
from stages import featurize, ingest
from tests.helpers import ROOT, run

WIDTH, HEIGHT = 40, 56
LABELS = ["apple", "banana_2", "cherry"]
TEMPERATURE = 0.1
THRESHOLDS = {"min_similarity": 0.5, "max_strangeness": 0.9}


# A model


def write_model(folder: Path, **said: Any) -> Path:
    """Write a model whose similarities are the means of red, green and blue, and whose strangeness is darkness."""
    weights, specs = b"", []
    constants = {
        "axes": np.array([1, 2], np.int32),
        "flat": np.array([1, WIDTH * HEIGHT * 3], np.int32),
        "last": np.array([1], np.int32),
        "full": np.array(255, np.float32),
        "one": np.array(1, np.float32),
        "temperature": np.array(TEMPERATURE, np.float32),
    }
    nodes: list[dict[str, Any]] = [{"name": "pixels", "op": "Placeholder", "attr": {"dtype": {"type": "DT_FLOAT"}}}]
    for name, value in constants.items():
        kind = "DT_INT32" if value.dtype == np.int32 else "DT_FLOAT"
        nodes.append({"name": name, "op": "Const", "attr": {"dtype": {"type": kind}}})
        specs.append({"name": name, "shape": list(value.shape), "dtype": str(value.dtype)})
        weights += value.tobytes()
    for name, op, *inputs in (
        ("embedding", "Reshape", "pixels", "flat"),
        ("mean", "Mean", "pixels", "axes"),
        ("similarities", "RealDiv", "mean", "full"),
        ("scores", "RealDiv", "similarities", "temperature"),
        ("probabilities", "Softmax", "scores"),
        ("most", "Max", "similarities", "last"),
        ("strangeness", "Sub", "one", "most"),
    ):
        keep = {"keep_dims": {"b": False}} if op in ("Mean", "Max") else {}
        nodes.append({"name": name, "op": op, "input": inputs, "attr": {"T": {"type": "DT_FLOAT"}} | keep})
    (folder / "web").mkdir(parents=True)
    outputs = ("probabilities", "similarities", "strangeness", "embedding")
    graph = {
        "format": "graph-model",
        "signature": {"outputs": {name: {"name": f"{name}:0"} for name in outputs}},
        "modelTopology": {"node": nodes, "versions": {"producer": 1}},
        "weightsManifest": [{"paths": ["weights.bin"], "weights": specs}],
    }
    (folder / "web/model.json").write_text(json.dumps(graph))
    (folder / "web/weights.bin").write_bytes(weights)
    known = [(label, flat(colour)) for label, colour in zip(LABELS, ("red", "lime", "blue"), strict=True)]
    rows = [
        {
            "label": label,
            "path": f"{label}/{i}.jpg",
            "embedding": np.asarray(image, np.float32).ravel().tolist(),
            "picture": save(image, "JPEG"),
        }
        for i, (label, image) in enumerate(known)
    ]
    schema = pa.schema(
        {"label": pa.string(), "path": pa.string(), "embedding": pa.list_(pa.float32()), "picture": pa.binary()}
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "photographs.parquet")
    names = ("web/model.json", "web/weights.bin", "photographs.parquet")
    description = {
        "labels": LABELS,
        "calibrated": True,
        "temperature": TEMPERATURE,
        "thresholds": THRESHOLDS,
        "measured": {"images": 1008, "labels": 3, "accuracy": 0.842, "top_3": 0.951, "unknown": {"accepted": 0.122}},
        "trained_on": {"images": 2016, "labels": 3},
        "pixels": {**page.PIXELS, "width": WIDTH, "height": HEIGHT, "dtype": "uint8"},
        "backbone": {"name": "efficientnet-lite0", "weights": "imagenet", "graph_sha256": "0" * 64},
        "k": WIDTH * HEIGHT * 3,
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    }
    (folder / "model.json").write_text(json.dumps(description | said))
    return folder


def flat(colour: Any, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    return Image.new("RGB", size, colour)


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def dist(model: Path) -> Path:
    """The page, with names for two of three labels, as a spreadsheet in French writes them."""
    (model.parent / "labels.csv").write_text("\ufefflabel;fr;en\r\napple;pomme;red apple\r\ncherry;cerise;\r\n", newline="")
    page.main([str(model), str(model.parent / "dist"), str(model.parent / "labels.csv")])
    return model.parent / "dist"


# The folder


def test_the_same_model_gives_the_same_page(model: Path, dist: Path) -> None:
    again = model.parent / "again"
    page.main([str(model), str(again), str(model.parent / "labels.csv")])
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in dist.iterdir()
    }


def test_nothing_but_the_page_is_left(dist: Path) -> None:
    assert [path.name for path in dist.parent.iterdir() if path.name.startswith(".")] == []


def test_the_page_names_no_other_place(dist: Path) -> None:
    for name in ("index.html", "page.css", "manifest.webmanifest", "service-worker.js"):
        assert re.findall(r"""https?:|["'(]//""", (dist / name).read_text()) == [], name


def test_the_lock_has_a_hash_of_every_package_and_no_place() -> None:
    lock = json.loads((page.APP / "package-lock.json").read_text())["packages"]
    assert [name for name, package in lock.items() if name and "integrity" not in package] == []
    assert [name for name, package in lock.items() if "resolved" in package] == []


def test_the_licences_of_all_that_is_served_are_beside_it(dist: Path) -> None:
    text = (dist / "LICENSES.txt").read_text()
    for package in ("tfjs-core", "tfjs-converter", "tfjs-backend-wasm", "tfjs-backend-cpu"):
        assert f"@tensorflow/{package} 4.22.0: Apache-2.0" in text
    assert "Version 2.0, January 2004" in text
    assert "David Bau" in text  # seedrandom, MIT
    assert "The weights of the network efficientnet-lite0 (imagenet): Apache-2.0" in text
    assert "esbuild" not in text  # it makes the page, and is no part of it


def test_a_model_whose_files_changed_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "web/weights.bin").write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"weights.bin has SHA-256 d9298a10"):
        page.main([str(model), str(tmp_path / "dist")])
    (model / "web/weights.bin").unlink()
    with pytest.raises(SystemExit, match=r"page: .*weights.bin cannot be read: No such file"):
        page.main([str(model), str(tmp_path / "dist")])
    assert not (tmp_path / "dist").exists()


def test_a_damaged_description_of_the_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(SystemExit, match=r"page: .*model\.json is damaged"):
        page.main([str(tmp_path), str(tmp_path / "dist")])


@pytest.mark.parametrize("name", ["service-worker.js", "thesis.txt"])
def test_a_folder_of_other_things_is_not_replaced(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("years of work")
    with pytest.raises(SystemExit, match="mine has other things in it than a page"):
        page.main([str(model), str(tmp_path / "mine")])
    assert (tmp_path / "mine" / name).read_text() == "years of work"


def test_an_output_that_can_be_no_folder_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(SystemExit, match="file is a file"):
        page.main([str(model), str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="dist cannot be made"):
        page.main([str(model), str(tmp_path / "file/dist")])
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_page_takes_the_place_of_an_empty_folder_and_of_a_page_where_a_link_leads(model: Path, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "link").symlink_to("dist")
    page.main([str(model), str(tmp_path / "link")])
    (tmp_path / "dist/index.html").unlink()
    page.main([str(model), str(tmp_path / "link")])
    assert (tmp_path / "dist/index.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dist", "link"]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"no model in {tmp_path}"):
        page.main([str(tmp_path), str(tmp_path / "dist")])


def test_a_model_of_other_pixels_is_refused(tmp_path: Path) -> None:
    pixels = {**page.PIXELS, "resampling": "lanczos", "width": WIDTH, "height": HEIGHT}
    with pytest.raises(SystemExit, match="lanczos"):
        page.main([str(write_model(tmp_path / "model", pixels=pixels)), str(tmp_path / "dist")])


def test_names_of_labels_that_the_model_does_not_have_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("label,fr,en\nplum,prune,plum\n")
    with pytest.raises(SystemExit, match="names 1 labels that the model does not have: plum"):
        page.main([str(model), str(tmp_path / "dist"), str(tmp_path / "labels.csv")])


def test_names_without_a_column_of_a_language_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("label,en\napple,apple\n")
    with pytest.raises(SystemExit, match="has no column fr"):
        page.main([str(model), str(tmp_path / "dist"), str(tmp_path / "labels.csv")])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_names_are_read_as_spreadsheets_write_them(separator: str, encoding: str, tmp_path: Path) -> None:
    lines = (("label", "fr", "en"), ("apple", " pêche ", ""), ("", "", ""), ("cherry", "cerise", "cherry"))
    text = "".join(f"{separator.join(line)}\r\n" for line in lines)
    (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
    names = {"apple": {"fr": "pêche"}, "cherry": {"fr": "cerise", "en": "cherry"}}
    assert page.read_names(tmp_path / "labels.csv", LABELS) == names


def test_a_header_alone_names_nothing(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("label,fr,en\n")
    assert page.read_names(tmp_path / "labels.csv", LABELS) == {}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("label,fr,en\napple,pêche,\n".encode("latin-1"), "Save it as UTF-8"),
        (b"\xff\xfe1", "Save it as UTF-8"),
        (b"", "has no column en, fr, label"),
        (b"label,fr,en\napple,pomme,\napple,pomme,\n", "names 1 labels more than once: apple"),
        (None, "cannot be read: No such file"),
    ],
    ids=["latin-1", "half utf-16", "empty", "twice", "none"],
)
def test_names_that_cannot_be_read_are_refused_in_a_line(content: bytes | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(SystemExit, match=why):
        page.read_names(tmp_path / "labels.csv", LABELS)


def test_both_languages_say_the_same_things() -> None:
    words = (page.APP / "src/words.js").read_text()
    english, french = (set(re.findall(r"^    (\w+):", part, re.MULTILINE)) for part in words.split("  fr: {"))
    assert english == french
    assert set(re.findall(r'data-words="(\w+)"', (page.APP / "src/index.html").read_text())) <= english


# The server


def test_the_server_listens_on_this_machine_only() -> None:
    assert serve.parse_args(["folder"]).host == "127.0.0.1"


def test_a_shell_that_exports_its_host_opens_the_page_to_nobody() -> None:
    assert "app.serve app/dist --host 127.0.0.1" in run("make", "--dry-run", "app", cwd=ROOT, HOST="0.0.0.0")


def test_make_and_the_server_know_the_same_port() -> None:
    assert f"--port {serve.PORT}\n" in run("make", "--dry-run", "app", cwd=ROOT)


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("127.1", "127.0.0.1"), ("127.0.0.5", "127.0.0.5"), ("::1", "[::1]")]
)
def test_on_this_machine_nobody_else_is_spoken_of(host: str, address: str, dist: Path) -> None:
    with serving(dist, host) as said:
        assert re.match(rf"\nSee:   http://{re.escape(address)}:\d+/   on this machine only", said)


@contextmanager
def serving(*words: str | Path) -> Iterator[str]:
    """What the program says, while it serves on any port of a host."""
    folder, host = words
    command = [sys.executable, "-m", "app.serve", folder, "--host", host, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield server.stdout.readline() + server.stdout.readline()
        finally:
            server.terminate()


@pytest.mark.parametrize(
    ("host", "port", "why"),
    [
        ("", "0", "the host is empty"),
        ("127.0.0.1", "99999", "port must be 0-65535"),
        ("127.0.0.1", "-1", "port must be 0-65535"),
        ("192.0.2.1", "0", "Cannot assign requested address"),
        ("é" * 64, "0", "encoding of hostname failed"),
    ],
)
def test_where_it_cannot_listen_no_other_port_is_advised(host: str, port: str, why: str, dist: Path) -> None:
    with pytest.raises(SystemExit, match=why) as ended:
        serve.main([str(dist), f"--host={host}", f"--port={port}"])
    assert "PORT" not in str(ended.value)


def test_where_a_port_is_taken_another_is_advised(dist: Path) -> None:
    with serve.Server("127.0.0.1", 0, dist) as server:
        port = server.server_address[1]
        with pytest.raises(SystemExit, match=f"port {port}: Address already in use. Try PORT={serve.PORT}"):
            serve.main([str(dist), "--port", str(port)])
    assert f"PORT={serve.PORT + 1}" in serve.advise(OSError(errno.EADDRINUSE, "Address already in use"), serve.PORT)


@pytest.mark.parametrize("place", ["none", "labels.csv", "model"])
def test_what_is_no_page_is_not_served(place: str, dist: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no page in .*`make page`"):
        serve.main([str(dist.parent / place), "--port", "0"])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::"])
def test_what_another_address_opens_is_said(host: str) -> None:
    said = serve.says(host, serve.PORT)
    assert "Whoever is in the same network can open this page" in said
    assert "plain http" in said
    assert "http://0.0.0.0" not in said  # which is no address to open


@pytest.fixture
def site(dist: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A served page: its address, and what ends the server."""
    server = serve.Server("127.0.0.1", 0, dist)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    yield f"http://127.0.0.1:{server.server_address[1]}/", end
    end()


def test_the_server_sends_the_policy_with_every_file(site: tuple[str, Any], dist: Path) -> None:
    from urllib.request import urlopen

    for path in dist.iterdir():
        with urlopen(site[0] + path.name) as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            policy = answer.headers["Content-Security-Policy"]
        assert "unsafe-inline" not in policy
        assert "frame-ancestors 'none'" in policy
        assert ("connect-src 'none'" in policy) == (path.name != "service-worker.js")


def test_the_server_lists_no_folder_and_leaves_its_own_alone(site: tuple[str, Any]) -> None:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    for path in ("..%2fmodel%2fmodel.json", "../model/model.json", "nothing.js"):
        with pytest.raises(HTTPError, match="404"):
            urlopen(site[0] + path)


@pytest.mark.parametrize("line", ["GET /%00 HTTP/1.0", "GET / HTTP/9.9", "what is this"])
def test_an_odd_request_is_refused_without_a_traceback(
    line: str, site: tuple[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert re.search(rb"Error code: (400|505)", ask(site, line))
    assert capfd.readouterr().err == ""


def ask(site: tuple[str, Any], line: str) -> bytes:
    """All that the server answers to a request, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", urlsplit(site[0]).port or 0)) as client:
        client.sendall(f"{line}\r\n\r\n".encode())
        return client.makefile("rb").read()


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError])
def test_a_client_may_leave_in_the_middle(
    error: type[Exception], site: tuple[str, Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(*_: Any) -> None:
        raise error

    monkeypatch.setattr(serve.Handler, "copyfile", left)
    assert b"200 OK" in ask(site, "GET /weights.js HTTP/1.0")
    assert capfd.readouterr().err == ""


# In a browser

WAIT = 30  # seconds, at most; a machine with other things to do is slow


class Page:
    """A page in a browser, and what it says."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, address: str, language: str = "en-GB", width: int = 390, **media: str) -> None:
        cdp = self.browser.execute_cdp_cmd
        cdp("Emulation.setUserAgentOverride", {"userAgent": "Chrome", "acceptLanguage": language})
        cdp(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        cdp("Emulation.setEmulatedMedia", {"features": features})
        cdp("Emulation.setTouchEmulationEnabled", {"enabled": width < 500})
        self.browser.get(address)
        self.browser.execute_script(
            "self.recognised = []; document.addEventListener('recognised', (event) => recognised.push(event.detail))"
        )

    def give(self, file: Path | bytes, folder: Path | None = None, name: str = "photograph") -> dict[str, Any]:
        """Choose a file, and return what the page found."""
        if isinstance(file, bytes):
            assert folder is not None
            (folder / name).write_bytes(file)
            file = folder / name
        n_before = self.browser.execute_script("return recognised.length")
        self.browser.find_element("id", "file").send_keys(str(file))
        self.wait(f"recognised.length > {n_before}")
        found = self.browser.execute_script(
            """const { result, near = [], ...outcome } = recognised.at(-1);
            const letters = (array) => Array.from(new Uint8Array(array.buffer), (byte) => String.fromCharCode(byte));
            const texts = result && Object.entries(result).map(([name, array]) => [name, btoa(letters(array).join(""))]);
            return { ...outcome, near: near.map(({ label }) => label), result: texts && Object.fromEntries(texts) };"""
        )
        if found["result"]:
            found["result"] = {
                name: np.frombuffer(base64.b64decode(text), np.float32) for name, text in found["result"].items()
            }
        return found

    def wait(self, condition: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, WAIT, 0.02).until(lambda driver: driver.execute_script(f"return {condition}"), condition)

    def text(self, selector: str) -> str:
        return str(self.browser.execute_script(f"return document.querySelector('{selector}').innerText"))

    def texts(self, selector: str) -> list[str]:
        return list(
            self.browser.execute_script(f"return [...document.querySelectorAll('{selector}')].map(e => e.innerText)")
        )

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def opened(chromium: Any, dist: Path) -> Iterator[Page]:
    """The page, opened from the disk; at its end it has written nothing on the console."""
    opened = Page(chromium)
    opened.console()
    opened.open((dist / "index.html").as_uri())
    yield opened
    assert opened.console() == []


@pytest.fixture(scope="module")
def decoder(chromium: Any, dist: Path) -> Page:
    """The page, opened once for many photographs."""
    decoder = Page(chromium)
    decoder.open((dist / "index.html").as_uri())
    return decoder


def photograph(width: int = 131, height: int = 97, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Waves of colour with noise in them; the last channel of CMYK and RGBA is random."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 100 * np.sin(x / 7 + y / 11), 128 + 100 * np.cos(x / 5), (x * 3 + y * 2) % 256], axis=-1)
    pixels = np.clip(waves + random.normal(size=waves.shape) * 15, 0, 255).astype(np.uint8)
    if mode in ("RGBA", "CMYK"):
        pixels = np.concatenate([pixels, random.integers(0, 256, (height, width, 1), np.uint8)], axis=-1)
        return Image.fromarray(pixels, mode)
    if mode == "LA":
        return photograph(width, height, "RGBA", seed).convert("LA")
    return Image.fromarray(pixels).convert(mode)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def other_colours() -> bytes:
    """A profile that gives red for blue: sRGB's, with the two exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for one, other in ((b"rXYZ", b"xxxx"), (b"bXYZ", b"rXYZ"), (b"xxxx", b"bXYZ")):
        profile = profile.replace(one, other)
    return profile


PALETTE = photograph().convert("P", palette=Image.Palette.ADAPTIVE)
KINDS: dict[str, bytes] = {
    "jpeg": save(photograph(), "JPEG", quality=90),
    "jpeg, colours in full": save(photograph(), "JPEG", quality=90, subsampling=0),
    "progressive": save(photograph(), "JPEG", progressive=True),
    "grey": save(photograph(mode="L"), "JPEG"),
    "cmyk without black": save(photograph().convert("CMYK"), "JPEG", quality=90),
    "with a colour profile": save(photograph(), "JPEG", icc_profile=other_colours()),
    **{f"orientation {i}": save(photograph(), "JPEG", exif=turned(i)) for i in range(1, 9)},
    "shrunk much": save(photograph(1201, 899), "JPEG"),
    "shrunk in height only": save(photograph(WIDTH, 301), "PNG"),
    "enlarged": save(photograph(7, 5), "PNG"),
    "one pixel": save(photograph(1, 1), "PNG"),
    "as large as the network's": save(photograph(WIDTH, HEIGHT), "PNG"),
    "wide and low": save(photograph(2001, 3), "PNG"),
    "rgba": save(photograph(mode="RGBA"), "PNG"),
    "rgba, turned": save(photograph(mode="RGBA"), "PNG", exif=turned(6)),
    "rgba, transparent below": save(
        Image.composite(photograph(131, 300), Image.new("RGBA", (131, 300)), Image.new("L", (131, 300), 0)), "PNG"
    ),
    "grey with alpha": save(photograph(mode="LA"), "PNG"),
    "rgb, one colour transparent": save(photograph(), "PNG", transparency=photograph().getpixel((3, 3))),
    "palette": save(PALETTE, "PNG"),
    "palette, one colour transparent": save(PALETTE, "PNG", transparency=3),
    "palette, all half transparent": save(PALETTE, "PNG", transparency=bytes(range(256))),
    "grey png": save(photograph(mode="L"), "PNG"),
    "black and white": save(photograph(mode="1"), "PNG"),
    "16 bits": save(Image.fromarray(np.random.default_rng(0).integers(0, 65536, (97, 131)).astype(np.uint16)), "PNG"),
    "webp": save(photograph(), "WEBP", quality=80),
    "webp with alpha": save(photograph(mode="RGBA"), "WEBP", quality=80),
    "gif": save(PALETTE, "GIF", transparency=3),
    "bmp": save(photograph(), "BMP"),
}


def expected(content: bytes) -> np.ndarray:
    """The pixels as `ingest` and `featurize` make them."""
    upright, _ = ingest.decode(content, max_pixels=10**8)
    wanted = {"resampling": "bicubic", "width": WIDTH, "height": HEIGHT}
    return featurize.to_pixels(save(upright, "BMP"), wanted).ravel().astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_gets_the_pixels_that_pillow_makes(kind: str, decoder: Page, tmp_path: Path) -> None:
    found = decoder.give(KINDS[kind], tmp_path)
    np.testing.assert_array_equal(found["result"]["embedding"], expected(KINDS[kind]))


def test_black_of_cmyk_is_two_levels_of_255_away_at_most(decoder: Page, tmp_path: Path) -> None:
    # Chromium rounds down where Pillow rounds to the nearest: one level before resampling, two after it.
    content = save(photograph(mode="CMYK"), "JPEG", quality=95)
    found = decoder.give(content, tmp_path)
    np.testing.assert_allclose(found["result"]["embedding"], expected(content), atol=2, rtol=0)


def test_every_colour_of_every_transparency_is_laid_over_white_as_pillow_does(decoder: Page, tmp_path: Path) -> None:
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = Image.fromarray(np.stack([colour, 255 - colour, colour, alpha], axis=-1))
    for left in range(0, 256, WIDTH):
        for top in range(0, 256, HEIGHT):
            content = save(
                image.crop((left, top, left + WIDTH, top + HEIGHT)), "PNG"
            )  # as large as the network's: no resampling
            np.testing.assert_array_equal(decoder.give(content, tmp_path)["result"]["embedding"], expected(content))


def probabilities(image: Image.Image) -> np.ndarray:
    means = np.asarray(image, np.float64).reshape(-1, 3).mean(axis=0) / 255
    scores = np.exp(means / TEMPERATURE)
    return scores / scores.sum()


ORANGE, UNKNOWN, BLACK = (250, 180, 40), (90, 80, 60), (10, 10, 10)


def test_labels_are_ranked_by_their_probability(opened: Page, tmp_path: Path) -> None:
    found = opened.give(save(flat(ORANGE), "PNG"), tmp_path)
    assert found["kind"] == "known"
    assert [each["label"] for each in found["best"]] == ["apple", "banana_2", "cherry"]
    by_numpy = probabilities(flat(ORANGE))
    np.testing.assert_allclose([each["probability"] for each in found["best"]], by_numpy, rtol=1e-5)  # float32
    assert opened.texts(".name") == ["red apple", "banana_2", "cherry"]
    assert opened.texts(".figure") == [f"{by_numpy[0]:.0%}", f"{by_numpy[1]:.0%}", "< 1%"]
    shares = opened.browser.execute_script(
        "return [...document.querySelectorAll('.filled')].map(e => e.offsetWidth / e.parentElement.offsetWidth)"
    )
    np.testing.assert_allclose(shares[:2], by_numpy[:2], atol=0.01)  # whole pixels


def test_the_nearest_known_photographs_are_shown_nearest_first(opened: Page, tmp_path: Path) -> None:
    assert opened.give(save(flat((20, 200, 150)), "PNG"), tmp_path)["near"] == ["banana_2", "cherry", "apple"]
    assert opened.texts("#nearest figcaption") == ["banana_2", "cherry", "red apple"]
    loaded = "return [...document.querySelectorAll('#nearest img')].map(image => image.naturalWidth)"
    assert opened.browser.execute_script(loaded) == [WIDTH] * 3


def test_what_it_knows_is_shown_with_a_photograph_of_each(opened: Page) -> None:
    opened.wait("self.photographs && document.querySelector('#known')")
    opened.browser.find_element("css selector", "summary").click()
    opened.wait("document.querySelector('#known figcaption')")
    assert opened.texts("#known figcaption") == ["red apple", "banana_2", "cherry"]
    assert opened.browser.execute_script("return document.querySelectorAll('#known img').length") == 3


def test_a_fruit_unlike_all_labels_is_one_that_it_does_not_know(opened: Page, tmp_path: Path) -> None:
    assert opened.give(save(flat(UNKNOWN), "PNG"), tmp_path)["kind"] == "unknown"
    assert opened.text("#headline") == "A fruit that I do not know"
    assert len(opened.texts("#nearest figcaption")) == 3
    assert opened.texts("#bars li") == []


def test_a_photograph_unlike_all_is_refused_whatever_it_looks_like(opened: Page, tmp_path: Path) -> None:
    assert opened.give(save(flat(BLACK), "PNG"), tmp_path)["kind"] == "strange"
    assert opened.text("#headline") == "No photograph of the kind I know"
    assert "the background is not plain" in opened.text("#detail")
    assert opened.texts("#bars li") == []
    assert len(opened.texts("#nearest figcaption")) == 3


def test_a_model_that_could_not_be_calibrated_refuses_nothing_and_says_so(chromium: Any, tmp_path: Path) -> None:
    none = {"min_similarity": None, "max_strangeness": None}
    model = write_model(tmp_path / "model", calibrated=False, temperature=None, thresholds=none, measured={"images": 0})
    page.main([str(model), str(tmp_path / "dist")])
    opened = Page(chromium)
    opened.open((tmp_path / "dist/index.html").as_uri())
    assert opened.give(save(flat(BLACK), "PNG"), tmp_path)["kind"] == "known"
    assert "could not be measured" in opened.text("#detail")
    assert opened.texts(".figure") == ["", "", ""]
    assert "could not be measured" in opened.text("#quality")
    assert "NaN" not in opened.text("body")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.jpg", b"I am no picture, whatever I am called"),
        ("empty.jpg", b""),
        ("truncated.jpg", save(photograph(), "JPEG")[:2000]),
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'),
    ],
    ids=["text", "empty", "truncated", "svg"],
)
def test_a_file_that_is_no_photograph_is_refused_in_words(name: str, content: bytes, opened: Page, tmp_path: Path) -> None:
    assert opened.give(content, tmp_path, name)["kind"] == "noPicture"
    assert opened.text("#headline").startswith("This file cannot be read as a picture.")
    assert opened.browser.execute_script("return document.getElementById('photograph').hidden")
    assert opened.give(save(flat(ORANGE), "PNG"), tmp_path)["kind"] == "known"  # and the next one works


def test_a_photograph_of_too_many_pixels_is_refused_in_words(opened: Page, tmp_path: Path) -> None:
    assert opened.give(save(Image.new("1", (20_000, 6_000)), "PNG"), tmp_path)["kind"] == "tooLarge"
    assert opened.text("#headline") == "This picture has 120 megapixels, and 100 are the most I can take."


@pytest.mark.slow
def test_a_photograph_of_50_megapixels_gives_the_pixels_that_pillow_makes(opened: Page, tmp_path: Path) -> None:
    content = save(photograph(816, 612).resize((8160, 6120), Image.Resampling.BILINEAR), "JPEG")
    np.testing.assert_array_equal(opened.give(content, tmp_path)["result"]["embedding"], expected(content))


def test_the_same_file_can_be_chosen_twice(opened: Page, tmp_path: Path) -> None:
    (tmp_path / "photograph.png").write_bytes(save(flat(ORANGE), "PNG"))
    one, other = (opened.give(tmp_path / "photograph.png") for _ in range(2))
    assert (one["kind"], one["best"]) == (other["kind"], other["best"])


def test_the_last_photograph_chosen_is_the_one_that_is_answered(opened: Page, tmp_path: Path) -> None:
    for name, image, width in (
        ("large.jpg", photograph(200, 150).resize((6000, 4500)), 6000),
        ("small.jpg", flat("blue"), WIDTH),
    ):
        (tmp_path / name).write_bytes(save(image, "JPEG"))
        opened.browser.find_element("id", "file").send_keys(str(tmp_path / name))
        opened.wait(f"document.getElementById('photograph').naturalWidth === {width}")  # the worker has it, or will
    opened.wait("recognised.length")
    opened.browser.execute_async_script("setTimeout(arguments[0], 1000)")  # the first needs less
    assert opened.texts(".name")[0] == "cherry"
    assert opened.browser.execute_script("return recognised.length") == 1


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_photograph_can_be_dropped_and_pasted(event: str, opened: Page) -> None:
    opened.browser.execute_script(
        """const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], "photograph.png"));
        const made = { drop: () => new DragEvent("drop", { dataTransfer: transfer, cancelable: true }),
                       paste: () => new ClipboardEvent("paste", { clipboardData: transfer }) };
        document.dispatchEvent(made[arguments[1]]());""",
        base64.b64encode(save(flat(ORANGE), "PNG")).decode(),
        event,
    )
    opened.wait("recognised.length")
    assert opened.texts(".name")[0] == "red apple"


def test_labels_of_other_letters_are_told_apart(chromium: Any, tmp_path: Path) -> None:
    labels = ["apple", "Apple", "\u202eelppa"]  # the last one is written from right to left
    page.main([str(write_model(tmp_path / "model", labels=labels)), str(tmp_path / "dist")])
    opened = Page(chromium)
    opened.open((tmp_path / "dist/index.html").as_uri())
    opened.give(save(flat((210, 200, 190)), "PNG"), tmp_path)
    assert opened.texts(".name") == labels
    isolated = "return [...document.querySelectorAll('.name bdi')].map(name => getComputedStyle(name).unicodeBidi)"
    assert opened.browser.execute_script(isolated) == ["isolate"] * 3


# Languages


@pytest.mark.parametrize(
    ("accepted", "language"), [("fr-CA,en", "fr"), ("en-US,fr", "en"), ("de,fr,en", "fr"), ("de", "en")]
)
def test_the_page_speaks_the_first_language_of_the_browser_that_it_can(
    accepted: str, language: str, dist: Path, chromium: Any
) -> None:
    opened = Page(chromium)
    opened.open((dist / "index.html").as_uri(), accepted)
    assert opened.browser.execute_script("return document.documentElement.lang") == language
    assert opened.text("h1") == {"fr": "Quel est ce fruit ?", "en": "What fruit is this?"}[language]


def test_another_language_can_be_chosen_with_an_answer_on_the_page(opened: Page, tmp_path: Path) -> None:
    opened.give(save(flat(ORANGE), "PNG"), tmp_path)
    opened.browser.find_element("id", "language").click()
    assert opened.texts(".name") == ["pomme", "banana_2", "cerise"]
    assert opened.texts(".figure")[0] == f"{probabilities(flat(ORANGE))[0]:.0%}".replace("%", "\xa0%")
    assert "1\u202f008 photos de 3 fruits" in opened.text("#quality")
    assert "84\xa0%" in opened.text("#quality")
    opened.browser.find_element("id", "language").click()
    assert opened.texts(".name")[0] == "red apple"


def test_how_good_it_is_and_on_what_is_said(opened: Page) -> None:
    for part in (
        "84% of 1,008 photographs of 3 fruits",
        "95% among its first three",
        "learnt from all 2,016",
        "12% for one that it knows",
    ):
        assert part in opened.text("#quality")


def test_with_refusals_counted_it_is_said_how_many_known_fruits_are_refused(chromium: Any, tmp_path: Path) -> None:
    measured = {"images": 1008, "labels": 3, "accuracy": 0.842, "top_3": 0.951, "right": 0.713, "kept": 0.798}
    page.main([str(write_model(tmp_path / "model", measured=measured)), str(tmp_path / "dist")])
    opened = Page(chromium)
    opened.open((tmp_path / "dist/index.html").as_uri())
    said = "It named 71% of 1,008 photographs of 3 fruits rightly, and refused 20%, although it knows their fruits."
    assert opened.text("#quality").startswith(said)
    opened.browser.find_element("id", "language").click()
    assert "71\xa0% de 1\u202f008 photos de 3 fruits, et 20\xa0% ont été refusées" in opened.text("#quality")


# No network


def test_the_page_cannot_send_anything(chromium: Any, site: tuple[str, Any]) -> None:
    opened = Page(chromium)
    opened.open(site[0])
    script = "const [done] = arguments; fetch('/model.js').then(() => done('sent'), () => done('refused'))"
    assert opened.browser.execute_async_script(script) == "refused"
    assert any("connect-src" in message for message in opened.console())


def test_a_page_from_a_server_works_without_a_message(chromium: Any, site: tuple[str, Any], tmp_path: Path) -> None:
    opened = Page(chromium)
    opened.console()
    opened.open(site[0])
    assert opened.give(save(flat(ORANGE), "PNG"), tmp_path)["kind"] == "known"
    assert opened.console() == []


def test_the_page_opens_and_recognises_when_its_server_has_ended(
    chromium: Any, site: tuple[str, Callable[[], None]], tmp_path: Path
) -> None:
    address, end = site
    opened = Page(chromium)
    opened.console()
    opened.open(address)
    opened.wait("!document.getElementById('offline').hidden")
    end()
    opened.open(address)
    assert opened.give(save(flat(ORANGE), "PNG"), tmp_path)["kind"] == "known"
    assert opened.texts(".name")[0] == "red apple"
    assert opened.console() == []


@pytest.fixture
def rebuilt(chromium: Any, site: tuple[str, Any], dist: Path, tmp_path: Path) -> Iterator[tuple[Page, Callable[[], None]]]:
    """A page that the browser has kept, and what builds another in its place."""
    opened = Page(chromium)
    opened.open(site[0])
    opened.wait("!document.getElementById('offline').hidden")
    shutil.copytree(dist, tmp_path / "before")

    def rebuild() -> None:
        page.main([str(write_model(tmp_path / "model", measured={"images": 77, "labels": 3})), str(dist)])

    yield opened, rebuild
    shutil.rmtree(dist)
    shutil.copytree(tmp_path / "before", dist)


SHOWN = "document.getElementById('quality').innerText.includes('77 photographs')"


def test_another_build_is_shown_once_the_page_is_loaded_again(
    rebuilt: tuple[Page, Callable[[], None]], site: tuple[str, Any]
) -> None:
    opened, rebuild = rebuilt
    rebuild()
    opened.open(site[0])
    opened.wait(SHOWN)


def test_another_build_takes_no_answer_away(
    rebuilt: tuple[Page, Callable[[], None]], site: tuple[str, Any], tmp_path: Path
) -> None:
    opened, rebuild = rebuilt
    opened.open(site[0])  # the first visit has no page that the browser has kept
    opened.give(save(flat(ORANGE), "PNG"), tmp_path)
    rebuild()
    update = """const [done] = arguments;
        navigator.serviceWorker.addEventListener("controllerchange", () => setTimeout(done, 500));
        navigator.serviceWorker.getRegistration().then((registration) => registration.update());"""
    opened.browser.execute_async_script(update)
    assert opened.texts(".name")[0] == "red apple"
    opened.open(site[0])
    opened.wait(SHOWN)


def test_a_page_with_a_part_missing_says_so(chromium: Any, dist: Path, tmp_path: Path) -> None:
    shutil.copytree(dist, tmp_path / "dist")
    (tmp_path / "dist/weights.js").unlink()
    opened = Page(chromium)
    opened.open((tmp_path / "dist/index.html").as_uri())
    opened.wait("document.body.dataset.outcome != 'none'")
    assert opened.text("#headline") == "A part of this page could not be loaded. Please load it again."
    assert opened.give(save(flat(ORANGE), "PNG"), tmp_path)["kind"] == "notLoaded"
    opened.console()


def test_the_page_can_be_installed(chromium: Any, site: tuple[str, Any]) -> None:
    opened = Page(chromium)
    opened.open(site[0])
    opened.wait("!document.getElementById('offline').hidden")
    assert chromium.execute_cdp_cmd("Page.getAppManifest", {})["errors"] == []
    assert chromium.execute_cdp_cmd("Page.getInstallabilityErrors", {})["installabilityErrors"] == []


# With the network of the pipeline


@pytest.mark.slow
def test_the_browser_recognises_as_tensorflow_lite_does(run_once: Path, chromium: Any, tmp_path: Path) -> None:
    from app import recognise

    by_lite = recognise.load(run_once / "data/model")
    page.main([str(run_once / "data/model"), str(tmp_path / "dist")])
    opened = Page(chromium)
    opened.console()
    opened.open((tmp_path / "dist/index.html").as_uri())
    photographs = sorted((run_once / "data/sample").glob("*/*.jpg"))[::5]
    assert len(photographs) > 20
    for photograph in photographs:
        found = opened.give(photograph)["result"]
        expected = by_lite.network(featurize.to_pixels(photograph.read_bytes(), by_lite.about["pixels"]))
        for name in ("probabilities", "similarities", "strangeness", "embedding"):
            np.testing.assert_allclose(found[name], expected[name].ravel(), atol=1e-4, rtol=0, err_msg=name)  # float32
        assert found["probabilities"].argmax() == expected["probabilities"].argmax()
    assert opened.console() == []
    packed = sum(len(gzip.compress(path.read_bytes())) for path in (tmp_path / "dist").iterdir())
    assert packed < 8.5e6  # bytes that a web server sends the first time


# For everybody


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("language", ["en", "fr"])
def test_nothing_scrolls_sideways(width: int, language: str, dist: Path, chromium: Any, tmp_path: Path) -> None:
    opened = Page(chromium)
    opened.open((dist / "index.html").as_uri(), language, width)
    for colour in (ORANGE, UNKNOWN, BLACK):
        opened.give(save(flat(colour), "PNG"), tmp_path)
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width


CONTRAST = """
const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => parse(colour).slice(0, 3).map((value) => value / 255)
  .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => { const colour = getComputedStyle(element).backgroundColor;
  return (parse(colour)[3] ?? 1) ? colour : behind(element.parentElement); };
return [...document.body.querySelectorAll("*")].filter((element) => element.checkVisibility() && element.tagName !== "INPUT"
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
  .map((element) => { const [one, other] = [light(getComputedStyle(element).color), light(behind(element))];
    return [element.textContent.trim().slice(0, 30), (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05)]; });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_text_stands_out_from_what_is_behind_it(
    scheme: str, width: int, dist: Path, chromium: Any, tmp_path: Path
) -> None:
    opened = Page(chromium)
    opened.open((dist / "index.html").as_uri(), width=width, prefers_color_scheme=scheme)
    opened.give(save(flat(ORANGE), "PNG"), tmp_path)
    contrasts = dict(chromium.execute_script(CONTRAST))
    assert {"red apple", "Choose a photo", "Français"} <= set(contrasts)
    assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}  # WCAG 2.2, AA


def test_a_keyboard_reaches_every_control_and_shows_where_it_is(chromium: Any, dist: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    opened = Page(chromium)
    opened.open((dist / "index.html").as_uri(), width=1280)
    reached = []
    for _ in range(4):
        ActionChains(chromium).send_keys(Keys.TAB).perform()
        reached.append(
            chromium.execute_script(
                """const focused = document.activeElement, shown = focused.labels?.[0] ?? focused;
                return [focused.id || focused.textContent.trim(), getComputedStyle(shown).outlineStyle];"""
            )
        )
    assert reached == [
        ["language", "solid"],
        ["file", "solid"],
        ["The 3 fruits that it knows", "solid"],
        ["Licences", "solid"],
    ]


def test_a_screen_reader_is_told_the_answer_and_what_each_control_is(opened: Page, tmp_path: Path) -> None:
    opened.give(save(flat(ORANGE), "PNG"), tmp_path)
    nodes = opened.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    said = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
    for each in (
        ("heading", "What fruit is this?"),
        ("button", "Français"),
        ("image", "Your photograph"),
        ("heading", "Nearest known photographs"),
        ("link", "Licences"),
    ):
        assert each in said
    assert [name for role, name in said if role == "button"][1:] == ["Take a photo", "Choose a photo"]
    (live,) = opened.browser.execute_script("return [...document.querySelectorAll('[aria-live]')].map(e => e.innerText)")
    assert live.startswith("red apple")


def test_nothing_moves() -> None:
    assert re.findall(r"animation|transition|scroll-behavior", (page.APP / "src/page.css").read_text()) == []
