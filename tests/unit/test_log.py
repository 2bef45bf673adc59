"""Log files and console: everything at or above the level, and never a key."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loguru import logger

from llm_api_server.config.models import Config
from llm_api_server.log import Process, log_lines, setup_logging
from llm_api_server.log_file import SharedLogFile

KEY = "team-key-without-the-usual-form"
REMOTE_KEY = "remote-key-4711"
JWT_SECRET = "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJlLW9mLXRoaXM"
OTHER_KEY = "sk-of_somebody-else-0123456789"
PLANTED = (KEY, REMOTE_KEY, JWT_SECRET, JWT, OTHER_KEY)

Configure = Callable[..., Config]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logger.remove()
    logger.configure(patcher=lambda _: None)
    logging.captureWarnings(capture=False)
    root.handlers, root.level = handlers, level


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    def build(**options: object) -> Config:
        return Config.model_validate(
            {
                "auth": {"secret_key": JWT_SECRET, "api_keys": [{"key": KEY, "name": "me"}]},
                "models": {"available": {"far": {"path": "http://h/v1", "api_key": REMOTE_KEY}}},
                "logging": {"console": False, **options},
                "source": tmp_path / "config.yaml",
            }
        )

    return build


def refuse(what: str) -> None:
    raise ValueError(f"refused {what}")


def written(tmp_path: Path, name: str = "gateway") -> str:
    return (tmp_path / "logs" / f"{name}.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("process", ["gateway", "manager"])
def test_each_process_has_its_file_in_the_configured_format(tmp_path: Path, configure: Configure, process: str) -> None:
    setup_logging(configure(format="{level}~{message}", level="warning"), process)  # type: ignore[arg-type]
    logger.info("hidden")
    logger.warning("shown")
    assert written(tmp_path, process) == "WARNING~shown\n"


@pytest.mark.parametrize("level", ["TRACE", "INFO", "ERROR"])
@pytest.mark.parametrize("secret", PLANTED)
def test_no_planted_secret_is_written(
    tmp_path: Path, configure: Configure, capsys: pytest.CaptureFixture[str], secret: str, level: str
) -> None:
    setup_logging(configure(level=level, console=True, format="{message} {extra}"), "gateway")
    number = logger.level(level).no
    logger.log(level, "headers: {}", {"authorization": f"Bearer {secret}"})
    logger.log(level, f"url http://h/?api_key={secret}&x=1")
    logger.bind(header=secret).log(level, "bound")
    logging.getLogger("elsewhere").log(max(number, 5), "standard %s", secret)
    try:
        refuse(secret)
    except ValueError:
        logger.exception(f"with {secret}")
    shown = written(tmp_path) + capsys.readouterr().err
    assert "ValueError: refused" in shown
    assert "standard" in shown
    assert secret not in shown


@pytest.mark.parametrize(
    "text", ["disk-usage of task-runner-12345678", "risk-free", "sha256: 0123abcd", "bearer of news"]
)
def test_ordinary_words_are_not_redacted(tmp_path: Path, configure: Configure, text: str) -> None:
    setup_logging(configure(), "gateway")
    logger.info("{}", text)
    assert text in written(tmp_path)


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\x1b[2K\r", "\x85", "\u2028", "\x0b"])
def test_a_message_cannot_forge_a_line(tmp_path: Path, configure: Configure, separator: str) -> None:
    setup_logging(configure(format="LINE {message}"), "gateway")
    logger.info("model {}", f"x{separator}LINE admin logged in")
    try:
        refuse(f"y{separator}LINE admin logged in")
    except ValueError:
        logger.exception("failed")
    text = written(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("LINE admin")] == []
    assert sum(line.startswith("LINE ") for line in text.splitlines()) == 2
    assert "\x1b" not in text


def test_values_of_variables_are_not_written(tmp_path: Path, configure: Configure) -> None:
    setup_logging(configure(level="TRACE"), "gateway")
    prompt = "what the user wrote".upper()
    try:
        int(prompt[:0])
    except ValueError:
        logger.exception("failed")
    assert "ValueError: invalid literal" in written(tmp_path)
    assert prompt not in written(tmp_path)


def test_standard_logging_keeps_its_levels_and_callers(tmp_path: Path, configure: Configure) -> None:
    setup_logging(configure(format="{level} {function} {message}"), "gateway")
    logging.getLogger("uvicorn.error").info("from uvicorn")
    logging.getLogger("uvicorn.access").info("access line")
    logging.getLogger("gunicorn.error").warning("from %s", "gunicorn")
    logging.getLogger("x").log(33, "odd level")
    logging.getLogger("x").debug("too quiet")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        setup_logging(configure(format="{level} {function} {message}"), "gateway")
        warnings.warn("deprecated thing", UserWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    name = "test_standard_logging_keeps_its_levels_and_callers"
    lines = written(tmp_path).splitlines()
    assert lines[:3] == [
        f"INFO {name} from uvicorn",
        f"WARNING {name} from gunicorn",
        f"Level 33 {name} odd level",
    ]
    assert "deprecated thing" in lines[3]
    assert len(lines) == 4


def test_an_unwritable_directory_is_a_warning_on_the_console(
    tmp_path: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file is in the way")
    setup_logging(configure(), "manager")
    logger.info("goes on")
    shown = capsys.readouterr().err
    assert "cannot write the log file" in shown
    assert "goes on" in shown


@pytest.mark.parametrize("process", ["gateway", "manager"])
def test_gateway_and_manager_share_the_console(
    tmp_path: Path, configure: Configure, capsys: pytest.CaptureFixture[str], process: Process
) -> None:
    setup_logging(configure(console=True), process)
    logger.info("hello")
    assert "hello" in capsys.readouterr().err
    assert "hello" in written(tmp_path, process)


def test_a_second_setup_replaces_the_first(tmp_path: Path, configure: Configure) -> None:
    setup_logging(configure(format="old {message}"), "gateway")
    setup_logging(configure(format="new {message}"), "gateway")
    logger.info("once")
    assert written(tmp_path) == "new once\n"


def test_several_processes_lose_no_line_while_they_rotate(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from loguru import logger
from llm_api_server.log_file import SharedLogFile
logger.remove()
logger.add(SharedLogFile(Path(sys.argv[1]), 2000, None), format="{message}")
for number in range(300):
    logger.info(f"{sys.argv[2]} {number}")
"""
    path = tmp_path / "shared.log"
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(name)], stderr=subprocess.PIPE)
        for name in range(3)
    ]
    errors = [writer.communicate()[1] for writer in writers]
    assert errors == [b"", b"", b""]
    files = sorted(tmp_path.glob("shared*.log"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(f"{name} {number}" for name in range(3) for number in range(300))
    assert len(files) > 2
    assert all(file.stat().st_size <= 2000 for file in files)


def test_retention_removes_old_files(tmp_path: Path) -> None:
    logger.remove()
    logger.add(SharedLogFile(tmp_path / "short.log", 50, 2), format="{message}")
    for number in range(40):
        logger.info("line {}", number)
    assert 2 <= len(list(tmp_path.glob("short*.log"))) <= 3


def test_lines_logged_together_are_separate_messages(tmp_path: Path, configure: Configure) -> None:
    setup_logging(configure(format="{level} {message} !"), "gateway")
    log_lines("DEBUG", ["too fine"])
    log_lines("INFO", ["one", "key sk-0123456789abcdef seen", "three\nfour\x1efive"])
    log_lines("INFO", ["alone"])
    assert written(tmp_path).splitlines() == [
        "INFO one !",
        "INFO key sk-*** seen !",
        "INFO three\\nfour\\x1efive !",
        "INFO alone !",
    ]


@pytest.mark.parametrize("text", ["\ud83d", "a\udfffb", "\udc00\ud800"])
def test_no_line_is_lost_to_an_encoding(tmp_path: Path, configure: Configure, text: str) -> None:
    setup_logging(configure(format="{message} {extra}"), "gateway")
    escaped = text.encode("ascii", "backslashreplace").decode()
    logger.info("seen {}", text)
    logger.bind(value=text).info("bound")
    log_lines("INFO", [f"together {text}", "next"])
    logging.getLogger("x").warning("standard %s", text)
    try:
        refuse(text)
    except ValueError:
        logger.exception("failed")
    for line in (
        f"seen {escaped}",
        "bound",
        f"together {escaped}",
        "next",
        f"standard {escaped}",
        f"refused {escaped}",
    ):
        assert line in written(tmp_path)


def test_a_file_escapes_what_its_encoding_lacks(tmp_path: Path) -> None:
    sink = SharedLogFile(tmp_path / "x.log", None, None)
    sink.write("one \ud83d\n")
    sink.write("two ü\n")
    sink.stop()
    assert (tmp_path / "x.log").read_text(encoding="utf-8") == "one \\ud83d\ntwo ü\n"
