"""The command line: `dicom-xai run | check | demo | explain | explain-model | send | ledger` ...

Data goes to standard output, everything else to standard error. Exit codes: 0 all is well, 1
something to look at, 2 it cannot be done. Commands import what they need when they run, so that
`--help`, the receiver and the sender never load torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dicom_xai import __version__
from dicom_xai.config import (
    ClientTLS,
    Config,
    Destination,
    ModelCard,
    load,
    nearest,
    parse,
    parse_address,
)
from dicom_xai.errors import ConfigError, DicomXaiError
from dicom_xai.ledger import Ledger
from dicom_xai.service.role import RoleName

if TYPE_CHECKING:
    from dicom_xai.audit import Recorder

app = typer.Typer(
    name="dicom-xai",
    help="A DICOM service that sends explained AI results back to the PACS within two seconds.\n\n"
    "Research only: not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ledger_app = typer.Typer(
    help="Look at what is known about studies, jobs and deliveries, and act on them.",
    no_args_is_help=True,
)
app.add_typer(ledger_app, name="ledger")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ConfigOption = Annotated[
    Path,
    typer.Option("--config", "-c", help="The service's config file.", show_default=True),
]
DEFAULT_CONFIG = Path("config/dicom-xai.yaml")
#: Columns of a table that no terminal shows.
WIDEST = 2_000


def main() -> None:
    """Run a command; errors of ours become one clear sentence and exit code 2."""
    try:
        app()
    except DicomXaiError as error:
        for line in str(error).splitlines():
            err.print(line, markup=False, soft_wrap=True)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dicom-xai {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: ConfigOption = DEFAULT_CONFIG,
    role: Annotated[
        RoleName | None, typer.Option(help="Run this role alone; default: all, supervised.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of a worker: auto, cpu or cuda:N.")] = "auto",
) -> None:
    """Serve: receive studies, triage them, deliver results. SIGHUP reloads, SIGTERM stops.

    What it says are events, one JSON object a line, a config that is wrong with it: `check` says
    that for people.
    """
    from dicom_xai.service.role import Context, Role, run_role
    from dicom_xai.telemetry import Log

    if role is None:
        from dicom_xai.service.supervisor import Supervisor

        raise typer.Exit(Supervisor(config, Log()).run())

    def make(context: Context) -> Role:
        if role is RoleName.RECEIVER:
            from dicom_xai.service.receiver import Receiver

            return Receiver(context)
        if role is RoleName.SENDER:
            from dicom_xai.service.sender import Sender

            return Sender(context)
        from dicom_xai.service.worker import Worker

        return Worker(context, device)

    raise typer.Exit(run_role(role, config, make, Log()))


@app.command()
def check(
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Prove a config without serving it: files, names, routes' tests, models' self-tests.

    Exit code 0: clean. 1: warnings only. 2: errors.
    """
    from dicom_xai.service.check import check as run_check

    report = run_check(config)
    if as_json:
        problems = [{**asdict(problem), "file": str(problem.file)} for problem in report.problems]
        models = [asdict(model) for model in report.models]
        typer.echo(json.dumps({"problems": problems, "models": models}, indent=2))
        raise typer.Exit(report.exit_code)
    for problem in report.problems:
        out.print(str(problem), markup=False, soft_wrap=True)
    for model in report.models:
        identical = "bit-identical" if model.is_bit_identical else "within tolerance"
        nodes = ", ".join(f"{count} on {name}" for name, count in model.backward_nodes.items())
        gradient = (
            f"cannot be differentiated as a whole ({model.no_gradient})"
            if model.gradient_error is None
            else f"gradient within {model.gradient_error:.1%} of finite differences"
        )
        out.print(
            f"model {model.model} {model.version} on {model.device}: prediction {identical} to the "
            f"plain model, {gradient}, {model.explainer} of {model.layer}, "
            f"appended nodes {nodes or 'fused'}, "
            f"{model.seconds_per_image * 1e3:.1f} ms an image "
            f"({model.plain_seconds_per_image * 1e3:.1f} without explanation)",
            markup=False,
            soft_wrap=True,
        )
        for method, reason in model.does_not_apply.items():
            out.print(f"  {method} does not apply: {reason}", markup=False, soft_wrap=True)
    words = {0: "clean", 1: "works, with warnings", 2: "has errors: not usable"}
    out.print(f"{config}: {words[report.exit_code]}", markup=False, soft_wrap=True)
    raise typer.Exit(report.exit_code)


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where results go; default: a new folder here.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on serving until Ctrl-C, to look at the metrics.")
    ] = False,
) -> None:
    """Start everything, send phantom studies over real C-STORE, show what came back."""
    from dicom_xai.demo.show import show

    raise typer.Exit(show(folder, keep, out))


