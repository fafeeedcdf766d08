"""One HTML page of a finished run: its report, its figures, and how it was run, in one file that needs no other."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from programs.files import write_text

from .results import where_text

PAGE = "index.html"

# Of a figure's own width: below it, its letters are too small to read, and a narrow window scrolls.
_LEAST_WIDTH = 0.38

_STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.55 system-ui, sans-serif; }
body { color: #222; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.25; }
.table, .picture { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; }
th, td { padding: 0.3rem 0.55rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
figure { margin: 2rem 0; }
img { max-width: 100%; height: auto; }
figcaption, dl { color: #555; font-size: 0.9rem; }
dt { font-weight: 600; }
dd { margin: 0 0 0.5rem; overflow-wrap: anywhere; }
"""


def write_page(folder: Path, results: dict[str, Any], report: str, captions: Mapping[str, str]) -> Path:
    """Write the page of a run into its folder; return its path.

    Args:
        folder: the run's folder, which holds the figures.
        results: what results.json holds, with its `environment` and ``seconds``.
        report: what results.md holds; its first line is the title. HTML in it is shown as text.
        captions: of each figure to show, by the name of its PNG file, in their order.

    Raises:
        FileNotFoundError: a figure is not there; nothing is written.
    """
    title = report.partition("\n")[0].removeprefix("# ")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(report)
    # A table wider than a narrow window scrolls by itself.
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    figures = "".join(_figure(folder / name, caption) for name, caption in captions.items())
    facts = {"Command": results["command"], "Machine": where_text(results), "Time": f"{results['seconds']} s"}
    # Older results do not name the commit.
    if results.get("commit"):
        facts["Commit"] = str(results["commit"])
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>\n" for name, value in facts.items())
    path = folder / PAGE
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{body}{figures}<h2>How it was run</h2>\n<dl>\n{listed}</dl>\n</body>\n</html>\n",
    )
    return path


def _figure(path: Path, caption: str) -> str:
    data, text = path.read_bytes(), escape(caption)
    least = round(_LEAST_WIDTH * int.from_bytes(data[16:20]))  # where a PNG file has its width
    image = f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="{text}" style="min-width: {least}px">'
    return f'<figure><div class="picture">{image}</div><figcaption>{text}</figcaption></figure>\n'
