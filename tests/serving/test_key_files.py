"""Files of keys and certificates: read as keys and certificates, or refused in a line."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from arriero.errors import SessionError
from arriero.serving.doors import check_certificate, read_keys


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate, its key, the key with a password, and files that are neither."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl makes certificates here")
    folder = tmp_path_factory.mktemp("pem")
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-keyout", str(folder / "key"), "-out", str(folder / "certificate"), "-subj", "/CN=localhost"]
    subprocess.run([*made, *names], check=True, capture_output=True)
    locked = ["openssl", "ec", "-aes128", "-passout", "pass:secret", "-in", str(folder / "key")]
    subprocess.run([*locked, "-out", str(folder / "locked")], check=True, capture_output=True)
    (folder / "garbage").write_bytes(bytes(range(256)))
    (folder / "empty").touch()
    with (folder / "huge").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("garbage", "key", "no certificate and its key"),
        ("certificate", "garbage", "no certificate and its key"),
        ("empty", None, "no certificate and its key"),
        ("certificate", None, "no certificate and its key"),
        ("certificate", "locked", "without a password"),
        ("certificate", "huge", "expected at most 1048576"),
        ("pipe", "key", "is not a file"),
        (None, "key", "--tls-key is given without --tls-certificate"),
    ],
)
def test_files_that_no_tls_can_be_spoken_with_are_refused(
    pem: Path, certificate: str | None, key: str | None, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [None if name is None else pem / name for name in (certificate, key)]
    with pytest.raises(SessionError, match=said) as refused:
        check_certificate(*given)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")  # nobody is asked for a password
    check_certificate(pem / "certificate", pem / "key")


def test_keys_that_no_client_can_send_are_refused(tmp_path: Path) -> None:
    for text in ("a" * 5000, "a\0b", "good\nbad\x1b[2J\n"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(SessionError, match="keys have 1 to 1024 printable characters"):
            read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_text("# mine\nsk-one\n\nschlüssel\n")
    assert len(read_keys(tmp_path / "keys")) == 2
