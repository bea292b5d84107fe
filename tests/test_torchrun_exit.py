"""The exit code of torchrun for our training script and for others, by real torchrun processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vpgtrans.engine import torchrun_exit

TORCHRUN = (str(Path(sys.executable).with_name("torchrun")),)
TORCHRUN_MODULE = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with engine/train.py and other.py, each of which exits with its first argument."""
    (tmp_path / "engine").mkdir()
    for name in ("engine/train.py", "other.py"):
        (tmp_path / name).write_text("import sys\nprint('the recipe is wrong')\nsys.exit(int(sys.argv[1]))\n")
    return tmp_path


def run(command: tuple[str, ...], *arguments: str, cwd: Path) -> tuple[int, str]:
    done = subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_recipe_error_reaches_the_caller_without_a_traceback(folder: Path) -> None:
    returned, output = run(TORCHRUN, "engine/train.py", "2", cwd=folder)
    assert returned == 2, output
    assert "the recipe is wrong" in output
    assert "Traceback" not in output and "ChildFailedError" not in output


def test_two_workers_stopped_on_notice_started_as_a_module_inside_engine(folder: Path) -> None:
    returned, output = run(TORCHRUN_MODULE, "--nproc-per-node", "2", "train.py", "75", cwd=folder / "engine")
    assert returned == 75, output


@pytest.mark.parametrize(("code", "expected", "starts"), [(2, 2, 1), (75, 75, 1), (3, 1, 2)])
def test_what_a_restart_cannot_mend_is_not_restarted(folder: Path, code: int, expected: int, starts: int) -> None:
    returned, output = run(TORCHRUN, "--max-restarts", "1", "engine/train.py", str(code), cwd=folder)
    assert returned == expected and output.count("the recipe is wrong") == starts, output


FIRST_IS_KILLED = """
import os, pathlib, signal, sys, time
print("started", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # as a run that takes torchrun's SIGTERM for a notice
pathlib.Path(f"ready-{os.environ['RANK']}").write_text("")
while len(list(pathlib.Path().glob("ready-*"))) < 2:
    time.sleep(0.01)
if os.environ["RANK"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(120)
"""

FIRST_IS_WRONG = """
import os, sys, time
print("started", flush=True)
if os.environ["RANK"] == "1":
    sys.exit(int(sys.argv[1]))
time.sleep(120)  # without a handler: torchrun's SIGTERM kills it
"""


def test_after_a_kill_all_are_started_again_although_another_ends_with_75(folder: Path) -> None:
    (folder / "engine" / "train.py").write_text(FIRST_IS_KILLED)
    returned, output = run(TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", "engine/train.py", cwd=folder)
    assert returned == 1 and output.count("started") == 4, output


@pytest.mark.parametrize("code", [2, 75])
def test_what_the_first_one_says_counts_although_torchrun_kills_another(folder: Path, code: int) -> None:
    (folder / "engine" / "train.py").write_text(FIRST_IS_WRONG)
    command = ("--nproc-per-node=2", "--max-restarts=1", "engine/train.py", str(code))
    returned, output = run(TORCHRUN, *command, cwd=folder)
    assert returned == code and output.count("started") <= 2 and "Traceback" not in output, output


SAVES_ON_NOTICE = """
import os, pathlib, signal, sys, time
def save(number, frame):
    pathlib.Path(f"saved-{os.environ['RANK']}").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
pathlib.Path(f"ready-{os.environ['RANK']}").write_text("")
time.sleep(120)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_to_torchrun_reaches_its_workers_and_the_caller(folder: Path, sent: signal.Signals) -> None:
    (folder / "engine" / "train.py").write_text(SAVES_ON_NOTICE)
    command = [*TORCHRUN, "--nproc-per-node", "2", "engine/train.py"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert [(folder / f"saved-{rank}").read_text() for rank in (0, 1)] == [sent.name] * 2
    assert "Traceback" not in output


def test_other_codes_stay_as_torchrun_has_them(folder: Path) -> None:
    returned, output = run(TORCHRUN, "engine/train.py", "3", cwd=folder)
    assert returned == 1
    assert "ChildFailedError" in output


def test_other_scripts_stay_as_torchrun_has_them(folder: Path) -> None:
    # Our script's path among the arguments of another one does not make it ours.
    returned, output = run(TORCHRUN, "other.py", "2", "engine/train.py", cwd=folder)
    assert returned == 1
    assert "ChildFailedError" in output


def test_registration_is_harmless_outside_torchrun() -> None:
    hook = sys.excepthook
    factory = torchrun_exit.get_handler()
    assert sys.excepthook is hook
    with pytest.raises(ValueError, match=r"vpgtrans_exit_codes is no rendezvous back end.*expected c10d"):
        factory(object())


@pytest.mark.parametrize(
    ("orig_argv", "expected"),
    [
        (["python", "/opt/bin/torchrun", "engine/train.py"], True),
        (["python", "-X", "dev", "-m", "torch.distributed.run", "engine/train.py"], True),
        (["python", "-m", "vpgtrans.engine.train", "torchrun"], False),
        (["python", "engine/train.py", "torchrun"], False),
        (["python", "-c", "import torchrun"], False),
        (["python"], False),
    ],
)
def test_which_processes_are_torchrun(orig_argv: list[str], expected: bool) -> None:
    assert torchrun_exit.is_torchrun(orig_argv) is expected


def test_train_script_is_found_by_path_or_module() -> None:
    for ours in ("vpgtrans.engine.train", "/a/engine/train.py", "engine/train.py", "./engine/../engine/train.py"):
        assert torchrun_exit._is_train_script(ours), ours
    for other in ("train.py", "engine/train_other.py", "other/train.py", "engine.train", "2"):
        assert not torchrun_exit._is_train_script(other), other
