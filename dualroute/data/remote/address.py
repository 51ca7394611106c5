"""Addresses of data sets that lie elsewhere (`dualroute.paths.is_remote` tells them from folders) and of
their files.

s3://bucket/set   https://host/set?token   file:///mnt/set   any other URL that fsspec knows
pipe:aws s3 cp s3://bucket/set/{} -        a command that writes the file {} to its standard output
"""

from __future__ import annotations

import re
import shlex
import urllib.parse

PIPE = "pipe:"


def file_address(address: str, file: str) -> str:
    """Where the file of a set lies: behind the path of a URL, before its query; in place of a command's
    {}."""
    if address.startswith(PIPE):
        return address.replace("{}", shlex.quote(file))
    path, mark, query = address.partition("?") if is_http(address) else (address, "", "")
    name = urllib.parse.quote(file) if is_http(address) else file
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def is_http(address: str) -> bool:
    """Whether our own transfer brings it."""
    return address.lower().startswith(("http://", "https://"))


def shown(address: str) -> str:
    """An address for messages and logs: without the password, and without the query, which may be one."""
    if address.startswith(PIPE):
        return address
    address = re.sub(r"(?<=://)[^/@]*@", "", address)
    return address.partition("?")[0] if is_http(address) else address
