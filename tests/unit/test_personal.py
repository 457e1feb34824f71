"""Secrets and personal data: what is found, what only looks like it, and that nothing is shown in full."""

from time import perf_counter

import pytest

from common.data.personal import has_secret, hidden, personal, secrets

BODY = "MIIEowIBAAKCAQEAxyzKq3abcdefghijklmnopqrstuvwxyzABCDEF12345"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}", "private key"),
        (f"-----BEGIN OPENSSH PRIVATE KEY-----\\n{BODY}", "private key"),  # in JSON
        ("id AKIAQ3EGRXTYB5JZ2MNA", "AWS key"),
        ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "GitHub token"),
        ("github_pat_11ABCDEFG0aBcDeFgHiJkL_mNoPqRsTuVwXyZ0123456789abcdef", "GitHub token"),
        ("glpat-Ab3dE9fGhIjKlMn0pQrS", "GitLab token"),
        ("sk-proj-Ab3dE9fGhIjKlMn0pQrStUvWxYz", "API key"),
        ("キーはsk-ant-api03-Ab3dE9fGhIjKlMn0pQrStUvWxYzです", "API key"),
        ("sk_live_4eC39HqLyjWDarjtT1zdp7dc", "Stripe key"),
        ("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", "Hugging Face token"),
        ("xoxb-263594206564-2343594206574-FGqddMF8t08v8N7Oq4i57vs1", "Slack token"),
        ("AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY", "Google key"),
        (
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
            "JSON Web Token",
        ),
    ],
)
def test_secrets(text: str, kind: str) -> None:
    assert has_secret(text)
    ((found, shown),) = secrets(text)
    assert found == kind
    assert len(shown) == 6
    assert shown.endswith("***")


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PUBLIC KEY-----\n" + BODY,
        "AKIAIOSFODNN7EXAMPLE",
        "sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "sk-YOUR-API-KEY-GOES-IN-HERE",
        "sk-loading-spinner-container-2",
        "hf_your",
        "risk-Management-And-Compliance",
    ],
)
def test_what_only_looks_like_a_secret(text: str) -> None:
    assert not has_secret(text)


@pytest.mark.parametrize(
    ("text", "kind", "shown"),
    [
        ("Write to jo.smith@gmail.com", "e-mail address", "jo.***"),
        ("連絡先はtaro@yahoo.co.jpです", "e-mail address", "tar***"),
        ("Call +44 20 7946 0958", "phone number", "+44***"),
        ("電話は03-1234-5678です", "phone number", "03-***"),
        ("090-1234-5678", "phone number", "090***"),
        ("携帯は09012345678", "phone number", "090***"),
        ("電話：０３−１２３４−５６７８", "phone number", "０３−***"),
        ("(212) 456-7890", "phone number", "(21***"),
        ("4539 1488 0343 6467", "card number", "453***"),
        ("371449635398431", "card number", "371***"),
        ("DE89 3704 0044 0532 0130 00", "IBAN", "DE8***"),
        ("GB82WEST12345698765432", "IBAN", "GB8***"),
        ("マイナンバーは6214 9832 0257です", "My Number", "621***"),
    ],
)
def test_personal_data(text: str, kind: str, shown: str) -> None:
    assert list(personal(text)) == [(kind, shown)]


@pytest.mark.parametrize(
    "text",
    [
        *("jo@example.com", "git@github.com:a/b.git", "no-reply@a.com", "@property", "a @ b.c", "noreply@github.com"),
        *(
            "2026-11-28 10:20",
            "192.168.10.254",
            "ISBN 978-3-16-148410-0",
            "1 + 2 = 3",
            "3.14159265358979",
            "0120-123-456",
        ),
        *("555-123-4567", "+1 555 123 4567", "4539 1488 0343 6468", "4242 4242 4242 4242", "12345678901234567890123"),
        *("DE89 3704 0044 0532 0130 01", "AB12 CDEF GHIJ KLMN", "6214 9832 0257", "マイナンバーは6214 9832 0258です"),
    ],
)
def test_what_only_looks_like_personal_data(text: str) -> None:
    assert list(personal(text)) == []


@pytest.mark.parametrize("piece", ["a", "1 ", "1", "+1", "A1", "a.", "1-", "a@", "AB12 ", "sk-", "-----BEGIN "])
def test_a_long_text_is_searched_in_no_time(piece: str) -> None:
    start = perf_counter()
    text = piece * (100_000 // len(piece))
    assert not has_secret(text)
    assert list(personal(text)) == []
    assert perf_counter() - start < 2


def test_a_text_is_shown_without_them() -> None:
    text = "Mail jo.smith@gmail.com, or ０９０−１２３４−５６７８, with sk-proj-Ab3dE9fGhIjKlMn0pQrStUvWxYz. Bye"
    assert hidden(text) == "Mail jo.***, or ０９０***, with sk-***. Bye"
    assert hidden("nothing to see") == "nothing to see"
    assert hidden(f"a\n-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n{BODY[::-1]}\n{BODY[:20]}==\nb") == "a\n---***\nb"
    assert hidden("09012345678@docomo.ne.jp is mine") == "090*** is mine"
