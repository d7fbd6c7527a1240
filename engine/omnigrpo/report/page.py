"""``omnigrpo report RUN``: one HTML file that holds everything and loads nothing."""

from html import escape
from pathlib import Path

from omnigrpo.report.header import header
from omnigrpo.report.inputs import RunData, load_run
from omnigrpo.report.results import confusion_section, recalls_section, results_section
from omnigrpo.report.samples import dropped_section, rollouts_section
from omnigrpo.report.style import STYLE
from omnigrpo.report.training import curves_section, time_section

REPORT_FILE = "report.html"


def write_report(run_directory: Path) -> Path:
    """Write RUN/report.html and return its path; raises ValueError when the directory is no run."""
    path = run_directory / REPORT_FILE
    page = render(load_run(run_directory))
    path.write_text(page, encoding="utf-8")
    return path


def render(run: RunData) -> str:
    """The whole page; sections without data say what is missing."""
    sections = (
        results_section(run),
        curves_section(run),
        confusion_section(run),
        recalls_section(run),
        time_section(run),
        rollouts_section(run),
        dropped_section(run),
    )
    title = f"{run.directory.resolve().name}: omnigrpo report"
    return document(title, f"{header(run)}{''.join(sections)}")


def document(title: str, body: str) -> str:
    """A self-contained page around HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
