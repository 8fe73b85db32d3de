"""One name is ours in an environment, `transformer_checks`; every other belongs to the people whose models are checked.

Tried as users have it: a wheel is built and installed into an environment of its own, which shares the other packages
of this one and nothing of this checkout.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from transformer_checks.checks.meet import UsageError
from transformer_checks.checks.run.subjects import subject_of

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = "transformer_checks.checks.plugin"

# -- an environment of a user


class Environment:
    """A virtual environment with the wheel in it, whose processes say how they were started and what they loaded."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        builder = venv.EnvBuilder(symlinks=os.name != "nt")
        builder.create(folder)
        context = builder.ensure_directories(folder)
        self.python, self.bin, self.records = context.env_exe, Path(context.bin_path), folder / "records"
        self.packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        shutil.copytree(
            sysconfig.get_path("purelib"), self.packages, dirs_exist_ok=True, ignore=_left_out, copy_function=_linked
        )
        (self.packages / "recorder.py").write_text(RECORDER)
        (self.packages / "recorder.pth").write_text("import recorder\n")
        self.install("--no-index", str(wheel))

    def install(self, *what: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", *what], check=True, timeout=300)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of its processes, without what this process was started with."""
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
        return {**kept, "OMP_NUM_THREADS": "1", "RECORDS": str(self.records)}

    def run(self, *command: str, cwd: Path) -> str:
        """What a command printed that must succeed."""
        with self.recorded():
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=300, cwd=cwd, env=self.variables, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Every process that ends inside must have loaded each module of ours once, under our name, from the wheel."""
        shutil.rmtree(self.records, ignore_errors=True)
        self.records.mkdir()
        yield
        self.processes = [json.loads(path.read_text()) for path in self.records.iterdir()]
        assert self.processes
        for process in self.processes:
            files = process["modules"].values()
            assert not [file for file in files if file.startswith(str(ROOT))], process["command"]
            ours = {
                name: file for name, file in process["modules"].items() if f"{os.sep}transformer_checks{os.sep}" in file
            }
            assert {name.partition(".")[0] for name in ours} <= {"transformer_checks", "__main__"}
            assert not [file for file, times in Counter(ours.values()).items() if times > 1], process["command"]

    @property
    def commands(self) -> list[str]:
        """How the processes of the last run were started."""
        return [" ".join(process["command"]) for process in self.processes]

    def loaded(self, name: str) -> bool:
        """Whether a process of the last run loaded a module of this name."""
        return any(name in process["modules"] for process in self.processes)


# Runs at the start of every process of such an environment. The end may be os._exit.
RECORDER = """
import atexit, json, os, sys, time


def write():
    modules = {name: str(getattr(module, "__file__", None)) for name, module in list(sys.modules.items())}
    modules.pop("__mp_main__", None)  # multiprocessing's other name for __main__
    with open(os.path.join(folder, f"{os.getpid()}-{time.time_ns()}.json"), "w") as file:
        json.dump({"command": sys.orig_argv, "modules": modules}, file)


def write_and_exit(status, exit=os._exit):
    write()
    exit(status)


folder = os.environ.get("RECORDS")
if folder:
    atexit.register(write)
    os._exit = write_and_exit
"""


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """This checkout's own installation, and most of the files that no run here reads."""
    ours = {file.parts[0] for file in importlib.metadata.distribution("transformer-checks").files or ()}
    unread = {"include", "tests", "third_party"}
    large = {"transformers", "mypy", "mypyc", "setuptools", "pip", "huggingface_hub"}
    return (ours | large if folder == sysconfig.get_path("purelib") else unread).intersection(names)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory, wheel) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("environment")
    yield Environment(folder, wheel)
    shutil.rmtree(folder)


# -- what is installed


