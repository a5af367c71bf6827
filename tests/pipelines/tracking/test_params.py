"""Parameters: flat, complete, free of secrets, and within MLflow's limits without two values becoming one."""

from __future__ import annotations

from pipelines.tracking.params import KEY_LIMIT, VALUE_LIMIT, flatten


def test_every_leaf_gets_a_dotted_key() -> None:
    flat = flatten({"pretrain": {"optimizer": {"name": "lamb", "betas": [0.9, 0.99]}, "lisa": None}, "seed": 3})
    assert flat == {
        "pretrain.optimizer.name": "lamb",
        "pretrain.optimizer.betas": "[0.9, 0.99]",
        "pretrain.lisa": "null",
        "seed": "3",
    }


def test_children_are_named_and_not_numbered() -> None:
    children = [{"name": "rtn-int8", "bits": 8}, {"name": "gptq", "bits": 4}, {"bits": 2}]
    flat = flatten({"compress": children})
    assert flat["compress.rtn-int8.bits"] == "8"
    assert flat["compress.2.bits"] == "2"
    assert flat["compress.gptq.bits"] == flatten({"compress": children[::-1]})["compress.gptq.bits"]


def test_no_configuration_is_no_parameter_and_an_empty_part_is_one() -> None:
    assert flatten({}) == {}
    assert flatten({"lisa": {}, "children": []}) == {"lisa": "{}", "children": "[]"}


def test_long_values_are_cut_and_stay_different() -> None:
    one, two = (flatten({"text": "x" * 10_000 + ending})["text"] for ending in "ab")
    assert len(one) == len(two) == VALUE_LIMIT
    assert one != two


def test_long_keys_are_cut_and_stay_different() -> None:
    flat = flatten({"k" * 400 + ending: 1 for ending in "ab"})
    assert len(flat) == 2
    assert all(len(key) <= KEY_LIMIT for key in flat)


def test_characters_that_mlflow_refuses_are_replaced() -> None:
    assert flatten({"a%b": {"c?": 1}}) == {"a_b.c_": "1"}


def test_secrets_do_not_reach_a_parameter() -> None:
    flat = flatten({"tracking": {"uri": "postgresql://u:c4n4ry@h/db"}, "store": {"secret_key": "c4n4ry"}})
    assert "c4n4ry" not in str(flat)
    assert flat["tracking.uri"].endswith("@h/db")
