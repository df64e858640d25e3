"""README and docs/, and the commands in them."""

import shlex

from tests.support.places import ROOT

README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES["README.md"] = README
STARTS = ("    python ", "    make ", "    torchrun ")
LINES = [line.strip() for page in PAGES.values() for line in page.splitlines() if line.startswith(STARTS)]


def words(command: str) -> list[str]:
    """Return a command's words without the explanation that three blanks set off."""
    return shlex.split(command.split("   ")[0])


COMMANDS = list({" ".join(words(line)): line for line in LINES}.values())  # each once, wherever it stands
