"""Personal data: what is masked, and what looks like it and stays."""

from __future__ import annotations

import pytest

from pipelines.data.personal_data import mask

KINDS = ("email", "ip", "phone", "key", "card")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to ann.b+c@mail.example.org, please", "write to [email], please"),
        ("from 8.8.8.8 to 2001:4860:4860::8888", "from [ip] to [ip]"),
        ("127.0.0.1, 192.168.0.1 and version 1.2.3.4.5", "127.0.0.1, 192.168.0.1 and version 1.2.3.4.5"),
        ("call +49 30 901820 or (212) 555-0100", "call [phone] or [phone]"),
        ("on 2024-01-31 at 12:30:45, 3.14159, page 100-200", "on 2024-01-31 at 12:30:45, 3.14159, page 100-200"),
        ("AKIAIOSFODNN7EXAMPLE", "[key]"),
        ("paid with 4111 1111 1111 1111 today", "paid with [card] today"),
        ("order 4111 1111 1111 1112 and 1234567890123", "order 4111 1111 1111 1112 and 1234567890123"),
        ("std::vector<int>::iterator @property a@b", "std::vector<int>::iterator @property a@b"),
    ],
)
def test_what_has_the_form_is_replaced_by_its_kind(text: str, masked: str) -> None:
    assert mask(text, KINDS)[0] == masked


def test_a_private_key_goes_as_a_whole_and_kinds_are_counted() -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----"
    text, counts = mask(f"{key} a@b.org c@d.org", KINDS)
    assert text == "[key] [email] [email]"
    assert dict(counts) == {"key": 1, "email": 2}


def test_only_the_kinds_that_are_asked_for_are_masked() -> None:
    assert mask("a@b.org 8.8.8.8", ("ip",))[0] == "a@b.org [ip]"
    assert mask("a@b.org 8.8.8.8", ())[0] == "a@b.org 8.8.8.8"
