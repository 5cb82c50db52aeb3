"""Write one page about a run, for people to look at: metrics, charts, pictures.

usage: python -m reports.report [--suspects SUSPECTS] INGESTED SPLIT REDUCED CLASSIFIER EVALUATION OUTPUT [REVISION...]

reads   INGESTED/images, INGESTED/quarantine, SPLIT/images, REDUCED/embeddings, CLASSIFIER, EVALUATION
        SUSPECTS, if it is given and there
        and, through DVC, the charts of dvc.yaml and the experiments of this commit; dvc.lock, to say which run this is
writes  OUTPUT  one HTML file, which opens without a network

With revisions (commits, branches, tags, experiments) the charts show their runs beside that of the workspace. This is no
stage of the pipeline: an experiment should not wait for it.
"""

import argparse
import base64
import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import dvc.api
import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import vl_convert
from PIL import Image, ImageOps

from bootstrap import runtime
from stages.analysis import RECOGNISERS, SPACES, count_confusions, leak_warning, most_confused, open_table, read

LABELLED = ("label", "image_id", "path")
FOLDS = ("path", "fold")
PICTURES = ("path", "label", "content")
QUARANTINE = ("path", "reason", "detail")
EMBEDDINGS = ("image_id", "path", "label", "embedding")
PIXELS = 112  # of a picture's longer side
NEIGHBOURS = 5
QUERIES = 8  # images whose neighbours are shown
PAIRS, EXAMPLES = 6, 3  # confused pairs of labels, and images of each
SUSPECTS = 24  # that are shown
ROWS = 50  # of the tables of refused files and of experiments

