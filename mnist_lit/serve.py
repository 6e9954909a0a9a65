"""``python -m mnist_lit.serve``: serve a trained model with a web page to draw digits on and a JSON API."""

import socket
import sys
import threading
import webbrowser
from collections.abc import Iterable
from pathlib import Path

from mnist_lit import UserError, require_packages
from mnist_lit.cli import latest
from mnist_lit.cli.launch import launch, loading

LOOPBACK = ("127.0.0.1", "localhost")
BACKLOG = 500  # connections that may wait to be accepted
KEPT = 2**26  # bytes that each thread keeps for the next image; one of 280x280 takes some megabytes


def serve(
    ckpt: str | Path = "latest",
    port: int = 8000,
    allow_remote: bool = False,
    open_browser: bool = False,
    trust: Iterable[str] = (),
) -> None:
    """Serve a trained model until interrupted by a signal; the arguments are the keys of ``conf/serve.yaml``.

    Prints ``ready:`` and the address once it accepts requests.

    Raises:
        UserError: The port cannot be used, a package is missing, or the checkpoint cannot be loaded.
    """
    require_packages("serve", "starlette", "uvicorn", "python_multipart", "scipy")
    try:
        listener = socket.create_server(("" if allow_remote else LOOPBACK[0], port), backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UserError(f"port={port}: cannot listen on it ({error}); port=0 chooses a free one") from error
    with listener:
        with loading("PyTorch"):
            import torch

            from mnist_lit.inference.connections import run
            from mnist_lit.inference.trained import load_for_pictures
            from mnist_lit.inference.web import application
            from mnist_lit.kernels.memory import keep_freed_memory

        keep_freed_memory(KEPT)
        model = load_for_pictures(latest.resolve(ckpt), trust)
        torch.set_num_threads(1)  # predictions run in parallel, one per core
        address = f"http://{LOOPBACK[0]}:{listener.getsockname()[1]}"

        def ready() -> None:
            print(f"ready: {address} (press Ctrl-C to quit)", flush=True)
            if open_browser:
                # Some browsers are waited for, and they wait for the page.
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

        if allow_remote:
            print("warning: any machine that can reach this one can use the server", file=sys.stderr)
        print(f"model: {model.path}")
        run(application(model, () if allow_remote else LOOPBACK), listener, ready)


def main() -> None:
    launch("serve", serve)


if __name__ == "__main__":
    main()
