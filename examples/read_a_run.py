"""A run folder in pandas: the cells, one of the tables, the answers, and the scores themselves.

probe recipe tiny-math
python examples/read_a_run.py runs/tiny-math
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from probe.run_folder import RunFolder

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("run", type=Path, nargs="?", default=Path("runs/tiny-math"))
run = parser.parse_args().run
report = json.loads((run / "report.json").read_text())

cells = pd.DataFrame(report["cells"])
cells["shown"] = [
    "-" if change is None else f"{100 * change:+.1f}{'*' if significant else ' '}"
    for change, significant in zip(cells["change"], cells["significant"], strict=True)
]
cells["metric"] = cells["metric"].str.split("_").str[-1]  # short enough for a terminal
print("Change in percent, * where it is significant\n")
table = cells.pivot_table("shown", ["pair", "alpha"], "metric", aggfunc="first", sort=False)
print(f"{table.to_string()}\n")

tables = {
    extra["title"]: pd.DataFrame(extra["rows"], columns=extra["columns"])
    for extra in report["extras"]
}
for title, rows in tables.items():
    print(f"{title}: {len(rows)} rows of {', '.join(rows.columns[:5])}, ...")
if "Overlap of the circuits" in tables:
    rows = tables["Overlap of the circuits"].set_index(["pair", "alpha"])
    print(f"\nHow alike the circuits are\n\n{rows[['edges', 'ranks', 'nodes']].round(2)}")

print("\nAnswers\n")
answers = pd.concat(
    pd.read_json(path, lines=True, dtype=False).assign(model=path.name.split(".")[0])
    for path in sorted((run / "solutions").glob("*.jsonl"))
)
answers["tokens"] = answers["answer"].map(len)
print(answers.groupby("model").agg(right=("correct", "mean"), tokens=("tokens", "mean")).round(3))

path = sorted((run / "edges").glob("*.after.safetensors"))[0]
edges = RunFolder(run).read_edges(path)
strength = pd.DataFrame(
    edges.scores.abs().mean(0).numpy(), edges.graph.sources, edges.graph.targets
)
print(f"\nStrongest edges of {path.name}\n")
print(strength.stack().nlargest(5).rename_axis(["from", "into"]).to_string())
