"""Facts about the page that reports/report.py makes; pandas, scikit-learn and Vega are the oracles."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
import vl_convert
import yaml
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from bootstrap import runtime
from reports import report
from tests.helpers import ROOT, make_images, run_classify, run_evaluate, write, write_inputs

CHARTS = [title for plot in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] for title in plot]


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (160, 100, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def write_run(folder: Path, images: pd.DataFrame, k: int = 3, refused: tuple[str, ...] = (), leak: float = 0.0) -> list[str]:
    """A repository with a run of these images in it; the places that the report takes."""
    inputs = write_inputs(folder / "data", images, k, leak=leak)
    shutil.rmtree(folder / "data/ingested")
    contents = [jpeg(i) for i in range(len(images))]
    ingested = images.drop(columns=["features", "group", "fold"])
    write(ingested.assign(content=contents), folder / "data/ingested/images")
    quarantine = pd.DataFrame({"path": refused, "reason": "truncated", "detail": "<ends> early"}, dtype=object)
    write(quarantine, folder / "data/ingested/quarantine")
    write(pd.DataFrame({"path": [], "reason": [], "kind": []}, dtype=object), folder / "data/ingested/ignored")
    (folder / "reports").mkdir()
    run_evaluate(inputs, folder / "reports/evaluation", max_loss=1)  # by which a k is enough
    run_classify(folder / "data")
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        shutil.copy(ROOT / name, folder)
    for command in (
        "git init -q -b main",
        "git config user.name tester",
        "git config user.email tester@localhost",
        "dvc init -q",
        "git add .",
        "git commit -q -m run",
    ):
        subprocess.run(command.split(), cwd=folder, check=True)
        if command.startswith("dvc"):
            shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots")
    return ["data/ingested", "data/split", "data/reduced", "data/classifier", "reports/evaluation", "report.html"]


def make_page(folder: Path, places: list[str], *revisions: str) -> str:
    before = Path.cwd()
    os.chdir(folder)
    try:
        report.main([*places, *revisions])
    finally:
        os.chdir(before)
    return (folder / places[-1]).read_text()


class Elements(HTMLParser):
    """All elements of a page, as (tag, attributes)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def charts_in(page: str) -> dict[str, Any]:
    written = re.search(r"^const charts = (.*);$", page, re.MULTILINE)
    assert written is not None
    return json.loads(written[1])


@pytest.fixture(scope="module")
def images() -> pd.DataFrame:
    images = make_images(spread=1.5)
    images["label"] = images["label"].replace("banana", "NA")  # which pandas takes for a missing value unless told not to
    cherries = images.index[images["label"] == "cherry"]
    images.loc[cherries, "label"] = np.where(np.arange(len(cherries)) % 2, "cherry 1", "cherry 2")  # siblings
    return images


