"""Faults of the machine and of the environment: one sentence and status 2, and the last epoch's checkpoint stays."""

import errno
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import forked
import pytest
import torch

from vim.data import images
from vim.engine import checkpoints, distributed, lock, reporting, run, trackers
from vim.errors import INTERRUPTED, exit_status, fault_of_the_machine

REPOSITORY = Path(__file__).parents[2]
NANO = (
    "--model", "vim_nano_patch4_32", "--model-kwargs", "depth=1", "embed_dim=16", "--input-size", "16", "--batch-size",
    "8", "--num_workers", "0", "--device", "cpu", "--no-model-ema", "--warmup-epochs", "0",
)  # fmt: skip


@pytest.fixture
def argv(tree, tmp_path):
    return [*NANO, "--trackers", "none", "--epochs", "1", "--data-path", str(tree), "--output_dir", str(tmp_path / "o")]


@pytest.fixture
def sentence(capsys):
    """Run main.py, which must refuse; gives its sentence."""

    def call(argv):
        assert run.main(argv) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        (line,) = (line for line in error.splitlines() if line.startswith("error: "))
        return line

    return call


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """Folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [*NANO, "--trackers", "none", "--epochs", "1", "--data-path", str(tree), "--output_dir", str(folder)]
    assert run.main(flags) == 0
    return folder


@pytest.fixture
def second(finished, tmp_path):
    """Flags of that run's second epoch, in a copy of its folder; and the folder."""
    folder = tmp_path / "o"
    shutil.copytree(finished, folder)
    flags = ["--resume", "auto", "--epochs", "2", "--num_workers", "0", "--device", "cpu", "--output_dir", str(folder)]
    yield flags, folder
    if folder.exists():
        assert checkpoints.read("auto", str(folder))["epoch"] == 1
        assert not list(folder.glob(".*"))


