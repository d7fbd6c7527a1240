"""`omnigrpo data`: published datasets to R1-Omni's format, and checks of what a run would read."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Datasets: convert published ones, check any.", no_args_is_help=True)


@app.command()
def convert(
    dataset: Annotated[str, typer.Argument(help="dfew, mafw, ravdess or emer.")],
    root: Annotated[Path, typer.Argument(help="The dataset's directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for DATASET_SPLIT.json.")],
    fold: Annotated[int, typer.Option(help="Fold of DFEW and MAFW.")] = 1,
    clips: Annotated[Path | None, typer.Option(help="Directory of the clips, where it is elsewhere.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV with name and label, for EMER's descriptions.")
    ] = None,
) -> None:
    """Write a published dataset's splits in R1-Omni's JSON format (exit status 1 when one of them is empty)."""
    from omnigrpo.data.labelled import write_r1_omni
    from omnigrpo.data.published import read_published

    found = read_published(dataset, root, fold=fold, clips=clips, labels=labels)
    for split, items in found.splits.items():
        if items:
            path = output / f"{dataset}_{split}.json"
            write_r1_omni(items, path)
            typer.echo(f"wrote {path}: {len(items)} clips")
        else:
            typer.echo(f"{split}: no annotated clip is on disk; nothing written")
    for sentence in found.skipped[:_SHOWN]:
        typer.echo(f"left out: {sentence}")
    if len(found.skipped) > _SHOWN:
        typer.echo(f"left out: {len(found.skipped) - _SHOWN} more")
    if not all(found.splits.values()):
        raise typer.Exit(1)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Dataset files, checked with each other.")],
    labels: Annotated[
        str | None, typer.Option(help="Label set: dfew, mafw, ravdess, or words with commas.")
    ] = None,
    media_root: Annotated[Path | None, typer.Option(help="What clip paths are relative to.")] = None,
    content: Annotated[bool, typer.Option("--content", help="Compare clips by their bytes.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Decode every clip: durations, and what fails.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Missing clips, duplicates within and across files, class balance, durations (exit status 1 on a fault)."""
    from contextlib import nullcontext

    from rich.console import Console

    from omnigrpo.data.published import label_set
    from omnigrpo.data_check import check_datasets
    from omnigrpo.data_check_table import as_text, show_check
    from omnigrpo.progress import counting

    has_bar = probe and not as_json
    with counting("probe", console=Console(stderr=True)) if has_bar else nullcontext() as show:
        found = check_datasets(
            files,
            labels=None if labels is None else label_set(labels),
            media_root=media_root,
            by_content=content,
            probe=probe,
            on_probe=show,
        )
    if as_json:
        typer.echo(as_text(found))
    else:
        show_check(found)
    if not found.is_clean:
        raise typer.Exit(1)


_SHOWN = 5
