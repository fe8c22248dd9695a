"""Two hosts, each a network namespace, and the link between them: a run over two nodes, and the link cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long

ADDRESS = "10.213.57.{}"


def command(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that see each other, and nothing else."""
    names = [f"sat{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command here, which makes network namespaces")
    try:
        for name in names:
            command("netns", "add", name)
        command("link", "add", "sat0", "netns", names[0], "type", "veth", "peer", "name", "sat0", "netns", names[1])
        for number, name in enumerate(names, 1):
            command("-n", name, "address", "add", f"{ADDRESS.format(number)}/24", "dev", "sat0")
            for device in ("lo", "sat0"):
                command("-n", name, "link", "set", device, "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            # What a test that failed has left running there.
            for pid in subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def start(host: str, node: int, folder: Path, *options: object) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": ADDRESS.format(1),
        "MASTER_PORT": "29411",
        "NODE_RANK": str(node),
        "GLOO_SOCKET_IFNAME": "sat0",
    }
    arguments = ["--config", "tiny.yaml", "--trainer.num_nodes", 2, "--trainer.devices", 1, "--data.batch_size", 8]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "sat.train", *map(str, [*arguments, *options])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    )


def test_two_nodes_train_one_run(folder, hosts):
    nodes = [start(host, node, folder) for node, host in enumerate(hosts)]
    (out, error), (other_out, other_error) = (node.communicate(timeout=180) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], error + other_error
    assert out.count("Switch to sparse attention at step 9") == 1
    assert other_out == ""
    assert len(list(folder.glob("runs/tiny/*/summary.json"))) == 1


def test_a_cut_link_stops_both_nodes(folder, hosts):
    endless = ["--trainer.max_steps", 1_000_000, "--process_timeout", 10]
    nodes = [start(host, node, folder, *endless) for node, host in enumerate(hosts)]
    until = time.monotonic() + 120
    while not (saved := list(folder.glob("runs/tiny/*/checkpoints/last.ckpt"))) and time.monotonic() < until:
        assert all(node.poll() is None for node in nodes), [node.communicate() for node in nodes]
        time.sleep(0.2)
    command("-n", hosts[1], "link", "set", "sat0", "down")
    cut = time.monotonic()
    for node in nodes:
        _, error = node.communicate(timeout=60)
        assert node.returncode == 1
        assert "another process of this run has stopped or does not answer, and the run stops; go on with" in error
        assert "Traceback" not in error
    assert time.monotonic() - cut < 60  # the timeout is 10 seconds, and has to be noticed
    assert torch.load(saved[0], weights_only=True)["global_step"] > 0