MEANINGS = {
    "embedding": "k components",
    "features": "all features, the most that the reduction can reach",
    "pixels": "16 x 16 raw pixels, which need no network",
}
# What a run is judged by: the name in metrics.json, the format, and what it says.
METRICS = (
    ("images.images", "{:,}", "photographs in the tables, each of them a row"),
    ("images.labels", "{:,}", "labels, which are the folders"),
    ("images.groups", "{:,}", "groups of nearly equal photographs, such as the frames of one film"),
    ("images.quarantined", "{:,}", "files that were refused; they are listed below with the reason"),
    ("images.ignored", "{:,}", "other files: hidden, no photographs, or left out by parameters of ingest"),
    ("images.duplicates", "{:,}", "photographs whose content another one has; they cost no second pass of the network"),
    ("images.label_conflicts", "{:,}", "photographs that lie under two labels: one of the two is wrong"),
    ("variance.components", "{:,}", "k, the components that are kept of each feature vector"),
    ("variance.explained", "{:.1%}", "of the variance of the features is in these components"),
    ("variance.held_out_error", "{:.1%}", "of the variance of groups that PCA has not seen is lost by as many components"),
    ("variance.k95", "{:,}", "components would keep 95 % of the variance"),
    (
        "variance.k_enough",
        "{:,}",
        "components are enough: the fewest tried whose accuracy is surely near that of all features",
    ),
    (
        "nearest_neighbour.loss",
        "{:.1%}",
        "is the loss of accuracy by the nearest neighbour of k components against all features",
    ),
    ("nearest_neighbour.loss_high", "{:.1%}", "may be lost: the upper end of the 95 % interval of that loss"),
    ("tested.images", "{:,}", "photographs are tested: every accuracy is on them"),
    ("tested.labels_untested", "{:,}", "labels cannot be tested, as they need photographs of two groups"),
    ("leak.near_equal", "{:.1%}", "of the photographs have a nearly equal one of their label in the other fold"),
    *(
        (f"{name}.{space}", "{:.1%}", f"of the images are recognised by the {recogniser.title} with {MEANINGS[space]}")
        for name, recogniser in RECOGNISERS.items()
        for space in SPACES
    ),
    ("unseen.accuracy", "{:.1%}", "of the photographs of a label that is left out are taken for its kind, such as Cherry"),
    ("unseen.low", "{:.1%}", "is the lower end of the 95 % interval of that share"),
    ("unseen.high", "{:.1%}", "is its upper end"),
    ("unseen.labels", "{:,}", "labels were left out in turn, each with siblings of its kind"),
    ("recognition.accuracy", "{:.1%}", "of the photographs are recognised by the model that a phone runs"),
    ("recognition.accuracy_low", "{:.1%}", "is the lower end of the 95 % interval of that share, over groups"),
    ("recognition.accuracy_high", "{:.1%}", "is its upper end"),
    ("recognition.macro_f1", "{:.3f}", "is its macro-F1: each label counts the same"),
    ("recognition.top_3", "{:.1%}", "of the photographs have their label among the first three"),
    ("recognition.ece", "{:.1%}", "is the mean distance of its probabilities from how often it is right (ECE)"),
    ("recognition.brier", "{:.3f}", "is the Brier score of its probabilities: 0 is best, 2 is worst"),
    ("recognition.accuracy_of_surest_80", "{:.1%}", "are recognised of the 80 % about which it is surest"),
    ("recognition.kept", "{:.1%}", "of the photographs are not refused"),
    (
        "recognition.unknown.auroc",
        "{:.3f}",
        "is how well photographs of labels that are left out are told from others (AUROC)",
    ),
    ("recognition.unknown.accepted", "{:.1%}", "of these are not refused, but taken for a label that it knows"),
)
# What experiments are compared by: parameter or metric, heading, format.
EXPERIMENTS = (
    ("reduce.k", "reduce.k", "{:g}"),
    ("reduce.scale", "scale", "{}"),
    ("variance.components", "k", "{:g}"),
    ("variance.explained", "variance kept", "{:.1%}"),
    ("variance.held_out_error", "lost of unseen groups", "{:.1%}"),
    *((f"{name}.embedding", recogniser.title, "{:.1%}") for name, recogniser in RECOGNISERS.items()),
    ("recognition.accuracy", "recognised on a phone", "{:.1%}"),
    ("nearest_neighbour.loss", "loss", "{:.1%}"),
    ("nearest_neighbour.loss_high", "loss, at most", "{:.1%}"),
    ("variance.k_enough", "k that is enough", "{:g}"),
)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_places(args.ingested, args.split, args.reduced, args.classifier, args.evaluation)
    found = json.loads(Path(args.evaluation, "metrics.json").read_text())
    found |= json.loads(Path(args.classifier, "metrics.json").read_text())
    (metrics,) = pd.json_normalize(found).to_dict("records")
    predictions = pd.read_csv(Path(args.evaluation, "predictions.csv"), keep_default_na=False)  # NA may be a label
    images = f"{args.ingested}/images"

    labels = pick_examples(images)
    neighbours = find_neighbours(args.split, args.reduced, predictions)
    pairs = find_confused_pairs(predictions)
    suspects = pick_suspects(args.suspects)
    paths = {*labels["path"], *itertools.chain(*neighbours, *(pair["paths"] for pair in pairs))}
    paths |= {path for each in suspects.get("suspects", []) for path in (each["path"], each["nearest"])}
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    text = templates.get_template("report.html.jinja").render(
        metrics=[(text.format(metrics[name]), name, said) for name, text, said in METRICS if name in metrics],
        warning=leak_warning(found),
        **describe_run(),
        n_images=metrics["images.images"],
        n_labels=metrics["images.labels"],
        k=metrics["variance.components"],
        explained=metrics["variance.explained"],
        charts=charts(args.revisions),
        vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        labels=labels.to_dict("records"),
        neighbours=neighbours,
        pairs=pairs,
        pictures=make_pictures(images, paths),
        suspicion=suspects,
        **count_refused(f"{args.ingested}/quarantine"),
        headings=["run", *(heading for _, heading, _ in EXPERIMENTS)],
        experiments=experiments(),
    )
    partial = Path(f"{args.output}.partial")
    partial.write_text(text)
    partial.rename(args.output)
    print(f"report: {args.output}, {len(text) / 2**20:.1f} MB")


