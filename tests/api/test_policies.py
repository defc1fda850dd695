"""Policies and plans: validation names field, value and range; dicts and JSON round-trip."""

import dataclasses
import pickle

import pytest

import tsa_compile as tsa
from tsa_compile.plan import as_plan
from tsa_compile.policies.base import from_dict


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coverage": 1.0}, r"TokenSparse.coverage must be a number in \[0, 1\), got 1.0"),
        ({"coverage": -0.1}, "TokenSparse.coverage .* got -0.1"),
        ({"coverage": float("nan")}, "TokenSparse.coverage .* got nan"),
        ({"coverage": "much"}, "TokenSparse.coverage .* got 'much'"),
        ({"coverage": True}, "TokenSparse.coverage .* got True"),
        ({"window": 0}, "TokenSparse.window must be an int >= 1, got 0"),
        ({"window": 1.5}, "TokenSparse.window must be an int >= 1, got 1.5"),
        ({"pool": 4}, "TokenSparse.pool must be odd, got 4"),
        ({"min_tokens": 0}, "TokenSparse.min_tokens must be an int >= 1, got 0"),
        ({"engine": "fast"}, "TokenSparse.engine must be one of .* got 'fast'"),
        ({"completion": 3}, "TokenSparse.completion must be a Completion or None, got 3"),
        ({"completion": tsa.Completion(heavy=64), "min_tokens": 32}, "Completion.heavy must be <= .*32.*, got 64"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.TokenSparse(**fields)


@pytest.mark.parametrize("field", ["window", "sinks", "heavy"])
def test_a_bad_completion_is_named(field):
    with pytest.raises(ValueError, match=f"Completion.{field} must be an int .* got -1"):
        tsa.Completion(**{field: -1})


POLICIES = [
    tsa.Dense(),
    tsa.TokenSparse(),
    tsa.TokenSparse(coverage=0.1, completion=tsa.Completion(window=64)),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_dict_and_pickle_round_trip(policy):
    assert from_dict(policy.to_dict()) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.coverage = 1


def test_plan_round_trip_through_json(tmp_path):
    plan = tsa.Plan(tsa.Dense(), rules=[(3, "prefill", POLICIES[2]), ("*.1.*", "prefill", POLICIES[1])], notes={"kl": 0.01})
    plan.save(tmp_path / "plan.json")
    assert tsa.Plan.load(tmp_path / "plan.json").to_dict() == plan.to_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"policy": "Magic"}, "unknown policy 'Magic'"),
        ({"policy": "TokenSparse", "tau": 1}, "TokenSparse has no field 'tau'"),
        ({"policy": "TokenSparse", "completion": {"width": 1}}, "Completion has no field 'width'"),
        ({"format": "tsa_compile.plan", "version": 99}, "plan format version 99"),
        ({"format": "something"}, "not a tsa_compile plan"),
    ],
)
def test_a_bad_dict_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        as_plan(data)


def test_what_is_neither_policy_nor_plan_is_refused():
    with pytest.raises(TypeError, match="got int"):
        as_plan(5)
