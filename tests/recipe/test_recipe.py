import dataclasses
import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import probe.recipe._recipe as recipes
from probe.errors import ProbeError
from probe.metrics import METRICS
from probe.problems import BENCHMARKS
from probe.recipe import (
    Recipe,
    place_benchmarks,
    read_recipe,
    recipe_files,
    recipe_from,
    recipe_table,
    write_recipe,
)

VALUES = Path(__file__).parents[3] / "shared" / "paper" / "values.toml"
PAPER = ("deepseek-math", "mistral-math", "distilled-qwen-math", "qwen2.5-math")

MINIMAL = """
name = "mine"
[[pairs]]
name = "p"
before = "a/b"
after = "a/c"
[[benchmarks]]
name = "gsm8k"
"""


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipe_files())
def test_every_shipped_recipe_reads(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe_from(json.loads(json.dumps(recipe_table(recipe))), "x") == recipe


@pytest.mark.parametrize("name", recipe_files())
def test_what_a_shipped_recipe_names_is_known(name):
    recipe = read_recipe(name)
    pairs = {pair.name for pair in recipe.pairs}
    assert {choice.name for choice in recipe.benchmarks} <= BENCHMARKS.keys()
    for entry in recipe.published:
        assert entry.pair in pairs
        assert entry.benchmark in BENCHMARKS
        assert entry.metric in METRICS if entry.alpha else entry.metric == "accuracy"
    for change in recipe.published_changes:
        assert change.pair is None or change.pair in pairs
        assert change.metric in METRICS


@pytest.mark.skipif(not VALUES.is_file(), reason="needs the list of the paper's printed values")
def test_published_values_are_those_of_the_paper_and_no_others():
    values = tomllib.loads(VALUES.read_text())
    names = {
        "intensity": "activation_intensity",
        "complexity": "information_complexity",
        "kurtosis": "distribution_kurtosis",
    }
    known = {
        (cell["pair"], cell["benchmark"], names[key], cell["alpha"], *cell[key])
        for cell in values["table1"]
        for key in names.keys() & cell.keys()
    } | {
        (pair, benchmark, "accuracy", None, *(round(side / 100, 4) for side in sides))
        for pair, rows in values["table4"].items()
        for benchmark, sides in rows.items()
    }
    for name in ("paper", "paper-accuracy"):
        recipe = read_recipe(name)
        carried = [dataclasses.astuple(entry) for entry in recipe.published]
        carried = [(p, b, m, alpha, *sides) for p, b, m, *sides, alpha in carried]
        assert len(carried) == len(known)
        assert set(carried) == known
        changes = {(c.pair, c.alpha): c for c in recipe.published_changes}
        for pair, entry in values["figure3b"].items():
            for alpha, change in zip((0.03, 0.1, 0.3, 0.5), entry, strict=False):
                if isinstance(change, float):
                    assert changes[pair, alpha].change == change
    (aggregate,) = [c for c in read_recipe("paper").published_changes if c.pair is None]
    assert (aggregate.experiments, aggregate.change, aggregate.rate) == (41, 0.076, 0.951)


def test_the_papers_recipes_follow_its_code():
    """Ids, literal prompts and limits as the published runs have them."""
    pairs = {pair.name: pair for name in PAPER for pair in read_recipe(name).pairs}
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    deepseek = f"User: {{question}}\n{boxed}\n\nAssistant:"
    qwen = (
        f"<|im_start|>system\n{boxed}<|im_end|>\n<|im_start|>user\n{{question}}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert {name: (pair.prompt, pair.max_new_tokens) for name, pair in pairs.items()} == {
        "deepseek-math": (deepseek, 4096),
        "mistral": ("[INST] {question}[/INST]", 4096),
        "distilled-qwen": (deepseek, 32768),
        "qwen2.5": (qwen, 8192),
    }
    for name in PAPER:
        recipe = read_recipe(name)
        assert [choice.name for choice in recipe.benchmarks] == ["gsm8k", "math", "college_math"]
        assert recipe.compute.dtype == "bfloat16"
        options = recipe.selection
        assert (options.beta, options.gamma, options.delta) == (0.5, 1.5, 0.5)
        assert (options.samples, options.seed, options.convention) == (100, 42, "code")
        assert options.alpha == (0.03, 0.1, 0.3, 0.5)
    whole = read_recipe("paper")
    assert whole.pairs == tuple(pairs.values())
    assert len(whole.benchmarks) == 3
    accuracy = read_recipe("paper-accuracy")
    assert accuracy.pairs == whole.pairs
    assert len(accuracy.benchmarks) == 7
    assert accuracy.selection.alpha == ()


CONFIGS = {
    "deepseek-math": ("llama", 102400, 32),
    "mistral": ("mistral", 32000, 8),
    "distilled-qwen": ("qwen2", 152064, 4),
    "qwen2.5": ("qwen2", 151665, 4),
    "sft-dpo": ("llama", 128264, 8),
    "dpo-rlvr": ("llama", 128264, 8),
    "1b-sft-dpo": ("olmo2", 100352, 16),
    "1b-dpo-rlvr": ("olmo2", 100352, 16),
    "7b-sft-dpo": ("olmo2", 100352, 32),
    "7b-dpo-rlvr": ("olmo2", 100352, 32),
    **{f"base-step-{step}": ("olmo3", 100278, 32) for step in range(100, 2000, 100)},
    "think-sft-dpo": ("olmo3", 100278, 32),
    "think-dpo-rlvr": ("olmo3", 100278, 32),
    **{
        f"{name}-{size}": ("qwen2", 151936, 2)
        for name in ("zoo", "orz")
        for size in ("0.5b", "1.5b")
    },
    **{f"{name}-7b": ("qwen2", 152064, 4) for name in ("zoo", "orz", "oat")},
    "oat-1.5b": ("qwen2", 151936, 2),
    "prorl": ("qwen2", 151936, 2),
}
HEADS = {896: 14, 3584: 28}
"""Where a head is not 128 wide."""
TIED = ("zoo-0.5b", "zoo-1.5b", "orz-0.5b", "orz-1.5b", "oat-1.5b")


@pytest.mark.parametrize(
    "name", [name for name in recipe_files() if not name.startswith("tiny-math")]
)
def test_the_parameters_of_a_shape_are_those_of_such_a_model(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    for pair in read_recipe(name).pairs:
        model_type, vocabulary, key_value_heads = CONFIGS[pair.name]
        shape = pair.shape
        config = AutoConfig.for_model(
            model_type,
            vocab_size=vocabulary,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ffn,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=HEADS.get(shape.d_model, shape.d_model // 128),
            num_key_value_heads=key_value_heads,
            tie_word_embeddings=pair.name in TIED,
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters, pair.name


def test_including_other_recipes(tmp_path):
    mine = write(tmp_path, MINIMAL)
    other = tmp_path / "other.toml"
    other.write_text(
        'name = "both"\ninclude = ["mine.toml", "tiny-math"]\n'
        '[[pairs]]\nname = "own"\nbefore = "a/b"\nafter = "a/d"\n[solutions]\nquestions = 3\n'
    )
    recipe = read_recipe(other, {"pairs.1.before": "x/y"})
    assert [pair.name for pair in recipe.pairs] == ["p", "sft-grpo", "sft-dpo", "own"]
    assert recipe.pairs[1].before == "x/y"
    assert [choice.name for choice in recipe.benchmarks] == ["gsm8k", "tiny-math"]
    assert recipe.compute.dtype == "bfloat16"  # its own, not tiny-math's
    assert recipe.solutions.questions == 3
    assert recipe.include == ()

    mine.write_text('name = "mine"\ninclude = ["other.toml"]')
    with pytest.raises(ProbeError, match=r"other.toml: this recipe includes itself"):
        read_recipe(other)
    mine.write_text('name = "mine"\ninclude = "tiny-math"')
    with pytest.raises(ProbeError, match="include is 'tiny-math': a list of recipes was expected"):
        read_recipe(mine)
    mine.write_text('name = "mine"\ninclude = ["none.toml"]')
    with pytest.raises(ProbeError, match=r"cannot read the recipe .*none.toml"):
        read_recipe(mine)


@pytest.mark.parametrize("name", recipe_files())
def test_a_written_recipe_is_the_same_recipe(tmp_path, name):
    recipe = read_recipe(name)
    write_recipe(recipe, tmp_path / "copy.toml")
    assert read_recipe(tmp_path / "copy.toml") == recipe
    with pytest.raises(ProbeError, match="cannot write the recipe"):
        write_recipe(recipe, tmp_path / "no" / "copy.toml")


def test_places_of_benchmarks():
    paper = read_recipe("paper")
    placed = place_benchmarks(paper, ["math=/a=b.jsonl", "gsm8k=c.csv"])
    assert [choice.path for choice in placed.benchmarks] == ["c.csv", "/a=b.jsonl", None]
    tiny = read_recipe("tiny-math")
    for place in ("p.jsonl", "tiny-math=p.jsonl"):
        assert place_benchmarks(tiny, [place]).benchmarks[0].path == "p.jsonl"
    assert place_benchmarks(tiny, ["./a=b"]).benchmarks[0].path == "./a=b"
    with pytest.raises(ProbeError, match="has no benchmark 'aime'; it has: gsm8k, math"):
        place_benchmarks(paper, ["aime=p.jsonl"])
    with pytest.raises(ProbeError, match="for which of gsm8k, math, college_math"):
        place_benchmarks(paper, ["p.jsonl"])


def test_defaults_are_the_published_runs_with_more_questions(tmp_path):
    recipe = read_recipe(write(tmp_path, MINIMAL))
    options = recipe.selection
    assert (options.beta, options.gamma, options.delta) == (0.5, 1.5, 0.5)
    assert (options.samples, options.seed, options.convention) == (1000, 42, "code")
    assert options.alpha == (0.03, 0.1, 0.3, 0.5)


SECTIONS = {
    "The recipe": Recipe,
    "`[[pairs]]`": recipes.Pair,
    "`shape` of a pair": recipes.Shape,
    "`solutions` of a pair": recipes.SolutionFiles,
    "`[[trajectories]]`": recipes.Trajectory,
    "`[[benchmarks]]`": recipes.BenchmarkChoice,
    "`[compute]`": recipes.Compute,
    "`[solutions]`": recipes.SolutionOptions,
    "`[selection]`": recipes.SelectionOptions,
    "`[attribution]`": recipes.AttributionOptions,
    "`[faithfulness]`": recipes.FaithfulnessOptions,
    "`[report]`": recipes.ReportOptions,
    "`[[published]]`": recipes.Published,
    "`[[published_changes]]`": recipes.PublishedChange,
}


def expected_keys():
    """The tables of docs/recipes.md, by heading, from the dataclasses and their docstrings."""
    tables = {}
    for title, kind in SECTIONS.items():
        source = Path(inspect.getfile(kind)).read_text()
        start = source.index(f"class {kind.__name__}:")
        tables[title] = []
        for field in dataclasses.fields(kind):
            place = source.index(f"\n    {field.name}: ", start)
            text = " ".join(source[place:].split('"""')[1].split()).replace("|", r"\|")
            default = "needed"
            if field.default is not dataclasses.MISSING:
                value = getattr(field.default, "default", field.default)
                factory = getattr(field.default, "default_factory", None)
                default = "" if factory or value is None else f"`{json.dumps(value)}`"
            tables[title].append(f"| `{field.name}` | {default} | {text} |")
    return tables


def test_the_docs_list_every_key_with_its_default():
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    lines = ["## All keys"]
    for title, rows in expected_keys().items():
        lines += ["", f"### {title}", "", "| key | default | |", "|---|---|---|", *rows]
    expected = "\n".join(lines) + "\n"
    # What is expected can be pasted as it is.
    assert text.endswith(expected), f"docs/recipes.md should end in:\n{expected}"


def test_every_dataclass_is_a_section():
    kinds = {kind for kind in vars(recipes).values() if dataclasses.is_dataclass(kind)}
    assert kinds == set(SECTIONS.values())


def test_every_field_has_a_docstring():
    for kind in SECTIONS.values():
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            assert re.search(rf'\n    {field.name}: [^\n]*\n    """', source), field.name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"selection.sample": "5"}, "unknown key 'selection.sample'; did you mean 'samples'?"),
        ({"selektion.alpha": "[1]"}, "unknown key 'selektion'; did you mean 'selection'?"),
        ({"pairs.0.bfore": "x"}, "unknown key 'pairs.0.bfore'; did you mean 'before'?"),
        ({"benchmarks.0.file": "x"}, "known keys: name, path"),
        ({"selection.samples": "true"}, "selection.samples is True: a whole number"),
        ({"selection.samples": "2.5"}, "selection.samples is 2.5: a whole number"),
        ({"selection.samples": "0"}, "greater than or equal to 1"),
        ({"selection.alpha": "[0.1, -1]"}, "greater than 0"),
        ({"selection.gamma": "inf"}, "finite"),
        ({"solutions.questions": "some"}, "solutions.questions is 'some': a whole number .*'all'"),
        ({"attribution.granularity": "heads"}, "should be 'qkv', 'block', 'head' or 'expert'"),
        ({"compute.dtype": "int8"}, "'float32', 'bfloat16'"),
        ({"pairs.0.prompt": "Q: {quest}"}, r"a prompt needs \{question\} in it, or is just 'chat'"),
        ({"pairs.0.prompt": "chat: x"}, r"a prompt needs \{question\} in it, or is just 'chat'"),
        (
            {"pairs.0.shape.layers": 3},
            "unknown key 'pairs.0.shape.layers'; did you mean 'n_layers'",
        ),
        ({"include": "['tiny-math']"}, "include works in a recipe's file only"),
        ({"pairs.7.before": "x"}, "'7' is not one of its 1 entries"),
        ({"name.x": "x"}, "name has no keys"),
        ({"name": "a/b"}, "name is 'a/b'"),
    ],
)
def test_a_bad_value_names_file_key_and_what_was_expected(tmp_path, overrides, message):
    path = write(tmp_path, MINIMAL)
    with pytest.raises(ProbeError, match=message) as caught:
        read_recipe(path, overrides)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ProbeError, match=r"no recipe 'tiny-mat'; did you mean tiny-math\?"):
        read_recipe("tiny-mat")
    with pytest.raises(ProbeError, match="there are: .*tiny-math"):
        read_recipe("zzz")
    with pytest.raises(ProbeError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(ProbeError, match="not TOML that can be read: Invalid value"):
        read_recipe(write(tmp_path, "name = "))
    with pytest.raises(ProbeError, match="'pairs' is missing"):
        read_recipe(write(tmp_path, 'name = "x"\nbenchmarks = [{name = "gsm8k"}]'))
    twice = MINIMAL + '[[pairs]]\nname = "p"\nbefore = "a/b"\nafter = "a/c"\n'
    with pytest.raises(ProbeError, match="the name 'p' stands twice"):
        read_recipe(write(tmp_path, twice))


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000, "[" * 100_000 + "]" * 100_000])
def test_what_python_cannot_hold(tmp_path, value):
    path = tmp_path / "r.toml"
    path.write_text(f"name = {value}")
    with pytest.raises(ProbeError, match="r.toml: not TOML that can be read: "):
        read_recipe(path)
    assert read_recipe("tiny-math", {"description": value}).description == value


