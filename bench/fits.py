"""The table of docs/running.md: which model fits on how many cards of which size, by `plan.step`.

python bench/fits.py
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import TOFU_LENGTHS, Config, Plan  # noqa: E402
from plan import CARDS, SHAPES, WAYS, fitting, groups_asked  # noqa: E402

MODELS = "llama3.2-1b", "llama2-7b", "llama3.1-8b", "llama2-13b", "llama2-70b"


def table() -> str:
    """Markdown: the largest micro-batch of the paper's setting on so many cards of each size, by the first way that fits."""
    lines = ["| model | cards | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "| --- " * (2 + len(CARDS)) + "|"]
    for name, world in itertools.product(MODELS, (1, 2, 8, 64)):
        groups, cells = groups_asked(Config(), Plan(world, *TOFU_LENGTHS)), []
        for card in CARDS:
            found = ((fitting(SHAPES[name], Config(), groups, way, card, world), way) for way in WAYS)
            cells.append(next((f"{size} {way}".strip() for size, way in found if size), "-"))
        lines.append(f"| {name} | {world} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
