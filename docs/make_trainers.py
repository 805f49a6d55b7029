"""Write the table of trainers in docs/trainers.md, from runs of the cases of tests/trainer_cases.py.

python docs/make_trainers.py
"""

import sys
import tempfile
from pathlib import Path


PAGE = Path(__file__).parent / "trainers.md"
BEGIN, END = "<!-- Written by docs/make_trainers.py. -->", "<!-- Written until here. -->"


def table() -> str:
    """Run every trainer for two steps."""
    from trainer_cases import CASES, outcome

    lines = ["| trainer | with task types and a term |", "|---|---|"]
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(f"| `{name}` | {outcome(name, Path(folder))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} lacks the lines {BEGIN!r} and {END!r}, between which the table belongs.")
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")
    print(f"wrote {PAGE}")
