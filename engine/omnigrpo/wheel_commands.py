"""`omnigrpo wheel`: emotion-wheel tables."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Emotion-wheel tables of open-vocabulary labels.", no_args_is_help=True)


@app.command()
def build(
    directory: Annotated[
        Path, typer.Argument(help="wheel_mapping.npz, or wheel1.xlsx ..., synonym.xlsx and format.csv.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("wheel.json"),
) -> None:
    """Convert published tables into the one compact file that scores and rewards read; nothing is unpickled."""
    from omnigrpo.emotion_wheel.convert import convert
    from omnigrpo.emotion_wheel.wheel import EmotionWheel

    tables = EmotionWheel(convert(directory)).tables
    tables.save(output)
    typer.echo(
        f"wrote {output}: {len(tables.forms)} forms of {len(tables.synonyms)} words on {len(tables.wheels)} wheels, "
        f"hash {tables.content_hash[:12]}"
    )


@app.command()
def show(
    labels: Annotated[list[str], typer.Argument(help="Labels.")],
    wheel: Annotated[
        Path | None, typer.Option("--wheel", help="Compact file; default the small made-up wheel.")
    ] = None,
) -> None:
    """What labels stand for: base word, wheel word, and the node on each wheel and level."""
    from rich.console import Console
    from rich.table import Table

    from omnigrpo.emotion_wheel.convert import made_up_wheel
    from omnigrpo.emotion_wheel.labels import check_labels
    from omnigrpo.emotion_wheel.tables import LEVELS, WheelTables
    from omnigrpo.emotion_wheel.wheel import EmotionWheel

    found = EmotionWheel(made_up_wheel() if wheel is None else WheelTables.load(wheel))
    table = Table("label", "base word", "wheel word", *(w.name for w in found.tables.wheels))
    for label in check_labels(labels, "the labels"):
        inner, middle = (found.nodes(label, level) for level in LEVELS)
        nodes = [f"{a or '-'} / {b or '-'}" for a, b in zip(inner, middle, strict=True)]
        table.add_row(label, found.base_word(label) or "-", found.wheel_word(label) or "-", *nodes)
    Console().print(table)
