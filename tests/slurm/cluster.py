"""A real SLURM on this machine: one node of two CPUs, in a temporary folder, for as long as a test.

Two partitions share the node; a job in `urgent` sends one in `normal` back into the queue after a
grace time, as on most clusters. Jobs are accounted for, so that `sacct` answers, where slurmdbd and
MariaDB are installed. By hand, until Ctrl-C:

    sudo python tests/slurm/cluster.py FOLDER     # then, elsewhere: export SLURM_CONF=FOLDER/slurm.conf
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
GRACE_SECONDS, KILL_WAIT = 25, 25

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldDebug=verbose
AuthType=auth/munge
# A requeued job starts again only when the credentials of its last start are void.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
OverTimeLimit=0
KillWait={kill_wait}
{accounting}
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=normal Nodes={host} Default=YES PriorityTier=1 GraceTime={grace} State=UP
PartitionName=urgent Nodes={host} PriorityTier=10 State=UP
"""

# slurmdbd refuses a configuration that others may read.
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={ports[2]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""

ACCOUNTED = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={ports[2]}
AccountingStoragePass={folder}/munge.socket"""


def missing() -> str | None:
    """Why there can be no cluster here, if so."""
    absent = [name for name in DAEMONS if find(name) is None]
    if absent:
        return f"no {', '.join(absent)} on this machine"
    return "SLURM's daemons want to be root" if os.geteuid() != 0 else None


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Started and stopped by `with`; `SLURM_CONF` leads SLURM's commands to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        self.accounted = all(find(name) for name in ACCOUNTING)
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if exception and (self.folder / "munge.socket").exists():
            self.ask("scancel", "--full", "--signal=KILL", "--user=root")
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """One of SLURM's commands: what it prints, errors too."""
        done = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.stdout.strip()

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for name in ("state", "spool"):
            (self.folder / name).mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        facts = {
            "folder": self.folder,
            "host": self.host,
            "ports": free_ports(3),
            "grace": GRACE_SECONDS,
            "kill_wait": KILL_WAIT,
        }
        accounting = ACCOUNTED.format(**facts) if self.accounted else ""
        conf = SLURM_CONF.format(**facts, accounting=accounting)
        (self.folder / "slurm.conf").write_text(conf)
        secret = self.folder / "slurmdbd.conf"
        secret.touch(mode=0o600)
        secret.write_text(SLURMDBD_CONF.format(**facts))

    def _start(self) -> None:
        folder = self.folder
        socket_path = folder / "munge.socket"
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
            f"--socket={socket_path}", f"--pid-file={folder}/munged.pid",
            f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munged.log",
        )  # fmt: skip
        until(socket_path.exists, "munged")
        if self.accounted:
            self._start_accounting()
        self._daemon("slurmctld", "-D", "-i")
        if self.accounted:
            until(lambda: "test" in self.ask("sacctmgr", "-nP", "show", "cluster"), "accounting")
        self._daemon("slurmd", "-D", "-N", self.host)
        until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%t"), "an idle node")

    def _start_accounting(self) -> None:
        """MariaDB on a socket of its own, and slurmdbd, which makes its tables."""
        database = self.folder / "database"
        database.mkdir()
        log = (self.folder / "mariadb-install.log").open("wb")
        install = [str(find("mariadb-install-db")), "--no-defaults", f"--datadir={database}"]
        install += ["--user=root", "--auth-root-authentication-method=normal"]
        subprocess.run(install, check=True, stdout=log, stderr=log)
        mysql_socket = self.folder / "mysql.socket"
        self._daemon(
            "mariadbd", "--no-defaults", f"--datadir={database}", f"--socket={mysql_socket}",
            "--user=root", "--skip-networking", f"--pid-file={self.folder}/mysql.pid",
        )  # fmt: skip
        until(mysql_socket.exists, "MariaDB")
        self._daemon("slurmdbd", "-D", MYSQL_UNIX_PORT=str(mysql_socket))
        until(lambda: "Cluster" in self.ask("sacctmgr", "-P", "show", "cluster"), "slurmdbd")

    def _daemon(self, name: str, *options: str, **environment: str) -> None:
        out = (self.folder / f"{name}.out").open("wb")
        self.processes.append(
            subprocess.Popen(
                [str(find(name)), *options],
                env=self.environment | environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def until(ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Ask again until it is so.

    Raises:
        TimeoutError: it is not so after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.25)


if __name__ == "__main__":
    if missing():
        sys.exit(f"{missing()}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    with Cluster(Path(sys.argv[1]).resolve()) as cluster:
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf", flush=True)
        while True:
            signal.pause()
