import itertools

import pytest
import torch
from conftest import save_random_model
from small_models import MODELS, save_small_model

import probe
import probe.attribution._states
from probe.attribution import TokenSequence, compare_states, divergence, linear_cka


def sequences(lengths=((4, 3), (2, 6), (5, 1)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenSequence(*(torch.randint(3, 90, (n,), generator=generator).tolist() for n in pair))
        for pair in lengths
    ]


def by_hand(model, sequence):
    """The streams and log probabilities of one sequence, through transformers and a hook."""
    module = model.network._module
    tokens = torch.tensor([[*sequence.prompt, *sequence.answer[:-1]]])
    start = len(sequence.prompt) - 1
    row = model.architecture
    norm = module.get_submodule(row.final_norm)
    end = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: end.append(inputs[0]))
    with torch.no_grad():
        output = module(tokens, output_hidden_states=True)
    hook.remove()
    streams = torch.stack([*output.hidden_states[:-1], *end])[:, 0, start:]
    return streams, output.logits[0, start:].log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_against_transformers(tmp_path, name):
    models = [
        probe.load_model(str(save_small_model(tmp_path / str(seed), name, seed))) for seed in (0, 1)
    ]
    texts = sequences()
    found = compare_states(*models, texts, batch_size=2)
    cosines = []
    for sequence, kl in zip(texts, found.divergences, strict=True):
        (old, old_log), (new, new_log) = (by_hand(model, sequence) for model in models)
        expected = torch.nn.functional.kl_div(old_log, new_log, log_target=True, reduction="none")
        assert kl == pytest.approx(expected.sum(-1).tolist(), rel=1e-3, abs=1e-5)
        cosines.append((old * new).sum(-1) / (old.norm(dim=-1) * new.norm(dim=-1)))
    assert found.cosines == pytest.approx(torch.cat(cosines, 1).mean(1).tolist(), abs=1e-4)
    assert found.positions == 3 + 6 + 1
    assert len(found.cka) == models[0].n_layers + 1


def test_a_model_against_itself(tiny):
    texts = [s._replace(prompt=[5, 6, 7], answer=[4, 9, 5, 6, 7]) for s in sequences()]
    found = compare_states(tiny, tiny, texts)
    assert found.cosines == pytest.approx([1] * 5)
    assert all(kl == 0 for row in found.divergences for kl in row)


def test_the_vocabulary_that_both_have(tmp_path):
    """A model with further tokens is compared on the common ones."""
    old = probe.load_model(str(save_random_model(tmp_path / "old")))
    new = probe.load_model(str(save_random_model(tmp_path / "new", seed=1, vocab_size=101)))
    (text,) = sequences([(3, 4)])
    found = compare_states(old, new, [text])
    (_, old_log), (_, new_log) = by_hand(old, text), by_hand(new, text)
    new_log = new_log[:, :97].log_softmax(-1)
    expected = (new_log.exp() * (new_log - old_log)).sum(-1)
    assert found.divergences[0] == pytest.approx(expected.tolist(), rel=1e-4)


def test_batches_do_not_matter(monkeypatch):
    """In float64: how products of float32 round depends on the batch, and on the processor."""
    tiny, other = (
        probe.load_model(f"probe:tiny-math/{m}", dtype="float64") for m in ("sft", "grpo")
    )
    texts = [TokenSequence([5, 6, 7 + n], [4, 9, 5, 6][: 1 + n]) for n in range(4)]
    seen = []
    whole = compare_states(tiny, other, texts, 4, seen.append)
    monkeypatch.setattr(probe.attribution._states, "_LOGITS", 2 * 18 * 4)  # room for two
    parts = compare_states(tiny, other, texts, 4, seen.append)
    assert seen == [4, 2, 2]
    assert parts.cosines == pytest.approx(whole.cosines, rel=1e-5)
    assert parts.cka == pytest.approx(whole.cka, rel=1e-4)
    flat = [[kl for row in found.divergences for kl in row] for found in (whole, parts)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-9)
    assert min(flat[0]) > -1e-6


def test_cka_against_all_quadruples():
    """The unbiased criterion is the mean of its kernel over all ordered quadruples."""
    generator = torch.Generator().manual_seed(2)
    left = torch.randn(6, 4, generator=generator)
    right = left @ torch.randn(4, 3, generator=generator) + torch.randn(6, 3, generator=generator)

    def criterion(one, other):
        total, count = 0.0, 0
        for i, j, q, r in itertools.permutations(range(6), 4):
            total += one[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
            count += 1
        return float(total / count)

    grams = [side.double() @ side.double().T for side in (left, right)]
    expected = (
        criterion(*grams) / (criterion(grams[0], grams[0]) * criterion(grams[1], grams[1])) ** 0.5
    )
    assert linear_cka(left, right) == pytest.approx(expected, rel=1e-6)


def test_cka_does_not_mind_a_rotation_but_another_model():
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(40, 64, generator=generator)  # fewer positions than dimensions
    turn, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator))
    assert linear_cka(left, 3 * left @ turn + 1) == pytest.approx(1, abs=1e-4)
    assert abs(linear_cka(left, torch.randn(40, 64, generator=generator))) < 0.2


def test_where_cka_is_not_defined():
    assert linear_cka(torch.randn(3, 5), torch.randn(3, 5)) is None
    assert linear_cka(torch.ones(9, 5), torch.randn(9, 5)) is None


def test_divergence_by_hand():
    new = torch.tensor([0.5, 0.5]).log()
    old = torch.tensor([0.9, 0.1]).log()
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.9)) + 0.5 * torch.log(torch.tensor(0.5 / 0.1))
    assert divergence(new, old) == pytest.approx(float(expected))


def test_positions_are_spread_out(monkeypatch):
    monkeypatch.setattr(probe.attribution._states, "POSITIONS", 8)
    assert probe.attribution._states._positions([8, 2, 1, 4]) == [[0, 4], [0, 1], [0], [0, 2]]
    assert probe.attribution._states._positions([1] * 20) == [[0]] * 20
