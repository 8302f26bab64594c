"""Jobs under mpirun: the scripts in tests/mpi, each with a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "mpi"
LAUNCHED = ("PMI_", "PMIX_", "PRTE_", "OMPI_COMM_WORLD_", "HYDI_")


@dataclass(frozen=True)
class Mpi:
    """A Python with mpi4py, the mpirun of its MPI, and the name of the MPI library."""

    python: str
    mpirun: str
    library: str

    @property
    def is_open_mpi(self) -> bool:
        return "Open MPI" in self.library


@cache
def mpi_of(python: str) -> Mpi | None:
    """Return the MPI of that Python; None where there is no mpirun."""
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)])
    mpirun = shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)
    if mpirun is None:
        return None
    code = "from mpi4py import MPI; print(MPI.Get_library_version())"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=variables())
    return Mpi(python, mpirun, run.stdout)


def variables(**more: str) -> dict[str, str]:
    """Return the environment of a job: this arraybn, and permission for Open MPI to run as root on few cores."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), str(SCRIPTS), kept.get("PYTHONPATH")]))
    open_mpi = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    return {**kept, "PYTHONPATH": path, "ARRAYBN_TEST_KERNELS": "reference", **open_mpi, **more}


class Job:
    """An mpirun in a session of its own, so that the whole job can be ended."""

    def __init__(
        self,
        mpi: Mpi,
        ranks: int,
        script: str,
        *arguments: str,
        module: bool = True,
        options: Sequence[str] = (),
        **env: str,
    ) -> None:
        command = [mpi.mpirun, *options, "-n", str(ranks), mpi.python, *(["-m", "mpi4py"] if module else [])]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115, `ended` closes it
        self._process = subprocess.Popen(
            [*command, script if script == "-m" else str(SCRIPTS / script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=variables(**env),
            start_new_session=True,
        )
        self._started = time.monotonic()

    def ended(self, limit: float) -> tuple[int, str]:
        """Return status and output of the job; fail if it takes longer than `limit` seconds."""
        try:
            status = self._process.wait(max(0.1, self._started + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            status = None
        with self._output as output:
            output.seek(0)
            text = output.read().decode(errors="replace").replace("\0", "")
        assert status is not None, f"still running after {limit:g} s:\n{text}"
        return status, text


def passes(mpi: Mpi, ranks: int, script: str, *arguments: str, limit: float = 90, **env: str) -> str:
    status, text = Job(mpi, ranks, script, *arguments, **env).ended(limit)
    assert status == 0, text
    assert "passed " + " ".join(arguments) in text
    return text