def describe_run() -> dict[str, str]:
    """Name the run of dvc.lock, and say how it differs from that of the last commit."""
    entries = runtime.read_lock(Path("dvc.lock").read_text())
    commit, committed = git("rev-parse", "--short", "HEAD").strip(), runtime.read_lock(git("show", "HEAD:dvc.lock"))
    run = runtime.identify(entries)
    if runtime.identify(committed) == run:
        return {"run": run, "said_of_run": f"the run of commit {commit}"}
    now, then = (
        {
            f"{stage}.{name}": value
            for stage, section in runtime.parameters_of(each).items()
            for name, value in section.items()
        }
        for each in (entries, committed)
    )
    changed = [f"{name} is {value}, not {then[name]}" for name, value in now.items() if name in then and value != then[name]]
    difference = "; ".join(changed) if changed else "with the same parameters, on other images or by other code"
    return {"run": run, "said_of_run": f"a run that is not that of commit {commit}: {difference}"}


def git(*command: str) -> str:
    """Return what git prints; nothing if it fails, as where nobody has committed a run."""
    return subprocess.run(["git", *command], capture_output=True, text=True).stdout


def check_places(*places: str) -> None:
    """End by SystemExit if a run has not got this far."""
    if missing := [place for place in places if not Path(place).exists()]:
        raise SystemExit(f"report: there is no {', '.join(missing)}: `dvc repro` makes it, or says why it cannot be made")


