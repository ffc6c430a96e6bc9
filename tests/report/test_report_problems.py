"""The questions of a run, one by one: against the solutions and edges that they come from."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from probe.cli import main
from probe.problems import load_problems
from probe.report import _problem_panel as panel
from probe.report import build_report, compared_problems, open_run, render
from probe.report._problem_view import differences
from probe.report._problems import digest_of, question_edges
from probe.solutions import Solution

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NASTY = "</script><script>alert('x')</script><img src=//a.test onerror=\"alert(1)\">"
CELL = "sft-grpo.tiny-math.alpha-0.5"


@pytest.fixture
def answered(half_run):
    """A run of eight questions, of which five were scored, and each of them changed otherwise."""
    torch.manual_seed(3)
    problems = load_problems("tiny-math")[:8]
    path = half_run.edges_file(CELL, "after")
    edges = half_run.read_edges(path)
    factors = 0.2 + 2 * torch.rand(edges.scores.shape)
    losses = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    ids = [problem.id for problem in problems[:5]]
    half_run.write_edges(
        path, replace(edges, scores=edges.scores * factors, losses=losses), ids, ""
    )
    before = half_run.edges_file(CELL, "before")
    half_run.write_edges(before, half_run.read_edges(before), ids, "")
    for model, right in (("sft", "yyyyynny"), ("grpo", "yyyyynyn")):
        rows = [
            Solution(p.id, [1], [2, 3], mark == "y", f"{model} {NASTY} {p.id}", model, p.answer)
            for p, mark in zip(problems, right, strict=True)
        ]
        half_run.write_solutions(half_run.solutions_file(f"tiny-math--{model}", "tiny-math"), rows)
    for side, strongest in (("before", 1), ("after", 2)):
        rows = [
            {
                "id": name,
                "prompt": 1,
                "tokens": ["1", NASTY, " 3"],
                "scores": [0.5, 0.25, 0.25],
                "shares": [0.5 if place == strongest else 0.25 for place in range(3)],
            }
            for name in ids
        ]
        half_run.write_json(
            f"extras/sft-grpo.tiny-math.tokens-{side}.json", {"key": "", "questions": rows}
        )
    half_run.write_json(
        "questions.json", {"tiny-math": {p.id: digest_of(p.question) for p in problems[:7]}}
    )
    return half_run


def test_every_question_with_both_answers(answered):
    problems = load_problems("tiny-math")[:8]
    found = open_run(answered.path).compared
    order = [6, 7, 5, 0, 1, 2, 3, 4]
    assert [one.id for one in found] == [problems[place].id for place in order]
    assert [one.solved for one in found] == ["after", "before", "none", *["both"] * 5]
    flipped, lost = found[:2]
    assert (flipped.question, flipped.gold) == (problems[6].question, problems[6].answer)
    assert lost.question == ""  # nobody knows what was asked
    assert flipped.text_before == f"sft {NASTY} {problems[6].id}"
    assert (flipped.extracted_before, flipped.extracted_after) == ("sft", "grpo")
    assert (flipped.tokens_before, flipped.alpha, flipped.edges) == (2, None, ())
    scored = found[3]
    assert (scored.alpha, scored.loss_before, scored.loss_after) == (0.5, 1.0, 0.5)
    assert found.to_pandas()["solved"].tolist().count("both") == 5


def test_the_edges_and_shares_of_a_question_are_those_of_the_run(answered):
    before, after = answered.read_sides(CELL, "before", "after")
    report = build_report(answered.path)
    found = {one.id: one for one in compared_problems(report)}
    for place, name in enumerate(before.ids):
        sides = [side.scores[place].abs().double().numpy() for side in (before, after)]
        top = np.sort(np.abs(sides[1] - sides[0]), axis=None)[::-1][:8]
        assert [abs(e.after - e.before) for e in found[name].edges] == pytest.approx(list(top))
        for edge in found[name].edges:
            where = before.graph.sources.index(edge.source), before.graph.targets.index(edge.target)
            assert (edge.before, edge.after) == (sides[0][where], sides[1][where])
    for cell in report.cells:
        if cell.influence is None:  # nothing changed
            continue
        shares = {name: found[name].shares[cell.metric] for name in before.ids}
        assert sum(shares.values()) == pytest.approx(1)
        most = max(shares, key=shares.get)
        assert most == cell.influence.question
        assert shares[most] == pytest.approx(cell.influence.share)


def test_a_text_that_is_not_what_was_asked_is_not_shown(answered):
    table = answered.read_json("questions.json")
    name = load_problems("tiny-math")[6].id
    table["tiny-math"][name] = digest_of("another")
    answered.write_json("questions.json", table)
    (found,) = (one for one in open_run(answered.path).compared if one.id == name)
    assert found.question == ""


def test_matrices_in_the_page_are_those_of_the_run(answered):
    report = build_report(answered.path)
    data = panel.panel_data(report)
    scored = question_edges(report, report.recipe.pairs[0], "tiny-math")
    (pair,) = data["pairs"]
    assert pair["graph"]["sources"] == list(scored.graph.sources)
    mask = scored.graph.mask.numpy()
    rows = {row["id"]: row for row in pair["rows"]}
    for place, name in enumerate(scored.before.ids):
        sides = [s.scores[place].abs().numpy().T[mask.T] for s in (scored.before, scored.after)]
        largest = max(side.max() for side in sides)
        for side, packed in zip(sides, rows[name]["matrices"], strict=True):
            levels = np.frombuffer(base64.b64decode(packed), np.uint8).astype(float)
            powers = panel.DECADES * ((levels - 1) / 254 - 1)
            # A byte is a 254th of the decades.
            assert np.abs(np.log10(side / largest) - powers).max() < panel.DECADES / 254
    assert "matrices" not in pair["rows"][0]


def test_tokens_in_the_page_are_those_of_the_run(answered, monkeypatch):
    report = build_report(answered.path)
    rows = panel.panel_data(report)["pairs"][0]["rows"]
    assert "pieces" not in rows[0]
    (row,) = (row for row in rows if row["id"] == load_problems("tiny-math")[0].id)
    assert row["pieces"] == [["1", NASTY, " 3"]] * 2
    levels = [list(base64.b64decode(side)) for side in row["levels"]]
    assert levels == [[128, 255, 128], [128, 128, 255]]
    assert row["largest"] == 0.5
    monkeypatch.setattr(panel, "TOKEN_BUDGET", 300)
    rows = panel.panel_data(report)["pairs"][0]["rows"]
    assert sum("pieces" in row for row in rows) == 1
    assert sum(row.get("tokens_elsewhere", False) for row in rows) == 4


def test_a_question_that_is_not_here_is_said(answered):
    name = load_problems("tiny-math")[7].id
    listed = CliRunner().invoke(main, ["problems", str(answered.path)]).output
    assert "(not here) The text of the question is not here" in " ".join(listed.split())
    shown = CliRunner().invoke(main, ["problems", str(answered.path), name]).output
    assert "The text of the question is not here" in shown
    known = CliRunner().invoke(
        main, ["problems", str(answered.path), load_problems("tiny-math")[0].id]
    )
    assert "not here" not in known.output


def test_a_page_of_much_keeps_to_its_budgets(answered, monkeypatch):
    report = build_report(answered.path)
    monkeypatch.setattr(panel, "MATRIX_BUDGET", 100)
    monkeypatch.setattr(panel, "TEXT_BUDGET", 600)
    data = panel.panel_data(report)
    assert not any("matrices" in row for row in data["pairs"][0]["rows"])
    assert all(row["edges"] for row in data["pairs"][0]["rows"][3:])
    assert any(text.endswith("…") for text in data["texts"])
    assert sum(len(text.removesuffix("…")) for text in data["texts"]) <= 600


def test_what_differs_is_between_brackets():
    before, after = differences("26-26=-2#-2", "26-26=0#0 .")
    assert (before.plain, after.plain) == ("26-26=[-2]#[-2]", "26-26=[0]#[0 .]")
    assert [side.plain for side in differences("same", "same")] == ["same", "same"]
    assert [side.plain for side in differences("", "x")] == ["", "[x]"]


def test_the_command_lists_and_shows(answered):
    def said(*words):
        result = CliRunner().invoke(main, ["problems", str(answered.path), *words])
        return result.exit_code, result.output

    problems = load_problems("tiny-math")[:8]
    code, text = said()
    assert code == 0
    assert "1 solved only after, 1 solved only before, 1 solved by none, 5 solved by both" in (
        " ".join(text.split())
    )
    code, text = said(problems[0].id)
    assert code == 0
    assert "✓ right: grpo (2 tokens, loss 5.00e-1 nats a token)" in text
    assert "Its share of each change" in text
    assert "Tokens that carry most, before and after" in text
    code, text = said("no-such")
    assert code == 2
    assert text.strip().endswith(
        "no question 'no-such' that both models answered; see probe problems"
    )


def test_a_run_without_answers_is_one_line(half_run):
    result = CliRunner().invoke(main, ["problems", str(half_run.path)])
    assert result.exit_code == 2
    assert "no pair of this run has answers of both models yet" in result.output


LISTEN = """<script>
const seen = { errors: [], refused: [] };
addEventListener("error", (event) => seen.errors.push(String(event.message)), true);
addEventListener("securitypolicyviolation", (event) => seen.refused.push(event.blockedURI));
</script>"""
PLAY = r"""<script>{
const lines = () => [...document.querySelectorAll("#problem-list tbody tr")];
const ids = () => lines().map((line) => line.cells[0].textContent);
const put = (name, value, kind) => {
  const part = document.getElementById("problem-" + name);
  part.value = value;
  part.dispatchEvent(new Event(kind));
};
seen.all = ids();
seen.first = document.querySelector("#problem h3").textContent;
seen.marks = [...document.querySelectorAll("#problem mark")].map((mark) => mark.textContent);
put("solved", "1", "change");
seen.lost = ids();
put("solved", "", "change");
put("search", "nowhere", "input");
seen.nothing = ids();
put("search", "GRPO " + "</scr" + "ipt>", "input");
seen.found = ids().length;
lines()[3].click();
seen.opened = document.querySelector("#problem h3").textContent;
seen.canvases = [...document.querySelectorAll("#problem canvas")].map((c) => [c.width, c.height]);
seen.tokens = [...document.querySelectorAll("#problem .tokens")].map((text) => text.textContent);
seen.shares = [...document.querySelectorAll("#problem .tokens span")].map((part) => part.title);
seen.dark = [...document.querySelectorAll("#problem .tokens span")].map(
  (part) => getComputedStyle(part).backgroundColor.replace(/.*\/ |\)/g, ""));
