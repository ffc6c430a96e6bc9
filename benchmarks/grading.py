"""How often answers are judged right, and how fast: by probe, and by math-verify alone.

    python benchmarks/grading.py [--file tests/data/grading.jsonl] [--only probe] [--wrong]

Each line of the file is a pair: a gold answer, the end of a solution, and whether it is right, as
judged by hand, or as it follows from how the pair was made (a number changed by one is wrong).
`math-verify` finds the answer in the solution by itself, as its documentation shows. Seconds are
those of one process, after a first pair has loaded everything.
"""

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from probe.grading import Grader, extract_answer

DATA = Path(__file__).parents[1] / "tests" / "data" / "grading.jsonl"

Judge = Callable[[str, str], bool]


def probe_judge() -> Judge:
    """The way of this package, in its process with limits."""
    grader = Grader()
    return lambda gold, text: grader.grade(gold, extract_answer(text))


def math_verify_judge() -> Judge:
    """math-verify alone."""
    from math_verify import parse, verify

    def judge(gold: str, text: str) -> bool:
        wrapped = gold if "$" in gold else f"${gold}$"
        return bool(verify(parse(wrapped), parse(text)))

    return judge


JUDGES: dict[str, Callable[[], Judge]] = {
    "probe": probe_judge,
    "math-verify": math_verify_judge,
}


def main() -> None:
    """Print a line for each judge, and one for each kind of pair."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--file", type=Path, default=DATA)
    parser.add_argument("--only", choices=JUDGES)
    parser.add_argument("--wrong", action="store_true", help="print the pairs judged wrong")
    options = parser.parse_args()
    pairs = [json.loads(line) for line in options.file.read_text().splitlines()]
    kinds = Counter(pair["kind"] for pair in pairs)
    print(f"{len(pairs)} pairs; {platform.processor() or platform.machine()}")
    for name, make in JUDGES.items():
        if options.only not in (None, name):
            continue
        judge = make()
        judge("1", "The answer is $1.0$.")
        agreed: Counter[str] = Counter()
        start = time.perf_counter()
        for pair in pairs:
            try:
                judged = judge(pair["gold"], pair["answer"])
            except Exception as error:  # a judge that fails has not judged it right
                judged = not pair["right"]
                print(f"  {name} fails: {error!r:.80}" if options.wrong else "", end="")
            agreed[pair["kind"]] += judged is pair["right"]
            if options.wrong and judged is not pair["right"]:
                print(f"  {pair['kind']}: {pair['gold']!r} {pair['answer']!r} judged {judged}")
        seconds = (time.perf_counter() - start) * 1000 / len(pairs)
        share = 100 * sum(agreed.values()) / len(pairs)
        print(f"{name}: {share:.1f} % judged as by hand, {seconds:.1f} s per 1,000")
        print("  " + ", ".join(f"{kind} {agreed[kind]}/{n}" for kind, n in sorted(kinds.items())))


if __name__ == "__main__":
    main()