@pytest.fixture(scope="module")
def folder(images: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    write_run(folder, images, refused=("apple/<b>.jpg", "apple/c.jpg"))
    return folder


PLACES = ["data/ingested", "data/split", "data/reduced", "data/classifier", "reports/evaluation", "report.html"]


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return make_page(folder, PLACES)


@pytest.fixture(scope="module")
def elements(page: str) -> list[tuple[str, dict[str, str | None]]]:
    return Elements(page).found


@pytest.fixture(scope="module")
def predictions(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "reports/evaluation/predictions.csv", keep_default_na=False)


def test_the_page_refers_to_nothing_outside_itself(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    links = [attributes[name] or "" for _, attributes in elements for name in ("src", "href") if name in attributes]
    assert [link[:60] for link in links if not link.startswith("data:")] == []


def test_nothing_else_is_written(folder: Path, page: str) -> None:
    assert {path.name for path in folder.glob("report*")} == {"report.html", "reports"}


def test_a_run_that_has_not_got_so_far_is_said_in_one_sentence() -> None:
    with pytest.raises(SystemExit, match=r"^report: there is no data/nowhere: `dvc repro` makes it, or says why"):
        report.main([str(ROOT / "stages"), *[str(ROOT / "data")] * 3, "data/nowhere", "report.html"])


def test_the_same_run_gives_the_same_page(folder: Path, page: str) -> None:
    assert make_page(folder, PLACES) == page


@pytest.mark.parametrize(("name", "text", "said"), report.METRICS, ids=[name for name, _, _ in report.METRICS])
def test_the_page_says_each_metric_and_what_it_means(name: str, text: str, said: str, folder: Path, page: str) -> None:
    files = [folder / name / "metrics.json" for name in ("reports/evaluation", "data/classifier")]
    value: Any = {key: each for file in files for key, each in json.loads(file.read_text()).items()}
    for key in name.split("."):
        value = value[key]
    assert f'<td class="number">{text.format(value)}</td><td>{said}</td>' in page


def test_the_page_has_the_charts_of_the_pipeline_in_their_order(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    assert [attributes["data-chart"] for _, attributes in elements if "data-chart" in attributes] == CHARTS


@pytest.mark.parametrize("title", CHARTS)
def test_vega_draws_the_chart(title: str, page: str) -> None:
    drawn = vl_convert.vegalite_to_svg(charts_in(page)[title])
    assert re.search('role="graphics-(symbol|object)"', drawn)
    assert "NaN" not in drawn


@pytest.mark.parametrize("title", CHARTS)
def test_a_chart_is_described_in_words(title: str, page: str, elements: list[tuple[str, dict[str, str | None]]]) -> None:
    (words,) = [attributes["aria-label"] for _, attributes in elements if attributes.get("data-chart") == title]
    assert words == charts_in(page)[title]["description"]


@pytest.mark.parametrize("title", CHARTS)
def test_a_chart_of_one_run_does_not_speak_of_runs(title: str, page: str) -> None:
    chart = charts_in(page)[title]
    del chart["data"]
    assert '"rev"' not in json.dumps(chart)


@pytest.mark.parametrize("title", CHARTS)
def test_with_a_revision_a_chart_has_both_runs(title: str, folder: Path) -> None:
    chart = charts_in(make_page(folder, [*PLACES[:-1], "both.html"], "HEAD"))[title]
    (folder / "both.html").unlink()
    assert {row["rev"] for row in chart["data"]["values"]} == {"workspace", "HEAD"}
    assert "NaN" not in vl_convert.vegalite_to_svg(chart)


def test_a_page_says_which_run_it_shows(tmp_path: Path) -> None:
    places = write_run(tmp_path, make_images())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert f"This page shows the run of commit {commit}." in make_page(tmp_path, places)
    lock = yaml.safe_load((tmp_path / "dvc.lock").read_text())
    lock["stages"]["reduce"]["params"]["params.yaml"]["reduce"]["k"] = 16
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    page = make_page(tmp_path, places)
    assert f"This page shows a run that is not that of commit {commit}: reduce.k is 16, not 64." in page
    assert f'<meta name="run" content="{runtime.identify(runtime.read_lock(yaml.safe_dump(lock)))}">' in page


def test_an_unknown_revision_ends_it_with_a_message(folder: Path) -> None:
    with pytest.raises(SystemExit, match="no-such-revision"):
        make_page(folder, PLACES, "no-such-revision")


def test_each_label_is_shown_once_with_its_number_of_images(folder: Path, images: pd.DataFrame) -> None:
    labels = report.pick_examples(str(folder / "data/ingested/images"))
    assert dict(zip(labels["label"], labels["n_images"], strict=True)) == images["label"].value_counts().to_dict()
    first = images.sort_values("image_id").groupby("label")["path"].first()
    assert dict(zip(labels["label"], labels["path"], strict=True)) == first.to_dict()


def test_pictures_are_small_whole_images(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    sources = [attributes["src"] or "" for tag, attributes in elements if tag == "img"]
    sizes = {Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size for source in sources}
    assert sizes == {(70, report.PIXELS)}  # of 100 x 160


def test_a_picture_of_a_photograph_that_is_stored_turned_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (160, 100)).save(stream, "JPEG", exif=exif)
    write(pd.DataFrame({"path": ["a/1.jpg"], "label": ["a"], "content": [stream.getvalue()]}), tmp_path / "images")
    (picture,) = report.make_pictures(str(tmp_path / "images"), {"a/1.jpg"}).values()
    shown = Image.open(io.BytesIO(base64.b64decode(picture["source"].partition(",")[2])))
    assert shown.height > shown.width


def test_pictures_have_alternative_texts(elements: list[tuple[str, dict[str, str | None]]], images: pd.DataFrame) -> None:
    texts = {attributes["alt"] for tag, attributes in elements if tag == "img"}
    assert texts <= set(images["label"] + ", " + images["path"])


def test_neighbours_are_scikit_learns_in_the_other_fold(
    folder: Path, images: pd.DataFrame, predictions: pd.DataFrame
) -> None:
    found = report.find_neighbours(str(folder / "data/split"), str(folder / "data/reduced"), predictions)
    embeddings = ds.dataset(folder / "data/reduced/embeddings").to_table().to_pandas().set_index("path")["embedding"]
    fold = images.set_index("path")["fold"]
    assert len(found) == images["label"].nunique()
    for query, *near in found:
        others = embeddings[fold[embeddings.index] != fold[query]]
        nearest = NearestNeighbors(n_neighbors=report.NEIGHBOURS).fit(np.stack(others))
        ((rows,),) = (nearest.kneighbors([embeddings[query]], return_distance=False),)
        assert near == others.index[rows].tolist()


def test_confused_pairs_are_the_largest_off_the_diagonal(predictions: pd.DataFrame) -> None:
    matrix = pd.crosstab(predictions["label"], predictions["predicted"]).stack()
    errors = matrix[[label != predicted for label, predicted in matrix.index]].sort_values(ascending=False)
    pairs = report.find_confused_pairs(predictions)
    assert [pair["n_images"] for pair in pairs] == errors[errors > 0].head(report.PAIRS).tolist()
    for pair in pairs:
        assert matrix[pair["label"], pair["predicted"]] == pair["n_images"]


def test_an_example_of_a_pair_stands_beside_the_image_it_was_taken_for(predictions: pd.DataFrame) -> None:
    nearest = dict(zip(predictions["path"], predictions["nearest"], strict=True))
    for pair in report.find_confused_pairs(predictions):
        paths = pair["paths"]
        assert 0 < len(paths) // 2 <= report.EXAMPLES
        assert [nearest[path] for path in paths[::2]] == paths[1::2]


def test_a_label_called_na_is_confused_like_any_other(page: str) -> None:
    assert "<h3>NA taken for" in page


def test_refused_files_are_listed_with_the_reason(page: str) -> None:
    assert "<td>apple/&lt;b&gt;.jpg</td><td>truncated</td><td>&lt;ends&gt; early</td>" in page
    assert "2 truncated" in page


def test_without_refused_files_the_page_says_so(tmp_path: Path) -> None:
    page = make_page(tmp_path, write_run(tmp_path, make_images()))
    assert "every file of the folder is an image" in page


def test_a_run_whose_metrics_dvc_does_not_have_is_listed_without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    # As of a commit from another machine, whose outputs were never pushed.
    lost = {
        "Experiment": None,
        "rev": "main",
        "reduce.k": 3.0,
        "variance.components": "!",
        "nearest_neighbour.embedding": "!",
    }
    here = {"Experiment": None, "rev": "workspace", "reduce.k": 3.0, "variance.components": 3.0}
    monkeypatch.setattr(report.dvc.api, "exp_show", lambda: [here, lost])
    assert [row[:4] for row in report.experiments()] == [["workspace", "3", "-", "3"], ["main", "3", "-", "-"]]


def test_an_experiment_without_accuracies_is_listed_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, make_images())
    with_accuracies = (tmp_path / "reports/evaluation/metrics.json").read_text()
    found = {"variance": json.loads(with_accuracies)["variance"]}
    (tmp_path / "without.json").write_text(json.dumps(found))
    stage = {"cmd": "cp without.json reports/evaluation/metrics.json", "params": ["reduce.k"]}
    metrics = [{"reports/evaluation/metrics.json": {"cache": False}}]
    pipeline = {"stages": {"evaluate": stage | {"metrics": metrics}}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    (tmp_path / ".gitignore").write_text("")
    for command in ("git add --all", "git commit -q -m pipeline", "dvc exp run -q -S reduce.k=2 -n without"):
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    (tmp_path / "reports/evaluation/metrics.json").write_text(with_accuracies)
    monkeypatch.chdir(tmp_path)
    columns = dict(zip([heading for _, heading, _ in report.EXPERIMENTS], report.experiments()[-1][1:], strict=True))
    assert (report.experiments()[-1][0], columns["nearest neighbour"], columns["k"]) == ("without", "-", "3")


def test_a_page_of_a_run_that_leaks_begins_with_a_warning(tmp_path: Path) -> None:
    page = make_page(tmp_path, write_run(tmp_path, make_images(), leak=0.9))
    header = page[page.index("<header>") : page.index("</header>")]
    assert 'role="alert"' in header
    assert "90.0% of the images have a near-equal image" in header


def test_a_page_of_a_run_that_does_not_leak_warns_of_nothing(page: str) -> None:
    assert 'role="alert"' not in page.partition("<script>")[0]


def test_a_label_that_cannot_be_tested_does_no_harm_to_the_chart_of_recalls(tmp_path: Path) -> None:
    images = make_images()
    images.loc[images.index[:3], "label"] = "quince"
    chart = charts_in(make_page(tmp_path, write_run(tmp_path, images)))["Recall of each label"]
    drawn = vl_convert.vegalite_to_svg(chart)
    assert "quince" in drawn
    assert "NaN" not in drawn
    assert drawn.count('aria-label="recall: ') == 2 * 3  # a dot and a line of each label tested


def test_images_of_one_fold_make_a_page_without_accuracies(tmp_path: Path) -> None:
    page = make_page(tmp_path, write_run(tmp_path, make_images().assign(fold=0)))
    assert "variance.explained" in page
    assert "nearest_neighbour" not in page.partition("<script>")[0]


# In a browser


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_a_browser_shows_all_of_the_page(width: int, scheme: str, chromium: Any, folder: Path, page: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    )
    chromium.get((folder / "report.html").as_uri())
    WebDriverWait(chromium, 30).until(
        lambda driver: driver.execute_script("return document.querySelectorAll('[data-drawn]').length") == len(CHARTS)
    )
    # Pictures below the fold load when they come into view.
    chromium.execute_script("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    loaded = "return [...document.images].every(image => image.complete && image.naturalWidth)"
    WebDriverWait(chromium, 30).until(lambda driver: driver.execute_script(loaded))
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert chromium.execute_script("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 22, 24)"
    )
    assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    if screenshots := os.environ.get("SCREENSHOTS"):
        height = chromium.execute_script("return document.documentElement.scrollHeight")
        shot = chromium.execute_cdp_cmd(
            "Page.captureScreenshot",
            {"captureBeyondViewport": True, "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}},
        )
        Path(screenshots, f"report-{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))


@pytest.mark.slow
def test_a_page_of_a_million_images_stays_small(tmp_path: Path) -> None:
    n, n_labels = 1_000_000, 200
    some = make_images(2000)
    some["label"] = [f"label {i % n_labels:03}" for i in range(len(some))]
    places = write_run(tmp_path, some)
    table = ds.dataset(tmp_path / "data/ingested/images").to_table().to_pandas()
    shutil.rmtree(tmp_path / "data/ingested/images")
    for part in range(n // len(table)):
        ids = pd.Series([f"{part * len(table) + i:064x}" for i in range(len(table))])
        rows = table.assign(image_id=ids, path=table["path"] if not part else f"{part}/" + table["path"])
        write(rows, tmp_path / f"data/ingested/images/{part}")
    page = make_page(tmp_path, places)
    assert len(page) < 5_000_000
    assert page.count("<figure>") >= n_labels
