"""Plans: phases, rules by module path, layer numbers of format 1, and JSON that is a plan or an error that names the field."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import tsa_compile as tsa
from tsa_compile.plan import DEFAULTS, as_plan

SPARSE, PROBE = tsa.TokenSparse(coverage=0.3), tsa.ProbeSparse()
LAYER_1 = "model.layers.1.self_attn"


def tree(*paths: str) -> nn.Module:
    """A module with submodules of these paths."""
    root = nn.Module()
    for path in paths:
        at = root
        for part in path.split("."):
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
    return root


LLAMA = tree(*(f"model.layers.{n}.{part}" for n in range(3) for part in ("self_attn.q_proj", "mlp")))


def test_a_bare_policy_goes_where_its_phases_say():
    plan = as_plan(SPARSE)
    assert plan == tsa.Plan(prefill=SPARSE)
    assert plan.where == "always"
    assert plan.policy_at(LAYER_1, "decode") == DEFAULTS["decode"]
    assert as_plan(tsa.Dense()).policy_at(LAYER_1, "verify") == tsa.Dense()


def test_the_default_plan_runs_where_it_pays():
    assert as_plan(None) == tsa.Plan(prefill=tsa.BlockSparse(), where="pays")


def test_the_first_rule_that_matches_decides():
    rules = [("model.layers.[0-1].*", "prefill", tsa.Dense()), ("*", "prefill", PROBE), ("*", "decode", tsa.Dense())]
    plan = tsa.Plan(SPARSE, rules=rules)
    assert plan.policy_at(LAYER_1, "prefill") == tsa.Dense()
    assert plan.policy_at("model.layers.2.self_attn", "prefill") == PROBE
    assert tsa.Plan(SPARSE, rules=rules[:1]).policy_at("model.layers.10.self_attn", "prefill") == SPARSE


def test_layer_numbers_become_paths():
    plan = tsa.Plan(tsa.Dense(), rules=[(1, "prefill", SPARSE)])
    bound = plan.bind(LLAMA)
    assert [r.modules for r in bound.rules] == ["model.layers.1", "model.layers.1.*"]
    for p in (plan, bound):
        assert [p.policy_at(f"model.layers.{n}.self_attn", "prefill") for n in range(3)] == [tsa.Dense(), SPARSE, tsa.Dense()]


def test_self_and_cross_attention_of_a_layer_are_one_layer():
    model = tree("layers.0.self_attn", "layers.0.cross_attn", "norms.0")
    bound = tsa.Plan(rules=[(0, "prefill", SPARSE)]).bind(model)
    assert {bound.policy_at(f"layers.0.{a}_attn", "prefill") for a in ("self", "cross")} == {SPARSE}


@pytest.mark.parametrize(
    ("paths", "rule", "message"),
    [
        (
            ("text.layers.1.attn", "decoder.layers.1.attn"),
            1,
            r"layer 1 is in several stacks: decoder\.layers\.1, text\.layers\.1",
        ),
        (("a.1.x", "b.1.y"), 1, r"layer 1 is in several stacks: a\.1, b\.1"),
        (("layers.0.self_attn",), 99, r"the model has no layer 99; it has layers\.0\.self_attn"),
        (("layers.0.self_attn",), "layers.7.*", r"plan rule 0: no module of the model matches 'layers\.7\.\*'"),
    ],
)
def test_a_rule_that_cannot_be_bound_is_an_error(paths, rule, message):
    plan = tsa.Plan(rules=[(rule, "prefill", SPARSE)])
    for apply in (plan.bind, lambda model: tsa.transform(model, plan), lambda model: tsa.explain(model, policy=plan)):
        with pytest.raises(ValueError, match=message):
            apply(tree(*paths))


def test_the_first_form_is_read_with_a_warning():
    with pytest.warns(DeprecationWarning, match="prefill=default") as seen:
        plan = tsa.Plan(tsa.Dense(), {3: SPARSE, 1: PROBE}, {"kl": 0.01})
    assert seen[0].filename == __file__
    assert plan == tsa.Plan(tsa.Dense(), rules=[(1, "prefill", PROBE), (3, "prefill", SPARSE)], notes={"kl": 0.01})


FORMAT_1 = {"format": "tsa_compile.plan", "version": 1}
TOKEN = {"policy": "TokenSparse", "coverage": 0.3, "layers": None, "completion": None}


def test_format_1_is_read():
    data = {**FORMAT_1, "default": {"policy": "Dense"}, "layers": {"1": TOKEN}, "notes": {"kl": 0.01}}
    paper = tsa.TokenSparse.paper(coverage=0.3)
    assert as_plan(data) == tsa.Plan(tsa.Dense(), rules=[(1, "prefill", paper)], notes={"kl": 0.01})
    named = {**FORMAT_1, "default": {**TOKEN, "layers": [0, 2]}, "layers": {"2": {**TOKEN, "layers": [5]}}}
    assert as_plan(named) == tsa.Plan(tsa.Dense(), rules=[(2, "prefill", tsa.Dense()), (0, "prefill", paper)])
    short = {**FORMAT_1, "default": {"policy": "TokenSparse"}}
    assert as_plan(short).prefill == tsa.TokenSparse.paper()


def test_format_2_round_trips(tmp_path):
    plan = tsa.Plan(SPARSE, tsa.Dense(), rules=[("*.1.*", "prefill", PROBE), (2, "prefill", tsa.Dense())], notes={"kl": 0.01})
    plan.save(tmp_path / "plan.json")
    assert tsa.Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["phases"].keys() == {"prefill", "decode"}


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "x"}'])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json: "):
        tsa.Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tsa.Plan(decode=SPARSE), "Plan.decode: TokenSparse is for prefill, not for decode"),
        (lambda: tsa.Plan(3), "Plan.prefill must be a policy, got int"),
        (lambda: tsa.Plan(rules="all"), "Plan.rules must be a list of .* got str"),
        (lambda: tsa.Plan(rules=[("*", SPARSE)]), r"Plan.rules\[0\] must be \(modules, phase, policy\)"),
        (lambda: tsa.Plan(rules=[("", "prefill", SPARSE)]), r"Plan.rules\[0\].modules must be a pattern .* got ''"),
        (lambda: tsa.Plan(rules=[(True, "prefill", SPARSE)]), r"Plan.rules\[0\].modules must be a pattern .* got True"),
        (lambda: tsa.Plan(rules=[("*", "training", SPARSE)]), r"Plan.rules\[0\].phase must be one of .* got 'training'"),
        (
            lambda: tsa.Plan(rules=[("*", "decode", SPARSE)]),
            r"Plan.rules\[0\].policy: TokenSparse is for prefill, not for decode",
        ),
        (lambda: tsa.Plan(reuse={"0": 1}), r"Plan.reuse must be a list of Reuse\(modules, anchor, heads, phase\)"),
        (lambda: tsa.Plan(reuse=[(1,)]), r"Plan.reuse\[0\] must be \(modules, anchor, heads, phase\), got"),
        (lambda: tsa.Plan(reuse=[(1, True)]), r"Plan.reuse\[0\].anchor must be a pattern of paths or the number of a layer"),
        (lambda: tsa.Plan(reuse=[(1, 0, (0, -1))]), r"Plan.reuse\[0\].heads must be numbers of KV heads"),
        (lambda: tsa.Plan(reuse=[(1, 0, None, "encode")]), r"Plan.reuse\[0\].phase must be one of"),
        (lambda: tsa.Plan(reuse=[{"module": 1, "anchor": 0}]), r"Plan.reuse\[0\] has no field 'module'"),
        (lambda: tsa.Plan(where="never"), "Plan.where must be one of .* got 'never'"),
        (lambda: tsa.Plan(notes=3), "Plan.notes must be a mapping, got int"),
        (
            lambda: as_plan({**FORMAT_1, "version": 2, "phases": {"prefill": {"policy": "X"}}}),
            "phases.prefill: unknown policy 'X'",
        ),
        (lambda: as_plan({**FORMAT_1, "version": 2, "layers": {}}), "plan has no field 'layers'"),
        (lambda: as_plan({"policy": "TokenSparse", "layers": [1]}), "TokenSparse has no field 'layers': a plan's rules say"),
    ],
)
def test_a_wrong_plan_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


WORDS = (
    "format version phases rules reuse where notes default layers prefill decode modules phase policy coverage window completion"
)
KEYS = st.sampled_from([*WORDS.split(), "inner", "heavy", "mass", "share", "engine", "probes", "1", "2"])
LEAVES = st.sampled_from(
    ["tsa_compile.plan", 1, 2, "prefill", "decode", "Dense", "TokenSparse", "ProbeSparse", "*", "always", 0.5]
)
LEAVES |= st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=5), max_leaves=12)
FIELDS = re.compile(
    r"has no field '|plan|phases|rules|default|layers|Plan\.|policy|coverage|window|completion|Completion|inner|BlockSparse"
    r"|alpha|sinks|last_dense|heavy|pool|share|engine|probes|min_"
)


@settings(max_examples=400, deadline=None)
@given(JSON, st.sampled_from([{}, {"format": "tsa_compile.plan", "version": 2}, {"format": "tsa_compile.plan", "version": 1}]))
@example({"phases": {"prefill": {"policy": ["Dense"]}}}, {"format": "tsa_compile.plan", "version": 2})
@example({"default": {"policy": "TokenSparse", "share": ["x"], "layers": "1"}}, {"format": "tsa_compile.plan", "version": 1})
def test_any_json_is_a_plan_or_an_error_that_names_the_field(data, head):
    data = {**data, **head} if isinstance(data, dict) else data
    try:
        plan = as_plan(data)
    except (ValueError, TypeError) as error:
        message = str(error)
    else:
        again = as_plan(json.loads(json.dumps(plan.to_dict())))
        assert again.to_dict() == plan.to_dict() or "nan" in str(plan)
        return
    assert FIELDS.search(message), message
