"""The command line. Heavy imports live inside the commands, so that --help answers at once."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from omnigrpo import data_commands, wheel_commands

app = typer.Typer(
    name="omnigrpo",
    help="Train video+audio language models by GRPO with verifiable rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(data_commands.app, name="data")
app.add_typer(wheel_commands.app, name="wheel")

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; see presets/.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override, e.g. optimizer.learning_rate=1e-5. Repeatable."),
]
ModelOption = Annotated[Path | None, typer.Option("--model", help="Checkpoint directory (sets model.path).")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Dataset JSON (sets data.train).")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Run directory (sets run.output).")]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the run (sets run.steps).")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the run directory's last checkpoint.")
]


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run directory.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seeds data, weights, order and sampling.")] = 0,
    rollout: Annotated[
        str, typer.Option(help="Rollout engine (rollout.engine): native or sglang.")
    ] = "native",
) -> None:
    """Render clips, train a tiny model on them (cold start, then GRPO), evaluate, and write a report."""
    from omnigrpo.demo import DemoConfig, run_demo

    run_demo(DemoConfig(output=output, seed=seed, grpo=(f"rollout.engine={rollout}",)))


@app.command("generate-data")
def generate_data(
    output: Annotated[Path, typer.Argument(help="Directory for the clips and the JSON files.")],
    seed: Annotated[int, typer.Option(help="Same seed, same clips.")] = 0,
    cold_start: Annotated[int, typer.Option(min=7, help="Clips with reasoning.")] = 112,
    rl: Annotated[int, typer.Option(min=7, help="Clips with bare labels.")] = 1008,
    heldout: Annotated[int, typer.Option(min=7, help="Held-out clips.")] = 210,
    ood: Annotated[int, typer.Option(min=7, help="Out-of-distribution clips.")] = 210,
) -> None:
    """Render a synthetic emotion dataset: H.264+AAC clips and R1-Omni JSON files."""
    from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
    from omnigrpo.progress import counting

    settings = SyntheticConfig(
        seed=seed, num_cold_start=cold_start, num_rl=rl, num_heldout=heldout, num_ood=ood
    )
    with counting("render clips") as show:
        manifest = generate_dataset(output, settings, on_progress=show)
    typer.echo(f"{'found' if manifest.reused else 'wrote'} {output}: cold_start, rl, heldout and ood .json")


@app.command()
def sft(
    config: ConfigOption = None,
    overrides: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    output: OutputOption = None,
    steps: StepsOption = None,
    resume: ResumeOption = False,
) -> None:
    """Supervised training on reasoning and answers (the cold start)."""
    from omnigrpo.config import load_config
    from omnigrpo.run import run_sft

    run_sft(load_config(config, [*(overrides or []), *_short(model, data, output, steps)]), resume=resume)


@app.command()
def train(
    config: ConfigOption = None,
    overrides: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    output: OutputOption = None,
    steps: StepsOption = None,
    resume: ResumeOption = False,
) -> None:
    """Train by GRPO on clips with verifiable answers."""
    from omnigrpo.config import load_config
    from omnigrpo.run import run_grpo

    run_grpo(load_config(config, [*(overrides or []), *_short(model, data, output, steps)]), resume=resume)


@app.command()
def reproduce(
    recipe: Annotated[str, typer.Argument(help="r1-omni.")],
    model: Annotated[Path, typer.Option("--model", help="Checkpoint directory of the base model.")],
    data: Annotated[
        Path, typer.Option("--data", help="Directory: cold_start.json, rl.json, *_test.json, maybe sft.json.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of all stages.")],
    faithful: Annotated[
        bool, typer.Option("--faithful", help="As the published code does it, quirks included.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="cold_start., sft., rlvr., evaluation. or all. before a setting."),
    ] = None,
) -> None:
    """Cold start, SFT baseline, RLVR and evaluation of a published recipe; goes on where it was interrupted."""
    from omnigrpo.reproduce import ReproduceConfig, run_reproduction
    from omnigrpo.reproduce_report import as_markdown, write_reproduction

    if recipe != "r1-omni":
        raise ValueError(f"the recipes are r1-omni, got {recipe!r}")
    settings = ReproduceConfig(
        model=model, data=data, output=output, faithful=faithful, overrides=tuple(overrides or ())
    )
    result = run_reproduction(settings)
    typer.echo(as_markdown(result))
    typer.echo(f"wrote {write_reproduction(result, output)}")


@app.command()
def study(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the study.")] = Path(
        "runs/study"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 3,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="cold_start., sft. or rlvr. before a setting. Repeatable."),
    ] = None,
    rl: Annotated[int, typer.Option(min=7, help="Labelled clips, for SFT and RLVR alike.")] = 1008,
    heldout: Annotated[int, typer.Option(min=7, help="Clips of each test split.")] = 210,
) -> None:
    """R1-Omni's Table 1 in miniature: base, cold start, SFT on labels and RLVR, in and out of distribution."""
    from omnigrpo.data.synthetic.dataset import SyntheticConfig
    from omnigrpo.reproduce import stage_overrides
    from omnigrpo.study import StudyConfig, run_study
    from omnigrpo.study_report import as_markdown, write_study

    of_stage = stage_overrides(overrides or [], ("cold_start", "sft", "rlvr"))
    settings = StudyConfig(
        output=output,
        seeds=tuple(range(seeds)),
        data=SyntheticConfig(num_rl=rl, num_heldout=heldout, num_ood=heldout),
        cold_start=of_stage["cold_start"],
        sft=of_stage["sft"],
        rlvr=of_stage["rlvr"],
    )
    result = run_study(settings)
    typer.echo(as_markdown(result))
    for path in write_study(result, output):
        typer.echo(f"wrote {path}")


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Option("--model", help="Checkpoint directory.")],
    data: Annotated[list[Path], typer.Option("--data", help="Dataset JSON; repeatable, each a split.")],
    stage: Annotated[str, typer.Option(help="Names the results: STAGE_SPLIT.json.")] = "eval",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for the JSON results.")
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="dfew, mafw, ravdess or none, where file names do not tell; SPLIT=NAME for one split."
        ),
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """WAR, UAR, per-class recall and format rate of a checkpoint, by greedy decoding.

    Interrupted, it goes on where it was. A benchmark's test set (dfew_test.json, or --benchmark) has its label set, and
    its published figures stand beside the measured ones.
    """
    from omnigrpo.config import load_config
    from omnigrpo.evaluate.benchmarks import named_benchmarks
    from omnigrpo.run import run_evaluation

    short = _short(model, data[0], output or Path(), None)
    if len({path.stem for path in data}) < len(data):
        raise ValueError(
            f"a split is named after its file, and two of {[str(p) for p in data]} share a name: rename one"
        )
    splits = ", ".join(f"{json.dumps(path.stem)} = {_toml(path)}" for path in data)
    settings = load_config(config, [*(overrides or []), *short, f"data.evaluate={{{splits}}}"])
    named = named_benchmarks(benchmark or [], [path.stem for path in data])
    results = run_evaluation(settings, output=output, stage=stage, benchmarks=named)
    for split, result in results.items():
        typer.echo(f"{split}: {result.headline()}")
    if output is not None:
        from omnigrpo.report.evaluation_page import write_evaluation

        for path in write_evaluation(list(results.values()), output, stage):
            typer.echo(f"wrote {path}")


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    clips: Annotated[list[Path], typer.Argument(help="Clips; a directory stands for those below it.")],
    mode: Annotated[
        str, typer.Option(help="video, audio or video_audio: what the model is given.")
    ] = "video_audio",
    question: Annotated[str | None, typer.Option(help="Instead of R1-Omni's question.")] = None,
    gate_tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer of bert-base-uncased, which published checkpoints lack.")
    ] = None,
    vision_tower: Annotated[
        Path | None, typer.Option(help="SigLIP directory, for weights the file lacks.")
    ] = None,
    audio_tower: Annotated[
        Path | None, typer.Option(help="Whisper directory, for weights the file lacks.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per clip.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips answered together.")] = 8,
    aspect: Annotated[
        str, typer.Option(help="stretch (the reference's inference) or pad (its training).")
    ] = "stretch",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto is the file's.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Ask a checkpoint about clips: prints label and reasoning (exit status 1 when a clip cannot be used)."""
    from omnigrpo.generate import GenerateConfig, Generator, inference_media, parse_dtype
    from omnigrpo.generate_command import run_generate
    from omnigrpo.rollout.interface import SamplingParams

    settings = GenerateConfig(
        mode=mode,  # type: ignore[arg-type] - checked there
        sampling=SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens),
        samples=samples,
        batch_size=batch_size,
        **({} if question is None else {"question": question}),
    )
    opened = Generator.open(
        checkpoint,
        gate_tokenizer=gate_tokenizer,
        vision_tower=vision_tower,
        audio_tower=audio_tower,
        device=device,
        dtype=parse_dtype(dtype),
        media=inference_media(aspect),
    )
    with opened as generator:
        if not run_generate(generator, clips, settings, as_json=as_json):
            raise typer.Exit(1)


