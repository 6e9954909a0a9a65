"""The same sweep through other launchers than Hydra's own: in this one each job waits for its turn on a real one."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import Command
from helpers import QUICK, ROOT

SWEEP = ["-m", *QUICK, "data.val_size=100", "seed=0,1,-1", "hydra.sweep.dir=s"]


def found(folder: Path) -> dict[str, str]:
    """The jobs with results, and what they ran on."""
    paths = (folder / "s").glob("*/metrics.json")
    return {path.parent.name: json.loads(path.read_text())["device"] for path in paths}


def is_as_expected(done: "subprocess.CompletedProcess[str]", folder: Path) -> bool:
    assert done.returncode == 1, done.stderr  # for one of the three is refused
    assert done.stderr.splitlines()[-1].startswith("train: 1 of 3 jobs failed"), done.stderr
    assert "failed: seed=-1: seed=-1: must be greater than or equal to 0" in done.stdout
    assert (folder / "s" / "summary.csv").exists()
    return found(folder).keys() == {"seed-0", "seed-1"}


@pytest.mark.services
def test_submitit_local(tmp_path: Path, command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra submitit")
    assert is_as_expected(command(*SWEEP, "hydra/launcher=submitit_local", cwd=tmp_path), tmp_path)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real cluster: a head and a worker, each with one core, on loopback."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs the extra ray")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("ray") / "log").open("w+")
    ray = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--block",
        "--num-cpus=1",
        "--node-ip-address=127.0.0.1",
    ]
    ray += ["--object-store-memory=80000000", "--disable-usage-stats"]
    head = [*ray, "--head", f"--port={port}", "--include-dashboard=false"]
    # Elsewhere: nothing may depend on where Ray was started.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    nodes = []
    try:
        for call in (head, [*ray, f"--address=127.0.0.1:{port}"]):
            nodes.append(subprocess.Popen(call, cwd="/", env=environment, stdout=log, stderr=log))
            deadline = time.monotonic() + 180
            while Path(log.name).read_text().count("--block") < len(nodes):
                assert nodes[-1].poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(60)


@pytest.mark.services
def test_an_existing_ray_cluster(cluster: str, tmp_path: Path, command: Command) -> None:
    done = command(*SWEEP, "hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address={cluster}", cwd=tmp_path)
    assert is_as_expected(done, tmp_path)
    assert {*found(tmp_path).values()} == {"cpu, 1 thread"}


def test_a_launcher_that_is_not_installed_says_what_to_install(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['hydra_plugins.hydra_joblib_launcher'] = None\n"
    code = f"{hide}from mnist_lit.train import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "-m", "seed=0,1", "hydra/launcher=joblib"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "train: hydra/launcher=joblib needs a package that is not installed: pip install hydra-joblib-launcher"
    )
