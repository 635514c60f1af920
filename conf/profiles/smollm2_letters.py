"""Writes smollm2_sums.jsonl and smollm2_differences.jsonl beside itself: arithmetic of two-digit numbers with four options.

The options are sentences: a model that is asked for the letter alone and goes on to write the option is not done in time."""

import json
import random
from pathlib import Path

COUNT, OPTIONS, NEAR = 280, 4, 9


def rows(sign: int, draw: random.Random) -> dict[str, dict[str, object]]:
    """``COUNT`` different questions, whose wrong options are near the right one."""
    made: dict[str, dict[str, object]] = {}
    while len(made) < COUNT:
        a, b = draw.randint(10, 45), draw.randint(10, 45)
        right = a + sign * b
        if right < 10:
            continue
        wrong = [value for value in range(right - NEAR, right + NEAR + 1) if value >= 10 and value != right]
        options = sorted([right, *draw.sample(wrong, OPTIONS - 1)])
        question = f"How much is {a} {'+' if sign > 0 else '-'} {b}?"
        said = [f"Together they have {value} of them, no more and no less." for value in options]
        made[question] = {"question": question, "options": said, "answer": options.index(right)}
    return made


for number, (name, sign) in enumerate({"sums": 1, "differences": -1}.items()):
    lines = [json.dumps(row) + "\n" for row in rows(sign, random.Random(number)).values()]
    Path(__file__).with_name(f"smollm2_{name}.jsonl").write_text("".join(lines), encoding="utf-8")
