import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from probe.recipe import read_recipe
from probe.report import ExtraTable, build_report, explorer_data, read_strengths, render
from probe.report._layout import shared_tables

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NASTY = "</script><script>alert('x')</script><img src=//a.test onerror=\"alert(1)\"> & 'q'"


def nasty(half_run):
    """A run whose recipe tries to be markup, and in which some edges became weaker."""
    record = half_run.read_record()
    record["recipe"]["description"] = NASTY
    for pair in record["recipe"]["pairs"]:
        pair["method"] = NASTY
        pair["prompt"] = NASTY + "{question}"
        pair["before"] = NASTY
    record["versions"] = {"probe": NASTY}
    record["devices"] = [NASTY]
    half_run.write_json("run.json", record)
    path = half_run.edges_file("sft-grpo.tiny-math.alpha-0.5", "after")
    edges = half_run.read_edges(path)
    factor = torch.linspace(0.3, 2, edges.scores[0].numel()).reshape(edges.scores[0].shape)
    half_run.write_edges(path, replace(edges, scores=edges.scores * factor), list("abcde"), "key")
    extra = ExtraTable(NASTY, NASTY, (NASTY, "b"), ((NASTY, 0.5),))
    return replace(build_report(half_run.path), extras=(extra,))


def data_of(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    found = None
    text = ""

    def handle_starttag(self, tag, attributes):
        self.found = [*(self.found or []), (tag, dict(attributes))]

    def handle_data(self, data):
        self.text += data


def elements(text):
    parser = Elements()
    parser.feed(text)
    return parser


def test_what_comes_from_a_recipe_is_text(half_run):
    page = elements(render(nasty(half_run), "html"))
    tags = [tag for tag, _ in page.found]
    assert tags.count("script") == 2  # the data, and what draws it
    assert not {name for _, attributes in page.found for name in attributes if name[:2] == "on"}
    assert page.text.count(NASTY) > 10


def test_the_page_needs_nothing_else(half_run):
    text = render(nasty(half_run), "html")
    assert "default-src 'none'" in text
    links = [a.get(name) for _, a in elements(text).found for name in ("src", "href") if name in a]
    assert len(links) == 4  # the icon, three figures
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in text.replace("url(#colours)", "")
    assert "@import" not in text


def test_the_data_is_that_of_the_run(half_run):
    report = nasty(half_run)
    (strength,) = read_strengths(report)
    data = data_of(render(report, "html"))
    assert data == explorer_data([strength])
    (cell,), (graph,) = data["cells"], data["graphs"]
    for name in ("before", "after"):
        packed = np.frombuffer(base64.b64decode(cell[name]), "<f4")
        unpacked = np.zeros_like(getattr(strength, name))
        places = iter(packed)
        for target, count in enumerate(graph["reads"]):
            for source in range(count):
                unpacked[source, target] = next(places)
        assert next(places, None) is None
        assert unpacked == pytest.approx(getattr(strength, name), rel=1e-6)
    assert graph["sources"] == list(strength.graph.sources)


def test_the_recipe_on_the_page_runs(half_run, tmp_path):
    report = nasty(half_run)
    text = elements(render(report, "html")).text
    toml = text.split("recipe.toml\n")[-1].split('{"graphs"')[0]
    (tmp_path / "recipe.toml").write_text(toml)
    assert read_recipe(tmp_path / "recipe.toml") == report.recipe


def test_a_page_of_nothing(half_run):
    report = build_report(half_run.path)
    empty = render(replace(report, cells=()), "html")
    assert "<svg" not in empty
    assert "<h2>How it was made</h2>" in empty


def test_two_runs_on_one_page(half_run, tmp_path):
    """Their cells stand beside each other, as in Markdown, and every cell of both can be drawn."""
    other = shutil.copytree(half_run.path, tmp_path / "other <run>")
    reports = [build_report(half_run.path), build_report(other)]
    text = render(reports, "html")
    names = [half_run.path.name, "other <run>"]
    seen = elements(text).text
    assert f"{', '.join(names)}: side by side" in seen
    assert "other <run>" not in text
    for table in shared_tables(reports):
        assert table.title in seen
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    pairs = [
        f"{name}: {strength.title}"
        for name, r in zip(names, reports, strict=True)
        for strength in read_strengths(r)
    ]
    assert [cell["title"] for cell in data["cells"]] == pairs
    assert text.count("<summary>recipe.toml</summary>") == 2


def test_rows_stay_rows(half_run):
    """What lays out other parts of the page has no class that rows of tables have too."""
    report = build_report(half_run.path)
    cells = (*report.cells, *(replace(cell, alpha=0.7) for cell in report.cells))
    text = render(replace(report, cells=cells), "html")
    rows = [
        attributes.get("class") or "" for tag, attributes in elements(text).found if tag == "tr"
    ]
    names = {name for row in rows for name in row.split()}
    assert {"first", "faint"} <= names
    for name in names:
        assert not re.search(rf"(?<!\w)\.{name} {{[^}}]*display", text), name


# Listens before the page does anything, plays a reader, and leaves what it saw in the page.
LISTEN = """<script>
const seen = { errors: [], refused: [] };
addEventListener("error", (event) => seen.errors.push(String(event.message)), true);
addEventListener("securitypolicyviolation", (event) => seen.refused.push(event.blockedURI));
</script>"""
PLAY = """<script>{
const shown = () => Object.fromEntries(
  [...document.querySelectorAll("#edge dd")].map((part) => [part.dataset.value, part.textContent]));
const heatmap = document.getElementById("heatmap"), circuit = document.getElementById("circuit");
seen.first = shown();
const boxes = [...heatmap.querySelectorAll("rect.edge")];
seen.boxes = boxes.length;
const point = (box) => {
  const place = box.getBoundingClientRect();
  heatmap.dispatchEvent(new PointerEvent("pointermove", { bubbles: true,
    clientX: place.left + place.width / 2, clientY: place.top + place.height / 2 }));
  return shown();
};
seen.boxed = boxes.map(point);
const key = (name) => {
  heatmap.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
  return shown();
};
point(boxes[0]);
seen.keys = ["ArrowUp", "ArrowRight", "ArrowDown", "ArrowLeft"].map(key);
seen.arcs = circuit.querySelectorAll(".arc").length;
const slider = document.getElementById("count");
slider.value = 5;
slider.dispatchEvent(new Event("input"));
const arcs = [...circuit.querySelectorAll(".hit")];
seen.fewer = arcs.length;
seen.arc = arcs.map((arc) => {
  arc.dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
  return shown();
});
seen.shares = document.getElementById("shares").hidden;
seen.sides = [...circuit.querySelectorAll(".arc")].map((arc) => arc.getAttribute("class"));
const colour = document.getElementById("colour");
for (const option of colour.options) {
  colour.value = option.value;
  colour.dispatchEvent(new Event("change"));
  const fills = [...heatmap.querySelectorAll("rect.edge")].map((box) => box.getAttribute("fill"));
  seen["fills " + option.value] = [fills.length, new Set(fills).size];
}
seen.resources = performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 40));
seen.title = document.getElementById("which").textContent;
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
}</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (in Debian: apt install chromium)")
def test_a_reader_in_a_browser(half_run, tmp_path):
    report = nasty(half_run)
    text = render(report, "html")
    text = text.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{PLAY}</body>")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--window-size=1280,2000", "--virtual-time-budget=5000"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"),
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-500:]
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["errors"] == []
    assert seen["refused"] == []
    assert [name for name in seen["resources"] if not name.startswith("data:")] == []

    (strength,) = read_strengths(report)
    ranked = strength.largest(1000)
    assert seen["boxes"] == len(ranked) == len(seen["boxed"])
    named = {(edge.source, edge.target): (edge, rank) for rank, edge in enumerate(ranked)}
    for values in seen["boxed"]:
        edge, rank = named.pop((values["source"], values["target"]))
        assert float(values["before"].split()[0]) == pytest.approx(edge.before, rel=0.006)
        assert float(values["after"].split()[0]) == pytest.approx(edge.after, rel=0.006)
        change = float(values["change"].split()[0])
        assert change == pytest.approx(100 * (edge.after / edge.before - 1), abs=0.06)
        assert values["rank"].startswith(f"{rank + 1} of {len(ranked)} ")
        before, after = map(int, re.search(r"(\d+) before, (\d+) after", values["rank"]).groups())
        rows, columns = strength.graph.sources, strength.graph.targets
        where = rows.index(edge.source), columns.index(edge.target)
        assert before - after == strength.rank_change[where]
    assert not named  # every edge could be pointed at
    assert seen["first"]["rank"].startswith("1 of")
    assert [(v["source"], v["target"]) for v in seen["keys"]] == [
        ("input", "a0.q"),  # nothing is above
        ("input", "a0.k"),
        ("input", "a0.k"),
        ("input", "a0.q"),
    ]
    assert seen["arcs"] == min(40, len(ranked))
    assert seen["fewer"] == 5
    shown = strength.shares if strength.one_way(5) else strength
    assert seen["shares"] == (not strength.one_way(5))
    for edge, values, side in zip(shown.largest(5)[::-1], seen["arc"], seen["sides"], strict=True):
        assert (values["source"], values["target"]) == (edge.source, edge.target)
        assert ("stronger" in side) == (edge.after > edge.before)
    assert len(seen["sides"]) == 5
    for name in ("change", "rank", "before", "after"):
        count, colours = seen[f"fills {name}"]
        assert count == len(ranked)
        assert colours > 5
    assert seen["title"] == "sft-grpo on tiny-math, alpha 0.5"