def holding(folder):
    """A process that holds the folder's lock."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        with lock.locked(folder):
            os.write(write, b"x")
            time.sleep(300)
        os._exit(0)
    os.read(read, 1)
    os.close(read)
    os.close(write)
    return pid


def test_one_run_a_folder(argv, sentence, tmp_path):
    folder = tmp_path / "o"
    folder.mkdir()
    pid = holding(folder)
    try:
        error = sentence(argv)
        assert f"another run (process {pid} on {socket.gethostname()}) writes into --output-dir {folder}" in error
        assert [path.name for path in folder.iterdir()] == [lock.NAME]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    # What is left of a killed process is no lock.
    assert (folder / lock.NAME).exists()
    assert run.main(argv) == 0
    assert not (folder / lock.NAME).exists()


def test_a_requeued_job_waits_for_the_lock_of_its_predecessor(argv, sentence, monkeypatch, tmp_path):
    folder = tmp_path / "o"
    folder.mkdir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(lock, "RETRY_S", 0.01)
    monkeypatch.setattr(lock, "REQUEUED_WAIT_S", 0.05)
    pid = holding(folder)
    try:
        assert "another run" in sentence(argv)
        monkeypatch.setattr(lock, "REQUEUED_WAIT_S", 100)
        monkeypatch.setattr(lock.time, "sleep", lambda _: (os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)))
        with lock.locked(folder):
            assert str(os.getpid()) in (folder / lock.NAME).read_text()
    finally:
        monkeypatch.undo()
    assert not (folder / lock.NAME).exists()


def test_a_requeued_job_reads_the_last_checkpoint_of_its_predecessor(argv, monkeypatch, tmp_path):
    folder, order = tmp_path / "o", []
    folder.mkdir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    pid = holding(folder)

    def sleep(seconds):
        order.append("waited")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    monkeypatch.setattr(checkpoints, "read", lambda *_: order.append("read"))
    assert run.main([*argv, "--resume", "auto"]) == 0
    assert order == ["waited", "read"]


def test_a_removed_lock_is_not_waited_for(tmp_path):
    """Whoever opened the file just before its holder removed it must not take it for the folder's."""
    (tmp_path / lock.NAME).touch()
    descriptor = os.open(tmp_path / lock.NAME, os.O_RDWR)
    (tmp_path / lock.NAME).unlink()
    assert not lock._is(tmp_path / lock.NAME, descriptor)
    (tmp_path / lock.NAME).touch()
    assert not lock._is(tmp_path / lock.NAME, descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("known", [True, False])
def test_file_systems_without_locks(argv, monkeypatch, caplog, tmp_path, known):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if known:
        monkeypatch.setattr(lock.fcntl, "lockf", none)
    else:
        monkeypatch.setattr(lock, "fcntl", None)
    with caplog.at_level("WARNING"):
        assert run.main(argv) == 0
    assert ("cannot be locked (No locks available)" in caplog.text) is known
    assert not (tmp_path / "o" / lock.NAME).exists()


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
ENVIRONMENTS = {
    "world size alone": ({"RANK": None}, "start with torchrun"),
    "rank alone": ({"WORLD_SIZE": None, "RANK": "1"}, "RANK is '1', expected a whole number from 0 to 0"),
    "rank too large": ({"RANK": "2"}, "RANK is '2', expected a whole number from 0 to 1"),
    "rank negative": ({"RANK": "-1"}, "RANK is '-1'"),
    "rank no number": ({"RANK": "one"}, "RANK is 'one'"),
    "no processes": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    "half a process": ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE is '1.5'"),
    "local rank": ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    "local world size": ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
    "no address": ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    "no port": ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
    "port no number": ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    "port too large": ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    "nobody there": ({"RANK": "1", "MASTER_PORT": "{free}"}, "do not meet at MASTER_ADDR 127.0.0.1"),
    "nobody comes": ({"MASTER_PORT": "{free}"}, "do not meet at MASTER_ADDR 127.0.0.1"),
    "no such host": ({"RANK": "1", "MASTER_ADDR": "no.such.invalid"}, "do not meet at MASTER_ADDR no.such.invalid"),
    "busy port": ({"MASTER_PORT": "{busy}"}, "another program has the port"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_of_launchers(name, monkeypatch, argv, sentence, tmp_path):
    monkeypatch.setattr(distributed, "MEETING_S", 1)
    changes, words = ENVIRONMENTS[name]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        with socket.create_server(("127.0.0.1", 0)) as server:
            free = server.getsockname()[1]
        for variable in (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in {**LAUNCHED, **changes}.items():
            if value is not None:
                monkeypatch.setenv(variable, value.format(free=free, busy=busy.getsockname()[1]))
        assert words in sentence(argv)
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "o").exists()


def test_place_to_meet_of_a_flag(monkeypatch, argv, sentence):
    for variable, value in {**LAUNCHED, "RANK": "1"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(distributed, "MEETING_S", 1)
    for url in ("nonsense", "tcp://127.0.0.1", "http://x:1"):
        assert f"do not meet at --dist_url {url}" in sentence([*argv, "--dist_url", url])


def test_folder_that_goes_away(second, sentence, monkeypatch):
    flags, folder = second
    evaluate = run.evaluate

    def evaluate_and_remove(*args, **kwargs):
        shutil.rmtree(folder)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(run, "evaluate", evaluate_and_remove)
    assert "checkpoint.pth cannot be written (" in sentence(flags)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT, errno.ENOSPC, errno.EIO])
def test_file_system_that_refuses(second, sentence, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    flags, _ = second
    monkeypatch.setattr(os, "replace", refuse)
    error = sentence(flags)
    assert f"checkpoint.pth cannot be written ({os.strerror(number)}): the checkpoint before it is kept" in error


def test_folder_in_place_of_a_checkpoint(argv, sentence, tmp_path):
    (tmp_path / "o" / "checkpoint.pth" / "x").mkdir(parents=True)
    (tmp_path / "o" / ".best_checkpoint.pth.tmp").mkdir()
    assert "checkpoint.pth cannot be written (" in sentence(argv)


def test_loader_process_killed(second, sentence, monkeypatch):
    def deadly(*args, decode=images.decode, **kwargs):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*args, **kwargs)

    monkeypatch.setattr("vim.data.datasets.decode", deadly)
    flags, _ = second
    error = sentence([*flags, "--num_workers", "1"])
    assert "the loader process" in error
    assert "--num_workers" in error


def test_loader_process_outlives_the_signals_of_its_group(argv, monkeypatch):
    """Terminals and schedulers send Ctrl-C and SIGTERM to all processes of a run, and the run may need its batches."""

    def signalled(*args, decode=images.decode, **kwargs):
        for signum in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        return decode(*args, **kwargs)

    def only_in_a_worker(*args, **kwargs):
        assert torch.utils.data.get_worker_info() is not None
        return signalled(*args, **kwargs)

    monkeypatch.setattr("vim.data.datasets.decode", only_in_a_worker)
    assert run.main([*argv, "--num_workers", "1"]) == 0


def test_shared_memory_full(argv, sentence, monkeypatch):
    def full(_):
        raise RuntimeError("unable to write to file </torch_4711_1_0>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    error = sentence(argv)
    assert "/dev/shm" in error
    assert "--num_workers 0" in error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "process 7 got the signal Killed"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "process 7, 8 died"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open"), "shared"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--batch-size"),
        (MemoryError(), "memory ran out"),
        (OSError(errno.EMFILE, "Too many open files", "a.jpg"), "a.jpg: Too many open files"),
        (torch.distributed.DistNetworkError("The client socket has failed"), "another process"),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer [127.0.0.1]:1"), "another process"),
    ],
)  # fmt: skip
def test_faults_of_the_machine(error, words, capsys):
    def fail():
        raise error

    assert words in fault_of_the_machine(error)
    assert exit_status(fail) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("x"), OSError("odd"), KeyError("k")])
