"""Tokens: the good one is taken, every bad one refused, and nothing of either is told."""

from __future__ import annotations

import asyncio
import builtins
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import jwt as pyjwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from pgchannels import ConfigurationError, MemoryLayer
from pgchannels.web.auth import JWT, Identity, KeysUnavailable
from pgchannels.web.errors import AuthenticationError, SocketError, TokenExpired
from tests.support.tokens import (
    AUDIENCE,
    HIDDEN,
    ISSUER,
    SECRET,
    claims,
    ec_key,
    encode,
    hides,
    jwk,
    private_pem,
    public_pem,
    rsa_key,
    says_nothing,
    token,
)

OPTIONS: dict[str, Any] = {"audience": AUDIENCE, "issuer": ISSUER}


@pytest.fixture(autouse=True)
def _no_token_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level("DEBUG")
    yield
    says_nothing(caplog.text)


async def accepted(verify: JWT, given: str) -> None:
    assert (await verify(given)).user_id == HIDDEN[0]


async def refused(verify: JWT, given: str) -> AuthenticationError:
    with pytest.raises(AuthenticationError) as caught:
        await verify(given)
    hides(caught.value)
    return caught.value


class TestWhatItSays:
    async def test_a_good_token_is_an_identity(self) -> None:
        exp = int(time.time()) + 600
        identity = await JWT(SECRET, algorithms=["HS256"], leeway=5, **OPTIONS)(
            token(exp=exp, iat=exp - 700)
        )
        assert identity.user_id == HIDDEN[0]
        assert identity.token_id == "t-1"
        assert identity.issued_at == datetime.fromtimestamp(exp - 705, UTC)
        assert identity.expires_at == datetime.fromtimestamp(exp + 5, UTC)
        assert identity.claims["note"] == HIDDEN[1]
        says_nothing(f"{identity} {identity!r}")

    async def test_a_fraction_of_the_second_in_which_it_was_made_counts(self) -> None:
        identity = await hs()(token(iat=NOW - 10 + 0.75, exp=NOW + 600.75))
        assert identity.issued_at == datetime.fromtimestamp(NOW - 10 + 0.75, UTC)
        assert identity.expires_at == datetime.fromtimestamp(NOW + 600, UTC)

    async def test_no_token_outlives_a_revocation_because_its_issuers_clock_is_ahead(self) -> None:
        verify = JWT(SECRET, algorithms=["HS256"], leeway=60, **OPTIONS)
        async with MemoryLayer() as layer:
            identity = await verify(token(iat=time.time() + 30, exp=time.time() + 600))
            await layer.revoke(user_id=identity.user_id)
            assert await layer.is_revoked(user_id=identity.user_id, issued_at=identity.issued_at)

    async def test_the_user_may_stand_in_another_claim(self) -> None:
        verify = JWT(SECRET, algorithms=["HS256"], user_claim="uid", **OPTIONS)
        assert (await verify(token(uid=42, sub=None))).user_id == "42"
        for uid in (None, True, 4.2, "", ["a"], "\0", "x" * 1001):
            await refused(verify, token(uid=uid))

    @pytest.mark.parametrize(
        ("algorithm", "key"),
        [
            ("RS256", rsa_key()),
            ("PS512", rsa_key()),
            ("ES256", ec_key()),
        ],
    )
    async def test_key_pairs(self, algorithm: str, key: Any) -> None:
        for public in (public_pem(key), key.public_key(), public_pem(key).encode()):
            verify = JWT(public, algorithms=[algorithm], **OPTIONS)
            assert (await verify(token(key, algorithm))).user_id == HIDDEN[0]

    async def test_leeway(self) -> None:
        late = token(exp=int(time.time()) - 30)
        await accepted(JWT(SECRET, algorithms=["HS256"], leeway=600, **OPTIONS), late)
        await refused(JWT(SECRET, algorithms=["HS256"], **OPTIONS), late)

    async def test_without_expiry_only_if_asked_for(self) -> None:
        forever = token(exp=None)
        await refused(JWT(SECRET, algorithms=["HS256"], **OPTIONS), forever)
        verify = JWT(SECRET, algorithms=["HS256"], require_expiry=False, **OPTIONS)
        assert (await verify(forever)).expires_at is None

    async def test_several_audiences_and_issuers(self) -> None:
        verify = JWT(SECRET, algorithms=["HS256"], audience=["a", "b"], issuer=["x", ISSUER])
        await accepted(verify, token(aud=["b", "c"]))
        await refused(verify, token(aud="c"))

    async def test_an_audience_that_nobody_asked_for(self) -> None:
        verify = JWT(SECRET, algorithms=["HS256"])
        await refused(verify, token())
        await accepted(verify, token(aud=None))


