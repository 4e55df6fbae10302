"""Configuration files and the default places."""

from __future__ import annotations

import argparse
import os
import pwd
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from spilld.__main__ import main
from spilld.auth.keyring import default_folder
from spilld.config.config import Config
from spilld.config.settings import given
from spilld.errors import ConfigError
from spilld.protocol.address import check_address, default_address

EXAMPLE = Path(__file__).parents[2] / "systemd" / "spilld.toml"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spilld.toml"
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.delenv(f"{name}_DIRECTORY", raising=False)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_defaults() -> None:
    config = Config.load()
    assert config == Config()
    assert (config.model, config.format, config.dtype) == ("smollm2-135m", "k8v4", "bfloat16")
    assert (config.host_budget, config.disk_budget, config.device_budget) == (2 * 2**30, 16 * 2**30, None)
    assert config.state == Path.home() / ".local/state/spilld"
    assert config.cache == Path.home() / ".cache/spilld"


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "a"\nhost_budget = "512MiB"\nmax_queue = 3\ndrain_seconds = 5\n')
    config = Config.load(path, {"model": "b", "format": None, "state": tmp_path, "threads": 2})
    assert (config.model, config.host_budget, config.max_queue, config.format) == (
        "b",
        512 * 2**20,
        3,
        "k8v4",
    )
    assert (config.state, config.threads) == (tmp_path, 2)
    assert type(config.drain_seconds) is float


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("512MiB", 512 * 2**20),
        ("2 GiB", 2 * 2**30),
        (" 1.5GiB ", 3 * 2**29),
        ("1TiB", 2**40),
        ("3 kB", 3000),
        ("0.1GB", 100_000_000),
        ("7B", 7),
        ("8G", 8 * 2**30),
        ("512M", 512 * 2**20),
        ("64k", 64 * 2**10),
        ("2T", 2 * 2**40),
        ("8gib", 8 * 2**30),
        ("8gb", 8 * 10**9),
        ("1e9", 10**9),
        (1e9, 10**9),
        ("1.5e9", 1_500_000_000),
    ],
)
def test_sizes(given: object, size: int) -> None:
    assert Config.load(None, {"host_budget": given}).host_budget == size


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("host_budget", "2GB!", "host_budget is '2GB!'; allowed: bytes, or a string such as"),
        ("host_budget", "2X", "host_budget is '2X'"),
        ("host_budget", "2Gi", "host_budget is '2Gi'"),
        ("host_budget", "1e99", "host_budget is '1e99'"),
        ("host_budget", "\u0662G", "host_budget is "),
        ("host_budget", -1, "host_budget is -1"),
        ("host_budget", 1.5, "host_budget is 1.5"),
        ("host_budget", True, "host_budget is True"),
        ("disk_budget", "-1GiB", "disk_budget is '-1GiB'"),
        ("format", "int2", "format is 'int2'; allowed: exact, int8, k8v4, int4"),
        ("dtype", "float16", "dtype is 'float16'; allowed: float32, bfloat16"),
        ("model", "", "model is ''"),
        ("state", "relative/path", "state is 'relative/path'; allowed: a full path"),
        ("cache", 3, "cache is 3"),
        ("chunk_tokens", 0, "chunk_tokens is 0; allowed: an integer from 1 to 65536"),
        ("max_context", "many", "max_context is 'many'"),
        ("max_queue", 0, "max_queue is 0"),
        ("max_open", 0, "max_open is 0; allowed: an integer from 1 to 65536"),
        ("max_rate", 0, "max_rate is 0; allowed: a finite number above 0"),
        ("drain_seconds", -1, "drain_seconds is -1; allowed: a finite number from 0"),
        ("read_deadline_s", 0, "read_deadline_s is 0; allowed: a finite number above 0"),
        ("threads", 0, "threads is 0"),
        ("context_ttl_s", float("nan"), "context_ttl_s is nan"),
        ("listen", "tcp://0.0.0.0:1", "listen is 'tcp://0.0.0.0:1'; allowed"),
        ("metrics", "0.0.0.0:9470", "metrics is '0.0.0.0:9470'; allowed: a port of the loopback"),
        ("metrics", 9470, "metrics is 9470; allowed: a string"),
        ("open_to_group", 1, "open_to_group is 1; allowed: true or false"),
        ("colour", "red", "unknown setting 'colour'; allowed: model, format, "),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load(None, {key: value})
    assert says in str(caught.value)
    literal = repr(value).replace("True", "true").replace("'", '"')
    with pytest.raises(ConfigError) as caught:
        Config.load(write(tmp_path, f"# here\n\n{key} = {literal}\n"))
    assert str(caught.value).startswith(f"{tmp_path}/spilld.toml, line 3: {says}")


def test_a_wrong_value_is_named_where_it_is(tmp_path: Path) -> None:
    """Whatever line of the example is made wrong; an option of the command line has no line."""
    lines = re.sub(r"^# ([a-z_]+ = )", r"\1", EXAMPLE.read_text(), flags=re.M).split("\n")
    for number, line in enumerate(lines, 1):
        if setting := re.match(r"[a-z_]+(?= = )", line):
            wrong = [*lines[: number - 1], f"{setting[0]} = [", "]", *lines[number:]]
            path = write(tmp_path, "\n".join(wrong))
            with pytest.raises(ConfigError) as caught:
                Config.load(path)
            assert str(caught.value).startswith(f"{path}, line {number}: {setting[0]} is []; allowed: ")
            with pytest.raises(ConfigError) as caught:
                Config.load(path, {setting[0]: []})
            assert str(caught.value).startswith(f"{setting[0]} is []; allowed: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Config.load(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"is not TOML: .*line 2"):
        Config.load(write(tmp_path, 'model = "a"\nhost_budget = GiB\n'))
    (tmp_path / "latin").write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match="is not TOML: line 1 is not UTF-8"):
        Config.load(tmp_path / "latin")
    with pytest.raises(ConfigError, match="is not TOML"):
        Config.load(write(tmp_path, "model = " + "[" * 100_000))