@app.command()
def encode(
    dataset: Annotated[Path, typer.Argument(help="Dataset JSON.")],
    model: ModelOption = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Directory to fill (sets media.cache_directory).")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Decode and encode a dataset's clips into a cache that runs with the same model and media settings then read.

    Goes on where it was interrupted: what the cache holds, whole, is skipped.
    """
    from omnigrpo.config import load_config
    from omnigrpo.encode_dataset import encode_dataset

    short = _short(model, dataset, Path(), None)
    directory = [] if cache is None else [f"media.cache_directory={_toml(cache)}"]
    for line in encode_dataset(load_config(config, [*(overrides or []), *short, *directory])).lines():
        typer.echo(line)


@app.command()
def attribute(
    model: Annotated[Path, typer.Option("--model", help="Checkpoint directory.")],
    data: Annotated[Path, typer.Option("--data", help="Dataset JSON; every item with video and audio.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for tables and pictures.")],
    baseline: Annotated[
        str, typer.Option(help="What stands in for a modality: swap (another clip's) or remove (nothing).")
    ] = "swap",
    seed: Annotated[int, typer.Option(help="Which clip stands in for which.")] = 0,
    limit: Annotated[int | None, typer.Option(min=2, help="Clips to take, drawn by the seed.")] = None,
    unfounded_below: Annotated[
        float, typer.Option(help="Nats per token that a claim must lose when what it cites is swapped.")
    ] = 0.05,
    visual_term: Annotated[
        list[str] | None,
        typer.Option(help="A word by which reasoning cites the video; dimple* stands for all that begin so."),
    ] = None,
    vocal_term: Annotated[
        list[str] | None, typer.Option(help="A word by which reasoning cites the audio.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """How much video and audio contribute to a model's answers: Shapley values, attention, unfounded claims.

    Writes attribution.json, attribution.md, values.png, attention.png and shapley.png.
    """
    from rich.console import Console

    from omnigrpo.attribute import attribute_dataset
    from omnigrpo.attribution.config import attribution_config
    from omnigrpo.config import load_config

    settings = load_config(config, [*(overrides or []), *_short(model, data, output, None)])
    attribution = attribution_config(
        baseline,
        seed=seed,
        unfounded_below=unfounded_below,
        visual_terms=visual_term or (),
        vocal_terms=vocal_term or (),
    )
    report = attribute_dataset(settings, attribution, output=output, limit=limit)
    console = Console()
    for table in report.figures():
        console.print(table.rich())
    typer.echo(f"{report.headline()}\nwrote {output}")


@app.command()
def probe(
    files: Annotated[list[Path], typer.Argument(help="Media files; a directory stands for those below it.")],
    frames: Annotated[int, typer.Option("--frames", "-k", min=1, help="Frames per clip.")] = 8,
    min_frames: Annotated[int, typer.Option(min=1, help="Frames that a clip must have.")] = 2,
    start: Annotated[float | None, typer.Option(help="Begin of the window, in seconds.")] = None,
    end: Annotated[float | None, typer.Option(help="End of the window, in seconds.")] = None,
    need: Annotated[
        list[str] | None,
        typer.Option(help="video or audio: what every file must have. Repeatable; default both."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds per file.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="PNG to write: the frames and the waveform of every file.")
    ] = None,
) -> None:
    """Say what files hold, which frames a run would take, and why it cannot use some (exit status 1).

    Every file is decoded as a run would do it, so that damage shows.
    """
    from omnigrpo.media.sampling import SamplingConfig
    from omnigrpo.probe import ProbeConfig, modalities, run_probe

    settings = ProbeConfig(
        sampling=SamplingConfig(num_frames=frames, min_frames=min_frames),
        needed=modalities(need or ["video", "audio"]),
        start_seconds=start,
        end_seconds=end,
        timeout_seconds=timeout,
        is_json=as_json,
        contact_sheet=contact_sheet,
    )
    if not run_probe(files, settings):
        raise typer.Exit(1)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Option("--model", help="Checkpoint directory that the run starts from.")],
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 30000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    media: Annotated[
        str, typer.Option(help="raw: takes clips, holds the towers. precomputed: takes ready-made rows.")
    ] = "raw",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto is the checkpoint's.")] = "auto",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices per copy of the decoder.")] = 1,
    max_total_tokens: Annotated[int | None, typer.Option(min=1, help="Rows of the KV cache.")] = None,
    memory_saver: Annotated[
        bool,
        typer.Option("--memory-saver", help="For rollout.release_memory (CUDA): weights wait on the host."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command instead.")] = False,
) -> None:
    """Start an SGLang server for rollout.engine=servers; what follows goes to sglang.launch_server as it is."""
    from omnigrpo.rollout import serve as servers

    settings = servers.ServeConfig(
        model=model,
        port=port,
        host=host,
        media=media,
        device=device,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        max_total_tokens=max_total_tokens,
        memory_saver=memory_saver,
        more=tuple(context.args),
    )
    if dry_run:
        typer.echo(servers.shown(*servers.serve_command(settings)))
    else:
        servers.serve(settings)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write RUN/report.html: one self-contained page."""
    from omnigrpo.report.page import write_report

    typer.echo(f"wrote {write_report(run)}")


@app.command()
def info() -> None:
    """Print versions, the device, and which kernels are active."""
    from omnigrpo.info import print_info

    print_info()


def main() -> None:
    """Run the command line; what the user can mend is one message on stderr and exit status 2."""
    debug = bool(os.environ.get("OMNIGRPO_TRACEBACK"))
    try:
        app()
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        if debug:
            raise
        print(f"error: {error}\n(OMNIGRPO_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)


def _short(model: Path | None, data: Path | None, output: Path | None, steps: int | None) -> list[str]:
    """The overrides that the short options stand for."""
    given = {"model.path": model, "data.train": data, "run.output": output}
    overrides = [f"{key}={_toml(path)}" for key, path in given.items() if path is not None]
    return overrides if steps is None else [*overrides, f"run.steps={steps}"]


def _toml(path: Path) -> str:
    """A path as a TOML literal string."""
    return f"'''{path}'''"