def test_overrides_are_toml_where_they_can_be(tmp_path):
    path = write(tmp_path, MINIMAL)
    recipe = read_recipe(
        path,
        {
            "selection.samples": "50",
            "selection.alpha": "[0.1]",
            "pairs.0.before": "some/folder",
            "compute.device": "cuda:0,cuda:1",
            "solutions.questions": 7,
        },
    )
    assert recipe.selection.samples == 50
    assert recipe.selection.alpha == (0.1,)
    assert recipe.pairs[0].before == "some/folder"
    assert recipe.compute.device == "cuda:0,cuda:1"
    assert recipe.solutions.questions == 7


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(f.name for f in dataclasses.fields(Recipe))), ANYTHING)
def test_any_value_anywhere_is_taken_or_refused_in_one_line(key, value):
    table = {
        "name": "x",
        "pairs": [{"name": "p", "before": "a/b", "after": "a/c"}],
        "benchmarks": [{"name": "gsm8k"}],
    }
    try:
        recipe_from(table | {key: value}, "here")
    except ProbeError as error:
        assert str(error).startswith("here: ")
        assert "\n" not in str(error)


SERVED = """
name = "served"
[compute]
remote = "http://127.0.0.1:9"
[[pairs]]
name = "a"
before = "probe:tiny-math/sft"
after = "probe:tiny-math/grpo"
prompt = "{question}"
max_new_tokens = 64
[[benchmarks]]
name = "tiny-math"
"""


