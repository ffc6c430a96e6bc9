import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import probe
from probe.errors import ProbeError


def solutions(lengths, correct=None, prompts=None):
    correct = correct or [True] * len(lengths)
    prompts = prompts or [3] * len(lengths)
    return [
        probe.Solution(str(i), [1] * p, [2] * n, c)
        for i, (n, c, p) in enumerate(zip(lengths, correct, prompts, strict=True))
    ]


def test_the_published_selection(oracle):
    rows = [json.loads(line) for line in (oracle / "all_correct.jsonl").read_text().splitlines()]
    before, after = (
        [
            probe.Solution(
                row["idx"], row[f"{side}_prompt_tokens"], row[f"{side}_answer_tokens"], True
            )
            for row in rows
        ]
        for side in ("base", "rl")
    )
    meta = json.loads((oracle / "meta.json").read_text())
    options = meta["selection"]
    found = probe.select(
        before,
        after,
        alpha=options["alpha"],
        beta=options["beta"],
        gamma=options["gamma"],
        delta=options["delta"],
        samples=options["num_samples"],
        seed=options["seed"],
        convention="code",
    )
    assert list(found.ids) == meta["selected_idx"]
    assert found.reference_length == meta["refer"]
    assert found.cut_length == meta["cut_len"]
    assert (found.minimum_length, found.maximum_length) == (
        meta["min_total_len"],
        meta["max_total_len"],
    )
    # Each row says which branch it is for; the draw of 12 keeps all that pass.
    everything = probe.select(before, after, alpha=0.5, samples=100)
    dropped = {
        row["idx"] for row in rows if "dropped" in row["why"] and "only if" not in row["why"]
    }
    assert set(everything.ids) == {row["idx"] for row in rows} - dropped


def by_hand(before, after, alpha, beta, gamma, delta, convention):
    """The rules of method.md with exact fractions: ids kept, reference length, cut length."""
    alpha, beta, gamma, delta = (Fraction(x) for x in (alpha, beta, gamma, delta))
    both = [(b, a) for b, a in zip(before, after, strict=True) if b.correct and a.correct]
    lengths = [(len(b.answer), len(a.answer)) for b, a in both]
    means = [Fraction(sum(side), len(both)) for side in zip(*lengths, strict=True)]
    kept = []
    if convention == "paper":
        reference = sum(means) / 2
        for (b, _), (tb, ta) in zip(both, lengths, strict=True):
            inside = all(beta * reference <= t <= gamma * reference for t in (tb, ta))
            if inside and Fraction(abs(tb - ta)) / Fraction(tb + ta, 2) < delta:
                kept.append(b.id)
    else:
        reference = min(means)
        low, high = int(beta * reference), int(gamma * reference)
        for (b, a), (tb, ta) in zip(both, lengths, strict=True):
            if len(b.prompt) != len(a.prompt) or not low <= Fraction(tb + ta, 2) <= high:
                continue
            if Fraction(abs(tb - ta)) / Fraction(tb + ta, 2) <= delta:
                kept.append(b.id)
    return kept, reference, max(int(alpha * reference), 1)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(1, 2)),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from(["code", "paper"]),
    st.sampled_from([0.03125, 0.125, 0.25, 0.5]),
    st.sampled_from([0.25, 0.5]),
)
def test_both_conventions_by_hand(rows, convention, alpha, delta):
    before = solutions([r[0] for r in rows], [r[2] for r in rows])
    after = solutions([r[1] for r in rows], prompts=[2 + r[3] for r in rows])
    options = {"alpha": alpha, "beta": 0.5, "gamma": 1.5, "delta": delta, "convention": convention}
    if not any(r[2] for r in rows):
        with pytest.raises(ProbeError, match="no question that both models solve"):
            probe.select(before, after, **options)
        return
    kept, reference, cut = by_hand(before, after, **options)
    # Means of integers may round where a bound is met exactly; such draws prove nothing.
    if any(float(reference * f) != reference * f for f in (Fraction(1, 2), Fraction(3, 2))):
        return
    if not kept:
        unequal = all(r[3] != 1 for r in rows if r[2]) and convention == "code"
        message = "prompts differ in length" if unequal else "use more questions"
        with pytest.raises(ProbeError, match=message):
            probe.select(before, after, **options)
        return
    found = probe.select(before, after, **options)
    assert sorted(found.ids) == sorted(kept)
    assert found.reference_length == float(reference)
    assert found.cut_length == cut


