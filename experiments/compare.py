"""Are the numbers of two runs of the experiments the same within their spread over seeds? Reads the tables, cell by cell.

python experiments/all.py --scale toy --results again && python experiments/compare.py experiments/results/toy again/toy

A cell "mean ± standard deviation" agrees with the other's if the means differ by no more than the larger of the two
deviations, or than 0.05. Numbers without a spread are of one seed, or nearly zero: they agree if they are equal or both
below 0.05, and are counted apart, since nothing tells how far they may lie from each other. Exit status 1 where a number
with a spread does not agree.
"""

import re
import sys
from pathlib import Path

NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)(?: ± (\d+\.\d+))?")
LEAST = 0.05


def cells(table: str) -> dict[tuple[int, str, str], str]:
    """{(number of the table, row, column): text} of the tables in a Markdown text."""
    found, head, number = {}, None, 0
    for line in [*table.splitlines(), ""]:
        row = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|"):
            number, head = number + (head is not None), None
        elif head is None:
            head = row
        elif row[0] != "---":
            found |= {(number, row[0], column): text for column, text in zip(head[1:], row[1:], strict=False)}
    return found


def compare(ours: str, theirs: str) -> tuple[list[bool], list[bool]]:
    """(whether each number with a spread agrees, whether each other cell does) of two cells of the same place."""
    parts = [text.split(" / ") for text in (ours, theirs)]
    numbers = [[NUMBER.fullmatch(part.strip()) for part in found] for found in parts]
    if len(parts[0]) != len(parts[1]) or not all(all(found) for found in numbers):
        return [], [ours == theirs]
    spread, other = [], []
    for a, b in zip(*numbers, strict=True):
        difference = abs(float(a[1]) - float(b[1]))
        if a[2] or b[2]:
            spread.append(difference <= max(float(a[2] or 0), float(b[2] or 0), LEAST))
        else:
            other.append(difference == 0 or max(abs(float(a[1])), abs(float(b[1]))) < LEAST)
    return spread, other


def main(first: Path, second: Path) -> int:
    status = 0
    names = sorted(path.name for path in first.glob("*.md"))
    if not names:
        print(f"error: {first}: holds no tables (*.md); run an experiment first", file=sys.stderr)
        return 2
    for name in names:
        if not (second / name).exists():
            print(f"error: {second / name}: no such file; run that experiment there first", file=sys.stderr)
            return 2
        tables = [cells((folder / name).read_text(encoding="utf-8")) for folder in (first, second)]
        spread, other, lines = [], [], []
        for place in tables[0] | tables[1]:
            found = [table.get(place, "missing") for table in tables]
            a, b = ([False], []) if "missing" in found else compare(*found)
            spread, other = spread + a, other + b
            if not all(a):
                lines.append(f"    {place[1]}, {place[2]}: {found[0]}, now {found[1]}")
        print(
            f"{name}: {sum(spread)} of {len(spread)} numbers with a spread agree, {sum(other)} of {len(other)} other cells"
        )
        print("".join(f"{line}\n" for line in lines), end="")
        status = max(status, int(not all(spread)))
    return status


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*map(Path, sys.argv[1:])))