def test_a_server_that_only_a_file_names_is_asked_nothing(tmp_path):
    """It would get the key; one's own word, on the command line or in a call, lets it."""
    path = tmp_path / "served.toml"
    path.write_text(SERVED)
    message = "would send the questions, and the key .*--remote http://127.0.0.1:9$"
    with pytest.raises(ProbeError, match=message):
        read_recipe(path)
    with pytest.raises(ProbeError, match=message):
        read_recipe(path, {"compute.jobs": 2})
    for server in ("http://127.0.0.1:9", "http://127.0.0.1:8", "ndif", ""):
        assert read_recipe(path, {"compute.remote": server}).compute.remote == server
    path.write_text(SERVED.replace("http://127.0.0.1:9", "ndif"))
    assert read_recipe(path).compute.remote == "ndif"


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_published_value_is_a_number(tmp_path, number):
    path = tmp_path / "odd.toml"
    value = (
        f'pair = "a"\nbenchmark = "tiny-math"\nmetric = "accuracy"\nbefore = {number}\nafter = 1\n'
    )
    text = SERVED.replace('[compute]\nremote = "http://127.0.0.1:9"\n', "")
    path.write_text(f"{text}[[published]]\n{value}")
    with pytest.raises(ProbeError, match=r"published\.0\.before"):
        read_recipe(path)


@pytest.mark.parametrize("place", ["9" * 5000, "02", "-1", "\N{ARABIC-INDIC DIGIT ONE}"])
def test_what_is_no_place_in_a_list(place):
    with pytest.raises(ProbeError, match="is not one of its 2 entries, from 0 on"):
        read_recipe("tiny-math", {f"pairs.{place}.before": "x"})


@pytest.mark.parametrize(
    "overrides",
    [
        {"pairs.0.before": "a\0b"},
        {"benchmarks.0.path": "\0"},
        {"pairs.0.solutions.before": "x\0"},
        {"solutions.seed": "9" * 30},
        {"compute.threads": 2**31},
        {"attribution.batch_size": "9" * 30},
    ],
)
def test_what_no_file_and_no_machine_has(overrides):
    with pytest.raises(ProbeError, match=f"{next(iter(overrides))} is "):
        read_recipe("tiny-math", overrides)
