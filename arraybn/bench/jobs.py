"""Jobs of MPI ranks that a bench starts; what they find comes back in a file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..sync.process import LAUNCHERS
from .output import RefusedError

TIME_LIMIT = 600.0  # seconds for each job
Found = dict[str, Any]


def launcher() -> str | None:
    """Return the program that starts ranks: beside this Python first, where the wheel of the mpi extra puts it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which("mpiexec", path=path) or shutil.which("mpirun", path=path)


def under_mpirun() -> bool:
    """Return whether a launcher says that it has started this process."""
    return any(os.environ.get(name, "").isdigit() for name in LAUNCHERS)


def start(launcher: str, ranks: int, module: str, *words: str, limit: float | None = None) -> Found:
    """Return what `ranks` ranks have measured; an error carries the last words of a job that failed."""
    limit = TIME_LIMIT if limit is None else limit
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    env = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", **os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        file = Path(folder) / "found.json"
        command = [launcher, "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", module, str(file), *words]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=env, start_new_session=True, **streams)
        try:
            status = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise RefusedError(f"mpirun -n {ranks} has not ended within {limit:g} s") from error
        if status or not file.exists():
            output.seek(0)
            text = output.read().decode(errors="replace").replace("\0", "").strip()
            raise RefusedError(f"mpirun -n {ranks} ended with status {status}:\n{text[-2000:]}")
        found: Found = json.loads(file.read_text(encoding="utf-8"))
        return found


def write(comm: Any, file: str, found: Found) -> None:
    """Hand back what rank 0 has found."""
    if comm.rank == 0:
        Path(file).write_text(json.dumps(found), encoding="utf-8")