def digest(content: bytes) -> str:
    """As a RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def a_wheel(folder: Path, name: str) -> Path:
    """A distribution of somebody else that installs the package `name`."""
    version = f"somebodys_{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": 'WHOSE = "another distribution"\n',
        f"{name}/plugin.py": "",
        f"{version}/METADATA": f"Metadata-Version: 2.1\nName: somebodys-{name}\nVersion: 1.0\n",
        f"{version}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"somebodys_{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        lines = [f"{file},sha256={digest(text.encode())},{len(text)}" for file, text in files.items()]
        archive.writestr(f"{version}/RECORD", "\n".join([*lines, f"{version}/RECORD,,"]) + "\n")
    return path


def test_the_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"transformer_checks"}
    for name in ("__init__", "__main__", "checks/plugin", "checks/check_causality", "transformer/model"):
        assert f"transformer_checks/{name}.py" in names
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_distributions_that_install_checks_and_transformer_fit_beside_ours(environment, wheel, tmp_path):
    target = tmp_path / "packages"
    theirs = [str(a_wheel(tmp_path, name)) for name in ("checks", "transformer")]
    environment.install("--no-index", "--no-compile", "--target", str(target), str(wheel), *theirs)
    files = [
        f for d in importlib.metadata.distributions(path=[str(target)]) for f in d.files or () if ".." not in f.parts
    ]
    assert len(files) > 150 and max(Counter(map(str, files)).values()) == 1
    for file in files:
        assert file.hash is None or file.hash.value == digest(Path(file.locate()).read_bytes()), f"{file} is another's"


# -- their own repositories

CONFTEST = """
def pytest_addoption(parser):
    for name in ("--gpu", "--device", "--seed", "--model"):
        parser.addoption(name, default="theirs")
"""
OPTIONS = """
import pytest


@pytest.mark.parametrize("name", ["gpu", "device", "seed", "model"])
def test_the_option_is_the_repositorys(request, name):
    assert request.config.getoption(name) == ("mine" if name == "model" else "theirs")
"""
RULES = f"""
import checks
from checks.check_style import check_lines


def test_theirs(request):
    assert checks.WHOSE == "theirs" and check_lines("a line")
    assert request.config.pluginmanager.hasplugin("{PLUGIN}")
"""


def test_a_repository_with_a_package_called_checks_runs_its_own_tests(environment, tmp_path):
    for folder in ("checks", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "checks/__init__.py").write_text('WHOSE = "theirs"\n')
    (tmp_path / "checks/check_style.py").write_text("def check_lines(text):\n    return text.isprintable()\n")
    (tmp_path / "checks/test_rules.py").write_text(RULES)
    (tmp_path / "tests/test_theirs.py").write_text(RULES)
    said = environment.run(environment.python, "-m", "pytest", "-p", "no:cacheprovider", cwd=tmp_path)
    assert "2 passed" in said and "model: " not in said
    assert environment.loaded(PLUGIN) and not environment.loaded("torch")


@pytest.mark.parametrize("folder", [".", "tests"])
def test_a_repository_with_options_of_these_names_runs_its_own_tests(environment, tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "conftest.py").write_text(CONFTEST)
    (tmp_path / folder / "test_theirs.py").write_text(OPTIONS)
    command = (environment.python, "-m", "pytest", folder, "--model", "mine", "-p", "no:cacheprovider")
    said = environment.run(*command, cwd=tmp_path)
    assert "4 passed" in said and "model: " not in said


# -- their models

MODEL = """
import torch
from torch import nn

{imports}


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        assert {all_theirs} == "{whose}"
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        import late

        assert late.WHOSE == "{whose}"
        return self.head(self.embedding(tokens).cumsum(dim=1)) * {scale}
"""
IMPORTED = ("checks", "transformer", "utils")
STANDARD = ("timeit", "random", "torch")
SHAPES = ("-k", "check_logits_have_shape", "--seed", "1", "-p", "no:cacheprovider", "-q")


def folder_of(path: Path, whose: str, scale: float = 1.0, imported: tuple[str, ...] = IMPORTED) -> Path:
    """A student's folder in which nearly every name is taken."""
    path.mkdir(exist_ok=True)
    all_theirs = " == ".join(f"{name}.WHOSE" for name in imported)
    imports = "\n".join(f"import {name}" for name in imported)
    (path / "model.py").write_text(MODEL.format(whose=whose, scale=scale, imports=imports, all_theirs=all_theirs))
    for name in (*imported, "late", "tests"):
        (path / f"{name}.py").write_text(f'WHOSE = "{whose}"\n')
    return path


