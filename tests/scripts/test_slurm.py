"""scripts/slurm/submit.py: what it asks for, what it refuses, and real runs of two processes, also on a SLURM."""

import getpass
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

SUBMIT = Path(__file__).parents[2] / "scripts" / "slurm" / "submit.py"


def submit(*argv, **variables):
    return subprocess.run(
        [sys.executable, SUBMIT, *map(str, argv)], text=True, capture_output=True, timeout=500,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip


def test_dry_run(tmp_path):
    done = submit(
        "pt-small", "--data", tmp_path / "imagenet", "--output", tmp_path / "run", "--nodes", 2, "--gpus-per-node", 4,
        "--hours", 1.5, "--partition", "long", "--dry-run", "--seed", 3, "--lr", "1e-3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *wanted, flags = done.stdout.splitlines()
    values = dict(line.split("=", 1) for line in wanted)
    assert (values["nodes"], values["gpus_per_node"], values["tasks_per_node"]) == ("2", "4", "4")
    assert (values["timeout_min"], values["slurm_partition"], values["name"]) == ("90", "long", "run")
    assert "requeue" in values["slurm_additional_parameters"]
    assert "slurm_account" not in values
    flags = shlex.split(flags)
    assert flags[:3] == ["main.py", "--config", "recipes/pt-small.yaml"]
    assert flags[flags.index("--resume") + 1] == "auto"
    assert flags[flags.index("--data-path") + 1] == str(tmp_path / "imagenet")
    assert flags[-4:] == ["--seed", "3", "--lr", "1e-3"]


def test_mistakes_are_said_before_the_job_starts(tmp_path):
    for argv, words in (
        (("pt-huge", "--output", tmp_path), "invalid choice"),
        (("pt-tiny", "--output", tmp_path, "--epoch", 3), "unrecognized arguments"),
        (("pt-tiny", "--output", tmp_path / "run"), "SLURM"),
    ):
        done = submit(*argv, PATH=str(tmp_path))
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_job_that_slurm_refuses(tmp_path):
    for name, script in (("srun", "exit 0"), ("sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = submit("pt-tiny", "--output", tmp_path / "run", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 2, done.stderr
    assert "invalid partition" in done.stderr
    assert "Traceback" not in done.stderr


def test_faults_end_in_a_sentence(tmp_path):
    """The machine's, the values' and the run's own; the last one's traceback stays in its log."""
    (tmp_path / "file").touch()
    local = ("--executor", "local", "--gpus-per-node", 0)
    for argv, words in (
        (("--output", tmp_path / "file" / "run", *local), "Not a directory (of the operating system)"),
        (("--output", tmp_path / "run", "--hours", "nan"), "--hours: expected hours, above 0"),
        (("--output", tmp_path / "run", "--nodes", 0), "--nodes: expected a whole number of at least 1"),
        (("--output", tmp_path / "run", *local, "--data", tmp_path / "absent"), "absent is not a folder"),
    ):
        done = submit("pt-tiny", *argv)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_dense_job_runs_torchrun_on_every_node(tmp_path):
    script = SUBMIT.with_name("dense.sbatch")
    for name, text in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo node7; echo node8")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": "python3", "SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(SUBMIT.parents[2]),
    }  # fmt: skip
    argv = ["det/torchvision_train.py", "--data", "/path to/coco"]
    done = subprocess.run(["bash", script, *argv], env=env, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=node7:29845"} <= set(printed)
    assert printed[-3:] == argv
    done = subprocess.run(["bash", script], env=env, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr[:6]) == (2, "error:")


@pytest.mark.slow
def test_two_processes_on_this_machine(jpegs, tmp_path):
    """submitit starts both, they find each other, and train one model; the same command goes on from its checkpoint."""
    flags = (
        "ft-nano", "--output", tmp_path / "run", "--executor", "local", "--gpus-per-node", 0, "--tasks-per-node", 2,
        "--data", jpegs, "--data-set", "IMNET", "--in-chans", 3, "--batch-size", 1, "--device", "cpu",
    )  # fmt: skip
    for epochs in (1, 2):
        done = submit(*flags, "--epochs", epochs, GLOO_SOCKET_IFNAME="lo")
        assert done.returncode == 0, done.stderr
        assert "'test_images': 3" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert checkpoint["world_size"] == 2


# The daemons lie where only the superuser looks.
WITH_DAEMONS = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(found, seconds, what):
    """What `found()` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what} took over {seconds} s"
        time.sleep(0.2)
    return value


@pytest.fixture
def cluster():
    """A SLURM of this machine alone, with daemons of its own; gives its environment variables.

    A requeued job waits for as long as a credential lasts, so `cred_expire` is short.
    """
    if missing := [n for n in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(n, path=WITH_DAEMONS)]:
        pytest.skip(f"{missing[0]} is not there: apt-get install slurmctld slurmd slurm-client munge")
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports.append(server.getsockname()[1])
    # Not in pytest's folder: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        for name in ("state", "spool"):
            Path(folder, name).mkdir()
        key, conf = Path(folder, "munge.key"), Path(folder, "slurm.conf")
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        host = socket.gethostname().split(".")[0]
        conf.write_text(CONF.format(host=host, ports=ports, user=getpass.getuser(), folder=folder))
        variables = {"PATH": WITH_DAEMONS, "SLURM_CONF": str(conf)}
        munge = [f"--{n}-file={folder}/munge.{n}" for n in ("key", "pid", "log", "seed")]
        commands = (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge], ["slurmctld", "-D"],
            ["slurmd", "-D"],
        )  # fmt: skip
        daemons = []
        try:
            for k, command in enumerate(commands):
                with Path(folder, f"{command[0]}.txt").open("w") as log:
                    daemons.append(subprocess.Popen(
                        command, env={**os.environ, **variables}, stdout=log, stderr=log, start_new_session=True
                    ))  # fmt: skip
                if k == 0:
                    wait_for(Path(folder, "munge.socket").exists, 30, "munged's start")
            wait_for(lambda: "idle" in slurm(variables, "sinfo", "--noheader", "--format=%T"), 60, "SLURM's start")
            yield variables
            slurm(variables, "scancel", "--full", "--user", getpass.getuser())
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)


def slurm(variables, *command):
    """What one of SLURM's commands prints."""
    return subprocess.run(command, env={**os.environ, **variables}, text=True, capture_output=True, timeout=60).stdout


@pytest.mark.slow
def test_signal_requeues_the_job_and_it_goes_on(cluster, jpegs, tmp_path):
    """The signal that SLURM sends before a time limit: saved, back in the queue, resumed, the bits of a whole run."""
    flags = (
        "--gpus-per-node", 0, "--tasks-per-node", 2, "--cpus-per-task", 1, "--data", jpegs, "--data-set", "IMNET",
        "--in-chans", 3, "--batch-size", 1, "--device", "cpu", "--epochs", 40, "--trackers", "none",
    )  # fmt: skip
    cluster = {**cluster, "GLOO_SOCKET_IFNAME": "lo"}
    done = submit("ft-nano", "--output", tmp_path / "run", *flags, **cluster)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    log = tmp_path / "run" / "log.txt"

    def state():
        return slurm(cluster, "squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job).strip()

    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3, 120, "the first epochs")
    slurm(cluster, "scancel", "--signal=USR2", job)
    wait_for(lambda: state() in ("PENDING", "REQUEUED", "COMPLETING"), 60, "the end of the first part")
    wait_for(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED"), 200, "the second part")
    assert state() == "COMPLETED"
    lines = (tmp_path / "run" / "run.log").read_text()
    assert lines.count("stopped by a signal") == 1
    printed = "".join(p.read_text() for p in (tmp_path / "run" / "slurm").glob("*_log.err"))
    assert printed.count("resuming from") == 1
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == list(range(40))
    done = submit("ft-nano", "--output", tmp_path / "whole", "--executor", "local", *flags, GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True)["model"] for n in ("run", "whole"))
    assert all(torch.equal(first[k], second[k]) for k in first)
