"""Personal data in a text: e-mail addresses, public IP addresses and telephone numbers give way to ones of
nobody.

Comes in: text. Goes out: text, and how many of each kind were replaced. What replaces them is set aside for
examples (RFC 2606, RFC 5737, RFC 3849, and the numbers 555-0100 of North America), and always the same: a
stand-in that changed from one to the next would depend on what else the process has read.

Every pattern is anchored to a mark and bounded in length, so that a megabyte without a space costs no more
than another. Names and postal addresses are not found: no pattern tells them.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import Literal

Scrubbed = Literal["email", "ip", "phone"]
KINDS = ("email", "ip", "phone")

_LOCAL = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]"
_EMAIL = re.compile(
    rf"(?<!{_LOCAL})(?P<value>{_LOCAL}{{1,64}}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?\.){{1,8}}"
    r"[A-Za-z]{2,24})(?![A-Za-z0-9-])"
)
_IPV4 = re.compile(r"(?<![A-Za-z0-9_.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\.?[A-Za-z0-9_])")
#: Global unicast addresses begin with 2 or 3, and names in C++ do not.
_IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?![A-Za-z0-9_:])")
_BEFORE, _AFTER = r"(?<![A-Za-z0-9_.+-])", r"(?![A-Za-z0-9_-])"
_PHONES = (
    re.compile(
        r"(?<![A-Za-z0-9_+])\+[0-9]{1,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,5}"
        r"(?:[ .-]?[0-9]{2,5}){1,4}(?![0-9])"
    ),
    re.compile(rf"{_BEFORE}(?:\([0-9]{{3}}\) ?|[0-9]{{3}}[-.])[0-9]{{3}}[-.][0-9]{{4}}{_AFTER}"),
    re.compile(rf"{_BEFORE}(?:86[ -]?)?1[3-9][0-9](?:[ -][0-9]{{4}}[ -][0-9]{{4}}|[0-9]{{8}}){_AFTER}"),
    re.compile(rf"{_BEFORE}0[0-9]{{2,3}}-[0-9]{{7,8}}{_AFTER}"),
)
_NOBODY = {"email": "email@example.com", "ip": "192.0.2.1", "ipv6": "2001:db8::1", "phone": "555-0100"}


def scrub(text: str, kinds: tuple[str, ...]) -> tuple[str, Counter[str]]:
    """The text without personal data of these kinds, and how many there were of each."""
    counts: Counter[str] = Counter()

    def replacing(kind: str, stand_in: str, valid: Callable[[str], bool]) -> Callable[[re.Match[str]], str]:
        def replace(found: re.Match[str]) -> str:
            if found[0] == stand_in or not valid(found[0]):
                return found[0]
            counts[kind] += 1
            return stand_in

        return replace

    if "email" in kinds and "@" in text:
        text = _EMAIL.sub(replacing("email", _NOBODY["email"], lambda value: ".." not in value), text)
    if "ip" in kinds:
        text = _IPV4.sub(replacing("ip", _NOBODY["ip"], _is_public), text)
        if text.count(":") > 1:
            text = _IPV6.sub(replacing("ip", _NOBODY["ipv6"], _is_public), text)
    if "phone" in kinds:
        for pattern in _PHONES:
            text = pattern.sub(replacing("phone", _NOBODY["phone"], _has_digits), text)
    return text, counts


def _is_public(value: str) -> bool:
    try:
        return ipaddress.ip_address(value).is_global
    except ValueError:
        return False


def _has_digits(value: str) -> bool:
    return 8 <= sum(map(str.isdigit, value)) <= 15  # of E.164