def crowded(path: Path) -> Path:
    """The same, with files that are called as modules of Python and of ours are, and a conftest."""
    folder_of(path, "student")
    for name in STANDARD:
        (path / f"{name}.py").write_text('raise RuntimeError("this is no standard library")\n')
    (path / "conftest.py").write_text("")
    return path


def test_by_pytest(environment, tmp_path):
    """As the command `pytest` starts: without the working directory on the path."""
    command = (environment.python, "-P", "-m", "pytest", "--model", "model.py", *SHAPES)
    assert "1 passed" in environment.run(*command, cwd=crowded(tmp_path / "student"))


def test_by_the_command(environment, tmp_path):
    command = str(environment.bin / "transformer-checks")
    said = environment.run(command, "model.py", *SHAPES, cwd=crowded(tmp_path / "student"))
    assert "1 passed" in said
    assert [f"-p {PLUGIN}" in started for started in sorted(environment.commands, key=len)] == [False, True]


def test_by_python_m(environment, tmp_path):
    command = (environment.python, "-m", "transformer_checks", "model.py", *SHAPES)
    assert "1 passed" in environment.run(*command, cwd=crowded(tmp_path / "student"))


def test_a_homework_called_transformer(environment, tmp_path):
    """`python -m` puts the working directory first on the path of every import."""
    folder = folder_of(tmp_path / "homework", "student", imported=("transformer",))
    said = environment.run(environment.python, "-m", "pytest", "--model", "model.py", *SHAPES, cwd=folder)
    assert "1 passed" in said


