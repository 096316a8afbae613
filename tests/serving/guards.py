"""What guards a server in tests: certificates and a token."""

import subprocess

from continual_transformers_tf.serving.operator_api import Tls


def make_certificates(folder):
    """Make an authority, ca, and what it signs, server and client; and a token."""

    def certificate(name, *options):
        new = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        files = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
        command = ["openssl", "req", *new, "-days", "2", *files, *options]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    certificate("ca")
    hosts = ",".join(f"IP:127.0.0.{i}" for i in range(1, 6))
    for name in ("server", "client"):
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", f"subjectAltName={hosts}")
        certificate(name, *signed)
    (folder / "token").write_text("a secret\n")


def guards(folder):
    """Return the options of a server that needs a client's certificate and the token."""
    return (
        *("--token-file", folder / "token"),
        *("--tls-certificate", folder / "server.pem"),
        *("--tls-key", folder / "server.key"),
        *("--tls-client-ca", folder / "ca.pem"),
    )


def access(folder):
    """Return what a `ct.serving.Client` of such a server needs."""
    return {"token": "a secret", **tls_files(folder)._asdict()}


def tls_files(folder):
    """Return what the operator's calls of such a server need."""
    return Tls(*(str(folder / name) for name in ("ca.pem", "client.pem", "client.key")))
