"""The console's files: public, checked for changes by their tags, under a policy that lets nothing else in."""

from __future__ import annotations

import re

from fastapi import FastAPI
from starlette.testclient import TestClient

from llm_api_server.gateway.routes.console import ConsoleFiles, console_routes

FILES = ConsoleFiles()


def client() -> TestClient:
    app = FastAPI()
    app.include_router(console_routes(FILES))
    return TestClient(app)


def test_every_file_that_a_file_names_is_there() -> None:
    with client() as browser:
        page = browser.get("/console")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        named = set(re.findall(r'(?:src|href)="(/[^"]+)"', page.text))
        for path in FILES.paths:
            answer = browser.get(path)
            assert answer.status_code == 200
            folder = path.rpartition("/")[0]
            for module in re.findall(r'from "(\.{1,2}/[^"]+)"', answer.text if path.endswith(".js") else ""):
                up, _, name = module.partition("/")
                named.add(f"{folder}/{name}" if up == "." else f"{folder.rpartition('/')[0]}/{name}")
        assert named <= FILES.paths
        assert FILES.paths - named == {"/console", "/console/"}


def test_policy_and_tags() -> None:
    with client() as browser:
        first = browser.get("/console/app.js")
        policy = first.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        again = browser.get("/console/app.js", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = browser.get("/console/app.js", headers={"if-none-match": '"other"'})
        assert other.content == first.content


def test_nothing_in_the_page_that_its_policy_forbids() -> None:
    with client() as browser:
        for path in FILES.paths:
            text = browser.get(path).text
            assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
            assert "https://" not in text
            assert not re.search(r"<script(?! type=\"module\" src)|<style|\son\w+=\"|innerHTML|eval\(", text)


def test_every_text_has_its_chinese() -> None:
    with client() as browser:
        texts = {path: browser.get(path).text for path in FILES.paths if path.endswith(".js")}
    chinese = set(re.findall(r'"([^"]+)": "', texts["/console/zh.js"]))
    shown = {text for source in texts.values() for text in re.findall(r'\bt\("([^"]+)"\)', source)}
    assert shown - chinese == set()
    assert len(shown) > 150


def test_all_modules_are_asked_for_at_once() -> None:
    with client() as browser:
        page = browser.get("/console").text
    assert set(re.findall(r'(?:modulepreload" href|module" src)="([^"]+)"', page)) == {
        path for path in FILES.paths if path.endswith(".js")
    }
