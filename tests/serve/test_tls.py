"""A server with a certificate, made here."""

import datetime
import http.client
import ipaddress
import json
import ssl
from pathlib import Path

import pytest
from serving import Slow, serving

from dougong.core.errors import ConfigError
from dougong.serve.models import Wanted
from dougong.serve.workers import ThreadWorkers

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine's own address, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dougong test")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, certificate_key = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    certificate_key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, certificate_key


def test_answers_over_tls_and_to_nobody_who_does_not_speak_it(pair: tuple[Path, Path], hollow_bundle: Path) -> None:
    wanted = [Wanted("colours", "1", hollow_bundle)]
    files = {"certificate": pair[0], "certificate_key": pair[1]}
    with serving(
        wanted, workers=lambda _: ThreadWorkers(Slow), batching={"slo_seconds": 2.0}, grpc_port=0, **files
    ) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(pair[0]))
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=10, context=trusting)
        for _ in range(2):  # the second on the same connection
            connection.request("POST", "/v1/predict", b'{"remark": "a"}', {"content-type": "application/json"})
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["said"]) == (200, "a")
        connection.close()

        strict = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=10)
        with pytest.raises(ssl.SSLCertVerificationError):
            strict.request("GET", "/v2/health/live")
        plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        plain.request("GET", "/v2/health/live")
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.getresponse()
        plain.close()

        grpc = pytest.importorskip("grpc")
        from dougong.serve.grpc_server import SERVICE, messages

        trusted = grpc.ssl_channel_credentials(pair[0].read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{server.running.grpc_port}", trusted) as channel:
            live = channel.unary_unary(
                f"/{SERVICE}/ServerLive",
                request_serializer=messages()["ServerLiveRequest"].SerializeToString,
                response_deserializer=messages()["ServerLiveResponse"].FromString,
            )
            assert live(messages()["ServerLiveRequest"](), timeout=10).live


def test_a_certificate_that_is_none_is_told(pair: tuple[Path, Path], tmp_path: Path, hollow_bundle: Path) -> None:
    wanted = [Wanted("colours", "1", hollow_bundle)]
    none = tmp_path / "none.pem"
    cases = (
        ({"certificate": none, "certificate_key": pair[1]}, "is no file"),
        ({"certificate": pair[1], "certificate_key": pair[1]}, "cannot be used"),
        ({"certificate": pair[0]}, "a certificate and its key go together"),
    )
    for files, reason in cases:
        with (
            pytest.raises(ConfigError, match=reason),
            serving(wanted, workers=lambda _: ThreadWorkers(Slow), **files),
        ):
            pass