def charts(revisions: list[str]) -> dict[str, dict[str, Any]]:
    """Make the Vega-Lite specification of each chart of dvc.yaml, by its title.

    Raises
    ------
    SystemExit
        DVC cannot make them, as for an unknown revision
    """
    command = ["plots", "diff", "workspace", *revisions] if revisions else ["plots", "show"]
    said = subprocess.run([sys.executable, "-m", "dvc", *command, "--json"], capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(f"report: `dvc {' '.join(command)}` failed: {said.stderr.strip()}")
    plots = json.loads(said.stdout)["data"]
    return {title: fit_to_page(parts[0]["content"], is_single=not revisions) for title, parts in plots.items() if parts}


def fit_to_page(chart: dict[str, Any], is_single: bool) -> dict[str, Any]:
    """Remove from a chart what the page has: title, version of Vega-Lite and, for a single run, what tells runs apart."""
    chart = {key: value for key, value in chart.items() if key not in ("title", "$schema")}
    if isinstance(height := chart.get("height"), dict):  # a chart as wide as the page must know its height
        y = chart["encoding"]["y"]["field"]
        chart["height"] = height["step"] * len({row[y] for row in chart["data"]["values"]})
    if not is_single:
        return chart
    if "facet" in chart:
        chart |= chart.pop("spec")
        del chart["facet"], chart["resolve"]
    encodings = [chart.get("encoding", {}), *(layer.get("encoding", {}) for layer in chart.get("layer", []))]
    for encoding in encodings:
        if "tooltip" in encoding:
            encoding["tooltip"] = [each for each in encoding["tooltip"] if each["field"] != "rev"]
        for channel in [name for name, value in encoding.items() if isinstance(value, dict) and value.get("field") == "rev"]:
            del encoding[channel]
    return chart


def pick_examples(images: str) -> pd.DataFrame:
    """Pick for each label its image of least image_id: columns label, path and n_images of the label."""
    table = read(images, LABELLED).sort_by([(column, "ascending") for column in LABELLED])
    grouped = table.group_by("label", use_threads=False).aggregate([("path", "first"), ("path", "count")])
    return grouped.to_pandas().rename(columns={"path_first": "path", "path_count": "n_images"})


def find_neighbours(split: str, reduced: str, predictions: pd.DataFrame) -> list[list[str]]:
    """Find the paths of some QUERIES images of different labels, each with those of its NEIGHBOURS in the other fold."""
    tested = pc.field("path").isin(pa.array(predictions["path"], pa.string()))
    folds = read(f"{split}/images", FOLDS, tested).to_pandas()
    embeddings = read(f"{reduced}/embeddings", EMBEDDINGS, tested).to_pandas()
    rows = embeddings.merge(folds, on="path").sort_values(["image_id", "path"], ignore_index=True)
    firsts = rows.groupby("label").head(1).sort_values("label")
    found = []
    for query in firsts[:: math.ceil(len(firsts) / QUERIES) or 1].itertuples():
        others = rows[rows["fold"] != query.fold]
        distance = ((np.stack(others["embedding"].to_list()) - query.embedding) ** 2).sum(axis=1)
        found.append([query.path, *others["path"].iloc[np.argsort(distance, kind="stable")[:NEIGHBOURS]]])
    return found


def find_confused_pairs(predictions: pd.DataFrame) -> list[dict[str, Any]]:
    """Find the pairs of labels confused most often: label, predicted, n_images, share of the label's, paths of examples.

    Each image's path is followed by that of its nearest image, for which it was taken.
    """
    pairs = most_confused(count_confusions(predictions))[:PAIRS].to_dict("records")
    by_pair = predictions.groupby(["label", "predicted"])
    for pair in pairs:
        rows = by_pair.get_group((pair["label"], pair["predicted"]))
        some = rows[["path", "nearest"]].iloc[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES]
        pair["paths"] = some.to_numpy().ravel().tolist()
    return pairs


def pick_suspects(folder: str | None) -> dict[str, Any]:
    """Find the strongest suspects, and what each label has of suspects and of really different images; empty if not known.

    Labels with the most suspects come first, then those whose images are alike most often.
    """
    if folder is None or not Path(folder).exists():
        return {}
    suspects, labels = (
        pd.read_csv(Path(folder, f"{name}.csv"), keep_default_na=False, dtype={"label": str, "looks_like": str})
        for name in ("suspects", "labels")
    )
    share = labels["effective_images"] / labels["n_images"]
    labels = labels.assign(share=share).sort_values(["n_suspects", "share", "label"], ascending=[False, True, True])
    return {
        "counts": json.loads(Path(folder, "metrics.json").read_text()),
        "suspects": suspects.head(SUSPECTS).to_dict("records"),
        "labels": labels.head(ROWS).to_dict("records"),
        "n_labels": len(labels),
    }


def make_pictures(images: str, paths: set[str]) -> dict[str, dict[str, str]]:
    """Make of each path the image's label and its source, a small WebP as a data URI."""
    wanted = pc.field("path").isin(pa.array(sorted(paths), pa.string()))
    found = {}
    for group in itertools.chain(*(file.split_by_row_group(wanted) for file in open_table(images).get_fragments())):
        if not group.count_rows(wanted):
            continue  # without a look at the pictures
        for row in group.to_table(columns=list(PICTURES), filter=wanted).to_pylist():
            with Image.open(io.BytesIO(row["content"])) as image:
                ImageOps.exif_transpose(image, in_place=True)
                image.thumbnail((PIXELS, PIXELS))
                stream = io.BytesIO()
                image.save(stream, "WEBP", quality=75)
            source = "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
            found[row["path"]] = {"label": row["label"], "source": source}
    return found


def count_refused(quarantine: str) -> dict[str, Any]:
    """Count the files refused for each reason, and list the first ROWS of all."""
    table = read(quarantine, QUARANTINE).to_pandas().sort_values("path")
    return {"reasons": table["reason"].value_counts().to_dict(), "refused": table.head(ROWS).to_dict("records")}


def experiments() -> list[list[str]]:
    """List the runs of this commit that DVC knows, with the columns of EXPERIMENTS: the workspace's, then by k."""
    # DVC gives "!" for what it cannot read, such as metrics of the commit that nobody pushed or pulled, and the text "None"
    # for what a run does not have and others do.
    workspace, *others = (
        {key: value for key, value in run.items() if value not in ("!", "None")} for run in dvc.api.exp_show()
    )
    others.sort(key=lambda run: run.get("variance.components") or 0)
    return [
        [
            run.get("Experiment") or run["rev"],
            *("-" if run.get(key) is None else text.format(run[key]) for key, _, text in EXPERIMENTS),
        ]
        for run in [workspace, *others][:ROWS]
    ]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suspects", help="the output of the stage suspects; without it, the page names none")
    parser.add_argument("ingested")
    parser.add_argument("split")
    parser.add_argument("reduced")
    parser.add_argument("classifier")
    parser.add_argument("evaluation")
    parser.add_argument("output")
    parser.add_argument("revisions", nargs="*", help="runs that the charts show beside the workspace's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