def test_folders_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/x/state")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/full")
    config = Config.load(None, {"state": None})
    assert (config.state, config.cache) == (Path("/x/state/spilld"), Path.home() / ".cache/spilld")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/spilld:/var/lib/other")
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/spilld")
    config = Config()
    assert (config.state, config.cache) == (Path("/var/lib/spilld"), Path("/var/cache/spilld"))
    assert Config.load(None, {"state": "~/kv"}).state == Path.home() / "kv"


def test_default_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_address({}) == "ipc:///run/spilld/spilld.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_address({}) == f"ipc://{Path.home()}/.local/state/spilld/spilld.sock"
    user = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert default_address(user) == "ipc:///run/user/7/spilld/spilld.sock"
    assert default_address(user | {"RUNTIME_DIRECTORY": "/run/a:/run/b"}) == "ipc:///run/a/spilld.sock"


@pytest.mark.parametrize(
    "given",
    [
        "ipc:///a/b",
        "ipc:///" + "a" * 106,
        "tcp://127.0.0.1:80",
        "tcp://127.9.9.9:0",
        "tcp://[::1]:5",
        "tcp://127.0.0.1:*",
    ],
)
def test_good_addresses(given: str) -> None:
    assert check_address(given) == check_address(given, keyed=True) == given


@pytest.mark.parametrize(
    "given",
    [
        "ipc://",
        "ipc://relative",
        "ipc://*",
        "ipc://@abstract",
        "ipc:///" + "a" * 107,
        "tcp://0.0.0.0:80",
        "tcp://*:80",
        "tcp://lo:80",
        "tcp://[::]:80",
        "tcp://192.168.0.1:80",
        "tcp://127.0.0.1.example.org:80",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:80;127.0.0.1:81",
        "inproc://x",
        "/run/spilld.sock",
    ],
)
def test_bad_addresses(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_address(given)
    assert repr(given) in str(caught.value)
    assert "allowed" in str(caught.value)


@pytest.mark.parametrize("given", ["tcp://0.0.0.0:80", "tcp://*:80", "tcp://[::]:*", "tcp://eth0:80"])
def test_addresses_that_need_keys(tmp_path: Path, given: str) -> None:
    assert check_address(given, keyed=True) == given
    path = write(tmp_path, f'listen = "{given}"')
    with pytest.raises(ConfigError, match=r"without keys.*`spilld keys`"):
        Config.load(path)
    assert Config.load(path, {"keys": "/etc/spilld/keys"}).listen == given


@pytest.mark.parametrize("given", ["127.0.0.1:9470", "127.9.9.9:0", "[::1]:65535"])
def test_metrics_on_the_loopback(given: str) -> None:
    assert Config().metrics is None
    assert Config.load(None, {"metrics": given}).metrics == given
    assert Config.load(None, {"metrics": "localhost:9470"}).metrics == "127.0.0.1:9470"


@pytest.mark.parametrize(
    "given", ["", "9470", ":9470", "*:9470", "[::]:9470", "::1:9470", "10.0.0.1:9470", "127.0.0.1:65536"]
)
def test_metrics_elsewhere_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"metrics is .*allowed"):
        Config.load(None, {"metrics": given})


def test_options_are_read_as_the_file_is() -> None:
    """Each as its setting has it: a model may be called 7, a size has units."""
    texts = {"model": "7", "host_budget": "1e9", "threads": "4", "max_rate": "2", "open_to_group": "true"}
    options = argparse.Namespace(**(dict.fromkeys(each.name for each in fields(Config)) | texts))
    config = Config.load(None, given(options))
    assert (config.model, config.host_budget, config.threads) == ("7", 10**9, 4)
    assert (config.max_rate, config.open_to_group) == (2.0, True)
    options.open_to_group = "yes"
    with pytest.raises(ConfigError, match="open_to_group is 'yes'; allowed: true or false"):
        Config.load(None, given(options))


def test_a_home_that_nobody_knows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME is unset, and the user's id has no name."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for find, instead in (
        (Config, "XDG_STATE_HOME"),
        (lambda: default_address({}), "XDG_RUNTIME_DIR"),
        (lambda: default_folder({}), "XDG_CONFIG_HOME"),
    ):
        with pytest.raises(ConfigError, match=f"your home directory is not known; set HOME, or {instead}"):
            find()
    assert Config(state=Path("/a"), cache=Path("/b"), listen="ipc:///c").state == Path("/a")


def test_the_example_is_made_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """To change it, change them, and write `spilld config` to it."""
    assert main(["config"]) == 0
    assert capsys.readouterr().out == EXAMPLE.read_text()


def test_the_example_shows_every_setting_with_its_default() -> None:
    assert Config.load(EXAMPLE) == Config()
    named = [name for _, name in re.findall(r"^(# )?([a-z_]+) = ", EXAMPLE.read_text(), flags=re.M)]
    assert named == [field.name for field in fields(Config)]
    uncommented = re.sub(r"^# ([a-z_]+ = )", r"\1", EXAMPLE.read_text(), flags=re.M)
    assert len(tomllib.loads(uncommented)) == len(named)
    Config.load(None, tomllib.loads(uncommented))
