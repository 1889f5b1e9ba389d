"""``slm serve``: answer over HTTP, in OpenAI's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slm.cli.opening import open_model
from slm.cli.options import AsJson, StoreFolder
from slm.cli.output import print_json, print_line
from slm.errors import ConfigError

EXAMPLES = (
    "slm serve notes --allow-teaching",
    "slm serve notes --host 0.0.0.0 --keys keys.json --port 8080",
)


def serve(
    store: StoreFolder,
    host: Annotated[str, typer.Option(help="Address; others than this machine's need --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="Bearer keys, made by slm key.")] = None,
    is_teaching: Annotated[
        bool, typer.Option("--allow-teaching", help="Let clients teach and forget tasks.")
    ] = False,
    adapters: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Adapters may be loaded from here, by name.")
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(metavar="URL", help="Route to this vLLM, SGLang or slm server instead.")
    ] = None,
    mixture: Annotated[
        list[str] | None, typer.Option(metavar="A=W,B=W", help="Mixture the upstream may get as one adapter.")
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web origin that browsers may call from.")
    ] = None,
    max_rows: Annotated[int, typer.Option(metavar="N", help="Answers written at the same time.")] = 64,
    max_queue: Annotated[int, typer.Option(metavar="N", help="Requests that may wait.")] = 256,
    deadline_s: Annotated[
        float, typer.Option("--deadline", metavar="S", help="Longest time to answer.")
    ] = 120,
    certificate: Annotated[Path | None, typer.Option(metavar="FILE", help="TLS certificate (PEM).")] = None,
    certificate_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key.")] = None,
    is_logging_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts to the log.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a store: every request is routed by itself, and tasks can be taught while it serves."""
    try:
        from slm.serving.app import create_app
        from slm.serving.running import bind, listen, run_app
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'scalable-lm[serve]'") from None
    from slm.serving.settings import ServingSettings

    settings = ServingSettings(
        host=host,
        port=port,
        keys_file=keys,
        is_teaching=is_teaching,
        adapters_folder=adapters,
        upstream=upstream,
        mixtures=tuple(weights_of(text) for text in mixture or ()),
        origins=tuple(origin or ()),
        max_rows=max_rows,
        max_queue=max_queue,
        deadline_s=deadline_s,
        certificate=certificate,
        certificate_key=certificate_key,
        is_logging_prompts=is_logging_prompts,
    )
    sockets = bind(settings)
    app = create_app(open_model(store), settings)
    named = f"[{host}]" if ":" in host else host
    address = f"{'https' if certificate else 'http'}://{named}:{listen(sockets, settings)}"
    tasks = [record.name for record in app.state.server.engine.knowledge.records]
    told = f"serving {', '.join(tasks) or 'no task yet'} at {address}"
    print_json({"address": address, "tasks": tasks}) if as_json else print_line(told)
    run_app(app, settings, sockets)


def weights_of(text: str) -> dict[str, float]:
    """A mixture written as "billing=0.5,legal=0.5".

    Raises:
        ConfigError: it is no mixture.
    """
    from slm.cli.export import parse_weights

    weights = parse_weights(text.split(","))
    if not isinstance(weights, dict):
        raise ConfigError(f"mixture {text!r} has no weights: write it as billing=0.5,legal=0.5")
    return weights
