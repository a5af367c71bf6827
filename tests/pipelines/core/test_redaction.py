"""Secrets leave no text and no setting; everything else stays as it was."""

from __future__ import annotations

import pytest

from pipelines.core.redaction import HIDDEN, is_secret_name, redact, redact_override, redact_value

CANARY = "c4n4ry-Zq81"


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://ingot:{CANARY}@db.example:5432/mlflow",
        f"https://{CANARY}@mlflow.example/api",
        f"http://ingot:p@{CANARY}@mlflow.example/api",
        f"GET https://bucket.s3.example/key?X-Amz-Signature={CANARY}&X-Amz-Date=2026",
        f"https://account.blob.example/c?sv=2024&sig={CANARY}",
        f"Authorization: Bearer {CANARY}.{CANARY}",
        "key AKIAIOSFODNN7CANARY1 was refused",
        "hf_c4n4ryc4n4ryc4n4ryc4n4ry",
    ],
)
def test_a_secret_is_known_by_its_shape(text: str) -> None:
    cleaned = redact(text)
    assert CANARY not in cleaned
    assert "CANARY" not in cleaned
    assert "c4n4ry" not in cleaned
    assert HIDDEN in cleaned


def test_a_cleaned_url_still_says_where_it_points() -> None:
    assert redact(f"mysql+pymysql://u:{CANARY}@host:3306/db") == f"mysql+pymysql://{HIDDEN}@host:3306/db"


def test_the_value_of_a_secret_variable_is_hidden_wherever_it_turns_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("MY_SERVICE_PASSWORD", CANARY + "-longer")
    assert redact(f"boto said: {CANARY}-longer, then {CANARY}") == f"boto said: {HIDDEN}, then {HIDDEN}"


@pytest.mark.parametrize(("secret", "shown"), [("c4n4ry", "it was ***"), ("plain", "it was plain")])
def test_a_value_too_short_to_be_told_from_words_is_shown(
    secret: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", secret)
    assert redact(f"it was {secret}") == shown


@pytest.mark.parametrize(
    "name",
    ["aws_secret_access_key", "AWS_ACCESS_KEY_ID", "hf_token", "token", "db.password", "api-key", "AWS_SESSION_TOKEN"],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["tokens", "tokenizer", "bos_token", "mask_token", "kl_nats_per_token", "batch_tokens", "author", "keys"]
)
def test_ordinary_names_are_not_secrets(name: str) -> None:
    assert not is_secret_name(name)


def test_an_override_is_cleaned_by_its_shape_and_by_its_name() -> None:
    assert redact_override(f"tracking.uri=http://u:{CANARY}@host") == f"tracking.uri=http://{HIDDEN}@host"
    assert redact_override(f"remote.password={CANARY}") == f"remote.password={HIDDEN}"
    assert redact_override("pretrain.steps=20") == "pretrain.steps=20"


def test_settings_are_cleaned_at_every_depth() -> None:
    config = {
        "store": {"endpoint": f"https://k:{CANARY}@s3.example", "options": [{"secret": CANARY, "region": "eu"}]},
        "password": [CANARY],
        "steps": 600,
        "resume": None,
        "enabled": True,
    }
    cleaned = redact_value("", config)
    assert CANARY not in str(cleaned)
    assert cleaned["store"]["options"][0]["region"] == "eu"
    assert (cleaned["steps"], cleaned["resume"], cleaned["enabled"]) == (600, None, True)


def test_ordinary_text_is_untouched() -> None:
    text = "loss 1.92 at step 600; see https://mlflow.example/#/experiments/1?orderBy=asc and a@b.example"
    assert redact(text) == text
