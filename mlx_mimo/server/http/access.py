"""Who may talk to the server: Host, Origin and the API key."""

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ...errors import UsageError
from ..errors import RequestError

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_PORTS = {"http": 80, "https": 443}


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Access:
    host: str  # what the server listens on
    api_key: str | None = None
    allowed_hosts: frozenset[str] = field(default_factory=frozenset)
    allowed_origins: frozenset[str] = field(default_factory=frozenset)

    def check_host(self, header: str | None) -> None:
        """A page of another site may have its name resolve to this machine; the Host header then gives it away."""
        name = _name(header)
        if name is None:
            raise RequestError(400, "Host: a header with this server's name expected")
        if name in LOOPBACK | {self.host.lower()} | self.allowed_hosts:
            return
        if not is_loopback(self.host) and _is_address(name):
            return  # an address cannot be made to resolve to another one
        raise RequestError(403, f"Host: {name[:100]!r} is not this server; allow it with --allowed-hosts")

    def check_origin(self, origin: str | None, host_header: str | None) -> None:
        """A browser names the page that asks. Raises RequestError where it is of another site."""
        if origin is None or self.allowed_origin(origin) is not None:
            return
        here = {_origin(f"{scheme}://{host_header}") for scheme in _PORTS if host_header}
        if _origin(origin) in here - {None}:
            return
        raise RequestError(403, f"Origin: {origin[:100]!r} is not allowed; allow it with --allowed-origins")

    def allowed_origin(self, origin: str | None) -> str | None:
        """The origin as a browser writes it, if it is one of those named to be let in."""
        written = None if origin is None else _origin(origin)
        return written if written in self.allowed_origins else None

    def check_key(self, headers: Mapping[str, str]) -> None:
        if self.api_key is None:
            return
        given = headers.get("x-api-key") or _of_authorization(headers.get("Authorization") or "")
        # Bytes, since compare_digest takes no text beyond ASCII; its time tells nothing about the key.
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.api_key.encode()):
            raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")


def host_name(text: str) -> str:
    """A host for `allowed_hosts`, as it is compared: without port, in lower case. Raises UsageError."""
    name = _name(text) if "/" not in text and "@" not in text else None
    if name is None:
        raise UsageError(f"a host's name expected, {text!r} found")
    return name


def page_origin(text: str) -> str:
    """An origin for `allowed_origins`, as browsers write it. Raises UsageError."""
    origin = _origin(text.removesuffix("/"))
    if origin is None:
        raise UsageError(f"an origin such as https://page.example expected, {text!r} found")
    return origin


def _origin(text: str) -> str | None:
    """scheme://host:port in lower case, without the port that its scheme has anyway; None where it is no origin."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not parts.hostname or text.lower() != f"{parts.scheme}://{parts.netloc.lower()}":
        return None
    if "@" in parts.netloc:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port in (None, _PORTS[parts.scheme]) else f":{port}")


def _of_authorization(value: str) -> str:
    scheme, _, rest = value.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":  # what a browser offers on the residency page: any user, the key as password
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _name(header: str | None) -> str | None:
    """The host of a Host header, without port and brackets."""
    if not header:
        return None
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return False
