"""Files of the console: public, revalidated by etag, under a strict content security policy."""

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


def test_every_referenced_file_exists_and_every_file_is_referenced() -> None:
    with client() as browser:
        page = browser.get("/console")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        named = set(re.findall(r'(?:src|href)="(/[^"]+)"', page.text))
        for path in FILES.paths:
            response = browser.get(path)
            assert response.status_code == 200
            folder = path.rpartition("/")[0]
            for module in re.findall(r'from "(\.{1,2}/[^"]+)"', response.text if path.endswith(".js") else ""):
                up, _, name = module.partition("/")
                named.add(f"{folder}/{name}" if up == "." else f"{folder.rpartition('/')[0]}/{name}")
        assert named <= FILES.paths
        assert FILES.paths - named == {"/console", "/console/"}


def test_files_have_a_policy_and_an_etag() -> None:
    with client() as browser:
        first = browser.get("/console/app.js")
        policy = first.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        again = browser.get("/console/app.js", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = browser.get("/console/app.js", headers={"if-none-match": '"other"'})
        assert other.content == first.content


def test_files_contain_nothing_that_the_policy_forbids() -> None:
    with client() as browser:
        for path in FILES.paths:
            text = browser.get(path).text
            assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
            assert "https://" not in text
            assert not re.search(r"<script(?! type=\"module\" src)|<style|\son\w+=\"|innerHTML|eval\(", text)


def test_every_text_has_a_chinese_translation() -> None:
    with client() as browser:
        texts = {path: browser.get(path).text for path in FILES.paths if path.endswith(".js")}
    chinese = set(re.findall(r'"([^"]+)": "', texts["/console/zh.js"]))
    shown = {text for source in texts.values() for text in re.findall(r'\bt\("([^"]+)"\)', source)}
    assert shown - chinese == set()
    assert len(shown) > 150


def test_the_page_preloads_all_modules() -> None:
    with client() as browser:
        page = browser.get("/console").text
    assert set(re.findall(r'(?:modulepreload" href|module" src)="([^"]+)"', page)) == {
        path for path in FILES.paths if path.endswith(".js")
    }