def test_the_draw_has_a_seed_and_a_size():
    side = solutions([10] * 30)
    first = probe.select(side, side, samples=5)
    assert first == probe.select(side, side, samples=5)
    assert len(first.ids) == 5
    assert first.ids != probe.select(side, side, samples=5, seed=1).ids
    assert set(probe.select(side, side, samples=100).ids) == {s.id for s in side}


def test_at_least_one_token_is_scored():
    side = solutions([10] * 3)
    assert probe.select(side, side, alpha=0.03).cut_length == 1


def test_the_conventions_differ_where_they_should():
    # One pair with a difference of exactly delta, one with longer answers after.
    before, after = solutions([15, 20]), solutions([25, 20])
    assert len(probe.select(before, after, convention="code").ids) == 2
    assert probe.select(before, after, convention="paper").ids == ("1",)
    assert probe.select(before, after, convention="code").reference_length == 17.5
    assert probe.select(before, after, convention="paper").reference_length == 20


def test_errors():
    right, wrong = solutions([5, 5]), solutions([5, 5], [False, False])
    with pytest.raises(ProbeError, match=r"before 2, after 0 of 2 right"):
        probe.select(right, wrong)
    with pytest.raises(ProbeError, match="not of the same questions"):
        probe.select(right, right[:1])
    with pytest.raises(ProbeError, match="not of the same questions"):
        probe.select([*right, right[0]], [*right, right[0]])
    with pytest.raises(ProbeError, match="convention 'text'"):
        probe.select(right, right, convention="text")
    with pytest.raises(ProbeError, match="alpha"):
        probe.select(right, right, alpha=0)
    longer = solutions([5, 5], prompts=[4, 5])
    with pytest.raises(ProbeError, match="prompts differ in length for all of the 2 questions"):
        probe.select(right, longer)
    assert len(probe.select(right, longer, convention="paper").ids) == 2


def side(right, length=lambda name: 20):
    """A model's solutions of twelve questions."""
    names = [str(number) for number in range(12)]
    return [probe.Solution(n, [1, 2], [0] * length(n), n in right) for n in names]


def test_several_models_after_have_one_set():
    """What all of them solve, with lengths that fit for each; the order of them does not matter."""
    before = side([str(n) for n in range(11)])
    one = side([str(n) for n in range(9)], lambda n: 12 if n == "3" else 20)
    two = side([str(n) for n in range(2, 12)], lambda n: 16)
    found = probe.select(before, one, 0.5, others=[two])
    assert sorted(found.ids) == list("2345678")
    assert (found.both_correct, found.kept, found.chosen_by) == (7, 7, "training")
    assert (found.reference_length, found.cut_length) == (16, 8)  # of the shortest answers
    assert found == probe.select(before, two, 0.5, others=[one])
    narrow = probe.select(before, one, 0.5, others=[two], delta=0.45)
    assert sorted(narrow.ids) == list("245678")
    paper = probe.select(before, one, 0.5, others=[two], convention="paper")
    assert paper.reference_length == (20 + ((6 * 20 + 12) / 7 + 16) / 2) / 2
    none = side([])
    with pytest.raises(probe.ProbeError, match=r"no question that all 3 models solve .*9, 0 of 12"):
        probe.select(before, one, others=[none])


def test_a_later_pair_within_the_questions_of_an_earlier_one():
    before, first = side([str(n) for n in range(11)]), side([str(n) for n in range(9)])
    chosen = probe.select(before, first, 0.5, samples=6)
    later = side([*"13579", "10"], lambda n: 18)
    found = probe.select(before, later, 0.5, within=chosen)
    assert found.ids == tuple(name for name in chosen.ids if name in "13579")
    assert 0 < len(found.ids) < 6
    assert found.chosen_by == "first"
    assert (found.cut_length, found.maximum_length) == (10, 30)  # not those of 18 tokens
    with pytest.raises(probe.ProbeError, match="none of the 6 questions that an earlier"):
        probe.select(before, side(["10"]), 0.5, within=chosen)
