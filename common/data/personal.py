"""Secrets and personal data in the text of a row, found by pattern and shown masked."""

import re
from collections.abc import Iterator

# Keys of well-known services, each with a text that it cannot be without: to look for that first takes little time.
_SECRETS = tuple(
    (kind, sign, re.compile(pattern, re.ASCII))
    for kind, sign, pattern in (
        # the key itself, not only its first line; in JSON a line break is written as \n
        (
            "private key",
            "-----BEGIN",
            r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY[A-Z ]{0,10}-----(?:\\n|\s)*[\w+/=]{40,}(?:(?:\\n|\s)+[\w+/=]{16,})*",
        ),
        ("AWS key", "IA", r"\bA(?:KIA|SIA)[A-Z2-7]{16}\b"),
        ("GitHub token", "gh", r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b"),
        ("GitHub token", "github_pat_", r"\bgithub_pat_\w{50,255}"),
        ("GitLab token", "glpat-", r"\bglpat-[\w-]{20,255}"),
        ("API key", "sk-", r"\bsk-[\w-]{20,255}"),  # OpenAI, Anthropic and others
        ("Stripe key", "k_live_", r"\b[rs]k_live_[A-Za-z0-9]{20,255}\b"),
        ("Hugging Face token", "hf_", r"\bhf_[A-Za-z]{34}\b"),
        ("Slack token", "xox", r"\bxox[abeoprs]-[\w-]{20,255}"),
        ("Google key", "AIza", r"\bAIza[\w-]{35}"),
        ("JSON Web Token", "eyJ", r"\beyJ[\w-]{8,4096}\.eyJ[\w-]{8,4096}\.[\w-]{16,4096}"),
    )
)
_MADE_UP = re.compile(r"example|your|test|dummy|sample|placeholder|(.)\1{5}", re.IGNORECASE)
_FEW = 10  # different characters: what has fewer is typed, not drawn; so is what has no capital letter

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}\b", re.ASCII)
# Names that RFC 2606 keeps for examples, and git's user, which is everybody's.
_NOBODY = re.compile(r"^git@|[@.]example\.[a-z]+$|\.(?:example|test|invalid|localhost)$|^no-?reply@", re.IGNORECASE)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,5}"  # international
    r"|0\d{1,4}-\d{1,4}-\d{4}|0[5-9]0\d{8}"  # Japan; written together only where it is a mobile's
    r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])",  # North America
    re.ASCII,
)
_FICTION = re.compile(r"555[ .-]?01\d\d$|^(?:\+1)?\D*555\D|^0120")  # kept for films, or a company's free line
_CARD = re.compile(r"(?<![\w.+-])(?<!\d )(?:3[47]|[2-6]\d)\d{2}(?:[ -]?\d){9,15}(?![\w-]| \d)", re.ASCII)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", re.ASCII)
# Twelve digits pass its check digit by chance one time in ten: only beside its name.
_MY_NUMBER = re.compile(r"(?:マイナンバー|個人番号|[Mm]y ?[Nn]umber)\D{0,20}(\d{4}[ -]?\d{4}[ -]?\d{4})(?!\d)")


# Letters that stand for one of ASCII, as a Japanese keyboard writes them; one by one, so that places stay.
_WIDE = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {ord("−"): ord("-"), ord("‐"): ord("-")}
Span = tuple[str, int, int]  # kind, and where it begins and ends


def has_secret(text: str) -> bool:
    return next(_secrets(text), None) is not None


def secrets(text: str) -> Iterator[tuple[str, str]]:
    """`(kind, masked)` of each key or token."""
    return ((kind, masked(text[start:stop])) for kind, start, stop in _secrets(text))


def personal(text: str) -> Iterator[tuple[str, str]]:
    """`(kind, masked)` of each e-mail address, phone, card, account and individual number."""
    return ((kind, masked(text[start:stop])) for kind, start, stop in _personal(text.translate(_WIDE)))


def hidden(text: str) -> str:
    """The text with all of these masked."""
    spans = sorted({(start, stop) for find in (_secrets, _personal) for _, start, stop in find(text.translate(_WIDE))})
    parts, end = list[str](), 0
    for start, stop in spans:
        if start >= end:  # a span within another is masked with it
            parts += [text[end:start], masked(text[start:stop])]
        end = max(end, stop)
    return "".join([*parts, text[end:]])


def _secrets(text: str) -> Iterator[Span]:
    for kind, sign, pattern in _SECRETS:
        for match in pattern.finditer(text) if sign in text else ():
            drawn = len(set(match[0])) >= _FEW and match[0] != match[0].lower() and not _MADE_UP.search(match[0])
            if drawn or kind == "private key":
                yield kind, *match.span()


def _personal(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from (("e-mail address", *m.span()) for m in _EMAIL.finditer(text) if not _NOBODY.search(m[0]))
    if not any(digit in text for digit in "0123456789"):
        return
    from stdnum import iban, luhn
    from stdnum.jp import in_ as my_number

    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if luhn.is_valid(digits) and len(set(digits)) > 3:  # test cards repeat two or three
            yield "card number", *match.span()
    for match in _IBAN.finditer(text):
        if iban.is_valid(match[0]):
            yield "IBAN", *match.span()
    yield from (("My Number", *m.span(1)) for m in _MY_NUMBER.finditer(text) if my_number.is_valid(m[1]))
    for match in _PHONE.finditer(text):
        if 9 <= sum(map(str.isdigit, match[0])) <= 15 and not _FICTION.search(match[0]):
            yield "phone number", *match.span()


def masked(text: str) -> str:
    """Its first three characters: enough to find it by."""
    return f"{text[:3]}***"
