"""The metric as plain statements over CSV files, sharing no code with the engine: slow, and easy to check by eye."""

import csv
from pathlib import Path

import numpy as np


def pieces(text: str) -> list[str]:
    if text.startswith("["):
        text = text[1:]
    if text.endswith("]"):
        text = text[:-1]
    for quote in "'\"":
        text = text.replace(quote, ",")
    return [piece for piece in (part.strip() for part in text.split(",")) if piece]


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


class SlowMetric:
    def __init__(self, directory: Path) -> None:
        self.base_words: dict[str, list[str]] = {}
        for row in read(directory / "format.csv"):
            for form in [*pieces(row["format"]), row["name"]]:
                self.base_words.setdefault(form, []).append(row["name"])
        self.wheel_words: dict[str, list[str]] = {}
        for row in read(directory / "synonym.csv"):
            for run in ("run1", "run2"):
                word = row[f"word_{run}"]
                for synonym in [word, *pieces(row[f"synonym_{run}"])]:
                    self.wheel_words.setdefault(synonym, []).append(word)
        self.wheels = [self._wheel(directory / f"wheel{number}.csv") for number in range(1, 6)]

    def _wheel(self, path: Path) -> dict[str, dict[str, str]]:
        inner = middle = ""
        tree: dict[str, dict[str, list[str]]] = {}
        for row in read(path):
            inner = row["level1"] or inner
            middle = row["level2"] or middle
            tree.setdefault(inner, {}).setdefault(middle, []).append(row["level3"])
        level1, level2 = {}, {}
        for inner in tree:
            level1[inner] = inner
            level2[inner] = sorted(tree[inner])[0]
            for middle in tree[inner]:
                level1[middle] = inner
                level2[middle] = middle
                for outer in tree[inner][middle]:
                    level1[outer] = inner
                    level2[outer] = middle
        return {"level1": level1, "level2": level2}

    def node(self, label: str, wheel: int, level: str) -> str:
        label = label.lower().strip()
        if label not in self.base_words:
            return ""
        found = []
        for base in self.base_words[label]:
            found += self.wheel_words.get(base, [])
        for word in sorted(found):
            if word in self.wheels[wheel][level]:
                return self.wheels[wheel][level][word]
        return ""

    def sets(self, labels: list[str], wheel: int, level: str) -> set[str]:
        return {node for label in labels if (node := self.node(label, wheel, level))}

    def corpus(self, predicted: list[list[str]], reference: list[list[str]], level: str) -> list[list[float]]:
        """Per wheel: F, precision, recall."""
        scores = []
        for wheel in range(5):
            precisions, recalls = [], []
            for p, r in zip(predicted, reference, strict=True):
                mine, gold = self.sets(p, wheel, level), self.sets(r, wheel, level)
                if not gold:
                    continue
                precisions.append(len(mine & gold) / len(mine) if mine else 0)
                recalls.append(len(mine & gold) / len(gold))
            precision = np.mean(precisions) if precisions else 0
            recall = np.mean(recalls) if recalls else 0
            both = precision + recall
            scores.append([2 * precision * recall / both if both else 0, precision, recall])
        return scores

    def sample(self, predicted: list[str], reference: list[str], level: str) -> float | None:
        """Mean over the wheels that the reference is on of the F1 of two sets."""
        found = []
        for wheel in range(5):
            mine, gold = self.sets(predicted, wheel, level), self.sets(reference, wheel, level)
            if gold:
                found.append(2 * len(mine & gold) / (len(mine) + len(gold)))
        return sum(found) / len(found) if found else None
