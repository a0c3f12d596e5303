"""A wrong command line ends with status 2, names the flag and says what would be right."""

import io
import json

import pytest

from arks import cli, usage
from arks.errors import ArksError
from arks.options import EngineUrl, HostPort, engine_url, host_port, moment, resolve, seconds, unread_variables
from extproc.journal.model import JournalSettings
from extproc.journal.writer import Journal
from extproc.ledger.model import UsageRecord
from extproc.ledger.sqlite import SqliteLedger


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("ARKS_"):
            monkeypatch.delenv(name)


def fails(capsys, *argv, variables=()):
    try:
        status = cli.main(argv)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["up", "--listen", "8080"], "--listen: '8080' is not HOST:PORT; write for example 127.0.0.1:8080"),
        (["up", "--listen", "::1:8080"], "[::1]:8080"),
        (["up", "--admin", "127.0.0.1:x"], "--admin: '127.0.0.1:x': the port must be a number"),
        (["up", "--admin", "127.0.0.1:70000"], "from 0 (any free one) to 65535"),
        (["up", "--policy", "/no/such/place"], "--policy: /no/such/place: no such folder"),
        (["up", "--engine", "https://llm.example"], "TLS to engines is not supported yet"),
        (["up", "--engine", "http://host:8000/api"], "--engine: 'http://host:8000/api': give the server's root"),
        (["up", "--engine", "ftp://host"], "is not an http:// address"),
        (["up", "--engine", "http://:80"], "names no host"),
        (["up", "--engine", "http://a b"], "names no host"),
        (["up", "--engine", "http://[::1"], "is no address; write for example http://[::1]:8000"),
        (["up", "--engine", "http://host:0"], "the port must be a number from 1 to 65535"),
        (["up", "--engine", "http://me:secret@host"], "cannot carry a user or password"),
        (["up", "--transport", "h3"], "--transport: 'h3' is none of h2, grpc_aio"),
        (["up", "--envoy", "/no/envoy"], "--envoy: /no/envoy: no such file"),
        (["up", "--envoy", __file__], f"chmod +x {__file__}"),
        (["up", "--state", __file__], "--state: " + __file__ + " is not a folder"),
        (["up", "--concurrency", "0"], "--concurrency: '0' must be a whole number from 1 on"),
        (["up", "--drain-timeout-s", "soon"], "--drain-timeout-s: 'soon' is no duration; write for example 30s"),
        (["up", "--retain-days", "0.5"], "--retain-days: '0.5' must be a whole number from 1 on"),
        (["extproc"], "--policy is required"),
        (["extproc", "--policy", "/tmp", "--listen", "unix:"], "--listen: unix: needs a path"),
        (["extproc", "--policy", "/tmp", "--listen", "unix:/" + "x" * 107], "the system allows 107"),
        (["extproc", "--policy", "/tmp", "--tls-key", __file__], "--tls-certificate and --tls-key go together"),
        (["extproc", "--policy", "/tmp", "--tls-client-ca", __file__], "--tls-client-ca needs --tls-certificate"),
        (["extproc", "--policy", "/tmp", "--engine", "http://no.such.host.invalid:1"], "does not resolve"),
        (["extproc", "--policy", "/tmp", "--eds-file", "/no/such/eds.json"], "--eds-file: /no/such/eds.json"),
        (["usage", "--since", "yesterday"], "--since: 'yesterday' is no time; write for example 2h (ago)"),
        (["usage", "--limit", "-1"], "--limit"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_values_name_the_flag_and_the_fix(capsys, argv, says):
    error = fails(capsys, *argv)
    assert says in error
    assert "secret" not in error


@pytest.mark.parametrize(
    ("name", "value", "argv"),
    [
        ("ARKS_LISTEN", "8080", ["up"]),
        ("ARKS_TRANSPORT", "h3", ["up"]),
        ("ARKS_ENGINE", "http://a:1,https://b", ["up"]),
        ("ARKS_SINCE", "x", ["usage"]),
    ],
)
def test_a_wrong_variable_is_named_itself(capsys, monkeypatch, name, value, argv):
    monkeypatch.setenv(name, value)
    assert name in fails(capsys, *argv)


def test_a_wrong_flag_is_not_blamed_on_its_variable(capsys, monkeypatch):
    monkeypatch.setenv("ARKS_LISTEN", "127.0.0.1:0")
    error = fails(capsys, "up", "--listen", "127.0.0.1:80000")
    assert "--listen: '127.0.0.1:80000': the port must be a number" in error


def test_another_commands_variable_does_not_get_in_the_way(monkeypatch, tmp_path):
    monkeypatch.setenv("ARKS_TRANSPORT", "h3")
    monkeypatch.setenv("ARKS_STATE", str(tmp_path))
    assert cli.main(["usage"]) == 1  # no ledger there, but the line is fine


def parsed(monkeypatch, *argv):
    taken = {}
    monkeypatch.setattr(cli.up, "run", lambda settings: taken.setdefault("settings", settings) and 0)
    cli.main(["up", *argv])
    return taken["settings"]


def test_flags_win_over_variables_and_variables_over_defaults(monkeypatch):
    assert parsed(monkeypatch).listen == HostPort("127.0.0.1", 8080)
    monkeypatch.setenv("ARKS_LISTEN", ":9000")
    monkeypatch.setenv("ARKS_ENGINE", "http://a:1, http://b:2")
    settings = parsed(monkeypatch)
    assert settings.listen == HostPort("0.0.0.0", 9000)
    assert [engine.host for engine in settings.engines] == ["a", "b"]
    settings = parsed(monkeypatch, "--listen", "[::1]:1", "--engine", "c:3")
    assert settings.listen == HostPort("::1", 1)
    assert [engine.url for engine in settings.engines] == ["http://c:3"]


@pytest.mark.parametrize(
    ("argv", "word", "expected"), [([], "", False), ([], "true", True), ([], "False", False), (["flag"], "", True)]
)
def test_a_flag_without_a_value_has_a_variable_too(monkeypatch, argv, word, expected):
    monkeypatch.setenv("ARKS_METRICS_PER_TOKEN", word)
    flags = ["--metrics-per-token"] if argv else []
    parser = cli._parser()
    chosen = parser.parse_args(["extproc", "--policy", "/tmp", *flags])
    assert cli.extproc_settings(parser, chosen).metrics_per_token is expected


def test_a_variable_of_a_flag_without_a_value_is_true_or_false(monkeypatch, capsys):
    monkeypatch.setenv("ARKS_METRICS_PER_TOKEN", "perhaps")
    assert "ARKS_METRICS_PER_TOKEN: 'perhaps' is none of true, false" in fails(capsys, "extproc", "--policy", "/tmp")


def test_variables_that_nobody_reads_are_found_and_those_of_kubernetes_left_out(monkeypatch):
    for name in ("ARKS_DRAIN_TIMEOUT", "ARKS_REDIS_MASTER_NAME", "ARKS_SCRIPTS_IMAGE", "ARKS_LISTEN", "ARKS_SINCE"):
        monkeypatch.setenv(name, "x")
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50052_TCP", "PORT_50052_TCP_ADDR"):
        monkeypatch.setenv(f"ARKS_EXTPROC_{name}", "x")
    found = unread_variables(cli._parser(), {"ARKS_SCRIPTS_IMAGE"})
    assert found == ["ARKS_DRAIN_TIMEOUT", "ARKS_REDIS_MASTER_NAME"]


def test_the_state_folder_follows_the_desktop_standard(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert parsed(monkeypatch).state == tmp_path / ".local/state/arks"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "x"))
    assert parsed(monkeypatch).state == tmp_path / "x" / "arks"


