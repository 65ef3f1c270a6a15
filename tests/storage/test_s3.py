"""S3: credentials by the usual variables and profiles, and mistakes that are told in a line within seconds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from manyeyes import storage
from manyeyes.data.sources import open_source
from manyeyes.errors import StorageError, UsageError
from manyeyes.storage import s3 as s3_files

SECONDS = 20


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    # No machine in a cloud answers here with credentials of its own.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@contextlib.contextmanager
def within_seconds() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SECONDS


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_variables_say_the_server_and_the_keys(s3, monkeypatch, name):
    use(monkeypatch, {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", name: s3.endpoint})
    storage.write_bytes(f"{s3.bucket_uri}/by-variables", b"content")
    assert storage.read_bytes(f"s3a://{s3.bucket_uri.removeprefix('s3://')}/by-variables") == b"content"


def test_a_profile_says_the_server_and_the_keys(s3, monkeypatch, tmp_path):
    (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-1\nendpoint_url = {s3.endpoint}\n")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    storage.write_bytes(f"{s3.bucket_uri}/by-profile", b"content")
    assert storage.read_bytes(f"{s3.bucket_uri}/by-profile") == b"content"


def test_an_unknown_profile_is_said_in_a_line(s3, monkeypatch):
    use(monkeypatch, {**s3.environment, "AWS_PROFILE": "nobody"})
    with (
        within_seconds(),
        pytest.raises(UsageError, match=r"^s3://pictures can't be opened: .*\(nobody\) .*AWS_PROFILE"),
    ):
        storage.exists(f"{s3.bucket_uri}/x")


def test_without_credentials_it_says_which_variables_to_set(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    with within_seconds(), pytest.raises(UsageError, match=r"^s3://pictures/x: there are no cred.*AWS_ACCESS_KEY_ID"):
        storage.exists(f"{s3.bucket_uri}/x")


def test_a_uri_without_a_bucket_is_refused(s3, monkeypatch):
    use(monkeypatch, s3.environment)
    with pytest.raises(UsageError, match="names no bucket"):
        storage.exists("s3://")
    with pytest.raises(UsageError, match="Invalid bucket name"):
        storage.exists("s3://a b/c")


def test_a_bucket_that_does_not_exist_is_not_made(s3, monkeypatch):
    use(monkeypatch, s3.environment)
    uri = "s3://no-such-bucket/folder"
    assert not storage.exists(uri)
    assert not storage.is_directory("s3://no-such-bucket")
    assert storage.list_files(uri) == []
    with pytest.raises(
        StorageError, match=r"^s3://no-such-bucket/folder/x can't be written: .*bucket does not exist\. "
    ):
        storage.write_bytes(f"{uri}/x", b"content")
    with pytest.raises(FileNotFoundError, match="the bucket no-such-bucket does not exist, and is not made"):
        storage.make_directory(uri)
    assert not storage.exists("s3://no-such-bucket")


def test_a_server_that_is_not_there_is_said_in_a_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    use(monkeypatch, {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"})
    for address, reason in (
        (f"127.0.0.1:{port}", "Connection refused"),
        ("no-such-host.invalid:80", "known|resolution"),
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        with (
            within_seconds(),
            pytest.raises(ConnectionError, match=rf"^s3://pictures can't .* at {address} \(.*{reason}"),
        ):
            storage.exists("s3://pictures/x")


def test_a_server_that_takes_no_connection_is_given_up_within_seconds(monkeypatch, silent_port):
    use(monkeypatch, {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent_port}")
    with within_seconds(), pytest.raises(ConnectionError, match=r"no S3 server answers at .*no answer within 5 s"):
        storage.exists("s3://pictures/x")


def test_a_server_that_takes_connections_and_never_answers_is_given_up_within_seconds(monkeypatch):
    use(monkeypatch, {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"})
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with within_seconds(), pytest.raises(ConnectionError, match="has not answered as an S3 server within 10 s"):
            storage.exists("s3://pictures/x")


@pytest.mark.parametrize("address", ["localhost:9000", "http://localhost:port"])
def test_an_address_that_is_none_is_said_in_a_line(monkeypatch, address):
    use(monkeypatch, {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": address})
    with pytest.raises(UsageError, match=r"^s3://pictures can't be opened: .*Set AWS_ENDPOINT_URL=http://HOST:PORT"):
        storage.exists("s3://pictures/x")


def test_keys_with_two_slashes_in_a_row_are_counted_and_end_no_walk(s3, monkeypatch):
    use(monkeypatch, s3.environment)
    for key in ("cat/1.jpg", "cat//2.jpg", "/3.jpg"):
        storage.write_bytes(f"{s3.bucket_uri}/slashes/{key}", b"content")
    found = list(open_source(f"{s3.bucket_uri}/slashes").entries())
    assert [item.path for item in found] == ["", "cat/", "cat/1.jpg"]
    assert [getattr(item, "reason", None) for item in found] == ["folder_without_a_name"] * 2 + [None]


def test_a_server_that_goes_away_is_an_error_that_another_attempt_may_mend(start_s3_server, monkeypatch, tmp_path):
    with start_s3_server(tmp_path / "log") as server:
        use(monkeypatch, server.environment)
        storage.write_bytes(f"{server.bucket_uri}/x", b"content")
    for attempt in (lambda: storage.read_bytes("s3://pictures/x"), lambda: storage.write_bytes("s3://pictures/x", b"")):
        with within_seconds(), pytest.raises(ConnectionError, match="does not answer") as caught:
            attempt()
        assert not isinstance(caught.value, StorageError)


def test_wrong_keys_and_missing_rights_are_said_in_a_line(start_s3_server, monkeypatch, tmp_path):
    # The bucket and the four calls below come before the server looks at keys.
    with start_s3_server(tmp_path / "log", {"INITIAL_NO_AUTH_ACTION_COUNT": "4"}) as server:
        admin = {"endpoint_url": server.endpoint, "region_name": "us-east-1"}
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        iam = boto3.client("iam", **admin, **keys)
        iam.create_user(UserName="reader")
        reader = iam.create_access_key(UserName="reader")["AccessKey"]
        reads = {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject"], "Resource": "*"}
        policy = {"Version": "2012-10-17", "Statement": [reads]}
        iam.put_user_policy(UserName="reader", PolicyName="reads", PolicyDocument=json.dumps(policy))

        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        use(monkeypatch, {"AWS_ACCESS_KEY_ID": "wrong", "AWS_SECRET_ACCESS_KEY": "wrong"})
        for attempt in (storage.exists, storage.is_directory, storage.list_files, storage.read_bytes):
            with within_seconds(), pytest.raises(PermissionError) as caught:
                attempt("s3://pictures/x")
            assert caught.value.filename == "s3://pictures/x"
            assert caught.value.strerror

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", reader["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", reader["SecretAccessKey"])
        assert storage.list_files("s3://pictures") == []
        with within_seconds(), pytest.raises(StorageError, match=r"^s3://pictures/x can't be written: ") as denied:
            storage.write_bytes("s3://pictures/x", b"content")
        assert "\n" not in str(denied.value)


def test_a_file_is_sent_by_one_put(s3, monkeypatch):
    use(monkeypatch, s3.environment)
    uri = f"{s3.bucket_uri}/one-put"
    storage.write_bytes(uri, bytes(120 << 20))  # s3fs would send this in parts
    found = boto3.client(
        "s3", endpoint_url=s3.endpoint, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    ).head_object(Bucket="pictures", Key="one-put")
    assert found["ContentLength"] == 120 << 20
    assert "-" not in found["ETag"]  # the number of parts would stand there
    storage.remove(uri)


def test_a_file_that_one_put_can_not_hold_is_refused(s3, monkeypatch):
    use(monkeypatch, s3.environment)
    monkeypatch.setattr(s3_files, "MAX_PUT_BYTES", 1000)
    with pytest.raises(StorageError, match=r"large can't be written: it has 1,001 bytes and S3 takes 1,000 in one PUT"):
        storage.write_bytes(f"{s3.bucket_uri}/large", bytes(1001))
    assert not storage.exists(f"{s3.bucket_uri}/large")


def test_the_command_line_says_it_in_one_line(s3, tmp_path):
    environment = {**os.environ, **s3.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    command = [str(Path(sys.executable).parent / "manyeyes"), "ingest", "s3://pictures/photos", str(tmp_path / "out")]
    with within_seconds():
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "manyeyes: error: s3://pictures can't be opened: no S3 server answers"
    )
    assert "Traceback" not in done.stderr
