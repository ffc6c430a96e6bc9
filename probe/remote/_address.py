"""Addresses and keys: what may be one.

>>> check_address("http://localhost:8001", "give an address", "MY_KEY").port
8001
"""

from urllib.parse import SplitResult, urlsplit

from probe.errors import ProbeError


def check_address(url: str, complaint: str, variable: str) -> SplitResult:
    """The parts of a server's address.

    Args:
        url: The address.
        complaint: What to say of one that is none.
        variable: Where a key belongs.

    Raises:
        ProbeError: It is none, or holds a name and a password.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half of an IPv6 address, a port that is no number
        sound = False
    if not sound or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise ProbeError(f"{complaint}, http://host:port")
    if parts.username or parts.password:
        raise ProbeError(f"leave name and password out of the address; a key goes into {variable}")
    return parts


def check_key(key: str, variable: str) -> None:
    """Check that a key can be sent.

    Raises:
        ProbeError: It cannot; the message does not repeat it.
    """
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ProbeError(f"{variable} holds characters that no key has")
