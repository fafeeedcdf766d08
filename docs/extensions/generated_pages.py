"""Pages that are made of what lies elsewhere in the checkout, written to ``docs/generated`` before Sphinx reads its sources.

These are the ``--help`` of the command lines, and Markdown files outside of ``docs``: reports of results, the account of the
kernels. Links between Markdown files are those that a reader of the checkout follows; here they lead to the pages.
"""

import importlib
import os
import re
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = DOCS / "generated"
EXAMPLES = DOCS / "auto_examples"
PROGRAMS = ("experiments", "bench")
HELP_WIDTH = 100
# Of the pictures that experiments write beside their reports. Numbers are those of the paper's figures.
CAPTIONS = {
    "correlations": "The correlation of three marked pixels with all others, under the structured model.",
    "covariances": "Covariances of test signals: the truth, and what the networks predict.",
    "coverage": "How often test signals lie within the ellipsoids of each level: the thin line is right.",
    "figure1": "Test images, the base model's mean, the mean with a sample of each residual, and the residuals.",
    "figure7": "More images and base models: the image, the mean, the mean with a sample of each residual, the residuals.",
    "figure8": "Images from codes that are drawn from the prior.",
    "figure9": "From an image to its mirror image in seven steps of the code, with one sample of the residual.",
    "figure10": "Standard deviations of both models of the residual, and a sample of each.",
    "figure11": "Noisy images, and what each method makes of them.",
    "inpainting": "Half a face, a block, and 90 % of the pixels missing: the VAE's, the conditional mean, samples.",
    "noises": "The same for one image under each noise.",
    "reconstructions": "Test signals, and samples around their means from the true covariance and from the networks.",
    "samples": "Samples beside what they are compared with, by row and column.",
    "training": "Training losses, lower is better.",
    "validation": "Base models: the loss of training images in each pass, and that of images which no network sees after it.",
    "whitened": "Quantiles of whitened residuals of test images against those of the normal distribution.",
}


def outside_pages() -> dict[Path, Path]:
    """The Markdown files outside of ``docs`` that are pages, each with its page."""
    pages = {
        ROOT / "CONTRIBUTING.md": GENERATED / "contributing.md",
        ROOT / "CHANGELOG.md": GENERATED / "changes.md",
        ROOT / "kernels" / "README.md": GENERATED / "kernels.md",
        ROOT / "kernels" / "generated_solve.md": GENERATED / "generated_solve.md",
    }
    for program in PROGRAMS:
        for source in sorted((ROOT / program / "results").glob("*/*.md")):
            pages[source] = GENERATED / f"{program}_{source.parent.name}.md"
    return pages


def pages_of_scripts() -> dict[Path, Path]:
    """The scripts of the gallery, and its head, each with the page that sphinx-gallery makes of it."""
    scripts = {script: EXAMPLES / f"{script.stem}.rst" for script in (DOCS / "gallery").glob("*.py")}
    return {DOCS / "gallery" / "GALLERY_HEADER.rst": EXAMPLES / "index.rst", **scripts}


def with_links_of_pages(text: str, source: Path, page: Path) -> str:
    """The text of ``source``, its relative links as they must be in ``page``."""
    pages = {**outside_pages(), **pages_of_scripts()}

    def moved(link: re.Match) -> str:
        target, _, heading = link.group(1).partition("#")
        if not target or "://" in target:
            return link.group()
        path = (source.parent / target).resolve()
        relative = os.path.relpath(pages.get(path, path), page.parent)
        return f"]({relative}{'#' if heading else ''}{heading})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, text)


def figures_of(source: Path) -> str:
    """The Markdown of the pictures beside a report that the report itself does not show."""
    report = source.read_text(encoding="utf-8")
    pictures = [picture for picture in sorted(source.parent.glob("*.png")) if f"({picture.name})" not in report]
    shown = "\n\n".join("[![{0}]({1})]({1})\n\n*{0}*".format(CAPTIONS[picture.stem], picture.name) for picture in pictures)
    return f"\n## Figures\n\nEach leads to the file, at its full size.\n\n{shown}\n" if pictures else ""


def helps(program: str) -> dict[str, str]:
    """What a program and each of its commands print with ``--help``, by what is typed."""
    app = importlib.import_module(f"{program}.__main__").app
    name = f"python -m {program}"
    environment = {"COLUMNS": str(HELP_WIDTH), "NO_COLOR": "1", "TERM": "dumb", "BANDED_GMRF_DATA": None}
    texts = {}
    for words in [[], *([command] for command in get_command(app).commands)]:
        shown = CliRunner().invoke(app, [*words, "--help"], prog_name=name, env=environment)
        if shown.exit_code:
            raise RuntimeError(f"{name} {' '.join(words)} --help ended with {shown.exit_code}: {shown.output}")
        texts[" ".join([name, *words])] = "\n".join(line.rstrip() for line in shown.output.strip().splitlines())
    return texts


def command_line_page(program: str) -> str:
    """The Markdown of a program's page."""
    sections = [f"## `{command}`\n\n```text\n{text}\n```\n" for command, text in helps(program).items()]
    return "\n".join([f"# `python -m {program}`\n", *sections])


def write_pages(app) -> None:
    """Write what has changed, so that Sphinx reads no page again for nothing."""
    texts = {GENERATED / f"command_{program}.md": command_line_page(program) for program in PROGRAMS}
    for source, page in outside_pages().items():
        report = source.read_text(encoding="utf-8") + (figures_of(source) if source.parent.parent.name == "results" else "")
        texts[page] = with_links_of_pages(report, source, page)
    GENERATED.mkdir(exist_ok=True)
    for page, text in texts.items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def link_to_pages(app, docname: str, content: list[str]) -> None:
    """The same for the links of the pages that lie in ``docs``."""
    page = DOCS / f"{docname}.md"
    if page.exists() and page.parent != GENERATED:
        content[0] = with_links_of_pages(content[0], page, page)


def setup(app):
    app.connect("builder-inited", write_pages)
    app.connect("source-read", link_to_pages)
    return {"parallel_read_safe": True}
