"""A run folder in pandas: the cells, one of the tables, the answers, and the scores themselves.

probe recipe tiny-math
python examples/read_a_run.py runs/tiny-math
"""

import argparse
from pathlib import Path

import pandas as pd

import probe
from probe.metrics import metric_named

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("run", type=Path, nargs="?", default=Path("runs/tiny-math"))
run = probe.open_run(parser.parse_args().run)
where = ["benchmark", "pair", "alpha"]  # what tells one row of cells from another

cells = run.cells.to_pandas()
cells = cells[cells["control"] == ""]  # the change as it is; the rest are its controls
cells["shown"] = [
    "-" if change is None else f"{100 * change:+.1f}{'*' if significant else ' '}"
    for change, significant in zip(cells["change"], cells["significant"], strict=True)
]
cells["metric"] = [metric_named(name).label for name in cells["metric"]]
print("Change in percent, * where it is significant\n")
# Unlike pivot_table, this complains where two cells would land in one place.
table = cells.set_index([*where, "metric"])["shown"].unstack(sort=False).fillna("-")
print(f"{table.to_string()}\n")

tables = {
    extra.title: pd.DataFrame(extra.rows, columns=extra.columns) for extra in run.report.extras
}
for title, rows in tables.items():
    print(f"{title}: {len(rows)} rows of {', '.join(rows.columns[:5])}, ...")
if "Overlap of the circuits" in tables:
    rows = tables["Overlap of the circuits"].set_index(where)
    print(f"\nHow alike the circuits are\n\n{rows[['edges', 'ranks', 'nodes']].round(2)}")

print("\nAnswers\n")
by_model = run.problems.to_pandas().groupby(["name", "benchmark"])
print(by_model.agg(right=("correct", "mean"), tokens=("tokens", "mean")).round(3))

for path in sorted((run.path / "edges").glob("*.after.safetensors"))[:1]:
    edges = probe.EdgeScores.load(path).to_pandas()
    strength = edges["score"].abs().groupby([edges["source"], edges["target"]]).mean()
    print(f"\nStrongest edges of {path.name}\n")
    print(strength.nlargest(5).rename_axis(["from", "into"]).to_string())