def test_faults_of_the_program_stay_as_they_are(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        exit_status(fail)


def fails(*_, **__):
    raise ConnectionError("the server is gone\nand more")


@pytest.mark.parametrize("method", ["__init__", "scalars", "image", "histogram", "close"])
def test_trackers_that_fail_are_said_once(argv, monkeypatch, caplog, tmp_path, method):
    monkeypatch.setattr(trackers.TensorBoard, method, fails)
    with caplog.at_level("WARNING"):
        assert run.main([*argv, "--trackers", "tensorboard", "--histograms", "--print-every-steps", "1"]) == 0
    assert caplog.text.count("the server is gone") == 1
    assert "and more" not in caplog.text
    assert (tmp_path / "o" / "checkpoint.pth").exists()


def test_logs_that_cannot_be_written_are_said_once(argv, caplog, capsys, monkeypatch, tmp_path):
    for name in ("log.txt", "run.log"):
        (tmp_path / "o" / name).mkdir(parents=True)
    (tmp_path / "o" / "tensorboard").write_text("")
    argv = [*argv, "--trackers", "tensorboard", "--epochs", "2"]
    with caplog.at_level("WARNING"):
        assert run.main(argv) == 0
    for words in ("log.txt cannot be written (Is a directory)", "run.log cannot be", "tensorboard does not start"):
        assert caplog.text.count(words) == 1, words
    for name in ("log.txt", "run.log"):
        (tmp_path / "o" / name).rmdir()

    class Full:
        def write(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = close = write

    handler = reporting._LogFile
    monkeypatch.setattr(handler, "_open", lambda _: Full())
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert run.main(argv) == 0
    assert caplog.text.count("run.log cannot be written (No space left on device)") == 1
    assert "Traceback" not in capsys.readouterr().err


def interrupted(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


@pytest.mark.parametrize("where", ["parse_args", "build_datasets", "build_model", "build_training", "load_weights"])
def test_ctrl_c_outside_training(argv, finished, monkeypatch, capsys, tmp_path, where):
    monkeypatch.setattr(run, where, interrupted)
    flags = [*argv, "--finetune", str(finished / "checkpoint.pth"), "--model-kwargs", "depth=1", "embed_dim=16"]
    assert run.main(flags) == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "o").exists()


def test_ctrl_c_in_an_evaluation_and_in_other_commands(finished, monkeypatch, capsys):
    from vim.analysis import predict, report

    for module, name, call in (
        (run, "evaluate", lambda: run.main(["--eval", "--resume", str(finished / "checkpoint.pth")])),
        (predict, "predict", lambda: predict.main(["--checkpoint", "x", "y.png"])),
        (report, "report", lambda: report.main([str(finished)])),
    ):
        monkeypatch.setattr(module, name, interrupted)
        assert call() == INTERRUPTED
        assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_ctrl_c_twice_stops_at_once(second, monkeypatch, capsys):
    """The first one asks for a checkpoint; the second does not wait for it."""
    flags, _ = second

    def twice(*_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("vim.engine.training._update", twice)
    assert run.main(flags) == INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


def test_nothing_to_evaluate(finished, sentence, tree, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copytree(tree / split, tmp_path / "t" / split)
    for path in (tmp_path / "t" / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    flags = ["--eval", "--resume", str(finished / "checkpoint.pth"), "--data-path", str(tmp_path / "t")]
    assert "no image that can be read" in sentence([*flags, "--on-bad-image", "replace", "--num_workers", "0"])


WINDOWS = """
import importlib, os, signal, sys

for name in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL"):
    delattr(signal, name)
for name in ("O_DIRECTORY", "sysconf", "sched_getaffinity", "getppid"):
    delattr(os, name)
opened = os.open
def no_folders(path, *args, **kwargs):
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return opened(path, *args, **kwargs)
os.open = no_folders
sys.platform = "win32"
import vim.data.images, vim.data.loaders, vim.engine.lock, vim.engine.reporting, vim.engine.checkpoints, vim.engine.run
for module in (vim.data.images, vim.data.loaders, vim.engine.lock, vim.engine.reporting, vim.engine.checkpoints,
               vim.engine.run):
    importlib.reload(module)
sys.exit(vim.engine.run.main(sys.argv[1:]))
"""


def test_without_what_windows_lacks(argv, tmp_path):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = forked.run("-c", WINDOWS, *argv, "--checkpoint-interval", "1", cwd=REPOSITORY / "vim", env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "best_checkpoint.pth").exists()


def test_main_process_speaks_for_all(argv, tmp_path):
    """Two processes and a folder that another run holds: both end with the sentence."""
    folder = tmp_path / "o"
    folder.mkdir()
    pid = holding(folder)
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        ranks = []
        for rank in range(2):
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            env |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            argv = [*argv, "--batch-size", "4"]
            ranks.append(forked.Forked("main.py", *argv, cwd=REPOSITORY / "vim", env=env))
        for rank in ranks:
            _, error = rank.communicate(120)
            assert rank.returncode == 2, error
            assert f"another run (process {pid}" in error
            assert "Traceback" not in error
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
