"""One of several processes: runs configurations one after another, as `python -m dynlight.fit` would each.

    LOCAL_RANK=1 python tests/processes.py first.yaml 50001 second.yaml 50002

A file is one run, at a port of its own; a process whose number is beyond the run's devices leaves it out.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml


def run_all(folder: Path, processes: int, configs: dict[str, dict]) -> list[dict[str, int]]:
    """Runs each configuration, which `folder` keeps by name, in several processes; their exit statuses."""
    with_ports: list[str] = []
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in configs]
    for (name, config), held in zip(configs.items(), sockets, strict=True):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        with_ports += [str(folder / f"{name}.yaml"), str(held.getsockname()[1])]
        held.close()
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root.parent}:{root}"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *with_ports],
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=(folder / f"{rank}.out").open("w"),
            stderr=(folder / f"{rank}.err").open("w"),
        )
        for rank in range(processes)
    ]
    try:
        for process in started:
            assert process.wait(300) == 0, (folder / f"{started.index(process)}.err").read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()
    last_lines = [(folder / f"{rank}.out").read_text().splitlines()[-1] for rank in range(processes)]
    return [dict(zip(configs, map(int, line.split()), strict=True)) for line in last_lines]


def main(arguments: list[str]) -> None:
    from shortcuts import shortcuts

    from dynlight import fit

    statuses = []
    with shortcuts.taken():
        for file, port in zip(arguments[::2], arguments[1::2], strict=True):
            os.environ["MASTER_PORT"] = port
            devices = yaml.safe_load(Path(file).read_text())["trainer"]["devices"]
            takes_part = int(os.environ["LOCAL_RANK"]) < devices
            statuses.append(fit.main(["--config", file]) if takes_part else 0)
    print(*statuses)


if __name__ == "__main__":
    main(sys.argv[1:])
