"""The section on the image metrics: what they say of images that are known, and of GANs."""

import re
from collections.abc import Sequence
from pathlib import Path

from lab.pages.claims import Records, Row, brief, claims, read, table, wrapped

METRICS = {
    "fid": ("FID", 3),
    "kid": ("KID", 4),
    "inception_score": ("IS", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "f_8": ("F_8", 3),
    "f_1_8": ("F_1/8", 3),
}


def evaluate(results: Path) -> str:
    """Return the section, or "" without a record."""
    records = read(results / "evaluate.csv")
    if not records.rows:
        return ""
    images = Records([row for row in records.rows if not _of_cifar10(row)])
    models = Records([{**row, **_of_cifar10(row)} for row in records.rows if _of_cifar10(row)])
    lines = [
        (row["fake"], row["real"], _counts(row), *(_cell([row], name) for name in METRICS))
        for row in images.rows
    ]
    known = f"""Below are known images through {_features(results, records)}. Real images against
        other real ones are the floor; a single class has precision and less recall."""
    samples = records.rows[0]["real_images"]
    head = ("images", "against", "of each", *(label for label, _ in METRICS.values()))
    return f"""## What the image metrics say

`evaluate.py` measures generated images against real ones: FID, KID, the Inception Score and
improved precision and recall by torch-fidelity, and the precision-recall distribution of Sajjadi et
al. (2018), as F_8, which weighs recall, and F_1/8, which weighs precision. KID is a mean over
subsets, the precision-recall distribution over ten clusterings.

**Which numbers are comparable.** With Inception's features (the default; torch-fidelity fetches the
weights): with RS-GAN's `eval.py` at 10,000 generated images against CIFAR-10's 10,000 test images,
and with most later tables at 50,000 against the training images; an Inception Score needs 50,000
generated images. FID grows as the counts shrink, and the balls of precision and recall with them:
other counts compare with each other alone. With other features (`--features`), numbers compare with
each other alone, at equal counts, and with nothing that was published.

{wrapped(known)} Again:
`python examples/evaluate.py FAKE REAL --features CLASSIFIER.pt --samples {samples} --record`.

{table(head, lines)}
{_models(models)}"""


def _of_cifar10(row: Row) -> dict[str, str]:
    """Return K and the seed of a model of `cifar10.py`, which its file is named by."""
    found = re.fullmatch(r"K(?P<unroll_steps>\d+)-seed(?P<seed>\d+)", row["fake"])
    return found.groupdict() if found else {}


def _counts(row: Row) -> str:
    return f"{int(row['fake_images']):,} / {int(row['real_images']):,}"


def _cell(rows: Sequence[Row], name: str) -> str:
    return brief([float(row[name]) for row in rows], METRICS[name][1])


def _models(models: Records) -> str:
    """Return what the metrics say of the models of `cifar10.py`, or "" without them."""
    if not models.rows:
        return ""
    first, steps = models.rows[0], [k for (k,) in models.settings("unroll_steps")]
    lines = []
    for k in steps:
        own = models.pick(unroll_steps=k).rows
        lines.append((k, str(len(own)), *(_cell(own, name) for name in METRICS)))
    text = f"""The models of Table 3, {int(first["fake_images"]):,} samples of each against as many
        images of {first["real"]}, by the same features. Again:"""
    return f"""
{wrapped(text)}
`python examples/evaluate.py runs/cifar10/checkpoints/RUN.pt REAL --sampler cifar10:sampler
--features CLASSIFIER.pt --samples {first["real_images"]} --record`.

{table(("K", "seeds", *(label for label, _ in METRICS.values())), lines)}

{claims(
    ("ours", f"{k} step{'s' * (k != '1')} ahead, images are more like the data than with none", [
        *models.compare(f"FID, K=0 against {k}", "fid", {"unroll_steps": 0}, {"unroll_steps": k}),
        *models.compare(f"F_8, K={k} against 0", "f_8", {"unroll_steps": k}, {"unroll_steps": 0}),
    ]) for k in steps if k != "0"
)}
"""  # fmt: skip


def _features(results: Path, records: Records) -> str:
    """Return what is known of the features."""
    names = " and ".join(name for (name,) in records.settings("features"))
    trained = read(results / "image_classifier.csv").rows
    stories = [
        f"trained for {row['epochs']} epochs on {int(row['train_images']):,} images of "
        f"{row['data']}; it classifies {float(row['test_accuracy']):.1f} % of "
        f"{int(row['test_images']):,} test images as they are labelled"
        for row in trained
        if row["weights"] in names
    ]
    return f"the features of a {names} ({'; '.join(stories)})" if stories else names