seen.edges = document.querySelectorAll("#problem .answers table tbody tr").length;
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
}</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (in Debian: apt install chromium)")
def test_a_reader_of_problems_in_a_browser(answered, tmp_path):
    text = render(build_report(answered.path), "html")
    assert text.count("<script") == 4
    text = text.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{PLAY}</body>")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"),
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-500:]
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["errors"] == seen["refused"] == seen["nothing"] == []
    names = [problem.id for problem in load_problems("tiny-math")[:8]]
    assert seen["all"] == [names[place] for place in (6, 7, 5, 0, 1, 2, 3, 4)]
    assert seen["first"] == f"question {names[6]}: solved only after"
    assert seen["marks"] == ["sft", "grpo"]
    assert seen["lost"] == [names[7]]
    assert seen["found"] == 8
    assert seen["opened"] == f"question {names[0]}: solved by both"
    assert seen["canvases"] == [[9, 5], [9, 5]]
    assert seen["tokens"] == [f"1{NASTY} 3"] * 2
    assert seen["shares"][:2] == ["25.1 % at token 1", "50.0 % at token 2"]
    assert seen["dark"] == [*("0.25", "0.5", "0.25"), *("0.25", "0.25", "0.5")]
    assert seen["edges"] == 8 + 5  # and shares of metrics: the entropy of tokens did not change
