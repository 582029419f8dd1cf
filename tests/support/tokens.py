"""Tokens to be authenticated by, good and bad, and the requests that they come with."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from starlette.requests import HTTPConnection

SECRET = "a secret of sixty-four characters, which is enough for any HS…".ljust(64, "!")
AUDIENCE = "chat"
ISSUER = "https://login.example"

# Claims and tokens that were made, none of which may ever stand in a log or an exception.
HIDDEN = ["ada-5f1c", "secret-claim-7d20"]


_KEYS: dict[tuple[str, int], Any] = {}


def rsa_key(number: int = 0) -> rsa.RSAPrivateKey:
    """Always the same one of a number."""
    if ("rsa", number) not in _KEYS:
        made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        _KEYS["rsa", number] = made
    found: rsa.RSAPrivateKey = _KEYS["rsa", number]
    return found


def ec_key(number: int = 0) -> ec.EllipticCurvePrivateKey:
    """Always the same one of a number."""
    found: ec.EllipticCurvePrivateKey = _KEYS.setdefault(
        ("ec", number), ec.generate_private_key(ec.SECP256R1())
    )
    return found


def public_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def private_pem(key: rsa.RSAPrivateKey) -> str:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.decode()


def jwk(key: ec.EllipticCurvePrivateKey, kid: str | None, **members: Any) -> dict[str, Any]:
    found: dict[str, Any] = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return {**found, **({} if kid is None else {"kid": kid}), **members}


def claims(**changed: Any) -> dict[str, Any]:
    """What a good token says; None leaves a claim out."""
    now = int(time.time())
    given = {
        "sub": HIDDEN[0],
        "aud": AUDIENCE,
        "iss": ISSUER,
        "exp": now + 600,
        "iat": now,
        "jti": "t-1",
        "note": HIDDEN[1],
        **changed,
    }
    return {name: value for name, value in given.items() if value is not None}


def token(
    key: Any = SECRET,
    algorithm: str = "HS256",
    headers: dict[str, Any] | None = None,
    **changed: Any,
) -> str:
    made = jwt.encode(claims(**changed), key, algorithm, headers)
    HIDDEN.append(made)
    return made


def encode(part: object) -> str:
    """A segment of a token, of JSON or of bytes."""
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def connection(
    *headers: tuple[str, str],
    query: str = "",
    subprotocols: tuple[str, ...] = (),
    scheme: str = "ws",
    kind: str = "websocket",
) -> HTTPConnection:
    """A request as a server hands it on."""
    return HTTPConnection(
        {
            "type": kind,
            "scheme": scheme,
            "path": "/ws",
            "query_string": query.encode("latin-1"),
            "headers": [
                (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers
            ],
            "subprotocols": list(subprotocols),
        }
    )


def bearer(token: str) -> tuple[str, str]:
    return ("Authorization", f"Bearer {token}")


def says_nothing(text: str) -> None:
    """Fail if *text* tells a token, or what one said."""
    for hidden in HIDDEN:
        assert hidden not in text


def hides(error: BaseException) -> None:
    """Fail if an exception, or what it came from, tells a token or what one said."""
    seen: BaseException | None = error
    while seen is not None:
        says_nothing(f"{seen} {seen!r} {vars(seen)}")
        seen = seen.__cause__ or seen.__context__