@app.command()
def explain(
    files: Annotated[list[Path], typer.Argument(help="DICOM files.", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option("--model", help="Name of a model card.")],
    folder: Annotated[Path, typer.Option("--out", help="Where results go; made when absent.")],
    method: Annotated[str, typer.Option("--method", help="How to explain.")] = "grad-cam",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    models: Annotated[
        Path | None, typer.Option("--models", help="Folder of model cards; default: the bundled.")
    ] = None,
) -> None:
    """Run the pipeline on files, without network: writes SC and SEG as DICOM, and PNG pictures."""
    from dicom_xai.explain import EXPLAINERS
    from dicom_xai.infer.session import resolve_device
    from dicom_xai.service.files import explain_files, write_results

    card = _card(model, models)
    if method not in EXPLAINERS:
        raise ConfigError(f"no method {method!r}{nearest(method, list(EXPLAINERS))}")
    folder.mkdir(parents=True, exist_ok=True)
    worst = 0
    for unit in explain_files(files, card, resolve_device(device), method):
        if unit.outcome is None:
            err.print(f"{unit.unit.key}: {unit.reason}", markup=False, soft_wrap=True)
            worst = 1
            continue
        findings = ", ".join(
            f"{finding.name} {finding.score:.2f}{' *' if finding.is_positive else ''}"
            for finding in unit.outcome.explanation.findings
        )
        out.print(f"{unit.unit.key}: {findings}", markup=False, soft_wrap=True)
        for path in write_results(unit, folder):
            out.print(f"  {path}", markup=False, soft_wrap=True)
    raise typer.Exit(worst)


@app.command("explain-model")
def explain_model(
    model: Annotated[Path, typer.Argument(help="An ONNX file.", exists=True, dir_okay=False)],
    to: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    method: Annotated[str, typer.Option("--method", help="How to explain.")] = "grad-cam",
    layer: Annotated[
        str,
        typer.Option("--layer", help="Tensor a CAM method looks at; auto: last before pooling."),
    ] = "auto",
    output: Annotated[
        str | None, typer.Option("--output", help="Explained output; default: the first.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", help="Input to explain; default: the first that holds an image."),
    ] = None,
    low: Annotated[
        float | None,
        typer.Option("--low", help="Lowest value of that input; lrp-epsilon-gamma-box needs it."),
    ] = None,
    high: Annotated[float | None, typer.Option("--high", help="Highest value of it.")] = None,
    backgrounds: Annotated[
        Path | None,
        typer.Option("--backgrounds", help="Typical images (.npy), for expected-gradients."),
    ] = None,
) -> None:
    r"""Compile an explanation into any ONNX model: one run gives prediction and heatmap.

    The new file keeps the model's inputs and outputs. Added: input `target`, int64 \[batch], the
    class to explain, -1 for the top one; output `attribution`, float32 \[batch, 1, ...spatial].
    """
    from dicom_xai.autodiff.file import expected_gradients, explain_file
    from dicom_xai.autodiff.methods import METHODS

    known = [*METHODS, "expected-gradients"]
    if method not in known:
        near = nearest(method, known) or f"; known: {', '.join(known)}"
        raise ConfigError(f"no method {method!r}{near}")
    box = _box(low, high)
    takers = [name for name, each in METHODS.items() if each.takes_box]
    if box is not None and method not in takers:
        raise ConfigError(
            f"--low and --high mean nothing to {method}; they are for {', '.join(takers)}"
        )
    if (backgrounds is not None) != (method == "expected-gradients"):
        raise ConfigError("--backgrounds and --method expected-gradients go together: give both")
    way = method if backgrounds is None else expected_gradients(backgrounds)
    report = explain_file(model, to, way, layer=layer, output=output, image=image, box=box)
    out.print(f"{to}: {report.method} of {report.output}", markup=False, soft_wrap=True)
    shape = " x ".join("free" if size is None else str(size) for size in report.layer_shape)
    out.print(f"  map on the grid of {report.layer} ({shape})", markup=False, soft_wrap=True)
    out.print(f"  {len(report.backward)} nodes added, none of the model's changed")
    if report.equals:
        same = ", ".join(report.equals)
        out.print(f"  on this model the same as {same}: no independent evidence", soft_wrap=True)
    for warning in report.warnings:
        out.print(f"  note: {warning}", markup=False, soft_wrap=True)


@app.command()
def send(
    files: Annotated[list[Path], typer.Argument(help="DICOM files or folders.", exists=True)],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="AE@HOST:PORT, as PACS@10.0.0.5:104, or a destination of the config."
        ),
    ],
    calling: Annotated[
        str | None, typer.Option(help="Our AE title towards an address; default: DICOM_XAI.")
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca", help="PEM: who signs the certificate at the address. Turns TLS on."
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None,
        typer.Option("--tls-certificate", help="PEM: ours, where the address asks for one."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", help="PEM: its key, mode 0600 or 0640.")
    ] = None,
    tls_name: Annotated[
        str | None,
        typer.Option("--tls-name", help="The name in its certificate, where that is not HOST."),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Send DICOM files by C-STORE over one association, and show each answer.

    To a destination of the config, by its name, with the terms that stand there: AE titles and TLS.
    To any other address with those of the options; plain without --tls-ca.
    """
    from dicom_xai.deliver.by_hand import send_files
    from dicom_xai.dimse import answer_of

    tls = _tls(tls_ca, tls_certificate, tls_key, tls_name)
    if "@" in to:
        destination = parse_address(to, calling, tls)
    elif tls is None and calling is None:
        destination = _destination(to, config)
    else:
        raise ConfigError(
            f"--calling and --tls-... are for an address, AE@HOST:PORT; destination {to!r} has its "
            f"terms in {config}: leave them out, or change them there"
        )
    worst = 0
    for sent in send_files(_files(files), to, destination):
        if sent.receipt is None:
            words, worst = f"not sent: {sent.problem}", 1
        else:
            answer = answer_of(sent.receipt.status)
            worst = worst if answer.is_delivered else 1
            words = f"0x{sent.receipt.status:04X} {answer}, {sent.elapsed_s * 1e3:.0f} ms"
            words += f" ({sent.receipt.comment})" if sent.receipt.comment else ""
        out.print(f"{sent.path}: {words}", markup=False, soft_wrap=True)
    raise typer.Exit(worst)


@app.command()
def doctor(
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Look at everything the service needs: config, disk, ledger, ports, device, destinations.

    Exit code 0: all is well. 1: something to look at. 2: the service cannot run.
    """
    from dicom_xai.service.doctor import examine

    findings = examine(config)
    if as_json:
        typer.echo(json.dumps([asdict(item) for item in findings], indent=2))
    else:
        table = Table("", "what", "found", box=None, pad_edge=False)
        marks = {0: "[green]ok[/]", 1: "[yellow]look[/]", 2: "[red]bad[/]"}
        for item in findings:
            table.add_row(marks[item.severity], item.what, item.found)
        out.print(table)
    raise typer.Exit(max(item.severity for item in findings))


@ledger_app.command("jobs")
def ledger_jobs(
    config: ConfigOption = DEFAULT_CONFIG,
    state: Annotated[list[str] | None, typer.Option(help="queued, running, done, failed.")] = None,
) -> None:
    """The newest jobs."""
    with _Opened(config) as ledger:
        _print_rows(ledger.views.jobs(tuple(state or ())))


@ledger_app.command("deliveries")
def ledger_deliveries(
    config: ConfigOption = DEFAULT_CONFIG,
    state: Annotated[
        list[str] | None, typer.Option(help="pending, sending, sent, dead, skipped.")
    ] = None,
) -> None:
    """The newest deliveries."""
    with _Opened(config) as ledger:
        _print_rows(ledger.views.deliveries(tuple(state or ())))


@ledger_app.command("commitments")
def ledger_commitments(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """The newest requests for storage commitment, ours and others'."""
    with _Opened(config) as ledger:
        _print_rows(ledger.views.commitments())


@ledger_app.command("quarantine")
def ledger_quarantine(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """How many images came again with other content, and the newest; `ledger why UID` has more."""
    with _Opened(config) as ledger:
        count = ledger.upkeep.depths().quarantined
        _print_rows(ledger.views.quarantined())
    if count:
        out.print(f"{count} in all; they were answered 0x0111 and are not looked at")


@ledger_app.command("events")
def ledger_events(config: ConfigOption = DEFAULT_CONFIG, limit: int = 50) -> None:
    """The history's newest lines."""
    with _Opened(config) as ledger:
        _print_rows(ledger.views.events(limit))


@ledger_app.command("why")
def ledger_why(
    uid: Annotated[str, typer.Argument(help="A Study, Series or SOP Instance UID.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Why a study was or was not triaged: routing, units, jobs, deliveries."""
    with _Opened(config) as ledger:
        rows = ledger.views.why(uid)
    if not rows:
        err.print(f"nothing is known about {uid}")
        raise typer.Exit(1)
    for row in rows:
        typer.echo(json.dumps({key: value for key, value in row.items() if value is not None}))


@ledger_app.command("retry")
def ledger_retry(
    job: Annotated[int, typer.Argument(help="The job's number, from `ledger jobs`.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Run an ended job again; its results keep their UIDs and are sent again."""
    with _Opened(config) as ledger:
        done = ledger.admin.retry(job)
        ledger.ring("worker")
    _note_verb(config, "ledger retry", f"job {job}", done)
    _report(done, f"job {job} is queued", f"no ended job {job}")


@ledger_app.command("requeue")
def ledger_requeue(
    delivery: Annotated[int, typer.Argument(help="The number, from `ledger deliveries`.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Send a dead letter again."""
    with _Opened(config) as ledger:
        done = ledger.admin.requeue(delivery)
        ledger.ring("sender")
    _note_verb(config, "ledger requeue", f"delivery {delivery}", done)
    _report(done, f"delivery {delivery} is queued", f"no dead delivery {delivery}")


@ledger_app.command("skip")
def ledger_skip(
    delivery: Annotated[int, typer.Argument(help="The number, from `ledger deliveries`.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Close a delivery that is dead or waits, without sending it."""
    with _Opened(config) as ledger:
        done = ledger.admin.skip(delivery)
    _note_verb(config, "ledger skip", f"delivery {delivery}", done)
    _report(done, f"delivery {delivery} is skipped", f"no dead or waiting delivery {delivery}")


@app.command("audit")
def audit_trail(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Follow the audit trail's chain: was a message changed, removed or put in?

    Exit code 0: the chain holds. 1: it does not.
    """
    from dicom_xai.audit.messages import audit_log_used
    from dicom_xai.audit.recorder import person
    from dicom_xai.audit.trail import verify

    loaded, _ = load(config)
    directory = loaded.service.audit.directory
    assert directory is not None  # the config's loader fills it in
    verdict = verify(directory)
    _recorder(loaded).record(audit_log_used(person(), str(directory)))
    for problem in verdict.problems:
        out.print(problem, markup=False, soft_wrap=True)
    words = "hold together" if not verdict.problems else "do not hold together"
    out.print(f"{directory}: messages {verdict.first} to {verdict.last} {words}", soft_wrap=True)
    raise typer.Exit(1 if verdict.problems else 0)


def _note_verb(config: Path, verb: str, subject: str, is_done: bool) -> None:
    """Tell the audit trail who did this."""
    from dicom_xai.audit.messages import function_used
    from dicom_xai.audit.recorder import person

    recorder = _recorder(load(config)[0])
    recorder.record(function_used(person(), recorder.process, verb, subject, is_done=is_done))


def _recorder(config: Config) -> Recorder:
    """A pen for one message; the service forwards it."""
    from dicom_xai.audit import Recorder
    from dicom_xai.telemetry import Log, Metrics, Registry

    audit = config.service.audit.model_copy(update={"syslog": None})
    return Recorder(audit, "command", Metrics(Registry()), Log())


class _Opened:
    """The ledger that a config names."""

    def __init__(self, config: Path) -> None:
        loaded, _ = load(config)
        self._ledger = Ledger(loaded.service.ledger.url)

    def __enter__(self) -> Ledger:
        return self._ledger

    def __exit__(self, *_: object) -> None:
        self._ledger.close()


def _report(done: bool, yes: str, no: str) -> None:
    if not done:
        err.print(no)
        raise typer.Exit(1)
    out.print(yes)


def _print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    if not rows:
        err.print("nothing")
        return
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")  # half a UID is none
    for row in rows:
        table.add_row(*("" if value is None else _cell(value) for value in row.values()))
    # `| grep UID` finds whole lines
    (out if out.is_terminal else Console(highlight=False, width=WIDEST)).print(table)


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _card(name: str, folder: Path | None) -> ModelCard:
    """A model card by name, with its file's path made absolute."""
    with resources.as_file(resources.files("dicom_xai") / "bundled" / "models") as bundled:
        where = folder or bundled
        known = sorted(path.stem for path in where.glob("*.yaml"))
        if name not in known:
            near = nearest(name, known) or f"; known: {', '.join(known) or 'none'}"
            raise ConfigError(f"--model: no card {name!r} in {where}{near}")
        card, _ = parse(where / f"{name}.yaml", ModelCard)
        return card.model_copy(update={"file": (where / card.file).resolve()})


def _destination(name: str, config: Path) -> Destination:
    """A destination of the config by its name."""
    known = load(config)[0].service.destinations
    if name not in known:
        near = nearest(name, list(known)) or f"; known: {', '.join(known) or 'none'}"
        raise ConfigError(
            f"--to: no destination {name!r} in {config}{near}; another address is AE@HOST:PORT"
        )
    return known[name]


def _box(low: float | None, high: float | None) -> tuple[float, float] | None:
    """The range that both options give; None where neither is there."""
    if (low is None) != (high is None):
        raise ConfigError("--low and --high go together: give both, or none")
    return None if low is None or high is None else (low, high)


def _tls(
    ca: Path | None, certificate: Path | None, key: Path | None, name: str | None
) -> ClientTLS | None:
    """The terms that the options of an address say; None when they say nothing."""
    if (certificate is None) != (key is None):
        raise ConfigError("--tls-certificate and --tls-key go together: give both, or none")
    if ca is not None:
        return ClientTLS(ca=ca, certificate=certificate, private_key=key, server_name=name)
    if certificate is not None or name is not None:
        raise ConfigError(
            "--tls-ca is missing: it says whose certificate is taken, and without it nothing is "
            "sent by TLS"
        )
    return None


def _files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders with everything below them."""
    found: list[Path] = []
    for path in paths:
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not found:
        raise ConfigError("there is no file to send")
    return found


if __name__ == "__main__":
    main()
