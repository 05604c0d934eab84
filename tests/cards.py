"""Method cards: their front matter, their code blocks, and the README's table of techniques made from them.

``python tests/cards.py --write`` puts the table into README.md; a test holds that it is up to date.
"""

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("callbacks", "strategies", "lightning_slm/nn")
CARDS = [card for folder in FOLDERS for card in sorted((ROOT / folder).glob("*.md"))]
SECTIONS = ("In a sentence", "Use it", "Choose", "Costs", "Differs from the reference", "Combines with", "Results")
BEGIN, END = "<!-- techniques: made by tests/cards.py -->", "<!-- end of techniques -->"


def front_matter(card: Path) -> dict[str, str]:
    """The keys technique, form, needs, status and paper of a card."""
    return yaml.safe_load(card.read_text().split("---\n")[1])


def sections(card: Path) -> dict[str, str]:
    """Heading -> text below it, for the second-level headings of a card."""
    parts = re.split(r"^## (.+)$", card.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def code_blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def table() -> str:
    """README's table: one row a card."""
    rows = ["| technique | one line | form | paper |", "|---|---|---|---|"]
    for card in CARDS:
        about = front_matter(card)
        sentence = sections(card)["In a sentence"].strip().split("\n\n")[0].replace("\n", " ")
        link = f"[{about['technique']}]({card.relative_to(ROOT)})"
        rows.append(f"| {link} | {sentence} | {about['form']} | {about['paper']} |")
    return "\n".join(rows)


def readme_with_table(readme: str) -> str:
    """``readme`` with the text between the two marks replaced by the table."""
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", f"{BEGIN}\n{table()}\n{END}", readme, flags=re.DOTALL)


if __name__ == "__main__" and "--write" in sys.argv:
    path = ROOT / "README.md"
    path.write_text(readme_with_table(path.read_text()))
