"""``python -m mnist_lit.serve``: a page to draw digits on, and a server that says what they are."""

import socket
import sys
import webbrowser
from pathlib import Path

from mnist_lit import UserError, require_packages
from mnist_lit.cli import latest
from mnist_lit.cli.launch import launch, loading

LOOPBACK = ("127.0.0.1", "localhost")
MAX_CONNECTIONS = 500  # open at a time; a process may have some 1,000 open files


def serve(
    ckpt: str | Path = "latest", port: int = 8000, allow_remote: bool = False, open_browser: bool = False
) -> None:
    """Serve a trained model until a signal ends it; the arguments are the keys of ``conf/serve.yaml``.

    Prints ``ready: `` and the address when it answers.

    Raises:
        UserError: The port is in use, a package is missing, or the checkpoint does not allow it.
    """
    require_packages("serve", "starlette", "uvicorn", "scipy")
    with _listening(port, allow_remote) as listener:
        with loading("PyTorch"):
            import torch
            import uvicorn

            from mnist_lit.inference.trained import load
            from mnist_lit.inference.web import application

        torch.set_num_threads(1)  # as many pictures at a time as there are cores, each on one
        model = load(latest.resolve(ckpt))
        address = f"http://{LOOPBACK[0]}:{listener.getsockname()[1]}"

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                print(f"ready: {address} (Ctrl-C ends it)", flush=True)
                if open_browser:
                    webbrowser.open(address)

        if allow_remote:
            print("warning: every machine that reaches this one may use the server", file=sys.stderr)
        print(f"model: {model.path}")
        Server(
            uvicorn.Config(
                application(model, () if allow_remote else LOOPBACK),
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=3,
            )
        ).run([listener])


def _listening(port: int, allow_remote: bool) -> socket.socket:
    """
    Raises:
        UserError: The port is in use, or not allowed.
    """
    try:
        return socket.create_server(("" if allow_remote else LOOPBACK[0], port), backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise UserError(f"port={port}: cannot listen there ({error}); port=0 takes any that is free") from error


def main() -> None:
    launch("serve", serve)


if __name__ == "__main__":
    main()