@pytest.fixture
def package(environment, tmp_path) -> Iterator[Path]:
    """A user's own package `transformer`, by an editable install into the same environment."""
    project = tmp_path / "project"
    (project / "transformer").mkdir(parents=True)
    (project / "transformer" / "__init__.py").write_text('WHOSE = "user"\n')
    (project / "pyproject.toml").write_text(
        '[project]\nname = "my-transformer"\nversion = "1"\n'
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["transformer"]\ndev-mode-dirs = ["."]\n'
    )
    environment.install("--no-build-isolation", "--editable", str(project))
    yield project / "transformer"
    for path in environment.packages.glob("*my_transformer*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def test_a_package_of_their_own_called_transformer_stays_theirs(environment, package, tmp_path):
    folder = folder_of(tmp_path / "elsewhere", "user", imported=("transformer",))
    (folder / "transformer.py").unlink()
    (folder / "test_theirs.py").write_text(
        'def test_it():\n    import transformer\n    assert transformer.WHOSE == "user"\n'
    )
    for command in (["test_theirs.py", "-p", "no:cacheprovider"], ["--model", "model.py", *SHAPES]):
        assert "1 passed" in environment.run(environment.python, "-m", "pytest", *command, cwd=folder)
        assert [p["modules"]["transformer"] for p in environment.processes] == [str(package / "__init__.py")]


# -- processes that ours start


def test_two_processes_of_a_check_start_by_the_one_name(environment, tmp_path):
    folder = folder_of(tmp_path / "homework", "student", imported=("transformer",))
    words = ("-k", "check_two_processes_train_as_one", "--slow", "--seed", "1", "-p", "no:cacheprovider", "-q")
    said = environment.run(environment.python, "-m", "pytest", "--model", "model.py", *words, cwd=folder)
    assert "1 passed" in said
    assert len([c for c in environment.commands if "transformer_checks.checks.probes.two_processes" in c]) == 2


def test_torchrun_starts_by_the_one_name(environment, tmp_path):
    folder = folder_of(tmp_path / "homework", "student", imported=("transformer",))
    small = ("--n_embd", "8", "--n_head", "2", "--batch_size", "4", "--steps", "1", "--stop_loss", "null")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (environment.python, *launch, "-m", "transformer_checks.transformer", "train", *small)
    environment.run(*command, "--out", "two", cwd=folder)
    assert (folder / "two" / "checkpoint.pt").exists()
    assert len([c for c in environment.commands if "-m transformer_checks.transformer train" in c]) == 3


# -- in a notebook

HOMEWORK = """
import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).cumsum(dim=1))
"""
THEIRS_FIRST = ("from transformer import GPT", "from transformer_checks import check_model")


@pytest.mark.parametrize("imports", [THEIRS_FIRST, THEIRS_FIRST[::-1]], ids=["theirs first", "ours first"])
def test_a_notebook_beside_a_homework_called_transformer(environment, tmp_path, imports):
    (tmp_path / "transformer.py").write_text(HOMEWORK)
    (tmp_path / "model.py").write_text("from transformer import GPT\n")
    specification = {"argv": [environment.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                     "display_name": "theirs", "language": "python"}  # fmt: skip
    (tmp_path / "kernels" / "theirs").mkdir(parents=True)
    (tmp_path / "kernels" / "theirs" / "kernel.json").write_text(json.dumps(specification))
    found = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")], ensure_native_kernel=False)
    kernel = KernelManager(
        kernel_name="theirs", kernel_spec_manager=found, connection_file=str(tmp_path / "kernel.json")
    )
    with environment.recorded():
        kernel.start_kernel(cwd=str(tmp_path), env=environment.variables)
        client = kernel.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            same = "import transformer; assert transformer.GPT is GPT"
            shapes = "checks=['check_logits_have_shape'], seed=1"
            for cell in (*imports, f"check_model(GPT, {shapes})", f"check_model('model.py', {shapes})", same):
                shown: list[dict] = []
                reply = client.execute_interactive(cell, timeout=120, output_hook=shown.append)["content"]
                assert reply["status"] == "ok", "\n".join(reply["traceback"])
                if cell.startswith("check_model"):
                    result = next(m["content"]["data"] for m in shown if m["msg_type"] == "execute_result")
                    assert "1 passed" in result["text/plain"]
        finally:
            client.stop_channels()
            kernel.shutdown_kernel()
    assert [p["modules"]["transformer"] for p in environment.processes] == [str(tmp_path / "transformer.py")]


# -- in a checkout


def test_checks_imported_by_its_folders_name_says_what_to_write():
    done = subprocess.run(
        [sys.executable, "-c", "from checks import check_model"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: write `from transformer_checks import check_model`")


def test_a_file_called_like_a_standard_module_is_said_to(tmp_path):
    (tmp_path / "random.py").write_text("def noise(x):\n    return x\n")
    (tmp_path / "model.py").write_text("import torch\nfrom random import noise\n")
    (tmp_path / "other.py").write_text(
        "import random\nfrom torch import nn\n\n\nclass GPT(nn.Module):\n    def __init__(self, vocab_size):\n"
        "        super().__init__()\n        self.noise = random.noise(1)\n"
    )
    for name in ("model.py", "other.py"):
        with pytest.raises(UsageError, match=r"give random\.py beside it another name") as refusal:
            subject_of(str(tmp_path / name))
        assert name in str(refusal.value)


def test_two_files_of_one_name_are_two_models(tmp_path):
    one = subject_of(str(folder_of(tmp_path / "one", "one") / "model.py"))
    two = subject_of(str(folder_of(tmp_path / "two", "two", scale=2.0) / "model.py"))
    tokens = one.tokens(2, 5)
    a, b = one.build(), two.build()
    assert type(a) is not type(b)
    assert not one.logits(a, tokens).equal(two.logits(b, tokens))
    assert (2.0 * one.logits(a, tokens)).allclose(two.logits(b, tokens))


def test_nothing_of_theirs_stays(tmp_path):
    folder = folder_of(tmp_path / "student", "student")
    path, before = list(sys.path), {n: m for n, m in sys.modules.items() if n.startswith("transformer_checks")}
    subject = subject_of(str(folder / "model.py"))
    subject.logits(subject.build(), subject.tokens(2, 3))
    assert sys.path == path
    assert {n: sys.modules.get(n) for n in before} == before
    theirs = [name for name, m in sys.modules.items() if str(folder) in str(getattr(m, "__file__", ""))]
    assert theirs == []
    assert not (folder / "__pycache__").exists()


def test_a_class_of_theirs_can_still_import_when_it_runs(tmp_path):
    """`import late` stands inside forward: their folder is there again whenever their code runs."""
    subject = subject_of(str(folder_of(tmp_path / "student", "student") / "model.py"))
    model = subject.build()
    for _ in range(2):
        assert subject.logits(model, subject.tokens(1, 4)).shape == (1, 4, 17)
    assert "late" not in sys.modules