def tampered() -> str:
    header, _, signature = token().split(".")
    return ".".join([header, encode(claims(sub="eve")), signature])


def unsigned(algorithm: object = "none", **header: Any) -> str:
    return f"{encode({'alg': algorithm, 'typ': 'JWT', **header})}.{encode(claims())}."


def confused() -> str:
    """Signed with the public key of the server, as if it were a secret."""
    head, body = encode({"alg": "HS256", "typ": "JWT"}), encode(claims())
    algorithm = pyjwt.algorithms.HMACAlgorithm(pyjwt.algorithms.HMACAlgorithm.SHA256)
    signature = algorithm.sign(f"{head}.{body}".encode(), public_pem(rsa_key()).encode())
    return f"{head}.{body}.{encode(signature)}"


def hs(**options: Any) -> JWT:
    return JWT(SECRET, algorithms=["HS256"], **{**OPTIONS, **options})


def rs() -> JWT:
    return JWT(public_pem(rsa_key()), algorithms=["RS256"], **OPTIONS)


NOW = int(time.time())


class TestSecurityTable:
    @pytest.mark.parametrize(
        ("make", "verify"),
        [
            pytest.param(lambda: token(nbf=NOW + 7200), hs, id="not yet valid"),
            pytest.param(lambda: token(iat=NOW + 7200), hs, id="made in the future"),
            pytest.param(lambda: token(aud="other"), hs, id="wrong audience"),
            pytest.param(lambda: token(aud=None), hs, id="no audience"),
            pytest.param(lambda: token(aud={"chat": 1}), hs, id="audience of no kind"),
            pytest.param(lambda: token(iss="https://evil.example"), hs, id="wrong issuer"),
            pytest.param(lambda: token(iss=None), hs, id="no issuer"),
            pytest.param(lambda: token(exp=None), hs, id="no expiry"),
            pytest.param(lambda: token(exp="soon"), hs, id="expiry of no kind"),
            pytest.param(lambda: token(exp=10**30), hs, id="expiry beyond all times"),
            pytest.param(lambda: token(exp=1e17), hs, id="expiry beyond what C can tell"),
            pytest.param(lambda: token(exp=1e18), hs, id="expiry far beyond that"),
            pytest.param(lambda: token(iat=-1e18), hs, id="made before all times"),
            pytest.param(lambda: token(exp=float("inf")), hs, id="expiry infinite"),
            pytest.param(lambda: token(sub=None), hs, id="nobody"),
            pytest.param(lambda: token(jti="\0"), hs, id="its id is NUL"),
            pytest.param(lambda: token(jti="x" * 1001), hs, id="its id is too long"),
            pytest.param(lambda: token(jti=""), hs, id="its id is empty"),
            pytest.param(lambda: token(jti="\ud800"), hs, id="its id is half a surrogate pair"),
            pytest.param(lambda: token("x" * 64), hs, id="wrong secret"),
            pytest.param(lambda: token(algorithm="HS512"), hs, id="another algorithm"),
            pytest.param(lambda: token(rsa_key(1), "RS256"), rs, id="wrong key"),
            pytest.param(lambda: token(rsa_key(), "PS256"), rs, id="another padding"),
            pytest.param(unsigned, hs, id="alg none"),
            pytest.param(unsigned, rs, id="alg none, key pair"),
            pytest.param(lambda: unsigned("None"), rs, id="alg None"),
            pytest.param(lambda: unsigned("nOnE"), rs, id="alg nOnE"),
            pytest.param(lambda: unsigned(["HS256"]), hs, id="alg of no kind"),
            pytest.param(lambda: unsigned("HS256"), hs, id="no signature"),
            pytest.param(confused, rs, id="key confusion"),
            pytest.param(tampered, hs, id="tampered payload"),
            pytest.param(lambda: token()[:-4] + "AAAA", hs, id="tampered signature"),
            pytest.param(
                lambda: token(headers={"crit": ["exp"], "exp": 0}), hs, id="critical extension"
            ),
            pytest.param(
                lambda: token(headers={"jwk": jwk(ec_key(), "a")}), rs, id="a key of its own"
            ),
            pytest.param(lambda: token(headers={"jku": "https://evil.example"}), rs, id="jku"),
            pytest.param(lambda: f"{encode([])}.{encode({})}.", hs, id="a header that is a list"),
            pytest.param(lambda: "[" * 4000 + ".e.e", hs, id="no base64"),
            pytest.param(
                lambda: f"{encode(b'[' * 4000)}.{encode({})}.", hs, id="nested too deeply"
            ),
            pytest.param(lambda: "a.b.c.d.e", hs, id="an encrypted one"),
            pytest.param(lambda: "x" * 8193, hs, id="too long"),
            pytest.param(lambda: token() + "\n", hs, id="a line more"),
            pytest.param(lambda: "", hs, id="empty"),
            pytest.param(lambda: "ünïcode", hs, id="not ASCII"),
            pytest.param(lambda: "\ud800", hs, id="half a surrogate pair"),
        ],
    )
    async def test_refused(self, make: Any, verify: Any) -> None:
        error = await refused(verify(), make())
        assert not isinstance(error, TokenExpired)
        assert (error.code, error.http_status) == ("invalid_token", 401)

    async def test_expired(self) -> None:
        error = await refused(hs(), token(exp=NOW - 3600))
        assert isinstance(error, TokenExpired)

    async def test_expired_and_forged_is_forged(self) -> None:
        error = await refused(hs(), token("x" * 64, exp=NOW - 3600))
        assert not isinstance(error, TokenExpired)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("key", "options"),
        [
            (SECRET, {"algorithms": []}),
            (SECRET, {"algorithms": "HS256"}),
            (SECRET, {"algorithms": ["none"]}),
            (SECRET, {"algorithms": ["HS256", "none"]}),
            (SECRET, {"algorithms": ["HS1"]}),
            (public_pem(rsa_key()), {"algorithms": ["HS256", "RS256"]}),
            ({"a": SECRET, "b": public_pem(rsa_key())}, {"algorithms": ["HS256", "RS256"]}),
            (public_pem(rsa_key()), {"algorithms": ["HS256"]}),
            (private_pem(rsa_key()), {"algorithms": ["HS256"]}),
            (public_pem(rsa_key()).encode(), {"algorithms": ["HS256"]}),
            (public_pem(rsa_key()), {"algorithms": ["ES256"]}),
            (public_pem(ec_key()), {"algorithms": ["ES256", "RS256"]}),
            (public_pem(ec_key()), {"algorithms": ["ES384"]}),
            (ec.generate_private_key(ec.SECP384R1()).public_key(), {"algorithms": ["ES256"]}),
            (SECRET, {"algorithms": ["RS256"]}),
            ("", {"algorithms": ["HS256"]}),
            ("short", {"algorithms": ["HS256"]}),
            (SECRET[:40], {"algorithms": ["HS512"]}),
            (None, {"algorithms": ["HS256"]}),
            (None, {"algorithms": ["RS256"]}),
            ({}, {"algorithms": ["HS256"]}),
            ({"keys": []}, {"algorithms": ["ES256"]}),
            ({"a": SECRET, "b": "short"}, {"algorithms": ["HS256"]}),
            (jwk(ec_key(), "a", use="enc"), {"algorithms": ["ES256"]}),
            (jwk(ec_key(), "a", alg="ES384"), {"algorithms": ["ES256"]}),
            (jwk(ec_key(), "a", key_ops=["sign"]), {"algorithms": ["ES256"]}),
            (SECRET, {"algorithms": ["HS256"], "audience": ""}),
            (SECRET, {"algorithms": ["HS256"], "audience": []}),
            (SECRET, {"algorithms": ["HS256"], "issuer": ""}),
            (SECRET, {"algorithms": ["HS256"], "leeway": -1}),
            (SECRET, {"algorithms": ["HS256"], "leeway": float("nan")}),
            (SECRET, {"algorithms": ["HS256"], "user_claim": ""}),
        ],
    )
    def test_what_could_not_be_safe_is_refused(self, key: Any, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            JWT(key, **options)
        if isinstance(key, str) and key:
            assert key not in str(caught.value)

    def test_a_weak_rsa_key_is_refused(self) -> None:
        weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
        with pytest.raises(ConfigurationError, match="2048 bits"):
            JWT(weak.public_key(), algorithms=["RS256"])

    def test_without_pyjwt_it_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = builtins.__import__

        def missing(name: str, *args: Any, **options: Any) -> Any:
            if name == "jwt":
                raise ImportError(name)
            return found(name, *args, **options)

        monkeypatch.setattr(builtins, "__import__", missing)
        with pytest.raises(ConfigurationError, match=r"pgchannels\[auth\]"):
            JWT(SECRET, algorithms=["HS256"])


class Server:
    """Somebody who publishes keys, and a clock."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.document: Any = {"keys": [*keys]}
        self.now = 1000.0
        self.fetched = 0
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.asked = asyncio.Event()

    async def fetch(self) -> Any:
        self.fetched += 1
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.document

    def verify(self, **options: Any) -> JWT:
        return JWT(
            self.fetch,
            algorithms=["ES256"],
            clock=lambda: self.now,
            **{"min_refresh": 60.0, **OPTIONS, **options},
        )


def signed(number: int, kid: object) -> str:
    headers = {} if kid is None else {"kid": kid}
    return token(ec_key(number), "ES256", headers)


class TestKeySets:
    async def test_keys_by_their_ids(self) -> None:
        verify = JWT(
            {"old": ec_key(0).public_key(), "new": jwk(ec_key(1), "new")},
            algorithms=["ES256"],
            **OPTIONS,
        )
        await accepted(verify, signed(0, "old"))
        await accepted(verify, signed(1, "new"))
        await refused(verify, signed(0, "new"))
        await refused(verify, signed(0, None))

    @pytest.mark.parametrize(
        "kid",
        [
            "unknown",
            "",
            "../../etc/passwd",
            "/dev/null",
            "old' or '1'='1",
            "old\0",
            "https://evil.example/key",
            "keys",
            "x" * 4000,
        ],
    )
    async def test_hostile_ids_name_no_key(self, kid: str) -> None:
        verify = JWT({"old": SECRET, "new": SECRET[::-1]}, algorithms=["HS256"], **OPTIONS)
        await refused(verify, token(headers={"kid": kid}))
        # Where the id led to an empty file, say, its content would be the key.
        await refused(verify, f"{encode({'alg': 'HS256', 'kid': kid})}.{encode(claims())}.")

    @pytest.mark.parametrize("kid", [1, None, True, ["old"], {"a": 1}])
    async def test_an_id_of_another_kind(self, kid: object) -> None:
        verify = JWT({"old": SECRET, "new": SECRET[::-1]}, algorithms=["HS256"], **OPTIONS)
        await refused(verify, unsigned("HS256", kid=kid))

    async def test_a_set_of_one_needs_no_ids(self) -> None:
        verify = JWT({"keys": [jwk(ec_key(), "a")]}, algorithms=["ES256"], **OPTIONS)
        await accepted(verify, signed(0, None))
        await accepted(verify, signed(0, "a"))
        await refused(verify, signed(0, "b"))

    async def test_keys_that_do_not_fit_are_left_out(self) -> None:
        document = {
            "keys": [
                {"kty": "oct", "k": encode(SECRET.encode()), "kid": "secret"},
                jwk(ec_key(1), "for-encryption", use="enc"),
                jwk(ec_key(2), 7, use="sig"),  # type: ignore[arg-type]
                {"kty": "EC"},
                {"kty": "new"},
                None,
                "key",
                jwk(ec_key(0), "good"),
            ]
        }
        verify = JWT(document, algorithms=["ES256"], **OPTIONS)
        await accepted(verify, signed(0, "good"))
        for number, kid in ((1, "for-encryption"), (2, "7")):
            await refused(verify, signed(number, kid))
        await refused(verify, token(headers={"kid": "secret"}))


class TestRotation:
    async def test_fetched_once_and_again_for_a_new_key(self) -> None:
        server = Server(jwk(ec_key(0), "a"))
        verify = server.verify()
        for _ in range(3):
            await accepted(verify, signed(0, "a"))
        assert server.fetched == 1
        server.document = {"keys": [jwk(ec_key(1), "b")]}
        server.now += 61
        await accepted(verify, signed(1, "b"))
        assert server.fetched == 2
        await refused(verify, signed(0, "a"))

    async def test_ids_that_are_made_up_do_not_make_it_fetch_more(self) -> None:
        server = Server(jwk(ec_key(0), "a"))
        verify = server.verify()
        for number in range(20):
            await refused(verify, signed(1, f"made-up-{number}"))
        assert server.fetched == 1
        server.now += 60
        for number in range(20):
            await refused(verify, signed(1, f"made-up-{number}"))
        assert server.fetched == 2

    async def test_all_that_wait_share_a_fetch(self) -> None:
        server = Server(jwk(ec_key(0), "a"))
        server.gate = asyncio.Event()
        verify = server.verify()
        good = signed(0, "a")
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(verify(good)) for _ in range(10)]
            await server.asked.wait()
            server.gate.set()
        assert [type(task.result()) for task in tasks] == [Identity] * 10
        assert server.fetched == 1

    async def test_one_that_gives_up_neither_stops_the_fetch_nor_begins_another(self) -> None:
        server = Server(jwk(ec_key(0), "a"))
        server.gate = asyncio.Event()
        verify = server.verify()
        for _ in range(5):
            task = asyncio.create_task(verify(signed(1, "unknown")))
            await server.asked.wait()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        last = asyncio.create_task(verify(signed(0, "a")))
        await asyncio.sleep(0)
        server.gate.set()
        assert (await last).user_id == HIDDEN[0]
        assert server.fetched == 1

    def test_keys_are_fetched_in_any_event_loop(self) -> None:
        server = Server(jwk(ec_key(0), "a"))
        verify = server.verify(max_age=0.0)

        async def at_the_same_time() -> None:
            await asyncio.gather(*(verify(signed(0, "a")) for _ in range(3)))

        for _ in range(2):
            asyncio.run(at_the_same_time())
            server.now += 100

    @pytest.mark.parametrize(
        "document", [None, [], {}, {"keys": None}, {"keys": []}, {"keys": [{"kty": "EC"}]}]
    )
    async def test_an_old_set_is_kept(self, document: Any) -> None:
        server = Server(jwk(ec_key(0), "a"))
        verify = server.verify(max_age=100.0)
        await accepted(verify, signed(0, "a"))
        server.document = document
        server.now += 1000
        await accepted(verify, signed(0, "a"))
        assert server.fetched == 2
        with pytest.raises(KeysUnavailable):  # it may be one of the new ones
            await verify(signed(1, "b"))
        server.document = {"keys": [jwk(ec_key(0), "a"), jwk(ec_key(1), "b")]}
        server.now += 5
        await accepted(verify, signed(1, "b"))

    async def test_no_keys_is_not_the_clients_fault(self) -> None:
        server = Server(jwk(ec_key(0), "a"))
        server.error = OSError("the key server is down")
        verify = server.verify()
        for _ in range(3):
            with pytest.raises(KeysUnavailable) as caught:
                await verify(signed(0, "a"))
            assert caught.value.http_status == 503
            hides(caught.value)
        assert server.fetched == 1
        server.error = None
        server.now += 5
        await accepted(verify, signed(0, "a"))

    async def test_a_withdrawn_key_is_noticed(self) -> None:
        server = Server(jwk(ec_key(0), "a"), jwk(ec_key(1), "b"))
        verify = server.verify(max_age=100.0)
        await accepted(verify, signed(0, "a"))
        server.document = {"keys": [jwk(ec_key(1), "b")]}
        await accepted(verify, signed(0, "a"))
        server.now += 100
        await refused(verify, signed(0, "a"))

    async def test_who_has_a_key_does_not_wait_for_newer_ones(self) -> None:
        server = Server(jwk(ec_key(0), "a"))
        verify = server.verify(max_age=100.0)
        await accepted(verify, signed(0, "a"))
        server.now += 100
        server.gate = asyncio.Event()
        server.asked.clear()
        waiting = asyncio.create_task(verify(signed(0, "a")))
        await server.asked.wait()
        await accepted(verify, signed(0, "a"))
        server.gate.set()
        assert (await waiting).user_id == HIDDEN[0]

    def test_a_secret_cannot_be_fetched(self) -> None:
        with pytest.raises(ConfigurationError):
            JWT(Server().fetch, algorithms=["HS256"])


class TestFuzz:
    @given(st.text())
    async def test_any_text(self, text: str) -> None:
        with pytest.raises(SocketError):
            await hs()(text)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["alg", "kid", "typ", "crit", "b64", "zip", "x"]),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=8,
        ),
        st.binary(max_size=30),
    )
    async def test_any_header(self, header: object, rest: bytes) -> None:
        for verify in (hs(), rs()):
            with pytest.raises(SocketError):
                await verify(f"{encode(header)}.{encode(rest)}.{encode(rest)}")

    @given(
        st.dictionaries(
            st.sampled_from(["sub", "exp", "nbf", "iat", "aud", "iss", "jti"]),
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=5)
            | st.lists(st.integers(), max_size=2)
            | st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
        )
    )
    async def test_any_claims_of_a_signed_token(self, changed: dict[str, Any]) -> None:
        given = pyjwt.PyJWS().encode(json.dumps({**claims(), **changed}).encode(), SECRET, "HS256")
        try:
            identity = await hs()(given)
        except SocketError:
            return
        assert identity.user_id == {**claims(), **changed}["sub"]
