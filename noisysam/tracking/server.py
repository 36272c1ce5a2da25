"""MLflow's web pages, served on this machine."""

import os
import subprocess
import sys
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Callable

from mlflow import MlflowClient

from noisysam.core.errors import UserError
from noisysam.tracking import pages as mlflow_pages
from noisysam.tracking.address import shown, sqlite_path

PATIENCE = 60  # seconds to wait for the server before the browser is not opened


def serve(
    uri: str,
    port: int = 5000,
    host: str = "127.0.0.1",
    study: str | None = None,
    browser: bool = False,
    say: Callable[[str], object] = print,
) -> int:
    """Serve the pages of an SQLite or other database store until interrupted; returns the server's exit code.

    ``say`` gets the addresses of the pages of ``study`` (None: the experiment that changed last). With ``browser`` the
    first of them is opened when the server answers, if there is a display.
    """
    if uri.startswith("http"):
        raise UserError(f"{shown(uri)} is a server already: open it in a browser")
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise UserError(f"no MLflow store at {path}: run something with tracking first, or name another store")
    root = f"http://{host}:{port}"
    addresses = {what: root + page for what, page in pages(uri, study).items()}
    where = ["--host", host, "--port", str(port), "--backend-store-uri", uri]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *where]
    if path is not None:
        command += ["--artifacts-destination", (path.parent / "mlartifacts").as_uri()]
    with subprocess.Popen(command) as server:
        for what, address in addresses.items():
            say(f"{what}: {address}")
        if browser and _has_display():
            threading.Thread(target=_open, args=(root, next(iter(addresses.values()), root)), daemon=True).start()
        while True:
            try:
                return server.wait()
            except KeyboardInterrupt:
                server.terminate()


def pages(uri: str, study: str | None = None) -> dict[str, str]:
    """The pages of a study, or of the experiment that changed last: title -> address relative to the server's root.
    ``UserError`` if the store has no such study."""
    client = MlflowClient(tracking_uri=uri)
    if study is None:
        newest = client.search_experiments(order_by=["last_update_time DESC"], filter_string="name != 'Default'")[:1]
    else:
        found = client.get_experiment_by_name(study)
        if found is None:
            names = ", ".join(e.name for e in client.search_experiments() if e.name != "Default")
            raise UserError(f"MLflow store {shown(uri)} has no study {study!r} (known: {names or 'none'})")
        newest = [found]
    return {
        f"{e.name}, {what}": page for e in newest for what, page in mlflow_pages.pages(e.experiment_id, e.tags).items()
    }


def _has_display() -> bool:
    """Whether there is a display: on a text terminal, a text browser would take over the terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(d) for d in ("DISPLAY", "WAYLAND_DISPLAY"))


def _open(root: str, address: str) -> None:
    """Open a page when the server answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: the server is on this machine
    deadline = time.time() + PATIENCE
    while time.time() < deadline:
        try:
            direct.open(f"{root}/health", timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            webbrowser.open(address)
            return
