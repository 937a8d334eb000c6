"""The cells in which a change is tried, each in an environment of its own, which is removed when the cell is done.

`nox --list` names them, `nox -s oldest` runs one, and .ci/run the ones that must hold before a change lands.
"""

import shutil
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import nox

ROOT = Path(__file__).parent

#: The oldest of all run-time dependencies together; torchvision is that torch's.
OLDEST = ("torch==2.6.0", "torchvision==0.21.0", "timm==1.0.15", "scipy==1.11.4", "numpy==1.26.4")
#: Where the slow tests, the site's among them, and what looks at the source alone run: once is enough.
THOROUGH = "3.13"

#: The files of the library, and those that the sdist has besides: patterns, and names that must be there.
LIBRARY = ("hyperproto/**/*.py", "hyperproto/py.typed")
SDIST = (
    *("tests/**/*.py", "tests/data/checkpoint_0.1.0.pt", "tests/mutation/*.toml"),
    *("examples/*.py", "experiments/*.py", "experiments/results/*.jsonl"),
    *("docs/**/*.md", "docs/images/*.png", "docs/mathjax/*", "docs/*.css", "mkdocs.yml"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "noxfile.py", "pyproject.toml", ".gitignore"),
)
METADATA = ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")

VERSIONS = """
import platform, importlib.metadata as metadata
names = ("torch", "torchvision", "timm", "scipy", "numpy")
print("Python", platform.python_version(), *(f"{name} {metadata.version(name)}" for name in names))
"""

TRY_OUTSIDE = """
import pathlib, timm, hyperproto
package = pathlib.Path(hyperproto.__file__).parent
assert package.parent.name == "site-packages" and (package / "py.typed").exists(), package
model = hyperproto.convert_model(timm.create_model("test_resnet", num_classes=10), dim=5)
assert hyperproto.DynamicAssigner(model).head is model.fc
print("hyperproto", hyperproto.__version__, "from the wheel")
"""


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The fast suite with the oldest versions of the range."""
    with environment(session, "-e", ".[test,examples]", *OLDEST):
        fast_suite(session)


@nox.session(python=["3.10", "3.11", "3.13", "3.14"])
def newest(session: nox.Session) -> None:
    """The fast suite with the newest versions that this Python gets; on one Python, everything else as well."""
    thorough = session.python == THOROUGH
    with environment(session, "-e", ".[test,examples,docs,exporters,frameworks]" if thorough else ".[test,examples]"):
        if thorough:
            with part(session, "ruff and mypy"):
                session.run("ruff", "check", ".")
                session.run("ruff", "format", "--check", ".")
                session.run("mypy")
        fast_suite(session)
        if thorough:
            with part(session, "slow tests and the site"):
                session.run("pytest", "-m", "slow")


@nox.session(python=THOROUGH)
def dist(session: nox.Session) -> None:
    """Wheel and sdist: built, checked, and nothing in them that does not belong there."""
    with environment(session, "build", "twine"):
        built = folder_of_distributions(session)
        shutil.rmtree(built, ignore_errors=True)
        with part(session, "build"):
            session.run("python", "-m", "build", "--outdir", str(built), ".", silent=True)
            session.run("twine", "check", "--strict", *map(str, built.iterdir()))
        check_contents(session, built)


@nox.session(python=THOROUGH)
def wheel(session: nox.Session) -> None:
    """What `dist` built, in a fresh environment, outside the tree: imported, and the quickstart in its short form."""
    [path] = folder_of_distributions(session).glob("*.whl")
    with environment(session, f"{path}[examples]"), part(session, "the wheel outside the tree"):
        session.chdir(session.create_tmp())
        session.run("python", "-c", TRY_OUTSIDE)
        session.run("python", str(ROOT / "examples" / "quickstart.py"), "--short", "--picture", "quickstart.png")


@contextmanager
def environment(session: nox.Session, *requirements: str) -> Iterator[None]:
    """What the session needs, installed; several GB, therefore removed whatever happens."""
    session.env.update(MPLBACKEND="Agg", HF_HUB_OFFLINE="1")
    try:
        with part(session, "install"):
            session.install(*requirements)
        yield
    finally:
        session.chdir(ROOT)
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)


@contextmanager
def part(session: nox.Session, what: str) -> Iterator[None]:
    """Says how long a part of the session took."""
    start = time.monotonic()
    yield
    session.log(f"{session.name}, {what}: {time.monotonic() - start:.0f} s")


def fast_suite(session: nox.Session) -> None:
    """Everything but the slow tests; then a line that says how many were skipped, and why."""
    session.run("python", "-c", VERSIONS)
    report = Path(session.create_tmp(), "report.xml")
    with part(session, "tests and doctests"):
        session.run("pytest", "-n", "auto", f"--junitxml={report}")
    reasons = Counter(skip.get("message") for skip in ElementTree.parse(report).iter("skipped"))
    told = "; ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
    session.log(f"{session.name}: {reasons.total()} tests skipped: {told}")


def folder_of_distributions(session: nox.Session) -> Path:
    """What `dist` leaves for `wheel`."""
    return session.cache_dir / "distributions"


def check_contents(session: nox.Session, built: Path) -> None:
    """Compare what was packed with what the lists above say."""
    [wheel_file], [sdist_file] = built.glob("*.whl"), built.glob("*.tar.gz")
    name = sdist_file.name.removesuffix(".tar.gz")
    with zipfile.ZipFile(wheel_file) as packed:
        metadata = {f"{name}.dist-info/{file}" for file in METADATA}
        compare(session, wheel_file, set(packed.namelist()), named(LIBRARY) | metadata)
    with tarfile.open(sdist_file) as packed:
        files = {member.name.removeprefix(f"{name}/") for member in packed if member.isfile()}
        compare(session, sdist_file, files, named(LIBRARY) | named(SDIST) | {"PKG-INFO"})


def named(patterns: tuple[str, ...]) -> set[str]:
    """The files of the tree that match a pattern, and the names that are none whether they are there or not."""
    found = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    return found | {pattern for pattern in patterns if "*" not in pattern}


def compare(session: nox.Session, path: Path, files: set[str], expected: set[str]) -> None:
    """Fail where a distribution holds other files than expected."""
    if files != expected:
        session.error(f"{path.name}: unexpected {sorted(files - expected)}, missing {sorted(expected - files)}")
    session.log(f"{path.name}: {len(files)} files, as expected")
