"""The bar that both programs show."""

import io

from rich.console import Console
from rich.progress import TextColumn

from programs.progress import progress_bar


def shown(console, **options):
    with progress_bar(console, TextColumn("behind"), before=[TextColumn("before")], **options) as progress:
        progress.update(progress.add_task("", total=7), advance=3)


def test_a_bar_shows_its_columns_in_their_order():
    output = io.StringIO()
    shown(Console(file=output, width=80))
    text = output.getvalue()
    assert text.index("before") < text.index("3/7") < text.index("behind")


def test_no_console_no_bar(capsys):
    shown(None)
    assert capsys.readouterr() == ("", "")