def test_every_flag_is_explained_with_its_variable(capsys):
    for command in ("up", "extproc", "usage"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for flag in {word.strip("[],;.") for word in text.split() if word.strip("[],;.").startswith("--")}:
            name = "ARKS_" + flag.removeprefix("--").replace("-", "_").upper()
            assert name in text or flag in {"--help", "--json"}, flag


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("arks 0.")


def test_addresses_are_printed_as_clients_reach_them():
    assert host_port("0.0.0.0:80").url() == "http://127.0.0.1:80"
    assert host_port("[::]:80").url() == "http://[::1]:80"
    assert str(host_port("localhost:80")) == "127.0.0.1:80"
    assert engine_url("localhost:8000/v1/") == EngineUrl("http://localhost:8000", "localhost", 8000)
    assert resolve(engine_url("http://localhost:8000")) == ("127.0.0.1:8000",)
    assert resolve(engine_url("http://[::1]:8000")) == ("[::1]:8000",)


def test_durations_and_moments():
    assert (seconds("500ms"), seconds("2h"), seconds("7")) == (0.5, 7200, 7)
    assert moment("2026-01-31") == moment("2026-01-31T00:00:00Z") == moment("2026-01-31T01:00:00+01:00")


@pytest.fixture
def ledger(tmp_path):
    journal = Journal(tmp_path, JournalSettings())
    rows = SqliteLedger(journal)
    journal.start()
    base = {
        "attempt": 1,
        "namespace": "default",
        "endpoint": "qwen",
        "engine": "10.0.0.1:8000",
        "status": 200,
        "completion_tokens": 5,
    }
    base |= {"prompt_tokens": 9, "cached_tokens": 0, "reasoning_tokens": 0, "accuracy": "exact", "duration_ms": 12}
    for number, token in enumerate(("alice", "bob", "alice")):
        rows.append(
            UsageRecord(
                id=f"id{number}",
                request_id=f"request-{number}\x1b[31m",
                time_ms=1_790_000_000_000 + number,
                token=token,
                model="qwen",
                stream=bool(number),
                ttft_ms=3 if number else None,
                **base,
            )
        )
    assert journal.close()
    return tmp_path


def listed(state, **changes):
    chosen = {"as_json": True, "since_s": None, "token": None, "namespace": None, "model": None, "limit": 1000}
    out = io.StringIO()
    assert usage.run(usage.UsageSettings(state=state, **{**chosen, **changes}), out) == 0
    return out.getvalue().splitlines()


def test_usage_lists_rows_for_programs(ledger):
    rows = [json.loads(line) for line in listed(ledger)]
    assert [row["token"] for row in rows] == ["alice", "bob", "alice"]
    expected = {"request_id", "time", "namespace", "model", "endpoint", "engine", "status", "prompt_tokens", "ttft_ms"}
    expected |= {"completion_tokens", "cached_tokens", "reasoning_tokens", "accuracy", "stream", "duration_ms"}
    assert expected <= set(rows[0])
    assert rows[0]["time"] == "2026-09-21T14:13:20.000Z"
    assert len(listed(ledger, token="alice")) == 2
    assert len(listed(ledger, limit=1)) == 1
    assert listed(ledger, since_s=1_800_000_000.0) == []


def test_usage_lists_rows_for_people_and_their_terminals(ledger):
    heading, *rows = listed(ledger, as_json=False)
    assert heading.split()[:3] == ["TIME", "TOKEN", "NAMESPACE"]
    assert len(rows) == 3
    assert not any("\x1b" in row for row in rows), "a client's request id must not steer the terminal"


def test_usage_without_a_ledger_says_where_it_looked(tmp_path, capsys):
    assert cli.main(["usage", "--state", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(ArksError, match="no ledger"):
        listed(tmp_path)
