"""Count what the tests of a run did, and say what was skipped and why.

    python .ci/skipped.py first.xml second.xml    # JUnit files, as pytest --junitxml writes them

Ends with 1 where the files hold no test that ran.
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def main(paths: list[str]) -> int:
    """Print the counts of all files together, and each reason for a skip with its number."""
    ran, failed, reasons = 0, 0, Counter()
    for path in paths:
        for case in ElementTree.parse(Path(path)).iter("testcase"):
            skipped = case.find("skipped")
            if skipped is not None:
                reasons[skipped.get("message") or "no reason given"] += 1
            elif case.find("failure") is not None or case.find("error") is not None:
                failed += 1
            else:
                ran += 1
    for reason, number in reasons.most_common():
        print(f"skipped {number:>4}: {reason}")
    print(f"{ran} passed, {failed} failed, {sum(reasons.values())} skipped")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
