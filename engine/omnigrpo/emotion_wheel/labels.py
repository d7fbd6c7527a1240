"""Lists of labels as models write them."""

import re

_SEPARATORS = re.compile(r"['\",]")


def split_labels(text: str) -> list[str]:
    """The labels of ``"[happy, sad]"`` or ``"happy, sad"``, in order, lower case, without white space around.

    As the reference reads them: one leading ``[`` and one trailing ``]`` go, quotes and commas separate, empty pieces
    are dropped.
    """
    text = text.strip().removeprefix("[").removesuffix("]")
    return [label for piece in _SEPARATORS.split(text) if (label := piece.strip().lower())]


def check_labels(labels: object, where: str) -> list[str]:
    """``labels`` as a list of normal form; ValueError unless it is a list of strings."""
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{where} must be a list of strings, got {labels!r}")
    return [label.strip().lower() for label in labels]
