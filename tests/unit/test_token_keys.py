from __future__ import annotations

import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from carillon.errors import InvalidInputError, UnauthenticatedError
from carillon.jwks_url import check_jwks_url
from carillon.token_keys import PublicKey, TokenKeys, parse_jwks
from carillon.tokens import token_id, unknown_key, verify

NOW = 1_700_000_000_500
SECRETS = ("the secret of today, long enough!", "the secret of yesterday, long en.")
CLAIMS: dict[str, Any] = {"sub": "ann", "tenant": "acme", "exp": NOW // 1000 + 60}
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())


def jwk_of(key: Any, **members: Any) -> dict[str, Any]:
    """The public half as a JWK."""
    algorithm: Any = (
        jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    )
    return {**json.loads(algorithm.to_jwk(key.public_key())), **members}


JWKS = {"keys": [jwk_of(RSA, kid="r", use="sig"), jwk_of(EC, kid="e")]}


def signed(key: Any, algorithm: str, kid: str | None = None, claims: Any = CLAIMS) -> str:
    return jwt.encode(claims, key, algorithm, {} if kid is None else {"kid": kid})


@pytest.mark.parametrize(("key", "algorithm", "kid"), [(RSA, "RS256", "r"), (EC, "ES256", "e")])
def test_a_published_key_verifies(key: Any, algorithm: str, kid: str) -> None:
    """Tokens signed with a key of the JWK Set are taken."""
    keys = TokenKeys(SECRETS, parse_jwks(JWKS))
    assert verify(signed(key, algorithm, kid), keys, NOW).user == "ann"


def test_both_secrets_verify_while_they_overlap() -> None:
    """During a rotation the former secret signs, too; afterwards it does not."""
    for secret in SECRETS:
        assert verify(jwt.encode(CLAIMS, secret), TokenKeys(SECRETS), NOW).user == "ann"
    with pytest.raises(UnauthenticatedError, match="signature"):
        verify(jwt.encode(CLAIMS, SECRETS[1]), TokenKeys(SECRETS[:1]), NOW)


def test_a_public_key_is_no_secret() -> None:
    """A token signed by HMAC with the public key as its secret is refused (RFC 8725 §2.1)."""
    public = EC.public_key()
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head, body, _ = signed(EC, "ES256", "e").split(".")
    import base64
    import hashlib
    import hmac

    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"e","typ":"JWT"}').decode().rstrip("=")
    mac = base64.urlsafe_b64encode(hmac.new(pem, f"{head}.{body}".encode(), hashlib.sha256).digest())
    with pytest.raises(UnauthenticatedError):
        verify(f"{head}.{body}.{mac.decode().rstrip('=')}", TokenKeys(SECRETS, parse_jwks(JWKS)), NOW)


@pytest.mark.parametrize(
    "token",
    [
        signed(RSA, "RS256", "e"),  # the kid of another key
        signed(RSA, "RS256"),  # no kid
        signed(RSA, "PS256", "r"),  # an algorithm that is not the key's
        signed(rsa.generate_private_key(public_exponent=65537, key_size=2048), "RS256", "r"),
        signed(RSA, "RS256", "r")[:-6] + "AAAAAA",
        jwt.encode(CLAIMS, None, "none"),
    ],
)
def test_other_keys_do_not(token: str) -> None:
    """Another key, kid or algorithm is refused."""
    with pytest.raises(UnauthenticatedError):
        verify(token, TokenKeys(SECRETS, parse_jwks(JWKS)), NOW)


def test_only_a_missing_public_key_asks_for_new_ones() -> None:
    """A token signed with a secret, or with a known key, gives no reason to read the JWK Set again."""
    keys = TokenKeys(SECRETS, parse_jwks(JWKS))
    assert unknown_key(signed(EC, "ES256", "new"), keys)
    assert not unknown_key(signed(EC, "ES256", "e"), keys)
    assert not unknown_key(jwt.encode(CLAIMS, SECRETS[0]), keys)
    with pytest.raises(UnauthenticatedError):
        unknown_key("nonsense", keys)


@pytest.mark.parametrize(
    "entry",
    [
        jwk_of(RSA, use="enc"),
        jwk_of(RSA, alg="RS512"),
        jwk_of(ec.generate_private_key(ec.SECP384R1())),
        jwk_of(rsa.generate_private_key(public_exponent=65537, key_size=1024)),
        {**jwk_of(RSA), "d": "AQAB"},
        {"kty": "oct", "k": "c2VjcmV0"},
        {"kty": "RSA", "n": 5},
        {},
        "text",
    ],
)
def test_unusable_keys_are_left_out(entry: Any) -> None:
    """Keys for other uses, weak ones, symmetric ones and nonsense do not hinder the usable ones."""
    assert set(parse_jwks({"keys": [entry, jwk_of(EC, kid="e")]})) == {"e"}


@pytest.mark.parametrize("document", [None, [], {}, {"keys": {}}, "x"])
def test_what_is_no_set_is_refused(document: Any) -> None:
    """Anything but an object with an array `keys` is an error."""
    with pytest.raises(InvalidInputError):
        parse_jwks(document)


def test_urls() -> None:
    """Keys come over https, or over http from this machine."""
    for good in (
        "https://id.example/jwks",
        "http://127.0.0.1:80/x",
        "http://localhost/x",
        "http://[::1]:1/x",
    ):
        assert check_jwks_url(good) == good
    for bad in (
        "http://id.example/jwks", "ftp://id.example/x", "https://", "x", "", "https://a:b@c/x", "https://a:99999/",
        "https://a/ b", "http://127.0.0.1.example/x", "https://" + "a" * 3000,
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            check_jwks_url(bad)


def test_a_token_has_one_id() -> None:
    """The id names what was signed, whatever is done to the signature."""
    token = signed(EC, "ES256", "e")
    assert (
        token_id(token) == token_id(token.rpartition(".")[0] + ".AAAA") != token_id(signed(EC, "ES256", "f"))
    )
    assert PublicKey("ES256", EC.public_key()).algorithm == "ES256"
