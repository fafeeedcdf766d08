"""The README's code: ``python -m tests.readme`` prints it."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def snippets() -> list[str]:
    """The Python code of each block, in order; a later one uses the names of those before it."""
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    print("\n".join(snippets()))
