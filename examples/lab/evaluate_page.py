"""The section on the image metrics: what they say of images that are known."""

import csv
from pathlib import Path

from lab.cifar_page import wrapped
from lab.claims import Records, table

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
    path = results / "evaluate.csv"
    if not path.exists():
        return ""
    with path.open(newline="") as file:
        records = Records(list(csv.DictReader(file)))
    lines = []
    for row in records.rows:
        counts = f"{int(row['fake_images']):,} / {int(row['real_images']):,}"
        values = [f"{float(row[name]):.{digits}f}" for name, (_, digits) in METRICS.items()]
        lines.append((row["fake"], row["real"], counts, *values))
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
"""


def _features(results: Path, records: Records) -> str:
    """Return what is known of the features."""
    names = " and ".join(name for (name,) in records.settings("features"))
    path = results / "image_classifier.csv"
    if not path.exists():
        return names
    with path.open(newline="") as file:
        trained = [row for row in csv.DictReader(file) if row["weights"] in names]
    stories = [
        f"trained for {row['epochs']} epochs on {int(row['train_images']):,} images of "
        f"{row['data']}; it classifies {float(row['test_accuracy']):.1f} % of "
        f"{int(row['test_images']):,} test images as they are labelled"
        for row in trained
    ]
    return f"the features of a {names} ({'; '.join(stories)})" if stories else names
